"""The demo's first part: a published network is specialised to a design space, method by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

from peft_any._tree import fused
from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.autodiff import value_and_grad
from peft_any.backend import Backend, from_numpy, move, namespace, to_numpy
from peft_any.demo.airfoil import (
    BACK,
    FILES,
    averaged,
    errors,
    flights,
    network,
    with_mirror_images,
)
from peft_any.errors import UsageError, VerifyError, nearest
from peft_any.io.safetensors import read_safetensors
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.model import PeftModel
from peft_any.receipt import Host
from peft_any.registry import Config
from peft_any.train import adamw, apply_updates, cosine

ABOUT = (
    "The weights are real and published (NeuralFoil, MIT licence). The targets are the answers of "
    "the larger published nn-xlarge in the design space: a distillation, no wind-tunnel data."
)
FLIGHTS, UNSEEN, BATCH, STEPS, POINTS = 3000, 500, 128, 800, 24
"""Flights to learn from, flights to measure on, flights per step, steps, measurements of a run."""
SUMS = 1e-4
"""What outputs of the whole network may differ by, where sums are taken in another order."""
ALL, SQUARE = r"net\.\d", r"net\.[2468]"
"""Every layer; and those whose inputs, 64, blocks of 8 divide."""

ADAPTERS: dict[str, tuple[Config, float]] = {
    "lora": (LoraConfig(r=8, lora_alpha=16, target_modules=ALL), 4e-3),
    "dora": (LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=ALL), 4e-3),
    "oft": (OFTConfig(r=0, oft_block_size=8, target_modules=SQUARE), 2e-3),
}
"""Configurations and learning rates."""
PARTS: dict[str, tuple[Callable[[str], bool], float]] = {
    "head": (lambda name: name.startswith("net.8."), 5e-3),
    "bias": (lambda name: name.endswith(".bias"), 8e-3),
    "full": (lambda _: True, 1e-3),
}
"""Which of the network's own tensors are trained, and learning rates."""
METHODS = ("base", "head", "bias", "lora", "dora", "oft", "full")

Apply: TypeAlias = Callable[[Any, Mapping[str, Array], Any], Any]


@dataclass(frozen=True)
class Row:
    """What a method came to: mean error of CL, mean relative error of CD, what it took."""

    method: str
    cl_mae: float
    cd_rel: float
    trainable: int
    seconds: float


@dataclass
class Found:
    """Every method's row, its errors of CL while it was trained, and whether merges held.

    The last is None where no method had anything to merge.
    """

    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    merged_equals_adapted: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give it as a document for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """The flights, as arrays of the host; inputs have the mirror images below them."""

    base: Params
    inputs: Host
    targets: Host
    unseen: Host
    answers: Host
    to: Backend

    @classmethod
    def draw(cls, seed: int, to: Backend) -> Task:
        """Ask the larger network; the unseen flights are the same for every seed."""
        large = read_safetensors(FILES / "nn-xlarge.safetensors")

        def ask(n: int, *key: int) -> tuple[Host, Host]:
            inputs = flights(n, np.random.default_rng(key))
            return inputs, averaged(network(large, with_mirror_images(inputs)), BACK)

        base = move(read_safetensors(FILES / "nn-medium.safetensors"), to)
        return cls(dict(base), *ask(FLIGHTS, 1, seed), *ask(UNSEEN, 0), to)

    def measure(self, outputs: Array) -> tuple[float, float]:
        """Give the errors of CL and CD on the unseen flights."""
        return errors(averaged(to_numpy(outputs), BACK), self.answers)


def specialise(
    backend: Backend,
    *,
    methods: Sequence[str] = METHODS,
    steps: int = STEPS,
    seed: int = 0,
    folder: Path,
    tell: Callable[[str], object] = lambda _: None,
) -> Found:
    """Train the small network by several methods to answer as the larger one does.

    Parameters
    ----------
    backend : Backend
        Where to train.
    methods : sequence of str
        Of `METHODS`; the untrained network is always measured.
    steps, seed : int
        How long to train, and the seed of flights, initial values and batches.
    folder : Path
        Trained adapters are saved to ``folder/<method>``, loaded again, merged and compared.
    tell : callable
        Gets the name of each method as it starts.

    Raises
    ------
    UsageError
        If a method is not known, or there is no step.
    VerifyError
        If a merged network answers otherwise than the adapted one.
    """
    for name in methods:
        if name not in METHODS:
            raise UsageError(
                f"--method {name}: is not in the demo{nearest(name, METHODS)}: choose of "
                f"{', '.join(METHODS)}"
            )
    if steps < 1 or seed < 0:
        raise UsageError(f"demo: steps={steps} must be 1 or more, and seed={seed} 0 or more")
    task, found = Task.draw(seed, backend), Found()
    x = from_numpy(with_mirror_images(task.unseen), backend)
    plain = task.measure(network(task.base, x))
    found.rows.append(Row("base", *plain, 0, 0.0))
    for name in METHODS[1:]:
        if name not in methods:
            continue
        tell(name)
        apply: Apply
        model = PeftModel(task.base)
        if name in ADAPTERS:
            config, rate = ADAPTERS[name]
            model.add(name, config, seed=seed)
            trained: Any = {name: model[name].trainable()}
            frozen, apply = task.base, _adapted(model)
            count = model.parameters.trainable
        else:
            picks, rate = PARTS[name]
            trained = {k: w for k, w in task.base.items() if picks(k)}
            frozen, apply = {k: w for k, w in task.base.items() if not picks(k)}, _plain
            count = sum(prod(w.shape) for w in trained.values())
        trained, seconds, curve = _train(
            task, apply, trained, frozen, rate=rate, steps=steps, seed=seed
        )
        outputs = apply(trained, frozen, x)
        found.rows.append(Row(name, *task.measure(outputs), count, seconds))
        found.curves[name] = [plain[0], *curve]
        if name in ADAPTERS:
            model.update(trained)
            _save_and_merge(task, model[name], folder / name, x, to_numpy(outputs))
            found.merged_equals_adapted = True
    return found


def _plain(trained: Params, frozen: Mapping[str, Array], x: Any) -> Any:
    return network({**frozen, **trained}, x)


def _adapted(model: PeftModel) -> Apply:
    def apply(trained: Any, frozen: Mapping[str, Array], x: Any) -> Any:
        inside = copy(model)
        inside.weights = frozen  # among the arguments, so that a tape knows them
        return network(inside.bind(trained).weights, x)

    return apply


def _train(
    task: Task,
    apply: Apply,
    trained: Any,
    frozen: Mapping[str, Array],
    *,
    rate: float,
    steps: int,
    seed: int,
) -> tuple[Any, float, list[float]]:
    """Train by AdamW; give the arrays, the seconds, and errors of CL on the way."""

    def loss(
        trained: Any, frozen: Mapping[str, Array], x: Array, want: Array, back: Array
    ) -> Array:
        gap = averaged(apply(trained, frozen, x), back) - want
        return namespace(gap).mean(gap * gap)

    rng, slopes = np.random.default_rng([2, seed]), fused(value_and_grad(loss))
    optimizer = adamw(cosine(rate, steps, warmup=steps // 10), weight_decay=0.0)
    state, back = optimizer.init(trained), from_numpy(BACK, task.to)
    unseen = from_numpy(with_mirror_images(task.unseen), task.to)
    marks = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
    seconds, curve = 0.0, []
    for step in range(1, steps + 1):
        start, batch = perf_counter(), rng.integers(0, FLIGHTS, BATCH)
        x = from_numpy(with_mirror_images(task.inputs[batch]), task.to)
        _, grads = slopes(trained, frozen, x, from_numpy(task.targets[batch], task.to), back)
        updates, state = optimizer.update(grads, state, trained)
        trained = apply_updates(trained, updates)
        seconds += perf_counter() - start
        if step in marks:
            curve.append(task.measure(apply(trained, frozen, unseen))[0])
    return trained, seconds, curve


def _save_and_merge(task: Task, adapter: Adapter, folder: Path, x: Array, adapted: Host) -> None:
    """Save, load and merge; the merged network must answer as the adapted one did."""
    adapter.save(folder)
    again = PeftModel(task.base)
    again.add("again", Adapter.load(folder, task.to))
    merged = to_numpy(network(again.merge(), x))
    gap, scale = float(np.max(np.abs(merged - adapted))), float(np.max(np.abs(adapted)))
    if not gap <= SUMS * scale:
        raise VerifyError(
            f"{folder.name}: the merged network's answers differ by {gap:.2e} from the adapted "
            f"one's, more than {SUMS:g} of {scale:.2g}"
        )

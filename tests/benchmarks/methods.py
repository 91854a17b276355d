"""A training step of every method: the tape, torch's autograd of the same maths, and HF PEFT's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from peft_any import PeftModel, value_and_grad
from peft_any.backend import namespace
from peft_any.bound import BoundLayer
from peft_any.layer import Dense
from peft_any.method import Tuner
from peft_any.parts import Part
from peft_any.train.optimise import adamw, updated
from tests.benchmarks.memory import numpy_peak, torch_peak
from tests.benchmarks.rows import ROWS, adapted
from tests.benchmarks.timing import cpu_ratio

Step = Callable[[], object]
SIZES = ((1024, 512, 15), (64, 8, 300))
"""Sizes of a square layer, rows of a batch, and rounds to time."""


def drawn(n: int, batch: int) -> list[Any]:
    """Draw inputs and targets."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal((batch, n)).astype("float32") for _ in range(2)]


def squared(gap: Any) -> Any:
    """Mean of the squares."""
    return namespace(gap).mean(gap * gap)


def gradients(config: Tuner, p: dict[str, Any], base: Dense, x: Any, target: Any) -> Step:
    """Give a call that computes loss and gradients of a bound layer, by the tape."""
    frozen = {k: v for k, v in p.items() if config.is_frozen(k)}
    trained = {k: v for k, v in p.items() if k not in frozen}

    def loss(q: Any, rest: Any) -> Any:
        still, weight, bias, x, target = rest
        part = Part(config, {**still, **q})
        layer = BoundLayer(Dense(weight, bias, base.site), [part], stacked=True)
        return squared(layer(x) - target)

    both = value_and_grad(loss)
    return lambda: both(trained, (frozen, base.weight, base.bias, x, target))


def by_torch(config: Tuner, p: dict[str, Any], base: Dense, x: Any, target: Any) -> Step:
    """Give the same in torch alone: the method's own formulas on torch's tensors."""
    import torch

    q = {k: torch.tensor(v, requires_grad=not config.is_frozen(k)) for k, v in p.items()}
    weight, bias, inputs, wanted = map(torch.tensor, (base.weight, base.bias, x, target))
    layer = Dense(weight, bias, base.site)
    leaves = [v for v in q.values() if v.requires_grad]

    def step() -> object:
        value = squared(config.forward(config.prepare(q, layer), inputs, layer) - wanted)
        return value, torch.autograd.grad(value, leaves)

    return step


def training(config: Tuner, p: dict[str, Any], base: Dense, x: Any, target: Any) -> Step:
    """Give a whole step of training a model: binding, gradients, AdamW."""
    weights = {"fc.weight": base.weight, "fc.bias": base.bias}
    model = PeftModel(weights)
    model.add("task", replace(config, target_modules=["fc"]))
    own = {k: v for k, v in p.items() if not config.is_frozen(k)}
    optimizer = adamw(1e-3)
    params: Any = {"task": {"fc": own}}
    state = [params, optimizer.init(params)]
    both = value_and_grad(lambda q, x, t: squared(model.bind(q).layers["fc"](x) - t))

    def step() -> object:
        value, grads = both(state[0], x, target)
        state[:] = updated(optimizer, grads, state[1], state[0])
        return value

    return step


def shown(found: float, target: float) -> str:
    """Write a figure, and whether it misses its target."""
    return f"{found:.2f}{' (missed)' if found > target else ''}"


def of_methods() -> Iterator[str]:
    """Compare a step of each method with torch's autograd, and with Hugging Face PEFT's step."""
    torch = importlib.util.find_spec("torch") is not None
    theirs = importlib.util.find_spec("peft") is not None
    sizes = [f"{n}×{n}, batch {batch}" for n, batch, _ in SIZES]
    yield (
        f"| a training step, {sizes[0]}, tape on NumPy | ÷ torch, same maths | peak memory ÷ "
        f"torch's | with AdamW, ÷ HF PEFT's | the same, {sizes[1]} |"
    )
    yield "|---|---|---|---|---|\n| target | 1.2 | 1.3 | 1.0 | 1.0 |"
    for row in ROWS:
        cells = ["–"] * 4
        for i, (n, batch, rounds) in enumerate(SIZES):
            config, p, base = adapted(row.config, n)
            given = (config, p, base, *drawn(n, batch))
            if torch and i == 0:
                ours, same = gradients(*given), by_torch(*given)
                cells[0] = shown(cpu_ratio(ours, same, rounds), 1.2)
                cells[1] = shown(numpy_peak(ours) / torch_peak(same), 1.3)
            if theirs:
                from tests.benchmarks.hugging_face import step_of

                step = step_of(config, base, *given[3:])
                cells[2 + i] = shown(cpu_ratio(training(*given), step, rounds), 1.0)
        yield f"| {row.name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*of_methods(), sep="\n", flush=True)

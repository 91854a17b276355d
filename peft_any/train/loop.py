"""A training loop, for those who do not want to write their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias

from peft_any._tree import Tree, fused, tree_map
from peft_any._typing import Array
from peft_any.arguments import checked
from peft_any.autodiff import value_and_grad
from peft_any.backend import backend_of, to_numpy
from peft_any.bound import Bound
from peft_any.dropout import drops
from peft_any.errors import ConfigError, TrainingError
from peft_any.io._atomic import StrPath
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.model import PeftModel
from peft_any.train.allocator import RankAllocator
from peft_any.train.batches import Batches, listed
from peft_any.train.optimise import optimizer_for, updated
from peft_any.train.progress import bar
from peft_any.train.resume import load_state, refuse_other, save_state
from peft_any.train.transforms import Optimizer, clip_by_global_norm, global_norm, not_finite

Loss: TypeAlias = Callable[[Bound, Any], Array]
Record: TypeAlias = dict[str, float]
Callback: TypeAlias = Callable[["Run"], object]


@dataclass
class Run:
    """A training run: what it has come to, and what is needed to go on.

    Attributes
    ----------
    params : nest
        Parameters after the last step; at the end of a run with `patience`, the best ones.
    step : int
        How many steps were made.
    history : list of dict
        For every step ``step``, ``loss``, ``norm`` (of the gradient) and, where it was measured,
        ``held_out``.
    best : float
        The lowest loss held out.
    optimizer, allocators : nest
        States of the optimiser and of AdaLoRA's allocators.
    stopped : str
        Why it ended before the last step, if it did.
    """

    params: Tree
    optimizer: Any
    allocators: dict[str, Any]
    step: int = 0
    history: list[Record] = field(default_factory=list)
    best: float = inf
    best_params: Tree = None
    waited: int = 0
    stopped: str = ""

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [record["loss"] for record in self.history]


@checked
def fit(
    model: PeftModel,
    loss: Loss,
    data: Any,
    *,
    steps: int,
    optimizer: str | Optimizer | Any = "adamw",
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    held_out: Any = None,
    every: int = 50,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: StrPath | None = None,
    save_every: int = 100,
    not_finite: Literal["raise", "skip"] = "raise",
    progress: bool | None = None,
) -> Run:
    """Train the active adapters of a model, and put the trained arrays into it.

    The run is a function of its arguments: one seed gives one run, on every library, and a run
    that was killed and goes on from its checkpoint gives the same numbers as one that was not.
    AdaLoRA's allocator and what methods add to the loss (`Config.regularizer`: AdaLoRA, KaSA) take
    part by themselves. On JAX a step is compiled, so that
    `loss` runs as Python code only when shapes change; with dropout, whose masks are drawn on the
    host, or if `loss` asks for values, it runs in every step.

    Parameters
    ----------
    model : PeftModel
        Its active adapters are trained; ``model.update`` gets the result, an AdaLoRA adapter
        whose last mask is set is pruned.
    loss : callable (bound, batch) -> array ()
        The mean loss of a batch; ``bound`` is ``model.bind(params)`` with dropout, without it
        for `held_out`.
    data
        A list of batches; or, with `batch_size`, a nest of arrays with one first axis, cut into
        batches (an incomplete last one is left out); or a function of the number of the batch.
    steps : int
        Steps in all, those of a resumed run included.
    optimizer : Optimizer, or "adamw", "sgd" or "lion"
    batch_size, shuffle, seed
        How `data` is cut and ordered; `seed` is also that of dropout.
    accumulate : int
        Batches per step; a step takes the mean of their gradients.
    max_grad_norm : float, optional
        See `optimise.clip_by_global_norm`.
    held_out : list of batches, optional
        Measured every `every` steps and at the end.
    patience : int, optional
        Stop after so many measurements without a new best, and give the best parameters.
    callbacks : sequence of callables
        Called with the `Run` after every step; ``True`` ends it.
    checkpoint : path, optional
        A safetensors file, written every `save_every` steps and at the end, whole or not at all.
        If it exists the run goes on from it.
    not_finite : {"raise", "skip"}
        What to do where loss or gradient is NaN or infinite.
    progress : bool, optional
        Show a bar; by default if somebody is there to see it.

    Returns
    -------
    Run

    Raises
    ------
    ConfigError
        For arguments that make no sense, nothing to train, or a checkpoint of another run.
    TrainingError
        Where loss or gradient is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.backend import namespace
    >>> from peft_any.methods.lora import LoraConfig
    >>> model = PeftModel({"fc.weight": np.zeros((1, 2))})
    >>> _ = model.add("task", LoraConfig(r=1, target_modules=["fc"]))
    >>> x = np.asarray([[1.0, 0.0], [0.0, 1.0]])
    >>> def loss(bound, x):
    ...     gap = bound.layers["fc"](x) - 1.0
    ...     return namespace(gap).mean(gap * gap)
    >>> run = fit(model, loss, [x], steps=200)
    >>> run.losses[0], run.losses[-1] < 0.1
    (1.0, True)
    """
    rule = optimizer_for(optimizer)
    if steps < 1 or accumulate < 1 or every < 1 or save_every < 1:
        raise ConfigError(
            f"fit: steps={steps}, accumulate={accumulate}, every={every} and save_every="
            f"{save_every} cannot be: give 1 or more"
        )
    if patience is not None and held_out is None:
        raise ConfigError("fit: patience needs held_out: a list of batches to measure")
    if held_out is not None:
        listed(held_out, "held_out")
    batches = Batches(data, batch_size=batch_size, shuffle=shuffle, seed=seed)
    job = _Job(model, loss, rule, batches, seed, accumulate, max_grad_norm, not_finite == "skip")
    run = job.start(None if checkpoint is None else Path(checkpoint))
    with bar(steps, progress) as show:
        while run.step < steps and not run.stopped:
            job.step(run)
            if held_out is not None and (run.step % every == 0 or run.step == steps):
                job.measure(run, held_out, patience)
            for callback in callbacks:
                if callback(run) is True:
                    run.stopped = run.stopped or f"a callback, at step {run.step}"
            if checkpoint is not None and (
                run.step % save_every == 0 or run.step == steps or run.stopped
            ):
                job.save(run, checkpoint)
            show(run)
    if patience is not None and run.best_params is not None:
        run.params = run.best_params
    job.finish(run)
    return run


@dataclass(frozen=True)
class _Job:
    """What does not change during a run."""

    model: PeftModel
    loss: Loss
    rule: Optimizer
    batches: Batches
    seed: int
    accumulate: int
    max_grad_norm: float | None
    skips: bool

    def start(self, checkpoint: Path | None) -> Run:
        params = {name: self.model[name].trainable() for name in self.model.active}
        if not any(p for sites in params.values() for p in sites.values()):
            raise ConfigError(
                "fit: there is no parameter to train: add an adapter to the model and activate it"
            )
        params = self.model.settled(params)
        found = {name: a.init(params[name]) for name, a in self.allocators.items()}
        run = Run(params, self.rule.init(params), found)
        return run if checkpoint is None or not checkpoint.exists() else self.load(run, checkpoint)

    def load(self, run: Run, path: Path) -> Run:
        array = next(a for sites in run.params.values() for p in sites.values() for a in p.values())
        saved = load_state(path, backend=backend_of(array))
        if not isinstance(saved, dict) or "optimizer" not in saved or "params" not in saved:
            raise ConfigError(f"{path}: cannot resume: it is no checkpoint of fit")
        if saved.get("seed") != self.seed:
            raise ConfigError(
                f"{path}: cannot resume: its run has seed={saved.get('seed')}, this one "
                f"{self.seed}: give the same seed, or another checkpoint"
            )
        why = "its parameters are not those of the model's active adapters"
        refuse_other(saved["params"], run.params, str(path), why)
        why = "its optimiser's state is not one of this optimizer"
        refuse_other(saved["optimizer"], run.optimizer, str(path), why)
        return Run(**{k: v for k, v in saved.items() if k != "seed"})

    def save(self, run: Run, path: StrPath) -> None:
        save_state(path, {**vars(run), "seed": self.seed, "stopped": ""})

    @property
    def allocators(self) -> dict[str, RankAllocator]:
        configs = {name: self.model[name].config for name in self.model.active}
        return {
            name: RankAllocator(config)
            for name, config in configs.items()
            if isinstance(config, AdaLoraConfig) and config.rank_pattern is None
        }

    def total(self, at: Any, params: Tree, weights: Mapping[str, Any], batch: Any) -> Array:
        model = copy(self.model)
        model.weights = weights  # among the arguments, so that a tape knows them
        value = self.loss(model.bind(params, rng=at), batch)
        for name in self.model.active:
            config = self.model[name].config
            if isinstance(config, AdaLoraConfig) and name not in self.allocators:
                continue  # pruned already
            if (term := config.regularizer(params[name].values())) is not None:
                value = value + term
        return value

    def slopes(self, at: Any, *given: Any) -> tuple[Array, Tree]:
        return value_and_grad(partial(self.total, at))(*given)

    @cached_property
    def plain(self) -> Callable[..., tuple[Array, Tree]]:
        """`slopes` where no masks are drawn: one operation, where the library compiles."""
        return fused(partial(self.slopes, None))

    @cached_property
    def draws(self) -> bool:
        """Whether masks are drawn, on the host, which no compiled function can."""
        return any(drops(self.model[name].config) for name in self.model.active)

    def step(self, run: Run) -> None:
        losses: list[float] = []
        grads: Any = None
        for i in range(run.step * self.accumulate, (run.step + 1) * self.accumulate):
            given = run.params, dict(self.model.weights), self.batches[i]
            one, g = self.slopes((self.seed, i), *given) if self.draws else self.plain(*given)
            losses.append(float(to_numpy(one)))
            grads = g if grads is None else tree_map(lambda a, b: a + b, grads, g)
        if self.accumulate > 1:
            grads = tree_map(lambda a: a / self.accumulate, grads)
        value = sum(losses) / self.accumulate
        norm = float(to_numpy(global_norm(grads)))
        run.step += 1
        run.history.append({"step": run.step, "loss": value, "norm": norm})
        if not (isfinite(value) and isfinite(norm)):
            if self.skips:
                return
            raise TrainingError(_diagnosis(run.step, value, grads))
        if self.max_grad_norm is not None:
            grads, _ = clip_by_global_norm(self.max_grad_norm).update(grads, {}, run.params)
        params, run.optimizer = updated(self.rule, grads, run.optimizer, run.params)
        run.params = self.model.settled(params)
        for name, allocator in self.allocators.items():
            run.params[name], run.allocators[name] = allocator.update(
                grads[name], run.allocators[name], run.params[name], run.step
            )

    def measure(self, run: Run, held_out: Sequence[Any], patience: int | None) -> None:
        bound = self.model.bind(run.params)
        found = [float(to_numpy(self.loss(bound, batch))) for batch in held_out]
        value = sum(found) / len(found)
        if not (isfinite(value) or self.skips):
            raise TrainingError(
                f"step {run.step}: the loss held out is {value}, and cannot be compared: lower the "
                "learning rate, or look for what the batches held out have that the others have not"
            )
        run.history[-1]["held_out"] = value
        if value < run.best:
            run.best, run.best_params, run.waited = value, run.params, 0
            return
        run.waited += 1
        if patience is not None and run.waited >= patience:
            run.stopped = f"no better loss held out in {patience} measurements, at step {run.step}"

    def finish(self, run: Run) -> None:
        self.model.update(run.params)
        for name, allocator in self.allocators.items():
            end = (allocator.config.total_step or 0) - allocator.config.tfinal
            if run.step >= end:
                pruned = allocator.pruned(self.model[name], run.allocators[name])
                self.model.exchange(name, pruned)


def _diagnosis(step: int, value: float, grads: Tree) -> str:
    bad = not_finite(grads)
    which = f"; not finite: gradients of {', '.join(bad[:5])}" if bad else ""
    return (
        f"step {step}: loss {value}, and no step can be made{which}: lower the learning rate, set "
        'max_grad_norm, or pass not_finite="skip" to leave such batches out'
    )

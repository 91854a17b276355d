"""A training step of one LoRA layer: the tape, gradients by hand, torch's; an operation's cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from time import process_time
from typing import Any

import numpy as np

from peft_any.autodiff import value_and_grad
from peft_any.backend import namespace
from peft_any.layer import linear
from tests.benchmarks.timing import cpu_ratio, once

RATE = 1e-2
C = np.full((4, 4), 0.25, dtype="float32")


def problem(n: int, batch: int, r: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Draw the factors, and the weight, inputs and targets, of a layer (n, n)."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype("float32")

    return {"A": draw(r, n), "B": draw(n, r)}, (draw(n, n), draw(batch, n), draw(batch, n))


def loss(p: dict[str, Any], w: Any, x: Any, target: Any) -> Any:
    """Mean squared error of x·Wᵀ + 2·x·Aᵀ·Bᵀ."""
    gap = linear(x, w) + linear(linear(x, p["A"]), 2.0 * p["B"]) - target
    return namespace(gap).mean(gap * gap)


def taped(p: dict[str, Any], rest: tuple[Any, ...]) -> Callable[[], object]:
    """Give a step that takes its gradients from `value_and_grad`."""
    both = value_and_grad(loss)

    def step() -> object:
        value, grads = both(p, *rest)
        return value, {k: p[k] - RATE * grads[k] for k in p}

    return step


def by_hand(p: dict[str, Any], rest: tuple[Any, ...]) -> Callable[[], object]:
    """Give the same step with the gradients written out."""
    w, x, target = rest

    def step() -> object:
        a, b = p["A"], 2.0 * p["B"]
        inner = x @ a.T
        gap = x @ w.T + inner @ b.T - target
        value = np.mean(gap * gap)
        g = gap * np.float32(2.0 / gap.size)
        grads = {"A": (g @ b).T @ x, "B": 2.0 * (g.T @ inner)}
        return value, {k: p[k] - RATE * grads[k] for k in p}

    return step


def by_torch(p: dict[str, Any], rest: tuple[Any, ...]) -> Callable[[], object]:
    """Give the same step in torch alone."""
    import torch

    there = {k: torch.tensor(v, requires_grad=True) for k, v in p.items()}
    w, x, target = (torch.tensor(a) for a in rest)

    def step() -> object:
        gap = x @ w.T + (x @ there["A"].T) @ (2.0 * there["B"]).T - target
        value = torch.mean(gap * gap)
        grads = torch.autograd.grad(value, list(there.values()))
        with torch.no_grad():
            return value, [v - RATE * g for v, g in zip(there.values(), grads, strict=True)]

    return step


def steps() -> Iterator[str]:
    """Compare a step on the tape with the same step by hand, and with torch's."""
    yield "| a training step of LoRA, tape on NumPy | ÷ by hand | target | ÷ torch | target |"
    yield "|---|---|---|---|---|"
    theirs = importlib.util.find_spec("torch") is not None
    for n, batch, r, rounds, hand, torch_bound in (
        (1024, 512, 16, 25, "1.15", "1.05"),
        (64, 8, 4, 500, "–", "1.0"),
    ):
        parts = problem(n, batch, r)
        step = taped(*parts)
        first = cpu_ratio(step, by_hand(*parts), rounds)
        versus = f"{cpu_ratio(step, by_torch(*parts), rounds):.2f}" if theirs else "–"
        yield f"| {n}×{n}, batch {batch}, r{r} | {first:.2f} | {hand} | {versus} | {torch_bound} |"


OPERATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "`y + c`": (lambda y: y + C, lambda g: g),
    "`y * c`": (lambda y: y * C, lambda g: g * C),
    "`y @ c`": (lambda y: y @ C, lambda g: g @ C.T),
    "`xp.tanh(y)`": (lambda y: namespace(y).tanh(y), lambda g: g * (1.0 - C * C)),
}
"""An operation, and its way back as NumPy alone would do it."""


def operations(length: int = 200) -> Iterator[str]:
    """Measure what recording adds to an operation on a small array, forward and back."""
    yield "| an operation on 4×4 numbers | µs that recording adds, forward and back | target |"
    yield "|---|---|---|"
    for name, (forward, backward) in OPERATIONS.items():

        def chain(y: Any, count: int, f: Callable[[Any], Any] = forward) -> Any:
            for _ in range(count):
                y = f(y)
            return namespace(y).sum(y)

        def plain(count: int, f: Any = chain, back: Callable[[Any], Any] = backward) -> None:
            f(C, count)
            g = C
            for _ in range(count):
                g = back(g)

        def recorded(count: int, f: Any = chain) -> None:
            value_and_grad(f)(C, count)

        def fastest(run: Callable[[int], None]) -> float:
            long, short = (min(once(partial(run, k), process_time) for _ in range(200))
                           for k in (length, 0))  # fmt: skip
            return (long - short) / length * 1e6

        yield f"| {name} | {fastest(recorded) - fastest(plain):.1f} | 8 |"


if __name__ == "__main__":
    for table in (steps, operations):
        print(*table(), "", sep="\n", flush=True)

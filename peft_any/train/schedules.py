"""Learning rates by step, as the transformers library defines them.

A schedule is a function of the number of steps already made; the first update asks for step 0.
With a warm-up, that rate is 0, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import TypeAlias

from peft_any.errors import ConfigError

Schedule: TypeAlias = Callable[[int], float]


def constant(rate: float, *, warmup: int = 0) -> Schedule:
    """One rate, after a linear rise over `warmup` steps.

    Examples
    --------
    >>> [constant(1.0, warmup=2)(step) for step in range(4)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return _rising(rate, warmup, lambda _: 1.0)


def linear(rate: float, steps: int, *, warmup: int = 0) -> Schedule:
    """Fall in a straight line to 0 at `steps`, after a linear rise over `warmup` steps.

    Raises
    ------
    ConfigError
        If the warm-up is longer than the run, or a number is negative.

    Examples
    --------
    >>> [linear(1.0, 4)(step) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check(steps, warmup)
    return _rising(rate, warmup, lambda s: max(0.0, (steps - s) / max(1, steps - warmup)))


def cosine(rate: float, steps: int, *, warmup: int = 0, cycles: float = 0.5) -> Schedule:
    """Fall along a cosine to 0 at `steps`, after a linear rise over `warmup` steps.

    Parameters
    ----------
    rate : float
        The highest rate.
    steps, warmup : int
        Length of the run, and of the rise.
    cycles : float
        How many waves; a half falls once.

    Raises
    ------
    ConfigError
        If the warm-up is longer than the run, or a number is negative.

    Examples
    --------
    >>> [round(cosine(1.0, 4)(step), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    _check(steps, warmup)

    def fall(step: int) -> float:
        done = (step - warmup) / max(1, steps - warmup)
        return max(0.0, 0.5 * (1.0 + cos(pi * cycles * 2.0 * done)))

    return _rising(rate, warmup, fall)


def _rising(rate: float, warmup: int, fall: Schedule) -> Schedule:
    if rate < 0 or warmup < 0:
        raise ConfigError(f"schedule: rate={rate} and warmup={warmup} cannot be negative")
    return lambda step: rate * (step / warmup if step < warmup else fall(step))


def _check(steps: int, warmup: int) -> None:
    if steps < 1 or warmup > steps:
        raise ConfigError(
            f"schedule: steps={steps} cannot hold a run with warmup={warmup}: give at least 1 "
            "step, and no longer a warm-up than the run"
        )

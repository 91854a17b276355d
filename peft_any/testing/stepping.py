"""The laws of what a method does in training alone: what it drops, where it keeps parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from peft_any.dropout import Noise, rates
from peft_any.method import Tuner
from peft_any.testing.case import Case
from peft_any.testing.closeness import gap, rounding
from peft_any.testing.laws import TOLD, must, same
from peft_any.testing.libraries import Lib

RATE = 0.5


def dropping(case: Case, seed: int = 0, dtype: str = "float32") -> None:
    """Check that `dropped` drops what its noise says, and nothing else.

    With rates of 0 it is `forward`, unless the method draws whatever the rates. One noise draws
    the same numbers each time. The rate that `thins` names thins the adapter's input alone.
    """
    base, config = case.base(seed, dtype=dtype), case.resolved
    p, x = {**case.params(base, seed, dtype), **case.routing}, case.inputs((2, 3), dtype, seed)
    noise, bound = Noise.of((seed, 1)).at(case.site.name), 400 * rounding(dtype)
    still = replace(config, **dict.fromkeys(rates(config), 0.0))
    y = config.forward(p, x, base)
    for name in (None, *rates(config)):
        loud = still if name is None else replace(still, **{name: RATE})
        what = "rates of 0" if name is None else f"{name}={RATE}"
        got = loud.dropped(p, x, base, noise)
        must(
            (got.shape, got.dtype) == (y.shape, y.dtype),
            case,
            f"dropped gives {got.dtype} {got.shape} with {what}, not {y.dtype} {y.shape}",
        )
        must(
            same(loud.dropped(p, x, base, noise), got),
            case,
            f"dropped gives another result each time, with {what}: draw from `noise` alone",
        )
        ready = loud.dropped(loud.prepare(p, base), x, base, noise)
        must(gap(ready, got) <= bound, case, f"dropped differs with what prepare gives, at {what}")
        if name is None and not config.draws:
            must(gap(got, y) <= bound, case, "dropped is not forward, though every rate is 0")
        if name is not None and name == config.thins:
            thin = noise.at("input").thinned(x, RATE)
            want = base(x) + (loud.forward(p, thin, base) - base(thin))
            must(
                gap(got, want) <= bound,
                case,
                f"dropped does not thin the adapter's input alone, by {what}: give base(x), and "
                'what the adapter makes of noise.at("input").thinned(x, rate)',
            )


def settling(case: Case, seed: int = 0, dtype: str = "float32") -> None:
    """Check that `settled` gives the same arrays back, once for all, the frozen ones untouched."""
    base, config = case.base(seed, dtype=dtype), case.resolved
    trained = config.shapes(case.site).keys() - config.frozen
    p = case.params(base, seed, dtype)
    far: dict[str, Any] = {k: 50 * v if k in trained else v for k, v in p.items()}
    for given in (case.fresh(base, seed, dtype), p, far):
        once = config.settled(given)
        must([*once] == [*given], case, f"settled gives {[*once]}, not {[*given]}")
        for name, v in once.items():
            old = given[name]
            must(
                (v.shape, v.dtype) == (old.shape, old.dtype),
                case,
                f"settled gives {name} as {v.dtype} {v.shape}, not {old.dtype} {old.shape}",
            )
            must(np.isfinite(v).all(), case, f"settled gives no numbers for {name}")
            must(name in trained or same(v, old), case, f"settled moves {name}, which is frozen")
        twice = config.settled(once)
        off = max((gap(twice[k], v) for k, v in once.items()), default=0.0)
        must(
            off <= 20 * rounding(dtype),
            case,
            f"settled moves what it has settled, by {off:.2g} of its largest entry: each step of "
            "training would",
        )


def settling_on(case: Case, lib: Lib) -> None:
    """Check that a library settles parameters where NumPy does."""
    config = case.resolved
    if type(config).settled is Tuner.settled:
        return
    p = {k: 5 * v for k, v in case.params(case.base()).items()}
    want = config.settled(p)
    for name, got in lib.call(config.settled, p).items():
        lib.check(got, want[name], rtol=TOLD, where=f"{case.where}: {lib.row}: settled {name}")

"""The laws of a method that is applied and not merged, since what it adds depends on the input."""

from __future__ import annotations

from typing import Any

from peft_any.errors import PeftError
from peft_any.layer import Dense
from peft_any.testing.case import Case
from peft_any.testing.closeness import gap, rounding
from peft_any.testing.laws import TOLD, must, told
from peft_any.testing.libraries import Lib


def identity(case: Case, seed: int = 0, dtype: str = "float32") -> None:
    """Check that a fresh adapter changes no output, unless the case says why it does."""
    base, config = case.base(seed, dtype=dtype), case.resolved
    p, x = {**case.fresh(base, seed, dtype), **case.routing}, case.inputs((2, 3), dtype, seed)
    change = gap(config.forward(p, x, base), base(x))
    if case.identity is not None:
        must(change > 1e-3, case, "a fresh adapter is the identity, though the case denies it")
        return
    must(
        change <= rounding(dtype),
        case,
        f"a fresh adapter changes the output, by {change:.2g} of its largest entry: `init` must "
        "give what leaves the layer as it was, or the case say why not (identity=)",
    )


def preparing(case: Case, seed: int = 0, dtype: str = "float32") -> None:
    """Check the output's shape and dtype, and that it is the same with what `prepare` gives."""
    base, config = case.base(seed, dtype=dtype), case.resolved
    p, x = {**case.params(base, seed, dtype), **case.routing}, case.inputs((2, 3), dtype, seed)
    y, plain = config.forward(p, x, base), base(x)
    must(y.shape == plain.shape, case, f"forward gives the shape {y.shape}, not {plain.shape}")
    must(y.dtype == plain.dtype, case, f"forward gives {y.dtype}, not {plain.dtype}")
    must(gap(y, plain) > 1e-3, case, "forward gives what the base gives, whatever the parameters")
    if base.bias is not None:
        flat = base.replace(bias=None)
        off = gap(config.forward(p, x, flat) + base.bias, y)
        must(off <= 200 * rounding(dtype), case, "forward drops the bias: base(x) adds it")
    off = gap(config.forward(config.prepare(p, base), x, base), y)
    must(off <= 200 * rounding(dtype), case, "forward gives another result with what prepare gives")


def refusing(case: Case) -> None:
    """Check that a merge is refused, with the site, the reason and the way out."""
    base, config = case.base(), case.resolved
    p = {**case.params(base), **case.routing}
    for name in ("merge", "effect"):
        try:
            getattr(config, name)(p, base)
        except PeftError as error:
            must(case.site.name in str(error), case, f"{name} does not name the site: {error}")
        else:
            must(False, case, f"{name} gives a weight, and no weight holds what it adds")


def libraries(case: Case, lib: Lib) -> None:
    """Check that a library gives NumPy's numbers, in its own arrays, on their device."""
    config, base = case.resolved, case.base()
    p, x = {**case.params(base), **case.routing}, case.inputs()

    def adapt(p: Any, x: Any, weight: Any, bias: Any) -> Any:
        return config.forward(p, x, Dense(weight, bias, case.site))

    made = "forward fails on it: where it makes arrays, these need device= and dtype="
    with told(case, f"{lib.row}: {made}"):
        y = lib.call(adapt, p, x, base.weight, base.bias)
    where = f"{case.where}: {lib.row}: forward"
    lib.check(y, config.forward(p, x, base), rtol=TOLD, where=where)

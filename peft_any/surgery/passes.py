"""Passes over bfloat16 weights: compiled ones of the processor's best kind, or NumPy's."""

from __future__ import annotations

import os
from contextlib import suppress
from types import ModuleType

import numpy as np

from peft_any.errors import UsageError, nearest
from peft_any.receipt import Host
from peft_any.surgery.measure import Moments

SWITCH = "PEFT_ANY_PASS"
"""The environment variable that names another one."""
NUMPY, PLAIN = "numpy", "plain"
_compiled: ModuleType | None = None
with suppress(ImportError):  # there was no compiler where this was installed
    from peft_any.surgery import _sums as _compiled  # type: ignore[attr-defined,no-redef]


def passes() -> list[str]:
    """Name what this installation and processor can run, the quickest last.

    Examples
    --------
    >>> passes()[0]
    'numpy'
    """
    return [NUMPY, *(_compiled.levels() if _compiled else ())]


def chosen() -> tuple[str, ModuleType | None]:
    """Give the quickest pass, or the one that `SWITCH` names, and the module that has it.

    Raises
    ------
    UsageError
        If there is no such pass here.

    Examples
    --------
    >>> chosen()[0] in passes()
    True
    """
    known = passes()
    name = os.environ.get(SWITCH) or known[-1]
    if name not in known:
        raise UsageError(
            f"{SWITCH}={name}: there is no such pass here{nearest(name, known)}: "
            f"take one of {', '.join(known)}, or unset it"
        )
    return name, None if name == NUMPY else _compiled


def rounded(base: Host, exact: Host, delta: Host | None) -> tuple[Host, Moments] | None:
    """Round sums to bfloat16 once and measure them; None where NumPy's passes are as quick.

    Parameters
    ----------
    base : array, bfloat16
    exact : array, float64
        W + Δ, in the base's shape.
    delta : array, float64, optional
        Δ, where it is known better than as `exact` less the base.

    Examples
    --------
    >>> from peft_any.backend import numpy_dtype
    >>> base = np.ones(100, numpy_dtype("bfloat16"))
    >>> made = rounded(base, base + 0.25, None)
    >>> made is None or made[1].kept == 1.0
    True
    """
    level, compiled = chosen()
    if compiled is None or level == PLAIN or exact.dtype != np.float64:
        return None
    out = np.empty(base.shape, np.uint16)
    whole = [np.require(a, requirements=["C", "A"]) for a in (base, exact)]
    wanted = None if delta is None else np.require(delta, np.float64, ["C", "A"])
    base2, delta2, dot, miss2, same = compiled.round(
        level, whole[0].view(np.uint16), out, whole[1], wanted
    )
    return out.view(base.dtype), Moments(base2, delta2, dot, miss2, same, base.size)

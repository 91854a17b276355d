"""Which code sums bfloat16 weights: a compiled pass of the processor's best kind, or NumPy's."""

from __future__ import annotations

import os
from contextlib import suppress
from types import ModuleType

from peft_any.errors import UsageError, nearest

SWITCH = "PEFT_ANY_PASS"
"""The environment variable that names another one."""
NUMPY = "numpy"
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

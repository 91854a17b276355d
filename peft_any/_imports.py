"""Importing array libraries, and of NumPy's namespace only what is used."""

from __future__ import annotations

import sys
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

_COPY, _OF = "array_api_compat.numpy", "numpy"
_LATER = "ctypeslib", "f2py", "ma", "matlib", "polynomial", "random", "testing"
"""Parts of NumPy that it imports when they are asked for; a copy of all its names asks for them."""
_LOCK = Lock()


def imported(name: str) -> ModuleType:
    """Import a module; the Array API namespace of NumPy without what takes long and is not used.

    That is its Fortran and testing tools and the like: half of a merge's imports. Whoever asks the
    namespace for them gets NumPy's.

    Examples
    --------
    >>> imported("array_api_compat.numpy").testing.__name__
    'numpy.testing'
    """
    there = sys.modules.get(name)
    if there is not None and not _begun(there):
        return there
    if name != _COPY:
        return import_module(name)
    original = import_module(_OF)
    with _LOCK:
        names = vars(original)
        later = {part for part in _LATER if part not in names}
        told = {key: names[key] for key in ("__all__", "__dir__")}
        kept = [part for part in dir(original) if part not in later]
        shown = [part for part in original.__all__ if part not in later]
        names.update(__all__=shown, __dir__=lambda: kept)  # what a copy looks at
        try:
            copy = import_module(name)
        finally:
            names.update(told)

    def ask(part: str) -> Any:
        if part in later:
            return getattr(original, part)
        raise AttributeError(f"module {name!r} has no attribute {part!r}")

    vars(copy).setdefault("__getattr__", ask)
    return copy


def _begun(module: ModuleType) -> bool:
    """Whether another thread is still importing a module: `import_module` waits for it."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))

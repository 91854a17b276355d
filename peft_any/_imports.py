"""Importing array libraries, and of NumPy's namespace only what is used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_COPY, _OF = "array_api_compat.numpy", "numpy"
_LATER = "ctypeslib", "f2py", "ma", "matlib", "polynomial", "random", "testing"
"""Parts of NumPy that it imports when they are asked for; a copy of all its names asks for them."""


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
    if there is not None or name != _COPY:
        return there or import_module(name)
    original = import_module(_OF)
    names = vars(original)
    later = {part for part in _LATER if part not in names}
    names.update(dict.fromkeys(later))
    try:
        copy = import_module(name)
    finally:
        for part in later:
            if names[part] is None:
                del names[part]

    def ask(part: str) -> Any:
        if part in later:
            return getattr(original, part)
        raise AttributeError(f"module {name!r} has no attribute {part!r}")

    for part in later:
        if vars(copy).get(part, original) is None:
            delattr(copy, part)
    vars(copy).setdefault("__getattr__", ask)
    return copy

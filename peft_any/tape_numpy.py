"""NumPy's own ways to a traced array: its ufuncs, its functions, its arrays' methods."""

from __future__ import annotations

from typing import Any


def methods() -> dict[str, Any]:
    """Give what classes of traced NumPy arrays have beside the standard's."""
    return {"__array_ufunc__": None}

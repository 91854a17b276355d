"""How much of a wanted change a stored one is: sums in double precision, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
from ml_dtypes import finfo

from peft_any._typing import Shape
from peft_any.backend import is_floating
from peft_any.errors import ShapeError
from peft_any.receipt import Change, Host

_BLOCK = 1 << 16
"""Elements of a block: its double-precision copies stay in the cache."""
_BYTES = 1 << 22
_FINEST = 2.0**-14
"""What a sum of many products, made in single precision, may be off."""


@dataclass(frozen=True)
class Moments:
    """Sums over a weight W, a wanted change Δ and the realised one R = W′ − W.

    Attributes
    ----------
    base2, delta2, dot, miss2 : float
        ‖W‖², ‖Δ‖², ⟨R, Δ⟩ and ‖R − Δ‖², in double precision.
    same, size : int
        Elements with W′ = W, and all.
    """

    base2: float = 0.0
    delta2: float = 0.0
    dot: float = 0.0
    miss2: float = 0.0
    same: int = 0
    size: int = 0

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.base2 + other.base2,
            self.delta2 + other.delta2,
            self.dot + other.dot,
            self.miss2 + other.miss2,
            self.same + other.same,
            self.size + other.size,
        )

    @property
    def finite(self) -> bool:
        """Whether all sums are finite: the values were, or nearly overflowed."""
        return isfinite(self.base2 + self.delta2 + self.dot + self.miss2)

    @property
    def kept(self) -> float | None:
        """⟨R, Δ⟩/⟨Δ, Δ⟩: the share of the wanted change that was realised; None without one."""
        return self.dot / self.delta2 if self.delta2 else None

    @property
    def error(self) -> float | None:
        """‖R − Δ‖/‖Δ‖."""
        return sqrt(max(self.miss2, 0.0) / self.delta2) if self.delta2 else None

    @property
    def unchanged(self) -> float:
        """Share of elements that did not move."""
        return self.same / self.size if self.size else 1.0


def measure(
    base: Host, realised: Host, *, delta: Host | None = None, exact: Host | None = None
) -> Moments:
    """Compare a realised change with the wanted one, in blocks of rows and double precision.

    Parameters
    ----------
    base : array (m, …)
        W, as it is stored.
    realised : array (m′, …)
        W′. Rows that only one of the two has: new ones are measured against zero, lost ones
        are left out.
    delta, exact : array (m′, …), one of them
        Δ, or W + Δ before rounding.

    Examples
    --------
    >>> w, d = np.ones(4, "float16"), np.full(4, 1e-4, "float32")
    >>> lost = measure(w, (w + d).astype("float16"), delta=d)
    >>> lost.kept, lost.error, lost.unchanged
    (0.0, 1.0, 1.0)
    """
    wanted = exact if delta is None else delta
    if realised.ndim == 0 and wanted is not None:
        base, realised, wanted = base.reshape(1), realised.reshape(1), wanted.reshape(1)
    if wanted is None or wanted.shape != realised.shape or base.shape[1:] != realised.shape[1:]:
        raise ShapeError(
            f"measure: {base.shape}, {realised.shape} and "
            f"{None if wanted is None else wanted.shape} cannot be compared"
        )
    total = Moments()
    for rows in row_blocks(realised):
        after = _double(realised[rows])
        before = known = _double(base[rows][: len(after)])
        if len(known) < len(after):
            before = np.zeros_like(after)
            before[: len(known)] = known
        change = _double(wanted[rows])
        if delta is None:
            change = change - before
        moved = after - before
        total += Moments(
            float(np.vdot(known, known)),
            float(np.vdot(change, change)),
            float(np.vdot(moved, change)),
            0.0,
            moved.size - int(np.count_nonzero(moved)),
            moved.size,
        )
        moved -= change
        total += Moments(miss2=float(np.vdot(moved, moved)))
    return total


@dataclass(frozen=True)
class Strays:
    """How far stored elements are off, as shares of their own and their neighbours' sizes.

    Attributes
    ----------
    squares, tops : float
        Sums of the squares: of all, and of the largest of each block.
    largest, off : float
        The largest share, and by how much that element is off.
    place, size : int
        Which one it is, in C order, and how many there are.
    """

    squares: float = 0.0
    tops: float = 0.0
    largest: float = 0.0
    off: float = 0.0
    place: int = 0
    size: int = 0

    @classmethod
    def of(cls, exact: Host, found: Host) -> Strays:
        """Compare some rows of a weight, as they are stored, with what they should be.

        Examples
        --------
        >>> exact = np.random.default_rng(0).standard_normal((8, 8))
        >>> stored = exact.astype("float32")
        >>> Strays.of(exact, stored).stray(stored.dtype)
        False
        >>> stored[2, 3] += 1e-2
        >>> found = Strays.of(exact, stored)
        >>> found.stray(stored.dtype), found.place
        (True, 19)
        """
        if not exact.size or not is_floating(found):  # of integers none is rounded
            return cls(size=exact.size)
        wanted = _double(exact).reshape(exact.shape[0] if exact.ndim > 1 else 1, -1)
        info: Any = finfo(found.dtype)  # type: ignore[no-untyped-call]
        sizes, least = wanted * wanted, float(info.smallest_subnormal)
        around = np.sqrt(np.mean(sizes, axis=1, keepdims=True)) + np.sqrt(np.mean(sizes, axis=0))
        off = np.abs(_double(found).reshape(wanted.shape) - wanted)
        shares = np.maximum(off - 4 * least, 0.0) / np.maximum(around + np.abs(wanted), least)
        place = int(np.argmax(shares))
        top = float(shares.reshape(-1)[place])
        squares = float(np.vdot(shares, shares))
        return cls(squares, top * top, top, float(off.reshape(-1)[place]), place, exact.size)

    def __add__(self, other: Strays) -> Strays:
        """Take the rows of another one to follow."""
        where = (self.largest, self.off, self.place)
        if other.largest > self.largest:
            where = other.largest, other.off, self.size + other.place
        squares, tops = self.squares + other.squares, self.tops + other.tops
        return Strays(squares, tops, *where, self.size + other.size)

    def stray(self, *dtypes: Any) -> bool:
        """Whether one element is farther off than rounding, or what is off elsewhere, explains.

        Eight half places of the coarsest dtype are more than several roundings come to; sixteen
        times the root mean square of the others is more than a coarser computation's errors do.
        """
        noise = sqrt(max(self.squares - self.tops, 0.0) / max(self.size, 1))
        return self.largest > max(_FINEST, 16 * noise, *(4 * _eps(dtype) for dtype in dtypes))


def _eps(dtype: Any) -> float:
    if not is_floating(dtype):
        return 0.0
    info: Any = finfo(dtype)  # type: ignore[no-untyped-call]
    return float(info.eps)


def all_finite(array: Host) -> bool:
    """Whether an array has neither NaN nor infinities, checked in blocks.

    Examples
    --------
    >>> all_finite(np.ones(3)), all_finite(np.asarray([[1.0, np.inf]]))
    (True, False)
    """
    table = array if array.ndim else array.reshape(1)
    return all(bool(np.isfinite(_double(table[rows])).all()) for rows in row_blocks(table))


def row_blocks(array: Host) -> Iterator[slice]:
    """Cut an array along its first axis into blocks that stay in the cache."""
    width = max(array.size // max(array.shape[0], 1), 1)
    step = max(_BLOCK // width, 1)
    for start in range(0, array.shape[0], step):
        yield slice(start, start + step)


def _double(block: Host) -> Host:
    """Give values in double precision: a copy, unless they are already."""
    return np.asarray(block, dtype=np.float64, order="C")


def change_of(
    tensor: str, by: tuple[str, ...], base: Host, moments: Moments, *, dtype: str, shape: Shape
) -> Change:
    """Put the numbers of one touched tensor together."""
    return Change(
        tensor,
        by,
        dtype,
        shape,
        base.dtype.name,
        tuple(base.shape),
        sqrt(moments.base2),
        sqrt(moments.delta2),
        moments.kept,
        moments.error,
        moments.unchanged,
    )


def equal_bytes(one: Host, two: Host) -> bool:
    """Whether two arrays are the same, bit for bit, compared in blocks.

    Examples
    --------
    >>> equal_bytes(np.zeros(2), -np.zeros(2)), equal_bytes(np.ones(3), np.ones(3))
    (False, True)
    """
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, two))
    parts = (slice(i, i + _BYTES) for i in range(0, a.size, _BYTES))
    return all(np.array_equal(a[part], b[part]) for part in parts)

"""W + u·v of bfloat16 weights at the speed of single precision, rounded as in double.

Each sum is formed in float32, where its error is known to stay within a bound. Whether it rounds
to the same bfloat16 as the exact sum shows in its low bits: where they lie within the bound of a
tie, and only there, it is formed again in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from threading import local

import numpy as np

from peft_any.receipt import Host
from peft_any.surgery.measure import Moments
from peft_any.surgery.rounding import nearest

_INNER = 1 << 16
"""Elements computed at a time: few enough for a core's cache, many enough for Python's pace."""
_FLOPS = 1_000_000
"""Multiplications of one product: OpenBLAS has a quick way for so small ones."""
_WIDE = 1024
_LARGE, _TINY = 2.0**20, 2.0**-100
"""Factors up to `_LARGE` lose less than `_TINY` to underflow in single precision."""
_MANY = 0.05
"""Share of doubtful sums above which double precision is quicker from the start."""
_TIE, _SIXTEEN = np.uint32(1 << 15), np.uint32(16)
_own = local()


@dataclass(frozen=True)
class Sums:
    """The sums W + u·v, by blocks of rows.

    Attributes
    ----------
    u, v : array (m, k), array (k, n), float64
    bound : array (m,), float64
        What a row's product in single precision may be off by.
    near : int
        Sums are doubtful that lie as near to a tie, in units of their last place …
    small : float
        … or as near to zero; no others are.
    """

    u: Host
    v: Host
    bound: Host
    near: int
    small: float
    singles: tuple[Host, Host] = field(init=False, repr=False)
    low: np.uint16 = field(init=False, repr=False)
    columns: Host = field(init=False, repr=False)
    gram: Host = field(init=False, repr=False)

    def __post_init__(self) -> None:
        once = object.__setattr__
        once(self, "singles", (self.u.astype(np.float32), self.v.astype(np.float32)))
        small = nearest(np.asarray([self.small]), "bfloat16").view(np.uint16)[0]
        once(self, "low", np.uint16(2 * int(small) + 2))
        once(self, "columns", np.ascontiguousarray(self.v.T))
        once(self, "gram", self.v @ self.v.T)

    @classmethod
    def of(cls, u: Host, v: Host, sample: Host) -> Sums | None:
        """Choose what is doubtful in weights like `sample`; None where too many would be."""
        size = float(np.sqrt(np.mean(np.square(sample.astype(np.float64)))))
        largest = max(float(np.abs(a).max(initial=0.0)) for a in (u, v))
        if not (0 < size < _LARGE and largest <= _LARGE):
            return None
        # Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5, with Cauchy-Schwarz:
        # k products and sums in any order, of factors that were rounded first.
        steps = (v.shape[0] + 2) * 2.0**-24
        lengths = np.sqrt(np.sum(v * v, axis=0)).max(initial=0.0)
        bound = steps / (1 - steps) * lengths * np.sqrt(np.sum(u * u, axis=1)) + _TINY
        most = float(bound.max(initial=0.0))
        # The fewest doubtful ones, where as many weights lie near zero as of a normal variable.
        near = max(int(sqrt(36700 * 2.0**23 * most / size)), 2)
        small = most * 2.0**24 / (near - 1)
        doubtful = near / 2**15 + small / size
        return cls(u, v, bound, near, small) if doubtful < _MANY else None

    def rounded(self, base: Host, start: int) -> tuple[Host, Moments]:
        """Add the product's rows from `start` on to as many of the base.

        Parameters
        ----------
        base : array (rows, n), bfloat16
        start : int

        Returns
        -------
        array (rows, n), bfloat16
        Moments
            Not finite where the base or the result is not.
        """
        rows, n = base.shape
        out = np.empty((rows, n), np.uint16)
        total, doubtful, step = Moments(), [], max(_INNER // n, 1)
        for i in range(0, rows, step):
            part = slice(i, min(i + step, rows))
            moments, places, sums = self._block(base[part], start + i, out[part])
            total += moments
            doubtful.append((places + i * n, sums))
        u = self.u[start : start + rows]
        delta2 = float(np.sum((u.T @ u) * self.gram))
        total += Moments(delta2=delta2, dot=delta2)
        if total.finite:
            places, sums = (np.concatenate(some) for some in zip(*doubtful, strict=True))
            total += self._settled(base, start, out, places, sums)
        return out.view(base.dtype), total

    def _block(self, base: Host, start: int, out: Host) -> tuple[Moments, Host, Host]:
        """Round sums in single precision; tell the doubtful ones, by place and value."""
        total, product, bits, low, doubt, other = _scratch(base.shape)
        np.copyto(total, base)
        self._product(start, product)
        base2 = float(np.vdot(total, total))
        np.add(total, product, out=total)
        np.add(total.view(np.uint32), _TIE, out=bits)
        # The low halves now tell how far above a tie the sums are.
        np.copyto(low, bits, casting="unsafe")
        np.add(low, np.uint16(self.near), out=low)
        np.less_equal(low, np.uint16(2 * self.near), out=doubt)
        np.right_shift(bits, _SIXTEEN, out=bits)
        np.copyto(out, bits, casting="unsafe")
        np.add(out, out, out=low)  # without the sign
        np.less_equal(low, self.low, out=other)
        np.logical_or(doubt, other, out=doubt)
        places = _found(doubt)
        np.equal(out, base.view(np.uint16), out=other)
        miss = bits.view(np.float32)
        np.copyto(miss, out.view(base.dtype))
        np.subtract(miss, total, out=miss)
        moments = Moments(
            base2,
            dot=float(np.vdot(miss, product)),
            miss2=float(np.vdot(miss, miss)),
            same=int(np.count_nonzero(other)),
            size=base.size,
        )
        return moments, places, total.reshape(-1).take(places)

    def _product(self, start: int, out: Host) -> None:
        u, v = self.singles
        (rows, n), k = out.shape, v.shape[0]
        wide = min(_WIDE, n)
        high = max(_FLOPS // (wide * max(k, 1)), 8)
        for i in range(0, rows, high):
            part = slice(i, min(i + high, rows))
            left = u[start + part.start : start + part.stop]
            for j in range(0, n, wide):
                np.matmul(left, v[:, j : j + wide], out=out[part, j : j + wide])

    def _settled(self, base: Host, start: int, out: Host, places: Host, sums: Host) -> Moments:
        """Form doubtful sums again, where they are doubtful by their own bound; correct `out`."""
        n, bits = base.shape[1], sums.view(np.uint32)
        off = np.abs((bits & np.uint32(0xFFFF)).astype(np.int32) - (1 << 15)) - 1
        last = np.maximum((bits & np.uint32(0x7F800000)).view(np.float32) * 2.0**-23, 2.0**-149)
        own = off * last <= self.bound[start + places // n]
        places, sums = places[own], sums[own]
        rows, columns = np.divmod(places, n)
        wanted = np.einsum("ik,ik->i", self.u[start + rows], self.columns[columns])
        before, flat = base[rows, columns], out.reshape(-1)
        exact = before.astype(np.float64) + wanted
        made = nearest(exact, "bfloat16")
        old = flat[places].view(made.dtype)
        flat[places] = made.view(np.uint16)
        new = made != old
        was, now = (a[new].astype(np.float64) for a in (old, made))
        was -= sums[new]
        now -= exact[new]
        return Moments(
            dot=float(np.vdot(now - was, wanted[new])),
            miss2=float(np.vdot(now, now) - np.vdot(was, was)),
            same=int(np.count_nonzero(made == before) - np.count_nonzero(old == before)),
        )


def _found(flags: Host) -> Host:
    """Give the places of the few flags that are set: `flatnonzero`, eight at a time."""
    flat = flags.reshape(-1)
    eights = flat[: flat.size // 8 * 8].view(np.uint64)
    some = (eights != 0).nonzero()[0]
    within = eights.take(some).view(np.bool_).nonzero()[0]
    places: Host = 8 * some.take(within >> 3) + (within & 7)
    rest = flat[eights.size * 8 :].nonzero()[0] + eights.size * 8
    return np.concatenate([places, rest]) if rest.size else places


def _scratch(shape: tuple[int, ...]) -> tuple[Host, ...]:
    """Give this thread's buffers, in this shape."""
    rows, n = shape
    known: tuple[Host, ...] | None = getattr(_own, "buffers", None)
    if known is None or known[0].shape[1] != n or known[0].shape[0] < rows:
        types = "f4", "f4", "u4", "u2", "?", "?"
        known = _own.buffers = tuple(np.empty(shape, np.dtype(t)) for t in types)
    return tuple(a[:rows] for a in known)

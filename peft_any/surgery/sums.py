"""W + u·v of bfloat16 weights, or g ⊙ (W + u·v), at single precision's speed, rounded as in double.

Each sum is formed in float32, where its error is known to stay within a bound. Whether it rounds
to the same bfloat16 as the exact sum shows in how far it was rounded: where that is within the
bound of half a place, and only there, it is formed again in double precision. All of it is one
compiled pass where there is one (`passes.py`, `_sums.c`), and else what stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from threading import local

import numpy as np

from peft_any.receipt import Host
from peft_any.surgery.measure import Moments
from peft_any.surgery.passes import chosen
from peft_any.surgery.rounding import nearest

_INNER = 1 << 17
"""Elements computed at a time: few enough for a core's cache, many enough for Python's pace."""
_FLOPS = 1_000_000
"""Multiplications of one product: OpenBLAS has a quick way for so small ones."""
_WIDE = 1024
_PANEL = 32
"""Columns that the compiled pass takes together."""
_LARGE, _TINY = 2.0**20, 2.0**-100
"""Factors up to `_LARGE` lose less than `_TINY` to underflow in single precision."""
_MANY = 0.05
"""Share of doubtful sums above which double precision is quicker from the start."""
_HALF_PLACE = 2.0**-8
"""Of bfloat16, for numbers from 1 to 2."""
_SUM, _SCALED = 2.0**-22, 2.0**-20
"""More than twice what single precision loses of that in a sum; and in a gain and its product."""
_TIE, _SIXTEEN, _EXPONENT = (np.uint32(n) for n in (1 << 15, 16, 0x7F800000))
_own = local()


@dataclass(frozen=True)
class Sums:
    """The sums W + u·v, by blocks of rows, which may have gains.

    Attributes
    ----------
    u, v : array (m, k), array (k, n), float64
    bound : array (m,), float32
        Twice what a row's product in single precision may be off by: just above a power of two,
        the next tie below is only half as far as the one above.
    squares : array (m,), float64
        Of the lengths of the product's rows.
    """

    u: Host
    v: Host
    bound: Host
    singles: tuple[Host, Host] = field(init=False, repr=False)
    columns: Host = field(init=False, repr=False)
    squares: Host = field(init=False, repr=False)
    panels: Host = field(init=False, repr=False)

    def __post_init__(self) -> None:
        once = object.__setattr__
        once(self, "u", np.ascontiguousarray(self.u))
        once(self, "singles", (self.u.astype(np.float32), self.v.astype(np.float32)))
        once(self, "columns", np.ascontiguousarray(self.v.T))
        squares = np.einsum("ij,ij->i", self.u @ (self.v @ self.v.T), self.u)
        once(self, "squares", np.maximum(squares, 0))  # where terms cancel
        k, whole = len(self.v), self.v.shape[1] // _PANEL
        cut = self.singles[1][:, : whole * _PANEL].reshape(k, whole, _PANEL)
        once(self, "panels", np.ascontiguousarray(np.swapaxes(cut, 0, 1)))

    @classmethod
    def of(cls, u: Host, v: Host, sample: Host) -> Sums | None:
        """Bound the errors; None where too many of weights like `sample` would be doubtful."""
        largest = max(float(max(a.max(initial=0.0), -a.min(initial=0.0))) for a in (u, v))
        if not largest <= _LARGE:
            return None
        # Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5, with Cauchy-Schwarz:
        # k products and sums in any order, of factors that were rounded first.
        steps = (v.shape[0] + 2) * 2.0**-24
        longest = sqrt(np.einsum("ij,ij->j", v, v).max(initial=0.0))
        bound = steps / (1 - steps) * longest * np.sqrt(np.einsum("ij,ij->i", u, u)) + _TINY
        bound = np.nextafter(2 * bound.astype(np.float32), np.float32(np.inf))
        sizes = np.abs(sample.astype(np.float64))
        if not np.all(sizes < _LARGE):
            return None
        doubtful = np.minimum(2.0**8 * float(bound.max()) / np.maximum(sizes, _TINY), 1)
        return cls(u, v, bound) if np.mean(doubtful) < _MANY else None

    def rounded(self, base: Host, start: int, gain: Host | None = None) -> tuple[Host, Moments]:
        """Add the product's rows from `start` on to as many of the base.

        Parameters
        ----------
        base : array (rows, n), bfloat16
        start : int
        gain : array (rows,), float64, optional
            Multiplies the sums.

        Returns
        -------
        array (rows, n), bfloat16
        Moments
            Not finite where the base or the result is not.
        """
        out = np.empty(base.shape, np.uint16)
        level, compiled = chosen()
        if compiled is None:
            total = self._blocks(base, start, out, gain)
        else:
            total = self._pass(partial(compiled.add, level), base, start, out, gain)
        if gain is None:
            delta2 = float(np.sum(self.squares[start : start + len(base)]))
            total += Moments(delta2=delta2, dot=delta2)
        return out.view(base.dtype), total

    def _pass(
        self,
        add: Callable[..., tuple[float, float, float, float, int]],
        base: Host,
        start: int,
        out: Host,
        gain: Host | None,
    ) -> Moments:
        """Round sums by the compiled pass."""
        rows = slice(start, start + len(base))
        gains = (None, None) if gain is None else (gain.astype(np.float32), gain)
        base2, delta2, dot, miss2, same = add(
            np.require(base, requirements=["C", "A"]).view(np.uint16),
            out,
            self.singles[0][rows],
            self.panels,
            self.u[rows],
            self.columns,
            self.bound[rows],
            *gains,
        )
        return Moments(base2, delta2, dot + delta2, miss2, same, base.size)

    def _blocks(self, base: Host, start: int, out: Host, gain: Host | None) -> Moments:
        """Round sums by NumPy, in blocks that stay in the cache."""
        rows, n = base.shape
        doubtful = np.empty((rows, n), np.bool_)
        total, step = Moments(), max(_INNER // n, 1)
        for i in range(0, rows, step):
            part = slice(i, min(i + step, rows))
            some = None if gain is None else gain[part]
            total += self._block(base[part], start + i, out[part], doubtful[part], some)
        if total.finite:
            total += self._settled(base, start, out, _found(doubtful), gain)
        return total

    def _block(
        self, base: Host, start: int, out: Host, doubtful: Host, gain: Host | None
    ) -> Moments:
        """Round sums in single precision, and mark the doubtful ones."""
        total, delta, bits = _scratch(base.shape)
        bound, loss = self.bound[start : start + len(base)], _SUM
        np.copyto(total, base)
        self._product(start, delta)
        base2, delta2 = float(np.vdot(total, total)), 0.0
        np.add(total, delta, out=total)
        if gain is not None:
            bound, loss = bound * np.abs(gain), _SCALED
            np.multiply(total, gain.astype(np.float32)[:, None], out=total)
            np.copyto(delta, base)
            np.subtract(total, delta, out=delta)
            delta2 = float(np.vdot(delta, delta))
        np.add(total.view(np.uint32), _TIE, out=bits)
        np.right_shift(bits, _SIXTEEN, out=bits)
        np.copyto(out, bits, casting="unsafe")
        np.equal(out, base.view(np.uint16), out=doubtful)
        same = int(np.count_nonzero(doubtful))
        np.left_shift(bits, _SIXTEEN, out=bits)
        miss = bits.view(np.float32)
        np.subtract(miss, total, out=miss)
        dot, miss2 = delta2 + float(np.vdot(miss, delta)), float(np.vdot(miss, miss))
        far = delta
        np.bitwise_and(total.view(np.uint32), _EXPONENT, out=far.view(np.uint32))
        np.multiply(far, np.float32(_HALF_PLACE - loss), out=far)
        np.subtract(far, np.float32(bound.max()), out=far)
        np.abs(miss, out=miss)
        np.greater_equal(miss, far, out=doubtful)
        return Moments(base2, delta2, dot, miss2, same, base.size)

    def _product(self, start: int, out: Host) -> None:
        u, v = self.singles
        (rows, n), k = out.shape, v.shape[0]
        wide = min(_WIDE, n)
        most = max(_FLOPS // (wide * max(k, 1)), 8)
        high = -(-rows // -(-rows // most))
        for i in range(0, rows, high):
            part = slice(i, min(i + high, rows))
            left = u[start + part.start : start + part.stop]
            for j in range(0, n, wide):
                np.matmul(left, v[:, j : j + wide], out=out[part, j : j + wide])

    def _settled(
        self, base: Host, start: int, out: Host, places: Host, gain: Host | None
    ) -> Moments:
        """Form doubtful sums again; correct `out`, and what was measured."""
        rows, columns = np.divmod(places, base.shape[1])
        u, v = self.u.take(start + rows, axis=0), self.columns.take(columns, axis=0)
        before, flat = base[rows, columns], out.reshape(-1)
        product = np.zeros(len(places))
        for left, right in zip(u.T, v.T, strict=True):  # as the compiled pass does
            product += left * right
        exact = before.astype(np.float64) + product
        if gain is not None:
            exact *= gain[rows]
        made = nearest(exact, "bfloat16")
        old = flat[places].view(made.dtype)
        flat[places] = made.view(np.uint16)
        new = made != old
        was, now = (a[new].astype(np.float64) - exact[new] for a in (old, made))
        wanted = exact[new] - before[new].astype(np.float64)
        return Moments(
            dot=float(np.vdot(now - was, wanted)),
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
        types = "f4", "f4", "u4"
        known = _own.buffers = tuple(np.empty(shape, np.dtype(t)) for t in types)
    return tuple(a[:rows] for a in known)

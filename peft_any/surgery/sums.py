"""W + Δ of bfloat16 weights, or g ⊙ (W + Δ), at single precision's speed, rounded as in double.

Each sum is formed in float32, where its error is known to stay within a bound. Whether it rounds
to the same bfloat16 as the exact sum shows in how far it was rounded: where that is within the
bound of half a place, and only there, it is formed again in double precision. All of it is one
compiled pass where there is one (`passes.py`, `_sums.c`), and else what stands here.
"""

from __future__ import annotations

import abc
from threading import local

import numpy as np

from peft_any.receipt import Host
from peft_any.surgery.measure import Moments
from peft_any.surgery.passes import chosen
from peft_any.surgery.rounding import nearest

LARGE, TINY = 2.0**20, 2.0**-100
"""Factors up to `LARGE` lose less than `TINY` to underflow in single precision."""
PANEL = 32
"""Columns that the compiled pass takes together."""
CHUNK = 16
"""Products that it sums before it adds them to others, so that each is rounded less often."""
_INNER = 1 << 17
"""Elements computed at a time: few enough for a core's cache, many enough for Python's pace."""
_MANY = 0.05
"""Share of doubtful sums above which double precision is quicker from the start."""
_LONG = 64
"""Products of a sum from which their number counts, too."""
_HALF_PLACE = 2.0**-8
"""Of bfloat16, for numbers from 1 to 2."""
_SUM, _SCALED = 2.0**-22, 2.0**-20
"""More than twice what single precision loses of that in a sum; and in a gain and its product."""
_TIE, _SIXTEEN, _EXPONENT = (np.uint32(n) for n in (1 << 15, 16, 0x7F800000))
_own = local()


def lost(k: int) -> float:
    """Bound what single precision loses of k products and their sum, for sizes that sum to 1.

    In any order, of factors that were rounded first: Higham 2002, Accuracy and Stability of
    Numerical Algorithms, eq. 3.5.
    """
    steps = (k + 2) * 2.0**-24
    return steps / (1 - steps)


def few(bound: Host, sizes: Host, k: int) -> bool:
    """Whether few sums of such sizes, each of k products, are doubtful, and none overflows."""
    doubtful = np.minimum(2.0**8 * bound / np.maximum(sizes, TINY), 1)
    return bool(np.all(sizes < LARGE)) and float(np.mean(doubtful)) * max(k / _LONG, 1) < _MANY


def above(bound: Host) -> Host:
    """Give twice a bound in single precision, rounded up.

    Twice: just above a power of two, the next tie below is only half as far as the one above.
    """
    return np.nextafter(2 * bound.astype(np.float32), np.float32(np.inf))


class Sums(abc.ABC):
    """The sums W + Δ, by blocks of rows, which may have gains."""

    @abc.abstractmethod
    def given(self, rows: slice) -> tuple[Host | None, ...]:
        """Give what the compiled pass needs: u, panels, u and v's columns in double, bounds."""

    @abc.abstractmethod
    def delta(self, weights: Host, start: int, out: Host) -> Host:
        """Form Δ in single precision, of such rows from `start` on; give bounds (rows,)."""

    @abc.abstractmethod
    def exact(self, base: Host, start: int, rows: Host, columns: Host) -> Host:
        """Form Δ at some places in double precision, adding as the compiled pass does."""

    def squares(self, rows: slice) -> float | None:  # noqa: ARG002
        """Give ‖Δ‖² of some rows without gains, where it is known better than by measuring."""
        return None

    def rounded(self, base: Host, start: int, gain: Host | None = None) -> tuple[Host, Moments]:
        """Add Δ's rows from `start` on to as many of the base.

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
        out, rows = np.empty(base.shape, np.uint16), slice(start, start + len(base))
        level, compiled = chosen()
        known = self.squares(rows) if gain is None else None
        if compiled is None:
            total = self._blocks(base, start, out, gain, measured=known is None)
        else:
            whole = np.require(base, requirements=["C", "A"]).view(np.uint16)
            gains = (None, None) if gain is None else (gain.astype(np.float32), gain)
            base2, delta2, dot, miss2, same = compiled.add(
                level, whole, out, *self.given(rows), *gains
            )
            total = Moments(base2, delta2, dot + delta2, miss2, same, base.size)
        if known is not None:
            total += Moments(delta2=known, dot=known)
        return out.view(base.dtype), total

    def _blocks(
        self, base: Host, start: int, out: Host, gain: Host | None, *, measured: bool
    ) -> Moments:
        """Round sums by NumPy, in blocks that stay in the cache."""
        rows, n = base.shape
        doubtful = np.empty((rows, n), np.bool_)
        total, step = Moments(), max(_INNER // n, 1)
        for i in range(0, rows, step):
            part = slice(i, min(i + step, rows))
            some = None if gain is None else gain[part]
            places = out[part], doubtful[part]
            total += self._block(base[part], start + i, places, some, measured=measured)
        if total.finite:
            total += self._settled(base, start, out, _found(doubtful), gain)
        return total

    def _block(
        self,
        base: Host,
        start: int,
        places: tuple[Host, Host],
        gain: Host | None,
        *,
        measured: bool,
    ) -> Moments:
        """Round sums in single precision, and mark the doubtful ones."""
        (out, doubtful), (total, delta, bits) = places, _scratch(base.shape)
        np.copyto(total, base)
        bound, loss = self.delta(total, start, delta), _SUM
        base2 = float(np.vdot(total, total))
        np.add(total, delta, out=total)
        if gain is not None:
            bound, loss = bound * np.abs(gain.astype(np.float32)), _SCALED
            np.multiply(total, gain.astype(np.float32)[:, None], out=total)
            np.copyto(delta, base)
            np.subtract(total, delta, out=delta)
        delta2 = float(np.vdot(delta, delta)) if measured else 0.0
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
        np.subtract(far, bound[:, None], out=far)
        np.abs(miss, out=miss)
        np.greater_equal(miss, far, out=doubtful)
        return Moments(base2, delta2, dot, miss2, same, base.size)

    def _settled(
        self, base: Host, start: int, out: Host, places: Host, gain: Host | None
    ) -> Moments:
        """Form doubtful sums again; correct `out`, and what was measured."""
        rows, columns = np.divmod(places, base.shape[1])
        before, flat = base[rows, columns], out.reshape(-1)
        exact = before.astype(np.float64) + self.exact(base, start, rows, columns)
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


def products(left: Host, right: Host) -> Host:
    """Multiply rows (…, k) by rows: sums of every fourth product, then of the four.

    As the compiled pass does, bit for bit.
    """
    part, k = np.zeros((len(left), 4)), left.shape[1]
    for t in range(0, k, 4):
        some = left[:, t : t + 4] * right[:, t : t + 4]
        part[:, : some.shape[1]] += some
    return (part[:, 0] + part[:, 1]) + (part[:, 2] + part[:, 3])


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

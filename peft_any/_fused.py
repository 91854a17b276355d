"""Sums and products of float64, rounded once, as a fused multiply-add rounds them."""

from __future__ import annotations

from typing import Any

import numpy as np

Host = np.ndarray[Any, np.dtype[Any]]


def round_odd_sum(a: Any, b: Any) -> Any:
    """Add in float64, rounding to odd, so that rounding again is as rounding once.

    Boldo & Melquiond, IEEE Trans. Comput. 57 (2008), 462, https://doi.org/10.1109/TC.2007.70819.
    """
    total = np.asarray(a + b)
    back = total - a
    error = (a - (total - back)) + (b - back)
    even = (total.view(np.int64) & 1) == 0
    return np.where(even & (error != 0), np.nextafter(total, np.copysign(np.inf, error)), total)


def fma(a: Host, b: float, c: float) -> Any:
    """Form a·b + c in float64, rounded once where nothing underflows (Boldo & Melquiond 2008)."""
    if c == 0:
        return a * b + c
    high = a * b
    ah, bh = _head(a), _head(b)
    al, bl = a - ah, b - bh
    low = al * bl - (((high - ah * bh) - al * bh) - ah * bl)
    t = c + low
    back = t - c
    t_error = (c - (t - back)) + (low - back)
    v = high + t
    back = v - high
    v_error = (high - (v - back)) + (t - back)
    return v + round_odd_sum(t_error, v_error)


def _head(a: Any) -> Any:
    """Keep the upper 26 bits of a float64 (Veltkamp's splitting)."""
    scaled = 134217729.0 * a
    return scaled - (scaled - a)

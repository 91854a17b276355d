"""Rounding to a stored dtype once: from double precision, or from sums known within a bound."""

from __future__ import annotations

from functools import cache

import numpy as np

from peft_any._dtypes import is_native, numpy_dtype
from peft_any.receipt import Host

_HALF, _SIXTEEN = np.uint32(1 << 15), np.uint32(16)


def widened(block: Host, dtype: str = "float64") -> Host:
    """Copy stored values, of any dtype, to a wider one.

    Examples
    --------
    >>> widened(np.ones(2, numpy_dtype("float8_e5m2")))
    array([1., 1.])
    """
    if block.dtype.itemsize == 1 and not is_native(block.dtype):
        # A table: ml_dtypes converts these element by element.
        bytes_ = np.ascontiguousarray(block).view(np.uint8)
        return _table(block.dtype.name, dtype)[bytes_]
    return block.astype(dtype)


@cache
def _table(name: str, dtype: str) -> Host:
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(name)).astype(dtype)


def nearest(exact: Host, dtype: str) -> Host:
    """Round double precision to nearest, ties to even, once; also where libraries round twice.

    Casts to bfloat16 and 8-bit floats go by way of float32, and can come down on the wrong side
    of a tie that the first rounding made. What is rounded to odd first, as in Boldo & Melquiond
    2008 (https://doi.org/10.1109/TC.2007.70819), cannot.

    Parameters
    ----------
    exact : array, float64 or float32
    dtype : str
        Of the result; overflow gives infinities, or NaN where the dtype has none.

    Examples
    --------
    >>> x, bfloat16 = np.asarray([1 + 2.0**-8 + 2.0**-40]), numpy_dtype("bfloat16")
    >>> float(nearest(x, "bfloat16")[0]), float(x.astype(bfloat16)[0])
    (1.0078125, 1.0)
    """
    to = numpy_dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if exact.dtype == to:
            return exact
        if is_native(to) or exact.dtype != np.float64:
            return exact.astype(to)
        if dtype == "bfloat16" and exact.flags.c_contiguous:
            return _bfloat16(exact)
        return odd(exact).astype(to)


def _bfloat16(exact: Host) -> Host:
    """Round the float32 nearest to each number; where that is a tie, the number decides."""
    single = np.ascontiguousarray(exact.astype(np.float32))
    bits = single.view(np.uint32)
    bits += _HALF
    ties = np.flatnonzero(bits.astype(np.uint16) == 0)
    bits >>= _SIXTEEN
    result: Host = bits.astype(np.uint16).view(numpy_dtype("bfloat16"))
    if ties.size:
        result.reshape(-1)[ties] = odd(exact.reshape(-1)[ties]).astype(result.dtype)
    return result


def odd(exact: Host) -> Host:
    """Round double to single precision so that rounding further down gives the nearest at once.

    Towards zero, and the last bit is set where anything was cut off.

    Examples
    --------
    >>> x = np.asarray([1.0, 1 + 2.0**-40])
    >>> (odd(x) - 1).tolist()
    [0.0, 1.1920928955078125e-07]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        single = exact.astype(np.float32)
    bits = single.view(np.uint32)
    cut = single != exact
    bits -= np.abs(single) > np.abs(exact)
    bits |= cut
    return single

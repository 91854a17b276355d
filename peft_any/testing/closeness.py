"""Comparing arrays: shape, dtype, library and device before values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from peft_any._libraries import library_of
from peft_any.backend import Backend, backend_of, creation_device, dtype_name, is_array, to_numpy

_ROUNDINGS = 100.0
"""How many roundings of the dtype two results may be apart, where nothing else is asked."""


def rounding(dtype: str) -> float:
    """Give the relative error of one rounding to a dtype: half its `eps`; 0 for integers.

    Examples
    --------
    >>> rounding("bfloat16")
    0.00390625
    """
    try:
        info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        return float(info.eps) / 2
    except ValueError:
        return 0.0


def gap(got: Any, want: Any) -> float:
    """Largest difference of two host arrays, relative to the largest entry of the second.

    Examples
    --------
    >>> gap(np.asarray([1.0, 4.0]), np.asarray([1.0, 5.0]))
    0.2
    """
    size = float(np.max(np.abs(want), initial=0.0))
    return float(np.max(np.abs(got - want), initial=0.0)) / max(size, 1e-30)


def assert_close(
    got: Any,
    want: Any,
    *,
    rtol: float | None = None,
    on: Backend | None = None,
    where: str = "",
) -> None:
    """Check that two arrays agree: in shape, dtype, library and device, and then in values.

    Parameters
    ----------
    got, want : array (...)
        Of any library. Values need not be there (torch's meta device, abstract arrays): then the
        rest is compared.
    rtol : float, optional
        Largest difference, relative to the largest entry of `want`; by default a hundred
        roundings of the dtype.
    on : Backend, optional
        Library and device that `got` must be of; by default those of `want`.
    where : str
        What errors begin with.

    Raises
    ------
    AssertionError
        Saying which of these differs, and how.

    Examples
    --------
    >>> import numpy as np
    >>> assert_close(np.ones(2), np.ones(2) + 1e-16)
    >>> assert_close(np.ones(2, "float32"), np.ones(2), where="y")
    Traceback (most recent call last):
    AssertionError: y: the dtype is float32, not float64
    """
    head = f"{where}: " if where else ""
    if not is_array(got):
        raise AssertionError(f"{head}there is a {type(got).__name__}, not an array")
    if tuple(got.shape) != tuple(want.shape):
        raise AssertionError(f"{head}the shape is {tuple(got.shape)}, not {tuple(want.shape)}")
    if dtype_name(got) != dtype_name(want):
        raise AssertionError(f"{head}the dtype is {dtype_name(got)}, not {dtype_name(want)}")
    on = backend_of(want) if on is None else on
    if (found := backend_of(got)).name != on.name:
        raise AssertionError(f"{head}the array is one of {found.name}, not of {on.name}")
    if not library_of(got).is_on(got, on.device):
        raise AssertionError(
            f"{head}the array is on the device {creation_device(got)}, not on {on.device}: what a "
            "method makes needs device=creation_device(x)"
        )
    if "meta" in (str(getattr(got, "device", "")), str(getattr(want, "device", ""))):
        return
    here, there = to_numpy(got), to_numpy(want)
    rtol = _ROUNDINGS * rounding(dtype_name(want)) if rtol is None else rtol
    size = max(float(np.max(np.abs(there), initial=0.0)), 1e-30)
    try:
        np.testing.assert_allclose(here / size, there / size, rtol=0, atol=rtol)
    except AssertionError as error:
        raise AssertionError(
            f"{head}the values differ by more than {rtol:.2g} of {size:.4g}, the largest entry"
            f"{error}"
        ) from None

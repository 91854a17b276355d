"""Dtypes by name: the one vocabulary in which all array libraries can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_any.errors import BackendError

SCALARS = (type(None), bool, int, float, complex)
"""Python's own; NumPy's scalars, though some derive from these, are arrays here."""
_SHORT = {
    "float": "float32", "fp32": "float32", "f32": "float32", "half": "float16", "fp16": "float16",
    "f16": "float16", "bf16": "bfloat16", "fp64": "float64", "f64": "float64", "double": "float64",
    "fp8": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2",
}  # fmt: skip
"""Names that other tools have for dtypes."""
_MOST = 256
_names: dict[tuple[type, Any], str] = {}
"""Names known already: a dict, since torch's compiler warns of what `functools` caches."""


def dtype_name(x: Any) -> str:
    """Name a dtype as checkpoints and configurations do.

    Parameters
    ----------
    x : array, dtype of any library, or str
        A string is checked and brought to its usual spelling.

    Returns
    -------
    str
        ``"float32"``, ``"bfloat16"``, ``"float8_e4m3fn"``, ``"int64"`` …

    Raises
    ------
    BackendError
        If `x` is neither an array nor a dtype.

    Examples
    --------
    >>> import numpy as np
    >>> dtype_name(np.zeros(2, dtype="float32")), dtype_name(np.int64)
    ('float32', 'int64')
    """
    dtype: Any = x if isinstance(x, (type, str)) else getattr(x, "dtype", x)
    try:
        key = type(dtype), dtype
        known = _names.get(key)
        if known is None:
            known = _name(dtype)
            if len(_names) < _MOST:
                _names[key] = known
    except TypeError:  # NumPy's, as of an unhashable object
        raise BackendError(f"{x!r}: has no dtype: it is neither an array nor a dtype") from None
    return known


def asked(dtype: Any) -> str:
    """Name the dtype that a caller asks for; a name that is none is left to be refused.

    Parameters
    ----------
    dtype : dtype of any library, or str
        Short names of other tools are known too.

    Raises
    ------
    BackendError
        If it is neither.

    Examples
    --------
    >>> import numpy as np
    >>> asked("bf16"), asked(np.float16), asked("float")
    ('bfloat16', 'float16', 'float32')
    """
    if isinstance(dtype, str):
        return _SHORT.get(dtype.lower(), dtype)
    return dtype_name(dtype)


def _name(dtype: Any) -> str:
    text = "" if isinstance(dtype, (type, str)) else str(dtype)
    if text.startswith(("torch.", "array_api_strict.")):
        return text.rpartition(".")[2]
    if dtype is None:
        raise TypeError("NumPy takes None for float64")
    return numpy_dtype(dtype).name


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """Find NumPy's dtype of a name, ml_dtypes' bfloat16 and 8-bit floats included.

    Raises
    ------
    TypeError
        If there is none of that name.

    Examples
    --------
    >>> numpy_dtype("bfloat16").itemsize
    2
    """
    if isinstance(dtype, str) and dtype.startswith(("bfloat16", "float4_", "float6_", "float8_")):
        import ml_dtypes  # noqa: PLC0415 - costs a third of NumPy's own import

        dtype = getattr(ml_dtypes, dtype, dtype)
    found: np.dtype[Any] = np.dtype(dtype)
    return found


def is_native(dtype: np.dtype[Any]) -> bool:
    """Tell whether a dtype is NumPy's own, not an extension's (bfloat16, 8-bit floats).

    Examples
    --------
    >>> is_native(numpy_dtype("float16")), is_native(numpy_dtype("bfloat16"))
    (True, False)
    """
    return not dtype.type.__module__.startswith("ml_dtypes")


def is_floating(x: Any) -> bool:
    """Tell whether an array or dtype is real floating, bfloat16 and 8-bit floats included.

    Examples
    --------
    >>> is_floating("bfloat16"), is_floating("complex64"), is_floating("int8")
    (True, False, False)
    """
    return dtype_name(x).startswith(("float", "bfloat"))


def compute_dtype(*arrays: Any) -> str:
    """Choose the dtype in which arrays of these storage dtypes are computed with.

    Parameters
    ----------
    *arrays : array, dtype, str, Python scalar or None
        Integer arrays, scalars and None have no say.

    Returns
    -------
    str
        ``"float32"``, or ``"float64"`` where any has it; their complex kin where any is complex.

    Examples
    --------
    >>> compute_dtype("bfloat16", "float32"), compute_dtype("float16", "float64")
    ('float32', 'float64')
    """
    names = {dtype_name(a) for a in arrays if type(a) not in SCALARS}
    wide = bool(names & {"float64", "complex128"})
    if any(n.startswith("complex") for n in names):
        return "complex128" if wide else "complex64"
    return "float64" if wide else "float32"

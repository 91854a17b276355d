"""Questions to arrays of any library: whose they are, on which device, of which dtype."""

from __future__ import annotations

import re
from typing import Any

from peft_any._dtypes import SCALARS, dtype_name
from peft_any._libraries import LIBRARIES, UNKNOWN, Host, find_library, library_of
from peft_any._typing import Namespace
from peft_any.errors import BackendError

_NAME = re.compile(r"bool|u?int\d+|b?float\d+(_\w+)?|complex\d+")
_namespace_of: dict[tuple[type, ...], Namespace] = {}


def namespace(*arrays: Any) -> Namespace:
    """Find the Array API namespace of arrays.

    Parameters
    ----------
    *arrays : array, Python scalar or None
        All arrays must be of one library; scalars and None are ignored.

    Raises
    ------
    BackendError
        If the arrays are of several libraries, or there are none.

    Examples
    --------
    >>> import numpy as np
    >>> namespace(np.ones(2), None, 1.0).__name__
    'array_api_compat.numpy'
    """
    kinds = tuple(map(type, arrays))
    xp = _namespace_of.get(kinds)
    return _find_namespace(arrays, kinds) if xp is None else xp


def _find_namespace(arrays: tuple[Any, ...], kinds: tuple[type, ...]) -> Namespace:
    found: dict[str, Namespace] = {}
    constant = True
    for x in arrays:
        if type(x) in SCALARS:
            continue
        library = library_of(x)
        xp = library.namespace(x)
        # any other array may have a namespace of its own
        constant = constant and (library is not UNKNOWN or hasattr(xp, "records"))
        found[library.name or xp.__name__] = xp
    if not found:
        raise BackendError("namespace: cannot be found without an array: all are None or scalars")
    if len(found) > 1:  # a tape takes arrays of the library that it records as constants
        tapes = [xp for xp in found.values() if {*found} <= getattr(xp, "records", set())]
        found = {xp.__name__: xp for xp in tapes} or found
    if len(found) > 1:
        raise BackendError(
            f"arrays of {' and '.join(sorted(found))} cannot be used together: convert them to "
            "one library with peft_any.move(arrays, backend)"
        )
    (xp,) = found.values()
    if constant:
        _namespace_of[kinds] = xp
    return xp


def is_array(x: Any) -> bool:
    """Tell whether `x` is an array of any library.

    Examples
    --------
    >>> import numpy as np
    >>> is_array(np.ones(2)), is_array([1.0])
    (True, False)
    """
    return find_library(x) is not None


def is_traced(x: Any) -> bool:
    """Whether an array only stands for one, while a transformation such as jit traces a function.

    Such an array must not be kept longer than the function runs.

    Examples
    --------
    >>> import numpy as np
    >>> is_traced(np.ones(2))
    False
    """
    traces = getattr(find_library(x), "traces", None)  # JAX's alone
    return traces is not None and bool(traces(x))


def is_lazy(x: Any) -> bool:
    """Whether an array is a plan that computes its values when they are asked for.

    Examples
    --------
    >>> import numpy as np
    >>> is_lazy(np.ones(2))
    False
    """
    return library_of(x).name == "dask"


def creation_device(x: Any) -> Any:
    """Give the `device=` for making arrays that shall meet `x`.

    None for a JAX array under a transformation or bound to no device; the replicated sharding
    of the same mesh for a sharded one; ``"cpu"`` for NumPy and Dask.

    Examples
    --------
    >>> import numpy as np
    >>> creation_device(np.ones(2))
    'cpu'
    """
    return library_of(x).creation_device(x)


def dtype_by_name(xp: Namespace, name: str) -> Any:
    """Find a namespace's dtype object by its name.

    Raises
    ------
    BackendError
        If the library has no such dtype.

    Examples
    --------
    >>> import numpy as np
    >>> dtype_by_name(namespace(np.ones(1)), "bfloat16")
    dtype(bfloat16)
    """
    space = getattr(xp, "__name__", "")
    library = next((lib for lib in LIBRARIES.values() if lib.space == space), UNKNOWN)
    dtype = library.dtype(name, xp) if _NAME.fullmatch(name) else None
    if dtype is None:
        raise BackendError(
            f"{library.name or space}: cannot hold {name}: it has no such dtype; use float32, or "
            "another library (NumPy, torch and JAX have bfloat16 and 8-bit floats)"
        )
    return dtype


def astype(x: Any, name: str) -> Any:
    """Round an array to nearest (ties to even) in another dtype; itself if it has it already.

    Raises
    ------
    BackendError
        If the library has no such dtype.

    Examples
    --------
    >>> import numpy as np
    >>> astype(np.asarray([1.00390625]), "bfloat16")
    array([1], dtype=bfloat16)
    """
    if dtype_name(x) == name:
        return x
    library = library_of(x)
    xp = library.namespace(x)
    return library.astype(x, dtype_by_name(xp, name), xp)


def widest(x: Any) -> Any:
    """Bring an array to float64, or to float32 where its library has no wider one.

    Examples
    --------
    >>> import numpy as np
    >>> str(widest(np.ones(2, "float16")).dtype)
    'float64'
    """
    try:
        dtype_by_name(library_of(x).namespace(x), "float64")
    except BackendError:
        name = "float32"
    else:
        name = "float64"
    return astype(x, name)


def inv(x: Any) -> Any:
    """Invert a stack of matrices (..., b, b); lazily on Dask, whose own `inv` takes but one.

    Examples
    --------
    >>> import numpy as np
    >>> inv(np.asarray([[[2.0]], [[4.0]]])).tolist()
    [[[0.5]], [[0.25]]]
    """
    if library_of(x).name != "dask":
        return namespace(x).linalg.inv(x)
    whole = x.rechunk({x.ndim - 2: -1, x.ndim - 1: -1})
    return whole.map_blocks(inv, dtype=x.dtype, meta=x._meta)  # noqa: SLF001 - as it documents


def qr(x: Any) -> Any:
    """Decompose a matrix in orthonormal columns and an upper triangle, of reduced size.

    On Dask in one piece: its own `qr` takes no matrix cut along both axes.

    Examples
    --------
    >>> import numpy as np
    >>> abs(qr(np.asarray([[3.0], [4.0]]))[1]).tolist()
    [[5.0]]
    """
    whole = x if library_of(x).name != "dask" else x.rechunk(-1)
    return namespace(x).linalg.qr(whole)


def svd(x: Any) -> tuple[Any, Any, Any]:
    """Decompose a matrix in its singular triplets u, s, vᵀ, of reduced size; on Dask in one piece.

    Examples
    --------
    >>> import numpy as np
    >>> svd(np.asarray([[3.0], [4.0]]))[1].tolist()
    [5.0]
    """
    whole = x if library_of(x).name != "dask" else x.rechunk(-1)
    u, s, vt = namespace(x).linalg.svd(whole, full_matrices=False)
    return u, s, vt


def settled(x: Any) -> Any:
    """Compute a lazy array, which stays in its library; give any other back as it is.

    Examples
    --------
    >>> import numpy as np
    >>> settled(np.ones(2))
    array([1., 1.])
    """
    return x if library_of(x).name != "dask" else x.persist()


def to_numpy(x: Any) -> Host:
    """Bring an array to the host as a NumPy array, which may share its memory.

    bfloat16 and 8-bit floats become ml_dtypes'; torch tensors are detached; Dask computes.

    Raises
    ------
    BackendError
        If there are no values to bring: torch's meta device, JAX under a transformation.

    Examples
    --------
    >>> import numpy as np
    >>> to_numpy(np.ones(2))
    array([1., 1.])
    """
    return library_of(x).to_numpy(x)

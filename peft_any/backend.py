"""Which array library to use, and how arrays pass between libraries, devices and dtypes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np

from peft_any._arrays import (
    astype,
    creation_device,
    dtype_by_name,
    inv,
    is_array,
    is_lazy,
    is_traced,
    namespace,
    qr,
    settled,
    svd,
    to_numpy,
    widest,
)
from peft_any._dtypes import asked, compute_dtype, dtype_name, is_floating, numpy_dtype
from peft_any._engines import detach, in_memory, is_differentiated, is_trained, lasting
from peft_any._kernels import by_blocks, dense, even_rows, plus_product, summed, taken
from peft_any._libraries import CUPY, LIBRARIES, TORCH, UNKNOWN, find_library, library_of
from peft_any._typing import Namespace
from peft_any._ways import ways
from peft_any.errors import BackendError, UsageError, nearest

__all__ = [
    "Backend", "asked", "astype", "backend", "backend_of", "by_blocks",
    "compute_dtype", "creation_device", "dense", "detach", "dtype_by_name", "dtype_name",
    "even_rows", "from_numpy", "from_numpy_like", "in_memory", "inv", "is_array",
    "is_differentiated", "is_floating", "is_lazy", "is_traced", "is_trained", "lasting", "move",
    "namespace", "numpy_dtype", "plus_product", "qr", "resolve", "settled", "summed", "svd",
    "taken", "to_numpy", "ways", "widest",
]  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """An array library with a place to make arrays.

    Attributes
    ----------
    name : str
        ``numpy``, ``cupy``, ``torch``, ``jax``, ``dask`` or ``strict``; the namespace's own name
        for arrays of any other library.
    xp : module
        Its Array API namespace.
    device : object or None
        The library's own device object; None where the library is to choose.

    Examples
    --------
    >>> print(resolve("numpy"))
    numpy:cpu
    """

    name: str
    xp: Namespace
    device: Any

    def __str__(self) -> str:
        """Give a spec that `resolve` reads as this backend."""
        return self.name if self.device is None else f"{self.name}:{_spelled(self.device)}"


_SPELLED = re.compile(r"<CUDA Device (\d+)>|\w+\.Device\('(\w+)'\)")
"""How CuPy and array-api-strict print a device."""


def _spelled(device: Any) -> str:
    if hasattr(device, "platform"):  # JAX's
        return f"{device.platform}:{device.id}"
    match = _SPELLED.fullmatch(str(device))
    return str(device) if match is None else match[1] or match[2]


_CUDA = 2
"""DLPack's number for CUDA devices."""
_current: ContextVar[Backend | None] = ContextVar("peft_any_backend", default=None)


def resolve(spec: str | Backend = "auto", *arrays: Any, device: Any = None) -> Backend:
    """Decide which array library to use, and on which device.

    In this order: the arrays given; `spec`; the ``with backend(…)`` around the call; the
    environment variable ``PEFT_ANY_BACKEND``; CuPy if it is installed and finds a CUDA device;
    torch on CUDA if torch is already imported; NumPy.

    Parameters
    ----------
    spec : str or Backend
        ``library`` or ``library:device``: ``numpy``, ``cupy:1``, ``torch:cuda:0``, ``torch:meta``,
        ``jax:cpu``, ``dask``, ``strict:device1``; or ``auto``.
    *arrays : array
        Existing arrays, all of one library; anything else is ignored.
    device : optional
        A device, as a string or the library's own object, in place of the one in `spec`.

    Raises
    ------
    UsageError
        If there is no library of that name.
    BackendError
        If the library or the device is absent, or contradicts the arrays.

    Examples
    --------
    >>> resolve("numpy").name
    'numpy'
    """
    if isinstance(spec, Backend):
        name, place = spec.name, spec.device
    elif isinstance(spec, str):
        name, _, place = spec.partition(":")
    else:
        raise UsageError(f"backend {spec!r:.60}: give a name such as 'torch:cuda:0', or 'auto'")
    if is_array(device):
        raise BackendError(f"device {device!r:.60}: is an array: give a device, such as 'cuda:0'")
    if device is not None:
        if place and str(place) != str(device):
            raise BackendError(f"backend '{spec}': contradicts device={str(device)!r}: give one")
        place = device
    given = [a for a in arrays if is_array(a)]
    if given:
        return _follow(given, name, place or None, spec)
    if isinstance(spec, Backend) and device is None:
        return spec
    if name != "auto":
        return _open(name, place or None)
    found = _ambient()
    return _open(found.name, place) if place else found


def _ambient() -> Backend:
    if (current := _current.get()) is not None:
        return current
    variable = os.environ.get("PEFT_ANY_BACKEND", "").strip()
    if variable not in ("", "auto"):
        name, _, place = variable.partition(":")
        try:
            return _open(name, place or None)
        except (BackendError, UsageError) as error:
            raise type(error)(f"PEFT_ANY_BACKEND={variable}: {error}") from None
    if CUPY.available:
        return _open("cupy", None)
    return _open("torch", "cuda") if TORCH.cuda else _open("numpy", None)


def _follow(given: list[Any], name: str, place: Any, spec: str | Backend) -> Backend:
    namespace(*given)
    found, library = backend_of(given[0]), library_of(given[0])
    if name not in ("auto", found.name):
        _known(name)
        raise BackendError(
            f"backend '{spec}': contradicts the arrays given, which are {found.name}'s: leave "
            f"the backend out, or convert them first with peft_any.move(arrays, '{spec}')"
        )
    if library.apart:
        places = {str(a.device) for a in given}
        if len(places) > 1:
            raise BackendError(
                f"{found.name}: arrays on {' and '.join(sorted(places))} cannot meet: bring them "
                f"to one device with peft_any.move(arrays, '{found.name}:…')"
            )
    if place is not None:
        wanted = _open(found.name, place)
        if not library.is_on(given[0], wanted.device):
            raise BackendError(
                f"backend '{wanted}': contradicts the arrays given, which are on '{found}': leave "
                f"the device out, or move them first with peft_any.move(arrays, '{wanted}')"
            )
    return found


def _known(name: str) -> None:
    if name not in LIBRARIES:
        raise UsageError(
            f"backend {name!r}: is not a known library{nearest(name, LIBRARIES)}: choose one of "
            f"{', '.join(LIBRARIES)}, or auto"
        )


def _open(name: str, place: Any) -> Backend:
    _known(name)
    library = LIBRARIES[name]
    try:
        import_module(library.package)
        xp = library.namespace()
    except ImportError as error:
        raise BackendError(
            f"backend {name!r}: cannot be used: {library.package} cannot be imported ({error}): "
            f'pip install "{library.extra}"'
        ) from None
    try:
        return Backend(name, xp, library.device(place))
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(
            f"backend {name!r}: cannot use the device {str(place or 'default')!r}: {reason}"
        ) from None


@contextmanager
def backend(spec: str | Backend) -> Iterator[Backend]:
    """Choose the array library for everything made inside a ``with`` block.

    Raises
    ------
    UsageError, BackendError
        As `resolve`, on entering.

    Examples
    --------
    >>> with backend("numpy") as b:
    ...     resolve() is b
    True
    """
    chosen = resolve(spec)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)


def backend_of(x: Any) -> Backend:
    """Give the library and device of an array.

    Examples
    --------
    >>> import numpy as np
    >>> backend_of(np.ones(2)).name
    'numpy'
    """
    library = library_of(x)
    xp = library.namespace(x)
    return Backend(library.name or xp.__name__, xp, library.creation_device(x))


def from_numpy(host: Any, backend: Backend) -> Any:
    """Make an array of a backend from a host array, without a copy where that is safe.

    JAX without its 64-bit dtypes takes 64-bit integers as 32-bit ones if their values fit.

    Raises
    ------
    BackendError
        If the library cannot hold the dtype or the values.

    Examples
    --------
    >>> import numpy as np
    >>> from_numpy(np.ones(2), resolve("numpy"))
    array([1., 1.])
    """
    host = np.asarray(host)
    host = host if host.dtype.isnative else host.astype(host.dtype.newbyteorder("="))
    library, name = LIBRARIES.get(backend.name, UNKNOWN), host.dtype.name
    if name not in library.narrow:
        dtype_by_name(backend.xp, name)
    return library.from_numpy(host, backend.xp, backend.device)


def from_numpy_like(host: Any, like: Any) -> Any:
    """Make an array from a host array, in the library and on the device of another array.

    Examples
    --------
    >>> import numpy as np
    >>> from_numpy_like(np.zeros(1), np.ones(2))
    array([0.])
    """
    return from_numpy(host, backend_of(like))


def move(tree: Any, backend: str | Backend) -> Any:
    """Convert every array in a nest of dicts, lists, tuples and dataclasses.

    Not for use inside maths: it may pass through the host.

    Parameters
    ----------
    tree : array, or nest of arrays and anything else
    backend : str or Backend
        As for `resolve`.

    Returns
    -------
    The same nest with arrays of that library on that device; those already there are themselves.

    Raises
    ------
    BackendError
        If the target has no such device or dtype, or there are no values to move.

    Examples
    --------
    >>> import numpy as np
    >>> move({"a": [np.ones(1), "text"]}, "numpy")
    {'a': [array([1.]), 'text']}
    """
    return _move(tree, resolve(backend))


def _move(tree: Any, to: Backend) -> Any:
    if (library := find_library(tree)) is not None:
        if library.name == to.name:
            return tree if library.is_on(tree, to.device) else library.put(tree, to.device)
        across = _across_gpu(tree, to)
        return from_numpy(library.to_numpy(tree), to) if across is None else across
    if isinstance(tree, dict):
        moved = copy(tree)
        moved.update((k, _move(v, to)) for k, v in tree.items())
        return moved
    if isinstance(tree, list | tuple):
        items = (_move(v, to) for v in tree)
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if is_dataclass(tree) and not isinstance(tree, type | Backend):
        old = {f.name: getattr(tree, f.name) for f in fields(tree) if f.init}
        new = {k: _move(v, to) for k, v in old.items()}
        changed = {k: v for k, v in new.items() if v is not old[k]}
        return replace(tree, **changed) if changed else tree
    return tree


def _across_gpu(x: Any, to: Backend) -> Any:
    """Copy between two libraries within a CUDA device by DLPack; None where that cannot be."""
    library = LIBRARIES.get(to.name, UNKNOWN)
    try:
        if library.on_gpu(to.device) and x.__dlpack_device__()[0] == _CUDA:
            # a copy: JAX's arrays must not change, and the others' may
            shared = to.xp.from_dlpack(x.detach() if hasattr(x, "detach") else x)
            made = to.xp.asarray(shared, copy=True)
            return made if library.is_on(made, to.device) else library.put(made, to.device)
    except (AttributeError, BufferError, NotImplementedError, RuntimeError, TypeError, ValueError):
        pass  # a sharded or lazy array, or a dtype that DLPack lacks: through the host
    return None

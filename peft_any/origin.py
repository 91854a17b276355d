"""Which base an adapter was made on: a fingerprint of the layers it adapts, kept in its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_any._typing import Array, Shape
from peft_any.backend import (
    astype,
    backend_of,
    dtype_name,
    from_numpy,
    is_floating,
    is_lazy,
    is_traced,
    namespace,
    to_numpy,
)
from peft_any.errors import BackendError, FormatError
from peft_any.io._json import parse_object
from peft_any.layer import Site

KEY = "peft_any.base"
"""Of the tensor file's ``__metadata__``, which Hugging Face PEFT leaves alone."""
_PAGE, _PAGES = 1024, 8
_NARROW, _WIDE = ("bfloat16", "float16"), ("float32", "float64")
"""Dtypes in which a base is stored, and in which adapters are trained on it."""
Sampled = tuple[Shape, npt.NDArray[Any]]


def made_on(weights: Mapping[str, Array], sites: Iterable[Site]) -> dict[str, str]:
    """Give the metadata that names the base of a new adapter.

    Empty where that would take computing: for lazy arrays, traced ones, and those without values.

    Parameters
    ----------
    weights : mapping of str to array
        The base.
    sites : iterable of Site
        The layers that are adapted.

    Examples
    --------
    >>> made_on({"fc.weight": np.ones((2, 3))}, [Site("fc", 3, 2)])  # doctest: +ELLIPSIS
    {'peft_any.base': '{"layers": 1, "fingerprint": "sampled-sha256:...}'}
    """
    samples = []
    for site in sites:  # one at a time: they may be fetched from elsewhere
        tensor = weights[site.weight]
        if is_traced(tensor) or is_lazy(tensor):
            return {}
        try:
            samples.append(sampled(tensor))
        except (BackendError, RuntimeError, TypeError):  # no values, or no way to take some of them
            return {}
    if not samples:
        return {}
    made = {dtype: _digest(samples, dtype) for dtype in _NARROW}
    return {KEY: json.dumps({"layers": len(samples), "fingerprint": _digest(samples), **made})}


def other_base(
    metadata: Mapping[str, str], sites: Iterable[Site], samples_of: Callable[[str], Sampled]
) -> tuple[str, str] | None:
    """Compare a base with the one that an adapter's metadata names.

    Either may be the other, cast to another dtype. Where the adapter's layers were put together or
    taken apart, or its file names no base, nothing can be said.

    Parameters
    ----------
    metadata : mapping of str to str
        The adapter's.
    sites : iterable of Site
        Where it fits into the base.
    samples_of : callable
        Gives what is `sampled` of the base's tensors, by name.

    Returns
    -------
    tuple of str, or None
        The fingerprint in the metadata and the base's own; None where they agree, or nothing
        can be said.
    """
    try:
        known = parse_object(metadata.get(KEY, "{}"), KEY)
    except FormatError:
        return None
    names = [site.weight for site in sites]
    expected = known.get("fingerprint")
    if not isinstance(expected, str) or known.get("layers") != len(names):
        return None
    samples = [samples_of(name) for name in names]
    own = _digest(samples)
    if own in (expected, *(known.get(dtype) for dtype in _NARROW)):
        return None
    if expected in (_digest(samples, dtype) for dtype in (*_NARROW, *_WIDE)):
        return None
    return expected, own


def layers_fingerprint(tensors: Iterable[Array], dtype: str | None = None) -> str:
    """A digest of weights whatever their names, order, library and layout in a file.

    SHA-256 over the sorted digests of the tensors, each over a line of JSON ``[dtype, shape]``
    and then its values, in full up to 8192 of them, else eight runs of 1024, evenly spread from
    the first to the last (the i-th begins at ``i*(size - 1024)//7``).

    Parameters
    ----------
    tensors : iterable of array
    dtype : str, optional
        As if floating-point values had been cast to this dtype.

    Examples
    --------
    >>> a, b = np.zeros((2, 2), "float32"), np.ones((3, 2), "float16")
    >>> layers_fingerprint([a, b]) == layers_fingerprint([b, a])
    True
    >>> layers_fingerprint([a], "float16") == layers_fingerprint([a.astype("float16")])
    True
    """
    return _digest([sampled(tensor) for tensor in tensors], dtype)


def _digest(samples: Iterable[Sampled], dtype: str | None = None) -> str:
    digests = []
    for shape, taken in samples:
        values = taken
        if dtype is not None and is_floating(taken):
            with np.errstate(over="ignore"):
                values = astype(taken, dtype)
        head = json.dumps([dtype_name(values), list(shape)])
        little = np.ascontiguousarray(values).view(np.uint8)
        digests.append(hashlib.sha256(head.encode() + b"\n" + little.tobytes()).digest())
    return f"sampled-sha256:{hashlib.sha256(b''.join(sorted(digests))).hexdigest()}"


def sampled(tensor: Array) -> Sampled:
    """Give a tensor's shape, and those of its values that a fingerprint takes."""
    xp, size = namespace(tensor), prod(tensor.shape)
    flat = xp.reshape(tensor, (-1,))
    if size > _PAGE * _PAGES:
        flat = xp.take(flat, from_numpy(_places(size), backend_of(tensor)), axis=0)
    return tuple(tensor.shape), to_numpy(flat)


def runs(size: int) -> list[slice]:
    """Say which of so many values a fingerprint takes.

    Examples
    --------
    >>> runs(100)
    [slice(0, 100, None)]
    >>> len(runs(10_000)), runs(10_000)[-1]
    (8, slice(8976, 10000, None))
    """
    if size <= _PAGE * _PAGES:
        return [slice(0, size)]
    return [slice(int(at), int(at) + _PAGE) for at in _places(size)[::_PAGE]]


@lru_cache(64)
def _places(size: int) -> npt.NDArray[np.int64]:
    starts = np.arange(_PAGES, dtype=np.int64) * (size - _PAGE) // (_PAGES - 1)
    return (starts[:, None] + np.arange(_PAGE)).reshape(-1)

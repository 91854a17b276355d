"""The safetensors header: the table of dtypes, and the writer; `_parse` reads it.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of little-endian length,
that many bytes of JSON beginning with ``{``, then the tensors without holes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from peft_any._typing import Shape
from peft_any.errors import UsageError

HEADER_LIMIT = 100_000_000
"""Bytes; the reference implementation's own limit."""


class _Dtype(NamedTuple):
    name: str
    bits: int


# In the order in which the reference implementation lays tensors out, first to last.
DTYPES: dict[str, _Dtype] = {
    "U64": _Dtype("uint64", 64),
    "I64": _Dtype("int64", 64),
    "F64": _Dtype("float64", 64),
    "C64": _Dtype("complex64", 64),
    "F32": _Dtype("float32", 32),
    "U32": _Dtype("uint32", 32),
    "I32": _Dtype("int32", 32),
    "BF16": _Dtype("bfloat16", 16),
    "F16": _Dtype("float16", 16),
    "U16": _Dtype("uint16", 16),
    "I16": _Dtype("int16", 16),
    "F8_E5M2FNUZ": _Dtype("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": _Dtype("float8_e4m3fnuz", 8),
    "F8_E8M0": _Dtype("float8_e8m0fnu", 8),
    "F8_E4M3": _Dtype("float8_e4m3fn", 8),
    "F8_E5M2": _Dtype("float8_e5m2", 8),
    "I8": _Dtype("int8", 8),
    "U8": _Dtype("uint8", 8),
    "F6_E3M2": _Dtype("float6_e3m2fn", 6),
    "F6_E2M3": _Dtype("float6_e2m3fn", 6),
    "F4": _Dtype("float4_e2m1fn", 4),
    "BOOL": _Dtype("bool", 8),
}
CODES: dict[str, str] = {dtype.name: code for code, dtype in DTYPES.items()}
BITS: dict[str, int] = {dtype.name: dtype.bits for dtype in DTYPES.values()}
RANK: dict[str, int] = {name: place for place, name in enumerate(CODES)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype (``"bfloat16"``), shape, and its byte range in the file."""

    dtype: str
    shape: Shape
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.stop - self.start


def byte_size(dtype: str, shape: Shape) -> int | None:
    """Bytes that a tensor takes; None where packed elements do not fill whole bytes."""
    size, rest = divmod(BITS[dtype] * prod(shape), 8)
    return None if rest else size


def format_header(
    specs: Iterable[tuple[str, str, Shape]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Write a header as the reference implementation does.

    Parameters
    ----------
    specs : iterable of (name, dtype, shape)
        The tensors in the order of their bytes.
    metadata : mapping of str to str, optional
        Goes to ``__metadata__``, in the order given.

    Returns
    -------
    header : bytes
        Length and JSON, padded with spaces to a multiple of eight.
    tensors : dict of str to TensorInfo
        Where each tensor's bytes go in the file.

    Raises
    ------
    UsageError
        For a name given twice, a dtype that the format lacks, or metadata that is not text.

    Examples
    --------
    >>> header, tensors = format_header([("a", "float32", (2,))])
    >>> header[8:]
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    >>> tensors["a"].start
    64
    """
    body: dict[str, Any] = {}
    if metadata is not None:
        for key, value in metadata.items():
            if not (_is_text(key) and _is_text(value)):
                raise UsageError(f"metadata {key!r}: cannot be stored: keys and values are text")
        body["__metadata__"] = dict(metadata)
    at = 0
    places: dict[str, tuple[str, Shape, int, int]] = {}
    for name, dtype, given in specs:
        shape = tuple(given)
        if not _is_text(name) or name == "__metadata__":
            raise UsageError(f"{name!r}: cannot name a tensor of a safetensors file")
        if name in body:
            raise UsageError(f"{name}: cannot be stored twice in one file")
        if dtype not in CODES:
            raise UsageError(f"{name}: dtype {dtype} cannot be stored: safetensors lacks it")
        size = byte_size(dtype, shape)
        if size is None or any(n < 0 for n in shape):
            raise UsageError(f"{name}: shape {shape} of {dtype} cannot be stored in whole bytes")
        places[name] = dtype, shape, at, at + size
        body[name] = {
            "dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    try:
        raw = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as cause:
        raise UsageError(f"names and metadata cannot be stored: not UTF-8: {cause}") from cause
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT:
        raise UsageError(f"a header of {len(raw)} bytes cannot be stored: at most {HEADER_LIMIT}")
    base = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {
        name: TensorInfo(dtype, shape, base + start, base + stop)
        for name, (dtype, shape, start, stop) in places.items()
    }


def _is_text(value: object) -> bool:
    return isinstance(value, str)

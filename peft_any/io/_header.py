"""The safetensors header: the table of dtypes, a parser that trusts nothing, and the writer.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of little-endian length,
that many bytes of JSON beginning with ``{``, then the tensors without holes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, NoReturn

from peft_any._typing import Shape
from peft_any.errors import FormatError, UsageError

HEADER_LIMIT = 100_000_000
"""Bytes; the reference implementation's own limit."""
MAX_DIMS = 64
_MAX_INT = 2**63 - 1


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


def parse_header(
    raw: bytes, payload: int, where: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check a header.

    Parameters
    ----------
    raw : bytes
        The JSON, padding included, without the eight bytes of length.
    payload : int
        Bytes that follow the header in the file.
    where : str
        The file, for messages.

    Returns
    -------
    tensors : dict of str to TensorInfo
        In the order of their bytes; ranges count from the beginning of the file.
    metadata : dict of str to str
        ``__metadata__``, or an empty dict.

    Raises
    ------
    FormatError
        Where anything but a valid header stands there.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise FormatError(
            f"{where}: the header cannot be read: byte {8 + cause.start} is not UTF-8"
        ) from cause
    if not text.startswith("{"):
        raise FormatError(f"{where}: the header cannot be read: it is not a JSON object")
    scan = _Scanner(text, where)
    found: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in scan.members("the header"):
        if name == "__metadata__":
            for key in scan.members("__metadata__"):
                metadata[key] = scan.string("a value of __metadata__")
        else:
            found[name] = _entry(scan.entry(name), name, len(raw) + 8, payload, where)
    scan.end()
    return _contiguous(found, len(raw) + 8, payload, where), metadata


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


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


_FLAT = json.JSONDecoder(object_pairs_hook=list, parse_constant=_no_constant)


class _Scanner:
    """Reads the header member by member: a hostile one costs no more than its own size."""

    _space = re.compile(r"[ \t\n\r]*")
    _flat = re.compile(r"\{[^{}]{0,4096}\}")
    _decoder = json.JSONDecoder()

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0

    def peek(self) -> str:
        match = self._space.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def take(self, char: str) -> None:
        if self.peek() != char:
            raise self._error(f"{char!r} is missing")
        self.at += 1

    def string(self, what: str) -> str:
        if self.peek() != '"':
            raise self._error(f"{what} is not a string")
        try:
            value, self.at = self._decoder.raw_decode(self.text, self.at)
            text = str(value)
            text.encode("utf-8")
        except ValueError as cause:
            raise self._error(f"{what} is not a valid string") from cause
        return text

    def members(self, what: str) -> Iterator[str]:
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        seen: set[str] = set()
        while True:
            name = self.string(f"a key of {what}")
            if name in seen:
                raise FormatError(f"{self.where}: {what} cannot repeat a key: {name!r:.80} does")
            seen.add(name)
            self.take(":")
            yield name
            if self.peek() != ",":
                break
            self.at += 1
        self.take("}")

    def entry(self, name: str) -> dict[str, Any]:
        self.peek()
        match = self._flat.match(self.text, self.at)
        if match is None:
            raise self._error(f"{name!r:.80} is not an object of dtype, shape and data_offsets")
        try:
            pairs = _FLAT.decode(match.group())
        except RecursionError as cause:
            raise self._error(f"{name!r:.80} is nested too deeply") from cause
        except ValueError as cause:
            raise self._error(f"{name!r:.80} is not JSON ({cause})") from cause
        keys = sorted(key for key, _ in pairs)
        if keys != ["data_offsets", "dtype", "shape"]:
            raise self._error(f"{name!r:.80} has {keys!r:.80} for dtype, shape and data_offsets")
        self.at = match.end()
        return dict(pairs)

    def end(self) -> None:
        if self.peek():
            raise self._error("something follows the object")

    def _error(self, what: str) -> FormatError:
        return FormatError(
            f"{self.where}: the header cannot be read: {what} at character {self.at}"
        )


def _entry(entry: dict[str, Any], name: str, base: int, payload: int, where: str) -> TensorInfo:
    def wrong(what: str) -> FormatError:
        return FormatError(f"{where}: {name!r:.80} cannot be read: {what}")

    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise wrong(f"dtype {code!r:.40} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise wrong(f"shape {shape!r:.80} is not a list of at most {MAX_DIMS} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets {offsets!r:.80} are not two positions")
    if prod(max(n, 1) for n in shape) * 16 > _MAX_INT:
        raise wrong(f"shape {shape!r:.80} is too large for any machine")
    start, stop = offsets
    if not start <= stop <= payload:
        raise wrong(
            f"its bytes {start} to {stop} do not lie within the {payload} bytes of data "
            "(is the file truncated?)"
        )
    dtype = DTYPES[code].name
    if byte_size(dtype, tuple(shape)) != stop - start:
        raise wrong(
            f"shape {shape!r:.80} of {code} does not take the {stop - start} bytes it is given"
        )
    return TensorInfo(dtype, tuple(shape), base + start, base + stop)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_INT for n in value)


def _contiguous(
    found: dict[str, TensorInfo], base: int, payload: int, where: str
) -> dict[str, TensorInfo]:
    ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].stop))
    at, before = base, "the header"
    for name, info in ordered:
        if info.start != at:
            how = "overlap" if info.start < at else "leave a hole"
            raise FormatError(
                f"{where}: tensors cannot {how}: {before!r:.80} ends at byte {at}, "
                f"{name!r:.80} begins at {info.start}"
            )
        at, before = info.stop, name
    if at != base + payload:
        raise FormatError(
            f"{where}: {base + payload - at} bytes cannot follow the last tensor: "
            "they belong to none"
        )
    return dict(ordered)

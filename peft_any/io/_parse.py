"""Safetensors headers, trusted in nothing, in time and memory that follow their size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any, NoReturn

from peft_any._typing import Shape
from peft_any.errors import FormatError
from peft_any.io._header import DTYPES, TensorInfo, byte_size

MEMBER_LIMIT = 200_000
"""Tensors, or entries of ``__metadata__``: several times what any published model has."""
MAX_DIMS = 64
_MAX_INT = 2**63 - 1


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
    base = len(raw) + 8
    found: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in scan.members("the header"):
        if name == "__metadata__":
            for key in scan.members("__metadata__"):
                metadata[key] = scan.string("a value of __metadata__")
            continue
        code, shape, start, stop = scan.usual() or _checked(scan.entry(name), name, where)
        try:
            dtype, sizes, nbytes = _layout(code, shape)
        except ValueError as cause:
            raise _wrong(where, name, str(cause)) from None
        if not start <= stop <= payload:
            raise _wrong(
                where,
                name,
                f"its bytes {start} to {stop} do not lie within the {payload} bytes of data "
                "(is the file truncated?)",
            )
        if nbytes != stop - start:
            raise _wrong(
                where,
                name,
                f"shape {[*sizes]!r:.80} of {code} does not take the {stop - start} bytes it is "
                "given",
            )
        found[name] = TensorInfo(dtype, sizes, base + start, base + stop)
    scan.end()
    return _contiguous(found, base, payload, where), metadata


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


_FLAT = json.JSONDecoder(object_pairs_hook=list, parse_constant=_no_constant)
_SIZE = r"(?:0|[1-9][0-9]{0,18})"


class _Scanner:
    """Reads the header member by member: a hostile one costs no more than its own size."""

    _space = re.compile(r"[ \t\n\r]*")
    _flat = re.compile(r"\{[^{}]{0,4096}\}")
    # As every writer has them; any other way to write the same goes through `_flat`.
    _name = re.compile(r'"([^"\\\x00-\x1f]*)":')
    _usual = re.compile(
        rf'\{{"dtype":"(\w{{1,16}})","shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,63}})?)\],'
        rf'"data_offsets":\[({_SIZE}),({_SIZE})\]\}}',
        re.ASCII,
    )
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
            if match := self._name.match(self.text, self.at):
                name, self.at = match[1], match.end()
            else:
                name = self.string(f"a key of {what}")
                self.take(":")
            if name in seen:
                raise FormatError(f"{self.where}: {what} cannot repeat a key: {name!r:.80} does")
            seen.add(name)
            if len(seen) > MEMBER_LIMIT:
                raise FormatError(
                    f"{self.where}: {what} cannot have more than {MEMBER_LIMIT} entries: "
                    "divide the file"
                )
            yield name
            if self.text[self.at : self.at + 1] != "," and self.peek() != ",":
                break
            self.at += 1
        self.take("}")

    def usual(self) -> tuple[str, str, int, int] | None:
        """Read an entry that is written as usual: dtype, sizes with commas, begin and end."""
        match = self._usual.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        code, shape, start, stop = match.groups()
        return code, shape, int(start), int(stop)

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


def _wrong(where: str, name: str, what: str) -> FormatError:
    return FormatError(f"{where}: {name!r:.80} cannot be read: {what}")


def _checked(entry: dict[str, Any], name: str, where: str) -> tuple[str, str, int, int]:
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str):
        raise _wrong(where, name, f"dtype {code!r:.40} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise _wrong(where, name, f"shape {shape!r:.80} is not a list of at most {MAX_DIMS} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _wrong(where, name, f"data_offsets {offsets!r:.80} are not two positions")
    return code, ",".join(map(str, shape)), offsets[0], offsets[1]


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_INT for n in value)


@lru_cache(1024)
def _layout(code: str, text: str) -> tuple[str, Shape, int | None]:
    """Dtype, shape and bytes of a tensor; a `ValueError` that says what is wrong with them."""
    if code not in DTYPES:
        raise ValueError(f"dtype {code!r:.40} is not one of {', '.join(DTYPES)}")
    shape = tuple(map(int, text.split(","))) if text else ()
    if len(shape) > MAX_DIMS or max(shape, default=0) > _MAX_INT:
        raise ValueError(f"shape {[*shape]!r:.80} is not a list of at most {MAX_DIMS} sizes")
    if prod(max(n, 1) for n in shape) * 16 > _MAX_INT:
        raise ValueError(f"shape {[*shape]!r:.80} is too large for any machine")
    dtype = DTYPES[code].name
    return dtype, shape, byte_size(dtype, shape)


def _contiguous(
    found: dict[str, TensorInfo], base: int, payload: int, where: str
) -> dict[str, TensorInfo]:
    at, before = base, "the header"
    for info in found.values():
        if info.start != at:
            break
        at = info.stop
    else:
        if at == base + payload:
            return found
    ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].stop))
    at = base
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

"""Hypothesis strategies of files that nobody should trust: valid ones, changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

TOKENS = (
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"-", b"1e999", b"NaN", b"null", b"true", b"\\u0000",
    b"\\ud800", b"9" * 30, b"0.5", b"..", b"/", b"\\", b"\0", b"\xff", b"-1", b"[[[[",
    b"18446744073709551616",
)  # fmt: skip
"""Pieces of text in which readers of JSON, names and paths go wrong."""
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63), 10**30, "",
    "a", "../x", "/etc/passwd", "\0", "a" * 5000, "(", "[", "*", ".*", "all-linear", "LORA",
    "NaN", [], [[]], {}, {"": ""}, [None], ["", ""], ["q_proj", "q_proj"], [0, 8], [8, 0], [-1,
    8], [2**62, 2**62], {"a": {"b": {"c": 1}}}, [[[[[[1]]]]]], {"q_proj": -1}, {"(": 3},
    {"q_proj": 2**40}, [0] * 70, "F64", "BF16", "BOOL", "F4", "U64",
)  # fmt: skip
"""Values that stand where a file says something else."""
_KINDS = st.sampled_from(["set", "bit", "cut", "end", "insert", "repeat", "splice", "token"])
_HEAD = 700
"""Bytes of a file's beginning that half of the changes are among: names and sizes are there."""


@st.composite
def hostile_bytes(draw: st.DrawFn, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Change a few bytes, pieces and tokens of a file.

    Parameters
    ----------
    data : bytes
    others : sequence of bytes
        Files of which pieces may be taken; by default the file itself.

    Examples
    --------
    >>> from hypothesis import find
    >>> len(find(hostile_bytes(b"abc"), lambda data: len(data) < 3)) < 3
    True
    """
    out, others = bytearray(data), [other for other in others if other] or [data or b"\0"]
    for _ in range(draw(st.integers(1, 4))):
        end = len(out) if draw(st.booleans()) else min(len(out), _HEAD)
        at = draw(st.integers(0, max(end - 1, 0)))
        kind = draw(_KINDS)
        if kind == "set" and out:
            out[at] = draw(st.integers(0, 255))
        elif kind == "bit" and out:
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del out[at : at + draw(st.integers(1, 40))]
        elif kind == "end":
            del out[at:]
        elif kind == "insert":
            out[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "repeat":
            out[at:at] = out[at : at + draw(st.integers(1, 90))]
        elif kind == "splice":
            other = draw(st.sampled_from(others))
            begin = draw(st.integers(0, len(other) - 1))
            piece = other[begin : begin + draw(st.integers(1, 90))]
            out[at : at + draw(st.integers(0, 60))] = piece
        else:
            out[at : at + draw(st.integers(0, 3))] = draw(st.sampled_from(TOKENS))
    return bytes(out)


@st.composite
def hostile_json(draw: st.DrawFn, document: Any) -> Any:
    """Change values, names and members of a document, which stays JSON.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(hostile_json({"r": 8}), lambda made: "r" not in made)
    {}
    """
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        known = [*_ways(document)]
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        home = _at(document, way)
        kind = draw(st.sampled_from(["value", "value", "drop", "name", "swap", "number"]))
        found = _at(document, draw(st.sampled_from(known)))
        if kind == "value":
            home[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif kind == "drop":
            del home[last]
        elif kind == "name" and isinstance(home, dict):
            home[str(draw(st.sampled_from(NASTY)))] = home.pop(last)
        elif kind == "number" and type(home[last]) is int:
            home[last] += draw(st.sampled_from([-2, -1, 1, 2, 2**32, -(2**32), 2**63]))
        else:
            home[last] = json.loads(json.dumps(found))
    return document


def _ways(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List the ways to every value within a document."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, dict | list) else ():
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from _ways(inner, (*path, key))


def _at(document: Any, way: Sequence[Any]) -> Any:
    for key in way:
        document = document[key]
    return document


@st.composite
def hostile_safetensors(draw: st.DrawFn, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    r"""Change a safetensors file's header, as JSON or as bytes, and perhaps the length it states.

    Examples
    --------
    >>> from hypothesis import find
    >>> found = find(hostile_safetensors(b"\2" + bytes(7) + b"{}"), lambda data: data[0] > 2)
    >>> int.from_bytes(found[:8], "little"), found[8:]
    (3, b'{}')
    """
    length = int.from_bytes(data[:8], "little")
    document = draw(hostile_json(json.loads(data[8 : 8 + length])))
    header = json.dumps(document, separators=(",", ":")).encode()
    if draw(st.booleans()):
        header = draw(hostile_bytes(header, others))
    stated = len(header) + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8, 2**40, 2**63]))
    start = min(max(stated, 0), 2**64 - 1).to_bytes(8, "little")
    return start + header + data[8 + length :]


@st.composite
def hostile_files(draw: st.DrawFn, files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Choose one of some valid files, and what stands in its place: (name, bytes).

    Half of the time bytes are changed, and otherwise what a ``.json`` or ``.safetensors`` file
    says. A reader should give what it reads whole, or raise a `PeftError`.

    Parameters
    ----------
    files : mapping of str to bytes
        Valid files by name, those of an adapter's directory say.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(hostile_files({"a.json": b"[0]"}), lambda made: made[1] == b"[]")
    ('a.json', b'[]')
    """
    name = draw(st.sampled_from(sorted(files)))
    data, others = files[name], [*files.values()]
    if draw(st.booleans()):
        if name.endswith(".json"):
            return name, json.dumps(draw(hostile_json(json.loads(data)))).encode()
        if name.endswith(".safetensors"):
            return name, draw(hostile_safetensors(data, others))
    return name, draw(hostile_bytes(data, others))

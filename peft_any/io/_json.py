"""JSON from files nobody vouches for: bounded, without duplicate keys, one kind of error."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from typing import Any, NoReturn

from peft_any.errors import FormatError, StorageError
from peft_any.io._faults import StrPath, reading, storage_error
from peft_any.io._urls import local

LIMIT = 64 << 20
"""Bytes. The index of a model with 200,000 tensors takes 23 MB."""
PART_LIMIT = 1_000_000
"""Members and items: a hostile file of empty lists would take fifty times its size in memory."""


def regular_size(path: StrPath) -> int:
    """Size in bytes of a regular file; a `StorageError` for anything else."""
    try:
        found = os.stat(local(path, "be read"))
    except (OSError, ValueError) as cause:
        raise storage_error(path, "be read", cause) from cause
    if stat.S_ISDIR(found.st_mode):
        raise StorageError(f"{path}: cannot be read: it is a directory; give a file inside it")
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{path}: cannot be read: it is not a regular file")
    return found.st_size


def read_json(path: StrPath, *, limit: int = LIMIT, constants: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : path
        A UTF-8 file.
    limit : int
        Largest size accepted, in bytes.
    constants : bool
        Whether ``NaN`` and ``Infinity``, which JSON does not have and transformers writes, pass.

    Returns
    -------
    dict
        The object, in the file's order.

    Raises
    ------
    FormatError
        Where the contents are no JSON object, repeat a key, or exceed `limit`.
    StorageError
        Where the file cannot be read.
    """
    size = regular_size(path)
    if size > limit:
        raise FormatError(f"{path}: {size} bytes cannot be JSON of this kind: the limit is {limit}")
    try:
        with reading(path) as file:
            raw = file.read(size)
    except OSError as cause:
        raise storage_error(path, "be read", cause) from cause
    return parse_object(raw, str(path), constants=constants)


def parse_object(raw: bytes | str, where: str, *, constants: bool = False) -> dict[str, Any]:
    """Parse a JSON object whose keys are all different; `where` begins every message.

    Examples
    --------
    >>> parse_object(b'{"r": 8, "bias": null}', "adapter_config.json")
    {'r': 8, 'bias': None}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise FormatError(f"{where}: keys cannot repeat: {twice[:5]!r:.200} do")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{where}: {constant} cannot stand in JSON: it is not a number")

    try:
        text = _bounded(raw, where)
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=None if constants else refuse
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as cause:
        raise FormatError(f"{where}: cannot be read: it escapes half a character") from cause
    except RecursionError as cause:
        raise FormatError(f"{where}: cannot be read: the JSON is nested too deeply") from cause
    except json.JSONDecodeError as cause:
        raise FormatError(f"{where}: is not JSON: {cause}") from cause
    except FormatError:
        raise
    except ValueError as cause:
        raise FormatError(f"{where}: cannot be read: {cause}") from cause
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise FormatError(f"{where}: {kind} cannot stand here: a JSON object is needed")
    return value


def _bounded(raw: bytes | str, where: str) -> str:
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as cause:
        raise FormatError(f"{where}: cannot be read: byte {cause.start} is not UTF-8") from cause
    if sum(map(text.count, "[{,")) > PART_LIMIT:
        raise FormatError(f"{where}: cannot be read: it has more than {PART_LIMIT} members")
    return text

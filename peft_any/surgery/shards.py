"""Files of an output: what each is to hold, of a size that is asked for, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from peft_any._typing import Shape
from peft_any.errors import UsageError
from peft_any.io._header import RANK, byte_size
from peft_any.io.checkpoint import SHARD_LIMIT
from peft_any.receipt import Change

Spec: TypeAlias = tuple[str, str, Shape]
"""A tensor's name, dtype and shape."""
ShardItem: TypeAlias = tuple[str, Path | str | None]
"""A shard's name, and where the new one goes; a text is a URL."""
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Piece:
    """What became of a shard: the touched tensors, and how many were copied."""

    changes: tuple[Change, ...]
    copied: int
    mark: str = ""
    """A checksum of what was sent."""


def byte_count(size: int | str) -> int:
    """Read a size.

    Parameters
    ----------
    size : int or str
        Bytes; or a number and a unit, as Hugging Face has them: ``"5GB"``, ``"512MiB"``.

    Raises
    ------
    UsageError
        If it is none, or less than a byte.

    Examples
    --------
    >>> byte_count("5GB"), byte_count("1.5 KiB"), byte_count(7)
    (5000000000, 1536, 7)
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", str(size))
    factor = None if found is None else _UNITS.get(found[2].upper())
    count = 0 if found is None or factor is None else int(float(found[1]) * factor)
    if count < 1:
        raise UsageError(
            f"max_shard_size {size!r}: cannot be read: give bytes, or a number with KB, MB, GB, TB "
            "(thousands) or KiB, MiB, GiB, TiB"
        )
    return count


def packed(specs: Iterable[Spec], limit: int, stem: str = "model") -> dict[str, list[Spec]]:
    """Divide tensors, in their order, among files of at most `limit` bytes.

    A tensor that is larger by itself has a file of its own.

    Raises
    ------
    UsageError
        If there would be more files than a checkpoint may have.

    Examples
    --------
    >>> specs = [("a", "float32", (2,)), ("b", "float32", (3,)), ("c", "float32", (1,))]
    >>> {file: [name for name, *_ in held] for file, held in packed(specs, 12).items()}
    {'model-00001-of-00003.safetensors': ['a'], 'model-00002-of-00003.safetensors': ['b'], \
'model-00003-of-00003.safetensors': ['c']}
    >>> [*packed(specs, 24)]
    ['model.safetensors']
    """
    files: list[list[Spec]] = [[]]
    taken = 0
    for spec in specs:
        size = byte_size(spec[1], spec[2]) or 0
        if files[-1] and taken + size > limit:
            files.append([])
            taken = 0
        files[-1].append(spec)
        taken += size
    if len(files) > SHARD_LIMIT:
        raise UsageError(
            f"max_shard_size={limit}: {len(files)} shards cannot be one model: {SHARD_LIMIT} are "
            "the limit; allow larger ones"
        )
    for held in files:  # wider elements first, as the safetensors library has it
        held.sort(key=lambda spec: RANK[spec[1]])
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {
        f"{stem}-{i:05}-of-{len(files):05}.safetensors": held for i, held in enumerate(files, 1)
    }

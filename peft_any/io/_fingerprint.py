"""Digests that recognise a checkpoint whatever its sharding."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from peft_any.io._faults import StrPath, reading, reporting
from peft_any.io._header import TensorInfo

_PAGE = 4096
_PAGES = 8
_CHUNK = 1 << 24
_TOGETHER = 512
"""Ranges that are read at once, where that is quicker."""
CHECKSUM = "sums-sha256:"
"""How checksums begin."""


class Stored(Protocol):
    """A safetensors file or a checkpoint."""

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range."""

    def parts(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """Some of the bytes of some tensors."""


def fingerprint(checkpoint: Stored, *, full: bool = False) -> str:
    """A digest that recognises a base whatever its sharding, quickly.

    SHA-256 over each tensor in the order of names: a line of JSON ``[name, dtype, shape]``, then
    its bytes, in full up to 32 KiB, else eight pages of 4 KiB evenly spread from its first to
    its last bytes (the i-th begins at ``i*(size - 4096)//7``). A change elsewhere goes unseen,
    unless `full` is set.

    Parameters
    ----------
    checkpoint : Checkpoint or SafetensorsFile
        What to describe.
    full : bool
        Take all bytes, which reads the whole model.

    Returns
    -------
    str
        ``"sampled-sha256:"``, or ``"sha256:"`` where `full` is set, and 64 hexadecimal digits.

    Examples
    --------
    >>> import tempfile
    >>> from peft_any.io.checkpoint import Checkpoint
    >>> from peft_any.io.safetensors import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/model.safetensors", {})
    ...     base = Checkpoint(folder)
    ...     fingerprint(base)[:23], fingerprint(base, full=True)[:15]
    ('sampled-sha256:e3b0c442', 'sha256:e3b0c442')
    """
    digest = hashlib.sha256()
    ranges = _ranges(checkpoint, full)
    while batch := [*islice(ranges, 1 if full else _TOGETHER)]:
        for (name, start, _), data in zip(batch, checkpoint.parts(batch), strict=True):
            if start == 0:
                info = checkpoint.info(name)
                digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode() + b"\n")
            digest.update(data)
    return f"{'' if full else 'sampled-'}sha256:{digest.hexdigest()}"


def _ranges(checkpoint: Stored, full: bool) -> Iterator[tuple[str, int, int]]:
    """Say which bytes are looked at: of every tensor the first, if it has any, and then others."""
    for name in sorted(checkpoint):
        size = checkpoint.info(name).nbytes
        if full or size <= _PAGE * _PAGES:
            for start in range(0, max(size, 1), _CHUNK):
                yield name, start, min(start + _CHUNK, size)
            continue
        for page in range(_PAGES):
            start = page * (size - _PAGE) // (_PAGES - 1)
            yield name, start, start + _PAGE


def checksum(path: StrPath) -> str:
    """A digest that tells whether any byte of a file was damaged, at the pace of memory.

    SHA-256 over the size, the sum modulo 2⁶⁴ of every page's words, and what fills no page: no
    accident leaves it as it is, though a forger could.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "x")
    ...     _ = file.write_bytes(bytes(9000))
    ...     one = checksum(file)
    ...     _ = file.write_bytes(bytes(5000) + b"1" + bytes(3999))
    ...     one == checksum(file), one[:12]
    (False, 'sums-sha256:')
    """
    with reporting(path, "be read"), reading(path) as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(str(size).encode())
        if size:
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as raw:
                whole = size // _PAGE * _PAGE
                for start in range(0, whole, _CHUNK):
                    count = min(_CHUNK, whole - start) // 8
                    digest.update(_sums(np.frombuffer(raw, "<u8", count, start)))
                digest.update(raw[whole:])
    return f"{CHECKSUM}{digest.hexdigest()}"


def _sums(words: npt.NDArray[np.uint64]) -> bytes:
    pages = words.reshape(-1, _PAGE // 8)
    return bytes(np.add.reduce(pages, axis=1, dtype=np.uint64).astype("<u8"))

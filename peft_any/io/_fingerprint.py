"""Digests that recognise a checkpoint whatever its sharding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Protocol

from peft_any.io._header import TensorInfo

_PAGE = 4096
_PAGES = 8
_CHUNK = 1 << 24


class Stored(Protocol):
    """A safetensors file or a checkpoint."""

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range."""

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes, in place."""


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
    for name in sorted(checkpoint):
        info, raw = checkpoint.info(name), checkpoint.raw(name)
        digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode() + b"\n")
        if full or len(raw) <= _PAGE * _PAGES:
            for start in range(0, len(raw), _CHUNK):
                digest.update(raw[start : start + _CHUNK])
            continue
        for page in range(_PAGES):
            start = page * (len(raw) - _PAGE) // (_PAGES - 1)
            digest.update(raw[start : start + _PAGE])
    return f"{'' if full else 'sampled-'}sha256:{digest.hexdigest()}"

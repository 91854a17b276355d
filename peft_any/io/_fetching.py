"""What stands here for a URL: a mirror of its directory, or nothing for a path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peft_any.io._faults import StrPath
from peft_any.io._urls import is_url, path_of

if TYPE_CHECKING:
    from peft_any.io._remote import Mirror


@contextmanager
def mirror_of(path: StrPath) -> Iterator[Mirror | None]:
    """Give what stands here for a path, if it is a URL; a mirror stands for itself."""
    if isinstance(path, str | Path) and not is_url(path):
        yield None
        return
    from peft_any.io._remote import Mirror, mirrored  # noqa: PLC0415 - URLs alone need it

    if isinstance(path, Mirror) or not is_url(path):
        yield path if isinstance(path, Mirror) else None
        return
    with mirrored(os.fspath(path)) as mirror:
        yield mirror


@contextmanager
def fetched(path: StrPath) -> Iterator[Path]:
    """Give an adapter's path: its own, or that of a copy while the block runs."""
    with mirror_of(path) as mirror:
        if mirror is None:
            yield Path(path_of(path))
            return
        with mirror.telling():
            wanted = [n for n in mirror.away if n.endswith((".json", ".safetensors"))]
            mirror.fetch([n for n in wanted if n.count("/") <= 1])  # as PEFT nests them
            yield mirror.path

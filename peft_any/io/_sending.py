"""Files of other file systems that appear whole: a store's way, and that of all the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from peft_any.errors import StorageError
from peft_any.io._remote import filesystem, info_of, reaching

_WHOLE = {
    "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2", "tos", "memory",
}  # fmt: skip
"""Protocols of stores, where a file is there once all of it is."""


def is_store(fs: Any) -> bool:
    """Whether files are whole when they appear, and directories are but parts of their names."""
    return bool(_WHOLE & ({fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}))


def send(path: Path, url: str) -> None:
    """Copy a file to a URL, where it appears whole or is never looked at."""
    fs, key = filesystem(url)
    size = path.stat().st_size
    with reaching(url, "be written"):
        _whole(fs, key, lambda place: fs.put_file(str(path), place))
        fs.invalidate_cache()
        there = int(fs.info(key)["size"])
    if size != there:
        raise StorageError(f"{url}: cannot be written: of {size} bytes {there} are there")


def put(fs: Any, key: str, data: bytes) -> None:
    """Write a small file, which appears whole; one of that name is replaced."""
    _whole(fs, key, lambda place: fs.pipe_file(place, data))
    fs.invalidate_cache()


def _whole(fs: Any, key: str, write: Callable[[str], object]) -> None:
    if is_store(fs):
        write(key)
        return
    own = f"{key}.{uuid4().hex}"  # an attempt
    fs.makedirs(fs._parent(key), exist_ok=True)  # noqa: SLF001 - it has no other name
    write(own)
    move(fs, own, key)


def move(fs: Any, source: str, key: str) -> None:
    """Give a file another name, in place of the one that has it; it can be done again."""
    if is_store(fs):
        fs.cp_file(source, key)
        fs.rm_file(source)
        return
    fs.makedirs(fs._parent(key), exist_ok=True)  # noqa: SLF001 - it has no other name
    if info_of(fs, key) is not None:
        fs.rm_file(key)
    fs.mv(source, key)


def listed(fs: Any, root: str) -> list[str]:
    """List the files of a directory by their names in it; the root itself, a file, is none."""
    fs.invalidate_cache()
    try:
        fs.ls(root, detail=False)  # `find` leaves out, in silence, what it cannot list
    except FileNotFoundError:
        return []
    found = fs.find(root)
    return [name[len(root) + 1 :] for name in found if name != root]


def remove(fs: Any, key: str) -> None:
    """Remove a file or a directory, if there is one."""
    fs.invalidate_cache()
    with suppress(FileNotFoundError):
        fs.rm(key, recursive=True)


@contextmanager
def passing(url: str) -> Iterator[Path]:
    """Give a place here for a file that is sent to a URL if the block succeeds."""
    with TemporaryDirectory(prefix="peft_any-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, url.rpartition("/")[2])
        yield path
        send(path, url)

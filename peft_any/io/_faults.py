"""The operating system's errors, told with what was being done and what to try."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import TypeAlias

from peft_any.errors import PeftError, StorageError

StrPath: TypeAlias = str | os.PathLike[str]

_ADVICE = {
    errno.ENOSPC: "no space is left on the device; free some or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file would exceed the size limit of the file system or the process",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission is denied; check the owner and mode, or choose another place",
    errno.EPERM: "the operation is not permitted there; choose another place",
    errno.EIO: "the device reports an input/output error; check the disk",
    errno.ENOENT: "there is no such file or directory; check the spelling",
    errno.EISDIR: "it is a directory; give a file",
    errno.ENOTDIR: "a part of the path is a file where a directory is needed",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.ELOOP: "its symbolic links form a loop",
    errno.EBUSY: "it is in use (a mount point?); choose another place",
}


def storage_error(path: StrPath, action: str, cause: Exception) -> StorageError:
    """A `StorageError` that says what could not be done with `path`, why, and what to try.

    Examples
    --------
    >>> print(storage_error("out", "be written", OSError(28, "No space left on device")))
    out: cannot be written: no space is left on the device; free some or choose another place
    """
    code = getattr(cause, "errno", None)
    why = _ADVICE.get(code or 0) or getattr(cause, "strerror", None) or str(cause)
    made = StorageError(f"{os.fspath(path)!s}: cannot {action}: {why}")
    made.errno = code
    return made


def taken(out: StrPath) -> StorageError:
    """Give the error of an output that exists, where it may not be replaced."""
    return StorageError(
        f"{out}: the output cannot go here: it exists; choose another name, or give "
        "overwrite=True (--overwrite)"
    )


def is_model_file(name: str) -> bool:
    """Whether only a model's or an adapter's directory has a file of that name."""
    return name.endswith((".safetensors", ".safetensors.index.json")) or name in {
        "adapter_config.json",
        "merge_receipt.json",
    }


@contextmanager
def reporting(path: StrPath, action: str) -> Iterator[None]:
    """Turn the operating system's errors within the block into a `StorageError` about `path`."""
    try:
        yield
    except PeftError:
        raise
    except OSError as cause:
        raise storage_error(path, action, cause) from cause


def reading(path: StrPath) -> BufferedReader:
    """Open a file for reading alone, without a trace in its time of access where that can be."""
    return open(path, "rb", opener=untouched)


def untouched(path: StrPath, flags: int) -> int:
    """Give a descriptor of a file as `reading` opens it."""
    quiet = getattr(os, "O_NOATIME", 0)
    try:
        return os.open(path, flags | quiet)
    except PermissionError:  # only a file's owner may ask for that
        if not quiet:
            raise
        return os.open(path, flags)

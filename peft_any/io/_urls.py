"""Which paths are URLs, and which URLs are paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peft_any.errors import StorageError, UsageError
from peft_any.io._faults import StrPath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[^:]+)*:/(/|(?=[^/]))")
"""A scheme has two letters, unlike a drive; pathlib has made one slash of two."""
_LOCAL = re.compile(r"(file|local)://(localhost)?")


def path_of(path: StrPath) -> StrPath:
    """Give a ``file://`` URL as the path that it is; anything else as it is.

    Raises
    ------
    UsageError
        For one of another host.

    Examples
    --------
    >>> path_of("file:///shared/base"), path_of("s3://bucket/base"), path_of("base")
    ('/shared/base', 's3://bucket/base', 'base')
    """
    text = os.fspath(path)
    found = _LOCAL.match(text)
    if found is None:
        return path
    if not text[found.end() :].startswith("/"):
        raise UsageError(
            f"{text}: cannot name a file here: three slashes begin one: file:///shared"
        )
    return text[found.end() :]


def is_url(path: StrPath) -> bool:
    """Whether it is a URL, of a file system that another library opens.

    Examples
    --------
    >>> [is_url(path) for path in ("s3://bucket/base", "c:/base", "/base", "file:///base")]
    [True, False, False, False]
    """
    text = os.fspath(path)
    return "://" in text and _URL.match(text) is not None and _LOCAL.match(text) is None


def place_of(path: StrPath) -> Path | str:
    """Give a URL as a text, and anything else as a path.

    Examples
    --------
    >>> place_of("s3://bucket/out"), place_of("file:///out") == Path("/out")
    ('s3://bucket/out', True)
    """
    return os.fspath(path) if is_url(path) else Path(path_of(path))


def local(path: StrPath, action: str) -> Path:
    """Give a path that is none of another file system.

    Raises
    ------
    StorageError
        For a URL.
    """
    here = Path(path_of(path))
    if is_url(path) or (_URL.match(str(here)) and not here.parent.exists()):
        raise StorageError(
            f"{path}: cannot {action}: URLs are taken for bases, merged models, adapters and "
            "output directories alone: mount the file system, or copy the file"
        )
    return here

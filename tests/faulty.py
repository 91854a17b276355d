"""Two kinds of file systems that fail when they are told to: a store, and one that renames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WRITES = ("put_file", "pipe_file", "cp_file", "mv", "rm_file", "rm")
READS = ("cat_file", "cat_ranges", "get_file", "info", "ls", "find")


class Killed(BaseException):
    """The end of a process: from there on it does nothing."""


class Faults:
    """Have the n-th call of a kind of file system fail.

    Parameters
    ----------
    patch : MonkeyPatch
    kind : type
        The file system's class.
    halves : bool
        Whether files appear under their names before all of them is there.

    Attributes
    ----------
    count : int
        The calls since `set`.
    """

    def __init__(self, patch: pytest.MonkeyPatch, kind: type, *, halves: bool) -> None:
        self._halves = halves
        self._write: Callable[..., None] = kind.pipe_file  # type: ignore[attr-defined]
        self.set()
        for name in (*WRITES, *READS):
            patch.setattr(kind, name, self._wrapped(name, getattr(kind, name)))

    def set(
        self,
        at: int | None = None,
        error: BaseException | None = None,
        names: tuple[str, ...] = WRITES,
        times: int = 1,
    ) -> None:
        """Fail at the n-th call of these from now on, so many times; after `Killed`, for ever."""
        self.count, self.at, self.error, self.names = 0, at, error, names
        self.times = times
        self._dead = self._inside = False

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(fs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside:  # of another one
                return function(fs, *args, **kwargs)
            if self._dead:
                raise Killed
            self.count += name in self.names
            since = None if self.at is None else self.count - self.at
            self._inside = True
            try:
                if name not in self.names or since is None or not 0 <= since < self.times:
                    return function(fs, *args, **kwargs)
                if name == "put_file" and self._halves:
                    data = Path(args[0]).read_bytes()
                    self._write(fs, args[1], data[: len(data) // 2])
            finally:
                self._inside = False
            assert self.error is not None
            self._dead = isinstance(self.error, Killed)
            raise self.error

        return call

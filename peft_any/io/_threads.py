"""Work on a thread beside this one, which waits for it: to reach the device, or be digested."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Self, TypeVar

T = TypeVar("T")
_AT_ONCE = 8
"""Files that are synced together."""


def nothing() -> None:
    """Do nothing."""


@contextmanager
def meanwhile(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Begin work on a thread, and give what waits for its result; the thread has ended after.

    It gains where the work lets go of Python's lock, and for long.

    Examples
    --------
    >>> with meanwhile(lambda: 1 + 1) as result:
    ...     result()
    2
    """
    found: list[T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as fault:  # noqa: BLE001 - raised where the result is waited for
            faults.append(fault)

    def wait() -> T:
        thread.join()
        if faults:
            raise faults[0]
        return found[0]

    thread = Thread(target=run, name="peft_any", daemon=True)
    thread.start()
    try:
        yield wait
    finally:
        thread.join()


class Behind:
    """Carries work out on a thread, one after another; the thread has ended after the block.

    Leaving the block waits for all of it, after an exception too. An error ends the work, and is
    raised when more is added, or at the end.

    Parameters
    ----------
    rest : callable
        Called on the thread whenever nothing is left to do.

    Examples
    --------
    >>> found = []
    >>> with Behind() as behind:
    ...     behind.add(lambda: found.append(1))
    ...     behind.add(lambda: found.append(2))
    >>> found
    [1, 2]
    """

    def __init__(self, rest: Callable[[], object] = nothing) -> None:
        self._rest = rest
        self._left: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._faults: list[BaseException] = []
        self._thread = Thread(target=self._run, name="peft_any", daemon=True)

    def _run(self) -> None:
        try:
            while (work := self._left.get()) is not None:
                work()
                if self._left.empty():
                    self._rest()
        except BaseException as fault:  # noqa: BLE001 - raised where more is added
            self._faults.append(fault)
        try:
            self._rest()
        except BaseException as fault:  # noqa: BLE001 - raised at the end
            self._faults.append(fault)

    def add(self, work: Callable[[], object]) -> None:
        """Have something done after all that was added before."""
        if self._faults:
            raise self._faults[0]
        self._left.put(work)
        if self._thread.ident is None:  # and not before: others are forked first
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.put(None)
        if self._thread.ident is not None:
            self._thread.join()
        if kind is None and self._faults:
            raise self._faults[0]


def sync_all(paths: Sequence[Path]) -> None:
    """Sync files, some of them at once: the device then flushes its cache for them together."""
    for start in range(0, len(paths), _AT_ONCE):
        with ExitStack() as stack:
            some = paths[start : start + _AT_ONCE]
            waits = [stack.enter_context(meanwhile(partial(sync, path))) for path in some]
            for wait in waits:
                wait()


def sync(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the device."""
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

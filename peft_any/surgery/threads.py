"""Work on several threads, its results in order, the same whatever their number."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from peft_any.errors import UsageError
from peft_any.surgery.forked import forked, may_fork

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
_MOST = 16
_AHEAD = 4
"""Tasks of each thread that wait: enough that none stands idle, few enough to be forgotten."""


def thread_count(given: int | None) -> int:
    """Say how many threads work: those asked for, or as many as processors may be used.

    Raises
    ------
    UsageError
        For less than one.
    """
    if given is None:
        own = getattr(os, "sched_getaffinity", None)
        return min(len(own(0)) if own else os.cpu_count() or 1, _MOST)
    if given < 1:
        raise UsageError(f"threads={given}: cannot work: give at least 1")
    return given


def in_order(
    tasks: Iterable[Callable[[], T]],
    threads: int,
    keep: Sequence[int] = (),
    files: Sequence[int] = (),
    heard: Callable[[int, T], None] = lambda _, __: None,
) -> Generator[T]:
    """Carry tasks out on threads or forked processes, and give their results in their order.

    When a task fails, or the iterator is closed, those that were not begun are forgotten and
    those under way are waited for.

    Parameters
    ----------
    tasks : iterable of callables
        Taken one after another, as threads become free.
    threads : int
        One: this thread itself. More are processes where this one may be forked.
    keep, files, heard
        As for `forked`.

    Examples
    --------
    >>> [*in_order([lambda: 1, lambda: 2, lambda: 3], 2)]
    [1, 2, 3]
    """
    with one_blas_thread():
        if threads > 1 and may_fork():
            yield from forked([*tasks], threads, keep, files, heard)
            return
        made = (task() for task in tasks) if threads == 1 else _pooled(tasks, threads)
        with closing(made):
            for place, result in enumerate(made):
                heard(place, result)
                yield result


def _pooled(tasks: Iterable[Callable[[], T]], threads: int) -> Generator[T]:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - where none may fork

    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "peft_any") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have NumPy's OpenBLAS use one thread for each product: many are made at once.

    And with another number of threads it gives other last digits, which a receipt would show.
    Other libraries behind NumPy are left as they are.
    """
    blas = _openblas()
    if blas is None:
        yield
        return
    read, write = blas
    before = read()
    write(1)
    try:
        yield
    finally:
        write(before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], Any]] | None:
    """Find OpenBLAS's own switch in the library that came with NumPy."""
    root = Path(np.__file__).parent
    folders = (root.parent / "numpy.libs", root / ".dylibs", root / ".libs")
    for path in (p for folder in folders for p in folder.glob("*openblas*")):
        with suppress(OSError):
            library = ctypes.CDLL(str(path))
            for style in ("scipy_openblas_%s64_", "openblas_%s64_", "openblas_%s"):
                with suppress(AttributeError):
                    read = getattr(library, style % "get_num_threads")
                    return read, getattr(library, style % "set_num_threads")
    return None

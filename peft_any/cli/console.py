"""The terminal: results, messages and bars; and how a program stops when it is told to."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

_WIDTH, _LINES = 2_000, 1_000
_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if i not in (9, 10)}


def prepare_streams() -> None:
    """Make the standard streams take whatever is printed: they may be closed, and paths no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(*shown: RenderableType) -> None:
    """Print on standard output, in the width of the terminal; elsewhere nothing is folded."""
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as text:
        for part in shown:
            console.print(part)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


def clipped(message: str) -> str:
    r"""Shorten lines that only a damaged file can make so long, and make control codes visible.

    Examples
    --------
    >>> clipped("a\nb\x1b[2J")
    'a\nb\\x1b[2J'
    >>> len(clipped("9" * 100_000))
    2002
    """
    lines = message.split("\n")
    more = [f"and {len(lines) - _LINES} more lines"] if len(lines) > _LINES else []
    lines = [line if len(line) <= _WIDTH else f"{line[:_WIDTH]} …" for line in lines[:_LINES]]
    return "\n".join([*lines, *more]).translate(_CONTROLS)


def tell(what: str, message: str, color: str = "red") -> None:
    """Print a message on standard error."""
    with suppress(OSError):
        text = Text.assemble((f"{what}: ", f"bold {color}"), clipped(message))
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def silence() -> None:
    """Let standard output go nowhere: Python would fail again when it flushes it at the end."""
    with suppress(OSError, ValueError), Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Show a bar on standard error, if somebody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    name = TextColumn("{task.fields[name]}", markup=False)
    columns = TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(), name
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None, name="")

        def step(done: int, total: int, tensor: str) -> None:
            bars.update(task, completed=done, total=total, name=tensor)

        yield step


@contextmanager
def waiting(what: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done, if somebody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with Console(stderr=True).status(what) as shown:
        yield lambda name: shown.update(f"{what} {name}")


@contextmanager
def signals() -> Iterator[list[int]]:
    """Turn the first request to stop into a KeyboardInterrupt, and let none stop the cleanup.

    Yields
    ------
    list of int
        The signal, once there was one.
    """
    caught: list[int] = []

    def stop(number: int, _: Any) -> None:
        if not caught:
            caught.append(number)
            raise KeyboardInterrupt(number)

    known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in known if n is not None and here}
    # What is ignored stays so: `nohup`, and jobs in the background.
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for n in before:
            signal.signal(n, stop)
        yield caught
    finally:
        for n, old in before.items():
            signal.signal(n, old)

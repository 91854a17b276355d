"""The terminal: results, messages and bars; and how a program stops when it is told to."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from unicodedata import combining, east_asian_width

_WIDTH, _LINES = 2_000, 1_000
_ALIKE = 3
_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if i not in (9, 10)}


def prepare_streams() -> None:
    """Make the standard streams take whatever is printed: they may be closed, and paths no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@dataclass
class Table:
    """A table of text.

    Attributes
    ----------
    head : tuple of str
    right : collection of str
        The columns that stand to the right.
    rows : list of tuple of str
    """

    head: tuple[str, ...]
    right: Collection[str] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(tuple(map(visible, cells)))

    def __str__(self) -> str:
        columns = zip(self.head, *self.rows, strict=True)
        laid = [_column(column, column[0] in self.right) for column in columns]
        return "\n".join(map("  ".join, zip(*laid, strict=True)))


def _column(cells: Sequence[str], right: bool) -> list[str]:
    """Fill cells up to one width."""
    widths = [sum(map(_width, cell)) for cell in cells]
    blank = [" " * (max(widths) - width) for width in widths]
    return [gap + cell if right else cell + gap for cell, gap in zip(cells, blank, strict=True)]


def _width(letter: str) -> int:
    """Count a letter's places: two of East Asia's, none of an accent."""
    return 0 if combining(letter) else 1 + (east_asian_width(letter) in "WF")


def fancy(stream: TextIO) -> bool:
    """Whether somebody sees a stream in colour, as wide as a terminal."""
    return stream.isatty() or bool(os.environ.get("FORCE_COLOR"))


def say(*shown: str | Table) -> None:
    """Print on standard output, in the width of the terminal; elsewhere nothing is folded."""
    plain = "\n".join(visible(str(part)) for part in shown)
    text = rich_text(shown) if fancy(sys.stdout) else plain
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.splitlines()))


def rich_text(shown: Sequence[str | Table]) -> str:
    """Lay out what is printed on a terminal."""
    from rich import console, table, text

    screen = console.Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with screen.capture() as laid:
        for part in shown:
            if isinstance(part, str):
                screen.print(text.Text(visible(part)))
                continue
            made = table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
            for name in part.head:
                side: Any = "right" if name in part.right else "left"
                made.add_column(name, justify=side, overflow="fold")
            for cells in part.rows:
                made.add_row(*map(text.Text, cells))
            screen.print(made)
    return laid.get()


def visible(text: str) -> str:
    r"""Spell out control codes.

    Examples
    --------
    >>> visible("a\x1b[2J")
    'a\\x1b[2J'
    """
    return text.translate(_CONTROLS)


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
    return visible("\n".join([*lines, *more]))


def tell(what: str, message: str, color: str = "red") -> None:
    """Print a message on standard error."""
    with suppress(OSError):
        if not fancy(sys.stderr):
            print(f"{what}: {clipped(message)}", file=sys.stderr)
            return
        from rich import console, text

        said = text.Text.assemble((f"{what}: ", f"bold {color}"), clipped(message))
        console.Console(stderr=True, highlight=False).print(said, soft_wrap=True)


def gathered(messages: Iterable[str]) -> Iterator[str]:
    """Say once what is said of more than three: the first, and how many more.

    Examples
    --------
    >>> [*gathered(["a: is one", *(f"{name}: is stored as float32" for name in "bcde")])]
    ['a: is one', 'b and 3 more: is stored as float32']
    """
    alike: dict[str, list[str]] = {}
    for message in messages:
        name, colon, said = message.partition(": ")
        alike.setdefault(colon + said or name, []).append(name if colon else "")
    for said, names in alike.items():
        if len(names) > _ALIKE:
            yield f"{names[0]} and {len(names) - 1} more{said}"
        else:
            yield from (name + said for name in names)


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
    from rich.console import Console
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
    from rich.console import Console

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

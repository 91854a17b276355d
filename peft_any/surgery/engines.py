"""Where the pieces of a command are computed: in this process, or by the workers of a cluster."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeAlias, TypeVar

from peft_any.adapter import Adapter
from peft_any.errors import UsageError
from peft_any.io._atomic import StrPath
from peft_any.io._urls import is_url, path_of
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.receipt import Source
from peft_any.surgery.sources import pairs

Item = TypeVar("Item")
Result = TypeVar("Result")
Done: TypeAlias = Callable[[Item, Result], None]


class Recipe(abc.ABC, Generic[Item, Result]):
    """A piece-wise computation, described so that another process can do it: it is pickled."""

    @abc.abstractmethod
    def open(self) -> AbstractContextManager[Callable[[Item], Result]]:
        """Read what all pieces need, once, and give the function that does a piece.

        A piece may be done twice, at the same time even, where a worker was taken for lost: what
        it writes must appear whole, and be the same each time.
        """


class Engine(abc.ABC):
    """What does the pieces of a recipe."""

    name: str

    @abc.abstractmethod
    def run(
        self, recipe: Recipe[Item, Result], items: Iterable[Item], done: Done[Item, Result]
    ) -> None:
        """Do all pieces, and call `done(item, result)` in this process for each, in any order.

        Raises
        ------
        PeftError
            Of the first piece that fails; the others are given up.
        """


class Local(Engine):
    """One piece after the other, in this process.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> class Squares(Recipe):
    ...     def open(self):
    ...         return nullcontext(lambda n: n * n)
    >>> found = {}
    >>> Local().run(Squares(), [1, 2, 3], found.__setitem__)
    >>> found
    {1: 1, 2: 4, 3: 9}
    """

    name = "local"

    def run(
        self, recipe: Recipe[Item, Result], items: Iterable[Item], done: Done[Item, Result]
    ) -> None:
        """Do the pieces in order."""
        with recipe.open() as work:
            for item in items:
                done(item, work(item))


def absolute(path: StrPath) -> str:
    """Give a path or a URL as other processes are told of it."""
    text = os.fspath(path_of(path))
    return text if is_url(text) else os.path.abspath(text)  # noqa: PTH100 - links stay as they are


def paths(adapters: Any) -> list[tuple[str, float]]:
    """Give the paths of adapters and their weights, as other processes are told of them.

    Raises
    ------
    UsageError
        For an adapter that is an object of this process.
    """
    found = []
    for item, weight in pairs(adapters):
        if isinstance(item, Adapter):
            raise UsageError(
                f"<{item.config.peft_type}>: an adapter in memory cannot be sent to the workers: "
                "save it where they can read it, and give its path"
            )
        found.append((absolute(item), weight))
    return found


def same_files(found: Source, expected: Source) -> Source:
    """Refuse an adapter that is another one here than where the command was given.

    Raises
    ------
    UsageError
    """
    if found.files != expected.files:
        raise UsageError(
            f"{found.path}: is another adapter on this worker than where the command was given"
        )
    return expected


def same_checkpoint(path: StrPath, checkpoint: Checkpoint, expected: str) -> None:
    """Refuse a checkpoint that is another one here than where the command was given.

    Raises
    ------
    UsageError
    """
    if fingerprint(checkpoint) != expected:
        raise UsageError(
            f"{path!s}: is another checkpoint on this worker: workers must see the files of "
            "the machine that gives the command, under the same paths"
        )

"""What a combination is, told to other processes: layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from peft_any.algebra.record import LayerRecord
from peft_any.algebra.terms import opened, placed
from peft_any.algebra.written import Update
from peft_any.backend import Backend, resolve
from peft_any.errors import UsageError
from peft_any.io.checkpoint import fingerprint
from peft_any.receipt import Source
from peft_any.surgery.engines import Local, Recipe, absolute, paths, same_checkpoint, same_files
from peft_any.surgery.sources import Given, View, given_adapters

Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Layers(Recipe[Names, Sequence[tuple[Update, LayerRecord]]]):
    """The layers of a `combining.Job`.

    Attributes
    ----------
    job : Job
    sources : tuple of Source
        The adapters as they are where the command was given.
    adapters : list of (path, weight)
    fingerprint : str
        The base's there, if there is one.
    """

    job: Any
    sources: tuple[Source, ...]
    adapters: list[tuple[str, float]]
    fingerprint: str

    @classmethod
    def of(cls, job: Any, given: Sequence[Given], view: Any, to: Backend) -> Layers:
        """Describe a job.

        Raises
        ------
        UsageError
            If adapters or the base are objects of this process.
        """
        if view is not None and not isinstance(view, View):
            raise UsageError("base: weights in memory cannot be sent to the workers: give a path")
        base = None if view is None else absolute(view.base.source)
        alone = replace(job, base=base, backend=str(to), progress=None, engine=Local())
        items = [(one.source.path or one.adapter, one.weight) for one in given]
        mark = "" if view is None else fingerprint(view.base)
        return cls(alone, tuple(one.source for one in given), paths(items), mark)

    @contextmanager
    def open(self) -> Iterator[Callable[[Names], list[tuple[Update, LayerRecord]]]]:
        """Read the adapters, and the base if there is one."""
        given = [
            replace(found, source=same_files(found.source, source))
            for found, source in zip(given_adapters(self.adapters), self.sources, strict=True)
        ]
        job, to = self.job, resolve(self.job.backend)
        with opened(job.base, given) as view:
            if isinstance(view, View):
                same_checkpoint(str(job.base), view.base, self.fingerprint)
            fits = placed(given, view, job.fit)
            yield job.pieces(given, fits, view, job.settled(given), to)[1]

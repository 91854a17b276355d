"""What a merge or an audit is, told to other processes: shard by shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from peft_any.io._atomic import reporting
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.receipt import Source
from peft_any.surgery import audit as audits
from peft_any.surgery.audit import Audit, Finding, Names
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.engines import Engine, Recipe, absolute, paths, same_checkpoint, same_files
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Elsewhere, Job
from peft_any.surgery.plan import Plan
from peft_any.surgery.planning import make_plan
from peft_any.surgery.shards import Piece, ShardItem
from peft_any.surgery.ties import settle_ties

_ATTEMPT = re.compile(r"\.[0-9a-f]{32}$")


@dataclass(frozen=True)
class Planned:
    """A plan as other machines are told of it.

    Attributes
    ----------
    base : str
    adapters : list of (path, weight)
    fit : Fitting
    dtype : str or None
    fingerprint : str
        The base's, where the command was given.
    sources : tuple of Source
        The adapters as they are there.
    """

    base: str
    adapters: list[tuple[str, float]]
    fit: Fitting
    dtype: str | None
    fingerprint: str
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, plan: Plan, adapters: Any, fit: Fitting, dtype: str | None = None) -> Planned:
        """Describe a plan.

        Raises
        ------
        UsageError
            If an adapter is an object of this process.
        """
        base, mark = absolute(plan.base.source), fingerprint(plan.base)
        return cls(base, paths(adapters), fit, dtype, mark, plan.sources)

    @contextmanager
    def opened(self) -> Iterator[Surgeon]:
        """Make the plan anew.

        Raises
        ------
        UsageError
            If files are others here.
        """
        with Checkpoint(self.base) as checkpoint:
            same_checkpoint(self.base, checkpoint, self.fingerprint)
            plan = make_plan(checkpoint, self.adapters, self.fit)
            for found, expected in zip(plan.sources, self.sources, strict=True):
                same_files(found, expected)
            surgeon = Surgeon(plan, self.fit.backend, self.dtype)
            settle_ties(plan, lambda name: surgeon.value(name)[0])
            yield surgeon


@dataclass(frozen=True)
class Merging(Recipe[ShardItem, Piece]):
    """A merge's shards."""

    planned: Planned
    max_shard: int | None = None

    @contextmanager
    def open(self) -> Iterator[Callable[[ShardItem], Piece]]:
        """Make the plan; the function writes a shard, whole or not at all."""
        with self.planned.opened() as surgeon:
            job = Job(surgeon.plan, surgeon, None, None, max_shard=self.max_shard)

            def work(item: ShardItem) -> Piece:
                name, path = item
                if not isinstance(path, Path):
                    with job.pieces([item]) as pieces:
                        [(_, piece)] = pieces
                    return piece
                # A worker that was taken for lost may still write: each attempt has its own file.
                own = path.with_name(f"{path.name}.{uuid4().hex}")
                with job.pieces([(name, own)]) as pieces:
                    [(_, piece)] = pieces
                with reporting(path, "be written"):
                    own.replace(path)
                return piece

            yield work


@dataclass(frozen=True)
class Auditing(Recipe[Names, dict[str, Finding]]):
    """The tensors of an audit, by shard of the base."""

    planned: Planned
    merged: str
    fingerprint: str
    min_kept: float

    @contextmanager
    def open(self) -> Iterator[Callable[[Names], dict[str, Finding]]]:
        """Make the plan; the function compares tensors."""
        with self.planned.opened() as surgeon, Checkpoint(self.merged) as theirs:
            same_checkpoint(self.merged, theirs, self.fingerprint)
            audit = Audit(surgeon.plan, surgeon, theirs, self.min_kept)
            yield lambda names: {name: audit.finding(name) for name in names}


def merging(engine: Engine, job: Job, adapters: Any, fit: Fitting) -> Elsewhere:
    """Have an engine do the shards of a merge."""
    recipe = Merging(Planned.of(job.plan, adapters, fit, job.surgeon.dtype), job.max_shard)

    def run(items: list[ShardItem], done: Callable[[ShardItem, Piece], None]) -> None:
        engine.run(recipe, items, done)
        for _, path in items:
            for left in path.parent.glob(f"{path.name}.*") if isinstance(path, Path) else ():
                if _ATTEMPT.search(left.name):  # of a worker that was lost
                    left.unlink(missing_ok=True)

    return run


def auditing(engine: Engine, audit: Audit, adapters: Any, fit: Fitting) -> audits.Elsewhere:
    """Have an engine look at the tensors of an audit."""
    merged = audit.theirs
    planned = Planned.of(audit.plan, adapters, fit)
    mark = fingerprint(merged)
    recipe = Auditing(planned, absolute(merged.source), mark, audit.min_kept)
    return partial(engine.run, recipe)

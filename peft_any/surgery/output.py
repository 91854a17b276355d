"""The files of an output: their tensors computed and copied piece by piece, on several threads."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import TypeAlias

from peft_any._typing import Shape
from peft_any.io._header import byte_size
from peft_any.io._writer import PlacedWriter
from peft_any.receipt import Change
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.measure import Moments
from peft_any.surgery.patches import Patch
from peft_any.surgery.threads import in_order

Spec: TypeAlias = tuple[str, str, Shape]
"""A tensor's name, dtype and shape."""
_COPIED = 1 << 25
"""Bytes that one task copies, or computes: what all its blocks need is prepared once."""
_FLUSHED = 1 << 24
"""Bytes after which the device is asked to begin writing."""
_ALONE = 1 << 24
"""Bytes up to which files are not worth the start of others' work."""
_Done: TypeAlias = tuple[int, Moments | None, int]
"""Of a task: the bytes it made, what became of the change, and what is left of its tensor."""
_Task: TypeAlias = Callable[[], _Done]


@dataclass(frozen=True)
class Output:
    """A file to be filled.

    Attributes
    ----------
    specs : list of (name, dtype, shape)
    writer : PlacedWriter or None
        Without one, everything is computed and nothing written.
    """

    specs: list[Spec]
    writer: PlacedWriter | None


def fill(
    surgeon: Surgeon,
    outputs: Sequence[Output],
    threads: int,
    tick: Callable[[str, str, Shape], None],
) -> Generator[tuple[Change, ...]]:
    """Compute or copy all tensors of some files, and write them.

    While one file is finished by the caller, work on the next goes on.

    Parameters
    ----------
    surgeon : Surgeon
    outputs : sequence of Output
    threads : int
    tick : callable (name, dtype, shape)
        Called when the last piece of a tensor is done.

    Yields
    ------
    tuple of Change
        Of the touched ones of a file, in order; their bits do not depend on `threads`.
    """
    size = sum(byte_size(*spec[1:]) or 0 for output in outputs for spec in output.specs)
    threads = threads if size > _ALONE else 1
    work = [
        [(spec, task) for spec in output.specs for task in _tasks(surgeon, spec, output.writer)]
        for output in outputs
    ]
    every, files = [*chain.from_iterable(work)], [*map(len, work)]
    keep = [output.writer.handle for output in outputs if output.writer is not None]
    flushes = [_flushes(output.writer, count) for output, count in zip(outputs, files, strict=True)]

    def heard(place: int, done: _Done) -> None:
        flushes[bisect(stops, place)](done)
        if not done[-1]:
            tick(*every[place][0])

    stops = [*accumulate(files)]
    tasks = [task for _, task in every]
    with closing(in_order(tasks, threads, keep, files, heard)) as results:
        for output in outputs:
            yield tuple(_filled(surgeon, output, results))


def _flushes(writer: PlacedWriter | None, left: int) -> Callable[[_Done], None]:
    """Have the device begin to write a file every so often as tasks are done, and at its end."""
    dirty = 0

    def done(result: _Done) -> None:
        nonlocal dirty, left
        dirty, left = dirty + result[0], left - 1
        if writer is not None and (dirty >= _FLUSHED or not left):
            writer.flush()
            dirty = 0

    return done


def _filled(surgeon: Surgeon, output: Output, results: Iterator[_Done]) -> Iterator[Change]:
    """Take the results of one file in order."""
    for spec in output.specs:
        name, sums = spec[0], []
        for size, moments, left in results:
            sums += [] if moments is None else [moments]
            if output.writer is not None:
                output.writer.count(name, size)
            if not left:
                break
        source = surgeon.plan.source(name)
        if source is not None:
            yield replace(surgeon.change(source, spec[1], sums), tensor=name)


def _tasks(surgeon: Surgeon, spec: Spec, writer: PlacedWriter | None) -> Iterator[_Task]:
    """Cut the work on a tensor in pieces, the same ones whoever does them; at least one."""
    name = spec[0]
    source = surgeon.plan.source(name)
    if source is not None:
        patch = surgeon.patch(source)
        blocks, size = [*patch.blocks], byte_size(*spec[1:]) or 0
        step = max(len(blocks) * _COPIED // max(size, 1), 1)
        for i in range(0, len(blocks), step):
            some = blocks[i : i + step]
            yield partial(_compute, name, patch, some, writer, len(blocks) - i - len(some))
        return
    origin = surgeon.plan.added.get(name, name)
    size = 0 if writer is None else surgeon.plan.base.info(origin).nbytes
    for start in range(0, max(size, 1), _COPIED):
        stop = min(start + _COPIED, size)
        yield partial(_copy, surgeon, (origin, name), slice(start, stop), writer, size - stop)


def _compute(
    name: str, patch: Patch, blocks: list[slice], writer: PlacedWriter | None, left: int
) -> _Done:
    size, total = 0, Moments()
    for rows in blocks:
        values, moments = patch.made(rows)
        if writer is not None:
            row = values.nbytes // values.shape[0] if values.ndim and values.size else 0
            writer.put(name, rows.start * row, values)
        size, total = size + values.nbytes, total + moments
    return size, total, left


def _copy(
    surgeon: Surgeon, names: tuple[str, str], span: slice, writer: PlacedWriter | None, left: int
) -> _Done:
    if writer is not None:
        origin, name = names
        source = surgeon.plan.base.shard_of(origin)
        writer.copy(name, source, origin, span.start, span.stop)
    return span.stop - span.start, None, left

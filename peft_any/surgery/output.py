"""One file of an output: its tensors computed and copied piece by piece, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
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
"""Bytes that one task copies."""
_FLUSHED = 1 << 27
"""Bytes after which the device is asked to begin writing."""
_ALONE = 1 << 24
"""Bytes up to which a file is not worth the start of others' work."""
_Done: TypeAlias = tuple[str, int, Moments | None]
"""Of a task: its tensor, the bytes it made, and what became of the change."""
_Task: TypeAlias = Callable[[], _Done]


def fill(
    surgeon: Surgeon,
    specs: list[Spec],
    writer: PlacedWriter | None,
    threads: int,
    tick: Callable[[str, str, Shape], None],
) -> tuple[Change, ...]:
    """Compute or copy all tensors of a file, and write them unless there is no writer.

    Parameters
    ----------
    surgeon : Surgeon
    specs : list of (name, dtype, shape)
    writer : PlacedWriter or None
    threads : int
    tick : callable (name, dtype, shape)
        Called when a tensor is finished, in their order.

    Returns
    -------
    tuple of Change
        Of the touched ones, in order; their bits do not depend on `threads`.
    """
    size = sum(byte_size(dtype, shape) or 0 for _, dtype, shape in specs)
    threads = threads if size > _ALONE else 1
    changes: list[Change] = []
    sums: list[Moments] = []
    order, dirty = iter(specs), 0
    now = next(order, None)

    def finished(spec: Spec) -> None:
        source = surgeon.plan.source(spec[0])
        if source is not None:
            changes.append(replace(surgeon.change(source, spec[1], sums), tensor=spec[0]))
            sums.clear()
        tick(*spec)

    tasks = chain.from_iterable(_tasks(surgeon, spec, writer) for spec in specs)
    with closing(in_order(tasks, threads, [] if writer is None else [writer.handle])) as results:
        for name, made, moments in results:
            while now is not None and now[0] != name:
                finished(now)
                now = next(order, None)
            sums += [] if moments is None else [moments]
            dirty += made
            if writer is not None:
                writer.count(name, made)
                if threads > 1 and dirty >= _FLUSHED:  # while the others go on
                    writer.flush()
                    dirty = 0
    while now is not None:
        finished(now)
        now = next(order, None)
    return tuple(changes)


def _tasks(surgeon: Surgeon, spec: Spec, writer: PlacedWriter | None) -> Iterator[_Task]:
    """Cut the work on a tensor in pieces, the same ones whoever does them."""
    name = spec[0]
    source = surgeon.plan.source(name)
    if source is not None:
        patch = surgeon.patch(source)
        for rows in patch.blocks:
            yield partial(_compute, name, patch, rows, writer)
        return
    origin = surgeon.plan.added.get(name, name)
    size = 0 if writer is None else surgeon.plan.base.info(origin).nbytes
    for start in range(0, max(size, 1), _COPIED):
        span = slice(start, min(start + _COPIED, size))
        yield partial(_copy, name, surgeon, origin, writer, span)


def _compute(name: str, patch: Patch, rows: slice, writer: PlacedWriter | None) -> _Done:
    values, moments = patch.made(rows)
    if writer is not None:
        row = values.nbytes // values.shape[0] if values.ndim and values.size else 0
        writer.put(name, rows.start * row, values)
    return name, values.nbytes, moments


def _copy(
    name: str, surgeon: Surgeon, origin: str, writer: PlacedWriter | None, span: slice
) -> _Done:
    if writer is not None:
        source = surgeon.plan.base.shard_of(origin)
        writer.copy(name, source, origin, span.start, span.stop)
    return name, span.stop - span.start, None

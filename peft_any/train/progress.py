"""The bar of a training run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any


@contextmanager
def bar(steps: int, progress: bool | None) -> Iterator[Callable[[Any], None]]:
    """Show a bar, by default if somebody is there to see it: call it with the run."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda run: None  # noqa: ARG005 - nobody looks
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    shown = TextColumn("{task.fields[shown]}", markup=False)
    columns = "training", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), shown
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task, last = bars.add_task("training", total=steps, shown=""), [0.0]

        def show(run: Any) -> None:
            if perf_counter() - last[0] > 0.1 or run.step >= steps or run.stopped:
                record, last[0] = run.history[-1], perf_counter()
                text = f"loss {record['loss']:.4g}"
                text += f", held out {record['held_out']:.4g}" if "held_out" in record else ""
                bars.update(task, completed=run.step, shown=text)

        yield show

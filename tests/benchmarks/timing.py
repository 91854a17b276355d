"""Measuring side by side: every figure is a ratio of two things timed in turn in one run."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter, process_time

# These make NumPy's BLAS slow where they are set; the benchmark measures it as users have it.
SLOW = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def once(f: Callable[[], object], clock: Callable[[], float] = perf_counter) -> float:
    """Time one call, in seconds."""
    start = clock()
    f()
    return clock() - start


def ratio(
    f: Callable[[], object],
    floor: Callable[[], object],
    rounds: int = 60,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Time `f` and `floor` in turn; the fastest of the one relative to the fastest of the other.

    The fastest of many rounds is what a machine can do when nothing else wants it.
    """
    f(), floor()
    gc.disable()
    try:
        pairs = [(once(f, clock), once(floor, clock)) for _ in range(rounds)]
    finally:
        gc.enable()
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


def cpu_ratio(f: Callable[[], object], floor: Callable[[], object], rounds: int = 60) -> float:
    """As `ratio`, in the processor's time: on one thread, what else runs then matters little."""
    return ratio(f, floor, rounds, process_time)


def timed(
    *groups: Mapping[str, Callable[[], object]], seconds: float = 1.2, least: int = 4
) -> dict[str, list[float]]:
    """Time calls in turn, in the processor's time, for some seconds and `least` rounds.

    Every other round each group's calls but the first are in reverse order: a call follows its one
    neighbour as often as its other, never itself; what calls leave (caches, pages) favours none.
    """
    calls = {name: call for group in groups for name, call in group.items()}
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    there = [name for group in groups for name in group]
    back = [name for first, *rest in groups for name in (first, *reversed(rest))]
    gc.disable()
    start = perf_counter()
    try:
        while len(next(iter(found.values()))) < least or perf_counter() - start < seconds:
            for name in (*there, *back):
                found[name].append(once(calls[name], process_time))
    finally:
        gc.enable()
    return found


def over(found: Mapping[str, list[float]], a: str, b: str) -> float:
    """Take the median of the ratios of two calls timed in turn."""
    pairs = zip(found[a], found[b], strict=True)
    return statistics.median(x / max(y, 1e-9) for x, y in pairs)


def on_one_thread(module: str, *given: str) -> Iterator[str]:
    """Run a module of benchmarks in a process whose libraries have one thread each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k not in SLOW} | dict.fromkeys(names, "1")
    command = [sys.executable, "-m", module, *given]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        yield from (line.rstrip("\n") for line in run.stdout)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)


def machine() -> str:
    """Describe the machine in a line."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            names = [
                line.split(":", 1)[1].strip() for line in info if line.startswith("model name")
            ]
        model = names[0] if names else model
    except OSError:
        pass
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    )

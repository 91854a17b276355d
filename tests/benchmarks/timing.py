"""Measuring side by side: every figure is a ratio of two things timed in turn in one run."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

# These make NumPy's BLAS slow where they are set; the benchmark measures it as users have it.
SLOW = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def once(f: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    start = perf_counter()
    f()
    return perf_counter() - start


def ratio(f: Callable[[], object], floor: Callable[[], object], rounds: int = 60) -> float:
    """Time `f` and `floor` in turn; the fastest of the one relative to the fastest of the other.

    The fastest of many rounds is what a machine can do when nothing else wants it.
    """
    f(), floor()
    gc.disable()
    try:
        pairs = [(once(f), once(floor)) for _ in range(rounds)]
    finally:
        gc.enable()
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


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

"""The most memory that a call holds beyond what stood before: NumPy's and torch's own counts."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable


def numpy_peak(f: Callable[[], object]) -> int:
    """Count, in bytes, what NumPy (and Python) allocated at the highest point of a call."""
    f()
    gc.collect()
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def torch_peak(f: Callable[[], object]) -> int:
    """Count, in bytes, what torch's CPU allocator gave out at the highest point of a call."""
    from torch.profiler import ProfilerActivity, profile

    f()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        f()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

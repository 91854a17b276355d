"""Eight threads that repeat what they do side by side."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

THREADS = 8


def race(*works: Callable[[], Any], seconds: float = 1.0) -> list[Any]:
    """Repeat functions side by side, eight of them, and give what they complain of."""
    assert len(works) == THREADS
    stop, wrong = threading.Event(), []

    def repeat(work: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                if complaint := work():
                    wrong.append(complaint)
                    return
        except Exception as error:  # noqa: BLE001 - whatever a thread dies of
            wrong.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # change threads within what should be one step
    try:
        threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        stop.wait(seconds)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    return wrong

"""Runs commands and kills them: a server that has everything imported and forks for each.

A line of JSON on standard input, ``{"argv": [...], "signal": number, "after": seconds, "once":
directory}``, is one command; the answer is its exit code, negative for a signal, and its seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Killer:
    """The other end of the pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(
        self,
        *argv: object,
        after: float | None = None,
        once: Path | None = None,
        number: int = 9,
    ) -> tuple[int, float]:
        """Run a command, send it a signal in time, and give its exit code and the seconds it took.

        The signal comes `after` some seconds, or `once` a journal in a directory has lines.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line: dict[str, Any] = {"argv": [str(a) for a in argv], "after": after, "signal": number}
        line["once"] = None if once is None else str(once)
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds


@contextmanager
def killer() -> Iterator[Killer]:
    """Start a server."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.killing"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=env, cwd=ROOT, **pipes)
    try:
        yield Killer(process)
    finally:
        process.communicate()


def begun(folder: Path) -> bool:
    """Whether something is finished according to a journal."""
    with suppress(FileNotFoundError):
        return any(path.stat().st_size for path in folder.glob(".*.journal"))
    return False


def ended(pid: int) -> bool:
    """Whether a child is a zombie."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def serve() -> None:
    """Answer the lines of standard input."""
    import peft_any.cli.report
    import peft_any.methods.lora
    import peft_any.surgery.merge
    from peft_any.cli import app

    assert peft_any.cli.report
    for line in sys.stdin:
        task = json.loads(line)
        since = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for handle in (0, 1) if os.environ.get("PEFT_ANY_SHOW") else (0, 1, 2):
                os.dup2(null, handle)
            os._exit(app.run(task["argv"]))
        if task["after"] is not None or task["once"] is not None:
            time.sleep(task["after"] or 0)
            folder = Path(task["once"] or ".")
            while task["once"] and not begun(folder) and not ended(pid):
                time.sleep(0.001)
            os.kill(pid, task["signal"])  # not waited for: it is there, if only as a zombie
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, time.perf_counter() - since]), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()

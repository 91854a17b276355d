"""What the receipt costs: whole merges with it and without, side by side.

``python -m tests.benchmarks.receipts`` needs a C compiler: the pass without a receipt is the same
text without the lines that measure. Both write the same weights, which is checked.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from setuptools import Extension
from setuptools.dist import Distribution

from peft_any.surgery import passes
from tests.benchmarks import bare
from tests.benchmarks.checkpoints import LAYERS, METHODS, Arena, run
from tests.benchmarks.timing import SLOW

TARGET = 0.3
"""Of the time that a merge takes without."""
_MEASURES = re.compile(r"(?m)^ +(m->)?(base2|delta2|dot|miss2|same) [-+]= [^;]*;$")


def compile_bare(work: Path) -> Path:
    """Compile the pass without what it measures."""
    source, lines = Path(passes.__file__).parent, 0
    for name in ("_exact.h", "_sums.c", "_tile.h"):
        text, count = _MEASURES.subn(";", (source / name).read_text())
        (work / name).write_text(text)
        lines += count
    assert lines > 20, f"{lines} lines measure"
    extension = Extension(
        "_sums", [str(work / "_sums.c")], extra_compile_args=["-O3"], py_limited_api=True
    )
    command = Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = str(work)
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath("_sums"))


def spent(command: Sequence[str]) -> tuple[float, float]:
    """Give a new process's time by the clock, and that of its processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, busy


def weights(folder: Path) -> dict[str, bytes]:
    """Read the merged shards."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def receipts(arena: Arena, compiled: Path, rounds: int) -> Iterator[str]:
    """Compare merges with and without, the quickest of each: what else runs only slows them."""
    yield "| method | time with the receipt ÷ without | processor time | target |"
    yield "|---|---|---|---|"
    for name, config, _ in METHODS[:3]:
        given = arena.ours(arena.adapter(config))[3:]
        script = [sys.executable, bare.__file__]
        commands = [[*script, "-", *given], [*script, str(compiled), *given]]
        made: list[dict[str, bytes]] = []
        times: list[list[tuple[float, float]]] = [[], []]
        for i in range(rounds + 1):
            for command, seconds in zip(commands, times, strict=True):
                shutil.rmtree(arena.out, ignore_errors=True)
                took = spent(command)
                if i:
                    seconds.append(took)
                else:
                    made.append(weights(arena.out))
        assert made[0] == made[1], name
        made.clear()
        ours, bare_ = (map(min, zip(*seconds, strict=True)) for seconds in times)
        clock, busy = (a / b for a, b in zip(ours, bare_, strict=True))
        miss = "" if clock <= 1 + TARGET else " (missed)"
        yield f"| {name} | {clock:.2f}{miss} | {busy:.2f} | {1 + TARGET} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for name in (*SLOW, "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        compiled = compile_bare(work)
        for line in receipts(Arena(work / "merge", given.layers), compiled, given.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()

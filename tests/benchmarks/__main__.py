"""Run the benchmarks and print their tables as Markdown: ``python -m tests.benchmarks``.

With ``--write FILE`` the page is also written; with Hugging Face PEFT installed its columns are
filled in. ``--page`` makes `docs/comparison.md` instead (see `tests.benchmarks.page`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peft_any.bound import BoundLayer
from peft_any.layer import Dense
from peft_any.method import Tuner
from peft_any.parts import Part
from tests.benchmarks.combinations import combinations
from tests.benchmarks.extraction import extractions
from tests.benchmarks.mixed import mixed_batches
from tests.benchmarks.rows import ROWS, adapted
from tests.benchmarks.timing import SLOW, machine, on_one_thread, ratio

N, BATCH = 2048, 256


def calls() -> Iterator[str]:
    """Compare the adapted layer's call with the base's own."""
    yield f"| layer call, {N}×{N}, batch {BATCH} | relative to the base matmul | target |"
    yield "|---|---|---|"
    x = np.random.default_rng(1).standard_normal((BATCH, N)).astype("float32")
    for name, method, target in ROWS:
        config, p, base = adapted(method, N)
        layer = BoundLayer(base, [Part(config, p)], stacked=True)
        cost = ratio(lambda f=layer: f(x), lambda b=base: b(x))
        miss = "" if target is None or cost <= target else " (missed)"
        yield f"| {name} | {cost:.2f} | {'–' if target is None else target}{miss} |"


def training() -> Iterator[str]:
    """Compare training steps."""
    yield from on_one_thread("tests.benchmarks.steps")
    yield from on_one_thread("tests.benchmarks.methods")


def merges() -> Iterator[str]:
    """Compare merging one layer with copying it, and with Hugging Face PEFT's merge."""
    yield f"| merging one {N}×{N} layer | relative to copying it | HF PEFT ÷ ours |"
    yield "|---|---|---|"
    theirs = importlib.util.find_spec("peft") is not None
    for name, method, _ in ROWS:
        config, p, base = adapted(method, N)

        def ours(c: Tuner = config, q: dict[str, Any] = p, b: Dense = base) -> object:
            return c.merge(q, b)

        cost = ratio(ours, base.weight.copy, rounds=40)
        versus = "–"
        if theirs:
            from tests.benchmarks.hugging_face import merge_of

            versus = f"{ratio(merge_of(config, base), ours, rounds=15):.1f}"
        yield f"| {name} | {cost:.1f} | {versus} |"


def imports() -> Iterator[str]:
    """Compare new processes that import this package and NumPy alone."""

    def start(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    yield "| a new process | relative to one importing numpy | target |"
    yield "|---|---|---|"
    for code in ("import peft_any", "from peft_any import PeftModel, Adapter"):
        cost = ratio(start(code), start("import numpy"), rounds=15)
        yield f"| `{code}` | {cost:.2f} | 1.5 |"


NOTES = """
A layer call runs with its parameters bound, as `model.bind().layers` runs it: what depends on them
alone (a rotation, DoRA's row norms, LoHa's products of rows) has been computed once. `nox -s bench`
measures again, and writes this page with `-- --write docs/benchmarks.md`.

Training is measured in a process of one BLAS thread, in the processor's time, so that other work on
the machine matters little; all else by the clock, with as many threads as there are cores. Against
torch a step is the loss and its gradients: on the tape, and by torch's autograd of the same
method's formulas on torch's tensors. Against HF PEFT it is a whole step of training one wrapped
linear layer (binding, loss, gradients, AdamW), the loss a mean of squares, written alike in both.
Memory is the most that a step's arrays take at a time, as NumPy (`tracemalloc`) and torch (its
profiler) count them: parameters, inputs and what the matrix products need for themselves stand on
neither side. AdaLoRA's regulariser and allocator are left out; prefix and prompt tuning adapt no
layer, so there is no step of theirs to compare.

Where HF PEFT ÷ ours is near or below 1 (IA³ and LoKr change places from run to run), a merge is one
pass over the weight, at NumPy's own speed: on one thread and into a new array, since the base is
never changed; torch uses all cores and writes into the base. PEFT runs BOFT with one butterfly
factor here, because more need its CUDA extension; ours runs all three.

Every method beside Hugging Face PEFT's: [](comparison.md).
Merges of whole checkpoints, from the command to the files: [](checkpoint-benchmarks.md).
"""


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("--page", nargs="*", metavar="METHOD")
    options = parser.parse_args()
    if options.page is not None:
        from tests.benchmarks.page import make

        make(options.page)
        return
    if any(name in os.environ for name in SLOW):
        clean = {k: v for k, v in os.environ.items() if k not in SLOW}
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]], clean)
    about = "Every figure without a unit is a ratio: two things timed in turn, the fastest of"
    lines = ["# Benchmarks", "", f"{about} many; NumPy {np.__version__}, float32, on {machine()}."]
    for table in (calls, training, merges, mixed_batches, combinations, extractions, imports):
        lines += ["", *table()]
    page = "\n".join(lines) + "\n" + NOTES
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Run the benchmarks and print their tables as Markdown: ``python -m tests.benchmarks``.

With ``--write FILE`` the page is also written; with Hugging Face PEFT installed its columns are
filled in.
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

from peft_any.backend import resolve
from peft_any.bound import BoundLayer
from peft_any.layer import Dense, Site
from peft_any.method import Tuner
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lokr import LoKrConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.vera import VeraConfig
from peft_any.parts import Part
from peft_any.rng import Fresh
from tests.benchmarks.steps import steps
from tests.benchmarks.timing import SLOW, machine, ratio

N, BATCH = 2048, 256

ROWS: list[tuple[str, Tuner, float | None]] = [
    ("LoRA r16", LoraConfig(r=16), 1.12),
    ("DoRA r16", LoraConfig(r=16, use_dora=True), 1.35),
    ("AdaLoRA r16", AdaLoraConfig(init_r=16, total_step=1000), None),
    ("IA³", IA3Config(target_modules=["fc"], feedforward_modules=[]), 1.05),
    ("LoKr r8", LoKrConfig(r=8), 1.45),
    ("LoHa r16", LoHaConfig(r=16), 1.6),
    ("OFT b32", OFTConfig(oft_block_size=32), 1.15),
    ("BOFT b32 m3", BOFTConfig(boft_block_size=32, boft_n_butterfly_factor=3), 1.3),
    ("VeRA r256", VeraConfig(r=256), 1.4),
]
"""Method, and the most that its layer call may cost relative to the base's matrix product."""


def adapted(config: Tuner) -> tuple[Tuner, dict[str, Any], Dense]:
    """Make a trained-looking adapter of a 2048 × 2048 layer."""
    rng = np.random.default_rng(0)
    site = Site("fc", N, N)
    weight = (rng.standard_normal((N, N)) / N**0.5).astype("float32")
    base = Dense(weight, rng.standard_normal(N).astype("float32"), site)
    config = config.at(site)
    new = Fresh(0, resolve("numpy"), key="fc", base=base)
    p = {**config.init_shared([site], new), **config.init(site, new)}
    for name in config.shapes(site):
        p[name] = (p[name] + 0.02 * rng.standard_normal(p[name].shape)).astype("float32")
    return config, p, base


def calls() -> Iterator[str]:
    """Compare the adapted layer's call with the base's own."""
    yield f"| layer call, {N}×{N}, batch {BATCH} | relative to the base matmul | target |"
    yield "|---|---|---|"
    x = np.random.default_rng(1).standard_normal((BATCH, N)).astype("float32")
    for name, method, target in ROWS:
        config, p, base = adapted(method)
        layer = BoundLayer(base, [Part(config, p)], stacked=True)
        cost = ratio(lambda f=layer: f(x), lambda b=base: b(x))
        miss = "" if target is None or cost <= target else " (missed)"
        yield f"| {name} | {cost:.2f} | {'–' if target is None else target}{miss} |"


def merges() -> Iterator[str]:
    """Compare merging one layer with copying it, and with Hugging Face PEFT's merge."""
    yield f"| merging one {N}×{N} layer | relative to copying it | HF PEFT ÷ ours |"
    yield "|---|---|---|"
    theirs = importlib.util.find_spec("peft") is not None
    for name, method, _ in ROWS:
        config, p, base = adapted(method)

        def ours(c: Tuner = config, q: dict[str, Any] = p, b: Dense = base) -> object:
            return c.merge(q, b)

        cost = ratio(ours, base.weight.copy, rounds=40)
        versus = "–"
        if theirs:
            from tests.benchmarks.hugging_face import merge_of

            versus = f"{ratio(merge_of(config, p, base), ours, rounds=15):.1f}"
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

Where HF PEFT ÷ ours is below 1, as for IA³, the merge is a single multiplication of the weight, at
NumPy's own speed: on one thread and into a new array, since the base is never changed; torch uses
all cores and writes into the base. PEFT runs BOFT with one butterfly factor here, because more need
its CUDA extension; ours runs all three.
"""


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if any(name in os.environ for name in SLOW):
        clean = {k: v for k, v in os.environ.items() if k not in SLOW}
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]], clean)
    about = "Every figure is a ratio: two things timed in turn, the fastest of many rounds"
    lines = ["# Benchmarks", "", f"{about}; NumPy {np.__version__}, float32, on {machine()}."]
    for table in (calls, steps, merges, imports):
        lines += ["", *table()]
    page = "\n".join(lines) + "\n" + NOTES
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The page that compares every method with Hugging Face PEFT, and its plots.

``python -m tests.benchmarks --page`` measures what `RESULTS` lacks, ``--page NAME …`` the methods
named; ``--page mixed start`` the other tables. Each result is kept as soon as it is there, so that
the page can be made in pieces.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, files, requires
from pathlib import Path
from typing import Any

import numpy as np
from packaging.requirements import Requirement

from tests.benchmarks.compared import BATCH, COMPARED, MOST, Compared, N
from tests.benchmarks.timing import machine, on_one_thread, once, over

HERE = Path(__file__).parent
RESULTS = HERE / "comparison.json"
DOCS = HERE.parent.parent / "docs"
PARTS = "forward", "step", "merge", "unmerge"
LIBRARIES = "torch", "NumPy"
AGAINST = [f"{part}, {library}" for part in PARTS for library in LIBRARIES]
EXTRA = "mixed", "start"
NOISE = 0.95
"""Below this a ratio to Hugging Face PEFT counts as slower: what is the same varies so much."""
BOUND, MICROSECONDS = 1.05, 15.0
MIXED = 3.0

NOTES = f"""
How it is measured: one layer of {N}×{N}, float32, {BATCH} inputs, the same parameters on both
sides, and but for merges the very same base in memory, so that neither finds it alone in the
processor's caches; calls are first held to agree to 10⁻³. Both sides run in one process of one
thread, in turn, every other round in reverse, so that what one leaves in caches and pages favours
nobody; a figure is the median of the ratios of neighbours, in the processor's time. "torch" is our
method on torch's tensors, "NumPy" the same on NumPy's, each against Hugging Face PEFT on torch's
CPU. Above 1, ours is faster.

- forward: a call in evaluation, parameters bound (`model.bind()`).
- step: binding, forward, a mean of squares, backward and AdamW; on NumPy by the tape.
- merge, unmerge: of the layer alone. Hugging Face PEFT writes into its weight; ours gives a new
  array and leaves the base as it was. "base kept": nothing brings the base back from the merged
  weight alone, and un-merging a `PeftModel` drops a reference.
- "÷ base" is our call on NumPy over the base's own; "÷ by hand" over the method's formula written
  in NumPy, with all that depends on the parameters alone computed before, or, without one of its
  own (†), over a product with the merged weight; "÷ copy" is merging over copying the weight.

Hugging Face PEFT runs BOFT with one butterfly factor, since more need its CUDA extension, and so
does ours here. Prompts, prefixes and LLaMA-Adapter adapt no layer of their own: no row is theirs.

"At most" is Hugging Face PEFT's time over that of the least that has to be done, in the same rounds
and by the library at hand. In a merge that is to copy the weight, since ours writes a new array and
Hugging Face PEFT into its own; or, where a product of two matrices is to be formed, that product
alone (OSF and RandLoRA: of {N}×{N}; VeRA and PVeRA: of rank 256). In a call on NumPy it is the
product with one weight of {N}×{N}, without which there is none, and which NumPy's OpenBLAS takes
longer for than torch's MKL. Where the target lies above it, no way of computing would reach it.

Most rows were measured while other work ran on the machine's two cores (load averages from 9 to
13), which shares their caches and memory; those of BEFT, BOFT, FourierFT, IA³, Lily, LN tuning,
MiSS, OFT, PVeRA, UniLoRA and WaveFT while nothing did. A figure near its target moves by a tenth
from run to run, and those of merges that mostly wait for memory by more; FourierFT's and LN
tuning's are medians of five runs. What misses: FourierFT's merges on torch, by a little (single
runs gave 4.4 to 5.7); a step of LN tuning on NumPy, which trains all weights of the layer, since
its two products take OpenBLAS longer than torch's MKL; and calls, steps and merges that are hardly
more than one product, where that alone does.

Targets: no figure against Hugging Face PEFT below 1 (below {NOISE} is called a miss: equal calls
vary by that much); in merges 10 for OFT and BOFT, and 5 for C3A, FourierFT, HRA, RandLoRA and
WaveFT, where Hugging Face PEFT forms square matrices.

`python -m tests.benchmarks --page` measures what is not yet there; `--page NAME …`, a method again.
"""


def known() -> dict[str, Any]:
    """Read the results that are there."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def keep(name: str, value: Any) -> None:
    """Keep one result."""
    results = known() | {name: value}
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def measure(names: list[str]) -> None:
    """Measure methods and tables by name; without names, what is lacking."""
    every = [row.name for row in COMPARED]
    wanted = names or [name for name in (*every, *EXTRA) if name not in known()]
    unknown = [name for name in wanted if name not in (*every, *EXTRA)]
    if unknown:
        raise SystemExit(
            f"{', '.join(unknown)}: no such row; there are {', '.join(every)}, {EXTRA}"
        )
    for name in wanted:
        if name in every:
            try:
                for line in on_one_thread("tests.benchmarks.columns", name):
                    found = {k: float(f"{v:.3g}") for k, v in json.loads(line)[name].items()}
                    keep(name, found)
                    print(name, found, flush=True)
            except subprocess.CalledProcessError as error:  # the others are measured all the same
                print(f"{name}: {error}", flush=True)
        else:
            keep(name, {"mixed": mixed, "start": start}[name]())


def mixed() -> list[dict[str, float]]:
    """Measure mixed batches against Hugging Face PEFT's loop."""
    return [json.loads(line) for line in on_one_thread("tests.benchmarks.mixed", "--json")]


def start(rounds: int = 9) -> dict[str, float]:
    """Compare what importing takes, and what installing puts on the disk."""

    def process(code: str) -> Callable[[], object]:
        return partial(subprocess.run, [sys.executable, "-c", code], check=True)

    codes = {"numpy": "import numpy", "ours": "import peft_any", "hf": "import peft"}
    codes["used"] = "from peft_any import PeftModel, Adapter"
    codes["hf used"] = "from peft import PeftModel, get_peft_model"
    calls = {name: process(code) for name, code in codes.items()}
    pairs: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            seconds = once(call)
            if i:  # the first of all fills the caches
                pairs[name].append(seconds)
    return {
        "import": over(pairs, "hf", "ours"),
        "import of what is used": over(pairs, "hf used", "used"),
        "import ÷ numpy": over(pairs, "ours", "numpy"),
        "size": installed("peft") / installed("peft_any"),
    }


def installed(name: str) -> int:
    """Count the bytes of a distribution with all that it requires."""
    sizes: dict[str, int] = {}
    waiting = [name]
    while waiting:
        one = waiting.pop().lower().replace("_", "-")
        if one in sizes:
            continue
        try:
            found = files(one) or []
        except PackageNotFoundError:
            continue
        paths = [Path(str(f.locate())) for f in found]
        sizes[one] = sum(p.stat().st_size for p in paths if p.is_file())
        for text in requires(one) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    own = DOCS.parent / "peft_any"
    if name == "peft_any":  # an editable installation lists no modules
        sizes["peft-any"] = sum(p.stat().st_size for p in own.rglob("*") if p.suffix != ".pyc")
    return sum(sizes.values())


def target(row: Compared, key: str) -> float:
    """Say how many times faster a column is to be."""
    return row.target if key.startswith(("merge", "unmerge")) else 1.0


def missed(row: Compared, found: dict[str, float]) -> list[str]:
    """Name the columns that miss their targets."""

    def short(key: str) -> bool:
        want = target(row, key)
        return found[key] < (NOISE if want == 1.0 else want)

    return [key for key in AGAINST if key in found and short(key)]


def beyond(row: Compared, found: dict[str, float], key: str) -> float | None:
    """Give the most that could be reached, where the target is above it."""
    most = found.get(MOST + key)
    return most if most is not None and most < target(row, key) else None


def figure(value: float) -> str:
    """Write a ratio with as many digits as it deserves."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def methods(results: dict[str, Any]) -> Iterator[str]:
    """Compare every method with Hugging Face PEFT."""
    yield "| HF PEFT ÷ ours | " + " | ".join(AGAINST) + " |"
    yield "|---|" + "---|" * len(AGAINST)
    for row in COMPARED:
        found = results.get(row.name)
        if found is None:
            continue
        below = missed(row, found)
        cells = []
        for key in AGAINST:
            if key in found:
                text = figure(found[key])
                if key in below:
                    most = beyond(row, found, key)
                    text += " (missed)" if most is None else f" (at most {figure(most)})"
                cells.append(text)
            else:
                gone = "base kept" if "merge, torch" in found else "not mergeable"
                cells.append(gone if "merge" in key else "–")
        yield f"| {row.name} | {' | '.join(cells)} |"


def alone(results: dict[str, Any]) -> Iterator[str]:
    """Compare every method with the base's product, the formula by hand, and a copy."""
    small = "µs over by hand, 64×64"
    yield (
        f"| on NumPy | call ÷ base | call ÷ by hand | the same, 1024×1024 | {small} | "
        "merge ÷ copy |"
    )
    yield f"|---|---|---|---|---|---|\n| target | – | – | {BOUND} | {MICROSECONDS:.0f} | – |"
    for row in COMPARED:
        found = results.get(row.name)
        if found is None:
            continue
        sign = "" if row.hand else " †"
        cells = [figure(found["call ÷ base"]), figure(found["call ÷ hand"]) + sign]
        for key, most in (("over hand, 1024²", BOUND), ("µs over hand, 64²", MICROSECONDS)):
            value = found.get(key)
            if value is None:
                cells.append("–")
            else:
                cells.append(f"{value:.3g}{' (missed)' if value > most else ''}")
        cells.append(figure(found["merge ÷ copy"]) if "merge ÷ copy" in found else "–")
        yield f"| {row.name} | {' | '.join(cells)} |"


def batches(results: dict[str, Any]) -> Iterator[str]:
    """Compare mixed batches."""
    head = "| 64 rows, LoRA r8, on torch | adapters | HF PEFT ÷ ours | HF PEFT ÷ the base alone |"
    yield f"{head} what adapters add, ÷ ours |"
    yield "|---|---|---|---|---|"
    for one in results.get("mixed", []):
        miss = ""
        if one["adapters"] == 16 and one["whole"] < MIXED:
            miss = f" (at most {figure(one['most'])})" if one["most"] < MIXED else " (missed)"
        where = f"{one['n']:.0f}×{one['n']:.0f}, {one['tokens']:.0f} a row"
        yield (
            f"| {where} | {one['adapters']:.0f} | {figure(one['whole'])}{miss} | "
            f"{figure(one['most'])} | {figure(one['own'])} |"
        )


def beginnings(results: dict[str, Any]) -> Iterator[str]:
    """Compare importing and installing."""
    found = results.get("start")
    if found is None:
        return
    yield "| HF PEFT ÷ ours | |\n|---|---|"
    yield f"| a process that imports the package | {figure(found['import'])} |"
    yield f"| one that imports `PeftModel` too | {figure(found['import of what is used'])} |"
    yield f"| bytes installed, with all requirements | {figure(found['size'])} |"
    yield ""
    yield f"`import peft_any` takes {found['import ÷ numpy']:.2f} times what `import numpy` does."


def misses(results: dict[str, Any]) -> str:
    """Say what falls short, in a sentence."""
    rows = [(row, results[row.name]) for row in COMPARED if row.name in results]
    said = [f"{row.name} ({'; '.join(below)})" for row, f in rows if (below := missed(row, f))]
    total = sum(key in f for _, f in rows for key in AGAINST)
    count = sum(len(missed(row, f)) for row, f in rows)
    end = f": {', '.join(said)}." if said else "."
    out = sum(beyond(row, f, key) is not None for row, f in rows for key in missed(row, f))
    text = (
        f"Of {total} figures against Hugging Face PEFT {count} miss their target, {out} of them "
        f"where it is out of reach{end}"
    )
    lacking = [row.name for row in COMPARED if row.name not in results]
    return f"{text} Not measured yet: {', '.join(lacking)}." if lacking else text


def page(results: dict[str, Any]) -> str:
    """Write the page."""
    about = f"Ratios alone; NumPy {np.__version__}, float32, on {machine()}."
    lines = [
        "# Compared with Hugging Face PEFT",
        "",
        about,
        NOTES.rstrip(),
        "",
        misses(results),
        "",
    ]
    lines += ["![HF PEFT ÷ ours, by method and column](comparison.png)", ""]
    lines += [*methods(results), "", "## Beside the base and the formula by hand", ""]
    lines += [*alone(results), "", "## Many adapters in one batch", ""]
    if "mixed" in results:
        target = f"Target: {MIXED:.0f} with 16 adapters."
        lines += [f"{target} The base's own product is on both sides: none can be quicker.", ""]
        lines += ["![HF PEFT ÷ ours, by the number of adapters](comparison-mixed.png)", ""]
    lines += [*batches(results), "", "## Importing and installing", "", *beginnings(results)]
    return "\n".join(lines) + "\n"


def plots(results: dict[str, Any]) -> None:
    """Draw both figures."""
    from matplotlib.figure import Figure

    rows = [row for row in COMPARED if row.name in results]
    drawn = Figure(figsize=(8, 0.24 * len(rows) + 1.2), layout="constrained")
    axes = drawn.subplots(1, len(PARTS), sharey=True)
    places = np.arange(len(rows))
    for ax, part in zip(axes, PARTS, strict=True):
        for mark, library in zip("o|", LIBRARIES, strict=True):
            values = [results[row.name].get(f"{part}, {library}", np.nan) for row in rows]
            ax.plot(values, places, mark, label=library, color="C0" if mark == "o" else "C3")
        ax.set(xscale="log", title=part)
        ax.axvline(1.0, color="0.5", lw=0.8)
        ax.grid(axis="x", lw=0.3)
    axes[0].set_yticks(places, [row.name for row in rows], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    drawn.supxlabel("HF PEFT ÷ ours: right of 1, ours is faster", fontsize=8)
    drawn.savefig(DOCS / "comparison.png", dpi=110)
    if "mixed" not in results:
        return
    drawn = Figure(figsize=(6, 3.4), layout="constrained")
    ax = drawn.subplots()
    found = results["mixed"]
    for n, tokens in dict.fromkeys((one["n"], one["tokens"]) for one in found):
        line = [one for one in found if (one["n"], one["tokens"]) == (n, tokens)]
        points = [one["adapters"] for one in line], [one["whole"] for one in line]
        ax.plot(*points, "o-", label=f"{n:.0f}×{n:.0f}, {tokens:.0f} a row")
    ax.set(xscale="log", yscale="log", xlabel="adapters in a batch of 64 rows")
    ax.set_ylabel("HF PEFT ÷ ours")
    ax.axhline(1.0, color="0.5", lw=0.8)
    ax.legend(fontsize=7)
    drawn.savefig(DOCS / "comparison-mixed.png", dpi=110)


def make(names: list[str]) -> None:
    """Measure, and write page and plots."""
    measure(names)
    results = known()
    (DOCS / "comparison.md").write_text(page(results), encoding="utf-8")
    plots(results)
    print(misses(results))

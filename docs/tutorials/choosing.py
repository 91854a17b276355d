"""What a change can be, against what it costs: rank of ΔW and trained parameters, by method.

    pip install ".[plot]"
    python choosing.py --figure choosing.png

Seconds. Parameters are drawn at random on a layer of 64 inputs and outputs, not trained: what
counts is which changes a method can express.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from accuracy import EVERY, FAMILIES, Family, configs, of

from peft_any import PeftModel

SIDE = 64
SHARING: dict[str, Family] = {
    "frod": Family(EVERY, of("sparse_rate", 0.0, 0.01, 0.1)),
    "tinylora": Family(EVERY, of("u", 2, 8, 16), {"r": 4}),
    "unilora": Family(EVERY, of("theta_d_length", 16, 64, 256)),
    "vblora": Family(EVERY, of("num_vectors", 8, 16, 64), {"vector_length": 16}),
}
"""Methods whose arrays many layers share, which one network of three layers shows little of."""
APART: dict[str, Family] = {
    "ln_tuning": Family(EVERY, [{}]),
    "osf": Family(EVERY, of("effective_rank", 62, 56, 32)),
    "poly": Family(EVERY, of("r", 1, 2, 4, 8)),
}
"""Methods for networks of other kinds: with norms, with tasks to forget, with several tasks."""
ALL = FAMILIES | SHARING | APART


class Point(NamedTuple):
    """A configuration: what it trains, and the change that random values of that make."""

    method: str
    size: str
    trained: int
    rank: int
    spread: float


def base() -> dict[str, np.ndarray]:
    """Draw a layer, and the norm before it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((SIDE, SIDE)) / SIDE**0.5
    return {"fc.weight": weight, "fc.bias": np.zeros(SIDE), "norm.weight": np.ones(SIDE)}


def change(name: str, config: object) -> tuple[int, np.ndarray]:
    """Give how many numbers an adapter trains, and ΔW at random ones of them."""
    rng, model = np.random.default_rng(1), PeftModel(base())
    layer = "norm" if name == "ln_tuning" else "fc"
    adapter = model.add(name, replace(config, target_modules=[layer]), dtype="float64")
    model.update(
        {
            name: {
                site: {k: v + 0.3 * rng.standard_normal(v.shape) for k, v in p.items()}
                for site, p in adapter.trainable().items()
            }
        }
    )
    delta = model.merge()[f"{layer}.weight"] - base()[f"{layer}.weight"]
    return adapter.num_parameters, np.diag(delta) if delta.ndim == 1 else delta


def points(names: list[str]) -> Iterator[Point]:
    """Measure every configuration: the rank, and how evenly the singular values are spread."""
    for name in names:
        for size, config in configs(name, None, ALL):
            trained, delta = change(name, config)
            values = np.linalg.svd(delta, compute_uv=False)
            rank = int(np.sum(values > 1e-9 * max(values[0], 1e-30)))
            shares = values[values > 0] / max(values.sum(), 1e-30)
            spread = float(np.exp(-np.sum(shares * np.log(shares)))) if rank else 0.0
            yield Point(name, size, trained, rank, spread)


def draw(found: list[Point], path: str) -> None:
    """Draw the ranks, a line for each method."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    names = dict.fromkeys(point.method for point in found)
    for i, name in enumerate(names):
        here = [point for point in found if point.method == name and point.rank]
        if here:
            x, y = [p.trained for p in here], [p.spread for p in here]
            axes.plot(x, y, marker="osD^v"[i // 10 % 5], color=f"C{i % 10}", lw=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel="trained parameters")
    axes.set(ylabel="effective rank of ΔW", title=f"A layer of {SIDE} inputs and outputs")
    axes.axvline(SIDE * SIDE, color="0.7", lw=1, ls=":")
    axes.legend(ncols=2, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", metavar="PATH")
    parser.add_argument("--only", nargs="*", default=[*ALL], choices=[*ALL])
    given = parser.parse_args()
    found = [*points(given.only)]
    print("| method | size | trained parameters | rank of ΔW | effective rank |")
    print("|---|---|---|---|---|")
    for method, size, trained, rank, spread in found:
        print(f"| {method} | {size} | {trained:,} | {rank} | {spread:.1f} |")
    if given.figure:
        draw(found, given.figure)


if __name__ == "__main__":
    main()

"""Error against trained parameters: every method, in several sizes, on the demo's network and data.

    pip install ".[plot]"
    python accuracy.py --figure accuracy.png

Some twenty minutes on two cores. ``--steps 5 --sizes 1`` shows that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from peft_any import PeftModel
from peft_any.backend import namespace, resolve
from peft_any.demo.airfoil import BACK, averaged, network, with_mirror_images
from peft_any.demo.specialise import Task
from peft_any.errors import TrainingError
from peft_any.registry import Config, method_for
from peft_any.train import adamw, cosine, fit

EVERY, EVEN, SQUARE = r"net\.\d", r"net\.[2468]", r"net\.[246]"
"""All five layers; those of 64 inputs; those of 64 inputs and 64 outputs."""
RATES = 1e-4, 5e-4, 2e-3, 8e-3, 3e-2
ASIDE, BATCH = 500, 128
"""Of the flights to learn from, how many choose the rate; and flights per step."""


class Family(NamedTuple):
    """A method: its layers, what changes from size to size, and what does not."""

    layers: str
    sizes: list[dict[str, Any]]
    fixed: dict[str, Any] = {}  # noqa: RUF012 - never written to
    peft_type: str = ""


def of(name: str, *values: Any) -> list[dict[str, Any]]:
    """Give sizes that differ in one field."""
    return [{name: value} for value in values]


RANKS = of("r", 1, 2, 4, 8, 16)
FAMILIES: dict[str, Family] = {
    "lora": Family(EVERY, RANKS, {"lora_alpha": 16}),
    "dora": Family(EVERY, RANKS, {"lora_alpha": 16, "use_dora": True}, "LORA"),
    "adalora": Family(EVERY, of("init_r", 2, 8), {"lora_alpha": 16, "total_step": 10**6}),
    "loha": Family(EVERY, of("r", 1, 2, 4, 8), {"alpha": 8}),
    "lokr": Family(EVERY, of("r", 1, 2, 4, 8), {"alpha": 8}),
    "ia3": Family(EVERY, [{}], {"feedforward_modules": []}),
    "vera": Family(EVERY, of("r", 16, 64, 256)),
    "oft": Family(EVEN, of("oft_block_size", 2, 4, 8, 16, 32), {"r": 0}),
    "boft": Family(EVEN, of("boft_n_butterfly_factor", 1, 2, 3), {"boft_block_size": 4}),
    "hra": Family(EVERY, of("r", 2, 4, 8, 16)),
    "beft": Family(EVERY, [{}]),
    "c3a": Family(SQUARE, of("block_size", 64, 32, 16, 8)),
    "deft": Family(EVERY, of("r", 2, 8)),
    "delora": Family(EVERY, RANKS, {"delora_lambda": 0.1}),
    "fourierft": Family(EVERY, of("n_frequency", 100, 300, 1000), {"init_weights": True}),
    "waveft": Family(EVERY, of("n_frequency", 100, 300, 1000)),
    "glora": Family(EVERY, of("r", 2, 8)),
    "gralora": Family(SQUARE, of("r", 2, 4, 8, 16), {"alpha": 16}),
    "hira": Family(EVERY, RANKS),
    "miss": Family(EVERY, of("r", 1, 2, 4, 8)),
    "peanut": Family(EVERY, of("r", 2, 8), {"act_fn": "silu"}),
    "pvera": Family(EVERY, of("r", 16, 64, 256)),
    "randlora": Family(EVERY, of("r", 4, 8, 16), {"randlora_alpha": 64}),
    "road": Family(EVERY, of("variant", "road_1", "road_2", "road_4"), {"group_size": 2}),
    "shira": Family(EVERY, RANKS, {"random_seed": 0}),
    "supertuning": Family(EVERY, of("sparsity", 0.99, 0.95, 0.8)),
    "psoft": Family(EVEN, of("r", 4, 8, 16, 32), {"psoft_alpha": 1}),
    "adamss": Family(EVERY, of("subspace_rank", 1, 2, 4), {"r": 16}),
}


@dataclass(frozen=True)
class Point:
    """A configuration's best rate, its errors of CL and CD, and how much it trained."""

    method: str
    size: str
    trained: int
    rate: float
    cl_mae: float
    cd_rel: float


def configs(
    name: str, most: int | None, families: Mapping[str, Family] = FAMILIES
) -> Iterator[tuple[str, Config]]:
    """Give a method's first sizes, each with its configuration."""
    family = families[name]
    make = method_for(family.peft_type or name.upper())
    for size in family.sizes[:most]:
        label = ", ".join(f"{value}" if field == "variant" else f"{field}={value}"
                          for field, value in size.items())  # fmt: skip
        yield label or "–", make(target_modules=family.layers, **family.fixed, **size)


def loss(bound: Any, batch: Any) -> Any:
    """Mean square of what the network, averaged over mirror images, is off by."""
    x, want = batch["x"], batch["want"]
    both = namespace(x).concat([x[:, 0, :], x[:, 1, :]])
    gap = averaged(network(bound.weights, both), batch["back"][0, :]) - want
    return namespace(gap).mean(gap * gap)


def data_of(task: Task) -> dict[str, Any]:
    """Give flights with their mirror images, the answers, and the mirror's signs, row by row."""
    n = len(task.inputs)
    pairs = np.stack(np.split(with_mirror_images(task.inputs), 2), axis=1)
    return {"x": pairs, "want": task.targets, "back": np.broadcast_to(BACK, (n, 3))}


def point(task: Task, method: str, size: str, config: Config, *, steps: int, seed: int) -> Point:
    """Train by each rate; choose by the flights put aside, measure on the unseen ones."""
    data = data_of(task)
    aside = {k: v[:ASIDE] for k, v in data.items()}
    seen = {k: v[ASIDE:] for k, v in data.items()}
    best, found = float("inf"), None
    for rate in RATES:
        model = PeftModel(task.base)
        model.add(method, config, seed=seed)
        optimizer = adamw(cosine(rate, steps, warmup=steps // 10), weight_decay=0.0)
        try:
            run = fit(model, loss, seen, steps=steps, batch_size=BATCH, seed=seed, every=steps,
                      optimizer=optimizer, max_grad_norm=1.0, held_out=[aside])  # fmt: skip
        except TrainingError:
            continue  # too large a rate
        if isfinite(run.best) and run.best < best:
            best = run.best
            outputs = network(model.merge(), with_mirror_images(task.unseen))
            found = Point(method, size, model.parameters.trainable, rate, *task.measure(outputs))
    if found is None:
        raise TrainingError(f"{method} {size}: no rate of {RATES} trained it")
    return found


def draw(points: list[Point], base: float, path: str) -> None:
    """Draw CL's error against trained parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(p.method for p in points))
    for i, name in enumerate(names):
        own = sorted((p.trained, p.cl_mae) for p in points if p.method == name)
        style = {"marker": "osD^vPX"[i // 10 % 7], "markersize": 5, "linewidth": 1}
        axes.plot(*zip(*own, strict=True), label=name, color=f"C{i % 10}", **style)
    axes.axhline(base, color="grey", linestyle=":", label="not adapted")
    axes.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="mean error of CL")
    axes.yaxis.set_minor_formatter("{x:.3f}")
    axes.yaxis.set_major_formatter("{x:.3f}")
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", type=int, metavar="N", help="the first N of each method")
    parser.add_argument("--figure", metavar="PNG")
    given = parser.parse_args()

    task, points = Task.draw(given.seed, resolve("numpy")), []
    base, drag = task.measure(network(task.base, with_mirror_images(task.unseen)))
    print("| method | size | trained parameters | rate | error of CL | error of CD |")
    print("|---|---|---|---|---|---|")
    print(f"| not adapted | – | 0 | – | {base:.4f} | {drag:.2%} |")
    for method in given.only:
        for size, config in configs(method, given.sizes):
            p = point(task, method, size, config, steps=given.steps, seed=given.seed)
            points.append(p)
            said = f"{p.trained:,} | {p.rate:g} | {p.cl_mae:.4f} | {p.cd_rel:.2%} |"
            print(f"| {method} | {size} | {said}", flush=True)
    if given.figure:
        draw(points, base, given.figure)


if __name__ == "__main__":
    main()

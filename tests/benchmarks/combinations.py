"""Two LoRAs made one of a smaller rank: by their factors, and by the decomposition of ΔW."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from peft_any import combine
from peft_any.adapter import Adapter
from peft_any.algebra.lowrank import Cut, total, truncate
from peft_any.methods.lora import LoraConfig
from tests.benchmarks.timing import once

N, R = 2048, 16
TARGET = 100


def adapters(n: int, r: int) -> list[tuple[Adapter, float]]:
    """Make two adapters of one layer (n, n), with weights."""
    rng = np.random.default_rng(0)
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["fc"])

    def draw(*shape: int) -> Any:
        return (rng.standard_normal(shape) / n**0.5).astype("float32")

    pairs = [{"lora_A.weight": draw(r, n), "lora_B.weight": draw(n, r)} for _ in range(2)]
    return [(Adapter(config, {"fc": p}), w) for p, w in zip(pairs, (0.7, -0.3), strict=True)]


def combinations(n: int = N, rounds: int = 3) -> Iterator[str]:
    """Compare with the SVD of ΔW as NumPy has it, in the adapters' single precision.

    One decomposition takes seconds, so each of a few is set against the fastest of several
    combinations around it.
    """
    given = adapters(n, R)
    deltas = [w * a.sites["fc"]["lora_B.weight"] @ a.sites["fc"]["lora_A.weight"] for a, w in given]
    whole = deltas[0] + deltas[1]
    pairs = [
        (w, (a.sites["fc"]["lora_B.weight"], a.sites["fc"]["lora_A.weight"])) for a, w in given
    ]
    ways = {
        f"`combine(…, rank={R})`, record included": lambda: combine(given, rank=R),
        "its truncation alone": lambda: truncate(total(pairs), Cut(rank=R)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    dense = []
    for _ in range(rounds):
        for name, way in ways.items():
            times[name] += [once(way) for _ in range(10)]
        dense.append(once(lambda: np.linalg.svd(whole, full_matrices=False)))
    yield f"| two LoRAs r{R} of a {n}×{n} layer, cut to rank {R} | SVD of ΔW ÷ ours | target |"
    yield "|---|---|---|"
    for name, measured in times.items():
        ratio = min(dense) / min(measured)
        yield f"| {name} | {ratio:.0f}{'' if ratio >= TARGET else ' (missed)'} | {TARGET} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=N)
    print(*combinations(parser.parse_args().size), sep="\n")

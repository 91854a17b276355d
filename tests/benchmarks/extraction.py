"""The leading part of a matrix: by the range finder with its proof, and by the decomposition."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from peft_any.algebra.blockwise import distance
from peft_any.algebra.lowrank import Cut
from peft_any.algebra.rangefinder import Approximation, approximate
from peft_any.backend import resolve
from peft_any.rng import Fresh
from tests.benchmarks.timing import once

N, R = 2048, 16
TARGET, CLOSE = 10, 1.01


def matrices(n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Make square matrices whose singular values fall at different speeds."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    index = np.arange(1, n + 1)
    yield "1/i", ((u / index) @ v).astype("float32")
    yield "1/√i", ((u / index**0.5) @ v).astype("float32")
    yield "all alike", (u @ v).astype("float32")
    yield "those of Gaussian noise", rng.standard_normal((n, n)).astype("float32")


def extractions(n: int = N, rounds: int = 1) -> Iterator[str]:
    """Compare with NumPy's SVD in single precision, in time and in what is left over.

    Ours includes the proof, and measuring the residual of the factors.
    """
    yield f"| rank {R} of {n}×{n}, singular values | SVD ÷ ours | residual ÷ the smallest |"
    yield "|---|---|---|"
    yield f"| target | {TARGET} | {CLOSE} |"
    for name, delta in matrices(n):
        found: list[Approximation] = []

        def ours(delta: np.ndarray = delta, found: list[Approximation] = found) -> None:
            found[:] = [approximate(delta, Cut(rank=R), Fresh(0, resolve("numpy")))]
            distance(delta, found[0].factors)

        times, dense = [], []
        for _ in range(rounds):
            times += [once(ours) for _ in range(5)]
            dense.append(once(lambda d=delta: np.linalg.svd(d, full_matrices=False)))
        s = np.linalg.svd(delta, compute_uv=False).astype("float64")
        speed = min(dense) / min(times)
        close = distance(delta, found[0].factors) / float(np.linalg.norm(s[R:]))
        slow = "" if speed >= TARGET else " (missed)"
        far = "" if close <= CLOSE else " (missed)"
        yield f"| {name} | {speed:.0f}{slow} | {close:.4f}{far} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=N)
    for row in extractions(parser.parse_args().size):
        print(row, flush=True)

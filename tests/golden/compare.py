"""How golden files that have just been made are compared with the committed ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

WEIGHTS = "adapter_model.safetensors"
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


def written_or_compared(
    folder: Path,
    rows: Iterable[tuple[str, str]],
    record: Callable[[str, str], tuple[dict[str, np.ndarray], dict[str, str]]],
) -> int:
    """Write a file for each row and dtype, or compare; return the number of files that differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check, wrong = parser.parse_args().check, 0
    folder.mkdir(exist_ok=True)
    for row, dtype in rows:
        path = folder / f"{row}{'' if dtype == 'float32' else f'@{dtype}'}.safetensors"
        tensors, texts = record(row, dtype)
        if not check:
            path.write_bytes(safetensors.numpy.save(tensors, texts))
            continue
        said = differences(path, tensors, texts, TOLERANCE[dtype])
        for line in said:
            print(f"{path.stem}: {line}")
        wrong += bool(said)
    return wrong


def differences(
    path: Path, tensors: dict[str, np.ndarray], texts: dict[str, str], rtol: float
) -> list[str]:
    """Say where a committed file differs from what has just been made."""
    if not path.is_file():
        return ["it is missing"]
    old = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        said = [] if file.metadata() == texts else ["the configuration differs"]
    if old.keys() != tensors.keys():
        return [*said, f"tensors differ: {sorted(old.keys() ^ tensors.keys())}"]
    for key, new in tensors.items():
        if key.endswith(WEIGHTS):
            a, b = (safetensors.numpy.load(np.array(v).tobytes()) for v in (old[key], new))
            pairs = {f"{key}: {k}": (a[k], b[k]) for k in a.keys() & b.keys()}
            said += [f"{key}: keys differ"] if a.keys() != b.keys() else []
        else:
            pairs = {key: (old[key], new)}
        for name, (was, now) in pairs.items():
            if was.shape != now.shape or not close(was, now, rtol):
                said.append(f"{name} differs")
    return said


def close(a: np.ndarray, b: np.ndarray, rtol: float) -> bool:
    """Compare relative to the largest entry."""
    if a.dtype.kind in "iu":
        return bool(np.array_equal(a, b))
    off, size = (float(np.max(np.abs(x), initial=0.0)) for x in (a - b, a))
    return off <= rtol * size or rtol == inf

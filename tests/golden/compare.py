"""How golden files that have just been made are compared with the committed ones."""

from __future__ import annotations

from math import inf
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

WEIGHTS = "adapter_model.safetensors"
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


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

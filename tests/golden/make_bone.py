r"""Record what Hugging Face PEFT made of Bone, which it had up to 0.18, before it was MiSS.

Run from the repository's root, with a release that has it before the installed one, as the
``golden`` session of nox does::

    pip install --target OLD --no-deps peft==0.17.1 transformers==4.56.2 \
        "huggingface-hub<1" "tokenizers<0.23"
    PYTHONPATH=OLD python -m tests.golden.make_bone            # write tests/golden/bone/
    PYTHONPATH=OLD python -m tests.golden.make_bone --check    # compare with what is committed

A file is laid out as those of `tests.golden.make`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from tests.golden.compare import written_or_compared

HERE = Path(__file__).parent / "bone"
SHAPE = {"plain": (8, 12), "odd": (6, 10), "bat": (8, 12), "random": (8, 12), "bias": (8, 12)}
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {},
    "bat": {"init_weights": "bat"},
    "random": {"init_weights": False},
    "bias": {"bias": "bone_only"},
}


def record(row: str, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Let Bone adapt a layer, with trained-looking numbers, and pack what it gives."""
    rng = np.random.default_rng([*row.encode()])
    n_out, n_in = SHAPE[row]
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(n_in, n_out))
    model = model.to(getattr(torch, dtype)).eval()
    base = {
        "fc.weight": rng.standard_normal((n_out, n_in)).astype(dtype),
        "fc.bias": rng.standard_normal(n_out).astype(dtype),
    }
    model.load_state_dict({k: torch.tensor(v) for k, v in base.items()})
    theirs = peft.get_peft_model(model, peft.BoneConfig(r=4, target_modules=["fc"], **FIELDS[row]))
    for name, parameter in theirs.named_parameters():
        if "bone_" in name:
            parameter.data = torch.tensor(0.3 * rng.standard_normal(parameter.shape).astype(dtype))
    x = rng.standard_normal((3, n_in)).astype(dtype)
    with torch.no_grad():
        y = theirs(torch.tensor(x)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        data = (Path(folder) / "adapter_model.safetensors").read_bytes()
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
    merged = theirs.merge_and_unload().state_dict()
    tensors = {f"base.{k}": v for k, v in base.items()} | {"x": x, "y": y}
    tensors |= {f"merged.{k}": v.numpy() for k, v in merged.items()}
    tensors["adapter_model.safetensors"] = np.frombuffer(data, dtype="uint8")
    return tensors, {"adapter_config.json": text, "peft": peft.__version__}


def main() -> int:
    """Write all rows, two in float64 too, or compare; return the number of files that differ."""
    rows = [(row, "float32") for row in FIELDS] + [(row, "float64") for row in ("odd", "bat")]
    return written_or_compared(HERE, rows, record)


if __name__ == "__main__":
    sys.exit(main())

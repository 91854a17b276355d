"""Record what Hugging Face PEFT makes of LoRA on stacks of experts: all weights of small models.

Run in an environment with peft and transformers 5::

    python -m tests.golden.make_experts            # write tests/golden/experts/<row>.safetensors
    python -m tests.golden.make_experts --check    # compare with what is committed

A file is laid out as those of `tests.golden.make`; ``apart.…`` is the base as transformers saves
it, where that keeps experts apart.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.numpy
import torch

from tests.golden.compare import written_or_compared
from tests.hf.models import make
from tests.hf.reference import config_text

HERE = Path(__file__).parent / "experts"
SIZES: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 6,
    "num_local_experts": 3,
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": [], "target_parameters": BOTH}),
    "mixtral-all-linear": ("mixtral", {"target_modules": "all-linear"}),
    "gpt-oss": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": BOTH, "use_rslora": True},
    ),
}


def model_of(name: str, dtype: torch.dtype) -> Any:
    """Make a model with experts (experts, n_out, n_in), or for GPT-OSS transposed."""
    torch.manual_seed(0)
    return make(name, **SIZES, **({"head_dim": 4} if name == "gpt_oss" else {})).to(dtype)


def record(row: str, dtype: torch.dtype) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Let Hugging Face PEFT adapt a model, with trained-looking numbers, and pack what it gives."""
    name, options = ROWS[row]
    base = model_of(name, dtype)
    tensors = {f"base.{k}": v.numpy().copy() for k, v in base.state_dict().items()}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=5, **options))
    torch.manual_seed(1)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        data = (Path(folder) / "adapter_model.safetensors").read_bytes()
        config = json.loads(config_text(Path(folder)))
        for field in ("target_modules", "target_parameters"):  # sets, there
            config[field] = sorted(config[field])
        if name == "mixtral":
            model_of(name, dtype).save_pretrained(Path(folder) / "base")
            saved = safetensors.numpy.load_file(Path(folder) / "base" / "model.safetensors")
            tensors |= {f"apart.{k}": v for k, v in saved.items()}
    tensors |= {f"merged.{k}": v.numpy() for k, v in theirs.merge_and_unload().state_dict().items()}
    tensors["adapter_model.safetensors"] = np.frombuffer(data, dtype="uint8")
    return tensors, {"adapter_config.json": json.dumps(config, indent=2), "peft": peft.__version__}


def main() -> int:
    """Write all rows in float32 and float64, or compare; return the number of files that differ."""
    rows = [(row, dtype) for row in ROWS for dtype in ("float32", "float64")]
    return written_or_compared(HERE, rows, lambda row, dtype: record(row, getattr(torch, dtype)))


if __name__ == "__main__":
    sys.exit(main())

"""A small network and adapters of it, for the tests on arrays that are spread or lazy."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lokr import LoKrConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.vera import VeraConfig

_rng = np.random.default_rng(0)
HOST = {
    "fc1.weight": _rng.standard_normal((16, 8)).astype("float32"),
    "fc1.bias": _rng.standard_normal(16).astype("float32"),
    "fc2.weight": _rng.standard_normal((8, 16)).astype("float32"),
}
INPUT = _rng.standard_normal((4, 8)).astype("float32")
BOTH = {"target_modules": ["fc1", "fc2"]}
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, init_lora_weights=False, **BOTH),
    "dora": LoraConfig(r=2, use_dora=True, init_lora_weights=False, **BOTH),
    "oft": OFTConfig(oft_block_size=4, init_weights=False, **BOTH),
    "lokr": LoKrConfig(r=2, init_weights=False, **BOTH),
    "vera": VeraConfig(r=4, **BOTH),
    "ia3": IA3Config(feedforward_modules=["fc2"], init_ia3_weights=False, **BOTH),
}


def network(model: Any, params: Any, x: Any, xp: Any) -> Any:
    """Run two adapted layers with tanh between them."""
    layers = model.bind(params).layers
    return layers["fc2"](xp.tanh(layers["fc1"](x)))

"""X-LoRA, live: the gate's scalings and the scaled experts are Hugging Face PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

from peft_any.integrations.torch import attach  # noqa: E402
from peft_any.xlora import experts_of, xlora_scalings  # noqa: E402
from tests.hf.models import base_of, quietly  # noqa: E402
from tests.hf.test_experts import IDS, loaded, saved  # noqa: E402
from tests.hf.test_live import ROUNDING, compare  # noqa: E402

LAYERS = [
    f"model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("depth", "fields"),
    [
        (1, {"softmax_temperature": 0.5}),
        (2, {"layerwise_scalings": True, "top_k_lora": 2, "global_scaling_weight": 1.5}),
        (3, {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}),
    ],
)
def test_xlora_is_hfs(depth: int, fields: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, 3)
    base = base_of("llama").eval().to(getattr(torch, dtype))
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        xlora_depth=depth,
        xlora_size=8,
        adapters={str(i): path for i, path in enumerate(experts)},
        **fields,
    )
    with quietly(), torch.no_grad():
        theirs = peft.get_peft_model(base, config).eval().to(getattr(torch, dtype))
        want = theirs(IDS).logits
        gate = theirs.base_model.internal_xlora_classifier
        p = gate.state_dict()
        ours = base_of("llama").eval().to(getattr(torch, dtype))
        hidden = ours(IDS, output_hidden_states=True).hidden_states[-1]
        raw = {k: v for k, v in fields.items() if "top" not in k and "global" not in k}
        first = xlora_scalings(p, hidden, len(LAYERS), **raw)
        compare(
            {"s": first.numpy()},
            {"s": theirs.base_model.internal_xlora_scalings.numpy()},
            ROUNDING[dtype],
        )
        scalings = xlora_scalings(p, hidden, len(LAYERS), **fields)
        mixed = experts_of([loaded(path, dtype) for path in experts], order=LAYERS)
        plain = ours(IDS).logits
        with attach(ours, mixed).routed(scalings=scalings):
            got = ours(IDS).logits
    assert (want - plain).abs().max() > 0.01
    compare({"y": got.numpy()}, {"y": want.numpy()}, ROUNDING[dtype])

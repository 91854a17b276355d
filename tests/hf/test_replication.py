"""Adapters of Hugging Face PEFT with `layer_replication`: merged on the repeated base, its logits.

There such an adapter cannot be merged at all, so what is compared is what the models compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from peft_any import (  # noqa: E402
    Adapter,
    ConfigError,
    PeftModel,
    merge_checkpoint,
    replicate_checkpoint,
    replicate_layers,
)
from tests.hf.models import make, quietly  # noqa: E402
from tests.hf.reference import state_of  # noqa: E402

RUNS = [[0, 2], [1, 3]]
ROWS = {
    "lora": (peft.LoraConfig, {"r": 2, "target_modules": ["q_proj", "down_proj"]}),
    "dora": (peft.LoraConfig, {"r": 2, "use_dora": True, "target_modules": ["q_proj"]}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 2, "total_step": 9, "target_modules": ["q_proj"]}),
}


def llama(dtype: torch.dtype, layers: int = 3) -> Any:
    torch.manual_seed(0)
    return make("llama", num_hidden_layers=layers).to(dtype).eval()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("row", ROWS)
def test_merged_on_the_repeated_base_it_is_their_model(
    row: str, dtype: torch.dtype, rtol: float, tmp_path: Path
) -> None:
    base = llama(dtype)
    base.save_pretrained(tmp_path / "base")
    weights = state_of(base)
    make, options = ROWS[row]
    with quietly():
        config = make(**options, layer_replication=RUNS)
        theirs = peft.get_peft_model(llama(dtype), config).eval()
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with quietly():
        theirs.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        want = theirs(tokens).logits.numpy()

    adapter = Adapter.load(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="peft-any replicate --base BASE --layers 0:2,1:3"):
        PeftModel(weights).add("a", adapter)
    model = PeftModel(replicate_layers(weights, RUNS))
    model.add("a", adapter)
    model["a"].save(tmp_path / "again")
    deep = llama(dtype, layers=4)
    deep.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in model.merge().items()})

    replicate_checkpoint(tmp_path / "base", RUNS, tmp_path / "deep")
    merge_checkpoint(tmp_path / "deep", tmp_path / "again", tmp_path / "merged")
    with quietly():
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
        again = peft.PeftModel.from_pretrained(llama(dtype), tmp_path / "again").eval()
    with torch.no_grad():
        for ours in (deep, loaded.eval(), again):
            got = ours(tokens).logits.numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())

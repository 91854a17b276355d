"""Combinations that the tables do not hold: adapters as others make them, on other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from safetensors.torch import load_file as torch_file  # noqa: E402

from peft_any import merge_checkpoint, verify_checkpoint  # noqa: E402
from peft_any.adapter import Adapter  # noqa: E402
from peft_any.errors import TargetError  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from tests.hf.models import GROUPED, base_of, outputs, quietly  # noqa: E402
from tests.hf.reference import state_of  # noqa: E402
from tests.hf.whole import close, compare, merged  # noqa: E402

MASKED: dict[str, dict[str, Any]] = {
    "bias-all": {"target_modules": ["query"], "bias": "all"},
    "bias-of-the-head": {"target_modules": ["query", "decoder"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["query", "decoder"], "lora_bias": True},
    "head-saved": {"target_modules": ["query"], "modules_to_save": ["decoder"]},
    "block-saved": {"target_modules": ["query"], "modules_to_save": ["predictions"]},
}


def trained(model: Any, config: Any, folder: Path) -> Any:
    """Let Hugging Face PEFT adapt a model, move what is trained, and save it."""
    with quietly(), torch.no_grad():
        theirs = peft.get_peft_model(model, config).eval()
        draw = torch.Generator().manual_seed(1)
        for p in theirs.parameters():
            if p.requires_grad:  # in place: a tie lies in the memory
                p.add_(torch.randn(p.shape, generator=draw) / 8)
        theirs.save_pretrained(folder)
    return theirs


def merged_alike(folder: Path, theirs: Any, name: str, cls: Any) -> None:
    """Merge on disk, and hold what transformers makes of that to HF PEFT's model."""
    merge_checkpoint(folder / "base", folder / "a", folder / "out")
    verify_checkpoint(folder / "base", folder / "a", folder / "out")
    with quietly():
        ours = cls.from_pretrained(folder / "out").eval()
    close(outputs(ours, name), outputs(theirs, name))


@pytest.mark.parametrize("fields", MASKED.values(), ids=[*MASKED])
def test_a_masked_heads_bias_follows_its_tie(fields: dict[str, Any], tmp_path: Path) -> None:
    model = base_of("bert", "BertForMaskedLM", max_position_embeddings=12)
    model.save_pretrained(tmp_path / "base")
    theirs = trained(model, peft.LoraConfig(r=2, **fields), tmp_path / "a")
    merged_alike(tmp_path, theirs, "bert", transformers.BertForMaskedLM)


def test_a_layer_beside_stacked_experts_goes_onto_a_base_with_experts_apart(
    tmp_path: Path,
) -> None:
    sizes = {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    torch.manual_seed(0)
    with quietly():
        config = transformers.Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=20)
        model = transformers.Qwen2MoeForCausalLM(config)
        model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"])
    theirs = trained(model, lora, tmp_path / "a")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    verify_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert any("experts.0.up_proj" in name for name in got)
    want = state_of(theirs.merge_and_unload())
    both = got.keys() & want.keys()
    compare({k: got[k] for k in both}, {k: want[k] for k in both})


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
def test_a_start_taken_out_of_the_base_beside_an_embedding(
    init: str, dora: bool, table: str, tmp_path: Path
) -> None:
    names = [table, "q_proj"]  # the table is saved along, less the start
    lora = peft.LoraConfig(r=2, init_lora_weights=init, use_dora=dora, target_modules=names)
    theirs = trained(base_of("llama"), lora, tmp_path / "a")
    adapter, weights = Adapter.load(tmp_path / "a"), state_of(base_of("llama"))
    adapter.save(tmp_path / "raw")
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "raw" / part).read_bytes() == (tmp_path / "a" / part).read_bytes()
    ours = PeftModel(weights)
    ours.add("a", adapter, rederive=True)
    compare(ours.merge(), merged(theirs, weights))
    ours["a"].save(tmp_path / "plain")
    with quietly():
        again = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path / "plain")
    compare(ours.merge(), merged(again, weights))


MAMBA: dict[str, dict[str, Any]] = {
    "table": {"target_modules": ["x_proj", "embeddings"]},
    "copy": {"target_modules": ["x_proj"], "modules_to_save": ["embeddings"]},
    "head": {"target_modules": ["x_proj", "lm_head"]},
    "rows": {"target_modules": ["x_proj"], "trainable_token_indices": {"embeddings": [1, 5]}},
}


@pytest.mark.parametrize("fields", MAMBA.values(), ids=[*MAMBA])
def test_a_tied_table_of_another_name_is_parted_from_its_head(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with quietly():
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, time_step_rank=4))
        model.save_pretrained(tmp_path / "base")
    theirs = trained(model, peft.LoraConfig(r=2, **fields), tmp_path / "a")
    merged_alike(tmp_path, theirs, "mamba", transformers.MambaForCausalLM)


@pytest.mark.parametrize("method", ["LORA", "OSF"])
def test_an_embedding_of_patches_may_be_saved_along(method: str, tmp_path: Path) -> None:
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    theirs = trained(base_of("vit"), kind(target_modules=["q_proj"]), tmp_path / "a")
    with quietly():
        theirs.save_pretrained(tmp_path / "along", save_embedding_layers=True)
    adapter, weights = Adapter.load(tmp_path / "along"), state_of(base_of("vit"))
    assert {name.rpartition(".")[2] for name in adapter.extra} == {"weight", "bias"}
    ours = PeftModel(weights)
    ours.add("a", adapter)
    compare(ours.merge(), merged(theirs, weights))


def test_a_saved_batch_norm_counts_on_as_in_hf(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = transformers.ResNetConfig(**sizes)
        models.append(transformers.ResNetForImageClassification(config).eval())
    saved = ["normalization"]
    lora = peft.LoraConfig(r=2, target_modules=["convolution"], modules_to_save=saved)
    theirs = trained(models[0], lora, tmp_path / "a")
    task = attach(models[1], Adapter.load(tmp_path / "a"))
    for model in (theirs, models[1]):
        model.train()
        with torch.no_grad():
            model(x)
        model.eval()
    with torch.no_grad():
        close(models[1](x).logits, theirs(x).logits)
    with quietly():
        theirs.save_pretrained(tmp_path / "theirs")
    task.save(tmp_path / "ours")
    got, want = (
        load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs")
    )
    compare(got, want)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in want.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("VERA", {"r": 4}),
        ("PVERA", {"r": 4}),
        ("RANDLORA", {"r": 2, "sparse": True}),
        ("TINYLORA", {"u": 3}),
    ],
)
def test_projections_are_drawn_again_in_the_bases_precision(
    method: str, fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    with quietly():
        config = kind(target_modules=["q_proj", "up_proj"], save_projection=False, **fields)
    trained(base_of("llama").to(dtype), config, tmp_path / "a")
    base_of("llama").to(dtype).save_pretrained(tmp_path / "base")
    with quietly():
        theirs = peft.PeftModel.from_pretrained(base_of("llama").to(dtype), tmp_path / "a")
        want = {k: v.to(dtype) for k, v in theirs.double().merge_and_unload().state_dict().items()}
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    got = torch_file(tmp_path / "out" / "model.safetensors")
    moved = [k for k, v in got.items() if not torch.equal(v, want[k])]
    changed = sum(int((got[k] != want[k]).sum()) for k in moved)
    assert changed <= 1e-3 * sum(v.numel() for v in got.values())


def test_a_model_of_images_takes_its_adapter_by_a_preset(tmp_path: Path) -> None:
    base_of("vit").save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "fc1", "fc2"])
    theirs = trained(base_of("vit"), lora, tmp_path / "a")
    with pytest.raises(TargetError, match="--map vit"):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", names="vit")
    with quietly():
        kind = transformers.ViTForImageClassification
        ours = kind.from_pretrained(tmp_path / "out").eval()
    close(outputs(ours, "vit"), outputs(theirs, "vit"))


@pytest.mark.parametrize("alone", [False, True])
def test_trained_tokens_of_tied_tables_leave_one_table(alone: bool, tmp_path: Path) -> None:
    model = base_of("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    tokens = peft.TrainableTokensConfig(token_indices=[3, 7], target_modules=["embed_tokens"])
    theirs = trained(model, tokens, tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert {*adapter.sites} == {"model.embed_tokens", "lm_head"}
    if alone:  # as files of older versions are
        adapter = adapter.replace(sites={k: p for k, p in adapter.sites.items() if k != "lm_head"})
    receipt = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    verify_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert not receipt.untied
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    with quietly():
        ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(outputs(ours, "llama"), outputs(theirs, "llama"))

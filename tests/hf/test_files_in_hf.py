"""What we write, Hugging Face PEFT loads: every tensor, under any name, without a warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
make_files = pytest.importorskip("tests.golden.make_files")

from peft.utils import get_peft_model_state_dict  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.io.safetensors import read_metadata, read_safetensors  # noqa: E402
from peft_any.layout import layout  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.origin import KEY  # noqa: E402
from peft_any.registry import Config, method_for  # noqa: E402
from peft_any.selection import select  # noqa: E402
from tests.hf.models import make  # noqa: E402

pytestmark = pytest.mark.hf
FILES = make_files.FILES

KNOWN = {
    # one flag for layers of both orientations
    "": "fan_in_fan_out is set to",
    # the masks of a pruned AdaLoRA are no ranks of LoRA's
    "adalora": "The following rank_pattern keys did not match",
    "supertuning-bare": "save_precomputed_indices=False: sparse-support indices will be recomputed",
    "vera-seeded": "Specified to not (save|load) vera_A and vera_B",
    # of the machine
    "boft": "(Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1)",
    "ln-tuning": "Unsupported layer type",  # it asks norms for their features
    "gradient": "`is_gradient_checkpointing` is deprecated",
}
"""What Hugging Face PEFT and transformers say of their own files and models, too."""


def load(base: Any, folder: Path, name: str) -> Any:
    """Load an adapter with Hugging Face PEFT, where every other warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for said in KNOWN.values():
            warnings.filterwarnings("ignore", said)
        return peft.PeftModel.from_pretrained(base, str(folder), adapter_name=name)


def tensors_of(model: Any, name: str, **options: Any) -> dict[str, Any]:
    """Give the tensors that Hugging Face PEFT would save again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(model, adapter_name=name, **options)


def same(found: dict[str, Any], folder: Path) -> None:
    written = read_safetensors(folder / make_files.TENSORS)
    assert found.keys() == written.keys()
    for key, value in written.items():
        rtol = 1e-6 if key.endswith("topk_weights") else 0  # HF goes by way of their logarithms
        got, want = found[key].detach().float(), value.astype("float32")
        np.testing.assert_allclose(got, want, rtol=rtol, atol=0, err_msg=key)


APART = {
    "adamss": "it refuses a file of ours by name: tests.hf.test_live",
    "psoft": "it refuses a file of ours by name: tests.hf.test_live",
    "xlora": "its gate is loaded with its experts: tests.hf.test_xlora",
}
"""Files that Hugging Face PEFT does not load by themselves, and where that is held."""
LOADED = [name for name in make_files.MADE if name not in APART]


@pytest.mark.parametrize("adapter_name", ["default", "other"])
@pytest.mark.parametrize("name", LOADED)
def test_a_rewritten_file_is_loaded(name: str, adapter_name: str, tmp_path: Path) -> None:
    Adapter.load(FILES / name).save(tmp_path / "a")
    model = load(make_files.MADE[name][0](), tmp_path / "a", adapter_name)
    options = {"save_embedding_layers": True} if name.startswith("embeddings") else {}
    same(tensors_of(model, adapter_name, **options), tmp_path / "a")


UNMERGED = (
    "adaption",
    "cartridge",
    "cpt",
    "lily",
    "multitask",
    "p-tuning",
    "poly",
    "prefix",
    "prompt",
)
LAYERED = [name for name in LOADED if not name.startswith(UNMERGED)]


@pytest.mark.parametrize("name", LAYERED)
def test_merges_are_those_of_hugging_face_peft(name: str) -> None:
    make = make_files.MADE[name][0]
    base = {k: v.detach().clone() for k, v in make().state_dict().items()}
    kinds = {"out_proj": "Linear"} if "mha" in "".join(base) else None
    model = PeftModel(base, kinds=kinds)
    model.add("a", Adapter.load(FILES / name, backend="torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = load(make(), FILES / name, "other").merge_and_unload().state_dict()
    # HF rounds the product before it adds it: two roundings of bfloat16 for one
    bound = 2**-7 if name == "lora-half" else 1e-6
    for key, got in model.merge().items():
        want = merged[key]
        assert got.dtype == want.dtype
        scale = float(want.abs().max())
        np.testing.assert_allclose(got.float(), want.float(), 0, bound * scale, err_msg=key)
    assert any((merged[key] != base[key]).any() for key in base)


FRESH: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2, "target_modules": ["fc1", "emb", "conv2"], "modules_to_save": ["score"]},
    "ADALORA": {"init_r": 4, "target_modules": ["fc1"], "total_step": 10},
    "IA3": {"target_modules": ["fc1", "fc2"], "feedforward_modules": ["fc2"]},
    "LOHA": {"r": 2, "target_modules": ["fc1", "conv2"]},
    "LOKR": {"r": 2, "target_modules": ["fc1", "conv2"]},
    "OFT": {"oft_block_size": 4, "target_modules": ["fc1", "emb"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["fc1", "conv2"]},
    "VERA": {"r": 4, "target_modules": ["fc1"], "bias": "all"},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {},
    "PROMPT_TUNING": {},
    "P_TUNING": {},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "CARTRIDGE": {},
    "CPT": {"cpt_token_ids": [3, 1, 4]},
}


def fresh(config: Config, base: Any, folder: Path) -> None:
    weights = {k: v.numpy() for k, v in base.state_dict().items()}
    model = PeftModel(weights)
    model.add("x", config, seed=1)
    model["x"].save(folder)


@pytest.mark.parametrize("adapter_name", ["default", "other"])
@pytest.mark.parametrize("method", [*FRESH])
def test_a_fresh_adapter_is_loaded(method: str, adapter_name: str, tmp_path: Path) -> None:
    base = make_files.make_net()
    fresh(method_for(method)(**FRESH[method]), base, tmp_path / "a")
    model = load(base, tmp_path / "a", adapter_name)
    same(tensors_of(model, adapter_name), tmp_path / "a")
    assert KEY in read_metadata(tmp_path / "a" / "adapter_model.safetensors")


EXTRAS: list[dict[str, Any]] = [
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"use_dora": True},
    {"target_modules": "all-linear", "exclude_modules": ["out_proj", "c1d"]},
    {"target_modules": ["mha"]},
    {"target_modules": ["mha", "fc1"], "bias": "all"},
    {"trainable_token_indices": [3, 1]},
    {"trainable_token_indices": {"emb": [5]}},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"rank_pattern": {"layers.0.fc1": 3}, "alpha_pattern": {"fc1": 9}},
    {"use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"target_modules": ["c1d"], "fan_in_fan_out": True},
    {"modules_to_save": ["norm", "lm_head"]},
]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_fresh_lora_is_loaded(extra: dict[str, Any], tmp_path: Path) -> None:
    base = make_files.make_net()
    fields = {"r": 2, "target_modules": ["fc1"], **extra}
    fresh(method_for("LORA")(**fields), base, tmp_path / "a")
    model = load(base, tmp_path / "a", "other")
    same(tensors_of(model, "other"), tmp_path / "a")


@pytest.mark.parametrize("adapter_name", ["default", "other"])
@pytest.mark.parametrize("method", [*PROMPTS])
def test_a_fresh_prompt_is_loaded(method: str, adapter_name: str, tmp_path: Path) -> None:
    base = make_files.make_gpt()
    fields = {"num_virtual_tokens": 3, "token_dim": 8, "num_transformer_submodules": 1}
    fields |= {"task_type": "CAUSAL_LM", "num_layers": 2, "num_attention_heads": 2}
    fresh(method_for(method)(**fields, **PROMPTS[method]), base, tmp_path / "a")
    model = load(base, tmp_path / "a", adapter_name)
    same(tensors_of(model, adapter_name), tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", None),
        ("llama", "LlamaForSequenceClassification"),
        ("gpt2", None),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("bert", "BertForMaskedLM"),
        ("bert", None),
        ("roberta", None),
        ("t5", None),
        ("vit", "ViTModel"),
        ("gpt_neox", None),
    ],
)
def test_layers_and_choices_are_those_of_hugging_face_peft(
    name: str, kind: str | None, tmp_path: Path
) -> None:
    base = make(name, kind)
    weights = dict(base.state_dict())
    found = layout(weights)
    modules = dict(base.named_modules())
    assert [k for k, s in found.items() if type(modules[k]).__name__ != s.kind] == []
    task = "SEQ_CLS" if type(base).__name__.endswith("SequenceClassification") else None
    ours = select(method_for("LORA")(target_modules="all-linear", task_type=task), found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type=task)
        model = peft.get_peft_model(base, config)
        model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert sorted(ours) == sorted({*model.base_model.targeted_module_names})
    sites = Adapter.load(tmp_path).check(weights)
    assert {k: s.kind for k, s in sites.items()} == {k: found[k].kind for k in sites}

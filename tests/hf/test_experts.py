"""Routers over LoRA experts, live: Hugging Face PEFT's routers give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

from peft.tuners.lora.arrow import create_arrow_model  # noqa: E402

from peft_any import Adapter, ConfigError, convert  # noqa: E402
from peft_any.experts import arrow_of, load_arrow  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from tests.hf.models import base_of, quietly  # noqa: E402
from tests.hf.test_live import ROUNDING, compare  # noqa: E402

IDS = torch.tensor([[7, 3, 1, 7, 3, 9, 2], [3, 7, 1, 1, 2, 9, 7]])


def saved(folder: Path, count: int) -> list[str]:
    """Let Hugging Face PEFT save LoRAs of which the leading direction stands out.

    Its prototypes come from fifteen steps of an iteration, which converges only then.
    """
    made = []
    for i in range(count):
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
        with quietly():
            model = peft.get_peft_model(base_of("llama"), config)
        draw = torch.Generator().manual_seed(i)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=draw)
                p.data[..., 1:] *= 0.05 if "lora_B" in name else 1.0
        with quietly():
            model.save_pretrained(folder / str(i))
        made.append(str(folder / str(i)))
    return made


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "fields", [{"top_k": 2}, {"top_k": 3, "router_temperature": 0.4}, {"top_k": 1, "use_gks": True}]
)
def test_arrow_is_hfs(fields: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    tasks = saved(tmp_path, 3)
    general = saved(tmp_path / "general", 1) if fields.get("use_gks") else []
    if general:  # small, so that the directions stay
        path = Path(general[0]) / "adapter_model.safetensors"
        save_file({k: 0.02 * v for k, v in load_file(path).items()}, path)
    base = base_of("llama").eval().to(getattr(torch, dtype))
    config = peft.ArrowConfig(**fields, rng_seed=0)
    with quietly():
        theirs = create_arrow_model(base, tasks, config, general_adapter_paths=general).eval()
        theirs.to(getattr(torch, dtype))
    arrow = arrow_of(
        [loaded(path, dtype) for path in tasks],
        general=[loaded(path, dtype) for path in general],
        top_k=fields["top_k"],
        router_temperature=fields.get("router_temperature", 1.0),
    )
    ours = base_of("llama").eval().to(getattr(torch, dtype))
    with torch.no_grad(), quietly():
        plain = ours(IDS).logits
        want = theirs(IDS).logits
        if dtype == "float64":  # its prototypes are of single precision: give it ours
            for name, p in arrow.sites.items():
                layer = theirs.base_model.model.get_submodule(name).lora_arrow["arrow_router"]
                found, own = layer.prototypes, p["arrow_router.weight"]
                signs = torch.sign((found * own).sum(1, keepdim=True))
                torch.testing.assert_close(found, signs * own, rtol=0, atol=1e-5)
                layer.prototypes = own
            want = theirs(IDS).logits
        attach(ours, arrow)
        got = ours(IDS).logits
    assert (want - plain).abs().max() > 0.01
    compare({"y": got.numpy()}, {"y": want.numpy()}, ROUNDING[dtype])


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("use_gks", [True, False])
def test_a_router_is_read_where_hf_saved_it(use_gks: bool, called: bool, tmp_path: Path) -> None:
    tasks = saved(tmp_path, 3)
    general = saved(tmp_path / "general", 1)
    path = Path(general[0]) / "adapter_model.safetensors"
    save_file({k: 0.02 * v for k, v in load_file(path).items()}, path)
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=use_gks, rng_seed=0)
    with quietly(), torch.no_grad():
        theirs = create_arrow_model(base_of("llama").eval(), tasks, config, general).eval()
        if called:
            theirs(IDS)
        theirs.save_pretrained(tmp_path / "all")
        want = theirs(IDS).logits
    router = Adapter.load(tmp_path / "all" / "arrow_router")
    router.save(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, other = (
            folder / name for folder in (tmp_path / "all/arrow_router", tmp_path / "again")
        )
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(
        ConfigError, match=r"LoraConfig: an Arrow router cannot act alone.*load_arrow"
    ):
        attach(base_of("llama"), router)
    with pytest.raises(ConfigError, match="an Arrow router cannot act alone"):
        convert(tmp_path / "again", tmp_path / "converted")
    if use_gks:
        with pytest.raises(ConfigError, match="give subtracted=True if the model was called"):
            load_arrow(tmp_path / "all")
    ours = base_of("llama").eval()
    attach(ours, load_arrow(tmp_path / "all", subtracted=called if use_gks else None))
    with torch.no_grad():
        compare({"y": ours(IDS).logits.numpy()}, {"y": want.numpy()}, ROUNDING["float32"])
    with pytest.raises(ConfigError, match="task_0: is no router of experts: arrow_config=None"):
        load_arrow(tmp_path / "all" / "task_0")


def loaded(path: str, dtype: str) -> Adapter:
    """Load an adapter in a dtype."""
    adapter = Adapter.load(path).to("torch")
    kind = getattr(torch, dtype)
    sites = {s: {k: v.to(kind) for k, v in p.items()} for s, p in adapter.sites.items()}
    return adapter.replace(sites=sites)

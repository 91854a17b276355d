"""Methods that are applied and never merged, live: each reads what the other writes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners.lora import variants  # noqa: E402

from peft_any import Adapter, PeftModel  # noqa: E402
from peft_any.alora import calculate_alora_offsets  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from peft_any.methods.lily import LilyConfig  # noqa: E402
from tests.cases import ROUTED, RoutedCase  # noqa: E402
from tests.hf import reference  # noqa: E402
from tests.hf.models import base_of  # noqa: E402
from tests.hf.test_live import ROUNDING, compare  # noqa: E402
from tests.hf.whole import fill  # noqa: E402

LAYERS = [case for case in ROUTED if case.hf is None]
"""Rows that a layer alone is; whole models are compared for X-LoRA: `tests.hf.test_xlora`."""
rows = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@rows
@dtypes
def test_what_hf_writes_we_read(case: RoutedCase, dtype: str, tmp_path: Path) -> None:
    result = reference.run(case, tmp_path, dtype, seed=5)
    model = PeftModel(result.base)
    model.add("a", Adapter.load(result.folder))
    y = model.routed(**case.routing).bind().layers[case.site.name](result.x)
    compare({"y": y}, {"y": result.y}, ROUNDING[dtype])


@rows
@dtypes
@pytest.mark.parametrize("name", ["default", "other"])
def test_what_we_write_hf_reads_without_a_warning(
    case: RoutedCase, dtype: str, name: str, tmp_path: Path, recwarn: Any
) -> None:
    base = case.base(5, dtype=dtype)
    plain = reference.model_of(base)
    model = PeftModel(reference.state_of(plain))
    config = replace(case.config, target_modules=[case.site.name])
    own = case.params(base, 5, dtype)
    model.add("a", Adapter(config, {case.site.name: own}))
    model["a"].save(tmp_path / "a")
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name=name)
    said = [str(w.message) for w in recwarn.list]
    assert not [
        text for text in said if "supported for CAUSAL_LM task" not in text
    ]  # a toy is none
    x = reference.inputs(case, dtype)
    leaf = theirs.base_model.model.get_submodule(case.site.name)
    with torch.no_grad():
        want = reference.host(leaf(torch.tensor(x), **reference.routing_of(case)))
    y = model.routed(**case.routing).bind().layers[case.site.name](x)
    compare({"y": y}, {"y": want}, ROUNDING[dtype])


TOKENS = [7, 3]
IDS = torch.tensor([[7, 3, 1, 7, 3, 9, 2], [3, 7, 1, 1, 2, 9, 7], [1, 2, 9, 9, 5, 7, 3]])


@dtypes
def test_a_model_with_activated_lora_is_hfs(dtype: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        alora_invocation_tokens=TOKENS,
        task_type="CAUSAL_LM",
    )
    with reference.quietly():
        theirs = peft.get_peft_model(base_of("llama"), config).eval()
        fill(theirs, "default", 1)
        theirs.to(getattr(torch, dtype))
        theirs.save_pretrained(tmp_path / "a")
    offsets = calculate_alora_offsets(TOKENS, IDS)
    found = variants.calculate_alora_offsets({"a": config}, "a", IDS)
    assert [n or None for n in offsets.tolist()] == found == [4, None, 2]
    ours = base_of("llama").to(getattr(torch, dtype)).eval()
    task = attach(ours, Adapter.load(tmp_path / "a"))
    with torch.no_grad(), reference.quietly(), task.routed(alora_offsets=offsets):
        got, want = ours(IDS).logits, theirs(IDS).logits
        with theirs.disable_adapter():
            plain = theirs(IDS).logits
    compare({"y": got.numpy()}, {"y": want.numpy()}, ROUNDING[dtype])
    changed = (want != plain).any(dim=-1)
    assert changed.tolist() == [[False] * (7 - n) + [True] * n for n in (4, 0, 2)]
    with reference.quietly(), pytest.raises(NotImplementedError, match="merging"):
        theirs.merge_and_unload()


def test_rows_of_activated_lora_are_hfs(tmp_path: Path) -> None:
    with reference.quietly():
        config = peft.LoraConfig(
            target_modules=["fc"], alora_invocation_tokens=TOKENS, init_lora_weights=False
        )
    plain = nn.ModuleDict({"fc": nn.Linear(6, 5)})
    base = reference.state_of(plain)
    with reference.quietly():
        theirs = peft.get_peft_model(plain, config).eval()
        theirs.save_pretrained(tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 7, 6)).astype("float32")
    leaf = theirs.base_model.model.get_submodule("fc")
    names, offsets = ["default", "__base__", "default"], [4, 2, 1]
    with torch.no_grad():
        y = leaf(torch.tensor(x), adapter_names=names, alora_offsets=offsets).numpy()
    model = PeftModel(base)
    model.add("default", Adapter.load(tmp_path))
    bound = model.routed(alora_offsets=offsets).bind(rows=names)
    compare({"y": bound.layers["fc"](x)}, {"y": y}, ROUNDING["float32"])


def test_lily_shares_as_hf_does(tmp_path: Path) -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(4, 5), "v": nn.Linear(4, 5), "o": nn.Linear(5, 4)})

    model = nn.ModuleDict({"h": nn.ModuleList([block() for _ in range(11)])})
    base = reference.state_of(model)
    fields: dict[str, Any] = {"r": 2, "stride_A": 4, "init_weights": False}
    config = peft.LilyConfig(**fields, target_modules=["q", "o"])
    with reference.quietly():
        theirs = peft.get_peft_model(model, config)
        theirs.save_pretrained(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.num_parameters == theirs.get_nb_trainable_parameters()[0]
    ties = adapter.config.ties(adapter.sites)
    for one, other in itertools.permutations(adapter.sites, 2):
        for key, value in adapter.sites[one].items():
            if value.shape != adapter.sites[other][key].shape:
                continue
            same = np.array_equal(value, adapter.sites[other][key])
            assert same == (ties.get((one, key), one) == ties.get((other, key), other))
    ours = PeftModel(base)
    made = ours.add("a", LilyConfig(**fields, target_modules=["q", "o"]))
    assert made.num_parameters == adapter.num_parameters
    assert made.config.ties(made.sites) == ties

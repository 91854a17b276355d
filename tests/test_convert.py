"""Adapters of every method as plain LoRAs: what they add is what the method adds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import Adapter, ConfigError, LoraConfig, PeftModel, PromptTuningConfig, cli, convert
from peft_any.errors import PeftError, TargetError, UsageError
from peft_any.io.safetensors import write_safetensors
from peft_any.methods.deft import DeftConfig
from peft_any.methods.hra import HRAConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.miss import MissConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.peanut import PeanutConfig
from tests.cases import CASES, FC, Case

ROWS = [c for c in CASES if c.site.groups == 1 and c.site.kind != "MultiheadAttention"]
"""A LoRA has neither: of groups, and of a packed projection alone."""
TOLD = [c for c in ROWS if not c.site.kernel and (c.config.peft_type != "ADAMSS" or c.site.bias)]
"""Kernels are flat in some files, and AdaMSS's bias looks like an input: the base alone tells."""
CONVS = [
    replace(c, site=replace(c.site, name="block.conv1"))
    for c in ROWS
    if c.site.kernel and not getattr(c.config, "feedforward_modules", None)
]
"""With names that tell what the arrays do not."""


def model_of(case: Case) -> tuple[PeftModel, dict[str, Any]]:
    """Give a model of the row's layer alone, with the row's adapter as training leaves it."""
    base = case.base(dtype="float64")
    weights = {case.site.weight: base.stored()}
    if base.bias is not None:
        weights[case.site.bias_name] = base.bias
    config: Any = replace(case.config, target_modules=re.escape(case.site.name))
    p = case.params(base, dtype="float64")
    shared = config.at(case.site).shared_shapes([case.site])
    own = {k: v for k, v in p.items() if k not in shared}
    adapter = Adapter(config, {case.site.name: own}, shared={k: p[k] for k in shared})
    model = PeftModel(weights)
    model.add("a", adapter)
    return model, weights


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_every_method_becomes_a_lora(case: Case) -> None:
    model, weights = model_of(case)
    made, record = convert(model["a"], base=weights, dtype="float64")
    assert type(made.config) is LoraConfig
    assert (record.kind, len(record.layers)) == ("convert", 1)
    assert record.error is None or record.error < 1e-12
    other = PeftModel(weights)
    other.add("lora", made)
    merged = other.merge()
    for name, want in model.merge().items():
        bound = 1e-11 * float(np.max(np.abs(want)))
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=bound)


@pytest.mark.parametrize("case", [*TOLD, *CONVS], ids=lambda case: case.name)
def test_without_the_base_it_is_the_same_or_asks_for_it(case: Case) -> None:
    model, weights = model_of(case)
    try:
        made, record = convert(model["a"], dtype="float64")
    except (ConfigError, TargetError) as error:
        assert re.search("give base=|rederive=True", str(error))  # noqa: PT017 - not all raise
        return
    assert record.error is None or record.error < 1e-12
    other = PeftModel(weights)
    other.add("lora", made)
    for name, want in model.merge().items():
        bound = 1e-11 * float(np.max(np.abs(want)))
        np.testing.assert_allclose(other.merge()[name], want, rtol=0, atol=bound)


def test_a_file_that_names_no_layers_needs_the_base(tmp_path: Path) -> None:
    model, _ = model_of(next(c for c in ROWS if c.config.peft_type == "UNILORA"))
    model["a"].save(tmp_path)
    assert not Adapter.load(tmp_path).sites
    with pytest.raises(TargetError, match=r"UNILORA's file names no layers: give base="):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (MissConfig(r=3), 3),
        (MissConfig(r=3, mini_r=4, init_weights="mini"), 3),
        (HRAConfig(r=2), 2),
        (HRAConfig(r=3, apply_GS=True), 3),
        (DeftConfig(r=2), 2),
        (PeanutConfig(r=2, depth=1), 2),
    ],
)
def test_structure_gives_the_rank(config: Any, rank: int) -> None:
    model, weights = model_of(Case("one", config, FC))
    assert convert(model["a"], base=weights)[0].config.r == rank


def test_a_rank_cuts_to_the_best_and_says_what_is_lost() -> None:
    model, weights = model_of(Case("oft", OFTConfig(oft_block_size=4), FC))
    delta = model.merge()["fc.weight"] - weights["fc.weight"]
    s = np.linalg.svd(delta, compute_uv=False)
    made, record = convert(model["a"], base=weights, rank=3)
    layer = record.layers[0]
    assert made.config.r == layer.rank == 3
    assert layer.error == pytest.approx(float((np.sum(s[3:] ** 2) / np.sum(s**2)) ** 0.5), rel=1e-5)
    assert not record.warnings
    kept, record = convert(model["a"], base=weights, energy=0.9)
    fewest = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.9)) + 1
    assert kept.config.r == fewest
    _, record = convert(model["a"], base=weights)
    assert any("no smaller than the layer" in note for note in record.warnings)


def test_a_gain_alone_becomes_a_lora_too() -> None:
    model, weights = model_of(Case("ia3", IA3Config(), FC))
    with pytest.raises(TargetError, match="give base="):
        convert(model["a"])
    made, record = convert(model["a"], base=weights)
    assert made.config.lora_bias
    assert not any("no bias changes here" in note for note in record.warnings)


def test_layers_without_a_bias_in_a_lora_with_biases_are_told() -> None:
    weights = {"up.weight": np.ones((6, 4)), "up.bias": np.ones(6), "down.weight": np.ones((4, 6))}
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    gains = {"up": np.full((6, 1), 2.0), "down": np.full((1, 6), 2.0)}
    adapter = Adapter(config, {name: {"ia3_l": gain} for name, gain in gains.items()})
    made, record = convert(adapter, base=weights)
    assert any("down: no bias changes here" in note for note in record.warnings)
    x = np.arange(6.0).reshape(1, 6)
    model = PeftModel(weights)
    model.add("lora", made)
    np.testing.assert_allclose(model.bind().layers["down"](x), 2 * x @ weights["down.weight"].T)


def test_what_cannot_be_converted() -> None:
    with pytest.raises(ConfigError, match="changes no weight"):
        convert(Adapter(PromptTuningConfig(num_virtual_tokens=2, token_dim=4)))
    model, _ = model_of(Case("lora", LoraConfig(r=2), FC))
    for to in ("OFT", "LORE"):
        with pytest.raises(UsageError, match="give to='LORA'"):
            convert(model["a"], to=to)
    with pytest.raises(PeftError, match="rank"):
        convert(model["a"], rank=0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, weights = model_of(Case("hra", HRAConfig(r=2), FC))
    write_safetensors(tmp_path / "base.safetensors", weights)
    model["a"].save(tmp_path / "hra")
    asked = ["convert", str(tmp_path / "hra"), "--base", str(tmp_path / "base.safetensors")]
    assert cli.run([*asked, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["out"]["rank"]) == ("convert", 2)
    assert cli.run([*asked, "--out", str(tmp_path / "lora"), "--dtype", "float64"]) == 0
    assert json.loads((tmp_path / "lora" / "convert_receipt.json").read_text())["error"] < 1e-12
    other = PeftModel(weights)
    other.add("lora", Adapter.load(tmp_path / "lora"))
    np.testing.assert_allclose(other.merge()["fc.weight"], model.merge()["fc.weight"], atol=1e-12)
    assert cli.run(asked) == 2

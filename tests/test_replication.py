"""Layers repeated, in memory and on disk, and adapters that ask for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from peft_any import (
    Adapter,
    ConfigError,
    LoraConfig,
    PeftModel,
    StorageError,
    TargetError,
    cli,
    combine,
    merge_checkpoint,
    read_safetensors,
    replicate_checkpoint,
    replicate_layers,
)
from peft_any.errors import UsageError
from peft_any.io.checkpoint import Checkpoint
from tests.models import llama, sharded, single

RUNS = [[0, 2], [1, 3]]
CONFIG = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=RUNS)


def deep_names(layers: int) -> set[str]:
    return {*llama(layers=layers)}


def test_a_mapping_is_repeated_without_a_copy() -> None:
    weights = llama(layers=3)
    deep = replicate_layers(weights, RUNS)
    assert [*deep] == [*llama(layers=4)]
    assert len(deep) == len(llama(layers=4))
    for new, old in enumerate((0, 1, 1, 2)):
        name = "self_attn.q_proj.weight"
        assert deep[f"model.layers.{new}.{name}"] is weights[f"model.layers.{old}.{name}"]


@pytest.mark.parametrize("make", [single, sharded])
@pytest.mark.parametrize("limit", [None, 600])
def test_a_checkpoint_is_repeated_byte_for_byte(
    make: object, limit: int | None, tmp_path: Path
) -> None:
    weights = llama(layers=3)
    base = make(  # type: ignore[operator]
        tmp_path / "base", weights, num_hidden_layers=3, layer_types=["a", "b", "c"]
    )
    steps: list[tuple[int, int, str]] = []
    made = replicate_checkpoint(
        base, RUNS, tmp_path / "deep", max_shard_size=limit, progress=lambda *s: steps.append(s)
    )
    assert made.layers == (0, 1, 1, 2)
    assert made.stack == "model.layers"
    want = replicate_layers(weights, RUNS)
    with Checkpoint(tmp_path / "deep") as deep:
        assert deep.keys() == want.keys()
        for name, array in deep.items():
            assert array.tobytes() == np.asarray(want[name]).tobytes()
        assert deep.config["num_hidden_layers"] == 4
        assert deep.config["layer_types"] == ["a", "b", "b", "c"]
        assert (len(deep.shards) > 1) == (make is sharded or limit is not None)
        assert steps[-1][:2] == (deep.nbytes, deep.nbytes)
    assert json.loads(made.to_json())["kind"] == "replicate"
    assert made.config["num_hidden_layers"] == (3, 4)


def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path: Path) -> None:
    weights = llama(layers=3)
    base = sharded(tmp_path / "base", weights, shards=len(weights))
    replicate_checkpoint(base, [[0, 1]], tmp_path / "small")
    with Checkpoint(tmp_path / "small") as small:
        assert small.keys() == deep_names(1)
        assert len(small.shards) == len(small)


def test_inner_configurations_and_other_stacks(tmp_path: Path) -> None:
    weights = {k.replace("model.", "model.language_model.", 1): v for k, v in llama().items()}
    weights["model.visual.blocks.0.weight"] = np.zeros(2, "f4")
    with pytest.raises(TargetError, match=r"model.language_model.layers, model.visual.blocks"):
        replicate_layers(weights, RUNS)
    with pytest.raises(TargetError, match=r"no such layers .nearest"):
        replicate_layers(weights, RUNS, stack="model.language_model.layer")
    place = "model.language_model.layers"
    base = single(tmp_path / "base", weights, text_config={"num_hidden_layers": 2})
    made = replicate_checkpoint(base, [[0, 2], [0, 1]], tmp_path / "deep", stack=place)
    assert made.config["text_config"][1] == {"num_hidden_layers": 3}
    deep = read_safetensors(tmp_path / "deep" / "model.safetensors")
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 1]])
    assert len(PeftModel(deep).add("a", config).sites) == 3


def test_what_is_no_run_of_layers() -> None:
    for runs, words in (
        ([[0, 4]], r"\[0, 4\] is no run of layers, of which model.layers has 3"),
        ([[2, 2]], r"\[2, 2\] is no run"),
        ([[0, 1, 2]], r"\[0, 1, 2\] is no run"),
        ([], "holds no layer"),
    ):
        with pytest.raises(ConfigError, match=words):
            replicate_layers(llama(layers=3), runs)
    weights = llama(layers=3)
    part = {k: v for k, v in weights.items() if "layers.1." not in k}
    with pytest.raises(TargetError, match=r"lacks the layers \[1\] of 3"):
        replicate_layers(part, [[0, 1]])


def test_an_adapter_is_refused_on_a_base_that_does_not_repeat(tmp_path: Path) -> None:
    weights = llama(np.float32, layers=3)
    words = r"base of 4 layers, and model.layers has 3: .*--layers 0:2,1:3 --out DEEPER"
    with pytest.raises(ConfigError, match=words):
        PeftModel(weights).add("a", CONFIG)
    model = PeftModel(replicate_layers(weights, RUNS))
    model.add("a", CONFIG).save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter")
    for base in (weights, {"fc.weight": np.ones((2, 2))}):
        with pytest.raises(ConfigError, match="replicate"):
            loaded.check(base)
    for runs, words in (([[0, 10**15]], "base of 10{15} layers"), ([[0, 1]] * 10**4, "START:END")):
        raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        shutil.copytree(tmp_path / "adapter", tmp_path / "endless", dirs_exist_ok=True)
        text = json.dumps(raw | {"layer_replication": runs})
        (tmp_path / "endless" / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            Adapter.load(tmp_path / "endless").check(weights)
        assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigError, match="layer 1 as 1 and 2, and these differ"):
        loaded.check(llama(np.float32, layers=4))
    loaded.check(model.weights)


def test_a_copy_of_a_layer_has_an_adapter_of_its_own(tmp_path: Path) -> None:
    weights = llama(np.float32, layers=3)
    base = single(tmp_path / "base", weights, num_hidden_layers=3)
    replicate_checkpoint(base, RUNS, tmp_path / "deep")
    model = PeftModel(replicate_layers(weights, RUNS))
    config = LoraConfig(
        r=2, target_modules=["q_proj"], layer_replication=RUNS, init_lora_weights=False
    )
    model.add("a", config).save(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="peft-any replicate"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "no")
    done = merge_checkpoint(tmp_path / "deep", tmp_path / "adapter", tmp_path / "merged")
    assert len(done.changes) == 4
    merged, expected = read_safetensors(tmp_path / "merged" / "model.safetensors"), model.merge()
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (1, 2)]
    for name in names:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-6)
    assert not np.array_equal(merged[names[0]], merged[names[1]])


def test_combining_keeps_the_runs_or_refuses(tmp_path: Path) -> None:
    deep = replicate_layers(llama(np.float32, layers=3), RUNS)
    one = PeftModel(deep).add("a", CONFIG)
    made, _ = combine([(one, 0.5), (one, 0.5)])
    assert made.config.layer_replication == RUNS  # type: ignore[attr-defined]
    plain = PeftModel(deep).add("a", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="cannot become one"):
        combine([(one, 0.5), (plain, 0.5)])


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = single(tmp_path / "base", llama(layers=3), num_hidden_layers=3)
    command = ["replicate", "--base", str(base), "--out", str(tmp_path / "deep"), "--layers"]
    assert cli.run([*command, "0:2,1:3"]) == 0
    out = capsys.readouterr().out
    assert "model.layers: 4 layers, of the base's 0 1 1 2" in out
    assert "num_hidden_layers 3 → 4" in out
    assert cli.run([*command, "0:2,1:3"]) == StorageError.exit_code
    assert cli.run([*command, "0-2"]) == UsageError.exit_code
    assert "START:END" in capsys.readouterr().err
    with pytest.raises(UsageError, match="is a directory"):
        replicate_checkpoint(base, RUNS, tmp_path / "deep.safetensors")

"""Outputs in files of a size that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import merge_checkpoint, verify_checkpoint
from peft_any.cli.app import run
from peft_any.errors import UsageError
from peft_any.io._header import byte_size
from peft_any.io.checkpoint import Checkpoint
from peft_any.methods.lora import LoraConfig
from peft_any.surgery.shards import byte_count, packed
from tests.models import adapter, llama, sharded, single

QV = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def everything(path: Path) -> dict[str, bytes]:
    with Checkpoint(path) as held:
        return {name: bytes(held.raw(name)) for name in held}


def weights_of(path: Path) -> dict[str, int]:
    """Name the files of weights, with the bytes of their tensors."""
    with Checkpoint(path) as held:
        return {
            name: sum(shard.info(key).nbytes for key in shard)
            for name, shard in held.named_shards.items()
        }


@pytest.mark.parametrize("make", [single, sharded])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_tensors_are_the_same_in_smaller_files(make: Any, dtype: Any, tmp_path: Path) -> None:
    base, tuned = make(tmp_path / "b", llama()), adapter(tmp_path / "a", llama(), QV)
    plain = merge_checkpoint(base, tuned, tmp_path / "plain", dtype=dtype)
    made = merge_checkpoint(base, tuned, tmp_path / "m", dtype=dtype, max_shard_size=400)
    assert everything(tmp_path / "m") == everything(tmp_path / "plain")
    assert {c.tensor: c for c in made.changes} == {c.tensor: c for c in plain.changes}
    assert made.copied == plain.copied
    assert made.options["max_shard_size"] == 400
    sizes = weights_of(tmp_path / "m")
    assert len(sizes) > 2
    assert max(sizes.values()) <= 400
    assert [*sizes] == [
        f"model-{i + 1:05}-of-{len(sizes):05}.safetensors" for i in range(len(sizes))
    ]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"]) == set(llama())
    assert verify_checkpoint(base, tuned, tmp_path / "m").problems == ()


@pytest.mark.parametrize("make", [single, sharded])
def test_one_file_has_no_index(make: Any, tmp_path: Path) -> None:
    base, tuned = make(tmp_path / "b", llama()), adapter(tmp_path / "a", llama(), QV)
    merge_checkpoint(base, tuned, tmp_path / "plain")
    merge_checkpoint(base, tuned, tmp_path / "m", max_shard_size="1GB")
    assert everything(tmp_path / "m") == everything(tmp_path / "plain")
    found = sorted(p.name for p in (tmp_path / "m").iterdir() if "safetensors" in p.name)
    assert found == ["model.safetensors"]


def test_a_parted_head_is_in_the_index(tmp_path: Path) -> None:
    weights = llama(head=False)
    base = single(tmp_path / "b", weights, tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    tuned = adapter(tmp_path / "a", weights, config)
    merge_checkpoint(base, tuned, tmp_path / "plain")
    merge_checkpoint(base, tuned, tmp_path / "m", max_shard_size=200)
    found = everything(tmp_path / "m")
    assert found == everything(tmp_path / "plain")
    assert "lm_head.weight" in found


def test_a_killed_merge_goes_on_with_the_same_size_alone(tmp_path: Path) -> None:
    base, tuned = sharded(tmp_path / "b", llama()), adapter(tmp_path / "a", llama(), QV)
    merge_checkpoint(base, tuned, tmp_path / "plain", max_shard_size=400)

    class Stop(BaseException):
        pass

    def dies(done: int, total: int, _: str) -> None:
        if 2 * done > total:
            raise Stop

    given: Any = {"out": tmp_path / "m", "resume": True}
    with pytest.raises(Stop):
        merge_checkpoint(base, tuned, progress=dies, max_shard_size=400, **given)
    with pytest.raises(Exception, match="max_shard_size was 400 and is 300"):
        merge_checkpoint(base, tuned, max_shard_size=300, **given)
    made = merge_checkpoint(base, tuned, max_shard_size=400, **given)
    assert any("continued" in said for said in made.warnings)
    assert everything(tmp_path / "m") == everything(tmp_path / "plain")
    assert weights_of(tmp_path / "m") == weights_of(tmp_path / "plain")


def test_the_command_takes_a_size(tmp_path: Path) -> None:
    base, tuned = single(tmp_path / "b", llama()), adapter(tmp_path / "a", llama(), QV)
    given = ["merge", "--base", str(base), "--adapter", str(tuned), "--out", str(tmp_path / "m")]
    assert run([*given, "--quiet", "--max-shard-size", "0.4KB"]) == 0
    assert max(weights_of(tmp_path / "m").values()) <= 400


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 30))
def test_every_tensor_has_one_place(sizes: list[int], limit: int) -> None:
    specs = [(f"t{i}", "uint8", (n,)) for i, n in enumerate(sizes)]
    files = packed(specs, limit)
    assert [spec for held in files.values() for spec in held] == specs
    for held in files.values():
        assert len(held) == 1 or sum(byte_size(*spec[1:]) or 0 for spec in held) <= limit


@pytest.mark.parametrize("size", ["", "GB", "-1", 0, "0.1B", "5 GBit", "1e9", "nan"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match="max_shard_size"):
        byte_count(size)


def test_a_single_file_is_not_divided(tmp_path: Path) -> None:
    base, tuned = single(tmp_path / "b", llama()), adapter(tmp_path / "a", llama(), QV)
    with pytest.raises(UsageError, match="give a directory"):
        merge_checkpoint(base, tuned, tmp_path / "m.safetensors", max_shard_size="1GB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

"""transformers' own `save_pretrained` of an attached adapter, whole and in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_any import (  # noqa: E402
    Adapter,
    AdapterStore,
    FormatError,
    PeftModel,
    StorageError,
    merge_checkpoint,
)
from peft_any.surgery.verify import verify_checkpoint  # noqa: E402
from tests.hf.reference import quietly, state_of  # noqa: E402
from tests.hf.test_models import base_of, compare, merged  # noqa: E402

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


@pytest.mark.parametrize("size", ["1GB", "1KB", "0.4KB"])
def test_an_adapter_in_shards_is_one(size: str, tmp_path: Path) -> None:
    plain = base_of("llama")
    weights = state_of(plain)
    with quietly():
        plain.save_pretrained(tmp_path / "base")
        plain.add_adapter(peft.LoraConfig(**LORA))
        plain.save_pretrained(tmp_path / "store" / "a", max_shard_size=size)
    folder = tmp_path / "store" / "a"
    assert (folder / "adapter_model.safetensors").exists() == (size == "1GB")
    adapter = Adapter.load(folder)
    adapter.save(tmp_path / "one")
    with quietly():
        theirs = peft.PeftModel.from_pretrained(base_of("llama"), str(tmp_path / "one"))
    want = merged(theirs, weights)
    ours = PeftModel(weights)
    ours.add("a", adapter)
    compare(ours.merge(), want)
    assert (
        AdapterStore(tmp_path / "store", max_bytes=10**6)["a"].num_parameters
        == adapter.num_parameters
    )
    receipt = merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    shards = {path.name for path in folder.glob("adapter_model*")}
    assert shards < {*receipt.adapters[0].files} | {"model.safetensors.index.json"}
    verify_checkpoint(tmp_path / "base", folder, tmp_path / "out")


def test_shards_that_do_not_fit_their_index_are_refused(tmp_path: Path) -> None:
    plain = base_of("llama")
    with quietly():
        plain.add_adapter(peft.LoraConfig(**LORA))
        plain.save_pretrained(tmp_path / "a", max_shard_size="1KB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"].popitem()
    index.write_text(json.dumps(listed))
    with pytest.raises(FormatError, match="cannot be missing from the index"):
        Adapter.load(tmp_path / "a")
    index.unlink()
    with pytest.raises(StorageError, match=r"has no adapter_model\.safetensors"):
        Adapter.load(tmp_path / "a")

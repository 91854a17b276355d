"""Checkpoints on disk: what a merge writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peft_any
from peft_any import Adapter, PeftModel, merge_checkpoint, read_safetensors, write_safetensors
from peft_any.backend import numpy_dtype
from peft_any.errors import (
    BackendError,
    ConfigError,
    FormatError,
    PeftError,
    ShapeError,
    StorageError,
    TargetError,
    UsageError,
    VerifyError,
)
from peft_any.io.checkpoint import Checkpoint
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.surgery.merge import storage_dtype
from peft_any.testing import missing
from tests.models import BF16, adapter, llama, random_adapter, sharded, single

FILES = Path(__file__).parent / "golden" / "files"
BASES = {"lora-gpt": "gpt", "lora-many": "deep", "lora-classifier": "classifier"}
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
    "xlora",
)
NAMES = sorted(p.name for p in FILES.iterdir() if p.is_dir() and not p.name.startswith(UNMERGED))
QV = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def tree(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def raw(path: Path, name: str) -> bytes:
    with Checkpoint(path) as checkpoint:
        return bytes(checkpoint.shard_of(name).raw(name))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return sharded(tmp_path / "base", llama())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return adapter(tmp_path / "adapter", llama(), QV)


class TestWhatIsWritten:
    def test_shards_index_side_files_and_order_are_kept(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        receipt = merge_checkpoint(model, tuned, tmp_path / "out")
        assert tree(tmp_path / "out") == sorted([*tree(model), "merge_receipt.json"])
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
        index = "model.safetensors.index.json"
        assert json.loads((tmp_path / "out" / index).read_text()) == json.loads(
            (model / index).read_text()
        )
        with Checkpoint(model) as before, Checkpoint(tmp_path / "out") as after:
            assert [*before] == [*after]
            assert before.metadata == after.metadata
            touched = {c.tensor for c in receipt.changes}
            assert {n.split(".")[-2] for n in touched} == {"q_proj", "v_proj"}
            for name in before:
                same = raw(model, name) == raw(tmp_path / "out", name)
                assert same == (name not in touched)
                assert before.info(name).dtype == after.info(name).dtype

    def test_values_are_those_of_a_model_in_memory(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        merge_checkpoint(model, tuned, tmp_path / "out")
        want = peft_any.merge(llama(), Adapter.load(tuned))
        with Checkpoint(tmp_path / "out") as got:
            for name, value in want.items():
                np.testing.assert_array_equal(got[name], value)

    def test_the_receipt_is_the_value_and_the_file(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        receipt = merge_checkpoint(model, tuned, tmp_path / "out")
        text = (tmp_path / "out" / "merge_receipt.json").read_text()
        assert json.loads(text) == json.loads(receipt.to_json()) == receipt.to_dict()
        assert len(receipt.uses) == 8
        assert all(len(use.to) == 1 for use in receipt.uses)
        assert {t.entry: len(t.matched) for t in receipt.targets} == {"q_proj": 2, "v_proj": 2}
        assert receipt.copied == len(llama()) - 4
        assert receipt.base["fingerprint"] != receipt.out["fingerprint"]
        assert all(d.startswith("sha256:") for d in receipt.adapters[0].files.values())
        assert receipt.peak_memory is None or receipt.peak_memory > 1e6

    @pytest.mark.parametrize("name", NAMES)
    def test_every_kind_of_adapter_file(self, name: str, tmp_path: Path) -> None:
        shapes = json.loads((FILES / f"{BASES.get(name, 'net')}.json").read_text())
        rng = np.random.default_rng(0)
        weights = {k: rng.standard_normal(v).astype("float32") for k, v in shapes.items()}
        write_safetensors(tmp_path / "b.safetensors", weights)
        kinds: Any = None if name in BASES else {"out_proj": "Linear"}
        receipt = merge_checkpoint(
            tmp_path / "b.safetensors", FILES / name, tmp_path / "m.safetensors", kinds=kinds
        )
        want = peft_any.merge(weights, Adapter.load(FILES / name), kinds=kinds)
        got = read_safetensors(tmp_path / "m.safetensors")
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=2e-6, atol=2e-6)
            assert (key in {c.tensor for c in receipt.changes}) or (value is weights[key])
        assert all(use.to or use.why for use in receipt.uses)
        audit = peft_any.verify_checkpoint(
            tmp_path / "b.safetensors", FILES / name, tmp_path / "m.safetensors", kinds=kinds
        )
        assert audit.kept is None or audit.kept == pytest.approx(1, abs=1e-5)

    def test_a_file_gives_a_file_with_its_receipt_beside(self, tuned: Path, tmp_path: Path) -> None:
        base = single(tmp_path / "base", llama()) / "model.safetensors"
        out = tmp_path / "new" / "a.safetensors"
        receipt = merge_checkpoint(base, tuned, out)
        assert tree(out.parent) == ["a.safetensors", "merge_receipt.json"]
        assert json.loads((out.parent / "merge_receipt.json").read_text()) == receipt.to_dict()
        merge_checkpoint(base, tuned, out.with_name("b.safetensors"))
        assert "b.merge_receipt.json" in tree(out.parent)
        merge_checkpoint(base, tuned, out, overwrite=True)
        assert len(tree(out.parent)) == 4
        again = json.loads((out.parent / "merge_receipt.json").read_text())
        assert again["out"]["path"] == str(out)

    def test_a_file_gives_a_directory(self, tuned: Path, tmp_path: Path) -> None:
        base = single(tmp_path / "base", llama()) / "model.safetensors"
        merge_checkpoint(base, tuned, tmp_path / "out")
        assert tree(tmp_path / "out") == ["merge_receipt.json", "model.safetensors"]

    def test_shards_cannot_become_a_file(self, model: Path, tuned: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="2 shards"):
            merge_checkpoint(model, tuned, tmp_path / "out.safetensors")

    def test_an_earlier_receipt_is_not_taken_along(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        merge_checkpoint(model, tuned, tmp_path / "one")
        receipt = merge_checkpoint(tmp_path / "one", tuned, tmp_path / "two", any_base=True)
        text = (tmp_path / "two" / "merge_receipt.json").read_text()
        assert json.loads(text)["base"] == receipt.base

    def test_another_dtype_is_for_touched_tensors_alone(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        merge_checkpoint(model, tuned, tmp_path / "out", dtype="fp32")
        exact = {k: v.astype("float64") for k, v in llama().items()}
        want = peft_any.merge(exact, Adapter.load(tuned))
        with Checkpoint(tmp_path / "out") as got:  # which warns of a wrong total_size
            for name in got:
                info = got.info(name)
                wide = name.endswith(("q_proj.weight", "v_proj.weight"))
                assert info.dtype == ("float32" if wide else "bfloat16")
                assert info.start % got[name].dtype.itemsize == 0
                if wide:
                    np.testing.assert_array_equal(got[name], want[name].astype("float32"))

    def test_a_dry_run_computes_all_and_writes_nothing(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        before = tree(tmp_path)
        dry = merge_checkpoint(model, tuned, tmp_path / "out", dry_run=True)
        assert tree(tmp_path) == before
        assert dry.out == {}
        assert merge_checkpoint(model, tuned, dry_run=True).changes == dry.changes
        assert merge_checkpoint(model, tuned, tmp_path / "out").changes == dry.changes

    @pytest.mark.parametrize("library", ["strict", "torch", "jax", "dask"])
    def test_any_library_can_compute(
        self, library: str, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        if reason := missing(library):
            pytest.skip(reason)
        receipt = merge_checkpoint(model, tuned, tmp_path / "out", backend=library)
        assert receipt.options["backend"].startswith(library)
        own = merge_checkpoint(model, tuned, dry_run=True, backend="numpy")
        for got, want in zip(receipt.changes, own.changes, strict=True):
            assert got.kept == pytest.approx(want.kept, rel=1e-3)

    def test_memory_is_a_few_times_the_largest_tensor(self, tmp_path: Path) -> None:
        weights = {f"l.{i}.fc.weight": np.ones((512, 512), "float32") for i in range(16)}
        base = single(tmp_path / "base", weights)
        config = LoraConfig(r=2, target_modules=["fc"])
        tuned = adapter(tmp_path / "a", weights, config)
        tracemalloc.start()
        try:
            merge_checkpoint(base, tuned, tmp_path / "out")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 12 * 2**20

    def test_progress_counts_bytes(self, model: Path, tuned: Path, tmp_path: Path) -> None:
        calls: list[tuple[int, int, str]] = []
        merge_checkpoint(model, tuned, tmp_path / "out", progress=lambda *a: calls.append(a))
        with Checkpoint(model) as base:
            assert calls[-1][:2] == (base.nbytes, base.nbytes)
            assert [name for _, _, name in calls] == [*base]


class TestSeveralAdapters:
    def test_their_effects_are_summed_with_weights(self, model: Path, tmp_path: Path) -> None:
        weights = llama("float32")
        base = single(tmp_path / "wide", weights)
        one = adapter(tmp_path / "one", weights, QV)
        other = adapter(
            tmp_path / "two", weights, OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])
        )
        receipt = merge_checkpoint(base, {one: 0.7, other: -0.3}, tmp_path / "out")
        in_memory = PeftModel(weights)
        in_memory.add("one", Adapter.load(one))
        in_memory.add("two", Adapter.load(other))
        in_memory.activate({"one": 0.7, "two": -0.3})
        with Checkpoint(tmp_path / "out") as got:
            for name, value in in_memory.merge().items():
                np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)
        assert receipt.kept == pytest.approx(1)
        both = next(c for c in receipt.changes if "0.self_attn.q_proj" in c.tensor)
        assert both.by == ("LORA", "OFT")

    def test_lists_paths_and_adapters_are_taken(self, model: Path, tuned: Path) -> None:
        loaded = Adapter.load(tuned)
        half = merge_checkpoint(model, [(tuned, 0.5), (loaded, 0.5)], dry_run=True)
        once = merge_checkpoint(model, loaded, dry_run=True)
        assert half.changes[0].delta_norm == pytest.approx(once.changes[0].delta_norm)
        twice = merge_checkpoint(model, [tuned, tuned], dry_run=True)
        assert [s.label for s in twice.adapters] == [str(tuned), f"{tuned}#2"]
        assert twice.changes[0].delta_norm == pytest.approx(2 * once.changes[0].delta_norm)

    @pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", True])
    def test_weights_are_finite_numbers(self, weight: Any, model: Path, tuned: Path) -> None:
        with pytest.raises(UsageError, match="weight"):
            merge_checkpoint(model, {tuned: weight}, dry_run=True)

    def test_there_must_be_one(self, model: Path) -> None:
        with pytest.raises(UsageError, match="no adapter"):
            merge_checkpoint(model, [], dry_run=True)
        with pytest.raises(UsageError, match=r"adapter\[0\]=3 .* give a path or an Adapter"):
            merge_checkpoint(model, [3], dry_run=True)  # type: ignore[list-item]

    def test_full_copies_are_summed_as_changes(self, tmp_path: Path) -> None:
        weights = llama("float32")
        base = single(tmp_path / "b", weights)
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        head = weights["lm_head.weight"]
        paths = [
            adapter(tmp_path / str(i), weights, config, extra={"lm_head.weight": head + i})
            for i in (1, 2)
        ]
        merge_checkpoint(base, [(paths[0], 0.5), (paths[1], 1.0)], tmp_path / "out")
        with Checkpoint(tmp_path / "out") as got:
            np.testing.assert_allclose(got["lm_head.weight"], head + 2.5, rtol=1e-6)

    @pytest.mark.parametrize(
        "fewer", [{"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}]
    )
    def test_layers_beyond_the_targets_are_told(
        self, fewer: dict[str, Any], tmp_path: Path
    ) -> None:
        weights = llama()
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        folder = adapter(tmp_path / "a", weights, config)
        base = single(tmp_path / "b", weights)
        assert not merge_checkpoint(base, folder, dry_run=True).warnings
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fewer))
        made = merge_checkpoint(base, folder, dry_run=True)
        (said,) = made.warnings
        assert "does not target are merged" in said
        assert "model.layers.1.self_attn.q_proj and 0 more: Hugging Face PEFT leaves" in said
        assert len(made.changes) == 2

    def test_faults_of_all_of_them_are_listed(self, model: Path, tmp_path: Path) -> None:
        other = {k.replace("q_proj", "query"): v for k, v in llama().items()}
        paths = [
            adapter(tmp_path / str(i), other, LoraConfig(r=2, target_modules=["query"]))
            for i in (1, 2)
        ]
        with pytest.raises(TargetError) as error:
            merge_checkpoint(model, paths, dry_run=True)
        for path in paths:
            assert str(path) in str(error.value)


class TestTies:
    """One stored tensor under two names."""

    TIED = llama(head=False)

    def base(self, tmp_path: Path, **config: Any) -> Path:
        return sharded(tmp_path / "base", self.TIED, **{"tie_word_embeddings": True, **config})

    def test_an_adapted_embedding_is_parted_from_the_head(self, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["embed_tokens"])
        tuned = adapter(tmp_path / "a", self.TIED, config)
        base = self.base(tmp_path, text_config={"tie_word_embeddings": True})
        receipt = merge_checkpoint(base, tuned, tmp_path / "out")
        assert receipt.untied == ("model.embed_tokens.weight", "lm_head.weight")
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["tie_word_embeddings"] is False
        assert written["text_config"] == {"tie_word_embeddings": False}
        with Checkpoint(tmp_path / "out") as got:
            np.testing.assert_array_equal(
                got["lm_head.weight"], self.TIED["model.embed_tokens.weight"]
            )
            assert np.any(got["model.embed_tokens.weight"] != got["lm_head.weight"])
            assert got.index is not None
            assert got.index["metadata"]["total_size"] == got.nbytes
        assert peft_any.verify_checkpoint(base, tuned, tmp_path / "out").untied == receipt.untied
        (tmp_path / "out" / "config.json").write_text((base / "config.json").read_text())
        with pytest.raises(VerifyError, match="ties them"):
            peft_any.verify_checkpoint(base, tuned, tmp_path / "out")

    def test_an_adapted_head_that_is_not_stored(self, tmp_path: Path) -> None:
        whole = {**self.TIED, "lm_head.weight": self.TIED["model.embed_tokens.weight"]}
        tuned = adapter(tmp_path / "a", whole, LoraConfig(r=2, target_modules=["lm_head"]))
        merge_checkpoint(self.base(tmp_path), tuned, tmp_path / "out")
        want = peft_any.merge(whole, Adapter.load(tuned))
        with Checkpoint(tmp_path / "out") as got:
            assert [*got] == ["model.embed_tokens.weight", "lm_head.weight", *[*self.TIED][1:]]
            for name, value in want.items():
                np.testing.assert_array_equal(got[name], value)

    def test_both_may_be_stored(self, tmp_path: Path) -> None:
        whole = {**self.TIED, "lm_head.weight": self.TIED["model.embed_tokens.weight"]}
        base = single(tmp_path / "base", whole, tie_word_embeddings=True)
        tuned = adapter(tmp_path / "a", whole, LoraConfig(r=2, target_modules=["lm_head"]))
        receipt = merge_checkpoint(base, tuned, tmp_path / "out")
        assert set(receipt.untied) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]

    def test_a_single_file_cannot_say_that_they_are_parted(self, tmp_path: Path) -> None:
        base = single(tmp_path / "base", self.TIED, tie_word_embeddings=True)
        config = LoraConfig(r=2, target_modules=["embed_tokens"])
        tuned = adapter(tmp_path / "a", self.TIED, config)
        with pytest.raises(TargetError, match="give a directory"):
            merge_checkpoint(base / "model.safetensors", tuned, tmp_path / "out.safetensors")
        merge_checkpoint(base / "model.safetensors", tuned, tmp_path / "out")
        assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]

    @pytest.mark.parametrize("equal", [True, False])
    def test_full_copies_of_both(self, equal: bool, tmp_path: Path) -> None:
        table = self.TIED["model.embed_tokens.weight"].astype("float32")
        extra = {"model.embed_tokens.weight": table + 1, "lm_head.weight": table + 2 - equal}
        config = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
        )
        whole = {**self.TIED, "lm_head.weight": self.TIED["model.embed_tokens.weight"]}
        tuned = adapter(tmp_path / "a", whole, config, extra=extra)
        receipt = merge_checkpoint(self.base(tmp_path), tuned, tmp_path / "out")
        assert bool(receipt.untied) != equal
        with Checkpoint(tmp_path / "out") as got:
            assert ("lm_head.weight" in got) != equal
            for name in set(got) & set(extra):
                np.testing.assert_array_equal(got[name], extra[name].astype(BF16))
        peft_any.verify_checkpoint(tmp_path / "base", tuned, tmp_path / "out")

    @pytest.mark.parametrize("stored", [1, 2])
    def test_new_rows_act_on_both(self, stored: int, tmp_path: Path) -> None:
        weights = dict(self.TIED)
        if stored == 2:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        config = LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 4]}
        )
        rows = {"model.embed_tokens": np.full((2, 8), 0.5, "float32")}
        tuned = adapter(tmp_path / "a", weights, config, tokens=rows)
        base = single(tmp_path / "base", weights, tie_word_embeddings=True)
        receipt = merge_checkpoint(base, tuned, tmp_path / "out")
        assert not receipt.untied
        with Checkpoint(tmp_path / "out") as got:
            assert len(got) == len(weights)
            for name in ("model.embed_tokens.weight", "lm_head.weight")[:stored]:
                assert np.all(got[name][[1, 4]] == 0.5)
                assert np.array_equal(got[name][2:4], weights[name][2:4])
        peft_any.verify_checkpoint(base, tuned, tmp_path / "out")

    def test_ties_that_no_configuration_undoes_are_refused(self, tmp_path: Path) -> None:
        weights = {
            "shared.weight": np.ones((9, 4), "float32"),
            "encoder.block.0.q.weight": np.ones((4, 4), "float32"),
        }
        base = single(
            tmp_path / "b", weights, architectures=["T5ForConditionalGeneration"], model_type="t5",
            tie_word_embeddings=True,
        )  # fmt: skip
        whole = {**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}
        config = LoraConfig(r=2, target_modules=["encoder.embed_tokens"])
        tuned = adapter(tmp_path / "a", whole, config)
        with pytest.raises(TargetError, match="are one tensor"):
            merge_checkpoint(base, tuned, tmp_path / "out")


class TestGrowth:
    def parts(self, tmp_path: Path, rows: int, names: tuple[str, ...], **config: Any) -> Any:
        weights = llama(head=not config.get("tie_word_embeddings"))
        base = sharded(tmp_path / "base", weights, **config)
        rng = np.random.default_rng(0)
        table = rng.standard_normal((rows, 8)).astype("float32")
        made = random_adapter(weights, QV).replace(extra=dict.fromkeys(names, table))
        made.save(tmp_path / "a")
        return base, tmp_path / "a", table.astype(BF16)

    @pytest.mark.parametrize("rows", [13, 9])
    def test_a_vocabulary_may_grow_and_shrink(self, rows: int, tmp_path: Path) -> None:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        base, tuned, table = self.parts(tmp_path, rows, names)
        receipt = merge_checkpoint(base, tuned, tmp_path / "out")
        with Checkpoint(tmp_path / "out") as got:
            for name in names:
                np.testing.assert_array_equal(got[name], table)
            assert got.index is not None
            assert got.index["metadata"]["total_size"] == got.nbytes
        assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows
        change = next(c for c in receipt.changes if c.tensor == names[0])
        assert (change.base_shape, change.shape) == ((11, 8), (rows, 8))
        assert any(f"from 11 to {rows} rows" in w for w in receipt.warnings)
        peft_any.verify_checkpoint(base, tuned, tmp_path / "out")

    def test_a_head_that_the_base_lacks_is_new(self, tmp_path: Path) -> None:
        weights, tuned = llama(), tmp_path / "a"
        base = sharded(
            tmp_path / "base", weights | {"cls.q_proj.weight": weights["lm_head.weight"]}
        )
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
        head = np.random.default_rng(0).standard_normal((3, 8)).astype("float32")
        made = random_adapter(weights, config).replace(extra={"score.weight": head})
        made.save(tuned)
        receipt = merge_checkpoint(base, tuned, tmp_path / "out")
        assert "score.weight: is new: the base has no such head" in receipt.warnings
        with Checkpoint(tmp_path / "out") as got, Checkpoint(base) as before:
            np.testing.assert_array_equal(got["score.weight"], head)
            assert {*got} == {*before, "score.weight"}
            assert got.index is not None
            assert got.index["metadata"]["total_size"] == got.nbytes
        assert len(json.loads((tmp_path / "out/config.json").read_text())["id2label"]) == 3
        peft_any.verify_checkpoint(base, tuned, tmp_path / "out")
        with pytest.raises(TargetError, match=r"without the prefix 'net.'"):
            merge_checkpoint(base, made.renamed(lambda name: f"net.{name}"), tmp_path / "other")
        with pytest.raises(TargetError, match=r"score.weight: the change to 3 rows cannot be sum"):
            merge_checkpoint(base, {tuned: 0.5}, tmp_path / "half")
        with pytest.raises(ShapeError, match=r"score.weight: .* no tensor of this size"):
            peft_any.combine({tuned: 0.5}, base=base)

    def test_tied_tables_grow_together(self, tmp_path: Path) -> None:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        base, tuned, table = self.parts(tmp_path, 13, names, tie_word_embeddings=True)
        receipt = merge_checkpoint(base, tuned, tmp_path / "out")
        assert not receipt.untied
        with Checkpoint(tmp_path / "out") as got:
            np.testing.assert_array_equal(got[names[0]], table)
            assert names[1] not in got

    def test_one_of_two_tied_tables_cannot_grow(self, tmp_path: Path) -> None:
        names = ("model.embed_tokens.weight",)
        base, tuned, _ = self.parts(tmp_path / "tied", 13, names, tie_word_embeddings=True)
        with pytest.raises(TargetError, match=r"lm_head.weight: has 11 rows.*must carry both"):
            merge_checkpoint(base, tuned, tmp_path / "out")

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
    def test_an_embedding_and_its_head_are_resized_together(
        self, name: str, tmp_path: Path
    ) -> None:
        base, tuned, _ = self.parts(tmp_path, 13, (name,))
        with pytest.raises(TargetError, match="must carry both"):
            merge_checkpoint(base, tuned, tmp_path / "out")

    def test_a_share_of_a_resize_is_nothing(self, tmp_path: Path) -> None:
        base, tuned, _ = self.parts(tmp_path, 13, ("lm_head.weight",))
        with pytest.raises(TargetError, match="cannot be summed"):
            merge_checkpoint(base, {tuned: 0.5}, tmp_path / "out")

    def test_adapters_that_resize_differently_are_refused(self, tmp_path: Path) -> None:
        base, one, _ = self.parts(tmp_path / "1", 13, ("lm_head.weight",))
        _, two, _ = self.parts(tmp_path / "2", 14, ("lm_head.weight",))
        with pytest.raises(ShapeError, match="resizes it to 14"):
            merge_checkpoint(base, [one, two], dry_run=True)

    def test_a_resized_table_may_be_adapted_too(self, tmp_path: Path) -> None:
        base = sharded(tmp_path / "base", llama("float32", head=False))
        large = {
            **llama("float32", head=False),
            "model.embed_tokens.weight": np.ones((13, 8), "float32"),
        }
        config = LoraConfig(r=2, target_modules=["embed_tokens"])
        made = random_adapter(large, config)
        made = made.replace(extra={"model.embed_tokens.weight": np.ones((13, 8), "float32")})
        made.save(tmp_path / "a")
        merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
        wide = {name: value.astype("float64") for name, value in large.items()}
        want = peft_any.merge(wide, made)["model.embed_tokens.weight"]
        with Checkpoint(tmp_path / "out") as got:
            np.testing.assert_allclose(got["model.embed_tokens.weight"], want, rtol=1e-6)

    def test_only_tables_of_tokens_are_resized(self, tmp_path: Path) -> None:
        base = sharded(tmp_path / "base", llama())
        made = random_adapter(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        extra = {"model.layers.0.mlp.up_proj.weight": np.ones((14, 8), "float32")}
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["0.mlp.up_proj"])
        made.replace(extra=extra, config=config).save(tmp_path / "a")
        with pytest.raises(ShapeError, match="cannot replace"):
            merge_checkpoint(base, tmp_path / "a", dry_run=True)


class TestTruth:
    """What the receipt says of rounding."""

    def rounded(self, ratio: float) -> tuple[np.ndarray, Adapter]:
        rng = np.random.default_rng(0)
        w = rng.standard_normal((256, 256)).astype("float32").astype(BF16)
        config = LoraConfig(r=8, lora_alpha=8, target_modules=["fc"])
        made = random_adapter({"fc.weight": w}, config, scale=1.0)
        p = made.sites["fc"]
        delta = p["lora_B.weight"] @ p["lora_A.weight"]
        p["lora_B.weight"] *= ratio * np.linalg.norm(w.astype("f4")) / np.linalg.norm(delta)
        return w, made

    def test_one_rounding_keeps_more_than_two(self, tmp_path: Path) -> None:
        w, made = self.rounded(5e-3)
        p = made.sites["fc"]
        base = single(tmp_path / "b", {"fc.weight": w})
        ours = merge_checkpoint(base, made, tmp_path / "out").changes[0]
        delta = (p["lora_B.weight"] @ p["lora_A.weight"]).astype(BF16)
        twice = (w + delta).astype(BF16)  # the change rounded first, then the sum
        theirs = single(tmp_path / "theirs", {"fc.weight": twice})
        audit = peft_any.verify_checkpoint(base, made, theirs, min_kept=0.5).changes[0]
        assert ours.relative == pytest.approx(5e-3, rel=1e-3)
        assert 0.25 < ours.unchanged < 0.37
        assert 0.25 < ours.error < 0.37
        assert ours.error < audit.error
        assert 0.95 < ours.kept < 1.05

    def test_a_small_change_is_lost_and_said_so(self, tmp_path: Path) -> None:
        w, made = self.rounded(1e-3)
        base = single(tmp_path / "b", {"fc.weight": w})
        receipt = merge_checkpoint(base, made, dry_run=True)
        assert receipt.unchanged > 0.7
        with pytest.raises(VerifyError, match=r"(?s)fc.weight: kept 0.*dtype float32") as error:
            merge_checkpoint(base, made, tmp_path / "out", min_kept=0.9)
        assert error.value.receipt.changes == receipt.changes
        assert tree(tmp_path) == sorted(["b", *(f"b/{n}" for n in tree(tmp_path / "b"))])
        wide = merge_checkpoint(base, made, tmp_path / "out", min_kept=0.999, dtype="float32")
        assert wide.changes[0].error < 1e-4

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, target_modules=["fc"]),
            LoraConfig(r=2, target_modules=["fc"], use_dora=True),
            IA3Config(target_modules=["fc"], feedforward_modules=[]),
            OFTConfig(r=0, oft_block_size=4, target_modules=["fc"]),
        ],
        ids=["lora", "dora", "ia3", "oft"],
    )
    def test_float32_bases_lose_little_and_not_nothing(self, config: Any, tmp_path: Path) -> None:
        weights = {"fc.weight": np.random.default_rng(1).standard_normal((16, 8)).astype("f4")}
        made = random_adapter(weights, config, scale=1e-3)
        base = single(tmp_path / "b", weights)
        change = merge_checkpoint(base, made, dry_run=True).changes[0]
        assert 0 < change.error < 1e-2
        assert change.kept == pytest.approx(1, abs=1e-2)

    def test_a_fresh_adapter_changes_nothing(self, tmp_path: Path) -> None:
        weights = llama()
        base = single(tmp_path / "b", weights)
        PeftModel(weights).add("a", QV).save(tmp_path / "a")
        receipt = merge_checkpoint(base, tmp_path / "a", tmp_path / "out", min_kept=1.0)
        assert receipt.kept is None
        assert receipt.unchanged == 1
        assert peft_any.verify_checkpoint(base, tmp_path / "a", base).problems == ()

    @given(
        dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"]),
        shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        scale=st.floats(1e-4, 1.0),
    )
    def test_a_merge_is_rounded_once(
        self, dtype: str, shape: tuple[int, int], scale: float, tmp_path_factory: Any
    ) -> None:
        rng = np.random.default_rng(2)
        w = rng.standard_normal(shape).astype(numpy_dtype(dtype))
        made = random_adapter({"fc.weight": w}, LoraConfig(r=2, target_modules=["fc"]), scale=scale)
        p = {k: v.astype("float64") for k, v in made.sites["fc"].items()}
        root = tmp_path_factory.mktemp("x")
        write_safetensors(root / "b.safetensors", {"fc.weight": w})
        merge_checkpoint(root / "b.safetensors", made, root / "m.safetensors")
        got = read_safetensors(root / "m.safetensors")["fc.weight"]
        exact = w.astype("float64") + 4 * p["lora_B.weight"] @ p["lora_A.weight"]
        best = np.abs(exact.astype(got.dtype).astype("float64") - exact)
        limit = best + 1e-6 * (1 + np.abs(exact).max())
        assert np.all(np.abs(got.astype("float64") - exact) <= limit)


class TestLeftovers:
    """What adapter files hold beside a method's parameters."""

    def test_counters_are_copied_as_they_are(self, tmp_path: Path) -> None:
        weights = {
            "fc.weight": np.ones((4, 4), "float32"),
            "bn.weight": np.ones(4, "float32"),
            "bn.num_batches_tracked": np.asarray(3),
        }
        base = single(tmp_path / "b", weights)
        config = LoraConfig(r=2, target_modules=["fc"], modules_to_save=["bn"])
        extra = {"bn.weight": np.full(4, 2, "float32"), "bn.num_batches_tracked": np.asarray(9)}
        made = random_adapter(weights, config).replace(extra=extra)
        merge_checkpoint(base, made, tmp_path / "out", dtype="bfloat16")
        with Checkpoint(tmp_path / "out") as got:
            assert got["bn.num_batches_tracked"] == 9
            assert got.info("bn.num_batches_tracked").dtype == "int64"
            assert got.info("bn.weight").dtype == "bfloat16"
        peft_any.verify_checkpoint(base, made, tmp_path / "out")
        with pytest.raises(TargetError, match="int64 values cannot be summed"):
            merge_checkpoint(base, [(made, 0.5)], dry_run=True)

    def test_rows_of_an_embedding_that_is_not_there(self, tmp_path: Path) -> None:
        weights = llama()
        base = single(tmp_path / "b", weights)
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"emb": [0]})
        made = random_adapter(weights, LoraConfig(r=2, target_modules=["q_proj"]))
        made = made.replace(config=config, tokens={"emb": np.ones((1, 8), "float32")})
        receipt = merge_checkpoint(base, made, tmp_path / "out", strict=False)
        assert any("emb.weight" in w for w in receipt.warnings)
        assert next(u for u in receipt.uses if "delta" in u.tensor).to == ()

    def test_values_without_effect_are_accounted_for(self, tmp_path: Path) -> None:
        weights = llama()
        made = random_adapter(weights, QV).replace(spare={"x": np.ones(2, "float32")})
        receipt = merge_checkpoint(single(tmp_path / "b", weights), made, dry_run=True)
        assert "without" not in receipt.uses[-1].why
        assert receipt.uses[-1].tensor == "x"
        assert receipt.uses[-1].to == ()
        tuned = adapter(tmp_path / "a", weights, QV)
        path = tuned / "adapter_model.safetensors"
        loose = {**read_safetensors(path), "what.is.this": np.ones(2, "float32")}
        write_safetensors(path, loose, {"format": "pt"}, overwrite=True)
        with pytest.raises(TargetError, match=r"what\.is\.this"):
            merge_checkpoint(tmp_path / "b", tuned, dry_run=True)
        receipt = merge_checkpoint(tmp_path / "b", tuned, dry_run=True, strict=False)
        assert next(u for u in receipt.uses if u.tensor == "what.is.this").to == ()
        assert any("what.is.this" in w for w in receipt.warnings)

    def test_a_decomposition_is_redone_when_asked(self, tmp_path: Path) -> None:
        weights = llama("float32")
        base = single(tmp_path / "b", weights)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        model = PeftModel(weights)
        whole = model.add("a", config)
        for p in whole.sites.values():
            p["lora_A.weight"] = p["lora_A.weight"] + 0.1
        plain = whole.replace(
            sites={
                s: {k: a for k, a in p.items() if "start" not in k} for s, p in whole.sites.items()
            }
        )
        with pytest.raises(ConfigError, match="rederive"):
            merge_checkpoint(base, plain, tmp_path / "out")
        merge_checkpoint(base, plain, tmp_path / "out", rederive=True)
        with Checkpoint(tmp_path / "out") as got:
            for name, value in peft_any.merge(weights, whole).items():
                np.testing.assert_allclose(got[name], value, atol=1e-5)
        other = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        tuned = adapter(tmp_path / "a", weights, other)
        with pytest.raises(ConfigError, match="nothing to redo"):
            merge_checkpoint(base, tuned, dry_run=True, rederive=True)

    def test_libraries_without_doubles_compute_in_single_precision(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = llama("float32")
        config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        made = random_adapter(weights, config)
        base = single(tmp_path / "b", weights)
        fine = merge_checkpoint(base, made, dry_run=True)

        def refuse(*_: Any) -> bool:
            raise BackendError("no doubles here")

        monkeypatch.setattr("peft_any.surgery.compute.is_double", refuse)
        coarse = merge_checkpoint(base, made, dry_run=True)
        assert coarse.changes[0].delta_norm == pytest.approx(fine.changes[0].delta_norm, rel=1e-5)


class TestRefusals:
    """Bad input: said in full, and nothing written."""

    def refused(
        self, kind: type[PeftError], words: str, base: Path, tuned: Any, **options: Any
    ) -> str:
        root = base.parent
        before = tree(root)
        with pytest.raises(kind, match=words) as error:
            merge_checkpoint(base, tuned, root / "out", **options)
        assert tree(root) == before
        return str(error.value)

    def test_an_output_that_exists(self, model: Path, tuned: Path, tmp_path: Path) -> None:
        merge_checkpoint(model, tuned, tmp_path / "out")
        self.refused(StorageError, "exists", model, tuned)
        self.refused(StorageError, "exists", model, tuned, dry_run=True)
        merge_checkpoint(model, tuned, tmp_path / "out", overwrite=True)

    def test_an_output_over_the_base(self, model: Path, tuned: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="input"):
            merge_checkpoint(model, tuned, model, overwrite=True)
        with pytest.raises(UsageError, match="input"):
            merge_checkpoint(model, tuned, tuned, overwrite=True)

    def test_no_output(self, model: Path, tuned: Path) -> None:
        with pytest.raises(UsageError, match="out"):
            merge_checkpoint(model, tuned)

    def test_a_share_that_cannot_be(self, model: Path, tuned: Path) -> None:
        for share in (1.5, float("nan")):
            self.refused(UsageError, "min_kept", model, tuned, min_kept=share)

    @pytest.mark.parametrize("name", ["int8", "complex64", "float31", "float4_e2m1fn", ""])
    def test_a_dtype_that_is_none(self, name: str, model: Path, tuned: Path) -> None:
        self.refused(UsageError, "cannot be stored", model, tuned, dtype=name)

    def test_dtypes_have_short_names(self) -> None:
        names = "float", "fp16", "BF16", "fp32", "fp8", "float8_e5m2"
        assert [*map(storage_dtype, names)] == [
            "float32", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2",
        ]  # fmt: skip

    def test_a_mistyped_target(self, model: Path, tmp_path: Path) -> None:
        made = random_adapter(llama(), QV)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_porj"])
        text = self.refused(TargetError, "v_porj", model, made.replace(config=config))
        assert "'v_proj'" in text

    def test_missing_and_extra_tensors(self, model: Path, tuned: Path) -> None:
        path = tuned / "adapter_model.safetensors"
        tensors = read_safetensors(path)
        gone = next(iter(tensors))
        kept = {k: v for k, v in tensors.items() if k != gone}
        write_safetensors(path, kept, {"format": "pt"}, overwrite=True)
        self.refused(ShapeError, "missing", model, tuned)
        extra = {**tensors, "base_model.model.lm_head.lora_C.weight": np.ones(2, "float32")}
        write_safetensors(path, extra, {"format": "pt"}, overwrite=True)
        self.refused(PeftError, "lora_C", model, tuned)

    def test_modules_that_the_base_lacks_are_all_listed(self, model: Path, tmp_path: Path) -> None:
        other = {k.replace("q_proj", "query"): v for k, v in llama().items()}
        tuned = adapter(tmp_path / "a", other, LoraConfig(r=2, target_modules=["query"]))
        text = self.refused(TargetError, "no such layer", model, tuned)
        assert "layers.0" in text
        assert "layers.1" in text

    def test_strictness_is_given_up_only_when_asked(self, tmp_path: Path) -> None:
        weights = llama()
        base = single(tmp_path / "b", weights)
        more = {**weights, "extra.q_proj.weight": weights["lm_head.weight"]}
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
        made = random_adapter(more, LoraConfig(r=2, target_modules=["q_proj"]))
        extra = {"model.score.weight": np.ones((2, 8), "float32")}
        made.replace(config=config, extra=extra).save(tmp_path / "a")
        self.refused(TargetError, "model.score.weight", base, tmp_path / "a")
        receipt = merge_checkpoint(base, tmp_path / "a", tmp_path / "out", strict=False)
        assert receipt.options["strict"] is False
        assert sum("left out" in use.why for use in receipt.uses) == 3
        assert any("extra.q_proj" in w for w in receipt.warnings)
        assert any("model.score.weight" in w for w in receipt.warnings)
        target = next(t for t in receipt.targets if t.entry == "score")
        assert target.matched == ()

    def test_wrong_ranks_and_shapes(self, tmp_path: Path) -> None:
        wide = single(tmp_path / "b", llama(width=16))
        self.refused(ShapeError, "q_proj", wide, adapter(tmp_path / "a", llama(), QV))
        config = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        made = random_adapter(llama(width=16), QV).replace(config=config)
        self.refused(ShapeError, "q_proj", wide, made)

    def test_values_in_the_adapter_that_are_not_finite(self, model: Path, tmp_path: Path) -> None:
        made = random_adapter(llama(), QV)
        made.sites["model.layers.1.self_attn.q_proj"]["lora_A.weight"][0, 0] = np.nan
        made.save(tmp_path / "a")
        text = self.refused(FormatError, "NaN", model, tmp_path / "a")
        assert "layers.1.self_attn.q_proj.lora_A" in text

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_in_the_base_that_are_not_finite(self, value: float, tmp_path: Path) -> None:
        weights = llama()
        weights["model.layers.1.self_attn.v_proj.weight"][0, 1] = value
        base = sharded(tmp_path / "b", weights)
        tuned = adapter(tmp_path / "a", weights, QV)
        self.refused(FormatError, "layers.1.self_attn.v_proj.weight", base, tuned)

    def test_values_elsewhere_in_the_base_are_its_own(self, tmp_path: Path) -> None:
        weights = llama()
        weights["model.norm.weight"][0] = np.nan
        base = sharded(tmp_path / "b", weights)
        tuned = adapter(tmp_path / "a", llama(), QV)
        merge_checkpoint(base, tuned, tmp_path / "out")
        assert raw(base, "model.norm.weight") == raw(tmp_path / "out", "model.norm.weight")

    def test_results_that_overflow(self, tmp_path: Path) -> None:
        weights = llama("float16")
        weights["model.layers.0.self_attn.q_proj.weight"][:] = 6e4
        base = sharded(tmp_path / "b", weights)
        tuned = adapter(tmp_path / "a", weights, QV, scale=200.0)
        self.refused(VerifyError, "overflow float16", base, tuned)
        merge_checkpoint(base, tuned, tmp_path / "out", dtype="bfloat16")

    def test_quantised_bases(self, tmp_path: Path) -> None:
        weights = llama()
        tuned = adapter(tmp_path / "a", weights, QV)
        whole = dict(weights)
        name = "model.layers.0.self_attn.q_proj.weight"
        weights[name] = np.ones((8, 8), "int8")
        self.refused(TargetError, "quantised", single(tmp_path / "b", weights), tuned)
        whole[f"{name}_scale_inv"] = np.ones((1, 1), "float32")
        self.refused(TargetError, "weight_scale_inv", single(tmp_path / "c", whole), tuned)

    def test_methods_without_a_merged_form(self, model: Path, tmp_path: Path) -> None:
        config = PromptTuningConfig(num_virtual_tokens=2, token_dim=8, num_layers=1)
        PeftModel(llama()).add("p", config).save(tmp_path / "a")
        self.refused(ConfigError, "virtual tokens", model, tmp_path / "a")

    def test_a_bias_correction_without_a_bias(self, model: Path, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["v_proj"], lora_bias=True)
        tuned = adapter(tmp_path / "a", llama(), config)
        self.refused(TargetError, "v_proj.bias", model, tuned)

    def test_a_truncated_base(self, model: Path, tuned: Path) -> None:
        shard = sorted(model.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-3])
        self.refused(FormatError, shard.name, model, tuned)

    def test_an_index_that_leads_outside(self, model: Path, tuned: Path) -> None:
        index = model / "model.safetensors.index.json"
        text = index.read_text().replace("model-00001", "../model-00001")
        index.write_text(text)
        self.refused(FormatError, "outside", model, tuned)

    def test_a_truncated_adapter(self, model: Path, tuned: Path) -> None:
        path = tuned / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        self.refused(FormatError, "adapter_model", model, tuned)

    def test_a_configuration_that_is_no_json(self, model: Path, tuned: Path) -> None:
        (tuned / "adapter_config.json").write_text("{")
        self.refused(FormatError, "adapter_config.json", model, tuned)

    def test_an_unknown_method(self, model: Path, tuned: Path) -> None:
        path = tuned / "adapter_config.json"
        path.write_text(path.read_text().replace('"LORA"', '"LORRA"'))
        self.refused(ConfigError, "LORRA", model, tuned)

    def test_a_pickled_adapter(self, model: Path, tuned: Path) -> None:
        (tuned / "adapter_model.safetensors").rename(tuned / "adapter_model.bin")
        self.refused(FormatError, "pickle", model, tuned)

    def test_a_pickled_base(self, tuned: Path, tmp_path: Path) -> None:
        root = tmp_path / "b"
        root.mkdir()
        (root / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
        self.refused(FormatError, "safetensors", root, tuned)

    def test_missing_inputs(self, model: Path, tuned: Path, tmp_path: Path) -> None:
        self.refused(StorageError, "nowhere", tmp_path / "nowhere", tuned)
        self.refused(StorageError, "nowhere", model, tmp_path / "nowhere")

    def test_adapters_that_disagree_on_a_layer(self, tmp_path: Path) -> None:
        weights = {"emb.weight": np.ones((5, 4), "float32")}
        base = single(tmp_path / "b", weights)
        made = random_adapter(weights, LoraConfig(r=2, target_modules=["emb"]))
        kinds: Any = {"emb": "Linear"}
        other = PeftModel(weights, kinds=kinds).add("x", LoraConfig(r=2, target_modules=["emb"]))
        with pytest.raises(ShapeError, match="Embedding"):
            merge_checkpoint(base, [made, other], dry_run=True)


class TestTrouble:
    """Disks and people: the output is whole, or not there."""

    def stopped(self, kind: type[BaseException], act: Callable[[], object], root: Path) -> str:
        before = tree(root)
        with pytest.raises(kind) as error:
            act()
        assert tree(root) == before
        return str(error.value)

    def test_an_interrupt(self, model: Path, tuned: Path, tmp_path: Path) -> None:
        def stop(done: int, total: int, name: str) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        for out in (tmp_path / "out", tmp_path / "deep" / "er"):
            self.stopped(
                KeyboardInterrupt,
                lambda out=out: merge_checkpoint(model, tuned, out, progress=stop),  # type: ignore[misc]
                tmp_path,
            )

    def test_an_interrupt_over_an_earlier_output(
        self, model: Path, tuned: Path, tmp_path: Path
    ) -> None:
        merge_checkpoint(model, tuned, tmp_path / "out")
        text = (tmp_path / "out" / "merge_receipt.json").read_text()

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(model, tuned, tmp_path / "out", overwrite=True, progress=stop)
        assert (tmp_path / "out" / "merge_receipt.json").read_text() == text

    @pytest.mark.parametrize("single_file", [True, False])
    def test_a_full_disk(
        self, single_file: bool, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = single(tmp_path / "base", llama())
        out = tmp_path / "out.safetensors" if single_file else tmp_path / "out"
        write, room = os.pwrite, [2000]

        def full(handle: int, data: Any, at: int) -> int:
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, data, at)

        monkeypatch.setattr(os, "pwrite", full)
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        text = self.stopped(StorageError, lambda: merge_checkpoint(base, tuned, out), tmp_path)
        assert "no space" in text
        assert str(out) in text

    def test_a_disk_that_fills_up_at_the_receipt(
        self, model: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = Path.write_text

        def full(self: Path, *args: Any, **kwargs: Any) -> int:
            if self.name == "merge_receipt.json":
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", full)
        self.stopped(
            StorageError, lambda: merge_checkpoint(model, tuned, tmp_path / "out"), tmp_path
        )

    def test_a_side_file_that_cannot_be_copied(
        self, model: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise OSError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(shutil, "copyfileobj", denied)
        text = self.stopped(
            StorageError, lambda: merge_checkpoint(model, tuned, tmp_path / "out"), tmp_path
        )
        assert "config.json" in text

    def test_a_read_only_place(
        self, model: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", denied)
        text = self.stopped(
            StorageError, lambda: merge_checkpoint(model, tuned, tmp_path / "out"), tmp_path
        )
        assert "read-only" in text


@pytest.mark.parametrize("to_file", [False, True])
def test_the_seconds_of_a_receipt_are_the_whole_time(
    to_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that takes its time once for each shard; not of the small files that follow."""
    real, slow, known = os.fsync, 0.5, set()

    def fsync(handle: int) -> None:
        found = os.fstat(handle)
        if stat.S_ISREG(found.st_mode) and found.st_size > 10_000 and found.st_ino not in known:
            known.add(found.st_ino)
            time.sleep(slow)
        real(handle)

    weights = {"fc.weight": np.ones((64, 64), "float32")}
    write_safetensors(tmp_path / "base.safetensors", weights)
    made = PeftModel(weights).add("a", LoraConfig(r=2, target_modules=["fc"]))
    made.save(tmp_path / "a")
    out = tmp_path / ("out.safetensors" if to_file else "out")
    monkeypatch.setattr(os, "fsync", fsync)
    start = time.perf_counter()
    receipt = merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", out)
    took = time.perf_counter() - start
    assert known
    total = sum(receipt.seconds.values())
    assert took - slow / 2 < total < took + 0.002
    assert receipt.seconds["sync"] > slow / 2
    (path,) = tmp_path.glob("out*/merge_receipt.json") if not to_file else tmp_path.glob("*.json")
    assert json.loads(path.read_text())["seconds"] == receipt.seconds

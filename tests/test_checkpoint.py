"""Base checkpoints, their indices and surroundings, and outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any.errors import FormatError, PeftError, StorageError, UsageError
from peft_any.io._fingerprint import checksum
from peft_any.io._json import parse_object, read_json
from peft_any.io._overlap import refuse_overlap
from peft_any.io.checkpoint import Checkpoint, fingerprint, output_directory, output_file
from peft_any.io.safetensors import SafetensorsFile, read_safetensors, write_safetensors
from peft_any.testing.strategies import hostile_files

Weights = dict[str, np.ndarray[Any, Any]]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def weights(**change: Any) -> Weights:
    """Three small tensors."""
    full = {
        "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(6, 2),
        "model.layers.0.fc.weight": np.ones((2, 2), ml_dtypes.bfloat16),
        "model.layers.0.fc.bias": np.zeros(2, ml_dtypes.bfloat16),
    }
    return full | change


def single(root: Path, tensors: Weights | None = None, **config: Any) -> Path:
    """A directory with model.safetensors and its configuration."""
    root.mkdir(parents=True, exist_ok=True)
    write_safetensors(root / "model.safetensors", tensors or weights(), {"format": "pt"})
    (root / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return root


def sharded(root: Path, weight_map: object = None, total_size: object = 60) -> Path:
    """The same in two shards with their index; `weight_map` replaces the right one."""
    root.mkdir(parents=True, exist_ok=True)
    tensors = weights()
    embed = "model.embed_tokens.weight"
    write_safetensors(root / TWO, {embed: tensors.pop(embed)}, {"format": "pt"})
    write_safetensors(root / ONE, tensors, {"format": "pt"})
    if weight_map is None:
        weight_map = {**dict.fromkeys(tensors, ONE), embed: TWO}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (root / INDEX).write_text(json.dumps(index))
    return root


def right_map(**change: Any) -> dict[str, Any]:
    """The weight_map that `sharded` writes, with changes."""
    return {
        "model.layers.0.fc.weight": ONE,
        "model.layers.0.fc.bias": ONE,
        "model.embed_tokens.weight": TWO,
    } | change


class TestCheckpoint:
    """One mapping, however the weights are stored."""

    @pytest.mark.parametrize("make", [single, sharded])
    @pytest.mark.parametrize("spelling", ["directory", "file"])
    def test_reads(self, tmp_path: Path, make: Callable[[Path], Path], spelling: str) -> None:
        path = make(tmp_path / "base")
        if spelling == "file":
            path /= "model.safetensors" if make is single else INDEX
        with Checkpoint(path) as base:
            assert dict(base).keys() == weights().keys()
            for name, value in weights().items():
                np.testing.assert_array_equal(base[name], value)
                assert not base[name].flags.writeable
                assert base.info(name).dtype == value.dtype.name
            assert base.metadata == {"format": "pt"}
            assert base.root == tmp_path / "base"
            assert base.nbytes == sum(value.nbytes for value in weights().values())
            assert len(base) == 3
            assert "model.layers.0.fc.bias" in base
            assert "3 tensors" in repr(base)
            assert base.get("none") is None
            with pytest.raises(KeyError, match="nearest"):
                base["model.layers.0.fc.wieght"]

    def test_shards(self, tmp_path: Path) -> None:
        base = Checkpoint(sharded(tmp_path))
        assert [shard.path.name for shard in base.shards] == [ONE, TWO]
        assert list(base.shards[1]) == ["model.embed_tokens.weight"]
        assert [name for shard in base.shards for name in shard] == list(base)
        assert base.index == json.loads((tmp_path / INDEX).read_text())
        assert base.index_path == tmp_path / INDEX
        assert base.shard_of("model.embed_tokens.weight") is base.shards[1]

    def test_any_name_of_a_single_file(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "net.safetensors", weights())
        write_safetensors(tmp_path / "adapter_model.safetensors", {})
        assert len(Checkpoint(tmp_path)) == 3

    def test_any_name_of_an_index(self, tmp_path: Path) -> None:
        (sharded(tmp_path) / INDEX).rename(tmp_path / "net.safetensors.index.json")
        assert len(Checkpoint(tmp_path)) == 3

    def test_hub_cache(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
        sharded(blobs)
        single(snapshot)
        (snapshot / "model.safetensors").unlink()
        for name in (ONE, TWO, INDEX):
            (snapshot / name).symlink_to(Path("../../blobs") / name)
        (blobs / "tokenizer").write_text("{}")
        (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer")
        base = Checkpoint(snapshot)
        assert len(base) == 3
        assert base.side_files == (Path("config.json"), Path("tokenizer.json"))

    def test_config(self, tmp_path: Path) -> None:
        base = Checkpoint(single(tmp_path, model_type="mamba2", limit=float("inf")))
        assert base.config == {"model_type": "mamba2", "limit": float("inf")}
        (tmp_path / "config.json").unlink()
        assert Checkpoint(tmp_path).config == {}
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(FormatError, match=r"config\.json: list cannot"):
            Checkpoint(tmp_path).config  # noqa: B018

    def test_surroundings(self, tmp_path: Path) -> None:
        root = single(tmp_path / "base")
        along = [
            "1_Pooling/config.json", "README.md", "chat_template.jinja", "config.json",
            "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model",
        ]  # fmt: skip
        behind = [
            ".gitattributes", "adapter_config.json", "adapter_model.safetensors",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "original.pth",
            "optimizer.pt",
        ]  # fmt: skip
        for name in [*along, *behind, "onnx/model.onnx", "onnx/config.json", ".cache/x"]:
            (root / name).parent.mkdir(exist_ok=True)
            if not (root / name).exists():
                (root / name).write_bytes(b"{}")
        (tmp_path / "secret").write_text("s")
        (root / "notes.txt").symlink_to(tmp_path / "secret")
        (root / "elsewhere").symlink_to(tmp_path)
        base = Checkpoint(root)
        assert sorted(map(str, base.side_files)) == along
        assert Checkpoint(root / "model.safetensors").side_files == ()

    def test_writes_nothing(self, tmp_path: Path) -> None:
        root = sharded(tmp_path)
        before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.iterdir()}
        base = Checkpoint(root)
        fingerprint(base)
        with pytest.raises(ValueError, match="read-only"):
            base["model.layers.0.fc.bias"][0] = 1
        after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.iterdir()}
        assert after == before

    def test_close(self, tmp_path: Path) -> None:
        with Checkpoint(single(tmp_path)) as base:
            view = base["model.layers.0.fc.weight"]
        np.testing.assert_array_equal(view, np.ones((2, 2)))
        with pytest.raises(StorageError, match="closed"):
            base["model.layers.0.fc.weight"]


class TestChoice:
    """A directory that does not say which weights it means is refused with the way out."""

    def refused(self, path: Path, message: str, kind: type[PeftError] = StorageError) -> None:
        with pytest.raises(kind, match=message) as caught:
            Checkpoint(path)
        assert caught.value.exit_code == 5
        assert str(path) in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "no such file")

    def test_empty_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "holds no safetensors file")

    def test_a_repository_of_the_cache(self, tmp_path: Path) -> None:
        single(tmp_path / "snapshots" / "abc")
        self.refused(tmp_path, r"give its snapshot .*abc$")

    def test_adapter(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "adapter_model.safetensors", {})
        self.refused(tmp_path, "holds an adapter", FormatError)

    def test_several_files(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "a.safetensors", {})
        write_safetensors(tmp_path / "b.safetensors", {})
        self.refused(tmp_path, "'a.safetensors', 'b.safetensors'; give the one")

    def test_one_file_and_an_index(self, tmp_path: Path) -> None:
        single(sharded(tmp_path))
        self.refused(tmp_path, "give the one that is meant")

    def test_several_indices(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        shutil.copy(tmp_path / INDEX, tmp_path / "other.safetensors.index.json")
        assert len(Checkpoint(tmp_path)) == 3
        (tmp_path / INDEX).rename(tmp_path / "third.safetensors.index.json")
        self.refused(tmp_path, "'other.safetensors.index.json', 'third")

    def test_shards_without_index(self, tmp_path: Path) -> None:
        (sharded(tmp_path) / INDEX).unlink()
        self.refused(tmp_path, "shards without their index")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
    def test_pickles(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"PK\x03\x04" + b"\0" * 40)
        self.refused(tmp_path, "weights_only=True", FormatError)
        self.refused(tmp_path / name, "(?s)zip archive.*weights_only=True", FormatError)

    @pytest.mark.parametrize("shards", [1, 2])
    def test_the_way_out_of_pickles(
        self, tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command that is given makes a base of them."""
        torch = pytest.importorskip("torch")
        tied = torch.arange(6.0).reshape(3, 2)
        held = {"b.weight": tied, "a.weight": tied.T, "c.weight": tied}
        for i in range(shards):
            name = f"-{i + 1:05}-of-{shards:05}" if shards > 1 else ""
            part = {k: held[k] for k in [*held][i::shards]}
            torch.save(part, tmp_path / f"pytorch_model{name}.bin")
        (tmp_path / "training_args.bin").write_bytes(b"PK")
        with pytest.raises(FormatError) as refused:
            Checkpoint(tmp_path)
        _, _, code, *given = shlex.split(str(refused.value).partition(":\n")[2])
        monkeypatch.setattr(sys, "argv", ["-c", *given])
        exec(code, {})
        with Checkpoint(tmp_path) as made:
            assert {*made} == {*held}
            for name in made:
                np.testing.assert_array_equal(made[name], held[name])

    def test_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        self.refused(tmp_path, "make a safetensors version", FormatError)
        self.refused(tmp_path / "model.gguf", "GGUF", FormatError)

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"ab")
        self.refused(tmp_path / "model.onnx", "convert it", FormatError)
        self.refused(tmp_path / "none.bin", "no such file")

    def test_broken_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"\0" * 4)
        self.refused(tmp_path, "4 bytes long", FormatError)

    def test_link_out_of_the_directory(self, tmp_path: Path) -> None:
        single(tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "model.safetensors").symlink_to(tmp_path / "a" / "model.safetensors")
        self.refused(tmp_path / "b", "is a link to", FormatError)
        assert len(Checkpoint(tmp_path / "b" / "model.safetensors")) == 3


class TestIndex:
    """A malformed or hostile index is refused."""

    def refused(self, root: Path, message: str, kind: type[PeftError] = FormatError) -> None:
        with pytest.raises(kind, match=message) as caught:
            Checkpoint(root)
        assert str(root) in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not JSON"),
            ("{", "not JSON"),
            ("[]", "list cannot stand here"),
            ("{}", "weight_map cannot be None"),
            ('{"weight_map": []}', r"weight_map cannot be \[\]"),
            ('{"weight_map": {}}', r"weight_map cannot be {}"),
            ('{"weight_map": {"a": "x", "a": "y"}}', r"repeat: \['a'\]"),
            ('{"weight_map": {"a": NaN}}', "NaN"),
            ('{"weight_map": {"a": 1}}', "'a' cannot be in 1"),
            ('{"weight_map": {"a": ["x"]}}', "'a' cannot be in"),
            ('{"weight_map": {"a": ""}}', "cannot be the name"),
            ('{"weight_map": {"a": "x\\u0000"}}', "cannot be the name"),
            ('{"weight_map": {"a": "\\ud800"}}', "half a character"),
            ('{"weight_map": ' + "[" * 10**5, "too deeply"),
            ('{"weight_map": {"a": ' + "9" * 10**4 + "}}", "cannot be read"),
        ],
    )
    def test_malformed(self, tmp_path: Path, text: str, message: str) -> None:
        (sharded(tmp_path) / INDEX).write_text(text)
        self.refused(tmp_path, message)

    def test_not_text(self, tmp_path: Path) -> None:
        (sharded(tmp_path) / INDEX).write_bytes(b'{"\xff": 1}')
        self.refused(tmp_path, "byte 2 is not UTF-8")

    def test_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="limit is 10"):
            read_json(sharded(tmp_path) / INDEX, limit=10)

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sharded(tmp_path)
        monkeypatch.setattr("peft_any.io._json.reading", refuse(errno.EACCES))
        self.refused(tmp_path, "permission is denied", StorageError)

    @pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/passwd", "a/../../b", "a\\b"])
    def test_outside(self, tmp_path: Path, shard: str) -> None:
        write_safetensors(tmp_path / "out.safetensors", {"x": np.zeros(1)})
        self.refused(sharded(tmp_path / "base", right_map(x=shard)), re.escape(repr(shard)))

    def test_link_out_of_the_directory(self, tmp_path: Path) -> None:
        root = sharded(tmp_path / "base")
        (root / TWO).rename(tmp_path / TWO)
        (root / TWO).symlink_to(tmp_path / TWO)
        self.refused(root, "outside the directory")

    def test_directory_linked_out(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(1)})
        root = sharded(tmp_path / "base", right_map(x="sub/x.safetensors"))
        (root / "sub").symlink_to(tmp_path)
        self.refused(root, "outside the directory")

    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        root = sharded(tmp_path)
        (root / TWO).unlink()
        (root / TWO).symlink_to(TWO)
        self.refused(root, "loop", StorageError)

    def test_shard_below(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(1)})
        root = sharded(tmp_path / "base", right_map(x="sub/x.safetensors"), 68)
        (root / "sub").mkdir()
        (tmp_path / "x.safetensors").rename(root / "sub" / "x.safetensors")
        assert Checkpoint(root)["x"].shape == (1,)

    def test_shard_missing(self, tmp_path: Path) -> None:
        root = sharded(tmp_path)
        (root / TWO).unlink()
        self.refused(root, f"cannot be found: '{TWO}'", StorageError)

    def test_shard_broken(self, tmp_path: Path) -> None:
        root = sharded(tmp_path)
        (root / TWO).write_bytes((root / TWO).read_bytes()[:-1])
        with pytest.raises(FormatError, match=f"{TWO}.*truncated"):
            Checkpoint(root)

    def test_tensor_absent_from_its_shard(self, tmp_path: Path) -> None:
        root = sharded(tmp_path, right_map(**{"model.norm.weight": TWO}))
        self.refused(root, f"cannot be found in {TWO}.*'model.norm.weight'")

    def test_tensor_in_the_other_shard(self, tmp_path: Path) -> None:
        root = sharded(tmp_path, right_map(**{"model.layers.0.fc.bias": TWO}))
        self.refused(root, "cannot be missing from the index|cannot be found in")

    def test_tensor_not_listed(self, tmp_path: Path) -> None:
        listed = right_map()
        del listed["model.layers.0.fc.bias"]
        self.refused(sharded(tmp_path, listed), "missing from the index: 'model.layers.0.fc.bias'")

    @pytest.mark.parametrize("total", [61, "60", None, [1]])
    def test_wrong_total(self, tmp_path: Path, total: object) -> None:
        root = sharded(tmp_path, total_size=total)
        if total is None:
            assert len(Checkpoint(root)) == 3
            return
        with pytest.warns(UserWarning, match="total_size says"):
            assert len(Checkpoint(root)) == 3

    def test_name_of_a_shard_beyond_the_systems(self, tmp_path: Path) -> None:
        root = sharded(tmp_path, right_map(**{"model.norm.weight": "a" * 300}))
        with pytest.raises(StorageError, match="shards cannot be found"):
            Checkpoint(root)

    @settings(max_examples=200)
    @given(data=st.data())
    def test_mutated(self, tmp_path: Path, data: st.DataObject) -> None:
        root = tmp_path / "base"
        if not root.exists():
            sharded(root)
            shutil.copy(root / INDEX, tmp_path / "valid")
        _, text = data.draw(hostile_files({INDEX: (tmp_path / "valid").read_bytes()}))
        (root / INDEX).write_bytes(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            with suppress(FormatError, StorageError), Checkpoint(root) as found:
                assert found.keys() == json.loads(text)["weight_map"].keys()


TIES: dict[str, tuple[dict[str, Any], Weights, list[str] | None]] = {
    "tied": ({"tie_word_embeddings": True}, {}, ["model.embed_tokens.weight", "lm_head.weight"]),
    "by default": ({}, {}, ["model.embed_tokens.weight", "lm_head.weight"]),
    "untied": ({"tie_word_embeddings": False}, {}, None),
    "no head": ({"architectures": ["LlamaModel"]}, {}, None),
    "nested": ({"text_config": {"tie_word_embeddings": False}}, {}, None),
    "both stored and equal": (
        {},
        {"lm_head.weight": weights()["model.embed_tokens.weight"]},
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "both stored and different": (
        {}, {"lm_head.weight": weights()["model.embed_tokens.weight"] + 1}, None,
    ),
    "both stored, other dtypes": ({}, {"lm_head.weight": np.zeros((6, 2))}, None),
}  # fmt: skip


class TestTies:
    """Tensors that a model uses under several names."""

    @pytest.mark.parametrize("case", TIES)
    def test_llama(self, tmp_path: Path, case: str) -> None:
        config, more, group = TIES[case]
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
        base = Checkpoint(single(tmp_path, weights(**more), **config))
        assert base.tied == (() if group is None else (tuple(group),))

    @pytest.mark.parametrize(
        ("kind", "stored", "group"),
        [
            ("llama", ["lm_head", "model.layers.0.fc"], ["lm_head", "model.embed_tokens"]),
            ("gpt2", ["lm_head", "transformer.h.0.fc"], ["lm_head", "transformer.wte"]),
            ("gpt_neox", ["gpt_neox.embed_in"], ["gpt_neox.embed_in", "embed_out"]),
            ("gpt_neox", ["embed_out", "gpt_neox.layers.0.x"], ["embed_out", "gpt_neox.embed_in"]),
            (
                "bert",
                ["bert.embeddings.word_embeddings"],
                ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
            ),
            (
                "t5",
                ["shared", "decoder.block.0.x"],
                ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
            ),
            (
                "t5",
                ["encoder.embed_tokens", "shared"],
                ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
            ),
            (
                "llava",
                ["language_model.model.embed_tokens"],
                ["language_model.model.embed_tokens", "language_model.lm_head"],
            ),
            ("whisper", ["model.decoder.embed_tokens"], ["model.decoder.embed_tokens", "proj_out"]),
            ("mamba", ["backbone.embeddings"], ["backbone.embeddings", "lm_head"]),
            ("rwkv", ["rwkv.embeddings"], ["rwkv.embeddings", "head"]),
            ("xlnet", ["transformer.word_embedding"], ["transformer.word_embedding", "lm_loss"]),
            ("xlm", ["transformer.embeddings"], ["transformer.embeddings", "pred_layer.proj"]),
            ("other", ["backbone.embeddings"], None),
            ("other", ["lm_head"], None),
            ("other", ["blocks.0.mlp.shared"], None),
        ],
    )
    def test_architectures(
        self, tmp_path: Path, kind: str, stored: list[str], group: list[str] | None
    ) -> None:
        tensors = {f"{name}.weight": np.ones((2, 2)) for name in stored}
        base = Checkpoint(single(tmp_path, tensors, model_type=kind))
        assert base.tied == (() if group is None else (tuple(f"{n}.weight" for n in group),))

    def test_nothing_is_known_without_config(self, tmp_path: Path) -> None:
        (single(tmp_path) / "config.json").unlink()
        assert Checkpoint(tmp_path).tied == ()


class TestChecksum:
    """A finished shard is known by all its bytes."""

    @given(data=st.data())
    def test_any_damage_shows(self, tmp_path_factory: Any, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, 20_000))
        raw = bytearray(np.random.default_rng(size).bytes(size))
        path = tmp_path_factory.getbasetemp() / "checksum"
        path.write_bytes(raw)
        before = checksum(path)
        assert checksum(path) == before
        at = data.draw(st.integers(0, size - 1))
        how = data.draw(st.sampled_from(["a bit", "cut", "longer", "zeros", "turned"]))
        if how == "a bit":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del raw[at:]
        elif how == "longer":
            raw += bytes(at + 1)
        elif how == "zeros":
            raw[at:] = bytes(size - at)
        else:  # pages in another order
            raw[:] = raw[4096:8192] + raw[:4096] + raw[8192:]
        same = path.read_bytes() == raw
        path.write_bytes(raw)
        assert (checksum(path) == before) == same

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="nowhere"):
            checksum(tmp_path / "nowhere")


class TestFingerprint:
    """A base is recognised by names, dtypes, shapes and samples of its bytes."""

    def of(self, path: Path, tensors: Weights) -> str:
        write_safetensors(path, tensors, overwrite=True)
        return fingerprint(SafetensorsFile(path))

    def test_sharding_does_not_matter(self, tmp_path: Path) -> None:
        one, two = Checkpoint(single(tmp_path / "1")), Checkpoint(sharded(tmp_path / "2"))
        assert fingerprint(one) == fingerprint(two)
        assert re.fullmatch("sampled-sha256:[0-9a-f]{64}", fingerprint(one))

    def test_all_bytes(self, tmp_path: Path) -> None:
        large = weights(large=np.zeros(50_000, "uint8"))
        changed = weights(large=np.zeros(50_000, "uint8"))
        changed["large"][5_000] = 1  # between two samples
        single(tmp_path / "a", large)
        single(tmp_path / "b", changed)
        with Checkpoint(tmp_path / "a") as a, Checkpoint(tmp_path / "b") as b:
            assert fingerprint(a) == fingerprint(b)
            assert fingerprint(a, full=True) != fingerprint(b, full=True)
            digest = hashlib.sha256()
            for name in sorted(large):
                head = [name, large[name].dtype.name, [*large[name].shape]]
                digest.update(json.dumps(head).encode() + b"\n" + large[name].tobytes())
            assert fingerprint(a, full=True) == f"sha256:{digest.hexdigest()}"

    def test_as_documented(self, tmp_path: Path) -> None:
        a, b = np.arange(50_000, dtype=np.int32), np.ones(2)
        raw = a.tobytes()
        digest = hashlib.sha256(b'["a", "int32", [50000]]\n')
        for i in range(8):
            at = i * (200_000 - 4096) // 7
            digest.update(raw[at : at + 4096])
        digest.update(b'["b", "float64", [2]]\n' + b.tobytes())
        found = self.of(tmp_path / "x", {"a": a, "b": b})
        assert found == f"sampled-sha256:{digest.hexdigest()}"
        # Receipts on other people's disks hold such values: the scheme must not change.
        assert found.endswith("61dfbc6672e73f77631a679726e27ba2aab0abbb326edbad2e73e4e1f0445cb4")

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: {"b": x},
            lambda x: {"a": x.view(np.uint32)},
            lambda x: {"a": x.reshape(2, -1)},
            lambda x: {"a": np.concatenate([x[:-1], [0]], dtype=np.int32)},
            lambda x: {"a": np.concatenate([[1], x[1:]], dtype=np.int32)},
            lambda x: {"a": x, "b": x[:0]},
        ],
    )
    def test_changes_are_seen(self, tmp_path: Path, change: Callable[[Any], Weights]) -> None:
        x = np.arange(50_000, dtype=np.int32)
        assert self.of(tmp_path / "x", {"a": x}) != self.of(tmp_path / "y", change(x))


def build(output: AbstractContextManager[Path], act: Callable[[Path], object]) -> None:
    """Let a function make the output."""
    with output as partial:
        act(partial)


def listing(root: Path) -> list[str]:
    """Everything below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


class TestOutputDirectory:
    """A directory appears whole or not at all."""

    def test_appears_at_the_end(self, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "out"
        with output_directory(out) as partial:
            assert partial.parent == out.parent
            assert partial.name.startswith(".out.")
            (partial / "sub").mkdir()
            (partial / "sub" / "a.txt").write_text("a")
            assert not out.exists()
        assert listing(tmp_path) == ["deep", "deep/out", "deep/out/sub", "deep/out/sub/a.txt"]

    def test_links_are_kept(self, tmp_path: Path) -> None:
        with output_directory(tmp_path / "out") as partial:
            (partial / "a").symlink_to("nowhere")
        assert (tmp_path / "out" / "a").is_symlink()

    def test_relative(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with output_directory("out") as partial:
            (partial / "a").touch()
        assert listing(tmp_path) == ["out", "out/a"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_nothing_is_left_of_a_failure(
        self, tmp_path: Path, error: type[BaseException], *, overwrite: bool
    ) -> None:
        if overwrite:
            single(tmp_path / "deep" / "out")
        before = listing(tmp_path)

        def fail(partial: Path) -> None:
            (partial / "a").write_text("a")
            raise error

        with pytest.raises(error):
            build(output_directory(tmp_path / "deep" / "out", overwrite), fail)
        assert listing(tmp_path) == before

    def test_existing(self, tmp_path: Path) -> None:
        single(tmp_path / "out")
        with pytest.raises(StorageError, match="it exists"), output_directory(tmp_path / "out"):
            pass
        assert len(Checkpoint(tmp_path / "out")) == 3

    def test_existing_empty_directory_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with output_directory(tmp_path / "out") as partial:
            (partial / "a").touch()
        assert listing(tmp_path) == ["out", "out/a"]

    def test_made_meanwhile(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError):
            build(output_directory(tmp_path / "out"), lambda _: single(tmp_path / "out"))
        assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]

    @pytest.mark.parametrize("name", ["out.safetensors", "out.gguf", "out.bin"])
    def test_a_name_of_a_file(self, tmp_path: Path, name: str) -> None:
        with (
            pytest.raises(UsageError, match="it is a directory of safetensors files; leave out"),
            output_directory(tmp_path / name),
        ):
            pytest.fail("it must not begin")
        assert listing(tmp_path) == []

    def test_overwrite(self, tmp_path: Path) -> None:
        single(tmp_path / "out")
        with output_directory(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").touch()
            assert len(Checkpoint(tmp_path / "out")) == 3
        assert listing(tmp_path) == ["out", "out/a"]

    def test_overwrite_a_link(self, tmp_path: Path) -> None:
        single(tmp_path / "real")
        (tmp_path / "out").symlink_to("real")
        with output_directory(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").touch()
        assert not (tmp_path / "out").is_symlink()
        assert len(Checkpoint(tmp_path / "real")) == 3
        assert len(listing(tmp_path)) == 5

    def test_overwrite_fails_half_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        single(tmp_path / "out")
        before, rename = listing(tmp_path), os.rename

        def broken(source: Any, target: Any) -> None:
            if str(source).endswith(".partial"):
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", broken)
        monkeypatch.setattr("peft_any.io._atomic.exchange", lambda *_: False)
        with (
            pytest.raises(StorageError, match="input/output"),
            output_directory(tmp_path / "out", overwrite=True),
        ):
            pass
        assert listing(tmp_path) == before

    def test_old_one_that_cannot_be_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        single(tmp_path / "out")
        monkeypatch.setattr(shutil, "rmtree", refuse(errno.EACCES))
        with (
            pytest.warns(UserWarning, match="replaced output cannot be removed"),
            output_directory(tmp_path / "out", overwrite=True) as partial,
        ):
            (partial / "a").touch()
        assert (tmp_path / "out" / "a").exists()

    def test_overwrite_keeps_its_hands_off(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.tex").touch()
        for message in ("no model or adapter", "version control", "current directory"):
            with pytest.raises(StorageError, match=message), output_directory(home, overwrite=True):
                pass
            if message == "no model or adapter":
                write_safetensors(home / "model.safetensors", {})
                (home / ".git").mkdir()
            else:
                shutil.rmtree(home / ".git", ignore_errors=True)
                monkeypatch.chdir(home)
        assert listing(home) == ["model.safetensors", "thesis.tex"]

    def test_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        with (
            pytest.raises(StorageError, match="a file stands there"),
            output_directory(tmp_path / "out", overwrite=True),
        ):
            pass

    @pytest.mark.parametrize("name", ["", ".", "..", "/", "a\0b"])
    def test_impossible_names(self, name: str) -> None:
        with pytest.raises(UsageError, match="cannot go here"), output_directory(name):
            pass

    def test_parent_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError), output_directory(tmp_path / "file" / "a" / "out"):
            pass
        assert listing(tmp_path) == ["file"]

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (errno.EROFS, "read-only"),
            (errno.EACCES, "permission is denied"),
            (errno.ENOSPC, "no space is left"),
            (errno.EDQUOT, "quota"),
        ],
    )
    def test_unwritable_parent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
    ) -> None:
        monkeypatch.setattr(Path, "mkdir", refuse(code))
        with (
            pytest.raises(StorageError, match=f"out: cannot be written: .*{message}") as caught,
            output_directory(tmp_path / "out"),
        ):
            pass
        assert caught.value.errno == code
        assert listing(tmp_path) == []

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "write", refuse(errno.ENOSPC))
        with (
            pytest.raises(StorageError, match=r"out/m: cannot be written: no space") as caught,
            output_directory(tmp_path / "out") as partial,
        ):
            write_safetensors(partial / "m", weights())
        assert ".partial" not in str(caught.value)
        assert listing(tmp_path) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
    def test_full_device(self, tmp_path: Path) -> None:
        def fill(partial: Path) -> None:
            (partial / "config.json").symlink_to("/dev/full")
            (partial / "config.json").write_text("{}")

        with pytest.raises(StorageError, match="no space is left"):
            build(output_directory(tmp_path / "out"), fill)
        assert listing(tmp_path) == []


def refuse(code: int) -> Callable[..., Any]:
    """A function that fails as the operating system does."""

    def function(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return function


class TestOutputFile:
    """A file appears whole or not at all."""

    def test_appears_at_the_end(self, tmp_path: Path) -> None:
        with output_file(tmp_path / "a" / "x") as partial:
            partial.write_text("new")
            assert listing(tmp_path) == ["a", f"a/{partial.name}", "a/.x.lock"]
        assert listing(tmp_path) == ["a", "a/x"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_nothing_is_left_of_a_failure(self, tmp_path: Path, error: type[BaseException]) -> None:
        def fail(partial: Path) -> None:
            partial.write_text("new")
            raise error

        with pytest.raises(error):
            build(output_file(tmp_path / "a" / "x"), fail)
        assert listing(tmp_path) == []

    def test_nothing_written(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nothing was written"), output_file(tmp_path / "x"):
            pass

    def test_overwrite(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("old")
        with pytest.raises(StorageError, match="it exists"), output_file(tmp_path / "x"):
            pass
        with output_file(tmp_path / "x", overwrite=True) as partial:
            partial.write_text("new")
            assert (tmp_path / "x").read_text() == "old"
        assert (tmp_path / "x").read_text() == "new"

    def test_made_meanwhile(self, tmp_path: Path) -> None:
        def overtake(partial: Path) -> None:
            partial.write_text("new")
            (tmp_path / "x").write_text("other")

        with pytest.raises(StorageError, match="in the meantime"):
            build(output_file(tmp_path / "x"), overtake)
        assert (tmp_path / "x").read_text() == "other"
        assert listing(tmp_path) == ["x"]

    @pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
    def test_file_systems_without_hard_links(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        monkeypatch.setattr(os, "link", refuse(code))
        with output_file(tmp_path / "x") as partial:
            partial.write_text("new")
        assert listing(tmp_path) == ["x"]

    def test_link_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", refuse(errno.EIO))
        with pytest.raises(StorageError, match="input/output"), output_file(tmp_path / "x") as p:
            p.write_text("new")
        assert listing(tmp_path) == []

    def test_directory_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        with (
            pytest.raises(StorageError, match="a directory stands there"),
            output_file(tmp_path / "x", overwrite=True),
        ):
            pass

    def test_long_name(self, tmp_path: Path) -> None:
        with output_file(tmp_path / ("x" * 250)) as partial:
            partial.touch()
        with pytest.raises(StorageError, match="too long"), output_file(tmp_path / ("x" * 300)):
            pass


class TestOverlap:
    """An output never touches an input."""

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("base", "is the input itself"),
            ("base/.", "is the input itself"),
            ("base/../base", "is the input itself"),
            ("linked", "is the input itself"),
            ("base/out", "inside the input"),
            ("linked/out", "inside the input"),
            (".", "contains the input"),
        ],
    )
    def test_directory(self, tmp_path: Path, out: str, message: str) -> None:
        root = single(tmp_path / "work" / "base")
        (root.parent / "linked").symlink_to(root)
        before = listing(tmp_path)
        with (
            pytest.raises(UsageError, match=message),
            output_directory(root.parent / out, overwrite=True, inputs=[root]),
        ):
            pass
        assert listing(tmp_path) == before

    def test_file(self, tmp_path: Path) -> None:
        base = single(tmp_path / "base") / "model.safetensors"
        os.link(base, tmp_path / "twin")
        for out in (base, tmp_path / "twin"):
            with (
                pytest.raises(UsageError, match="input itself"),
                output_file(out, overwrite=True, inputs=[base]),
            ):
                pass
        with output_file(base.parent / "other", inputs=[base]) as partial:
            partial.touch()
        with pytest.raises(UsageError, match="contains"):
            refuse_overlap(tmp_path, [base])

    def test_what_an_input_links_to(self, tmp_path: Path) -> None:
        """An adapter of links would lose its files with the directory that is replaced."""
        single(tmp_path / "store" / "more")
        (tmp_path / "input" / "sub").mkdir(parents=True)
        (tmp_path / "input" / "loop").symlink_to("loop")
        refuse_overlap(tmp_path / "store", [tmp_path / "input"])
        link = tmp_path / "input" / "sub" / "config.json"
        link.symlink_to(tmp_path / "store" / "more" / "config.json")
        for out in ("store", "store/more"):
            with pytest.raises(UsageError, match=rf"it contains what {link} links to"):
                refuse_overlap(tmp_path / out, [tmp_path / "input"])
        refuse_overlap(tmp_path / "store" / "less", [tmp_path / "input"])

    def test_inputs_that_are_not_there(self, tmp_path: Path) -> None:
        refuse_overlap(tmp_path / "out", [tmp_path / "none"])

    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("a")
        with pytest.raises(StorageError, match="loop"):
            refuse_overlap(tmp_path / "a" / "out", [tmp_path])


def test_interrupted_write_over_the_previous_output(tmp_path: Path) -> None:
    def interrupt(partial: Path) -> None:
        write_safetensors(partial / "model.safetensors", {"x": np.zeros(3)})
        raise KeyboardInterrupt

    single(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        build(output_directory(tmp_path / "out", overwrite=True), interrupt)
    assert read_safetensors(tmp_path / "out" / "model.safetensors").keys() == weights().keys()
    assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


def test_bytes_and_text_parse_alike() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": 1}', "x") == parse_object('{"a": 1}', "x") == {"a": 1}

"""Checkpoints and adapters of other file systems: read by ranges, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peft_any import (
    Adapter,
    cli,
    combine,
    convert,
    diff,
    extract,
    inspect_adapter,
    merge_checkpoint,
    replicate_checkpoint,
    resize,
    verify_checkpoint,
    write_safetensors,
)
from peft_any.errors import (
    BackendError,
    FormatError,
    PeftError,
    StorageError,
    UsageError,
    VerifyError,
)
from peft_any.io._claim import CLAIM
from peft_any.io._remote import Mirror
from peft_any.io._urls import is_url, path_of
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.io.safetensors import read_safetensors
from peft_any.methods.lora import LoraConfig

fsspec = pytest.importorskip("fsspec")

SHARDS, WIDTH = 3, 200
"""Tensors of 80,000 bytes: more than a fingerprint's samples."""


def make_inputs(folder: Path) -> Path:
    """Write a sharded base in bfloat16 with side files, and a LoRA of it that knows its base."""
    import ml_dtypes

    from peft_any import PeftModel

    rng = np.random.default_rng(0)
    base = folder / "base"
    (base / "more").mkdir(parents=True)
    weight_map, weights = {}, {}
    for i in range(SHARDS):
        shard = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        held = {
            f"layers.{i}.q.weight": rng.standard_normal((WIDTH, WIDTH)),
            f"layers.{i}.norm.weight": rng.standard_normal(WIDTH),
        }
        held = {name: array.astype(ml_dtypes.bfloat16) for name, array in held.items()}
        write_safetensors(base / shard, held, {"format": "pt"})
        weight_map |= dict.fromkeys(held, shard)
        weights |= held
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    (base / "tokenizer.json").write_text("{}")
    (base / "more" / "notes.txt").write_text("a side file")
    made = PeftModel(weights).add("x", LoraConfig(r=4, target_modules=["q"]), seed=1)
    sites = {
        site: {k: rng.standard_normal(v.shape).astype("float32") for k, v in p.items()}
        for site, p in made.sites.items()
    }
    made.replace(sites=sites).save(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a local copy of everything, merged too."""
    folder = make_inputs(tmp_path_factory.mktemp("here"))
    merge_checkpoint(folder / "base", folder / "lora", folder / "merged")
    return folder


@pytest.fixture
def there(here: Path) -> Iterator[Any]:
    """Put the inputs into memory, a file system that no path leads to."""
    fs = fsspec.filesystem("memory")
    for path in here.rglob("*"):
        if path.is_file() and path.relative_to(here).parts[0] in ("base", "lora"):
            fs.pipe(f"/m/{path.relative_to(here)}", path.read_bytes())
    yield fs
    fs.rm("/m", recursive=True)


BASE, LORA, OUT = "memory://m/base", "memory://m/lora", "memory://m/out"


def files(fs: Any, folder: str) -> dict[str, bytes]:
    """Read all that is there."""
    root = f"/m/{folder}/"
    return {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same(one: dict[str, bytes], two: dict[str, bytes]) -> None:
    """Compare outputs byte for byte, and their receipts in what they say of the result."""
    assert one.keys() == two.keys()
    for name, data in one.items():
        if not name.endswith("_receipt.json"):
            assert data == two[name], name
            continue
        mine, other = json.loads(data), json.loads(two[name])
        for receipt in (mine, other):
            receipt["out"].pop("path")
            for part in (*receipt.get("changes", ()), *receipt.get("layers", ())):
                part.pop("by", None)  # names of paths
        for key in ("out", "changes", "copied", "layers"):
            assert mine.get(key) == other.get(key)


@contextmanager
def asked(fs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Note which bytes are read."""
    read: list[tuple[str, int]] = []
    file, whole = type(fs).cat_file, type(fs).get_file

    def cat_file(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        data: bytes = file(self, path, start, end, **more)
        read.append((path, len(data)))
        return data

    def get_file(self: Any, path: str, *given: Any, **more: Any) -> None:
        read.append((path, self.size(path)))
        whole(self, path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "cat_file", cat_file)
        patch.setattr(type(fs), "get_file", get_file)
        yield read


class TestNames:
    """What is a URL, and what is a path."""

    @pytest.mark.parametrize("text", ["s3://b/x", "memory://x", "gs://b", "simplecache::s3://b/x"])
    def test_urls(self, text: str) -> None:
        assert is_url(text)
        assert path_of(text) == text

    @pytest.mark.parametrize("text", ["base", "/a//b", "c:/x", "c://x", "a:b", "https:x", ""])
    def test_paths(self, text: str) -> None:
        assert not is_url(text)
        assert path_of(text) == text

    def test_files(self) -> None:
        assert path_of("file:///a b/c") == "/a b/c"
        assert path_of("file://localhost/a") == "/a"
        assert path_of("local:///a") == "/a"
        assert not is_url("file:///a")
        with pytest.raises(UsageError, match="three slashes"):
            path_of("file://a/b")

    def test_a_path_that_looks_like_a_url(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("s3:").mkdir()
        write_safetensors("s3:/x.safetensors", {"a": np.ones(2)})
        assert [*read_safetensors("s3:/x.safetensors")] == ["a"]
        with pytest.raises(StorageError, match="URLs are taken for"):
            read_safetensors("memory://x.safetensors")
        with pytest.raises(StorageError, match="URLs are taken for"):
            write_safetensors("memory://x.safetensors", {"a": np.ones(2)})


class TestReading:
    """Only what is asked for is fetched."""

    def test_a_checkpoint_is_the_same(self, here: Path, there: Any) -> None:
        with Checkpoint(here / "base") as one, Checkpoint(BASE) as two:
            assert [*one] == [*two]
            for name in one:
                np.testing.assert_array_equal(one[name], two[name])
                assert one[name].dtype == two[name].dtype
                assert not two[name].flags.writeable
            assert fingerprint(one) == fingerprint(two)
            assert fingerprint(one, full=True) == fingerprint(two, full=True)
            assert (one.config, one.index, one.metadata) == (two.config, two.index, two.metadata)
            assert one.side_files == two.side_files
            assert two.root.joinpath("more/notes.txt").read_text() == "a side file"
            assert "memory://m/base" in repr(two)
            place = two.root
        assert not place.exists()
        with pytest.raises(StorageError, match=r"memory://m/base/model-.*closed"):
            two["layers.0.q.weight"]

    def test_other_ways_to_give_one(self, here: Path, there: Any) -> None:
        shard = "model-00001-of-00003.safetensors"
        with Checkpoint(f"{BASE}/{shard}") as one, Checkpoint(here / "base" / shard) as two:
            assert one.config == two.config == {"model_type": "llama", "num_hidden_layers": 3}
            assert (one.side_files, [*one]) == ((), [*two])
        with Checkpoint(f"{BASE}/model.safetensors.index.json") as index:
            assert len(index) == 2 * SHARDS
        with Checkpoint(f"{BASE}/") as slash:
            assert len(slash) == 2 * SHARDS

    def test_ranges(self, there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        size = 2 * WIDTH * WIDTH
        with asked(there, monkeypatch) as read, Checkpoint(BASE) as base:
            names = {name for name, _ in read}
            assert "/m/base/tokenizer.json" not in names
            read.clear()
            fingerprint(base)
            assert sum(n for _, n in read) < SHARDS * size / 2
            read.clear()
            base["layers.1.q.weight"], base["layers.1.q.weight"]
            assert read == [("/m/base/model-00002-of-00003.safetensors", size)]

    def test_a_plan_reads_samples_alone(
        self, here: Path, there: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peft_any.surgery.fitting import Fitting
        from peft_any.surgery.planning import make_plan

        with asked(there, monkeypatch) as read, Checkpoint(BASE) as base:
            read.clear()
            plan = make_plan(base, LORA, Fitting(any_base=False))
            assert not plan.warnings
            assert plan.given[0].adapter.metadata["peft_any.base"]
            shards = [n for name, n in read if "model-" in name]
            assert shards == [2048] * 8 * SHARDS
        there.pipe("/m/base/model-00001-of-00003.safetensors", changed(here / "base"))
        with Checkpoint(BASE) as base, pytest.raises(PeftError, match="another base"):
            make_plan(base, LORA, Fitting(any_base=False))

    def test_what_is_not_there(self, there: Any) -> None:
        with pytest.raises(StorageError, match=r"memory://m/nothing: .*check the spelling"):
            Checkpoint("memory://m/nothing")
        with pytest.raises(StorageError, match=r"memory://m/nothing: .*check the spelling"):
            Adapter.load("memory://m/nothing")
        there.rm("/m/base/model-00002-of-00003.safetensors")
        with pytest.raises(StorageError, match=r"memory://m/base/model\.safetensors\.index.*00002"):
            Checkpoint(BASE)

    def test_hostile_files(self, here: Path, there: Any) -> None:
        shard = "/m/base/model-00002-of-00003.safetensors"
        whole = there.cat_file(shard)
        for data in (b"", whole[:-1], b"\xff" * 8 + whole[8:], b"PK\x03\x04" + whole):
            there.pipe(shard, data)
            with pytest.raises(FormatError, match=f"memory:/{re.escape(shard)}"):
                Checkpoint(BASE)
        there.pipe(shard, whole)
        there.pipe("/m/base/config.json", b"[")
        with Checkpoint(BASE) as base, pytest.raises(FormatError, match="JSON"):
            _ = base.config
        there.pipe("/m/lora/adapter_config.json", b"{")
        with pytest.raises(FormatError, match=r"memory://m/lora/adapter_config\.json"):
            Adapter.load(LORA)

    def test_files_that_change_meanwhile(self, there: Any) -> None:
        with Checkpoint(BASE) as base:
            there.pipe("/m/base/model-00001-of-00003.safetensors", b"short")
            with pytest.raises(StorageError, match="did it change"):
                base["layers.0.q.weight"]

    def test_failures_of_the_file_system(self, there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        class DeniedError(Exception):
            pass

        def refuse(*_: Any, **__: Any) -> None:
            raise DeniedError("no credentials")

        monkeypatch.setattr(type(there), "cat_file", refuse)
        with pytest.raises(StorageError, match=r"memory://m/base.*no credentials"):
            Checkpoint(BASE)

    def test_libraries_that_are_missing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("s3fs", "gcsfs"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(BackendError, match=r"s3://bucket/x: .*s3fs.*every worker"):
            Checkpoint("s3://bucket/x")
        with pytest.raises(BackendError, match=r"gs://bucket/x: .*gcsfs"):
            Adapter.load("gs://bucket/x")
        with pytest.raises(UsageError, match=r"nonsense://x: .*not known"):
            Checkpoint("nonsense://x")
        given = ["--base", "s3://b/x", "--adapter", "s3://b/y:0.5", "--out", "s3://b/z"]
        assert cli.run(["merge", *given]) == 3
        assert "s3fs" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "fsspec.core", None)
        with pytest.raises(BackendError, match="pip install fsspec"):
            Checkpoint("memory://x")


def changed(base: Path) -> bytes:
    """Give the first shard with other values in its layer."""
    import ml_dtypes

    shard = base / "model-00001-of-00003.safetensors"
    tensors = read_safetensors(shard)
    tensors["layers.0.q.weight"] = np.ones((WIDTH, WIDTH), ml_dtypes.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(f"{folder}/x", tensors)
        return Path(folder, "x").read_bytes()


class TestCommands:
    """The same bytes as with local files."""

    def test_merge(self, here: Path, there: Any, tmp_path: Path) -> None:
        merge_checkpoint(BASE, LORA, OUT)
        same(contents(here / "merged"), files(there, "out"))
        merge_checkpoint(BASE, here / "lora", tmp_path / "out")
        same(contents(here / "merged"), contents(tmp_path / "out"))
        merge_checkpoint(here / "base", Adapter.load(LORA), "memory://m/mixed/deep")
        mixed = {k.removeprefix("deep/"): v for k, v in files(there, "mixed").items()}
        same(contents(here / "merged"), mixed)
        verify_checkpoint(BASE, LORA, OUT)
        with pytest.raises(VerifyError):
            verify_checkpoint(BASE, [(LORA, 2.0)], OUT)
        dry = merge_checkpoint(BASE, LORA, dry_run=True)
        assert [c.kept for c in dry.changes] == [
            c["kept"] for c in json.loads(files(there, "out")["merge_receipt.json"])["changes"]
        ]

    def test_merge_with_options(self, here: Path, there: Any, tmp_path: Path) -> None:
        how: dict[str, Any] = {"max_shard_size": 200_000, "dtype": "float32", "full_hash": True}
        merge_checkpoint(here / "base", here / "lora", tmp_path / "out", **how)
        merge_checkpoint(BASE, LORA, OUT, **how)
        same(contents(tmp_path / "out"), files(there, "out"))

    def test_resuming_with_remote_inputs(self, there: Any, here: Path, tmp_path: Path) -> None:
        def stop(done: int, total: int, _: str) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        asked: Any = {"base": BASE, "adapter": LORA, "out": tmp_path / "out", "resume": True}
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(**asked, progress=stop)
        made = merge_checkpoint(**asked)
        assert any("continued" in note for note in made.warnings)
        same(contents(here / "merged"), contents(tmp_path / "out"))

    def test_extract(self, here: Path, there: Any, tmp_path: Path) -> None:
        merge_checkpoint(BASE, LORA, OUT)
        extract(here / "base", here / "merged", tmp_path / "x", rank=4)
        extract(BASE, OUT, "memory://m/x", rank=4)
        one, two = contents(tmp_path / "x"), files(there, "x")
        for receipt in (one, two):
            del receipt["extract_receipt.json"]
        same(one, two)
        assert Adapter.load("memory://m/x").config.r == 4  # type: ignore[attr-defined]

    @pytest.mark.parametrize("how", [{}, {"rank": 3}])
    def test_combine(self, here: Path, there: Any, tmp_path: Path, how: Any) -> None:
        combine([(here / "lora", 0.5), (here / "lora", 0.25)], tmp_path / "x", **how)
        combine([(LORA, 0.5), (LORA, 0.25)], "memory://m/x", **how, base=BASE)
        same(contents(tmp_path / "x"), files(there, "x"))

    def test_the_others(self, here: Path, there: Any) -> None:
        resize(LORA, "memory://m/small", rank=2)
        convert("memory://m/small", "memory://m/plain", base=BASE)
        assert Adapter.load("memory://m/plain").config.r == 2  # type: ignore[attr-defined]
        assert diff(LORA, here / "lora").cosine == pytest.approx(1)  # type: ignore[union-attr]
        assert diff(BASE, here / "base").states == {"identical": 6}  # type: ignore[union-attr]
        assert inspect_adapter(LORA, BASE).ranks == {4: 3}
        replicate_checkpoint(BASE, [[0, 2], [1, 3]], "memory://m/deep")
        with Checkpoint("memory://m/deep") as deep:
            assert len(deep) == 8
        Adapter.load(LORA).save("memory://m/copy")
        assert files(there, "copy") == files(there, "lora")

    @pytest.mark.parametrize("command", ["extract", "combine", "resize", "convert"])
    @pytest.mark.parametrize("remote", [False, True])
    def test_the_seconds_of_a_receipt_are_the_whole_time(
        self, command: str, remote: bool, here: Path, there: Any, tmp_path: Path
    ) -> None:
        """By a clock that each file's sync, or sending, moves on: all but the receipt's counts."""
        ticks: list[object] = []
        synced, put = os.fsync, type(there).put_file

        def fsync(handle: int) -> None:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                ticks.append(handle)
            synced(handle)

        def put_file(*given: Any, **more: Any) -> None:
            ticks.append(given)
            put(*given, **more)

        out = "memory://m/timed" if remote else tmp_path / "timed"
        run: dict[str, Any] = {
            "extract": lambda: extract(here / "base", here / "merged", out, rank=4),
            "combine": lambda: combine([(LORA, 0.5), (LORA, 0.25)], out)[1],
            "resize": lambda: resize(LORA, out, rank=2)[1],
            "convert": lambda: convert(LORA, out)[1],
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("peft_any.receipt.time", SimpleNamespace(perf_counter=lambda: len(ticks)))
            patch.setattr(
                *((type(there), "put_file", put_file) if remote else (os, "fsync", fsync))
            )
            seconds = run[command]().seconds
        assert sum(seconds.values()) == len(ticks) - 1
        assert seconds["sync"] >= 1
        name = f"{command}_receipt.json"
        told = files(there, "timed")[name] if remote else (tmp_path / "timed" / name).read_bytes()
        assert json.loads(told)["seconds"] == seconds

    def test_chains(self, here: Path, there: Any, tmp_path: Path) -> None:
        """Archives and caches are read; what a cache may hide is not written through it."""
        packed = shutil.make_archive(str(tmp_path / "all"), "zip", here)
        there.pipe("/m/all.zip", Path(packed).read_bytes())
        cached = f"simplecache::{BASE}", f"simplecache::{LORA}"
        archived = "zip://base::memory://m/all.zip", "zip://lora::memory://m/all.zip"
        lying = f"zip://base::file://{packed}", f"local://{here}/lora"
        for i, (base, lora) in enumerate((cached, archived, lying)):
            merge_checkpoint(base, lora, tmp_path / f"out{i}")
            same(contents(here / "merged"), contents(tmp_path / f"out{i}"))
        for way in ("simplecache", "filecache", "dir::blockcache"):
            with pytest.raises(UsageError, match="a cache may hide"):
                merge_checkpoint(BASE, LORA, f"{way}::{OUT}", overwrite=True)
        with pytest.raises(StorageError, match=r"zip://x::memory://m/all\.zip"):
            merge_checkpoint(BASE, LORA, "zip://x::memory://m/all.zip")

    def test_file_urls_are_paths(
        self, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["--base", f"file://{here}/base", "--adapter", f"file://{here}/lora:1.0"]
        assert cli.run(["merge", *given, "--out", f"file://{tmp_path}/out", "-q"]) == 0
        same(contents(here / "merged"), contents(tmp_path / "out"))
        assert cli.run(["verify", *given, "--merged", f"file://{tmp_path}/out", "-q"]) == 0
        assert cli.run(["merge", *given, "--out", f"file://{here}/base", "-q"]) == 5
        assert cli.run(["merge", *given, "--out", f"file://{here}/base/x", "-q"]) == 2
        assert "inside the input" in capsys.readouterr().err


class TestWriting:
    """What makes files a model comes last, and a failure leaves nothing."""

    def test_the_order(self, there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        order = []
        put = type(there).put_file

        def put_file(self: Any, here: str, to: str, **more: Any) -> None:
            assert self.exists(f"/m/out/{CLAIM}")
            order.append(to.removeprefix("/m/out/"))
            put(self, here, to, **more)

        monkeypatch.setattr(type(there), "put_file", put_file)
        merge_checkpoint(BASE, LORA, OUT)
        assert order == [
            *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
            "more/notes.txt",
            "tokenizer.json",
            "model.safetensors.index.json",
            "config.json",
            "merge_receipt.json",
        ]
        assert not there.exists(f"/m/out/{CLAIM}")

    @pytest.mark.parametrize("moment", range(8))
    def test_failures_leave_nothing(
        self, there: Any, monkeypatch: pytest.MonkeyPatch, moment: int
    ) -> None:
        before = {name: there.cat_file(name) for name in there.find("/m")}
        put, count = type(there).put_file, 0

        def put_file(self: Any, *given: Any, **more: Any) -> None:
            nonlocal count
            count += 1
            if count > moment:
                raise OSError(28, "No space left on device")
            put(self, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(type(there), "put_file", put_file)
            with pytest.raises(StorageError, match=r"memory://m/out.*No space left"):
                merge_checkpoint(BASE, LORA, OUT)
        assert {name: there.cat_file(name) for name in there.find("/m")} == before
        merge_checkpoint(BASE, LORA, OUT)

    def test_interrupts_leave_nothing(self, there: Any) -> None:
        def stop(done: int, total: int, _: str) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        before = there.find("/m")
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(BASE, LORA, OUT, progress=stop)
        with pytest.raises(VerifyError):
            merge_checkpoint(BASE, [(LORA, 1e-5)], OUT, min_kept=0.99)
        assert there.find("/m") == before

    def test_what_arrives_short_is_an_error(
        self, there: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            type(there), "put_file", lambda self, _, to, **__: self.pipe_file(to, b"short")
        )
        with pytest.raises(StorageError, match=r"of .* bytes 5 are there"):
            merge_checkpoint(BASE, LORA, OUT)

    def test_places_that_are_taken(self, there: Any, here: Path) -> None:
        merge_checkpoint(BASE, LORA, OUT)
        done = files(there, "out")
        with pytest.raises(StorageError, match="it exists; choose another name"):
            merge_checkpoint(BASE, LORA, OUT)
        with pytest.raises(StorageError, match="exists"):
            combine(LORA, OUT)
        with pytest.raises(StorageError, match="a file is there"):
            combine(LORA, f"{OUT}/config.json", overwrite=True)
        with pytest.raises(UsageError, match="a single file cannot"):
            merge_checkpoint(f"{BASE}/model-00001-of-00003.safetensors", LORA, f"{OUT}.safetensors")
        for out in (BASE, f"{BASE}/x", "memory://m", "memory://m//base/./x"):
            with pytest.raises(UsageError, match="shares files with the input"):
                combine([LORA, here / "lora"], out, base=BASE)
        assert files(there, "out") == done

    def test_one_run_at_a_time(self, there: Any) -> None:
        seen = []

        def second(*_: Any) -> None:
            if not seen:
                with pytest.raises(StorageError) as caught:
                    merge_checkpoint(BASE, LORA, OUT)
                seen.append(str(caught.value))

        merge_checkpoint(BASE, LORA, OUT, progress=second)
        assert f"process {os.getpid()}" in seen[0]
        verify_checkpoint(BASE, LORA, OUT)
        there.pipe(f"/m/killed/{CLAIM}", b'{"pid": 1, "host": "node1", "since": "then"}')
        with pytest.raises(StorageError, match=r"process 1 on node1, since then.*runs no more"):
            merge_checkpoint(BASE, LORA, "memory://m/killed", overwrite=True)

    def test_two_claims_at_once(self, there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second sees nothing at first, and is refused all the same."""
        gate, lock, results = threading.Barrier(2), threading.Lock(), []
        pipe = type(there).pipe_file

        def pipe_file(self: Any, path: str, value: bytes, **more: Any) -> None:
            gate.wait(60)
            with lock:  # the store itself would do that
                pipe(self, path, value, **more)

        monkeypatch.setattr(type(there), "pipe_file", pipe_file)

        def run() -> None:
            try:
                combine(LORA, OUT)
                results.append("done")
            except StorageError as error:
                results.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "done" in results
        assert any("is writing it" in result for result in results)
        assert CLAIM not in files(there, "out")
        Adapter.load(OUT)


class TestNamesOfFiles:
    """What a store calls its files, which may be no names here."""

    @pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a\\b", "a\0b", ""])
    def test_names_that_lead_out(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        mirror = Mirror(None, "/m", "memory://m", folder, folder, "memory://m")
        mirror.add(name, {"size": 3})
        assert mirror.away == {}
        assert [*tmp_path.rglob("*")] == [folder]

    def test_a_file_and_a_directory_of_one_name(self, tmp_path: Path) -> None:
        mirror = Mirror(None, "/m", "memory://m", tmp_path, tmp_path, "memory://m")
        for name in ("a", "a/b", "a", "c"):
            mirror.add(name, {"size": 3})
        assert mirror.away == {"a": "/m/a", "c": "/m/c"}

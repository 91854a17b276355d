"""Whatever happens to a command: its output stands there whole or not at all, its inputs stay."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import cli, merge_checkpoint
from peft_any.adapter import Adapter
from peft_any.errors import StorageError, VerifyError
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.io.safetensors import SafetensorsFile, write_safetensors
from peft_any.methods.lora import LoraConfig
from peft_any.model import PeftModel
from tests.killing import Killer, killer

SHARDS, WIDTH = 6, 256
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")


def make_inputs(folder: Path, width: int = WIDTH, seed: int = 0) -> tuple[Path, Path]:
    """Write a base in shards, each with touched and untouched tensors, and an adapter."""
    rng = np.random.default_rng(seed)
    base, weight_map = folder / "base", {}
    base.mkdir(parents=True)
    weights: dict[str, np.ndarray] = {}
    for i in range(SHARDS):
        name = f"model-0000{i + 1}-of-0000{SHARDS}.safetensors"
        held = {
            f"layers.{i}.{part}.weight": rng.standard_normal((width, width)).astype("float32")
            for part in ("q_proj", "v_proj", "up_proj")
        }
        write_safetensors(base / name, held, {"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
        weights |= held
    total = sum(a.nbytes for a in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "llama"}')
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    made = PeftModel(weights).add("x", config, seed=1)
    sites = {
        site: {k: rng.standard_normal(v.shape).astype("float32") for k, v in p.items()}
        for site, p in made.sites.items()
    }
    made.replace(sites=sites).save(folder / "adapter")
    return base, folder / "adapter"


def contents(folder: Path) -> dict[str, Any]:
    """Read all that must not depend on when and where it was made."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name.endswith("_receipt.json"):
            receipt = json.loads(path.read_text())
            for key in ("seconds", "peak_memory", "warnings"):
                del receipt[key]
            del receipt["out"]["path"]
            found[path.name] = receipt
        else:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = [(p, p.stat()) for p in [folder, *folder.rglob("*")]]
    return {str(p): (s.st_mtime_ns, s.st_ctime_ns, s.st_size) for p, s in found}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("small"), width=16)


def merge(inputs: tuple[Path, Path], out: Path, *options: str) -> int:
    base, adapter = inputs
    given = "merge", "--base", base, "--adapter", adapter, "--out", out, "-q", *options
    return cli.run([str(a) for a in given])


@pytest.fixture(scope="module")
def undisturbed(
    inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert merge(inputs, out) == 0
    return contents(out)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small or a read-only file system, where that is allowed."""
    with ExitStack() as stack:

        def mount(*options: object) -> Path:
            place = tmp_path / f"mount{len(list(tmp_path.iterdir()))}"
            place.mkdir()
            command = ["mount", *map(str, options), str(place)]
            try:
                done = subprocess.run(command, capture_output=True, check=False)
            except OSError:
                pytest.skip("there is no mount command")
            if done.returncode:
                pytest.skip("mounting is not allowed here")
            stack.callback(subprocess.run, ["umount", "-l", place], check=True)
            return place

        yield mount


class TestFileSystem:
    def test_full(self, inputs: tuple[Path, Path], mounted: Callable[..., Path]) -> None:
        before = [state(p) for p in inputs]
        for size in ("16k", "300k", "1m", "3m", "4400k"):
            disk = mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
            assert merge(inputs, disk / "out") == 5
            assert [*disk.iterdir()] == []
        assert [state(p) for p in inputs] == before

    def test_full_with_a_previous_output(
        self, inputs: tuple[Path, Path], mounted: Callable[..., Path]
    ) -> None:
        disk = mounted("-t", "tmpfs", "-o", "size=7m", "tmpfs")
        assert merge(inputs, disk / "out") == 0
        before = state(disk / "out")
        assert merge(inputs, disk / "out", "--overwrite", "--dtype", "float64") == 5
        assert state(disk / "out") == before
        assert [p.name for p in disk.iterdir()] == ["out"]

    def test_read_only_output(
        self, inputs: tuple[Path, Path], mounted: Callable[..., Path], capsys: Any
    ) -> None:
        disk = mounted("-t", "tmpfs", "-o", "ro", "tmpfs")
        assert merge(inputs, disk / "out") == 5
        assert "read-only" in capsys.readouterr().err

    def test_read_only_inputs(
        self,
        inputs: tuple[Path, Path],
        undisturbed: dict[str, Any],
        mounted: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        home = mounted("--bind", inputs[0].parent)
        done = subprocess.run(["mount", "-o", "remount,ro,bind", home], check=False)
        if done.returncode:
            pytest.skip("mounting read-only is not allowed here")
        assert merge((home / "base", home / "adapter"), tmp_path / "out") == 0
        made = contents(tmp_path / "out")
        assert {k: v for k, v in made.items() if k != "merge_receipt.json"} == {
            k: v for k, v in undisturbed.items() if k != "merge_receipt.json"
        }

    def test_inputs_do_not_tell_that_they_were_read(self, tmp_path: Path) -> None:
        given = make_inputs(tmp_path, width=16)
        files = [p for folder in given for p in folder.rglob("*")]
        for path in files:
            os.utime(path, ns=(10**9, 2 * 10**9))  # older than the last change: it would be set
        before = [p.stat().st_atime_ns for p in files]
        probe = tmp_path / "probe"
        probe.touch()
        os.utime(probe, ns=(10**9, 2 * 10**9))
        probe.read_bytes()
        if probe.stat().st_atime_ns == 10**9 or not hasattr(os, "O_NOATIME"):
            pytest.skip("the file system, or the system, keeps no times of access")
        assert merge(given, tmp_path / "out") == 0
        assert [p.stat().st_atime_ns for p in files] == before


CALLS = [
    (os, "write"), (os, "pwrite"), (os, "fsync"), (os, "copy_file_range"), (os, "ftruncate"),
    (os, "rename"), (os, "replace"), (os, "link"), (os, "mkdir"), (os, "open"), (io, "open"),
    (builtins, "open"), (os, "fdatasync"),
]  # fmt: skip
LASTING = {"write", "pwrite", "fsync", "fdatasync", "copy_file_range", "ftruncate"}


class Broken:
    """Has the n-th call that changes or opens a file fail, and later ones that write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, code: int) -> None:
        self.count, self.at, self.code = 0, at, code
        self.failing: str | None = None
        for home, name in CALLS:
            if hasattr(home, name):
                monkeypatch.setattr(home, name, self.wrapped(name, getattr(home, name)))

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.failing = name
            if self.count == self.at or (name == self.failing and name in LASTING):
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_every_call_may_fail(
    small: tuple[Path, Path], tmp_path: Path, overwrite: bool, code: int, fuzz: int
) -> None:
    out = tmp_path / "out"
    assert merge(small, out) == 0
    want, inputs = contents(out), [state(p) for p in small]
    with pytest.MonkeyPatch.context() as patch:
        broken = Broken(patch, None, code)
        assert merge(small, out, "--overwrite") == 0
    total = broken.count
    assert total > 50
    if not overwrite:
        shutil.rmtree(out)
    picked = random.Random(fuzz).sample(range(1, total + 1), min(total, max(fuzz // 8, 20)))
    for at in picked:
        with pytest.MonkeyPatch.context() as patch:
            broken = Broken(patch, at, code)
            result = merge(small, out, *(["--overwrite"] if overwrite else []))
        # Syncs beside the work are as many as it takes: the last calls need not come.
        said = f"call {at} of {total}, {broken.failing or 'not made'}: exit {result}"
        assert result in (0, 5), said
        assert [state(p) for p in small] == inputs, said
        for left in [p for p in tmp_path.iterdir() if p != out]:
            # What was replaced, and cannot be removed: that is a warning.
            assert (left.suffix, overwrite, result) == (".gone", True, 0), said
            shutil.rmtree(left)
        assert out.exists() or (result and not overwrite), said
        if out.exists():
            assert contents(out) == want, said
            if not overwrite:
                shutil.rmtree(out)


@pytest.fixture(scope="module")
def kill() -> Iterator[Killer]:
    with killer() as found:
        yield found


def partial(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith((".partial", ".journal")))


@posix
class TestSignals:
    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    def test_asked_to_stop(
        self,
        *,
        inputs: tuple[Path, Path],
        undisturbed: dict[str, Any],
        tmp_path: Path,
        kill: Killer,
        name: str,
        fuzz: int,
    ) -> None:
        given = "merge", "--base", inputs[0], "--adapter", inputs[1], "--out", tmp_path / "out"
        before = [state(p) for p in inputs]
        number = getattr(signal, name)
        _, whole = kill(*given)
        shutil.rmtree(tmp_path / "out")
        rng = random.Random(name)
        for _ in range(max(fuzz // 50, 4)):
            code, _ = kill(*given, after=rng.uniform(0, whole), number=number)
            assert code in (0, 128 + number, -number)
            if (tmp_path / "out").exists():  # the signal may come when all is done
                assert contents(tmp_path / "out") == undisturbed
                shutil.rmtree(tmp_path / "out")
            else:
                assert code
            left = [p.name for p in tmp_path.iterdir()]
            assert left == [] or code == -number  # before the program had taken the signal over
            assert [state(p) for p in inputs] == before

    def test_a_resumed_merge_keeps_what_is_finished(
        self, inputs: tuple[Path, Path], undisturbed: dict[str, Any], tmp_path: Path, kill: Killer
    ) -> None:
        given = "merge", "--base", inputs[0], "--adapter", inputs[1], "--out", tmp_path / "out"
        interrupted = 0
        while interrupted < 3:
            code, _ = kill(*given, "--resume", once=tmp_path, number=signal.SIGTERM)
            if (tmp_path / "out").exists():  # it was quicker
                shutil.rmtree(tmp_path / "out")
                continue
            interrupted += 1
            assert code in (128 + signal.SIGTERM, -signal.SIGTERM)
            left = partial(tmp_path)
            assert [name.rpartition(".")[2] for name in left] == ["journal", "partial"]
        code, _ = kill(*given, "--resume")
        assert code == 0
        assert any("continued" in line for line in warnings_of(tmp_path / "out"))
        assert contents(tmp_path / "out") == undisturbed
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
    def test_killed_at_any_moment_and_resumed(
        self,
        *,
        inputs: tuple[Path, Path],
        undisturbed: dict[str, Any],
        tmp_path: Path,
        kill: Killer,
        overwrite: bool,
        kills: int,
    ) -> None:
        out, before = tmp_path / "out", [state(p) for p in inputs]
        given = "merge", "--base", inputs[0], "--adapter", inputs[1], "--out", out
        given = (*given, "--resume", *(["--overwrite"] if overwrite else []))
        _, whole = kill(*given)
        if overwrite:
            make_previous(out)
        else:
            shutil.rmtree(out)
        rng, done, resumed = random.Random(kills), 0, 0
        while done < kills:
            code, _ = kill(*given, after=rng.uniform(0, whole))
            done += code == -9
            assert code in (0, -9)
            assert [state(p) for p in inputs] == before
            finished = out.exists() and (out / "merge_receipt.json").exists()
            if overwrite and not finished and out.exists():
                assert (out / "previous.safetensors").exists()
            if finished:
                assert contents(out) == undisturbed
                resumed += any("continued" in line for line in warnings_of(out))
                if overwrite:
                    make_previous(out)
                else:
                    shutil.rmtree(out)
        assert kill(*given)[0] == 0
        resumed += any("continued" in line for line in warnings_of(out))
        assert contents(out) == undisturbed
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert resumed or kills < 20

    def test_combine_killed_at_any_moment(
        self, *, tmp_path: Path, kill: Killer, inputs: tuple[Path, Path], kills: int
    ) -> None:
        """It takes too little time to be continued: what is killed is done again."""
        out, adapter = tmp_path / "out", inputs[1]
        given = "combine", f"{adapter}:0.7", f"{adapter}:-0.3", "--rank", 3, "--out", out
        _, whole = kill(*given)
        want, before = contents(out), state(adapter)
        shutil.rmtree(out)
        rng, done = random.Random(kills), 0
        while done < kills:
            code, _ = kill(*given, after=rng.uniform(0, whole))
            assert code in (0, -9)
            done += code == -9
            if out.exists():
                assert contents(out) == want
                shutil.rmtree(out)
        assert kill(*given)[0] == 0
        assert contents(out) == want
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert state(adapter) == before


def warnings_of(out: Path) -> list[str]:
    found = json.loads((out / "merge_receipt.json").read_text())["warnings"]
    assert isinstance(found, list)
    return found


def make_previous(out: Path) -> None:
    """Put an older output in an output's place."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_safetensors(out / "previous.safetensors", {})


class Stop(BaseException):
    """An end that nobody expects."""


class TestResume:
    """What may be continued, and what may not."""

    def interrupted(
        self, inputs: tuple[Path, Path], out: Path, shards: int, **options: Any
    ) -> None:
        """Merge so many shards, and die."""

        def step(_: int, __: int, name: str) -> None:
            if f"layers.{shards}." in name:
                raise Stop

        with pytest.raises(Stop):
            merge_checkpoint(*inputs, out, progress=step, resume=True, **options)

    def test_goes_on_at_the_shard_it_was_on(
        self, inputs: tuple[Path, Path], undisturbed: dict[str, Any], tmp_path: Path
    ) -> None:
        for shards in (2, 4):
            self.interrupted(inputs, tmp_path / "out", shards)
            (folder,) = (p for p in tmp_path.iterdir() if p.name.endswith(".partial"))
            assert len(list(folder.glob("*.safetensors"))) >= shards
        seen: list[int] = []
        made = merge_checkpoint(
            *inputs, tmp_path / "out", resume=True, progress=lambda done, *_: seen.append(done)
        )
        assert contents(tmp_path / "out") == undisturbed
        assert json.loads(made.to_json())["changes"] == undisturbed["merge_receipt.json"]["changes"]
        assert any("4 shards were finished before" in line for line in made.warnings)
        assert seen == sorted(seen)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_nothing_to_go_on_with(
        self, inputs: tuple[Path, Path], undisturbed: dict[str, Any], tmp_path: Path
    ) -> None:
        merge_checkpoint(*inputs, tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == undisturbed

    def test_without_the_option_it_begins_anew(
        self, inputs: tuple[Path, Path], undisturbed: dict[str, Any], tmp_path: Path
    ) -> None:
        self.interrupted(inputs, tmp_path / "out", 3)
        with pytest.warns(UserWarning, match="which --resume would have continued"):
            made = merge_checkpoint(*inputs, tmp_path / "out")
        assert made.warnings == ()
        assert contents(tmp_path / "out") == undisturbed
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_an_end_before_the_first_shard_leaves_nothing(
        self, inputs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        self.interrupted(inputs, tmp_path / "out", 0)
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"dtype": "float16"}, "options: dtype was None and is 'float16'"),
            ({"weight": 0.5}, "adapters"),
            ({"adapter": True}, "adapters"),
            ({"touch": True}, r"base: model-00005-of-00006.safetensors was \["),
            ({"journal": '{"form": 0}\n'}, "its journal is not this version's"),
            ({"journal": "\x00\xff\n"}, "its journal is not this version's"),
        ],
    )
    def test_another_merge_is_refused(
        self, inputs: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], says: str
    ) -> None:
        base, adapter = (shutil.copytree(p, tmp_path / p.name) for p in inputs)
        home = tmp_path / "home"
        home.mkdir()
        self.interrupted((base, adapter), home / "out", 3)
        left = state(home)
        options: dict[str, Any] = {"resume": True}
        given: Any = adapter
        if "touch" in change:
            os.utime(base / "model-00005-of-00006.safetensors")
        elif "adapter" in change:
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
        elif "weight" in change:
            given = {adapter: 0.5}
        elif "journal" in change:
            (journal,) = home.glob(".*.journal")
            journal.write_text(change["journal"], encoding="latin-1")
            left = state(home)
        else:
            options |= change
        with pytest.raises(StorageError, match=says) as caught:
            merge_checkpoint(base, given, home / "out", **options)
        assert "a merge without resume=True (--resume) removes the partial" in str(caught.value)
        now = state(home)
        assert {k: v for k, v in now.items() if k != str(home)} == {
            k: v for k, v in left.items() if k != str(home)
        }

    @pytest.mark.parametrize(
        "damage", ["cut", "bytes", "between samples", "gone", "journal cut", "other file"]
    )
    def test_damaged_parts_are_made_again(
        self, inputs: tuple[Path, Path], undisturbed: dict[str, Any], tmp_path: Path, damage: str
    ) -> None:
        self.interrupted(inputs, tmp_path / "out", 3)
        (folder,) = tmp_path.glob(".*.partial")
        (journal,) = tmp_path.glob(".*.journal")
        shard = folder / "model-00002-of-00006.safetensors"
        if damage == "cut":
            os.truncate(shard, 1000)
        elif damage == "bytes":
            data = bytearray(shard.read_bytes())
            data[-5] ^= 1
            shard.write_bytes(data)
        elif damage == "between samples":
            with SafetensorsFile(shard) as file:
                before, first = fingerprint(file), file.info(next(iter(file)))
            assert first.nbytes > 40_000
            with shard.open("r+b") as written:
                written.seek(first.start + 5000)
                written.write(b"!")
            with SafetensorsFile(shard) as file:
                assert fingerprint(file) == before
        elif damage == "gone":
            shard.unlink()
        elif damage == "other file":
            (folder / "config.json").write_text("{")
        else:
            os.truncate(journal, journal.stat().st_size - 40)
        made = merge_checkpoint(*inputs, tmp_path / "out", resume=True)
        whole = 3 if damage == "other file" else 2
        assert any(f"{whole} shards were finished" in line for line in made.warnings)
        assert contents(tmp_path / "out") == undisturbed
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_shards_in_directories_of_their_own(
        self, inputs: tuple[Path, Path], undisturbed: dict[str, Any], tmp_path: Path
    ) -> None:
        base = shutil.copytree(inputs[0], tmp_path / "base")
        index = base / "model.safetensors.index.json"
        found = json.loads(index.read_text())
        moved = {
            name: f"part{name[6:11]}/model.safetensors" for name in found["weight_map"].values()
        }
        for name, place in moved.items():
            (base / place).parent.mkdir()
            (base / name).rename(base / place)
        found["weight_map"] = {k: moved[name] for k, name in found["weight_map"].items()}
        index.write_text(json.dumps(found))
        self.interrupted((base, inputs[1]), tmp_path / "out", 3)
        made = merge_checkpoint(base, inputs[1], tmp_path / "out", resume=True)
        assert any("3 shards were finished" in line for line in made.warnings)
        for name, place in moved.items():
            assert (tmp_path / "out" / place).read_bytes() == undisturbed[name]

    def test_an_adapter_that_was_given_as_an_object(
        self, inputs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        base, path = inputs
        adapter = Adapter.load(path)
        self.interrupted((base, adapter), tmp_path / "out", 3)  # type: ignore[arg-type]
        site = next(iter(adapter.sites))
        other = adapter.replace(
            sites={**adapter.sites, site: {k: -a for k, a in adapter.sites[site].items()}}
        )
        with pytest.raises(StorageError, match="adapters"):
            merge_checkpoint(base, other, tmp_path / "out", resume=True)
        made = merge_checkpoint(base, adapter, tmp_path / "out", resume=True)
        assert any("3 shards were finished" in line for line in made.warnings)

    def test_digests_of_all_bytes(self, inputs: tuple[Path, Path], tmp_path: Path) -> None:
        self.interrupted(inputs, tmp_path / "out", 3)
        made = merge_checkpoint(*inputs, tmp_path / "out", resume=True, full_hash=True)
        for place, path in ((made.base, inputs[0]), (made.out, tmp_path / "out")):
            with Checkpoint(path) as found:
                assert place["sha256"] == fingerprint(found, full=True)
        assert made.base["sha256"] != made.out["sha256"]

    def test_a_lower_demand_may_follow(self, inputs: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(VerifyError):
            merge_checkpoint(*inputs, tmp_path / "out", min_kept=1.0, dtype="bfloat16", resume=True)
        made = merge_checkpoint(*inputs, tmp_path / "out", dtype="bfloat16", resume=True)
        assert any(f"{SHARDS} shards were finished" in line for line in made.warnings)

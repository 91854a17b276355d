"""Outputs at URLs that take others' places or are continued, whatever the file system does."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peft_any import (
    Adapter,
    cli,
    combine,
    extract,
    merge_checkpoint,
    replicate_checkpoint,
    verify_checkpoint,
)
from peft_any.errors import PeftError, StorageError
from peft_any.io import _claim, _outgoing, _sending
from peft_any.io._claim import CLAIM
from peft_any.io._remote import MARKER, OURS
from peft_any.io._replacing import JOURNAL, NEW
from peft_any.io.checkpoint import Checkpoint
from tests.faulty import READS, Faults, Killed
from tests.test_urls import contents, same
from tests.test_urls import here as here

fsspec = pytest.importorskip("fsspec")

Files = dict[str, bytes]
MERGED = "merge_receipt.json"


@dataclass
class World:
    """A file system with a base and an adapter, and an older output."""

    fs: Any
    root: str
    faults: Faults
    new: Files
    old: Files = field(default_factory=dict)

    @property
    def out(self) -> str:
        return f"{self.root}out"

    def url(self, name: str) -> str:
        return f"{self.root}{name}"

    def merge(self, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return merge_checkpoint(self.url("base"), self.url("lora"), self.out, **options)

    def killed(self, moment: int, **options: Any) -> bool:
        """Merge, with one write the last that is made; tell whether it came to that."""
        self.faults.set(moment, Killed())
        try:
            self.merge(**options)
        except Killed:
            return True
        finally:
            self.faults.set()
        return False

    def files(self, folder: str = "out") -> Files:
        """Read what is there, with what is there for a while alone."""
        fs, key = fsspec.core.url_to_fs(self.url(folder))
        fs.invalidate_cache()
        return {n[len(key) + 1 :]: fs.cat_file(n) for n in fs.find(key)} if fs.exists(key) else {}

    def make_old(self) -> Files:
        """Put an output there that differs in every file, and has one of its own."""
        key = self.fs._strip_protocol(self.out)
        if self.fs.exists(key):
            self.fs.rm(key, recursive=True)
        if not self.old:
            merge_checkpoint(self.url("base"), [(self.url("lora"), 2.0)], self.out)
            other = {"config.json": b'{"old": true}', "tokenizer.json": b'"old"', "old.txt": b"old"}
            self.old = {**self.files(), **other}
        for name, data in self.old.items():
            self.fs.makedirs(self.fs._parent(f"{key}/{name}"), exist_ok=True)
            self.fs.pipe_file(f"{key}/{name}", data)
        return self.old


KINDS = pytest.mark.parametrize("world", ["store", "renames", "bucket"], indirect=True)
"""For what is tried on a store with S3's ways, too."""


@pytest.fixture(params=["store", "renames"])
def world(
    request: pytest.FixtureRequest, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A file system of either kind."""
    new = contents(here / "merged")
    if request.param != "renames":
        from tests.bucket import Bucket

        fs, root = fsspec.filesystem("memory"), "memory://w/"
        if request.param == "bucket":
            fs, root = Bucket(), "r2://w/"
        for name in ("base", "lora"):
            for path in (p for p in (here / name).rglob("*") if p.is_file()):
                fs.pipe_file(f"{root}{path.relative_to(here)}", path.read_bytes())
        faults = Faults(monkeypatch, type(fs), halves=False)
        yield World(fs, root, faults, new)
        faults.set()
        fs.invalidate_cache()
        fs.rm(root, recursive=True)
        return
    for name in ("base", "lora"):
        shutil.copytree(here / name, tmp_path / name)
    from tests.test_urls_cluster import register

    register(str(tmp_path))
    fs = fsspec.filesystem("shelf")
    yield World(fs, "shelf://", Faults(monkeypatch, type(fs), halves=True), new)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every claim for a dead process's."""
    for module in (_claim, _outgoing):
        monkeypatch.setattr(module, "is_dead", bool)


def shown(files: Files) -> Files:
    return {name: data for name, data in files.items() if not name.startswith(OURS)}


def as_read(files: Files) -> Files | None:
    """Give what a reader takes for a model: a configuration, an index, and what that names."""
    index = files.get("model.safetensors.index.json")
    if index is None or "config.json" not in files:
        return None
    shards = {*json.loads(index)["weight_map"].values()}
    named = {"config.json", "model.safetensors.index.json", *shards}
    return {name: files.get(name, b"") for name in sorted(named)}


def read_by(world: World) -> dict[str, Any] | None:
    """Give what this package takes for a model there; None where it takes nothing."""
    try:
        with Checkpoint(world.out) as found:
            return {"config": found.config, **{n: bytes(found.raw(n)) for n in found}}
    except PeftError:
        return None


class TestReplacing:
    """The new output is whole before the old one goes, and no mixture is a model."""

    @KINDS
    def test_in_order(self, world: World) -> None:
        old = world.make_old()
        order: list[str] = []
        world.merge(
            overwrite=True, progress=lambda *_: order.append(str(shown(world.files()) == old))
        )
        assert {*order} == {"True"}
        same(world.files(), world.new)
        verify_checkpoint(world.url("base"), world.url("lora"), world.out)

    def test_killed_at_any_moment(self, world: World, forgotten: None) -> None:
        """Every write in turn is the last one; then the same command is given again."""
        old, seen = world.make_old(), set()
        before = as_read(old), read_by(world)
        world.merge(overwrite=True)
        after = as_read(world.files()), read_by(world)
        assert None not in (*before, *after)
        for moment in range(1, 100):
            world.make_old()
            if not world.killed(moment, overwrite=True):
                break
            left = world.files()
            taken = as_read(left)
            assert taken in (before[0], after[0], None), moment
            ours = read_by(world)
            assert ours in (before[1], after[1], None), moment
            seen.add((taken == before[0], ours == before[1]))
            if taken is None:  # all of the new one is there, in either place
                whole = {n for n in world.new if n in left or f"{NEW}/{n}" in left}
                assert whole == {*world.new}, moment
            resume = {"resume": True} if moment % 2 else {}
            made = world.merge(overwrite=True, **resume)
            same(world.files(), world.new)
            assert made.changes
        assert moment > 20
        # Once the marker is there, this package reads nothing, others the old one until it goes.
        assert seen == {(True, True), (True, False), (False, False)}

    def test_failing_at_any_moment(self, world: World) -> None:
        """A write fails, and then no other one: nothing of the new output is seen, or all of it."""
        old = world.make_old()
        for moment in range(1, 100):
            world.faults.set(moment, OSError(5, "Input/output error"))
            try:
                world.merge(overwrite=True)
            except StorageError:
                pass
            else:
                break
            finally:
                world.faults.set()
            if MARKER in world.files():
                assert read_by(world) is None
                with pytest.raises(StorageError, match="putting a new output in its place"):
                    Checkpoint(world.out)
                with pytest.warns(UserWarning, match="it is in place now"):
                    merge_checkpoint(
                        world.url("base"), world.url("lora"), world.out, overwrite=True
                    )
                same(world.files(), world.new)
                world.make_old()
            elif shown(left := world.files()) == old:
                staged = {name for name in left if name not in old}
                assert not staged or {f"{NEW}/{name}" for name in world.new} <= staged, moment
            else:
                same(left, world.new)  # it was but the claim that could not be removed
                world.make_old()
        assert moment > 20
        same({n: d for n, d in world.files().items() if n != CLAIM}, world.new)

    @KINDS
    def test_what_is_no_model_is_not_replaced(self, world: World) -> None:
        key = world.fs._strip_protocol(world.url("out"))
        world.fs.makedirs(key, exist_ok=True)
        world.fs.pipe_file(f"{key}/notes.txt", b"mine")
        with pytest.raises(StorageError, match="it exists"):
            world.merge()
        with pytest.raises(StorageError, match=r"no model or adapter.*remove it yourself"):
            world.merge(overwrite=True)
        assert world.files() == {"notes.txt": b"mine"}

    @KINDS
    def test_every_command(self, world: World, here: Path, tmp_path: Path) -> None:
        lora, base = world.url("lora"), world.url("base")
        for make in (
            lambda out, **how: combine([(lora, 0.5)], out, **how),
            lambda out, **how: extract(base, here / "merged", out, rank=4, **how),
            lambda out, **how: replicate_checkpoint(base, [(0, 2), (1, 3)], out, **how),
            lambda out, **how: Adapter.load(lora).save(out, **how),
        ):
            world.make_old()
            with pytest.raises(StorageError, match="it exists"):
                make(world.out)
            make(world.out, overwrite=True)
            make(tmp_path / "out", overwrite=True)
            one, two = world.files(), contents(tmp_path / "out")
            assert one.keys() == two.keys()
            for name in [n for n in one if not n.endswith("_receipt.json")]:
                assert one[name] == two[name]


class TestResuming:
    """What was sent is not made again."""

    @pytest.mark.parametrize("replacing", [False, True], ids=["new", "overwrite"])
    def test_killed_at_any_moment(self, world: World, forgotten: None, replacing: bool) -> None:
        how: dict[str, Any] = {"resume": True, "overwrite": replacing}
        continued = 0
        for moment in range(1, 100):
            if replacing:
                old = world.make_old()
            if not world.killed(moment, **how):
                break
            left = world.files()
            if replacing and MARKER not in left and not shown(left).keys() & {MERGED}:
                assert shown(left) == old
            if not replacing:
                assert as_read(left) in (None, as_read(world.new)), moment
            if MERGED in shown(left) and not replacing:
                with pytest.raises(StorageError, match="it exists"):
                    world.merge(**how)
            else:
                made = world.merge(**how)
                continued += any("continued" in note for note in made.warnings)
            files = {n: d for n, d in world.files().items() if n != CLAIM and JOURNAL not in n}
            same(files, world.new)
            world.fs.rm(world.fs._strip_protocol(world.out), recursive=True)
        assert moment > 15
        assert continued > 3

    @KINDS
    def test_failures_are_continued(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """The claim is given up; shards that were sent are not computed again."""
        world.faults.set(9, OSError(5, "Input/output error"))
        with pytest.raises(StorageError, match="Input/output"):
            world.merge(resume=True)
        world.faults.set()
        left = world.files()
        assert CLAIM not in left
        shards = [name for name in left if name.endswith(".safetensors")]
        assert shards
        with pytest.raises(StorageError, match=r"killed run has left part.*--resume"):
            world.merge()
        with pytest.raises(StorageError, match=r"cannot be continued: options: dtype was None"):
            world.merge(resume=True, dtype="float32")
        assert world.files() == left
        sent: list[str] = []
        send = _sending.send

        def noted(path: Path, url: str) -> None:
            sent.append(path.name)
            send(path, url)

        monkeypatch.setattr(_sending, "send", noted)
        made = world.merge(resume=True)
        count = sum(JOURNAL in name for name in left) - 1  # the first says what is merged
        assert f"{world.out}: continued; {count} shards were finished before" in made.warnings
        assert len([name for name in sent if name.endswith(".safetensors")]) == 3 - count
        same(world.files(), world.new)

    @KINDS
    @pytest.mark.parametrize("same_tag", [False, True])
    def test_damage_between_the_runs(
        self, world: World, same_tag: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shard whose store says nothing, or another thing, is read in full."""
        if same_tag:
            monkeypatch.setattr("peft_any.surgery.sent.tag_of", lambda _: "ETag:1")
        world.faults.set(9, OSError(5, "Input/output error"))
        with pytest.raises(StorageError):
            world.merge(resume=True)
        world.faults.set()
        key = world.fs._strip_protocol(world.out)
        shard = f"{key}/model-00001-of-00003.safetensors"
        data = bytearray(world.fs.cat_file(shard))
        data[-100] ^= 1
        world.fs.pipe_file(shard, bytes(data))
        world.merge(resume=True)
        if same_tag:  # what the store says is believed
            assert world.files()["model-00001-of-00003.safetensors"] == bytes(data)
        else:
            same(world.files(), world.new)

    def test_without_anything_to_go_on_with(self, world: World) -> None:
        made = world.merge(resume=True)
        assert not any("continued" in note for note in made.warnings)
        same(world.files(), world.new)
        with pytest.raises(StorageError, match="it exists"):
            world.merge(resume=True)

    @KINDS
    def test_begun_anew(self, world: World) -> None:
        world.faults.set(9, OSError(5, "Input/output error"))
        with pytest.raises(StorageError):
            world.merge(resume=True)
        world.faults.set()
        with pytest.warns(UserWarning, match="removed what a killed run left there"):
            merge_checkpoint(world.url("base"), world.url("lora"), world.out, overwrite=True)
        same(world.files(), world.new)


class TestClaims:
    """Nobody else's files are touched."""

    @KINDS
    def test_a_claim_that_was_taken_away(self, world: World) -> None:
        """A run that someone took for dead, and whose claim they removed, ends without a trace."""
        seen = []

        def steal(*_: Any) -> None:
            if not seen:
                seen.append(1)
                world.fs.pipe_file(f"{world.fs._strip_protocol(world.out)}/{CLAIM}", b'{"pid": 7}')

        with pytest.raises(StorageError, match="process 7 on"):
            world.merge(progress=steal)
        assert world.files()[CLAIM] == b'{"pid": 7}'

    def test_who_is_dead(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        me = _claim.signature() | _claim._machine()
        if "boot" not in me:
            pytest.skip("the system does not tell its starts apart: every claim is believed")
        assert not _claim.is_dead(me)
        gone = {**me, "began": "0"}  # its number was given out again
        assert _claim.is_dead(gone)
        for other in ({"boot": "x"}, {"space": 1}, {"host": "another"}):
            assert not _claim.is_dead({**gone, **other})
        assert not _claim.is_dead({})
        assert not _claim.is_dead({"pid": me["pid"], "host": me["host"], "began": "0"})

    @KINDS
    def test_two_take_over_at_once(self, world: World, forgotten: None) -> None:
        """Of those who saw a dead claim, one gets it."""
        key = world.fs._strip_protocol(world.out)
        world.fs.makedirs(key, exist_ok=True)
        world.fs.pipe_file(f"{key}/{CLAIM}", b'{"token": "a", "staged": false}')
        world.fs.pipe_file(f"{key}/{CLAIM}.a", b"{}")  # the other one is at it
        with pytest.raises(StorageError, match="is writing it"):
            world.merge()
        world.fs.rm_file(f"{key}/{CLAIM}.a")
        world.merge()
        same(world.files(), world.new)

    @KINDS
    def test_what_appears_meanwhile_is_not_removed(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A listing that is stale, or fails in silence, shows no output where there is one."""
        old = world.make_old()
        monkeypatch.setattr(_outgoing, "refuse_taken", lambda *_, **__: False)
        with pytest.raises(StorageError, match="it exists"):
            world.merge(overwrite=True)
        assert {n: d for n, d in world.files().items() if n != CLAIM} == old


class TestHostile:
    """Whatever a store does is told, with the exit code of files, and leaves nothing."""

    @pytest.mark.parametrize(
        "error",
        [OSError(5, "Input/output error"), PermissionError(13, "denied"), TimeoutError("too slow")],
        ids=["EIO", "denied", "slow"],
    )
    def test_every_read_may_fail(
        self, world: World, error: OSError, capsys: pytest.CaptureFixture[str], fuzz: int
    ) -> None:
        given = [f"--{k}={world.url(v)}" for k, v in (("base", "base"), ("adapter", "lora"))]
        world.faults.set(names=READS)
        assert cli.run(["merge", *given, f"--out={world.out}", "-q"]) == 0
        total = world.faults.count
        world.fs.rm(world.fs._strip_protocol(world.out), recursive=True)
        for moment in range(1, total + 1, 1 if fuzz > 200 else 5):
            world.faults.set(moment, error, READS)
            code = cli.run(["merge", *given, f"--out={world.out}", "-q"])
            world.faults.set()
            left = world.files()
            if code == 0:  # a worker's part of no consequence
                same(left, world.new)
                world.fs.rm(world.fs._strip_protocol(world.out), recursive=True)
                continue
            said = capsys.readouterr().err
            assert code == 5, said
            assert world.root in said
            assert shown(left) == {}, (moment, said)
            if left:
                world.fs.rm(world.fs._strip_protocol(world.out), recursive=True)

    @KINDS
    def test_a_file_that_changes_between_plan_and_read(
        self, world: World, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It has the same size, so that nothing else is amiss."""
        shard = world.fs._strip_protocol(world.url("base/model-00003-of-00003.safetensors"))
        data = bytearray(world.fs.cat_file(shard))
        data[-50:] = bytes(50)

        def change(*_: Any) -> None:
            world.fs.pipe_file(shard, bytes(data))

        with pytest.raises(StorageError, match=r"00003-of-00003\.safetensors changed while"):
            world.merge(progress=change)
        assert world.files() == {}

        def again(*_: Any) -> None:
            data[-1] = (data[-1] + 1) % 256
            change()

        given: Any = {"base": world.url("base"), "adapter": world.url("lora"), "any_base": True}
        with pytest.raises(StorageError, match="changed while"):
            merge_checkpoint(**given, dry_run=True, progress=again)
        with pytest.raises(StorageError, match="changed while"):
            verify_checkpoint(
                here / "base", here / "lora", world.url("base"), progress=again, check=False
            )
        with pytest.raises(StorageError, match="changed while"):
            extract(here / "base", world.url("base"), world.out, rank=2, progress=again)
        assert world.files() == {}

    @KINDS
    def test_short_reads(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = type(world.fs).get_file

        def get_file(fs: Any, key: str, path: str, **more: Any) -> None:
            plain(fs, key, path, **more)
            if key.endswith("adapter_model.safetensors"):
                Path(path).write_bytes(Path(path).read_bytes()[:-7])

        with monkeypatch.context() as patch:
            patch.setattr(type(world.fs), "get_file", get_file)
            with pytest.raises(StorageError, match=r"adapter_model.*bytes came \d+: did it"):
                world.merge()
        ranges = type(world.fs).cat_ranges
        with monkeypatch.context() as patch:
            patch.setattr(
                type(world.fs),
                "cat_ranges",
                lambda *given, **more: [data[:-1] for data in ranges(*given, **more)],
            )
            with pytest.raises(StorageError, match="cannot be read: of bytes"):
                world.merge()
        assert world.files() == {}

    @KINDS
    def test_a_listing_that_is_stale(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shard is not listed yet; an old size is."""
        find = type(world.fs).find
        told: list[str] = []
        for change in (
            lambda found, name: found.pop(name),
            lambda found, name: found[name].update(size=99),
        ):

            def stale(*given: Any, _change: Callable[..., Any] = change, **more: Any) -> Any:
                found = find(*given, **more)
                if isinstance(found, dict):
                    for name in [
                        n for n in found if n.endswith("base/model-00002-of-00003.safetensors")
                    ]:
                        found = {k: dict(v) for k, v in found.items()}
                        _change(found, name)
                return found

            with monkeypatch.context() as patch:
                patch.setattr(type(world.fs), "find", stale)
                try:
                    base = Checkpoint(world.url("base"))
                except StorageError as error:
                    told.append(str(error))
                    continue
            with base, pytest.raises(StorageError) as caught:
                base.refuse_changes()
            told.append(str(caught.value))
        assert "shards cannot be found" in told[0]
        assert "changed while it was read" in told[1]
        same(contents_of(world), world.new)


def contents_of(world: World) -> Files:
    world.merge()
    return world.files()

"""Workers that read and write another file system: no path of this machine reaches them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_any import (
    Adapter,
    cli,
    combine,
    extract,
    merge_checkpoint,
    verify_checkpoint,
)
from peft_any.errors import PeftError, StorageError
from peft_any.io._claim import CLAIM
from peft_any.surgery.compute import Surgeon
from tests.test_cluster import client as client
from tests.test_cluster import killing, slow_down
from tests.test_cluster import pytestmark as pytestmark
from tests.test_urls import contents, same
from tests.test_urls import here as here

distributed = pytest.importorskip("distributed")

BASE, LORA, OUT = "shelf://base", "shelf://lora", "shelf://out"


def register(root: str) -> None:
    """Have ``shelf://`` mean a directory that this process is told of."""
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Shelf(DirFileSystem):
        """Whose files appear under their names before all of them is there."""

        protocol = "shelf"
        cachable = False

        def __init__(self, **_: Any) -> None:
            super().__init__(path=root, fs=LocalFileSystem())

    fsspec.register_implementation("shelf", Shelf, clobber=True)


@pytest.fixture
def shelf(client: Any, here: Path, tmp_path: Path) -> Iterator[Path]:
    """Put the inputs where the workers and this process find them."""
    for name in ("base", "lora"):
        shutil.copytree(here / name, tmp_path / name)
    register(str(tmp_path))
    client.run(register, str(tmp_path))
    return tmp_path


def test_every_command(client: Any, here: Path, shelf: Path, tmp_path: Path) -> None:
    merge_checkpoint(BASE, LORA, OUT, engine="dask")
    same(contents(here / "merged"), contents(shelf / "out"))
    verify_checkpoint(BASE, LORA, OUT, engine="dask")
    for how in ({}, {"rank": 3}):
        name = f"combined{len(how)}"
        combine([(LORA, 0.5), (LORA, 0.25)], f"shelf://{name}", engine="dask", base=BASE, **how)
        combine([(here / "lora", 0.5), (here / "lora", 0.25)], tmp_path / "c" / name, **how)
        same(contents(tmp_path / "c" / name), contents(shelf / name))
    extract(BASE, OUT, "shelf://x", rank=4, engine="dask")
    extract(here / "base", here / "merged", tmp_path / "y", rank=4)
    tensors = "adapter_model.safetensors"
    assert (shelf / "x" / tensors).read_bytes() == (tmp_path / "y" / tensors).read_bytes()


def test_paths_and_urls_together(client: Any, here: Path, shelf: Path, tmp_path: Path) -> None:
    merge_checkpoint(
        here / "base", LORA, "shelf://deep/er/out", engine="dask", max_shard_size=90_000
    )
    merge_checkpoint(BASE, here / "lora", tmp_path / "local", engine="dask", max_shard_size=90_000)
    same(contents(shelf / "deep/er/out"), contents(tmp_path / "local"))
    given = ["--base", f"file://{here}/base", "--adapter", f"file://{here}/lora"]
    where = ["--engine", "dask", "--scheduler", client.scheduler.address, "-q"]
    out = f"file://{tmp_path}/plain"
    assert cli.run(["merge", *given, "--out", out, *where]) == 0
    same(contents(here / "merged"), contents(tmp_path / "plain"))
    assert cli.run(["verify", *given, "--merged", out, *where]) == 0


def test_a_lost_workers_shard_is_sent_again(client: Any, here: Path, shelf: Path) -> None:
    client.run(slow_down)
    with killing(client, after=1) as step:
        client.register_plugin(_Registering(str(shelf)))
        attempt = shelf / "out" / f"model-00001-of-00003.safetensors.{'a' * 32}"
        merge_checkpoint(BASE, LORA, OUT, engine="dask", progress=_leaving(attempt, step))
    found = contents(shelf / "out")
    same(contents(here / "merged"), found)
    assert CLAIM not in found


def _leaving(attempt: Path, step: Any) -> Any:
    """Have part of an upload stand there, as of a worker that was lost in the midst of one."""

    def both(*told: Any) -> None:
        attempt.write_bytes(b"half")
        step(*told)

    return both


class _Registering(distributed.WorkerPlugin):  # type: ignore[misc]
    """Tells workers that start later, too."""

    def __init__(self, root: str) -> None:
        self.root = root

    def setup(self, worker: Any) -> None:
        register(self.root)


def test_failures_leave_nothing(client: Any, shelf: Path) -> None:
    before = contents(shelf)

    def fail(dask_worker: Any) -> None:
        def broken(*_: Any) -> Any:
            raise StorageError("out: cannot be written: the disk is full")

        Surgeon.kept, Surgeon.patch = Surgeon.patch, broken  # type: ignore[attr-defined, method-assign]

    def mend() -> None:
        Surgeon.patch = Surgeon.kept  # type: ignore[attr-defined, method-assign]

    client.run(fail)
    try:
        with pytest.raises(StorageError, match="the disk is full"):
            merge_checkpoint(BASE, LORA, OUT, engine="dask")
    finally:
        client.run(mend)
    assert contents(shelf) == before


def test_an_output_is_continued_and_replaced(client: Any, here: Path, shelf: Path) -> None:
    merge_checkpoint(BASE, [(LORA, 2.0)], OUT, engine="dask")
    old = contents(shelf / "out")
    asked: dict[str, Any] = {"engine": "dask", "overwrite": True, "resume": True}
    seen = 0

    def stop(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(BASE, LORA, OUT, progress=stop, **asked)
    left = contents(shelf / "out")
    assert {name: left[name] for name in old} == old
    assert CLAIM not in left
    made = merge_checkpoint(BASE, LORA, OUT, **asked)
    assert f"{OUT}: continued; 2 shards were finished before" in made.warnings
    same(contents(here / "merged"), contents(shelf / "out"))


def test_workers_without_the_library(client: Any, here: Path, shelf: Path) -> None:
    def forget() -> None:
        from fsspec.registry import _registry

        _registry.pop("shelf", None)

    client.run(forget)
    with pytest.raises(PeftError, match=r"shelf://base: .*not known"):
        verify_checkpoint(BASE, LORA, here / "merged", engine="dask")
    client.run(register, str(shelf))


def test_a_change_that_workers_see_is_refused(client: Any, here: Path, shelf: Path) -> None:
    other = shelf.parent / "other"
    shutil.copytree(shelf, other)
    lora = Adapter.load(here / "lora")
    sites = {n: {k: 2 * a for k, a in p.items()} for n, p in lora.sites.items()}
    lora.replace(sites=sites).save(other / "lora", overwrite=True)
    client.run(register, str(other))
    with pytest.raises(PeftError, match="another adapter on this worker"):
        merge_checkpoint(BASE, LORA, OUT, engine="dask")
    assert not (shelf / "out").exists() or not contents(shelf / "out")

"""The Dask engine: real workers, each a process; the same files and receipts as without."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import (
    Adapter,
    cli,
    combine,
    extract,
    merge_checkpoint,
    verify_checkpoint,
    write_safetensors,
)
from peft_any.algebra.lowrank import Cut
from peft_any.errors import TargetError, UsageError, VerifyError
from peft_any.io.checkpoint import Checkpoint
from peft_any.layer import Site
from peft_any.methods.lora import LoraConfig
from peft_any.surgery.choice import engine_of
from peft_any.surgery.cluster import QUIET, patient
from peft_any.surgery.couple import Couple
from peft_any.surgery.engines import Recipe
from peft_any.surgery.factoring import Factoring

distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.cluster,
    # what Dask itself leaves open when workers are killed
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHARDS, ROWS, WIDTH = 6, 48, 32


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two worker processes of one thread."""
    with (
        patient(),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            scheduler_kwargs=QUIET,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a sharded base in bfloat16, with a LoRA and a DoRA of it."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    base = tmp_path / "base"
    base.mkdir()
    weight_map, sites = {}, {}
    for i in range(SHARDS):
        shard = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        names = [f"layers.{i}.{name}" for name in ("q", "v", "norm")]
        tensors = {f"{n}.weight": rng.standard_normal((ROWS, WIDTH)) for n in names[:2]}
        tensors[f"{names[2]}.weight"] = rng.standard_normal(WIDTH)
        tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
        write_safetensors(base / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
        sites |= {
            n: {
                "lora_A.weight": rng.standard_normal((4, WIDTH)).astype("float32"),
                "lora_B.weight": rng.standard_normal((ROWS, 4)).astype("float32"),
            }
            for n in names[:2]
        }
    index = {"metadata": {"total_size": 2 * SHARDS * (2 * ROWS + 1) * WIDTH}}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": weight_map})
    )
    (base / "config.json").write_text('{"model_type": "llama"}')
    Adapter(LoraConfig(r=4, target_modules=["q", "v"]), sites).save(tmp_path / "lora")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file but the receipt."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name != "merge_receipt.json"
    }


def lasting(receipt: Any) -> dict[str, Any]:
    """Give what a receipt says of the result, wherever and however fast it was made."""
    found = receipt.to_dict()
    del found["seconds"], found["peak_memory"]
    found["out"].pop("path", None)
    return found


def test_the_files_and_the_receipt_are_those_of_one_process(client: Any, folder: Path) -> None:
    asked = {"base": folder / "base", "adapter": [(folder / "lora", 0.5)]}
    steps: list[tuple[int, int]] = []
    here = merge_checkpoint(**asked, out=folder / "here")
    there = merge_checkpoint(
        **asked,
        out=folder / "there",
        engine="dask",
        progress=lambda done, total, _: steps.append((done, total)),
    )
    assert contents(folder / "here") == contents(folder / "there")
    assert lasting(here) == lasting(there)
    assert len(steps) == SHARDS
    assert steps[-1][0] == steps[-1][1]
    one = verify_checkpoint(**asked, merged=folder / "there")
    two = verify_checkpoint(**asked, merged=folder / "there", engine="dask")
    assert lasting(one) == lasting(two)
    dry = merge_checkpoint(**asked, dry_run=True, engine=client.scheduler.address)
    assert dry.changes == here.changes


def test_files_of_a_size_are_a_task_each(client: Any, folder: Path) -> None:
    asked: Any = {"base": folder / "base", "adapter": folder / "lora"}
    asked["max_shard_size"] = 10 * ROWS * WIDTH  # two and a half layers in bfloat16
    here = merge_checkpoint(**asked, out=folder / "here")
    there = merge_checkpoint(**asked, out=folder / "there", engine="dask")
    assert contents(folder / "here") == contents(folder / "there")
    assert lasting(here) == lasting(there)
    files = [*(folder / "there").glob("model-*.safetensors")]
    assert len(files) != SHARDS
    assert len(files) > 1


@contextmanager
def killing(client: Any, after: int) -> Iterator[Any]:
    """Give a progress callback that kills a worker after some shards; wait for its successor."""
    killed: list[int] = []

    def step(done: int, total: int, name: str) -> None:
        step.seen += 1  # type: ignore[attr-defined]
        if step.seen == after and not killed:  # type: ignore[attr-defined]
            _, pid = client.run(os.getpid).popitem()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    step.seen = 0  # type: ignore[attr-defined]
    yield step
    assert killed
    replaced(client, killed[0])


def replaced(client: Any, pid: int) -> None:
    """Wait for a killed worker's successor: what the next test runs on all has to reach both."""
    until = time.monotonic() + 60
    while True:  # the scheduler may not have heard of it yet
        known = client.run(os.getpid, on_error="ignore").values()
        if pid not in known and len(known) == 2:
            return
        assert time.monotonic() < until, f"the successor of {pid} has not come: {[*known]}"
        time.sleep(0.05)


@dataclass(frozen=True)
class Squares(Recipe[int, int]):
    """Squares that tell, in a file each, who began them; one of them ends only if it is killed."""

    folder: Path
    fatal: int

    @contextmanager
    def open(self) -> Iterator[Any]:
        yield self.work

    def work(self, n: int) -> int:
        with (self.folder / str(n)).open("a") as file:
            file.write(f"{os.getpid()}\n")
        while n == self.fatal and len((self.folder / str(n)).read_text().split()) == 1:
            time.sleep(0.01)
        return n * n


def test_a_lost_workers_pieces_are_done_again(client: Any, tmp_path: Path) -> None:
    found: dict[int, int] = {}
    killed: list[int] = []

    def kill() -> None:
        """Kill whoever begins the fatal one."""
        file = tmp_path / "5"
        while not (file.exists() and file.read_text().endswith("\n")):
            time.sleep(0.01)
        killed.append(int(file.read_text()))
        os.kill(killed[0], signal.SIGKILL)

    def done(n: int, result: int) -> None:
        assert n not in found
        found[n] = result

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    engine_of("dask").run(Squares(tmp_path, 5), range(10), done)
    killer.join()
    assert found == {n: n * n for n in range(10)}
    begun = (tmp_path / "5").read_text().split()
    assert begun[0] == str(killed[0])
    assert len(begun) == 2
    assert begun[1] != begun[0]
    replaced(client, killed[0])


@dataclass(frozen=True)
class Lasting(Recipe[int, int]):
    """Pieces that tell when they begin and end; all but the first take a while."""

    folder: Path

    @contextmanager
    def open(self) -> Iterator[Any]:
        yield self.work

    def work(self, n: int) -> int:
        (self.folder / f"{n}.begun").touch()
        while n == 0 and not (self.folder / "1.begun").exists():
            time.sleep(0.01)
        time.sleep(0.5 * (n > 0))
        (self.folder / f"{n}.ended").touch()
        return n


def test_what_is_given_up_has_ended(client: Any, tmp_path: Path) -> None:
    """A piece that is under way on another worker writes nothing afterwards."""

    def done(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_of("dask").run(Lasting(tmp_path), range(20), done)
    begun, ended = ({p.stem for p in tmp_path.glob(f"*.{kind}")} for kind in ("begun", "ended"))
    assert "1" in begun
    assert begun == ended
    assert len(begun) < 20


def slow_down() -> None:
    """On a worker: take a while over each tensor, so that a shard is half written when it dies."""
    from peft_any.surgery.compute import Surgeon

    quick = Surgeon.patch

    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        return quick(*args)

    Surgeon.patch = slow  # type: ignore[method-assign]


def test_a_merge_outlives_a_killed_worker(client: Any, folder: Path) -> None:
    here = merge_checkpoint(folder / "base", folder / "lora", folder / "here")
    client.run(slow_down)
    with killing(client, after=1) as step:
        there = merge_checkpoint(
            folder / "base", folder / "lora", folder / "there", engine="dask", progress=step
        )
    assert contents(folder / "here") == contents(folder / "there")
    assert lasting(here) == lasting(there)


def test_what_workers_finished_is_not_done_again(client: Any, folder: Path) -> None:
    asked = {"base": folder / "base", "adapter": folder / "lora", "out": folder / "out"}

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(**asked, engine="dask", resume=True, progress=stop)
    assert not (folder / "out").exists()
    receipt = merge_checkpoint(**asked, engine="dask", resume=True)
    assert any("continued" in note for note in receipt.warnings)
    merge_checkpoint(folder / "base", folder / "lora", folder / "here")
    assert contents(folder / "here") == contents(folder / "out")


def test_errors_of_workers_are_the_commands(client: Any, folder: Path) -> None:
    with pytest.raises(VerifyError, match=r"kept .* of its change"):
        merge_checkpoint(
            folder / "base", [(folder / "lora", 1e-4)], folder / "out", engine="dask", min_kept=0.9
        )
    huge = Adapter.load(folder / "lora")
    sites = {
        site: {k: 1e20 * v.astype("float64") for k, v in p.items()}
        for site, p in huge.sites.items()
    }
    huge.replace(sites=sites).save(folder / "huge")
    with pytest.raises(VerifyError, match="overflow"):
        merge_checkpoint(folder / "base", folder / "huge", folder / "out", engine="dask")
    with pytest.raises(UsageError, match="in memory cannot be sent"):
        merge_checkpoint(folder / "base", huge, folder / "out", engine="dask")
    assert not (folder / "out").exists()
    assert not [path for path in folder.iterdir() if "out" in path.name and path.is_dir()]


def test_the_command_line_takes_an_engine(
    client: Any, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--base", folder / "base", "--adapter", folder / "lora"]
    where = ["--engine", "dask", "--scheduler", client.scheduler.address, "-q"]

    def run(*args: object) -> int:
        return cli.run([str(arg) for arg in args])

    assert run("merge", *asked, "--out", folder / "out", *where) == 0
    assert run("verify", *asked, "--merged", folder / "out", *where) == 0
    assert run("merge", *asked, "--out", folder / "x", "--scheduler", "tcp://here:1") == 2
    assert "--engine dask" in capsys.readouterr().err
    assert run("merge", *asked, "--out", folder / "x", "--engine", "spark") == 2
    monkeypatch.setattr("peft_any.surgery.cluster._PATIENCE", "1s")
    dead = ["--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"]
    assert run("merge", *asked, "--out", folder / "x", *dead) == 3
    assert "no scheduler answers" in capsys.readouterr().err
    monkeypatch.setattr("peft_any.surgery.cluster._PATIENCE", "100ms")
    lost = ["--engine", "dask", "--scheduler", folder / "scheduler.json"]
    assert run("merge", *asked, "--out", folder / "x", *lost) == 5
    assert "tells no scheduler's address (FileNotFoundError" in capsys.readouterr().err
    for text in ("{}", "[]", "{"):
        (folder / "scheduler.json").write_text(text)
        assert run("merge", *asked, "--out", folder / "x", *lost) == 5
        assert "tells no scheduler's address" in capsys.readouterr().err
    monkeypatch.setattr("peft_any.surgery.cluster._PATIENCE", "30s")
    (folder / "scheduler.json").write_text(json.dumps({"address": client.scheduler.address}))
    assert run("merge", *asked, "--dry-run", *lost) == 0
    (folder / "scheduler.json").unlink()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rank": 3},
        {"method": "ties_svd", "density": 0.5},
        {"method": "dare_linear", "density": 0.5},
    ],
    ids=["exact", "rank", "ties", "dare"],
)
def test_adapters_are_combined_to_the_same(client: Any, folder: Path, how: Any) -> None:
    other = Adapter.load(folder / "lora")
    config = dataclasses.replace(other.config, lora_alpha=3)
    other.replace(config=config).save(folder / "other")
    asked = [(folder / "lora", 0.7), (folder / "other", -0.3)]
    _, here = combine(asked, folder / "here", **how)
    _, there = combine(asked, folder / "there", engine="dask", **how)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "here" / name).read_bytes() == (folder / "there" / name).read_bytes()
    assert here.layers == there.layers
    assert here.adapters == there.adapters


def test_a_combination_that_reads_the_base_reads_it_on_the_workers(
    client: Any, folder: Path
) -> None:
    lora = Adapter.load(folder / "lora")
    config = dataclasses.replace(lora.config, use_dora=True)
    sites = {
        name: {**p, "lora_magnitude_vector": np.full(ROWS, 2, "float32")}
        for name, p in lora.sites.items()
    }
    lora.replace(config=config, sites=sites).save(folder / "dora")
    asked: dict[str, Any] = {"base": folder / "base", "rank": 4}
    one, here = combine(folder / "dora", **asked)
    two, there = combine(folder / "dora", engine="dask", **asked)
    assert here.layers == there.layers
    for name, p in one.sites.items():
        for key, array in p.items():
            np.testing.assert_array_equal(array, two.sites[name][key])
    with Checkpoint(folder / "base") as base:
        weights = {name: base[name].copy() for name in base}
    with pytest.raises(UsageError, match="weights in memory"):
        combine(folder / "dora", base=weights, rank=4, engine="dask")


@pytest.mark.parametrize("how", [{"rank": 3}, {"energy": 0.9}], ids=["rank", "energy"])
def test_an_adapter_is_extracted_to_the_same(client: Any, folder: Path, how: Any) -> None:
    merge_checkpoint(folder / "base", folder / "lora", folder / "tuned", dtype="float32")
    steps: list[tuple[int, int]] = []
    asked = folder / "base", folder / "tuned"
    here = extract(*asked, folder / "here", **how)
    there = extract(
        *asked,
        folder / "there",
        engine="dask",
        progress=lambda done, total, _: steps.append((done, total)),
        **how,
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "here" / name).read_bytes() == (folder / "there" / name).read_bytes()
    alike = [[dataclasses.replace(one, seconds=0) for one in two.layers] for two in (here, there)]
    assert alike[0] == alike[1]
    assert len(steps) == 2 * SHARDS
    assert steps[-1][0] == steps[-1][1]


def test_an_extraction_compares_on_the_workers(
    client: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_checkpoint(folder / "base", folder / "lora", folder / "tuned", dtype="float32")
    asked: Any = {"base": folder / "base", "model": folder / "tuned", "rank": 2}
    here = extract(**asked)

    def unread(*_: Any) -> Any:
        raise AssertionError("read where the command is given")

    with monkeypatch.context() as patch:
        patch.setattr(Couple, "equal", unread)
        patch.setattr(Couple, "tensors", unread)
        there = extract(**asked, engine="dask")
    parts = "base", "model", "same", "copies", "left", "warnings", "options"
    assert [getattr(here, part) for part in parts] == [getattr(there, part) for part in parts]
    with Checkpoint(folder / "tuned") as tuned:
        weights = {name: tuned[name].copy() for name in tuned}
    weights["layers.1.q.weight"][0, 0] = np.nan
    weights["layers.3.v.weight"][0, 0] = np.inf
    write_safetensors(folder / "bad.safetensors", weights)
    asked["model"] = folder / "bad.safetensors"
    said = []
    for engine in ("local", "dask"):
        with pytest.raises(TargetError) as caught:
            extract(**asked, engine=engine)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].count("NaN or infinities") == 2


def test_an_extraction_outlives_a_killed_worker(client: Any, folder: Path) -> None:
    merge_checkpoint(folder / "base", folder / "lora", folder / "tuned")
    asked = folder / "base", folder / "tuned"
    here = extract(*asked, rank=2)
    with killing(client, after=2) as step:
        there = extract(*asked, rank=2, engine="dask", progress=step)
    for name, p in here.adapter.sites.items():
        for key, array in p.items():
            np.testing.assert_array_equal(array, there.adapter.sites[name][key])


def test_checkpoints_that_are_others_on_a_worker_are_refused(client: Any, folder: Path) -> None:
    merge_checkpoint(folder / "base", folder / "lora", folder / "tuned")
    with Checkpoint(folder / "base") as base, Checkpoint(folder / "tuned") as tuned:
        numbers: dict[str, Any] = {"backend": "numpy", "dtype": "float32", "seed": 0}
        recipe = Factoring.of(Couple(base, tuned), Cut(rank=1), **numbers)
    swapped = dataclasses.replace(recipe, model=recipe.base)
    site = Site("layers.0.q", n_in=WIDTH, n_out=ROWS)
    with pytest.raises(UsageError, match="another checkpoint on this worker"):
        engine_of("dask").run(swapped, [site], lambda *_: None)


def test_a_cluster_of_its_own_beside_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ports that Dask would take are taken, too."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(
        distributed, "get_client", lambda **_: (_ for _ in ()).throw(ValueError("no client"))
    )
    with ExitStack() as stack:
        for port in (8786, 8787):
            taken = stack.enter_context(socket.socket())
            with suppress(OSError):  # by another one
                taken.bind(("", port))
                taken.listen()
        merge_checkpoint(folder / "base", folder / "lora", folder / "out", engine="dask")
    merge_checkpoint(folder / "base", folder / "lora", folder / "here")
    assert contents(folder / "out") == contents(folder / "here")

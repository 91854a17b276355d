"""The store of adapters: bounded, checked on loading, safe with many threads and failing files."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import (
    Adapter,
    AdapterStore,
    ConfigError,
    FormatError,
    LoraConfig,
    PeftError,
    StorageError,
    stack,
)
from tests.racing import race

N, SIZE = 16, 2 * 2 * 16 * 4
"""A layer's sides, and the bytes of an adapter's arrays."""
CONFIG = LoraConfig(r=2, lora_alpha=2, target_modules=["fc"])


def made(c: float) -> Adapter:
    p = {"lora_A.weight": np.ones((2, N)), "lora_B.weight": np.full((N, 2), c)}
    return Adapter(CONFIG, {"fc": {k: v.astype("float32") for k, v in p.items()}})


def value(adapter: Adapter) -> float:
    array = adapter.sites["fc"]["lora_B.weight"]
    assert float(np.ptp(array)) == 0.0
    return float(array[0, 0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        made(i).save(tmp_path / f"a{i}")
    return tmp_path


def test_the_least_recently_used_make_room(folder: Path) -> None:
    store = AdapterStore(folder, max_bytes=3 * SIZE)
    assert [*store] == [f"a{i}" for i in range(5)]
    assert len(store) == 5
    for name in ("a0", "a1", "a2", "a0", "a3"):
        assert value(store[name]) == float(name[1])
    assert store.held == {"a2": SIZE, "a0": SIZE, "a3": SIZE}
    assert store["a0"] is store["a0"]
    small = AdapterStore(folder, max_bytes=SIZE - 1)
    assert value(small["a4"]) == 4.0
    assert small.held == {}


@pytest.mark.parametrize("mapped", [True, False])
def test_arrays_are_views_of_the_file_unless_copied(folder: Path, mapped: bool) -> None:
    array = AdapterStore(folder, SIZE, mapped=mapped)["a1"].sites["fc"]["lora_B.weight"]
    assert array.flags.writeable != mapped
    shutil.rmtree(folder / "a1")
    assert float(array[0, 0]) == 1.0


def damage(path: Path, how: str) -> None:
    """Do to an adapter's files what may be done while a store has them."""
    tensors = path / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    replaced = path / "new"
    if how == "gone":
        shutil.rmtree(path)
        return
    if how == "no tensors":
        tensors.unlink()
        return
    if how == "config":
        (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "two"}')
        return
    if how == "method":
        raw = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(raw | {"peft_type": "NONE"}))
        return
    new = {"short": whole[:-7], "empty": b"", "noise": os.urandom(400)}
    nan = whole[:-4] + np.float32(np.nan).tobytes()
    replaced.write_bytes(new.get(how, nan))
    replaced.replace(tensors)


@pytest.mark.parametrize(
    "how", ["gone", "no tensors", "config", "method", "short", "empty", "noise", "nan"]
)
@pytest.mark.parametrize("held", [True, False])
def test_damaged_files_are_an_error_and_leave_others_alone(
    folder: Path, how: str, held: bool
) -> None:
    store = AdapterStore(folder, max_bytes=9 * SIZE)
    other = store["a1"]
    if held:
        _ = store["a2"]
    damage(folder / "a2", how)
    with pytest.raises((StorageError, FormatError, ConfigError)) as caught:
        _ = store["a2"]
    assert isinstance(caught.value, PeftError)
    assert "a2" in str(caught.value)
    assert store["a1"] is other
    assert value(store["a3"]) == 3.0
    assert "a2" not in store.held
    made(7).save(folder / "a2", overwrite=(folder / "a2").exists())
    assert value(store["a2"]) == 7.0


@pytest.mark.parametrize("name", ["..", "", "a1/../a2", "/etc"])
def test_names_stay_in_the_directory(folder: Path, name: str) -> None:
    store = AdapterStore(folder, max_bytes=SIZE)
    assert name not in store
    with pytest.raises(StorageError, match="cannot name"):
        _ = store[name]


def test_unknown_names_and_bounds_are_refused(folder: Path) -> None:
    with pytest.raises(StorageError, match=r"a11.*nearest"):
        _ = AdapterStore(folder, max_bytes=SIZE)["a11"]
    with pytest.raises(ConfigError, match="max_bytes"):
        AdapterStore(folder, max_bytes=-1)
    with pytest.raises(StorageError, match="no such directory"):
        AdapterStore(folder / "none", max_bytes=1)


def test_a_thousand_adapters_over_one_base(tmp_path: Path) -> None:
    made(0).save(tmp_path / "a0")
    for i in range(1, 1000):
        shutil.copytree(tmp_path / "a0", tmp_path / f"a{i}")
        if i < 40:
            shutil.rmtree(tmp_path / f"a{i}")
            made(i).save(tmp_path / f"a{i}")
    store = AdapterStore(tmp_path, max_bytes=20 * SIZE)
    bank = stack(store, {"fc.weight": np.zeros((N, N), "float32")})
    assert len(bank.names) == 1000
    wrong: list[Any] = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            picks = [draw.randrange(1000) for _ in range(3)]
            rows = [*(f"a{i}" for i in picks), None]
            try:
                y = bank.bind(rows).layers["fc"](np.ones((4, N), "float32"))
            except PeftError as error:
                wrong.append(error)
                return
            want = [2.0 * N * (i if i < 40 else 0) for i in picks]
            if not np.array_equal(y, np.outer([*want, 0.0], np.ones(N))):
                wrong.append((picks, y))
            if sum(store.held.values()) > store.max_bytes:
                wrong.append(store.held)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    bank.swap("a999", made(5))
    y = bank.bind(["a999"]).layers["fc"](np.ones((1, N), "float32"))
    assert float(y[0, 0]) == 2.0 * N * 5
    with pytest.raises(ConfigError, match="from a store"):
        bank.bind(np.asarray([1]))


def test_threads_that_read_while_adapters_are_replaced_see_whole_ones(folder: Path) -> None:
    store, numbers = AdapterStore(folder, max_bytes=2 * SIZE), count(10)

    def write() -> None:
        made(next(numbers)).save(folder / "a0", overwrite=True)

    def read() -> Any:
        with suppress(StorageError):  # between two states
            value(store["a0"])
        return value(store["a1"]) != 1.0

    assert not race(write, *[read] * 7)
    write()
    assert value(store["a0"]) >= 10.0


FIRST_LOADS = """
import sys, threading
from peft_any import LoraConfig
from peft_any.io.config import config_from_dict
names = [f"LORA_{i}" for i in range(200)]
classes = [type(LoraConfig)(name, (LoraConfig,), {}, peft_type=name) for name in names]
sys.setswitchinterval(1e-6)
wrong, gate = [], threading.Barrier(8)
def work():
    try:
        for name in names:
            gate.wait()
            config_from_dict({"peft_type": name})
    except Exception as error:
        wrong.append(repr(error))
        gate.abort()
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not wrong, wrong
"""


def test_threads_may_load_a_method_s_first_adapters_at_the_same_time() -> None:
    subprocess.run([sys.executable, "-c", FIRST_LOADS], check=True)


def test_nothing_is_kept_of_names_that_nobody_asks_for_any_more(folder: Path) -> None:
    store = AdapterStore(folder, max_bytes=SIZE)
    for name in [f"a{i}" for i in range(5)] + [f"none{i}" for i in range(50)]:
        with suppress(StorageError):
            _ = store[name]
    assert store._loading == {}
    assert len(store.held) == 1


def test_a_name_that_is_gone_when_its_batch_runs_is_an_error_of_the_store(folder: Path) -> None:
    bank = stack(AdapterStore(folder, SIZE), {"fc.weight": np.zeros((N, N), "float32")})
    bound = bank.bind(["a1", None])
    shutil.rmtree(folder / "a1")
    with pytest.raises(StorageError, match=r"a1: the adapter cannot be read"):
        _ = bound.layers
    for wrong in ([0], [np.int64(1)], np.asarray([1])):
        with pytest.raises(ConfigError, match=r"from a store.*stack\(\{name"):
            bank.bind(wrong)
    with pytest.raises(ConfigError, match=r"'a11'.*not here"):
        bank.bind(["a11"])
    with pytest.raises(ConfigError, match="b1"):
        bank.swap("b1", made(1))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of open files are Unix's")
def test_more_are_held_than_files_may_be_open(tmp_path: Path) -> None:
    made(0).save(tmp_path / "a0")
    for i in range(1, 150):
        shutil.copytree(tmp_path / "a0", tmp_path / f"a{i}")
    code = (
        "import resource, sys; from peft_any import AdapterStore; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
        "store = AdapterStore(sys.argv[1], max_bytes=1 << 30); "
        "print(sum(store[name].num_parameters for name in store), len(store.held))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert (run.stdout.split(), run.stderr) == ([str(150 * 4 * N), "150"], "")


def test_a_name_that_is_not_there_has_a_default(folder: Path) -> None:
    store = AdapterStore(folder, max_bytes=3 * SIZE)
    assert (store.get("a9"), store.get("../a1", 3)) == (None, 3)
    assert store.get("a1") is store["a1"]


def test_what_is_no_adapter_says_what_is_missing(folder: Path) -> None:
    store = AdapterStore(folder, max_bytes=3 * SIZE)
    (folder / "a1" / "adapter_model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"a1: has no adapter_model.safetensors"):
        store["a1"]
    (folder / "a1" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"(?s)adapter_model.bin: a pickle is never.*python -c"):
        store["a1"]


HOW = ["gone", "no tensors", "config", "method", "short", "empty", "noise", "nan"]


def test_a_thousand_adapters_with_files_failing_underneath(tmp_path: Path) -> None:
    """One thread damages adapters and puts them right; seven read, and only theirs fail."""
    whole, names = tmp_path.parent / "whole", [f"a{i}" for i in range(1000)]
    made(1).save(whole)
    for name in names:
        shutil.copytree(whole, tmp_path / name)
    store, touched = AdapterStore(tmp_path, max_bytes=20 * SIZE), names[::10]
    bank, spoilt = stack(store, {"fc.weight": np.zeros((N, N), "float32")}), touched[:1]
    x, failed, picks = np.ones((2, N), "float32"), list[str](), random.Random(1)

    def spoil() -> None:
        name = spoilt[0] = picks.choice(touched)
        damage(tmp_path / name, picks.choice(HOW))
        time.sleep(0.002)
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(whole, tmp_path / name)

    def reader(seed: int) -> Any:
        draw = random.Random(seed)

        def read() -> Any:
            name = draw.choice(draw.choice([names, touched, spoilt]))
            try:
                y = bank.bind([name, None]).layers["fc"](x)
            except PeftError as error:
                failed.append(name)
                return None if name in touched else error
            if sum(store.held.values()) > store.max_bytes:
                return store.held
            return None if np.array_equal(y[:, 0], [2.0 * N, 0.0]) else (name, y)

        return read

    assert not race(spoil, *map(reader, range(7)), seconds=2.0)
    assert failed
    assert store._loading == {}
    for name in {*failed}:  # put right, they are read again
        assert value(store[name]) == 1.0

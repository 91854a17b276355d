"""Files from strangers: whatever they hold, an exit code of 3 or 5 and a sentence, soon."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any import cli
from peft_any.errors import FormatError, PeftError, nearest
from peft_any.io._json import PART_LIMIT, parse_object
from peft_any.io._parse import MEMBER_LIMIT, parse_header
from peft_any.io.checkpoint import Checkpoint
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.vera import VeraConfig
from peft_any.model import PeftModel
from peft_any.testing.strategies import hostile_files
from tests.test_adapter_files import FILES as GOLDEN
from tests.test_adapter_files import NAMES, base_of

PATIENCE = 5.0
"""Seconds of computing after which a command hangs; a refusal takes milliseconds."""
MODULES = [f"model.layers.{i}.{name}_proj" for i in range(2) for name in "qv"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "model.safetensors.index.json"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"{m}.weight": rng.standard_normal((8, 8)).astype("float16") for m in MODULES}
    return {"model.embed_tokens.weight": np.ones((5, 8), "float16"), **made}


def make_world(root: Path) -> None:
    """Write a base in one file, the same in shards, and adapters of several methods."""
    (root / "one").mkdir(parents=True)
    (root / "many").mkdir()
    base = weights()
    config = json.dumps({"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 5})
    write_safetensors(root / "one" / "model.safetensors", base, {"format": "pt"})
    (root / "one" / "config.json").write_text(config)
    (root / "many" / "config.json").write_text(config)
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(base)}
    for shard in SHARDS:
        held = {name: base[name] for name in base if weight_map[name] == shard}
        write_safetensors(root / "many" / shard, held, {"format": "pt"})
    total = sum(array.nbytes for array in base.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "many" / INDEX).write_text(json.dumps(index))
    model = PeftModel(base)
    targets = ["q_proj", "v_proj"]
    for name, config_ in {
        "lora": LoraConfig(
            r=2,
            target_modules=targets,
            rank_pattern={r"layers.1.q_proj": 3},
            modules_to_save=["embed_tokens"],
            init_lora_weights=False,
        ),
        "dora": LoraConfig(r=2, target_modules=targets, use_dora=True, bias="none"),
        "oft": OFTConfig(oft_block_size=4, target_modules=r".*\.[qv]_proj"),
        "vera": VeraConfig(r=3, target_modules=targets, projection_prng_key=1),
    }.items():
        model.add(name, config_, seed=1).save(root / name)


def config_of(name: str) -> dict[str, Any]:
    """Read the configuration of a golden file."""
    raw: dict[str, Any] = json.loads((GOLDEN / name / CONFIG).read_text())
    return raw


FILES = [
    *(f"one/{name}" for name in ("model.safetensors", "config.json")),
    *(f"many/{name}" for name in (INDEX, *SHARDS, "config.json")),
    *(f"{a}/{f}" for a in ("lora", "dora", "oft", "vera") for f in (CONFIG, TENSORS)),
]


class Hang(BaseException):
    """A command that does not end."""


@contextmanager
def patience() -> Iterator[None]:
    """Interrupt what hangs: the process's own time is taken, not the clock's."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass
class World:
    """A directory of valid inputs, put right again before each attack."""

    root: Path
    files: dict[str, bytes]
    capsys: pytest.CaptureFixture[str] | None = None

    def restore(self) -> None:
        for name, data in self.files.items():
            path = self.root / name
            same = path.is_file() and not path.is_symlink() and path.stat().st_size == len(data)
            if not same or path.read_bytes() != data:
                path.unlink(missing_ok=True)
                path.write_bytes(data)

    def listing(self) -> dict[str, tuple[int, int]]:
        found = [(p, p.lstat()) for p in self.root.rglob("*")]
        return {str(p): (s.st_mtime_ns, s.st_size if p.is_file() else 0) for p, s in found}

    def attack(self, *args: object, codes: tuple[int, ...] = (0, 3, 4, 5)) -> str:
        """Run a command: it may refuse, in a sentence and at once, and then leaves nothing."""
        assert self.capsys is not None
        before = self.listing()
        with patience():
            code = cli.run([str(a) for a in args])
        out, err = self.capsys.readouterr()
        said = f"{args}: exit {code}\n{out}\n{err}"
        assert code in codes, said
        assert "Traceback" not in err, said
        assert "internal error" not in err, said
        assert len(err) < 50_000, f"{args}: {len(err)} characters"
        if code != 0:
            assert err.startswith(("error: ", "warning: ")), said
            assert self.listing() == before
        return err

    def merge(self, name: str, command: str = "merge") -> str:
        """Merge, inspect or verify after `name` was changed, with the inputs it belongs to."""
        folder = name.partition("/")[0]
        base = "many" if folder in ("many", "vera", "dora") else "one"
        adapter = folder if folder not in ("one", "many") else "lora"
        out = self.root / "out"
        try:
            paths = "--base", self.root / base, "--adapter", self.root / adapter
            if command == "inspect":
                return self.attack("inspect", self.root / adapter, *paths[:2])
            if command == "verify":
                other = self.root / ("many" if base == "one" else "one")
                return self.attack("verify", *paths, "--merged", other)
            said = self.attack("merge", *paths, "--out", out)
            if out.exists():
                with Checkpoint(out) as merged:
                    assert all(np.asarray(merged[key]).size >= 0 for key in merged)
            return said
        finally:
            shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return World(root, {name: (root / name).read_bytes() for name in FILES})


@pytest.fixture
def world(made: World, capsys: pytest.CaptureFixture[str]) -> Iterator[World]:
    made.restore()
    yield replace(made, capsys=capsys)
    made.restore()


# Mutations at random


def test_mutated_inputs_are_merged_or_refused(world: World, fuzz: int) -> None:
    @settings(max_examples=fuzz)
    @given(
        hostile_files(world.files),
        st.sampled_from(["merge", "merge", "merge", "inspect", "verify"]),
    )
    def merges_or_refuses(changed: tuple[str, bytes], command: str) -> None:
        name, data = changed
        world.restore()
        (world.root / name).write_bytes(data)
        world.merge(name, command)

    merges_or_refuses()


# Mutations by design


def header(entries: object, payload: bytes = b"") -> bytes:
    """Lay a safetensors file out around any header."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def entry(dtype: object = "F16", shape: object = (4,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def index(**weight_map: object) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


E4 = entry()
BYTES = b"\0" * 8
DEEP = b"[" * 100_000
TENSOR_FILES: dict[str, bytes] = {
    "nothing": b"",
    "a header beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "a header of the whole limit, of zeros": (10**7).to_bytes(8, "little") + b"{" + bytes(10**7),
    "a header of spaces": header(b"{" + b" " * 10**7),
    "a header of braces": header(b"{" * 10**6),
    "deep JSON": header(b'{"a":' + DEEP),
    "deep JSON for a shape": header(b'{"a":{"dtype":"F16","shape":' + DEEP[:2000] + b"}}"),
    "an endless number": header(b'{"a":{"dtype":"F16","shape":[' + b"9" * 10**6 + b"]}}"),
    "an endless name": header({"a" * 10**7: entry("F99")}),
    "a name twice": header(b'{"a":%b,"a":%b}' % ((json.dumps(E4).encode(),) * 2), BYTES),
    "a name twice, once escaped": header(
        b'{"a":%b,"\\u0061":%b}' % ((json.dumps(E4).encode(),) * 2), BYTES
    ),
    "overlapping tensors": header({"a": E4, "b": entry(offsets=[4, 12])}, BYTES * 2),
    "one range for two": header({"a": E4, "b": E4}, BYTES),
    "a range beyond the end": header({"a": entry(offsets=[8, 16])}, BYTES),
    "a hole": header({"a": entry(offsets=[8, 16])}, BYTES * 2),
    "NaN for a size": header({"a": entry(shape=[float("nan")])}, BYTES),
    "infinity for a size": header(b'{"a":{"dtype":"F16","shape":[1e999],"data_offsets":[0,8]}}'),
    "a negative size": header({"a": entry(shape=[-4])}, BYTES),
    "sizes whose product is negative": header({"a": entry(shape=[-2, -2])}, BYTES),
    "a truth for a size": header({"a": entry(shape=[True, 4])}, BYTES),
    "sizes beyond 64 bits": header({"a": entry(shape=[2**64, 0], offsets=[0, 0])}),
    "sizes that overflow to the right one": header({"a": entry(shape=[2**62, 4, 4])}, BYTES),
    "an empty tensor of absurd size": header({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}),
    "a hundred dimensions": header({"a": entry(shape=[1] * 100 + [4])}, BYTES),
    "half a character": header(b'{"\\ud83d":%b}' % json.dumps(E4).encode(), BYTES),
    "bytes that are no text": header(b'{"\xff\xfe":1}'),
    "a file of half elements": header({"a": entry("F4", [3], [0, 1])}, b"\0"),
    "endless metadata": header({"__metadata__": {str(i): "" for i in range(MEMBER_LIMIT + 1)}}),
    "a pickle": pickle.dumps({"a": [1] * 99}, protocol=4),
    "GGUF": b"GGUF\x03" + bytes(40),
    "a web page": b"<!DOCTYPE html><html>404</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(40),
}
CONFIGS: dict[str, bytes] = {
    "nothing": b"",
    "deep JSON": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "an endless number": b'{"r":' + b"9" * 10**6 + b"}",
    "a scale that overflows": b'{"peft_type":"LORA","target_modules":["q_proj","v_proj"],'
    b'"r":2,"lora_alpha":1e308,"rank_pattern":{"layers.1.q_proj":3}}',
    "a number of 4000 digits": b'{"peft_type":"LORA","r":' + b"9" * 4000 + b"}",
    "empty lists without end": b'{"a":[' + b"[]," * (PART_LIMIT + 1) + b"[]]}",
    "a key twice": b'{"peft_type":"LORA","r":8,"r":9}',
    "half a character": b'{"peft_type":"LORA","target_modules":["\\ud800"]}',
    "UTF-16": '{"peft_type":"LORA"}'.encode("utf-16"),
    "NaN": b'{"peft_type":"LORA","target_modules":["q_proj"],"lora_alpha":NaN}',
    "infinity": b'{"peft_type":"LORA","target_modules":["q_proj"],"lora_alpha":1e999}',
    "a list": b"[1]",
    "a name that is a path": b'{"peft_type":"../../lora"}',
    "a name that is a module": b'{"peft_type":"__INIT__"}',
    "a name without end": b'{"peft_type":"' + b"A" * 10**6 + b'"}',
    "a value without end": b'{"peft_type":"LORA","use_qalora":"' + b"A" * 10**6 + b'"}',
    "a rank of zero": b'{"peft_type":"LORA","r":0,"target_modules":["q_proj"]}',
    "a rank beyond memory": b'{"peft_type":"LORA","r":1000000000000,"target_modules":["q_proj"]}',
    "a truth for a rank": b'{"peft_type":"LORA","r":true,"target_modules":["q_proj"]}',
    "a malformed expression": b'{"peft_type":"LORA","target_modules":"(("}',
    "an expression without end": b'{"peft_type":"LORA","target_modules":"(.*a){99999999}"}',
    "an archive": b"PK\x03\x04" + bytes(40),
}
SLOW: dict[str, Any] = {
    "target_modules": "(a|[a-z_.0-9]+)+!",
    "exclude_modules": "([a-z_.0-9]*)*!",
    "rank_pattern": {"(.*.*)*!": 4},
    "alpha_pattern": {"(.*.*.*){9}!": 4},
    "modules_to_save": ["(.?.?.?.?.?.?.?.?.?.?.?.?)*!"],
}
"""Expressions that Python's matcher would try for longer than the universe has existed."""
INDICES: dict[str, bytes] = {
    "nothing": b"",
    "no map": b'{"metadata": {}}',
    "an empty map": index(),
    "a map that is a list": b'{"weight_map": ["model.safetensors"]}',
    "deep JSON": b'{"weight_map":' + DEEP,
    "a tensor twice": b'{"weight_map":{"a":"%b","a":"%b"}}'
    % (SHARDS[0].encode(), SHARDS[1].encode()),
    "the parent's parent": index(a="../../etc/passwd"),
    "a way round": index(a="x/../../one/model.safetensors"),
    "a neighbour": index(a="../one/model.safetensors"),
    "an absolute path": index(a="/etc/passwd"),
    "another system's path": index(a="..\\one\\model.safetensors"),
    "a drive": index(a="C:/model.safetensors"),
    "a device": index(a="/dev/zero"),
    "the directory": index(a="."),
    "an empty name": index(a=""),
    "a null byte": index(a="a\0b"),
    "a name without end": index(a="a" * 10**6),
    "a long name": index(a="a" * 300),
    "half a character": b'{"weight_map":{"a":"\\udcff.safetensors"}}',
    "a number": index(a=1),
    "a list": index(a=["model.safetensors"]),
    "shards without end": index(**{str(i): f"{i}.safetensors" for i in range(20_000)}),
    "tensors that are nowhere": index(**{f"layer.{i}.weight": SHARDS[0] for i in range(100_000)}),
    "the index itself": index(a=INDEX),
    "the configuration": index(a="config.json"),
    "lists without end": b'{"weight_map":{"a":[' + b"[]," * (PART_LIMIT + 1) + b"[]]}}",
}  # fmt: skip


class TestByDesign:
    """Each file is refused with its own message, whichever input it stands for."""

    @pytest.mark.parametrize("case", TENSOR_FILES)
    @pytest.mark.parametrize(
        "name", ["one/model.safetensors", f"many/{SHARDS[1]}", f"lora/{TENSORS}"]
    )
    def test_tensors(self, world: World, name: str, case: str) -> None:
        (world.root / name).write_bytes(TENSOR_FILES[case])
        assert name.partition("/")[2] in world.merge(name).replace("\n", "")
        assert not (world.root / "out").exists()

    @pytest.mark.parametrize("case", CONFIGS)
    def test_configurations(self, world: World, case: str) -> None:
        name = f"lora/{CONFIG}"
        (world.root / name).write_bytes(CONFIGS[case])
        assert "error: " in world.merge(name)

    @pytest.mark.parametrize(
        "name", {config_of(name)["peft_type"]: name for name in NAMES}.values()
    )
    def test_numbers_beyond_all_measure(self, world: World, name: str) -> None:
        """What a configuration announces is compared with the file, not made."""
        folder = world.root / "huge"
        shutil.copytree(GOLDEN / name, folder)
        base = {k: np.ones(v.shape, "float32") for k, v in base_of(name).items()}
        write_safetensors(folder / "base.safetensors", base)
        raw = config_of(name)
        numbers = [k for k, v in raw.items() if isinstance(v, int) and not isinstance(v, bool)]
        merge = ["merge", "--base", folder / "base.safetensors", "--adapter", folder, "--dry-run"]
        tracemalloc.start()
        try:
            for change in ({}, *({field: 10**12} for field in numbers)):
                (folder / CONFIG).write_text(json.dumps(raw | change))
                world.attack("inspect", folder)
                world.attack(*merge)
            assert tracemalloc.get_traced_memory()[1] < 50_000_000
        finally:
            tracemalloc.stop()
            shutil.rmtree(folder)

    @pytest.mark.parametrize("case", INDICES)
    def test_indices(self, world: World, case: str) -> None:
        (world.root / "many" / INDEX).write_bytes(INDICES[case])
        assert "error: " in world.merge("many/")

    @pytest.mark.parametrize("case", ["nothing", "deep JSON", "deep objects", "UTF-16", "a list"])
    def test_the_model_s_configuration(self, world: World, case: str) -> None:
        (world.root / "one/config.json").write_bytes(CONFIGS[case])
        assert "config.json" in world.merge("one/config.json")

    @pytest.mark.parametrize("field", SLOW)
    def test_expressions_that_never_end(
        self, world: World, field: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peft_any.patterns._PATIENCE", 0.5)
        name = f"lora/{CONFIG}"
        config = json.loads(world.files[name]) | {field: SLOW[field]}
        (world.root / name).write_text(json.dumps(config))
        said = world.merge(name)
        assert field in said
        assert "takes too long" in said

    @pytest.mark.parametrize(
        "targets",
        [
            r"(?:\w+\.)*[qv]_proj",
            r"^(?!.*vision)(?:.*?(?:layers|blocks)){1,2}.*?(?:self_attn)?.*?(?:q_proj|v_proj)$",
        ],
    )
    def test_expressions_that_only_look_like_it(self, world: World, targets: str) -> None:
        name = f"lora/{CONFIG}"
        config = json.loads(world.files[name]) | {"target_modules": targets}
        (world.root / name).write_text(json.dumps(config))
        assert "error" not in world.merge(name)

    def test_an_archive_of_torch(self, world: World) -> None:
        with zipfile.ZipFile(world.root / "one/model.safetensors", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
        assert "zip archive" in world.merge("one/")


class TestSystem:
    """Links, pipes and sizes that no disk has."""

    @pytest.mark.parametrize(
        "target",
        [
            "/etc/passwd",
            "/dev/zero",
            "../one/model.safetensors",
            "model.safetensors.index.json",
            ".",
        ],
    )
    def test_links_out(self, world: World, target: str) -> None:
        path = world.root / "many" / SHARDS[0]
        path.unlink()
        path.symlink_to(target)
        assert "error: " in world.merge("many/")

    def test_link_to_itself(self, world: World) -> None:
        path = world.root / "many" / SHARDS[0]
        path.unlink()
        path.symlink_to(SHARDS[0])
        assert SHARDS[0] in world.merge("many/")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
    @pytest.mark.parametrize(
        "name", [f"many/{SHARDS[0]}", "one/model.safetensors", f"lora/{CONFIG}"]
    )
    def test_pipes_do_not_hang(self, world: World, name: str) -> None:
        path = world.root / name
        path.unlink()
        os.mkfifo(path)
        assert "error: " in world.merge(name)

    @pytest.mark.parametrize("size", [2**33, 2**40, 2**43])
    @pytest.mark.parametrize("name", ["one/model.safetensors", f"lora/{TENSORS}", f"lora/{CONFIG}"])
    def test_holes_as_large_as_disks(self, world: World, name: str, size: int) -> None:
        path = world.root / name
        with path.open("r+b") as file:
            try:
                file.truncate(size)
            except OSError:
                pytest.skip(f"the file system has no files of {size} bytes")
        assert path.name in world.merge(name).replace("\n", "")


def usual(count: int) -> bytes:
    return "{{{}}}".format(
        ",".join(
            f'"{i:x}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
            for i in range(count)
        )
    ).encode()


def escaped(count: int) -> bytes:
    return (
        usual(count).replace(b'"shape":[1]', b'"shape": [1]').replace(b'"dtype"', b'"\\u0064type"')
    )


class TestCost:
    """Time and memory follow the file's size."""

    @pytest.mark.parametrize("write", [usual, escaped])
    def test_many_tensors(self, write: Callable[[int], bytes]) -> None:
        found, _ = parse_header(write(2000), 2000, "x")
        assert [*found] == [f"{i:x}" for i in range(2000)]
        assert [info.stop - info.start for info in found.values()] == [1] * 2000

    @pytest.mark.parametrize("write", [usual, escaped])
    def test_more_tensors_than_any_model(
        self, write: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peft_any.io._parse.MEMBER_LIMIT", 1000)
        with pytest.raises(FormatError, match="more than 1000 entries"):
            parse_header(write(1001), 1001, "x")

    @pytest.mark.parametrize(
        "text",
        [
            b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
            b'{"a":[' + b"{}," * 3_000_000 + b"{}]}",
            b'{"a":[' + b"0.5," * 3_000_000 + b"0]}",
        ],
        ids=["lists", "objects", "numbers"],
    )
    def test_memory_of_json(self, text: bytes) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="more than"):
                parse_object(text, "x")
            assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
        finally:
            tracemalloc.stop()

    def test_memory_of_a_header(self) -> None:
        text = b'{"a":{"dtype":"U8","shape":[' + b"1," * 5_000_000 + b'1],"data_offsets":[0,1]}}'
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="'a' is not an object"):
                parse_header(text, 1, "x")
            assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
        finally:
            tracemalloc.stop()

    def test_suggestions_are_bounded(self) -> None:
        read = 0

        def names() -> Iterator[str]:
            nonlocal read
            for i in range(10**6):
                read += 1
                yield f"layers.{i}.weight"

        assert nearest("layers.7.weigth", names()).startswith(" (nearest: 'layers.7.weight'")
        assert read <= 10_000
        assert nearest("a" * 10**6, ["a" * 10**6 + "b"]) == ""


@given(st.data())
def test_usual_and_odd_headers_are_read_alike(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text(max_size=6), unique=True, max_size=5))
    at, entries = 0, {}
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        size = 2 * int(np.prod(shape, dtype=int))
        entries[name] = entry("BF16", shape, [at, at + size])
        at += size
    entries.pop("__metadata__", None)
    compact = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    spaced = json.dumps(entries, indent=1)
    wrong = random.Random(0).randrange(3)
    expected = outcome(compact, at + wrong)
    pad = len(spaced.encode()) - len(compact.encode())
    assert outcome(compact + " " * max(pad, 0), at) == outcome(spaced + " " * max(-pad, 0), at)
    assert (expected == "refused") == bool(wrong)


def outcome(text: str, payload: int) -> object:
    try:
        return parse_header(text.encode(), payload, "x")
    except PeftError:
        return "refused"


def test_the_world_is_valid(world: World) -> None:
    for name in ("one/", "many/", "lora/", "dora/", "oft/", "vera/"):
        assert "error" not in world.merge(name)
    for name in FILES:
        if name.endswith(".safetensors"):
            assert read_safetensors(world.root / name)

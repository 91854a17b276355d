"""The command line: results on standard output, errors in one line, documented exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peft_any
from peft_any import cli
from peft_any.adapter import Adapter
from peft_any.cli import app, console, options
from peft_any.errors import StorageError
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.shira import ShiraConfig
from peft_any.model import PeftModel
from peft_any.registry import method_names

MODULES = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
TARGETS = ["q_proj", "v_proj"]


def weights(dtype: str = "float32", modules: list[str] = MODULES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"{m}.weight": rng.standard_normal((8, 6)).astype(dtype) for m in modules}
    return {"norm.weight": np.ones(6, dtype), **made}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", weights(), {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "adapter", 1)
    return tmp_path / "adapter"


def make_adapter(folder: Path, seed: int, modules: list[str] = MODULES, size: float = 1.0) -> None:
    model = PeftModel(weights(modules=modules))
    made = model.add("a", LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS), seed=seed)
    rng = np.random.default_rng(seed)
    sites = {
        site: {k: size * rng.standard_normal(v.shape).astype("float32") for k, v in p.items()}
        for site, p in made.sites.items()
    }
    made.replace(sites=sites).save(folder)


def delta(folder: Path, module: str) -> np.ndarray:
    p = Adapter.load(folder).sites[module]
    return 2 * p["lora_B.weight"] @ p["lora_A.weight"]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


class Shell:
    """Runs commands in this process, in an empty directory's parent."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, *args: object) -> tuple[int, str, str]:
        code = cli.run([str(a) for a in args])
        out, err = self.capsys.readouterr()
        return code, out, err

    def ok(self, *args: object) -> str:
        code, out, err = self(*args)
        assert (code, err) == (0, "")
        return out

    def json(self, *args: object) -> Any:
        return json.loads(self.ok(*args, "--json"))

    def refused(self, code: int, *args: object, says: tuple[str, ...]) -> str:
        """Expect an error that names the culprits, and that nothing was written."""
        before = tree(self.folder)
        got, out, err = self(*args)
        assert (got, out) == (code, ""), err
        assert err.startswith("error: ")
        assert "internal error" not in err
        assert "Traceback" not in err
        for part in says:
            assert part in err
        again, out, same = self(*args, "--json")
        document = json.loads(out)
        assert (again, same) == (code, err)
        assert document["schema_version"] == 2
        assert document["failure"]["exit_code"] == code
        assert document["failure"]["message"] == err.removeprefix("error: ").removesuffix("\n")
        assert tree(self.folder) == before
        return err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    return Shell(capsys, tmp_path)


def start(*args: object, code: str = "", **kwargs: Any) -> subprocess.Popen[str]:
    program = f"{code}\nfrom peft_any.cli.app import main\nmain()"
    ours = {"NO_COLOR", "FORCE_COLOR", "PEFT_ANY_BACKEND"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PYTHONPATH": str(Path(peft_any.__file__).parents[1]), **kwargs.pop("env", {})}
    command = [sys.executable, "-c", program, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen(command, text=True, env=env, **pipes)


def process(*args: object, **kwargs: Any) -> tuple[int, str, str]:
    running = start(*args, **kwargs)
    out, err = running.communicate(timeout=60)
    return running.returncode, out, err


# What it does


def test_merge_writes_the_model_its_companions_and_the_receipt(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    text = shell.ok("merge", "--base", base, "--adapter", adapter, "--out", out)
    assert "4 tensors merged, 1 copied" in text
    assert str(out) in text
    assert "layers.1.v_proj.weight" in text
    got, want = read_safetensors(out / "model.safetensors"), weights()
    np.testing.assert_array_equal(got["norm.weight"], want["norm.weight"])
    for module in MODULES:
        name = f"{module}.weight"
        np.testing.assert_allclose(got[name], want[name] + delta(adapter, module), rtol=1e-5)
    names = {"model.safetensors", "config.json", "tokenizer.json", "merge_receipt.json"}
    assert {p.name for p in out.iterdir()} == names
    receipt = json.loads((out / "merge_receipt.json").read_text())
    assert receipt["kept"] == pytest.approx(1)


def test_names_are_mapped(shell: Shell, base: Path, adapter: Path, tmp_path: Path) -> None:
    Adapter.load(adapter).renamed(lambda name: f"net.{name}").save(tmp_path / "other")
    asked = "--base", base, "--adapter", tmp_path / "other"
    shell.refused(3, "merge", *asked, "--out", tmp_path / "out", says=("--map '^net\\.='",))
    (tmp_path / "map.json").write_text('{"^net[.]": ""}')
    for rule in (r"^net\.=", tmp_path / "map.json"):
        out = tmp_path / f"out{len(str(rule))}"
        shell.ok("merge", *asked, "--out", out, "--map", rule)
        shell.ok("verify", *asked, "--merged", out, "--map", rule)
        shell.ok("inspect", tmp_path / "other", "--base", base, "--map", rule)
    lost = "map 'gate+up=both': matches no module"
    shell.refused(3, "merge", *asked, "--dry-run", "--map", "gate+up=both", says=(lost,))
    shell.refused(2, "inspect", tmp_path / "other", "--map", "net", says=("map 'net': is no rule",))


def test_json_is_the_receipt_beside_the_output(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    document = shell.json("merge", "--base", base, "--adapter", adapter, "--out", out)
    assert document == json.loads((out / "merge_receipt.json").read_text())
    assert document["schema_version"] == 2
    assert [c["tensor"] for c in document["changes"]] == [f"{m}.weight" for m in MODULES]


def test_a_file_merges_into_a_file(shell: Shell, base: Path, adapter: Path, tmp_path: Path) -> None:
    source, out = base / "model.safetensors", tmp_path / "merged.safetensors"
    shell.ok("merge", "--base", source, "--adapter", adapter, "--out", out)
    assert list(read_safetensors(out)) == list(read_safetensors(source))


def test_a_sharded_base_stays_sharded(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    index = shard(base)
    out = tmp_path / "merged"
    shell.ok("merge", "--base", base, "--adapter", adapter, "--out", out)
    made = json.loads((out / "model.safetensors.index.json").read_text())
    assert made["weight_map"] == index["weight_map"]
    shell.ok("verify", "--base", base, "--adapter", adapter, "--merged", out)


def shard(base: Path) -> dict[str, Any]:
    names = list(weights())
    files = {"model-00001-of-00002.safetensors": names[:2]}
    files["model-00002-of-00002.safetensors"] = names[2:]
    for file, held in files.items():
        write_safetensors(base / file, {n: weights()[n] for n in held}, {"format": "pt"})
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: f for f, held in files.items() for n in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_several_adapters_are_a_weighted_sum(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other, out = tmp_path / "other", tmp_path / "merged"
    make_adapter(other, 2)
    both = "--adapter", f"{adapter}:0.75", "--adapter", f"{other}:-.5"
    document = shell.json("merge", "--base", base, *both, "--out", out)
    assert [a["weight"] for a in document["adapters"]] == [0.75, -0.5]
    for module in MODULES:
        want = 0.75 * delta(adapter, module) - 0.5 * delta(other, module)
        got = read_safetensors(out / "model.safetensors")[f"{module}.weight"]
        np.testing.assert_allclose(got - weights()[f"{module}.weight"], want, atol=1e-5)
    shell.ok("verify", "--base", base, *both, "--merged", out)


def test_a_weight_is_a_number_after_a_colon_unless_such_a_path_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:1").mkdir()
    given = ["a:1", "a:2", "a", "b:x", "c:1:1e-3", ":1"]
    want = [("a:1", 1), ("a", 2), ("a", 1), ("b:x", 1), ("c:1", 1e-3), (":1", 1)]
    assert options.weighted(given) == want


def test_the_same_adapter_may_be_given_twice(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    twice = "--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5"
    shell.ok("merge", "--base", base, *twice, "--out", out)
    shell.ok("verify", "--base", base, "--adapter", adapter, "--merged", out)


def test_a_dry_run_writes_nothing(shell: Shell, base: Path, adapter: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    given = "merge", "--base", base, "--adapter", adapter, "--dry-run"
    assert "nothing was written" in shell.ok(*given)
    document = shell.json(*given, "--out", tmp_path / "out")
    assert document["out"] == {}
    assert len(document["changes"]) == 4
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float", "float32"), ("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"),
     ("float16", "float16"), ("bfloat16", "bfloat16"), ("float64", "float64")],
)  # fmt: skip
def test_dtype_takes_the_usual_names(
    shell: Shell, base: Path, adapter: Path, name: str, dtype: str
) -> None:
    out = base.parent / "out"
    shell.ok("merge", "--base", base, "--adapter", adapter, "--out", out, "--dtype", name)
    got = read_safetensors(out / "model.safetensors")
    assert {k: v.dtype.name for k, v in got.items() if "proj" in k} == {
        f"{m}.weight": dtype for m in MODULES
    }
    assert got["norm.weight"].dtype == "float32"


def test_min_kept_refuses_what_rounding_swallows(shell: Shell, base: Path, tmp_path: Path) -> None:
    write_safetensors(base / "model.safetensors", weights("bfloat16"), overwrite=True)
    make_adapter(tmp_path / "faint", 3, size=0.003)
    given = "--base", base, "--adapter", tmp_path / "faint", "--out", tmp_path / "out"
    shell.refused(4, "merge", *given, "--min-kept", "0.9", says=("v_proj.weight", "0.9", "dtype"))
    shell.ok("merge", *given, "--min-kept", "0.9", "--dtype", "fp32")


def test_overwriting_must_be_asked_for(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = "merge", "--base", base, "--adapter", adapter, "--out", out
    shell.ok(*given)
    shell.refused(5, *given, says=(str(out), "exists"))
    shell.ok(*given, "--overwrite", "--dtype", "bf16")
    assert read_safetensors(out / "model.safetensors")[f"{MODULES[0]}.weight"].dtype == "bfloat16"


def test_verify_finds_what_is_wrong(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = "--base", base, "--adapter", adapter
    shell.ok("merge", *given, "--out", out)
    assert "the merge is what it should be" in shell.ok("verify", *given, "--merged", out)
    bad = dict(read_safetensors(out / "model.safetensors"))
    bad[f"{MODULES[1]}.weight"] = weights()[f"{MODULES[1]}.weight"]
    bad["norm.weight"] = bad["norm.weight"] + 1
    write_safetensors(out / "model.safetensors", bad, overwrite=True)
    code, text, err = shell("verify", *given, "--merged", out)
    assert code == 4
    assert "2 problems" in text
    assert err.startswith("error: ")
    assert MODULES[1] in err
    assert "norm.weight" in err
    code, text, _ = shell("verify", *given, "--merged", out, "--json")
    document = json.loads(text)
    assert code == document["failure"]["exit_code"] == 4
    assert document["failure"]["type"] == "VerifyError"
    assert not document["ok"]
    assert len(document["problems"]) == 2


def test_what_is_said_of_many_tensors_is_said_once(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    given, out = ("--base", base, "--adapter", adapter), tmp_path / "out"
    shell.ok("merge", *given, "--out", out)
    half = {k: v.astype("float16") for k, v in read_safetensors(out / "model.safetensors").items()}
    write_safetensors(out / "model.safetensors", half, overwrite=True)
    code, text, err = shell("verify", *given, "--merged", out, "--json")
    assert code == 0, err
    assert "layers.0.q_proj.weight and 3 more: is float16, in the base float32" in err
    assert len(err.splitlines()) == 2
    assert len(json.loads(text)["warnings"]) == 5


def test_inspect_tells_method_sites_ranks_and_norms(shell: Shell, adapter: Path) -> None:
    text = shell.ok("inspect", adapter)
    for part in ("LORA", "4 layers", "rank 2 (4×)", "layers.1.q_proj", "lora_A.weight: 2×6"):
        assert part in text
    document = shell.json("inspect", adapter)
    assert document["peft_type"] == "LORA"
    assert [s["rank"] for s in document["sites"]] == [2] * 4
    norm = np.linalg.norm(delta(adapter, MODULES[0]))
    assert document["sites"][0]["delta_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("fields", [{"r": 8}, {"rank_pattern": {".*_proj": 8}}])
def test_inspect_tells_of_a_rank_that_the_arrays_have_not(
    shell: Shell, adapter: Path, fields: dict[str, Any]
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    code, text, err = shell("inspect", adapter, "--json")
    found = json.loads(text)
    assert (code, found["ranks"]) == (0, {"2": 4})
    assert len(found["notes"]) == 4
    assert "layers.0.q_proj and 3 more: the configuration says r=8, and its arrays" in err
    assert {site["delta_norm"] for site in found["sites"]} == {None}


def test_inspect_tells_the_rank_that_segments_have(shell: Shell) -> None:
    files = Path(__file__).parent / "golden" / "files"
    found = shell.json("inspect", str(files / "adamss"))
    ranks = {site["name"]: site["rank"] for site in found["sites"]}
    assert ranks["layers.0.fc1"] == 2 + 1
    assert {*ranks.values()} == {3, 4}


@pytest.mark.parametrize(
    "config", [OFTConfig(r=2, oft_block_size=0), ShiraConfig(r=2, target_modules=["fc"])]
)
def test_inspect_calls_no_other_number_a_rank(shell: Shell, tmp_path: Path, config: Any) -> None:
    model = PeftModel({"fc.weight": np.zeros((8, 8), "float32")})
    model.add("one", replace(config, target_modules=["fc"])).save(tmp_path / "one")
    assert [site["rank"] for site in shell.json("inspect", tmp_path / "one")["sites"]] == [None]
    text = shell.ok("inspect", tmp_path / "one")
    assert "r=2" in text
    assert ", rank " not in text


def test_inspect_predicts_what_a_base_would_keep(shell: Shell, base: Path, tmp_path: Path) -> None:
    write_safetensors(base / "model.safetensors", weights("bfloat16"), overwrite=True)
    make_adapter(tmp_path / "faint", 3, size=0.003)
    given = "inspect", tmp_path / "faint", "--base", base
    assert "bfloat16" in shell.ok(*given)
    document = shell.json(*given)
    assert all(c["unchanged"] > 0.5 for c in document["changes"])
    assert 0 < document["changes"][0]["relative"] < 1e-3


def test_methods_lists_all(shell: Shell) -> None:
    text = shell.ok("methods")
    rows = shell.json("methods")["methods"]
    assert [row["peft_type"] for row in rows] == method_names()
    found = {row["peft_type"]: row for row in rows}
    assert all(name in text for name in method_names())
    assert found["LORA"]["kind"] == "adds to W"
    assert "Embedding" in found["LORA"]["layers"]
    assert found["OFT"]["extensions"] == ["linalg"]
    assert found["LORA"]["parameters"] == {"layer": 8 * 2 * 4096, "shared": 0}
    assert found["VERA"]["parameters"] == {"layer": 4096 + 256, "shared": 0}
    assert found["VBLORA"]["parameters"]["shared"] == 256 * 256
    assert found["LN_TUNING"]["parameters"]["layer"] == 2 * 4096
    assert found["PROMPT_TUNING"]["parameters"] is found["XLORA"]["parameters"] is None
    assert found["ADALORA"]["parameters"]["layer"] == 12 * (2 * 4096 + 1)
    assert found["LORA"]["files"] == "as Hugging Face PEFT's"
    assert {name for name, row in found.items() if row["files"] == "ours"} == {
        "ADAMSS",
        "FROD",
        "PSOFT",
    }
    assert "NumPy, CuPy, PyTorch, JAX, Dask" in text
    assert "65,536" in text
    assert found["OFT"]["kind"] == "maps W"
    assert found["LILY"]["kind"] == "adds to W·x"
    assert found["OFT"]["merges"]
    assert not found["LILY"]["merges"]
    assert found["PROMPT_TUNING"]["kind"] == "tokens"
    assert not found["PROMPT_TUNING"]["reversible"]


def test_a_long_summary_shows_what_kept_least(shell: Shell, base: Path, tmp_path: Path) -> None:
    modules = [f"layers.{i}.{name}" for i in range(10) for name in TARGETS]
    write_safetensors(base / "model.safetensors", weights(modules=modules), overwrite=True)
    make_adapter(tmp_path / "many", 1, modules)
    text = shell.ok("merge", "--base", base, "--adapter", tmp_path / "many:0.5", "--dry-run")
    assert "many × 0.5" in text
    assert text.endswith("… and 8 more, which kept more\n")


def test_untied_tensors_are_told(shell: Shell, base: Path, tmp_path: Path) -> None:
    table = np.ones((10, 6), "float32")
    write_safetensors(
        base / "model.safetensors", {"model.embed_tokens.weight": table}, overwrite=True
    )
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    model = PeftModel({"lm_head.weight": table})
    made = model.add("a", LoraConfig(r=2, target_modules=["lm_head"]), seed=0)
    p = made.sites["lm_head"]
    sites = {"lm_head": {**p, "lora_B.weight": np.ones((10, 2), "float32")}}
    made.replace(sites=sites).save(tmp_path / "head")
    given = "--base", base, "--adapter", tmp_path / "head", "--out", tmp_path / "out"
    assert "not tied any more" in shell("merge", *given)[1]


def test_inspect_shows_what_belongs_to_no_layer(shell: Shell) -> None:
    files = Path(__file__).parent / "golden" / "files"
    assert "new " in shell("inspect", files / "lora-saved")[1]
    assert "prompt_embeddings: " in shell("inspect", files / "prompt")[1]


def test_quiet_says_nothing(shell: Shell, base: Path, adapter: Path, tmp_path: Path) -> None:
    given = "--base", base, "--adapter", adapter
    assert shell.ok("merge", *given, "--out", tmp_path / "out", "-q") == ""
    assert shell.ok("verify", *given, "--merged", tmp_path / "out", "--quiet") == ""
    assert shell.json("verify", *given, "--merged", tmp_path / "out", "-q")["ok"]


def test_no_strict_lets_pass_and_warns(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_tensors(adapter, lambda t: t | {f"{PREFIX}q_porj.lora_A.weight": np.ones((2, 6), "f4")})
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "out"
    shell.refused(3, "merge", *given, says=("q_porj",))
    code, out, err = shell("merge", *given, "--no-strict", "--json")
    assert code == 0
    assert err.startswith("warning: ")
    assert "q_porj" in err
    assert any("q_porj" in text for text in json.loads(out)["warnings"])


# Bad input


PREFIX = "base_model.model.layers.0."
Bad = Callable[[Path, Path], None]


def change_tensors(adapter: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v.copy() for k, v in read_safetensors(path).items()}
    path.unlink()
    write_safetensors(path, change(tensors), {"format": "pt"})


def change_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def header(entries: str) -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode()


def patched(name: str, data: Callable[[bytes], bytes]) -> Bad:
    def bad(base: Path, adapter: Path) -> None:
        path = (base if name == "model.safetensors" else adapter) / name
        path.write_bytes(data(path.read_bytes()))

    return bad


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Bad:
    return lambda _, adapter: change_tensors(adapter, change)


def config(**fields: Any) -> Bad:
    return lambda _, adapter: change_config(adapter, **fields)


def poisoned(value: float) -> Bad:
    def bad(base: Path, adapter: Path) -> None:
        found = weights()
        found["layers.1.q_proj.weight"][3, 2] = value
        write_safetensors(base / "model.safetensors", found, overwrite=True)
        tensors = adapter / "adapter_model.safetensors"  # names no base it was made on
        write_safetensors(tensors, read_safetensors(tensors), overwrite=True)

    return bad


def pickled(base_too: bool) -> Bad:
    def bad(base: Path, adapter: Path) -> None:
        folder, stem = (base, "model") if base_too else (adapter, "adapter_model")
        (folder / f"{stem}.safetensors").unlink()
        name = "pytorch_model.bin" if base_too else "adapter_model.bin"
        (folder / name).write_bytes(pickle.dumps({}))

    return bad


def index_outside(base: Path, _: Path) -> None:
    shutil.copy(base / "model.safetensors", base.parent / "secret.safetensors")
    index = shard(base)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


A, B = f"{PREFIX}q_proj.lora_A.weight", f"{PREFIX}q_proj.lora_B.weight"
TWICE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
MODEL, TENSORS = "model.safetensors", "adapter_model.safetensors"
BAD: dict[str, tuple[Bad, int, tuple[str, ...]]] = {
    "truncated base": (patched(MODEL, lambda b: b[:-5]), 5, (MODEL,)),
    "truncated adapter": (patched(TENSORS, lambda b: b[:-5]), 5, (TENSORS,)),
    "truncated header": (patched(MODEL, lambda b: b[:20]), 5, (MODEL,)),
    "empty file": (patched(MODEL, lambda _: b""), 5, (MODEL,)),
    "corrupted header": (patched(TENSORS, lambda b: b[:8] + b"\xff" + b[9:]), 5, (TENSORS,)),
    "absurd header": (patched(MODEL, lambda b: struct.pack("<Q", 2**62) + b[8:]), 5, (MODEL,)),
    "duplicate keys": (
        patched(MODEL, lambda _: header(f"{{{TWICE}, {TWICE}}}") + bytes(4)), 5, (MODEL, "'a'")
    ),
    "wrong shape": (tensors(lambda t: t | {A: np.ones((2, 5), "f4")}), 3, ("q_proj", "(2, 5)")),
    "wrong rank": (tensors(lambda t: t | {A: np.ones((3, 6), "f4")}), 3, ("q_proj", "(3, 6)")),
    "wrong dimensions": (tensors(lambda t: t | {B: np.ones(8, "f4")}), 3, ("q_proj", "(8,)")),
    "integers": (tensors(lambda t: t | {A: np.ones((2, 6), "i4")}), 3, ("q_proj", "int32")),
    "missing tensor": (
        tensors(lambda t: {k: v for k, v in t.items() if k != B}), 3, ("q_proj", "lora_B")
    ),
    "extra tensor": (
        tensors(lambda t: t | {f"{PREFIX}q_proj.lora_C.weight": np.ones(1, "f4")}), 3, ("lora_C",)
    ),
    "tensor without a layer": (
        tensors(lambda t: {k.replace("v_proj", "w_proj"): v for k, v in t.items()}),
        3, ("w_proj", "layers.0.v_proj"),
    ),
    "mistyped target": (
        config(target_modules=["q_porj", "q_proj", "v_proj"]), 3, ("q_porj", "q_proj")
    ),
    "adapter with NaN": (
        tensors(lambda t: t | {A: np.full((2, 6), np.nan, "f4")}), 5, ("q_proj", "NaN")
    ),
    "config not JSON": (
        patched("adapter_config.json", lambda b: b[:-9]), 5, ("adapter_config.json",)
    ),
    "config a list": (
        patched("adapter_config.json", lambda _: b"[]"), 5, ("adapter_config.json",)
    ),
    "config of wrong types": (config(r="eight"), 3, ("adapter_config.json", "r")),
    "unknown method": (config(peft_type="LORAX"), 3, ("LORAX", "LORA")),
    "unsupported field": (config(use_qalora=True), 3, ("use_qalora",)),
    "no config": (lambda _, a: (a / "adapter_config.json").unlink(), 3, ("adapter_config.json",)),
    "pickled adapter": (pickled(base_too=False), 5, ("adapter_model.bin", "safetensors")),
    "pickled base": (pickled(base_too=True), 5, ("pytorch_model.bin", "safetensors")),
    "index pointing outside": (index_outside, 5, ("secret.safetensors", "outside")),
    "base with NaN": (poisoned(np.nan), 5, ("layers.1.q_proj.weight", "NaN")),
    "base with infinities": (poisoned(np.inf), 5, ("layers.1.q_proj.weight", "infinit")),
    "no base": (lambda b, _: shutil.rmtree(b), 5, ("base",)),
    "no adapter": (lambda _, a: shutil.rmtree(a), 5, ("adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    name: str, shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    spoil, code, says = BAD[name]
    spoil(base, adapter)
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "new" / "out"
    shell.refused(code, "merge", *given, says=says)


def test_all_offenders_are_listed_at_once(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_tensors(adapter, lambda t: {k.replace("proj", "porj"): v for k, v in t.items()})
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "out"
    shell.refused(3, "merge", *given, says=tuple(m.replace("proj", "porj") for m in MODULES))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["merge"], "--base"),
        (["frobnicate"], "frobnicate"),
        (["mrege"], "nearest: 'merge'"),
        (["merge", "--dry-run=1"], "see peft-any merge --help"),
        (["merge", "--bsae", "b"], "--base"),
        (["merge", "--base", "b", "--adapter", "a"], "--out"),
        (["merge", "--base", "b", "--adapter", "a:nan", "--out", "o"], "a:nan"),
        (["merge", "--base", "b", "--adapter", "a", "--out", "o", "--min-kept", "7"], "--min-kept"),
        (["verify", "--base", "b", "--adapter", "a"], "--merged"),
        (["inspect"], "ADAPTER"),
        (["methods", "--colour"], "--colour"),
    ],
)
def test_usage_errors(shell: Shell, args: list[str], says: str) -> None:
    err = shell.refused(2, *args, says=())
    assert says.lower() in err.lower()


def test_a_dtype_that_cannot_store_weights(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "out"
    shell.refused(2, "merge", *given, "--dtype", "int8", says=("int8", "bfloat16", "fp8"))


def test_a_base_that_does_not_fit_is_told_the_one_that_would(
    shell: Shell, adapter: Path, tmp_path: Path
) -> None:
    change_config(adapter, base_model_name_or_path="some/model")
    write_safetensors(tmp_path / "other.safetensors", weights(modules=MODULES[:2]))
    given = "--base", tmp_path / "other.safetensors", "--adapter", adapter
    says = ("was made for 'some/model', as its configuration says", MODULES[2])
    shell.refused(3, "merge", *given, "--out", tmp_path / "out", says=says)


def test_the_output_may_not_be_an_input(shell: Shell, base: Path, adapter: Path) -> None:
    given = "--base", base, "--adapter", adapter, "--overwrite", "--out"
    shell.refused(2, "merge", *given, base, says=(str(base),))
    shell.refused(2, "merge", *given, adapter / "out", says=(str(adapter),))


@pytest.mark.parametrize("args", [(), ("--base", "base")])
def test_inspect_refuses_bad_adapters(
    shell: Shell, base: Path, adapter: Path, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    (adapter / "adapter_config.json").write_text("{")
    shell.refused(5, "inspect", adapter, *args, says=("adapter_config.json",))


# The system says no


def test_a_read_only_place(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "out"
    shell.refused(5, "merge", *given, says=(str(tmp_path / "out"), "read-only"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_directory_without_write_permission(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    given = "--base", base, "--adapter", adapter, "--out", closed / "out"
    shell.refused(5, "merge", *given, says=(str(closed / "out"), "permission"))


def test_a_full_disk(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "out"
    shell.refused(5, "merge", *given, says=("no space", str(tmp_path / "out")))


def test_a_file_size_limit(base: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))"
    before = tree(tmp_path)
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "out"
    code, out, err = process("merge", *given, code=limit)
    assert (code, out) == (5, "")
    assert str(tmp_path / "out") in err
    assert tree(tmp_path) == before


SLOW = """
import time
from peft_any.surgery.compute import Surgeon
patch = Surgeon.patch
def slow(self, tensor):
    time.sleep(0.3)
    return patch(self, tensor)
Surgeon.patch = slow
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_an_interrupted_merge_leaves_nothing_behind(
    name: str, code: int, base: Path, tmp_path: Path
) -> None:
    modules = [f"layers.{i}.{name}" for i in range(100) for name in TARGETS]
    write_safetensors(base / "model.safetensors", weights(modules=modules), overwrite=True)
    make_adapter(tmp_path / "many", 1, modules)
    before = tree(tmp_path)
    number = getattr(signal, name)
    given = "--base", base, "--adapter", tmp_path / "many", "--out", tmp_path / "new" / "out"
    # Jobs in the background may have inherited that signals are ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    heard += "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    running = start("merge", *given, "--json", code=f"{heard}\n{SLOW}")
    for _ in range(600):
        if any(p.name.endswith(".partial") for p in tmp_path.rglob(".out.*")):
            break
        time.sleep(0.05)
    assert tree(tmp_path) != before
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert running.returncode == code
    assert "interrupted" in err
    assert json.loads(out)["failure"]["exit_code"] == code
    assert tree(tmp_path) == before


def test_an_interrupt_that_something_hides_is_still_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> list[str]:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return []

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("peft_any.registry.method_names", interrupted)
    try:
        code, out, err = shell("methods")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, out) == (130, "")
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError("12 GB"), 1, "not enough memory: 12 GB"),
        (RuntimeError("odd"), 1, "internal error: RuntimeError: odd (--debug"),
        (OSError(errno.EIO, "Input/output error", "disk"), 5, "disk: cannot be used: the device"),
        (StorageError("disk: gone"), 5, "disk: gone"),
    ],
)
def test_unexpected_errors(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, says: str
) -> None:
    def fail() -> list[str]:
        raise error

    monkeypatch.setattr("peft_any.registry.method_names", fail)
    monkeypatch.setattr(app, "silence", lambda: None)
    got, out, err = shell("methods")
    assert (got, out) == (code, "")
    assert err.startswith(f"error: {says}")
    assert "Traceback" not in err
    assert "Traceback" in shell("methods", "--debug")[2]
    _, out, _ = shell("methods", "--json")
    assert json.loads(out)["failure"]["type"] == type(error).__name__


def test_warnings_are_one_line_on_standard_error(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careful() -> list[str]:
        warnings.warn("mind\nthe gap", stacklevel=2)
        return []

    monkeypatch.setattr("peft_any.registry.method_names", careful)
    code, _, err = shell("methods")
    assert (code, err) == (0, "warning: mind the gap\n")


# The process around it


def test_version_and_help(shell: Shell) -> None:
    assert shell.ok("--version") == f"peft-any {peft_any.__version__}\n"
    for command in ("merge", "verify", "inspect", "methods", "demo"):
        assert command in shell.ok("--help")
        assert "--debug" in shell.ok(command, "-h")
    code, out, _ = shell()
    assert code == 2
    assert "Usage" in out


def test_the_module_is_the_program(base: Path, adapter: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(peft_any.__file__).parents[1])}
    command = [sys.executable, "-m", "peft_any", "merge", "--base", base, "--adapter", adapter]
    command += ["--out", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (run.returncode, run.stdout) == (5, "")
    assert "\x1b" not in run.stderr


def loaded_by(*args: object) -> set[str]:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    status, _, err = process(*args, code=code)
    assert status == 0
    return set(err.split())


def test_help_loads_no_other_library_and_nothing_to_compute_with() -> None:
    loaded = loaded_by("--help")
    assert not loaded & {"torch", "jax", "cupy", "dask", "peft_any.surgery", "peft_any.demo.run"}
    assert "rich" not in loaded


def test_a_merge_loads_what_it_needs(base: Path, adapter: Path) -> None:
    merging = "merge", "--base", base, "--adapter", adapter, "--dry-run"
    others = {"peft_any.cli.adapters", "peft_any.cli.checkpoints", "importlib.metadata", "socket"}
    for more in ("--quiet", "--json"):
        assert not loaded_by(*merging, more) & {"rich", *others}


def test_a_shell_completes() -> None:
    asked = {"_PEFT_ANY_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    code, out, err = process(env={**asked, "COMP_WORDS": "peft-any merge --full"})
    assert (code, out, err) == (0, "plain,--full-hash\n", "")
    code, out, err = process(env={**asked, "COMP_WORDS": "peft-any v", "COMP_CWORD": "1"})
    assert (code, out, err) == (0, "plain,verify\n", "")
    for before in ("merge --base", "combine", "diff a"):
        words = {"COMP_WORDS": f"peft-any {before} mod", "COMP_CWORD": str(len(before.split()) + 1)}
        code, out, err = process(env={**asked, **words})
        assert (code, out, err) == (0, "file,mod\n", "")
    words = {"COMP_WORDS": "peft-any combine --method tie", "COMP_CWORD": "3"}
    code, out, err = process(env={**asked, **words})
    assert (code, out, err) == (0, "plain,ties\nplain,ties_svd\n", "")


def test_home_is_found_and_an_empty_path_is_none(
    shell: Shell, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shell.ok("merge", "--base=~/base", "--adapter=~/adapter:0.5", "--out=~/out")
    assert (tmp_path / "out" / "merge_receipt.json").is_file()
    shell.ok("inspect", "~/adapter")
    given = "--base", base, "--adapter", adapter, "--out", tmp_path / "other"
    for name in ("--base", "--adapter", "--out"):
        at = given.index(name) + 1
        emptied = *given[:at], "", *given[at + 1 :]
        shell.refused(2, "merge", *emptied, says=(name, "empty"))
    shell.refused(2, "inspect", "", says=("ADAPTER", "empty"))


def test_a_table_stands_in_columns_with_and_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = console.Table(("name", "size"), ["size"])
    made.add("B\u0302·Â", "1")
    made.add("重み\x1b", "1000")
    seen = []
    for forced in (False, True):
        monkeypatch.setenv("NO_COLOR", "1")
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
        else:
            monkeypatch.delenv("FORCE_COLOR", raising=False)
        console.say("[bold]", made)
        seen.append(re.sub("\x1b[^m]*m", "", capsys.readouterr().out))
    assert seen[0] == "[bold]\nname      size\nB\u0302·Â          1\n重み\\x1b  1000\n"
    assert seen[1] == seen[0]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with Path(os.devnull).open("rb") as nothing:
        read, write = os.pipe()
        os.close(read)
        code, _, err = process("methods", stdin=nothing, stdout=write)
        os.close(write)
    assert (code, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_that_cannot_be_printed_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        code, _, err = process("methods", stdout=full)
    assert code == 5
    assert "standard output: cannot be used: no space is left on the device; free some" in err


def test_closed_and_narrow_streams(base: Path) -> None:
    assert process("methods", code="import sys; sys.stdout = None")[0] == 0
    code, out, err = process("inspect", base / "ä", "--json", env={"PYTHONIOENCODING": "ascii"})
    assert code == 5
    assert "\\xe4" in err
    assert "ä" in json.loads(out)["failure"]["message"]


def test_a_bar_is_shown_to_people_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    given = "merge", "--base", base, "--adapter", adapter, "--out"

    def on_terminal(*more: object, **env: str) -> str:
        ours, theirs = pty.openpty()
        shown = {"TERM": "xterm", "COLUMNS": "100", **env}
        running = start(*given, *more, "--json", code=SLOW, stderr=theirs, env=shown)
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # Linux has an error for the end
            while part := os.read(ours, 1 << 16):
                seen += part
        os.close(ours)
        out, _ = running.communicate(timeout=60)
        assert running.returncode == 0
        assert json.loads(out)["kind"] == "merge"
        return seen.decode()

    seen = on_terminal(tmp_path / "one")
    assert "merging" in seen
    assert "\x1b[3" in seen
    plain = on_terminal(tmp_path / "two", NO_COLOR="1")
    assert "merging" in plain
    assert "\x1b[3" not in plain
    assert on_terminal(tmp_path / "three", "-q") == ""


def test_a_bar_reports_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with console.progress("merging", quiet=False) as step:
        assert step is not None
        step(1, 2, "a[b]")


def test_signals_that_are_ignored_stay_so() -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with console.signals() as caught:
            signal.raise_signal(signal.SIGINT)
        assert caught == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_second_signal_does_not_stop_the_cleanup() -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with console.signals() as caught:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, handler)


def test_main_leaves_with_the_code() -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", "-q"])
    assert left.value.code == 2


def test_odd_paths_are_told_with_a_way_out(shell: Shell, adapter: Path, tmp_path: Path) -> None:
    long, nowhere = tmp_path / ("x" * 300), tmp_path / "nowhere"
    nowhere.symlink_to(tmp_path / "gone")
    shell.refused(5, "resize", adapter, "--rank", 1, "--out", long, says=("choose a shorter",))
    shell.refused(5, "inspect", nowhere, says=("it is a link to nothing; check",))
    shell.refused(5, "inspect", long, says=("there is no such adapter; check",))
    base = tmp_path / "lone.safetensors"
    write_safetensors(base, weights())
    shell.refused(3, "inspect", base, says=("give the directory with its adapter_config.json",))
    said = "--layers [[5, 9]]: [5, 9] is no run of layers, of which layers has 2"
    shell.refused(3, "replicate", "--base", base, "--layers", "5:9", "--out", long, says=(said,))


def test_a_path_without_permission_is_no_wrong_command(
    shell: Shell, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # for root there are no others
    shell.ok("inspect", adapter)


def test_what_is_no_file_is_told(shell: Shell, adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        odd = shutil.copytree(adapter, tmp_path / f"odd-{name}")
        (odd / name).unlink()
        (odd / name).mkdir()
        shell.refused(5, "inspect", odd, says=(f"{name}: cannot be read: it is a directory",))
    says = ("gone: there is no such adapter or model; check",)
    shell.refused(5, "diff", adapter, tmp_path / "gone", says=says)
    shell.refused(5, "diff", tmp_path / "gone", adapter, says=says)

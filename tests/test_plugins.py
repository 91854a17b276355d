"""Methods that other distributions register: found, used everywhere, and blamed by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import (
    Adapter,
    ConfigError,
    PeftModel,
    cli,
    merge_checkpoint,
    method_for,
    read_safetensors,
    write_safetensors,
)
from peft_any.registry import _known, method_names, registered_methods
from tests.foreign import ENTRIES, METHOD, install, run

MODULES = "acme_adapters", "other_adapters"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a directory on the path, whose distributions are forgotten afterwards."""
    before, folder = set(_known), tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in {*_known} - before - {*method_names()}:
        del _known[name]
    for name in MODULES:
        sys.modules.pop(name, None)


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert cli.run([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_registered_method_works_as_ours_do(site: Path, tmp_path: Path, capsys: Any) -> None:
    install(site)
    assert "acme_adapters" not in sys.modules
    config = method_for("ROWS")(target_modules=["fc"])
    weights = {"fc.weight": np.ones((3, 4), "float32"), "fc.bias": np.ones(3, "float32")}
    model = PeftModel(weights)
    model.add("a", config)
    v = np.asarray([1, 2, 3], "float32")
    model.update({"a": {"fc": {"rows_v": v}}})
    model["a"].save(tmp_path / "a")
    _known.pop("ROWS")
    loaded = Adapter.load(tmp_path / "a")
    assert type(loaded.config) is type(config)
    write_safetensors(tmp_path / "base.safetensors", weights)
    merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors")
    merged = read_safetensors(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(merged["fc.weight"], np.outer(1 + v, np.ones(4)))
    found = shown(capsys, "methods")
    (row,) = (row for row in found["methods"] if row["peft_type"] == "ROWS")
    assert row["distribution"] == "acme-adapters 1.2"
    assert row["equation"] == "W' = diag(1 + v) W, with v (n_out,)."
    assert found["problems"] == []
    assert cli.run(["methods"]) == 0
    assert "ROWS is of acme-adapters 1.2" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "a")]) == 0


BROKEN = {
    "import": ("import nothing_at_all\n", "which fails with ModuleNotFoundError: No module named"),
    "half": (f"{METHOD}\nraise OSError('no licence')", "which fails with OSError: no licence"),
    "missing": ("", "which fails with AttributeError"),
    "a function": ("def RowsConfig(): ...\n", "which is no configuration class"),
    "another class": ("class RowsConfig: ...\n", "which is no configuration class"),
    "another name": (METHOD.replace('"ROWS"', '"COLUMNS"'), "whose peft_type is 'COLUMNS'"),
    "a name of ours": (METHOD.replace('"ROWS"', '"LORA"'), "'LORA' cannot be taken"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_one_is_blamed_by_name_and_harms_nobody(
    site: Path, tmp_path: Path, capsys: Any, how: str
) -> None:
    source, why = BROKEN[how]
    install(site, source)
    good = METHOD.replace("ROWS", "GOOD")
    install(site, good, {"GOOD": "other_adapters:RowsConfig"}, name="other-adapters")
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            method_for("ROWS")
        said = str(raised.value)
        assert said.startswith("peft_type 'ROWS' cannot be used: acme-adapters 1.2 registers it")
        assert why in said
        assert said.endswith(": update or uninstall acme-adapters")
    assert method_for("GOOD").peft_type == "GOOD"
    assert method_for("LORA").__name__ == "LoraConfig"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "ROWS"}')
    write_safetensors(tmp_path / "a" / "adapter_model.safetensors", {"x": np.ones(1)})
    with pytest.raises(ConfigError, match=r"adapter_config\.json: .*acme-adapters 1\.2"):
        Adapter.load(tmp_path / "a")
    found = shown(capsys, "methods")
    assert "GOOD" in [row["peft_type"] for row in found["methods"]]
    assert "ROWS" not in [row["peft_type"] for row in found["methods"]]
    (problem,) = found["problems"]
    assert problem == said
    assert cli.run(["methods"]) == 0
    assert "warning: peft_type 'ROWS'" in " ".join(capsys.readouterr().out.split())


def test_names_that_clash_are_refused(site: Path) -> None:
    install(site, METHOD, {**ENTRIES, "LORA": "acme_adapters:RowsConfig"})
    install(site, METHOD, {"ROWS": "other_adapters:RowsConfig"}, name="other-adapters")
    with pytest.raises(ConfigError) as raised:
        method_for("ROWS")
    said = str(raised.value)
    for owner in ("acme-adapters 1.2 (acme_adapters", "other-adapters 1.2 (other_adapters"):
        assert owner in said
    assert "both register it: uninstall all but one" in said
    assert method_for("LORA").__module__ == "peft_any.methods.lora"
    owners, problems = registered_methods()
    assert owners == {}
    assert len(problems) == 2
    assert "it is a method of peft_any itself" in problems[0]


def test_two_modules_cannot_define_one_name(site: Path) -> None:
    install(site)
    assert method_for("ROWS").__module__ == "acme_adapters"
    other = {"__name__": "other_adapters"}
    with pytest.raises(ConfigError, match=r"acme_adapters\.RowsConfig has it; choose another"):
        exec(METHOD, other)
    exec(METHOD, {"__name__": "acme_adapters"})  # as a notebook runs a cell again


def test_unknown_names_have_the_registered_ones_among_the_nearest(site: Path) -> None:
    install(site)
    with pytest.raises(ConfigError, match=r"nearest: 'ROWS'.*known: .*ROWS"):
        method_for("ROW")


def test_the_command_line_knows_what_is_installed(tmp_path: Path) -> None:
    site = install(tmp_path / "site")
    found = run(site, "-m", "peft_any", "methods", "--json")
    assert found.returncode == 0, found.stderr
    rows = {row["peft_type"]: row for row in json.loads(found.stdout)["methods"]}
    assert rows["ROWS"]["distribution"] == "acme-adapters 1.2"
    assert "distribution" not in rows["LORA"]

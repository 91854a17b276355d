"""Files of methods under names that Hugging Face PEFT no longer has, against what it then gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from peft_any import Adapter, ConfigError, PeftModel, method_for, read_safetensors
from peft_any.surgery.merge import merge_checkpoint
from tests.models import single

HERE = Path(__file__).parent / "golden" / "bone"
NAMES = sorted(path.stem for path in HERE.glob("*.safetensors"))
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def recorded(name: str, folder: Path) -> dict[str, np.ndarray]:
    path = HERE / f"{name}.safetensors"
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        texts = file.metadata()
    (folder / TENSORS).write_bytes(tensors[TENSORS].tobytes())
    (folder / CONFIG).write_text(texts[CONFIG], encoding="utf-8")
    return tensors


def close(got: Any, want: np.ndarray) -> None:
    rtol = 1e-10 if want.dtype == np.float64 else 1e-5
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("name", NAMES)
def test_bone_is_read_as_the_miss_it_is(name: str, tmp_path: Path) -> None:
    tensors = recorded(name, tmp_path)
    base = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    adapter = Adapter.load(tmp_path)
    assert adapter.config.peft_type == "MISS"
    model = PeftModel(base)
    model.add("a", adapter)
    close(model.bind().layers["fc"](tensors["x"]), tensors["y"])
    for key, value in model.merge().items():
        close(value, tensors[f"merged.{key}"])
    adapter.save(tmp_path / "again")
    again = Adapter.load(tmp_path / "again")
    assert again.config == adapter.config
    assert [*read_safetensors(tmp_path / "again" / TENSORS)] == ["base_model.model.fc.miss_block"]
    np.testing.assert_array_equal(
        again.sites["fc"]["miss_block"], adapter.sites["fc"]["miss_block"]
    )


def test_a_checkpoint_is_merged_with_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tensors = recorded("bat", tmp_path / "a")
    base = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    done = merge_checkpoint(single(tmp_path / "base", base), tmp_path / "a", tmp_path / "out")
    assert [use.tensor for use in done.uses] == ["base_model.model.fc.bone_block"]
    merged = read_safetensors(tmp_path / "out" / "model.safetensors")
    close(merged["fc.weight"], tensors["merged.fc.weight"])


def test_a_new_one_is_started_under_its_present_name() -> None:
    with pytest.raises(ConfigError, match="called MISS now: start a MissConfig"):
        method_for("BONE")

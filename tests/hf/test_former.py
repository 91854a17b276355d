"""Files of Bone, written again as MiSS: Hugging Face PEFT loads them and merges as Bone did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

from peft_any import Adapter  # noqa: E402
from tests.hf.models import quietly  # noqa: E402
from tests.test_former import NAMES, close, recorded  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_what_was_bone_is_loaded(name: str, tmp_path: Path) -> None:
    tensors = recorded(name, tmp_path)
    Adapter.load(tmp_path).save(tmp_path / "again")
    weight = torch.tensor(tensors["base.fc.weight"])
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
    model.load_state_dict({"fc.weight": weight, "fc.bias": torch.tensor(tensors["base.fc.bias"])})
    with quietly():
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "again").merge_and_unload()
    for key, value in theirs.state_dict().items():
        close(np.asarray(value), tensors[f"merged.{key}"])

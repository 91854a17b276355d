"""Mixed batches are those of Hugging Face PEFT's `adapter_names`, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402

from peft_any import Adapter, ConfigError, PeftModel, ShapeError, move, stack  # noqa: E402
from tests.hf.models import quietly  # noqa: E402
from tests.hf.reference import host  # noqa: E402

FIELDS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6, "target_modules": ["one", "two"]},
    {"r": 3, "use_rslora": True, "target_modules": ["one"]},
    {"r": 2, "rank_pattern": {"two": 5}, "alpha_pattern": {"one": 9}, "target_modules": ["two"]},
    {"r": 2, "lora_bias": True, "target_modules": ["one"]},
]


class Net(torch.nn.Module):
    """A table and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.one = torch.nn.Linear(6, 8)
        self.two = torch.nn.Linear(8, 5, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(self.table(ids))))


def theirs_of(folder: Path) -> Any:
    """Make four adapters of a net, trained-looking and saved."""
    torch.manual_seed(0)
    net = Net()
    plain = {k: host(v) for k, v in net.state_dict().items()}
    model: Any = None
    with quietly():
        for i, fields in enumerate(FIELDS):
            config = peft.LoraConfig(**fields, init_lora_weights=False)
            if model is None:
                model = peft.get_peft_model(net, config, adapter_name=f"a{i}")
            else:
                model.add_adapter(f"a{i}", config)
        table = peft.LoraConfig(r=3, target_modules=["table"], init_lora_weights=False)
        model.add_adapter("table", table)
        model.save_pretrained(folder)
    return model.eval(), plain


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("data", [False, True])
def test_adapter_names_give_the_same_rows(library: str, data: bool, tmp_path: Path) -> None:
    theirs, plain = theirs_of(tmp_path)
    names = ["a0", "a1", "a2", "a3", "table"]
    adapters = {name: Adapter.load(tmp_path / name) for name in names}
    bank = stack(adapters, move(plain, library))
    rows = ["a1", "__base__", "a0", "table", "a3", "a2", "a0", "__base__", "a3"]
    ids = torch.randint(0, 11, (len(rows), 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), quietly():
        want = host(theirs(ids, adapter_names=rows))
    numbers = np.asarray([bank.names.index(n) if n != "__base__" else -1 for n in rows])
    layers = bank.bind(numbers if data else rows).layers
    x = layers["table"](move(ids.numpy(), library))
    hidden = layers["one"](x)
    hidden = torch.tanh(hidden) if library == "torch" else np.tanh(hidden)
    got = move(layers["two"](hidden), "numpy")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_what_they_refuse_we_refuse(tmp_path: Path) -> None:
    theirs, plain = theirs_of(tmp_path)
    model = PeftModel(plain)
    model.add("a0", Adapter.load(tmp_path / "a0"))
    ids = torch.zeros((2, 3), dtype=torch.int64)
    with quietly(), pytest.raises(ValueError, match="same as the number"):
        theirs(ids, adapter_names=["a0"])
    with pytest.raises(ShapeError, match="1 rows"):
        model.bind(rows=["a0"]).layers["one"](np.zeros((2, 3, 6), "float32"))
    with quietly(), pytest.raises(ValueError, match="non-existing adapter"):
        theirs(ids, adapter_names=["a0", "b"])
    with pytest.raises(ConfigError, match="not here"):
        model.bind(rows=["a0", "b"])

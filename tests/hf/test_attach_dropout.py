"""Training with dropout on torch modules: Hugging Face PEFT's outputs, draw by draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from tests.hf.reference import quietly  # noqa: E402
from tests.hf.test_models import fill  # noqa: E402

pytestmark = pytest.mark.hf

LAYERS: dict[str, Any] = {
    "linear": lambda: (nn.Linear(6, 5), (4, 6)),
    "conv1d": lambda: (nn.Conv1d(6, 5, 3, stride=2, padding=1), (4, 6, 9)),
    "conv2d": lambda: (nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 6, 7, 7)),
    "conv3d": lambda: (nn.Conv3d(6, 5, 2, bias=False), (2, 6, 4, 4, 4)),
}
# Hugging Face PEFT tosses a coin for module_dropout whatever its rate.
COIN = 1e-9
ROWS = [
    *[("LORA", {"lora_dropout": 0.4}, layer) for layer in LAYERS],
    *[("LORA", {"lora_dropout": 0.4, "use_dora": True}, layer) for layer in LAYERS],
    *[("LORA", {"lora_dropout": 0.4, "lora_bias": True}, layer) for layer in ("linear", "conv2d")],
    *[("HIRA", {"hira_dropout": 0.4}, layer) for layer in LAYERS],
    *[
        (method, {"rank_dropout": 0.4, "module_dropout": COIN}, layer)
        for method in ("LOHA", "LOKR")
        for layer in ("linear", "conv1d", "conv2d")
    ],
    ("LOKR", {"rank_dropout": 0.4, "rank_dropout_scale": True, "module_dropout": COIN}, "conv2d"),
    ("LOHA", {"module_dropout": 0.5}, "conv2d"),
    ("PVERA", {}, "linear"),  # it draws whatever the rate
    ("PVERA", {"pvera_dropout": 0.4}, "linear"),
]


@pytest.mark.parametrize(
    ("method", "fields", "layer"), ROWS, ids=[f"{m}-{'-'.join(f)}-{la}" for m, f, la in ROWS]
)
def test_draw_by_draw(method: str, fields: dict[str, Any], layer: str, tmp_path: Path) -> None:
    def base() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        made, shape = LAYERS[layer]()
        return nn.Sequential(made).double(), shape

    with quietly():
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](
            r=2, target_modules=["0"], **fields
        )
        theirs = peft.get_peft_model(base()[0], config).double()
        fill(theirs, "default", 1)
        theirs.save_pretrained(tmp_path / "a")
    ours, shape = base()
    task = attach(ours, Adapter.load(tmp_path / "a"), dtype="float64")
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-10)
    ours.train()
    theirs.train()
    several = []
    single = "rank_dropout_scale" in fields  # Hugging Face PEFT's mask is in single precision
    tolerance = 1e-6 if single else 1e-10
    for seed in range(3):
        torch.manual_seed(seed)
        want = theirs(x).detach()
        torch.manual_seed(seed)
        got = ours(x)
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))
        several.append(got)
    assert not all(torch.equal(several[0], y) for y in several[1:])
    sum(y.sum() for y in several).backward()
    assert all(p.grad is not None for p in task.parameters())

"""What methods add to the loss in training: KaSA's two regularisers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_any import LoraConfig, PeftModel, fit, value_and_grad
from peft_any.backend import namespace, to_numpy
from peft_any.testing import Lib
from peft_any.train import adamw
from peft_any.variants import KasaConfig

KASA = LoraConfig(
    r=3,
    target_modules=["q", "v"],
    rank_pattern={"v": 2},
    kasa_config=KasaConfig(beta=0.3, gamma=0.7),
    init_lora_weights=False,
)


def weights_of(lib: Lib | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal((6, 5)) for name in "qv"}
    return weights if lib is None else {k: lib.array(v) for k, v in weights.items()}


def expected(p: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """The paper's formula, and its gradient by hand."""
    d, a, b = (p[k] for k in ("lora_diag", "lora_A.weight", "lora_B.weight"))
    eye = np.eye(len(d))
    of_a, of_b = a @ a.T - eye, b.T @ b - eye
    na, nb = np.linalg.norm(of_a), np.linalg.norm(of_b)
    grads = {
        "lora_diag": 2 * 0.3 * d,
        "lora_A.weight": 0.7 * 2 * of_a @ a / na,
        "lora_B.weight": 0.7 * 2 * b @ of_b / nb,
    }
    return float(0.3 * d @ d + 0.7 * (na + nb)), grads


def test_kasa_and_its_gradient(lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("KaSA decomposes the base, which has no values")
    model = PeftModel(weights_of(lib))
    model.add("task", KASA, dtype="float64")
    params = model.parameters["task"]
    value, grads = value_and_grad(lambda p: KASA.regularizer(p.values()))(params)
    total = 0.0
    for site, p in params.items():
        one, want = expected({k: to_numpy(v) for k, v in p.items()})
        total += one
        for name, grad in want.items():
            np.testing.assert_allclose(to_numpy(grads[site][name]), grad, rtol=1e-10)
    np.testing.assert_allclose(to_numpy(value), total, rtol=1e-12)


def test_others_add_nothing() -> None:
    assert LoraConfig().regularizer([]) is None
    assert KASA.regularizer([{"lora_A.weight": np.ones((1, 2))}]) is None


def test_fit_adds_it_to_the_loss() -> None:
    model = PeftModel(weights_of())
    model.add("task", KASA, dtype="float64")
    term = KASA.regularizer(model.parameters["task"].values())

    def loss(bound: Any, x: Any) -> Any:
        y = bound.layers["q"](x)
        return 0.0 * namespace(y).sum(y)

    run = fit(model, loss, [np.ones((2, 5))], steps=60, optimizer=adamw(0.05))
    assert run.losses[0] == pytest.approx(float(to_numpy(term)), rel=1e-12)
    assert run.losses[-1] < 0.6 * run.losses[0]

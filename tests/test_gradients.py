"""Law 5: gradients of every row agree on all engines, and with finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_any.backend import is_array, is_floating, move
from peft_any.bound import BoundLayer
from peft_any.parts import Part
from peft_any.tape import var
from peft_any.testing import descent
from peft_any.testing.descent import of_layer
from peft_any.testing.gradients import ENGINES, difference, gradients
from tests.cases import CASES, Case

table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ways = pytest.mark.parametrize("way", ["forward", "merge"])


@table
@ways
def test_gradients_are_finite_differences(case: Case, way: descent.Way) -> None:
    descent.differences(descent.of_layer(case, way))


@table
@ways
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(case: Case, way: descent.Way, engine: str) -> None:
    descent.engines(descent.of_layer(case, way), engine)


@table
def test_a_layer_that_was_called_without_derivatives_has_them_after(case: Case) -> None:
    torch = pytest.importorskip("torch")
    if case.site.is_conv:
        pytest.skip("a convolution is not called")
    host, config = case.base(), case.config.at(case.site)
    base, held = move(host, "torch"), move(case.params(host, 0), "torch")
    p: dict[str, Any] = {
        k: v.clone().requires_grad_() if is_array(v) and is_floating(v) else v
        for k, v in held.items()
    }
    x = move(case.inputs((3,)), "torch")
    rows = torch.ones(3, 1).requires_grad_()  # a layer may have no numbers at all
    found = []
    for before in (False, True):
        with torch.set_grad_enabled(not before):
            layer = BoundLayer(base, [Part(config, p)], stacked=True)
            layer(x)
        leaves = [rows, *(v for v in p.values() if is_array(v) and v.requires_grad)]
        y = (rows * layer(x)).square().sum()
        found.append(torch.autograd.grad(y, leaves, allow_unused=True, materialize_grads=True))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_the_gradient_of_dora_takes_its_norm_as_constant() -> None:
    case = next(c for c in CASES if c.name == "dora")
    problem = of_layer(case, "merge")
    _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    _, other = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    assert difference(grads, other) == 0
    along = {k: grads[k] * (k == "lora_A.weight") for k in grads}
    steep = sum(float(np.sum(g * g)) for g in along.values())
    assert abs(problem.slope(along) - steep) > 1e-3 * abs(steep)  # of the norm, too


def test_frozen_arrays_get_no_gradient_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "vera")
    problem, shapes = of_layer(case, "forward"), []
    settle = var.settle

    def watch(xp: Any, g: Any, shape: Any, dtype: Any) -> Any:
        shapes.append(tuple(shape))
        return settle(xp, g, shape, dtype)

    monkeypatch.setattr(var, "settle", watch)
    _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    assert set(grads) == {"vera_lambda_b", "vera_lambda_d"}
    frozen, _, weight, _ = problem.rest
    large = {a.shape for a in (*frozen.values(), weight)}
    assert shapes
    assert not large & set(shapes)

"""Law 5: gradients of every row agree on all engines, and with finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

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

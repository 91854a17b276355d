"""Activation functions: their values and slopes, against other libraries' where those have them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import grad
from peft_any.activations import ACTIVATIONS, activation, erf
from peft_any.errors import ConfigError

X = np.concatenate([np.linspace(-9, 9, 2001), [0.46875, -0.46875, 1e-300, 1e200, -1e200]])


def test_the_error_function_is_libms() -> None:
    want = np.asarray([math.erf(x) for x in X])
    np.testing.assert_allclose(erf(X), want, rtol=5e-16, atol=3e-16)
    single = erf(X[:2001].astype("float32"))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, want[:2001], rtol=0, atol=3e-7)


@given(st.floats(-30, 30))
def test_its_slope_is_gausss(x: float) -> None:
    slope = grad(lambda v: erf(v).sum())(np.asarray([x]))
    np.testing.assert_allclose(slope, 2 / math.sqrt(math.pi) * math.exp(-x * x), atol=1e-13)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("elu", "elu", {}),
        ("gelu", "gelu", {}),
        ("gelu_new", "gelu", {"approximate": "tanh"}),
        ("hardswish", "hardswish", {}),
        ("leaky_relu", "leaky_relu", {}),
        ("mish", "mish", {}),
        ("prelu", "leaky_relu", {"negative_slope": 0.25}),
        ("relu", "relu", {}),
        ("relu6", "relu6", {}),
        ("sigmoid", "sigmoid", {}),
        ("silu", "silu", {}),
        ("tanh", "tanh", {}),
    ],
)
def test_activations_are_torchs(name: str, theirs: str, options: Any) -> None:
    torch = pytest.importorskip("torch")
    want = getattr(torch.nn.functional, theirs)(torch.tensor(X[:2001]), **options).numpy()
    np.testing.assert_allclose(activation(name)(X[:2001]), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*ACTIVATIONS])
def test_activations_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    act2fn = pytest.importorskip("transformers.activations").ACT2FN
    x = X[:2001]
    double = {"elu": torch.nn.ELU, "prelu": lambda: torch.nn.PReLU(dtype=torch.float64)}
    theirs = double.get(name, lambda: act2fn[name])()
    want = theirs(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(activation(name)(x), want, rtol=1e-12, atol=1e-12)


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="act_fn='gelo'"):
        activation("gelo")

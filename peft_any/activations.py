"""Activation functions by the names that transformers gives them, on standard functions only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import pi, sqrt
from typing import Any

from peft_any._typing import Array
from peft_any.backend import namespace
from peft_any.errors import ConfigError


def activation(name: str) -> Callable[[Array], Array]:
    """Find an activation function.

    Raises
    ------
    ConfigError
        If transformers' name is not known here.

    Examples
    --------
    >>> import numpy as np
    >>> activation("relu")(np.asarray([-1.0, 2.0]))
    array([0., 2.])
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"act_fn={name!r}: is not known: use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def clipped(x: Any, low: float, high: float | None = None) -> Array:
    """Bound values from below, and from above."""
    xp = namespace(x)
    y = xp.where(x > low, x, xp.zeros_like(x) + low)
    bounded: Array = y if high is None else xp.where(y < high, y, xp.zeros_like(y) + high)
    return bounded


def sigmoid(x: Array) -> Array:
    """1/(1 + e⁻ˣ), without overflow."""
    y: Array = 0.5 * (1.0 + namespace(x).tanh(0.5 * x))
    return y


def silu(x: Array) -> Array:
    """x·sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + eˣ), without overflow."""
    xp = namespace(x)
    y: Array = clipped(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))
    return y


def gelu_tanh(x: Array) -> Array:
    """x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))): GELU, as Hendrycks & Gimpel 2016 approximate it."""
    y: Array = 0.5 * x * (1.0 + namespace(x).tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)))
    return y


def elu(x: Any) -> Array:
    """x, below zero eˣ − 1."""
    xp = namespace(x)
    y: Array = xp.where(x > 0, x, xp.expm1(clipped(-x, 0.0) * -1.0))
    return y


def leaky_relu(x: Any, slope: float = 0.01) -> Array:
    """x, below zero slope·x."""
    y: Array = namespace(x).where(x > 0, x, slope * x)
    return y


def _tanh(x: Array) -> Array:
    y: Array = namespace(x).tanh(x)
    return y


def _square(f: Callable[[Array], Array], x: Array) -> Array:
    return f(x) * f(x)


relu: Any = partial(clipped, low=0.0)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": elu,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "leaky_relu": leaky_relu,
    "linear": lambda x: x,
    "mish": lambda x: x * _tanh(softplus(x)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": relu,
    "relu2": partial(_square, relu),
    "relu6": partial(clipped, low=0.0, high=6.0),
    "sigmoid": sigmoid,
    "silu": silu,
    "swish": silu,
    "tanh": _tanh,
}
"""`gelu` itself is not here: the standard has no error function."""

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
    return y if high is None else xp.where(y < high, y, xp.zeros_like(y) + high)


def sigmoid(x: Array) -> Array:
    """1/(1 + e⁻ˣ), without overflow."""
    return 0.5 * (1.0 + namespace(x).tanh(0.5 * x))


def silu(x: Array) -> Array:
    """x·sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + eˣ), without overflow."""
    xp = namespace(x)
    return clipped(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def gelu_tanh(x: Array) -> Array:
    """x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))): GELU, as Hendrycks & Gimpel 2016 approximate it."""
    return 0.5 * x * (1.0 + namespace(x).tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)))


_SMALL = (
    (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
     2.84423683343917062e3),
)  # fmt: skip
_TAIL = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
     1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3,
     1.23033935480374942e3),
)  # fmt: skip
"""Numerators and denominators of `erf`, and of e^(x²)·(1 − erf), from the highest power."""


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    value = coefficients[0] + 0.0 * x
    for c in coefficients[1:]:
        value = value * x + c
    return value


def erf(x: Any) -> Array:
    """The error function, to 3e-16, by rational functions: the standard has none.

    Cody 1969, https://doi.org/10.1090/S0025-5718-1969-0247736-4.

    Examples
    --------
    >>> import numpy as np
    >>> erf(np.asarray([-9.0, 0.0, 0.1, 1.0])).round(6)
    array([-1.      ,  0.      ,  0.112463,  0.842701])
    """
    xp = namespace(x)
    size = clipped(xp.abs(x), 0.0, 6.0)
    near = xp.abs(x) < 0.46875
    inner = xp.where(near, x, xp.zeros_like(x))
    top, bottom = (_horner(c, inner * inner) for c in _SMALL)
    over, under = (_horner(c, size) for c in _TAIL)
    tail = 1.0 - xp.exp(-(size * size)) * over / under
    return xp.where(near, inner * top / bottom, xp.where(x < 0, -tail, tail))


def gelu(x: Array) -> Array:
    """x·(1 + erf(x/√2))/2. Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415."""
    return 0.5 * x * (1.0 + erf(x * sqrt(0.5)))


def elu(x: Any) -> Array:
    """x, below zero eˣ − 1."""
    xp = namespace(x)
    return xp.where(x > 0, x, xp.expm1(clipped(-x, 0.0) * -1.0))


def leaky_relu(x: Any, slope: float = 0.01) -> Array:
    """x, below zero slope·x."""
    return namespace(x).where(x > 0, x, slope * x)


def _tanh(x: Array) -> Array:
    return namespace(x).tanh(x)


def _square(f: Callable[[Array], Array], x: Array) -> Array:
    return f(x) * f(x)


def hardswish(x: Any) -> Array:
    """x·min(max(x + 3, 0), 6)/6."""
    return x * clipped(x + 3.0, 0.0, 6.0) / 6.0


def laplace(x: Any) -> Array:
    """(1 + erf((x − μ)/(σ·√2)))/2, μ = √½, σ = √(1/(4π)), both to six digits. Ma et al. 2022."""
    return 0.5 * (1.0 + erf((x - 0.707107) / (0.282095 * sqrt(2.0))))


_ALPHA, _EPS = 0.80078125, 9.98377799987793e-07
"""0.8 and 1e-6 as transformers has them, in bfloat16."""


def xielu(x: Any) -> Array:
    """α·x² + x/2, below zero α·(eᵐ − 1 − x) + x/2 with m = min(x, −ε). Huang & Schlag 2024."""
    xp = namespace(x)
    low = xp.expm1(clipped(-x, _EPS) * -1.0) - x
    return _ALPHA * xp.where(x > 0, x * x, low) + 0.5 * x


relu: Any = partial(clipped, low=0.0)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": elu,
    "gelu": gelu,
    "gelu_10": lambda x: clipped(gelu(x), -10.0, 10.0),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": hardswish,
    "laplace": laplace,
    "leaky_relu": leaky_relu,
    "linear": lambda x: x,
    "mish": lambda x: x * _tanh(softplus(x)),
    "prelu": partial(leaky_relu, slope=0.25),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": relu,
    "relu2": partial(_square, relu),
    "relu6": partial(clipped, low=0.0, high=6.0),
    "sigmoid": sigmoid,
    "silu": silu,
    "sqrtsoftplus": lambda x: namespace(x).sqrt(softplus(x)),
    "swish": silu,
    "tanh": _tanh,
    "xielu": xielu,
}

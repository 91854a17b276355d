"""The demo's networks and their design space: airfoil sections, flights, and the mirror image.

`nn-medium` and `nn-xlarge` of NeuralFoil (Peter Sharpe, MIT licence,
https://github.com/peterdsharpe/NeuralFoil) give the aerodynamics of a section from its shape and
the flow. Both are used as NeuralFoil does: averaged over a flight and the same one upside down,
without which their answers mean little.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_any.backend import namespace
from peft_any.receipt import Host

FILES = Path(__file__).parent / "data"
TAUGHT = slice(1, 4)
"""The outputs that count: 2·CL, ½·ln CD + 2 and 20·CM."""
BACK = np.asarray([-1.0, 1.0, -1.0], dtype="float32")
"""Their signs seen upside down."""


def network(weights: Mapping[str, Any], x: Any) -> Any:
    """Evaluate a network (…, 25) -> (…, outputs): swish between its layers.

    Parameters
    ----------
    weights : mapping of str to array
        ``net.0.weight``, ``net.0.bias``, ``net.2.weight`` and so on; adapted or not.
    x : array (…, 25)
    """
    xp = namespace(x)
    *hidden, last = sorted({int(name.split(".")[1]) for name in weights})
    for i in hidden:
        x = x @ weights[f"net.{i}.weight"].T + weights[f"net.{i}.bias"]
        x = x * (0.5 + 0.5 * xp.tanh(0.5 * x))
    return x @ weights[f"net.{last}.weight"].T + weights[f"net.{last}.bias"]


def with_mirror_images(x: Host) -> Host:
    """Put the same flights upside down below flights (n, 25): (2n, 25), for one evaluation."""
    order, sign = np.arange(25), np.ones(25, dtype="float32")
    order[:16], order[23:] = np.r_[8:16, 0:8], (24, 23)
    sign[:17] = sign[18] = -1
    return np.concatenate([x, x[:, order] * sign])


def averaged(y: Any, back: Any) -> Any:
    """Average outputs (2n, outputs) over flights and mirror images: lift, drag, moment (n, 3)."""
    n = y.shape[0] // 2
    return (y[:n, TAUGHT] + y[n:, TAUGHT] * back) / 2


def errors(found: Host, want: Host) -> tuple[float, float]:
    """Give the mean error of CL, and the mean relative error of CD, of averaged outputs (n, 3)."""
    gap = np.asarray(found, dtype="float64") - want
    return float(np.mean(np.abs(gap[:, 0])) / 2), float(np.mean(np.abs(np.expm1(2 * gap[:, 1]))))


def sections(camber: Host, place: Host, thickness: Host) -> Host:
    """Fit Kulfan's class-shape functions to NACA four-digit sections by least squares.

    Parameters
    ----------
    camber, place, thickness : array (n,)
        Of the chord: the camber, where it is largest, and the thickness.

    Returns
    -------
    array (n, 18)
        Weights of eight Bernstein polynomials above and eight below, of the leading edge's
        modification, and the thickness of the trailing edge.

    Examples
    --------
    >>> flat = sections(*np.asarray([[0.0], [0.4], [0.12]]))
    >>> bool(np.allclose(flat[0, :8], -flat[0, 8:16]))
    True
    """
    m, p, t = camber[:, None], place[:, None], thickness[:, None]
    x = (1 - np.cos(np.linspace(0.02, np.pi, 80))) / 2
    powers = 0.2969 * x**0.5 - 0.1260 * x - 0.3516 * x**2 + 0.2843 * x**3 - 0.1036 * x**4
    front, back = m / p**2 * (2 * p * x - x**2), m / (1 - p) ** 2 * (1 - 2 * p + 2 * p * x - x**2)
    line, half = np.where(x < p, front, back), 5 * t * powers
    binomial = enumerate([1, 7, 21, 35, 35, 21, 7, 1])
    shape = np.stack([c * x ** (i + 0.5) * (1 - x) ** (8 - i) for i, c in binomial], axis=1)
    edge, tail, none = (x * (1 - x) ** 8.5)[:, None], x[:, None] / 2, np.zeros_like(shape)
    surfaces = np.block([[shape, none, edge, tail], [none, shape, edge, -tail]])
    return np.linalg.lstsq(surfaces, np.hstack([line + half, line - half]).T, rcond=None)[0].T


def flights(n: int, rng: np.random.Generator) -> Host:
    """Draw the networks' inputs (n, 25) from the design space: sections and flows of small gliders.

    Camber 1-4 % at 30-50 % of the chord, thickness 10-14 %, angle of attack -4 to 10 degrees,
    Reynolds number 40,000-200,000, free transition.
    """
    shape = sections(*(rng.uniform(*span, n) for span in ((0.01, 0.04), (0.3, 0.5), (0.10, 0.14))))
    shape[:, 17] *= 50
    alpha, log_re = np.radians(rng.uniform(-4, 10, n)), rng.uniform(np.log(4e4), np.log(2e5), n)
    flow = np.sin(2 * alpha), np.cos(alpha), np.sin(alpha) ** 2, (log_re - 12.5) / 3.5
    free = np.broadcast_to([0.0, 1.0, 1.0], (n, 3))
    return np.hstack([shape, np.stack(flow, axis=1), free]).astype("float32")

"""How a method's error falls while it is trained: in text, and as a picture where Matplotlib is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import log
from pathlib import Path

BARS = "▁▂▃▄▅▆▇█"


def spark_lines(curves: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Draw positive numbers as bars, on one logarithmic scale for all curves.

    Examples
    --------
    >>> spark_lines({"a": [8.0, 4.0, 2.0], "b": [8.0, 1.0, 1.0]})
    {'a': '█▆▃', 'b': '█▁▁'}
    """
    every = [log(y) for curve in curves.values() for y in curve]
    low, high = min(every, default=0.0), max(every, default=0.0)
    scale = (len(BARS) - 1) / ((high - low) or 1.0)
    return {
        name: "".join(BARS[round((log(y) - low) * scale)] for y in curve)
        for name, curve in curves.items()
    }


def picture(
    curves: Mapping[str, Sequence[float]],
    points: Mapping[str, int],
    path: Path,
    measure: str = "mean error of CL, unseen flights",
) -> bool:
    """Write errors against training, and against trained parameters, as a PNG.

    Parameters
    ----------
    curves : mapping of str to sequence of float
        Errors of each method, the first before training.
    points : mapping of str to int
        How many parameters each trains.
    path : Path
    measure : str
        What the errors are.

    Returns
    -------
    bool
        Whether there is a Matplotlib to write it with.
    """
    if find_spec("matplotlib") is None:
        return False
    figure = import_module("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, curve in curves.items():
        left.plot([i / max(1, len(curve) - 1) for i in range(len(curve))], curve, label=name)
    for i, name in enumerate(sorted(curves, key=points.__getitem__)):
        at = points[name], curves[name][-1]
        right.scatter(*at, color=f"C{[*curves].index(name)}")
        shift = 7 if i % 2 else -13  # neighbours' names stand above and below
        right.annotate(name, at, (0, shift), textcoords="offset points", ha="center")
    left.set(xlabel="share of the training", ylabel=measure)
    right.set(xlabel="trained parameters", xscale="log", yscale="log")
    right.margins(x=0.12, y=0.1)
    left.legend()
    figure.savefig(path, dpi=120)
    return True

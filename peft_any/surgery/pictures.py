"""Inspections and comparisons as pictures: heat maps over the layers, and spectra."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from peft_any.algebra.difference import AdapterDifference
from peft_any.errors import BackendError, UsageError
from peft_any.io._atomic import StrPath, output_file, taken
from peft_any.receipt import Host
from peft_any.surgery.comparison import CheckpointDifference
from peft_any.surgery.inspection import Inspection

Values: TypeAlias = Mapping[str, float | None]
Drawable: TypeAlias = Inspection | AdapterDifference | CheckpointDifference
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_ROWS = 40
"""Kinds of layers that a picture shows at the most."""


@dataclass(frozen=True)
class _Panel:
    """One heat map: a number for each layer."""

    title: str
    values: Values
    limits: tuple[float, float] | None = None
    colors: str = "viridis"
    logarithmic: bool = False


def draw(found: Drawable, path: StrPath, *, overwrite: bool = False) -> None:
    """Draw what `inspect_adapter` or `diff` found, as a PNG.

    Of an adapter, ‖ΔW‖, effective ranks and spectra (with ``spectra=True``); of two adapters,
    the cosines of their changes and the overlaps of what these write and read; of two
    checkpoints, the relative changes. Columns are the numbers in the modules' names.

    Parameters
    ----------
    found : Inspection, AdapterDifference or CheckpointDifference
    path : path
        The file, which ends in ``.png``.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    BackendError
        If Matplotlib is not installed.
    StorageError
        If the file is there, or cannot be written.
    UsageError
        If there is nothing to draw, or the file is to be no PNG.
    """
    refuse_undrawable(path, overwrite=overwrite)
    panels, spectra = _panels(found)
    panels = [panel for panel in panels if any(v is not None for v in panel.values.values())]
    if not panels:
        raise UsageError(f"{path}: cannot be drawn: there is no layer with a number")
    figure = _figure(panels, spectra)
    with output_file(path, overwrite) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})


def refuse_undrawable(path: StrPath, *, overwrite: bool = False) -> None:
    """Refuse a picture that cannot be drawn, before there is what it shows: errors as of `draw`."""
    if not str(path).endswith(".png"):
        raise UsageError(f"{path}: cannot be drawn: pictures are PNG files: end the name in .png")
    if find_spec("matplotlib") is None:
        raise BackendError(
            f"{path}: cannot be drawn: Matplotlib is not installed: pip install peft_any[plot]"
        )
    if not overwrite and os.path.lexists(path):
        raise taken(Path(path))


def _panels(found: Drawable) -> tuple[list[_Panel], Mapping[str, Sequence[float]]]:
    if isinstance(found, Inspection):
        norms = {site.name: site.delta_norm for site in found.sites}
        ranks = {site.name: site.effective_rank for site in found.sites}
        spectra = {site.name: site.spectrum for site in found.sites if site.spectrum}
        return [_Panel("‖ΔW‖", norms), _Panel("effective rank", ranks, colors="cividis")], spectra
    if isinstance(found, AdapterDifference):
        cosines = {x.layer: x.cosine for x in found.layers}
        writes, reads = ({x.layer: x.overlap[i] for x in found.layers} for i in (0, 1))
        return [
            _Panel("cosine of ΔA and ΔB", cosines, (-1.0, 1.0), "RdBu_r"),
            _Panel("overlap of what they write", writes, (0.0, 1.0)),
            _Panel("overlap of what they read", reads, (0.0, 1.0)),
        ], {}
    changes = {x.tensor.removesuffix(".weight"): x.relative or None for x in found.tensors}
    kinds = {name: value for name, value in changes.items() if value is not None}
    return [_Panel("‖B − A‖/‖A‖", kinds, colors="magma", logarithmic=True)], {}


def grid(values: Values) -> tuple[list[str], list[str], Host]:
    """Arrange layers by kind and by number.

    Returns
    -------
    rows, columns : list of str
        What the names have around their first number, and the numbers.
    table : array
        NaN where there is no layer.

    Examples
    --------
    >>> grid({"h.0.q": 1.0, "h.1.q": 2.0, "head": 3.0})
    (['h.*.q', 'head'], ['0', '1'], array([[ 1.,  2.],
           [ 3., nan]]))
    """
    places = {}
    for name in values:
        hit = _NUMBER.search(name)
        row = name if hit is None else f"{name[: hit.start(1)]}*{name[hit.end(1) :]}"
        places[name] = row, -1 if hit is None else int(hit[1])
    rows = [*dict.fromkeys(row for row, _ in places.values())]
    numbers = sorted({n for _, n in places.values() if n >= 0}) or [0]
    table = np.full((len(rows), len(numbers)), np.nan)
    for name, (row, number) in places.items():
        value = values[name]
        table[rows.index(row), 0 if number < 0 else numbers.index(number)] = (
            np.nan if value is None else value
        )
    return rows, [*map(str, numbers)], table


def _figure(panels: Sequence[_Panel], spectra: Mapping[str, Sequence[float]]) -> Any:
    rows, columns, _ = grid(panels[0].values)
    count = len(panels) + bool(spectra)
    labels = 0.085 * max(len(_shown(row)) for row in rows)
    wide = min(max(1.6 + 0.22 * len(columns), 2.6), 7.0)
    high = min(max(1.4 + 0.26 * min(len(rows), _ROWS), 2.6), 12.0)
    width = labels + wide * len(panels) + 4.2 * bool(spectra)
    figure = import_module("matplotlib.figure").Figure(figsize=(width, high), layout="constrained")
    ratios = [wide] * len(panels) + [4.0] * bool(spectra)
    axes = figure.subplots(1, count, squeeze=False, width_ratios=ratios)[0]
    for i, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        _heat(figure, axis, panel, named=i == 0)
    if spectra:
        _spectra(axes[-1], spectra)
    return figure


def _heat(figure: Any, axis: Any, panel: _Panel, *, named: bool) -> None:
    rows, columns, table = grid(panel.values)
    rows, table = rows[:_ROWS], table[:_ROWS]
    colors = import_module("matplotlib.colors")
    low, high = panel.limits or (float(np.nanmin(table)), float(np.nanmax(table)))
    if high <= low:
        low, high = low * 0.5, low * 1.5 or 1.0
    wide = panel.logarithmic and high > 10 * low
    scale = colors.LogNorm(low, high) if wide else colors.Normalize(low, high)
    axis.set_facecolor("#e8e8e8")
    image = axis.pcolormesh(table, cmap=panel.colors, norm=scale, edgecolors="white", linewidth=0.4)
    axis.invert_yaxis()
    step = max(1, -(-len(columns) // 12))
    axis.set_xticks([i + 0.5 for i in range(0, len(columns), step)], columns[::step], fontsize=8)
    axis.set_yticks(
        [i + 0.5 for i in range(len(rows))], [*map(_shown, rows)] if named else [], fontsize=8
    )
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_title(panel.title, fontsize=10)
    if len(columns) > 1:
        axis.set_xlabel("layer", fontsize=9)
    bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.08)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, which="both")


def _spectra(axis: Any, spectra: Mapping[str, Sequence[float]]) -> None:
    """Draw the singular values of each layer, relative to its largest."""
    maps: Callable[[float], Any] = import_module("matplotlib").colormaps["viridis"]
    for i, values in enumerate(spectra.values()):
        if values[0] <= 0.0:
            continue
        shares = [v / values[0] for v in values if v > 1e-7 * values[0]]
        color = maps(0.9 * i / max(len(spectra) - 1, 1))
        marker = "o" if len(shares) == 1 else None
        axis.plot(range(1, len(shares) + 1), shares, color=color, alpha=0.6, lw=1, marker=marker)
    axis.set_yscale("log")
    longest = max(map(len, spectra.values()))
    if longest > 32:
        axis.set_xscale("log")
    axis.set_title("singular values of ΔW, relative to the largest", fontsize=10)
    axis.set_xlabel("number", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _shown(row: str, most: int = 36) -> str:
    """Cut a long name at its beginning, where names of one model are alike."""
    return row if len(row) <= most else f"…{row[1 - most :]}"

"""The record of an extraction: what became of every layer, and what is carried whole."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import sqrt
from typing import Any

from peft_any.adapter import Adapter
from peft_any.receipt import SCHEMA_VERSION, plain, to_json


@dataclass(frozen=True)
class Layer:
    """What became of one layer's change Δ.

    Attributes
    ----------
    module, tensor, shape
        The layer, its weight and that one's shape as it is stored.
    rank : int
        Of the factors, without the zeros that bring them to the rank of all layers.
    delta_norm, residual : float
        ‖Δ‖, and ‖Δ − s·B·A‖ with the factors as they are stored, measured in float64.
    least : float
        No factors of that rank have a smaller residual.
    way : str
        ``range finder`` or ``svd``.
    seconds : float
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    rank: int
    delta_norm: float
    residual: float
    least: float
    way: str
    seconds: float

    @property
    def error(self) -> float:
        """‖Δ − s·B·A‖/‖Δ‖."""
        return self.residual / self.delta_norm if self.delta_norm else 0.0

    @property
    def kept(self) -> float:
        """Share of ‖Δ‖² that the factors hold."""
        return 1.0 - self.error**2


@dataclass(frozen=True)
class Extraction:
    """What `extract` made; `to_json` is what `--json` prints and what stands beside the output.

    Attributes
    ----------
    adapter : Adapter
    base, model, out : dict
        Path, fingerprint, number of tensors, bytes; `out` is empty where nothing is written.
    layers : tuple of Layer
    copies : dict of str to shape
        Tensors that are carried whole, with the shapes of the model's.
    same : int
        Tensors of the base that the model has unchanged.
    left, warnings : tuple of str
        Sentences: what was left out (``strict=False``); what a reader should know.
    options, versions, seconds, peak_memory
        How it was made, as in `Receipt`.
    """

    adapter: Adapter
    base: dict[str, Any]
    model: dict[str, Any]
    layers: tuple[Layer, ...]
    copies: dict[str, tuple[int, ...]]
    same: int
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    out: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None

    @property
    def error(self) -> float:
        """‖Δ − s·B·A‖/‖Δ‖ over all layers with factors."""
        whole = sum(layer.delta_norm**2 for layer in self.layers)
        return sqrt(sum(layer.residual**2 for layer in self.layers) / whole) if whole else 0.0

    @property
    def kept(self) -> float:
        """Share of ‖Δ‖² that the factors hold, over all their layers."""
        return 1.0 - self.error**2

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": "extract"}
        head |= {"kept": self.kept, "error": self.error}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adapter"}
        rest["layers"] = [
            vars(layer) | {"error": layer.error, "kept": layer.kept} for layer in self.layers
        ]
        return plain(head | rest)

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)

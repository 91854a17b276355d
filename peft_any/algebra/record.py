"""The record of adapters made from adapters: what went in, what came out, and how far off it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

from peft_any._typing import Shape
from peft_any.receipt import SCHEMA_VERSION, Source, plain, to_json


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    Attributes
    ----------
    layer : str
    by : tuple of str
        The adapters that have a share in it.
    shape : (n_out, width)
    ranks : tuple of int
        Inner sizes of their factors; the smaller side of the layer where a method has none.
    rank : int or None
        The result's; None where the result is no LoRA.
    norm : float or None
        ‖Σ wᵢ·ΔWᵢ‖, the exact weighted sum's (Frobenius).
    discarded : float
        Share of ‖ΔW‖² that cutting the rank left out.
    error : float or None
        ‖result − wanted‖/‖wanted‖, of the arrays as they are stored: what cutting and rounding
        lost of what the method computes. None where that is zero.
    off_sum : float or None
        ‖result − sum‖/‖sum‖: how far the result is from the exact weighted sum. For ``linear``
        these are the cross terms.
    """

    layer: str
    by: tuple[str, ...]
    shape: Shape
    ranks: tuple[int, ...]
    rank: int | None
    norm: float | None
    discarded: float = 0.0
    error: float | None = None
    off_sum: float | None = None


@dataclass(frozen=True)
class Record:
    """The receipt of `combine`, `convert` and `resize`; `to_json` is what `--json` prints.

    Attributes
    ----------
    kind : str
        ``combine``, ``convert`` or ``resize``.
    method : str
    adapters : tuple of Source
        What went in: path, digests of the files, weight.
    layers : tuple of LayerRecord
    copies : dict of str to tuple of str
        Tensors and rows beside the method's, and the adapters they come from.
    base, out : dict
        Path and fingerprint; path, method and rank. Empty where there is none.
    options, warnings, versions, seconds, peak_memory
        How it was made.
    """

    kind: str
    method: str
    adapters: tuple[Source, ...]
    layers: tuple[LayerRecord, ...]
    copies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    out: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None

    @property
    def error(self) -> float | None:
        """‖result − wanted‖/‖sum‖ over all layers together; None without any change."""
        return self._over_all("error")

    @property
    def off_sum(self) -> float | None:
        """‖result − sum‖/‖sum‖ over all layers together."""
        return self._over_all("off_sum")

    @property
    def discarded(self) -> float | None:
        """Share of Σ‖ΔW‖² that cutting the ranks left out."""
        return self._over_all("discarded", power=1)

    def _over_all(self, name: str, power: int = 2) -> float | None:
        some = [(getattr(layer, name), layer.norm) for layer in self.layers]
        known = [(value, norm**2) for value, norm in some if value is not None and norm]
        total = sum(square for _, square in known)
        if not total:
            return None
        mean = sum(value**power * square for value, square in known) / total
        return sqrt(mean) if power == 2 else mean

    @property
    def worst(self) -> LayerRecord | None:
        """The layer that is farthest off what the method computes."""
        some = [layer for layer in self.layers if layer.error is not None]
        return max(some, key=lambda layer: layer.error or 0.0, default=None)

    @property
    def ranks(self) -> dict[int, int]:
        """How many layers have each rank."""
        found = sorted(layer.rank for layer in self.layers if layer.rank is not None)
        return {rank: found.count(rank) for rank in dict.fromkeys(found)}

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        summary = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "error": self.error,
            "off_sum": self.off_sum,
            "discarded": self.discarded,
            "worst": None if self.worst is None else self.worst.layer,
            "ranks": self.ranks,
        }
        return plain(summary | asdict(self))

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)

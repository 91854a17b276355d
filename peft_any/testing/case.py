"""A case: a configuration, a layer, and what the laws may expect of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peft_any.backend import resolve
from peft_any.layer import Dense, Kind, Site
from peft_any.method import Tuner
from peft_any.rng import Fresh
from peft_any.routed import Routed

_SITES: dict[Kind, tuple[Site, ...]] = {
    "Linear": (Site("fc", 12, 32), Site("a.odd", 13, 7, bias=False)),
    "Conv1D": (Site("c1d", 6, 9, "Conv1D"),),
    "Embedding": (Site("wte", 11, 8, "Embedding", bias=False),),
    "Conv1d": (Site("conv1", 6, 8, "Conv1d", (3,)),),
    "Conv2d": (Site("conv2", 6, 8, "Conv2d", (3, 2)),),
    "Conv3d": (Site("conv3", 4, 6, "Conv3d", (2, 1, 3)),),
    "MultiheadAttention": (Site("mha", 8, 24, "MultiheadAttention"),),
    "Norm": (Site("norm", 8, 8, "Norm"),),
}


def usual_sites(config: Tuner) -> list[Site]:
    """List layers of every kind that a method supports, one of them of awkward sizes.

    Examples
    --------
    >>> from peft_any.methods.miss import MissConfig
    >>> [(s.name, s.n_in, s.n_out) for s in usual_sites(MissConfig())]
    [('fc', 12, 32), ('a.odd', 13, 7)]
    """
    return [site for kind, sites in _SITES.items() if kind in config.kinds for site in sites]


@dataclass(frozen=True)
class Case:
    """One row of a table: all laws run over it.

    Attributes
    ----------
    name : str
    config : Tuner
    site : Site
    identity : str or None
        Why a fresh adapter does not leave the layer as it was; None: it does.
    reverts : float
        Bound of ‖unmerge(merge(W)) − W‖/‖W‖ in units of the dtype's rounding; 0: Irreversible.
    routing : dict
        What a call needs beside its input (`Tuner.takes`), for an input whose first axis is 2.
    idle : tuple of str
        Trained parameters on which the output does not depend, with the configuration's numbers.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> case = Case("lora", LoraConfig(r=2), Site("fc", 3, 4))
    >>> {k: v.shape for k, v in case.params(case.base()).items()}
    {'lora_A.weight': (2, 3), 'lora_B.weight': (4, 2)}
    """

    name: str
    config: Any
    site: Site = field(default_factory=lambda: Site("fc", 12, 32))
    identity: str | None = None
    reverts: float = 20.0
    routing: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @property
    def merges(self) -> bool:
        """Whether a weight holds what the method does: not where it depends on the input."""
        return not (isinstance(self.config, Routed) or self.routing)

    @property
    def where(self) -> str:
        """What the laws' errors begin with."""
        site = self.site
        return f"{self.config.where} at {site.name} ({site.kind} {site.n_in} → {site.n_out})"

    @property
    def resolved(self) -> Any:
        """The configuration with the site's own numbers."""
        return self.config.at(self.site)

    def base(self, seed: int = 0, *, dtype: str = "float32", bias: bool | None = None) -> Dense:
        """Draw a base layer, on the host."""
        rng = np.random.default_rng([seed, 1])
        bias = self.site.bias if bias is None else bias
        weight = rng.standard_normal((self.site.n_out, self.site.width)) / self.site.width**0.5
        shift = rng.standard_normal(self.site.n_out).astype(dtype) if bias else None
        return Dense(weight.astype(dtype), shift, self.site)

    def fresh(self, base: Dense, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
        """Draw the initial parameters, shared ones included, on the host."""
        config = self.config.at(self.site)
        new = Fresh(seed, resolve("numpy"), key=self.site.name, dtype=dtype, base=base)
        return config.begin(self.site, new)

    def params(self, base: Dense, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
        """Draw parameters as training leaves them: none at its initial value."""
        rng = np.random.default_rng([seed, 2])
        p = self.fresh(base, seed, dtype)
        config = self.config.at(self.site)
        trained = config.shapes(self.site).keys() - config.frozen
        return {
            k: (v + 0.2 * rng.standard_normal(v.shape)).astype(dtype) if k in trained else v
            for k, v in p.items()
        }

    def inputs(
        self, lead: tuple[int, ...] = (2, 3), dtype: str = "float32", seed: int = 0
    ) -> np.ndarray[Any, Any]:
        """Draw an input of the layer with the given leading shape."""
        rng = np.random.default_rng([seed, 3])
        if self.site.kind == "Embedding":
            return rng.integers(0, self.site.n_in, lead)
        return rng.standard_normal((*lead, self.site.reads)).astype(dtype)

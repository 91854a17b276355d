"""What adapters add to each layer, as factors: exact by structure, or out of the base's layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from peft_any._typing import Array, Params
from peft_any.algebra.lowrank import Factors
from peft_any.backend import Backend, dtype_name, is_array, is_floating, move, widest
from peft_any.completing import Placed, dense, refuse_lacking
from peft_any.errors import ConfigError, PeftError, ShapeError, TargetError
from peft_any.io._atomic import StrPath
from peft_any.io.checkpoint import Checkpoint
from peft_any.layer import EXPERTS, Dense, Site
from peft_any.linalg import as_product
from peft_any.method import Additive, Tuner
from peft_any.origin import KEY, other_base, sampled
from peft_any.selection import out_projection
from peft_any.sizing import site_of
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.planning import fit_one
from peft_any.surgery.sources import Given, View, misfit
from peft_any.targets import configured

Base: TypeAlias = StrPath | Mapping[str, Array] | None
"""A checkpoint's path, a mapping of weights, or nothing."""


@dataclass(frozen=True)
class Term:
    """One adapter's share in a layer.

    Attributes
    ----------
    label : str
        The adapter's.
    weight : float
    site : Site
    config : Tuner
        Resolved for the site.
    params : dict of arrays
        The site's and the shared ones, as they are stored.
    """

    label: str
    weight: float
    site: Site
    config: Tuner
    params: Params

    def effect(self, base: Any) -> tuple[Factors, Array | None]:
        """Give ΔW as factors (n_out, k) and (k, width), and Δb, neither weighted.

        In double precision where the library has it. Where ΔW does not read the base, k is what
        the method's structure gives; otherwise the smaller side of the matrix.

        Parameters
        ----------
        base : Dense or NoBase

        Raises
        ------
        ConfigError
            If the method needs the base and there is none.
        """
        config = self.config
        p = {k: widest(a) if is_array(a) and is_floating(a) else a for k, a in self.params.items()}
        if isinstance(config, Additive) and config.gain(p, base) is None:
            return config.factors(p, self.site), config.bias_delta(p, self.site)
        pair = None if config.changes_bias(self.site) else config.product(p, base)
        if pair is not None:
            return pair, None
        dw, db = config.effect(p, base)
        return as_product(dw), db


@dataclass(frozen=True)
class NoBase:
    """Stands for a layer that is not there: whoever reads it learns what to do."""

    site: Site
    method: str

    def _read(self) -> Any:
        raise ConfigError(
            f"{self.site.name}: {self.method} changes a layer depending on its weight: its effect "
            "cannot be known without the base: give base= (--base)"
        )

    weight = bias = original = original_bias = unadapted = property(_read)
    stored = replace = property(_read)


@contextmanager
def opened(base: Base, given: list[Given]) -> Iterator[Mapping[str, Any] | None]:
    """Open a base, with tied names as its adapters see them."""
    if base is None or isinstance(base, Mapping):
        yield base
        return
    with Checkpoint(base) as checkpoint:
        yield View(checkpoint, given)


def _no_stacks(one: Placed) -> Placed:
    """Refuse experts, of which each would need factors of its own."""
    for name, site in one.sites.items():
        if site.kind in EXPERTS:
            raise ConfigError(
                f"{name}: stacks of experts (target_parameters) cannot be combined or converted: "
                "merge the adapters into the base, with their weights"
            )
    return one


def placed(
    given: Sequence[Given],
    view: Mapping[str, Any] | None,
    fit: Fitting,
) -> list[Placed]:
    """Find the layers of every adapter: in the base, or from its own arrays' shapes.

    Raises
    ------
    PeftError
        Listing everything that does not fit, with the adapters' names.
    """
    out, faults = [], []
    for one in given:
        try:
            if view is None:
                out.append(_alone(one))
            else:
                alone = len(given) == 1
                out.append(_no_stacks(fit_one(one, view, fit, alone=alone)))
        except PeftError as error:
            faults.append((one, error))
    if faults:
        raise misfit(faults) from faults[0][1]
    if view is not None and not fit.any_base:
        _refuse_other_base(given, out, view)
    return out


def _refuse_other_base(
    given: Sequence[Given], places: Sequence[Placed], view: Mapping[str, Any]
) -> None:
    samples = view.sampled if isinstance(view, View) else lambda name: sampled(view[name])
    others = [
        one.label
        for one, place in zip(given, places, strict=True)
        if other_base(one.adapter.metadata, place.sites.values(), samples) is not None
    ]
    if others:
        raise TargetError(
            f"{', '.join(others)}: made on another base than the one given: give that one, or "
            "--any-base (any_base=True)"
        )


def origin(given: Sequence[Given], places: Sequence[Placed]) -> dict[str, str]:
    """Take over which base adapters were made on, where all of one set of layers say the same."""
    said = {one.adapter.metadata.get(KEY) for one in given}
    layers = {frozenset(place.sites) for place in places}
    found = said.pop() if len(said) == len(layers) == 1 else None
    return {} if found is None else {KEY: found}


def _alone(given: Given) -> Placed:
    """Find an adapter's layers without a base."""
    config: Any = given.adapter.config
    found: dict[str, Site] = {}
    known: dict[Any, list[Site]] = {}
    lost = []
    if getattr(config, "target_parameters", None):
        raise TargetError(
            "target_parameters: names layers and stacks of experts, which factors alone do not "
            "tell apart: give base= (--base)"
        )
    for name, params in given.adapter.sites.items():
        hit = site_of(config, name, params, known)
        if hit is None:
            lost.append(name)
        else:
            found[name] = hit[1]
    if not given.adapter.sites and given.adapter.shared:
        raise TargetError(f"{config.peft_type}'s file names no layers: give base= (--base)")
    if lost:
        raise TargetError(
            f"{', '.join(lost)}: {config.peft_type}'s arrays do not tell the size of the layer: "
            "give base= (--base), or check that they are whole"
        )
    for name, site in found.items():
        if out_projection(name) in found and site.n_out == 3 * site.n_in:
            found[name] = replace(site, kind="MultiheadAttention")
    made = Placed(given.adapter, found, configured(config, found))
    refuse_lacking(made)
    return made


def terms_by_layer(
    given: Sequence[Given], placed: Sequence[Placed], backend: Backend
) -> dict[str, list[Term]]:
    """Gather the adapters' shares, layer by layer, on one library.

    Layers come in the order of their names, numbers in them counted as numbers.

    Raises
    ------
    ShapeError
        If two adapters take a layer for different sizes.
    """
    layers: dict[str, list[Term]] = {}
    for one, place in zip(given, placed, strict=True):
        shared = move(dict(place.adapter.shared), backend)
        for name, site in place.sites.items():
            params = {**shared, **move(dict(place.adapter.sites[name]), backend)}
            term = Term(one.label, one.weight, site, place.configs[name], params)
            layers.setdefault(name, []).append(term)
    wrong = [
        f"{name}: {b.label} has a layer of {b.site.n_out} × {b.site.width} here, and {a.label} one "
        f"of {a.site.n_out} × {a.site.width}: they are not of one base"
        for name, (a, *others) in layers.items()
        for b in others
        if (a.site.n_out, a.site.width) != (b.site.n_out, b.site.width)
    ]
    if wrong:
        raise ShapeError("\n".join(wrong))
    return {name: layers[name] for name in sorted(layers, key=_natural)}


def site_of_terms(terms: Sequence[Term]) -> Site:
    """Choose among what adapters take a layer for: a kernel is known where a file has one."""
    return max((t.site for t in terms), key=lambda s: (len(s.kernel), s.kind != "Linear"))


def base_layer(view: Mapping[str, Any] | None, term: Term, backend: Backend) -> Any:
    """Give the base's layer on a library, in double precision where that has it."""
    if view is None:
        return NoBase(term.site, term.config.peft_type)
    layer = dense(view, term.site)
    if not is_floating(layer.weight):
        raise TargetError(
            f"{term.site.weight}: the effect of {term.config.peft_type} cannot be known from "
            f"{dtype_name(layer.weight)} values: the base is quantised; give the one before"
        )
    weight, bias = move([layer.weight, layer.bias], backend)
    return Dense(widest(weight), None if bias is None else widest(bias), term.site)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]

"""What an adapter holds, and what merging it into a base would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import exp, log, prod, sqrt
from typing import Any

from peft_any._typing import Params
from peft_any.adapter import Adapter
from peft_any.algebra.lowrank import Cut, spectrum
from peft_any.arguments import checked
from peft_any.backend import Backend, astype, compute_dtype, is_floating, to_numpy, widest
from peft_any.errors import PeftError
from peft_any.io._atomic import StrPath
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.layer import EXPERTS, Site
from peft_any.method import Additive, Prompt, Tuner
from peft_any.naming.rules import Names
from peft_any.prompt import Attended
from peft_any.receipt import SCHEMA_VERSION, Change, plain, to_json
from peft_any.sizing import site_of, sites_of
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress
from peft_any.surgery.mapping import mapped
from peft_any.surgery.measure import measure
from peft_any.surgery.planning import make_plan
from peft_any.surgery.sources import Given, Kinds, given_one
from peft_any.surgery.ties import settle_ties

_ENERGIES = (0.5, 0.9, 0.99, 0.999)
"""Shares of ‖ΔW‖² for which an inspection says the rank."""
_FORMED = 1 << 25
"""Elements up to which ΔW is formed to take its norm."""


@dataclass(frozen=True)
class SiteReport:
    """One adapted layer.

    Attributes
    ----------
    name : str
    parameters : int
    rank : int or None
        The configuration's `r` at this site, where that is a rank; that of the arrays, where they
        have another.
    shapes : dict of str to shape
    norms : dict of str to float
        Frobenius norms of the parameters.
    delta_norm : float or None
        ‖ΔW‖, where it follows from the parameters alone.
    spectrum : tuple of float
        The singular values of ΔW, where they were asked for and follow from the parameters.
    """

    name: str
    parameters: int
    rank: int | None
    shapes: dict[str, tuple[int, ...]]
    norms: dict[str, float]
    delta_norm: float | None
    spectrum: tuple[float, ...] = ()

    @property
    def effective_rank(self) -> float | None:
        """exp(−Σ p·ln p) with p = s/Σs (Roy & Vetterli 2007); None without a spectrum."""
        total = sum(self.spectrum)
        shares = [s / total for s in self.spectrum if s] if total else []
        return exp(-sum(p * log(p) for p in shares)) if shares else None

    def rank_for(self, energy: float) -> int | None:
        """How many singular values hold this share of ‖ΔW‖²; None without a spectrum.

        Examples
        --------
        >>> SiteReport("fc", 0, 2, {}, {}, 2.0, (3.0, 1.0)).rank_for(0.9)
        1
        """
        return Cut(energy=energy).keep(self.spectrum) if self.spectrum else None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_adapter` finds; `to_json` is what `--json` prints.

    Attributes
    ----------
    path, peft_type, files, config
        The adapter, digests of its files, and its configuration's fields that are set.
    parameters : int
        Trained numbers.
    sites : tuple of SiteReport
    copies, rows : dict of str to shape
        Full new values of tensors; new rows of embeddings, by module.
    shared : dict of str to shape
        Arrays of all sites, or a prompt's table.
    base : dict
        Path and fingerprint of the base, where one was given.
    changes : tuple of Change
        With a base: ‖Δ‖, ‖W‖, and what rounding to the base's dtype would leave.
    notes : tuple of str
    """

    path: str
    peft_type: str
    files: dict[str, str]
    config: dict[str, Any]
    parameters: int
    sites: tuple[SiteReport, ...]
    copies: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[int, int]:
        """How many sites have each rank."""
        return dict(sorted(Counter(s.rank for s in self.sites if s.rank is not None).items()))

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        head = {"schema_version": SCHEMA_VERSION, "kind": "inspect", "ranks": self.ranks}
        found: dict[str, Any] = plain(head | asdict(self))
        for entry, change in zip(found["changes"], self.changes, strict=True):
            entry["relative"] = change.relative
        for entry, site in zip(found["sites"], self.sites, strict=True):
            if site.spectrum:
                entry["effective_rank"] = site.effective_rank
                entry["rank_for"] = {str(e): site.rank_for(e) for e in _ENERGIES}
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)


@checked
def inspect_adapter(
    adapter: StrPath | Adapter,
    base: StrPath | None = None,
    *,
    strict: bool = True,
    progress: Progress | None = None,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    rederive: bool = False,
    names: Names = None,
    spectra: bool = False,
) -> Inspection:
    """Look into an adapter; with a base, predict what merging would leave of its changes.

    Parameters
    ----------
    adapter : path or Adapter
    base : path, optional
        As for `merge_checkpoint`. The prediction is made by merging and rounding in memory.
    strict, progress, backend, kinds, rederive, names
        As for `merge_checkpoint`.
    spectra : bool
        Whether to find the singular values of every ΔW: from the factors, where the method has
        small ones.

    Raises
    ------
    PeftError
        If the adapter is malformed, or does not fit the base.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import PeftModel
    >>> from peft_any.methods.lora import LoraConfig
    >>> model = PeftModel({"fc.weight": np.ones((3, 4), "float32")})
    >>> report = inspect_adapter(model.add("task", LoraConfig(r=2, target_modules=["fc"])))
    >>> report.peft_type, report.ranks, report.sites[0].delta_norm
    ('LORA', {2: 1}, 0.0)
    """
    fit = Fitting.read(strict=strict, rederive=rederive, backend=backend, kinds=kinds, names=names)
    given = given_one(adapter, strict=strict)
    if base is None or isinstance(given.adapter.config, Prompt | Attended):
        return _describe(*mapped([given], fit.rules, None), spectra=spectra)
    with Checkpoint(base) as checkpoint:
        plan = make_plan(checkpoint, [given], fit)
        surgeon = Surgeon(plan, fit.backend)
        settle_ties(plan, lambda name: surgeon.value(name)[0])
        changes = []
        for i, name in enumerate(plan.touched):
            changes.append(surgeon.value(name)[1])
            if progress is not None:
                progress(i + 1, len(plan.touched), name)
        fields = vars(
            _describe(*mapped([given], fit.rules, checkpoint, kinds), spectra=spectra)
        ) | {
            "base": {"path": str(base), "fingerprint": fingerprint(checkpoint)},
            "changes": tuple(changes),
            "notes": tuple(plan.warnings),
        }
    return Inspection(**fields)


def _describe(given: Given, *, spectra: bool = False) -> Inspection:
    adapter, notes = given.adapter, list[str]()
    config = adapter.config
    shown = {
        key: value
        for key, value in vars(config).items()
        if value not in (None, {}, [], "") and value is not False
    }
    return Inspection(
        given.label,
        config.peft_type,
        given.source.files,
        shown,
        adapter.num_parameters,
        tuple(_site_reports(adapter, spectra, notes)),
        {name: tuple(a.shape) for name, a in adapter.extra.items()},
        {name: tuple(a.shape) for name, a in adapter.tokens.items()},
        {name: tuple(a.shape) for name, a in adapter.shared.items()},
        notes=(*adapter.notes, *notes),
    )


def _site_reports(adapter: Adapter, spectra: bool, notes: list[str]) -> Iterator[SiteReport]:
    config: Any = adapter.config
    known: dict[Any, list[Site]] = {}
    others: dict[int, dict[Any, list[Site]]] = {}
    for name, params in adapter.sites.items():
        hits = sites_of(config, name, params, known) if isinstance(config, Tuner) else []
        found = hits[0] if len(hits) == 1 else None
        own, site = found or (config, None)
        if not hits and (other := _of_another_rank(config, name, params, others)):
            own, site = other
            notes.append(
                f"{name}: the configuration says r={config.at(site).r}, and its arrays have the "
                f"rank {own.r}: they cannot be merged; correct r, or rank_pattern"
            )
        yield SiteReport(
            name,
            sum(prod(a.shape) for k, a in params.items() if k not in config.frozen),
            _rank(own, site, {**adapter.shared, **params}),
            {k: tuple(a.shape) for k, a in params.items()},
            {k: _norm(a) for k, a in params.items() if is_floating(a)},
            None if found is None else _delta_norm(*found, {**adapter.shared, **params}),
            _spectrum(*found, {**adapter.shared, **params}) if found and spectra else (),
        )


def _of_another_rank(
    config: Any, name: str, params: Params, known: dict[int, dict[Any, list[Site]]]
) -> tuple[Any, Site] | None:
    """Find the size of a layer whose arrays have another rank than the configuration says."""
    if not isinstance(config, Tuner) or not isinstance(getattr(config, "r", None), int):
        return None
    ranks = {n for a in params.values() for n in a.shape[:2] if n}
    for rank in sorted(ranks):
        plain: dict[str, Any] = {"r": rank}
        if getattr(config, "rank_pattern", None):
            plain["rank_pattern"] = {}
        try:
            other = replace(config, **plain)
        except PeftError:
            continue
        if found := site_of(other, name, params, known.setdefault(rank, {})):
            return found
    return None


def _rank(config: Any, site: Site | None, params: Params) -> int | None:
    """Give r; of a method whose factors have another width, that; None if r is no rank."""
    additive = isinstance(config, Additive)
    if additive and type(config).rank is not Additive.rank:
        return None if site is None else int(config.factors(params, site)[0].shape[1])
    ranked = config.ranked and (not additive or config.order)
    rank = getattr(config, "r", None) if ranked else None
    return rank if isinstance(rank, int) and rank > 0 else None


def _norm(array: Any) -> float:
    return sqrt(measure(array, array, delta=array).delta2)


def _delta_norm(config: Tuner, site: Site, params: Params) -> float | None:
    if not isinstance(config, Additive) or site.n_out * site.width > _FORMED:
        return None
    name = compute_dtype(*params.values())
    wide = {k: astype(a, name) if is_floating(a) else a for k, a in params.items()}
    try:
        return _norm(config.delta(wide, site))
    except (PeftError, KeyError):  # what the file leaves out: start values, projections
        return None


def _spectrum(config: Tuner, site: Site, params: Params) -> tuple[float, ...]:
    large = site.n_out * site.width > _FORMED * 16
    if not isinstance(config, Additive) or large or site.kind in EXPERTS:
        return ()
    wide = {k: widest(a) if is_floating(a) else a for k, a in params.items()}
    try:
        u, v = config.factors(wide, site)
    except (PeftError, KeyError):  # what the file leaves out
        return ()
    return tuple(float(s) for s in to_numpy(spectrum((u, v))))

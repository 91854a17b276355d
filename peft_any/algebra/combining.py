"""Adapters made one: the exact weighted sum of their effects, and other people's approximations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from peft_any._typing import DTypeLike
from peft_any.adapter import Adapter
from peft_any.algebra.copies import Copies, combined_copies, folded
from peft_any.algebra.gains import all_gains, combined_gains
from peft_any.algebra.lowrank import Cut
from peft_any.algebra.record import LayerRecord, Record
from peft_any.algebra.sparse import Sign
from peft_any.algebra.sums import ON_DELTA, Layer, Options, combine_layer
from peft_any.algebra.tasks import Layers, Names
from peft_any.algebra.terms import Base, opened, origin, placed, terms_by_layer
from peft_any.algebra.written import Update, lora_adapter
from peft_any.arguments import checked
from peft_any.backend import Backend, compute_dtype, is_floating, resolve
from peft_any.completing import Placed
from peft_any.errors import ConfigError
from peft_any.io._atomic import StrPath, output_directory
from peft_any.io.checkpoint import fingerprint
from peft_any.receipt import Clock, peak_memory, versions
from peft_any.rng import TorchGenerator
from peft_any.surgery.choice import EngineLike, engine_of
from peft_any.surgery.engines import Engine, Local
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress
from peft_any.surgery.merge import storage_dtype
from peft_any.surgery.sources import Adapters, Given, Kinds, View, given_adapters

Made: TypeAlias = tuple[Adapter, Record]


@checked
def combine(
    adapters: Adapters,
    out: StrPath | None = None,
    *,
    method: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: Sign = "total",
    svd_clamp: float | None = None,
    seed: int = 0,
    base: Base = None,
    kinds: Kinds = None,
    rederive: bool = False,
    any_base: bool = False,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    backend: str | Backend = "auto",
    progress: Progress | None = None,
    engine: EngineLike = "local",
) -> Made:
    """Combine adapters into one that Hugging Face PEFT loads.

    By default the result adds Σ wᵢ·ΔWᵢ exactly, as a LoRA whose rank is the sum of the ranks;
    with `rank` or `energy` it is the best approximation of that sum.

    Parameters
    ----------
    adapters : path, Adapter, mapping {path: weight}, or several, each alone or with its weight
        Of any method that changes weights. IA³ adapters alone give an IA³ adapter.
    out : path, optional
        The output directory: it appears whole, with ``combine_receipt.json``, or not at all.
    method : str
        ``exact`` (also ``cat``), or one of Hugging Face PEFT's: ``linear``, ``ties``,
        ``dare_linear``, ``dare_ties`` and ``magnitude_prune``, which act on A and B apart;
        ``svd``, ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd`` and
        ``magnitude_prune_svd``, which act on ΔW and cut its rank.
    rank : int, optional
        The largest rank of a layer; by default the largest of the adapters', for ``…svd``.
    energy : float, optional
        The share of every ‖ΔW‖² to keep; with `rank` too, the smaller rank of the two.
    density : float, optional
        The share of the entries that pruning keeps; needed for ``ties``, ``dare``,
        ``magnitude_prune``.
    majority_sign_method : {"total", "frequency"}
        How ``ties`` elects signs: by the sum, or by the number of entries.
    svd_clamp : float, optional
        For ``…svd``: clamp the factors at ± this quantile of their entries.
    seed : int
        Of ``dare``: torch's generator, drawing layer after layer in the order of their names.
    base : path or mapping of str to array, optional
        Needed where an effect depends on the base (DoRA, IA³ beside others, OFT, BOFT) or an
        adapter does not tell its layers' sizes (VeRA, and LoHa, LoKr or AdaLoRA on
        convolutions); and for full copies that are weighted or of several adapters.
    kinds, rederive, any_base
        As for `merge_checkpoint`.
    dtype : str or dtype of any library, optional
        Of the result; by default float32, or float64 where an adapter has it.
    overwrite : bool
    backend : str or Backend
        Where to compute; by default where the arrays of the given adapters are.
    progress : callable, optional
        Called with layers done, all layers, and the layer's name.
    engine : str or Engine
        As for `merge_checkpoint`; a task for each layer, but for ``dare``, whose generator draws
        layer after layer.

    Returns
    -------
    adapter : Adapter
    record : Record
        Of every layer the ranks, ‖ΔW‖, the energy left out, and how far the stored result is
        from what was wanted and from the exact sum.

    Raises
    ------
    PeftError
        Before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> def lora(r, value):
    ...     a, b = np.full((r, 9), value, "float32"), np.ones((8, r), "float32")
    ...     p = {"lora_A.weight": a, "lora_B.weight": b}
    ...     return Adapter(LoraConfig(r=r, lora_alpha=r), {"fc": p})
    >>> made, record = combine([(lora(1, 0.5), 0.7), (lora(2, 0.25), -0.3)])
    >>> made.config.r, round(record.layers[0].norm, 6), record.error < 1e-7
    (3, 1.697056, True)
    >>> combine([(lora(1, 0.5), 0.7), (lora(2, 0.25), -0.3)], energy=0.99)[0].config.r
    1
    """
    cut = None if rank is None and energy is None else Cut(rank=rank, energy=energy)
    options = Options(method, cut, density, majority_sign_method, svd_clamp, seed)
    fit = Fitting(rederive=rederive, kinds=kinds, any_base=any_base)
    job = Job("combine", options, fit, base, dtype, backend, progress, engine_of(engine))
    return finished(job, given_adapters(adapters), out, overwrite)


@dataclass(frozen=True)
class Job:
    """What is to be done, for `combine`, `convert` and `resize` alike."""

    keeps_gains: ClassVar[bool] = True
    """Whether IA³ adapters alone give one, and no LoRA."""

    kind: str
    options: Options
    fit: Fitting
    base: Base = None
    dtype: DTypeLike | None = None
    backend: str | Backend = "auto"
    progress: Progress | None = None
    engine: Engine = field(default_factory=Local)

    def run(self, given: Sequence[Given]) -> Made:
        """Combine adapters, without writing anything."""
        to, options = library(given, self.backend), self.settled(given)
        warnings = [note for one in given for note in one.adapter.notes]
        if options is not self.options:
            method = self.options.method
            warnings.append(f"one adapter alone is only weighted: {method} does nothing")
        with opened(self.base, [*given]) as view:
            if view is not None:
                given = [one.named(view, self.fit.kinds) for one in given]
            copies = combined_copies(given, view, to)
            if self.keeps_gains and all_gains(given) and options.cut is None:
                plain = self._plain(options)
                made, layers = combined_gains(given, to, self._dtype(given), plain=plain)
            else:
                made, layers, copies = self._layers(given, view, options, to, copies)
            read = {}
            if isinstance(view, View):
                read = {"path": str(self.base), "fingerprint": fingerprint(view.base)}
        known = vars(made.config)
        fields: Any = {k: v for k, v in copies.fields.items() if k in known}
        made = made.replace(
            config=replace(made.config, **fields), extra=copies.extra, tokens=copies.tokens
        )
        made.check_finite()
        return made, Record(
            self.kind,
            self.options.method,
            tuple(one.source for one in given),
            tuple(layers),
            copies.owners,
            read,
            options=said(self.options),
            warnings=tuple(warnings),
        )

    def settled(self, given: Sequence[Given]) -> Options:
        """Give the options, of which some act on several adapters alone; not IA³'s Σ wᵢ·lᵢ."""
        if len(given) > 1 or self.options.method in ("exact", "cat") or all_gains(given):
            return self.options
        return replace(self.options, method="exact", density=None, clamp=None)

    def _plain(self, options: Options) -> bool:
        if options.method not in ("exact", "linear"):
            raise ConfigError(
                f"{options.method}: cannot combine IA³ adapters, which have no A and B: take "
                "'exact', or 'linear' as Hugging Face PEFT does"
            )
        return options.method == "linear"

    def _layers(
        self, given: Sequence[Given], view: Any, options: Options, to: Backend, copies: Copies
    ) -> tuple[Adapter, list[LayerRecord], Copies]:
        fits = placed(given, view, self.fit)
        names, work = self.pieces(given, fits, view, options, to)
        found: dict[str, tuple[Update, LayerRecord]] = {}

        def done(item: Names, pairs: Sequence[tuple[Update, LayerRecord]]) -> None:
            found.update(zip(item, pairs, strict=True))
            if self.progress is not None:
                self.progress(len(found), len(names), item[-1])

        if isinstance(self.engine, Local):
            for name in names:
                done((name,), work((name,)))
        else:
            draws = options.rule is not None and options.rule.prune == "random"
            items = [tuple(names)] if draws else [(name,) for name in names]
            self.engine.run(Layers.of(self, given, view, to), items, done)
        configs: list[Any] = [one.adapter.config for one in given]
        copies, updates = folded(copies, given, [found[n][0] for n in names])
        made = lora_adapter(updates, configs, dtype=self._dtype(given))
        made = made.replace(metadata={**made.metadata, **origin(given, fits)})
        return made, [found[name][1] for name in names], copies

    def pieces(
        self,
        given: Sequence[Given],
        fits: Sequence[Placed],
        view: Any,
        options: Options,
        to: Backend,
    ) -> tuple[list[str], Callable[[Names], list[tuple[Update, LayerRecord]]]]:
        """Name the layers, and give the function that combines some."""
        layers = terms_by_layer(given, fits, to)
        dtype, draws = self._dtype(given), TorchGenerator(options.seed)
        if options.method in ON_DELTA and options.cut is None:
            options = replace(options, cut=_largest_rank(given))
        return [*layers], lambda names: [
            self._layer(Layer(layers[name], view, to, draws), options, dtype) for name in names
        ]

    def _layer(self, layer: Layer, options: Options, dtype: str) -> tuple[Update, LayerRecord]:
        return combine_layer(layer, options, dtype=dtype)

    def _dtype(self, given: Sequence[Given]) -> str:
        if self.dtype is not None:
            return storage_dtype(self.dtype)
        arrays = [a for one in given for p in one.adapter.sites.values() for a in p.values()]
        return compute_dtype(*(a for a in arrays if is_floating(a)))


def finished(job: Job, given: Sequence[Given], out: StrPath | None, overwrite: bool) -> Made:
    """Run a job, complete its record, and write both, whole or not at all."""
    clock = Clock()
    if out is None:
        made, record = job.run(given)
        return made, _timed(_completed(record, made), clock.lap(job.kind))
    inputs: list[StrPath] = [one.source.path for one in given if one.source.path is not None]
    if isinstance(job.base, str) or hasattr(job.base, "__fspath__"):
        inputs.append(job.base)  # type: ignore[arg-type]
    done: list[Record] = []

    def tell(folder: Path) -> None:
        done[:] = [_timed(done[0], clock.lap("sync"))]
        text = done[0].to_json() + "\n"
        (folder / f"{job.kind}_receipt.json").write_text(text, encoding="utf-8")

    with output_directory(out, overwrite, inputs=inputs, last=tell) as folder:
        made, record = job.run(given)
        made.save(folder)
        done.append(_completed(record, made, str(out)))
        clock.lap(job.kind)
    return made, done[0]


def _timed(record: Record, seconds: dict[str, float]) -> Record:
    return replace(record, seconds=seconds, peak_memory=peak_memory())


def _completed(record: Record, made: Adapter, path: str | None = None) -> Record:
    config: Any = made.config
    out = {"path": path, "peft_type": config.peft_type, "parameters": made.num_parameters}
    if record.ranks:
        out["rank"] = config.r
    return replace(record, out=out, versions=versions())


def _largest_rank(given: Sequence[Given]) -> Cut:
    """Cut to the largest rank of the adapters, as Hugging Face PEFT does."""
    ranks = []
    for one in given:
        config: Any = one.adapter.config
        if config.peft_type not in ("ADALORA", "LORA", "VERA"):
            raise ConfigError(
                f"{one.label}: {config.peft_type} has no rank for a LoRA to take over: give rank= "
                "or energy="
            )
        pattern = config.rank_pattern if config.peft_type == "LORA" else {}
        ranks += [config.init_r if config.peft_type == "ADALORA" else config.r, *pattern.values()]
    return Cut(rank=max(ranks))


def library(given: Sequence[Given], backend: str | Backend) -> Backend:
    """Say where to compute: as asked for, or where the adapters in memory are."""
    if backend != "auto":
        return resolve(backend)
    arrays = [
        a
        for one in given
        if one.source.path is None
        for p in one.adapter.sites.values()
        for a in p.values()
    ]
    return resolve("auto", *arrays)


def said(options: Options) -> dict[str, Any]:
    """List the options that are set."""
    cut = {} if options.cut is None else vars(options.cut)
    found = {
        **cut,
        "density": options.density,
        "majority_sign_method": options.sign if options.rule and options.rule.elect else None,
        "svd_clamp": options.clamp,
        "seed": options.seed if options.rule and options.rule.prune == "random" else None,
    }
    return {name: value for name, value in found.items() if value is not None}

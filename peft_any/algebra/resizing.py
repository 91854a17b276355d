"""Adapters of another rank: cut down to the best approximation, or padded with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft_any._typing import DTypeLike, Params
from peft_any.algebra import lowrank
from peft_any.algebra.combining import Job, Made, finished
from peft_any.algebra.lowrank import Cut, Factors
from peft_any.algebra.record import LayerRecord
from peft_any.algebra.sums import Layer, Options, cut_to, measured, rounded_to
from peft_any.algebra.terms import Base
from peft_any.algebra.written import Update
from peft_any.arguments import checked
from peft_any.backend import Backend, compute_dtype, dtype_name, is_floating, widest
from peft_any.errors import UsageError
from peft_any.io._atomic import StrPath
from peft_any.layer import flat
from peft_any.methods.lora import LoraConfig
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress
from peft_any.surgery.sources import AdapterLike, Given, Kinds, given_adapters

_MAGNITUDE = "lora_magnitude_vector"


@checked
def resize(
    adapter: AdapterLike,
    out: StrPath | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    base: Base = None,
    kinds: Kinds = None,
    rederive: bool = False,
    any_base: bool = False,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    backend: str | Backend = "auto",
    progress: Progress | None = None,
) -> Made:
    """Give an adapter another rank: a LoRA, whatever method it had.

    A layer that loses rank gets the best approximation of its ΔW; one that gains rank is padded
    with zeros, and its numbers stay as they are, bit for bit. DoRA keeps its magnitudes, and
    B·A is what is approximated.

    Parameters
    ----------
    adapter : path or Adapter
    out : path, optional
        The output directory: it appears whole, with ``resize_receipt.json``, or not at all.
    rank : int, optional
        Alone: the rank of every layer, up or down. With one of the others: the largest.
    energy : float, optional
        The fewest singular values that hold this share of ‖ΔW‖² = Σ s².
    sv_ratio : float, optional
        Those above the largest divided by this. As kohya's ``resize_lora.py`` has them:
    sv_fro, sv_cumulative : float, optional
        the fewest that hold this share of ‖ΔW‖, or of Σ s.
    base, kinds, rederive, any_base
        As for `combine`.
    dtype : str or dtype of any library, optional
        By default the adapter's own.
    overwrite, backend, progress
        As for `combine`.

    Returns
    -------
    adapter : Adapter
    record : Record
        As of `combine`, its kind ``resize``.

    Raises
    ------
    PeftError
        Before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.adapter import Adapter
    >>> from peft_any.methods.lora import LoraConfig
    >>> p = {"lora_A.weight": np.eye(2, 9), "lora_B.weight": np.eye(8, 2) * [3.0, 1.0]}
    >>> given = Adapter(LoraConfig(r=2, lora_alpha=2), {"fc": p})
    >>> made, record = resize(given, rank=1)
    >>> made.config.r, round(record.layers[0].discarded, 12)
    (1, 0.1)
    >>> resize(given, rank=16)[0].sites["fc"]["lora_A.weight"].shape
    (16, 9)
    """
    selectors = {"energy": energy, "sv_ratio": sv_ratio, "sv_fro": sv_fro}
    cut = Cut(rank=rank, **selectors, sv_cumulative=sv_cumulative)
    if rank is None and not cut.reads_values:
        raise UsageError("resize: no rank is given: give rank=, energy= or another selector")
    given = given_adapters([adapter])
    fit = Fitting(rederive=rederive, kinds=kinds, any_base=any_base)
    job = Resizing("resize", Options(cut=cut), fit, base, dtype, backend, progress)
    return finished(job, given, out, overwrite)


class Resizing(Job):
    """Resizes the one adapter given."""

    def run(self, given: Sequence[Given]) -> Made:
        """Cut or pad every layer; the magnitudes of DoRA are set aside meanwhile."""
        (one,) = given
        config = one.adapter.config
        if not (isinstance(config, LoraConfig) and config.use_dora):
            return super().run(given)
        sites = one.adapter.sites
        rest = {n: {k: a for k, a in p.items() if k != _MAGNITUDE} for n, p in sites.items()}
        plain = one.adapter.replace(config=replace(config, use_dora=False), sites=rest)
        made, record = super().run([replace(one, adapter=plain)])
        whole: dict[str, Params] = {
            n: p | {k: a for k, a in sites[n].items() if k == _MAGNITUDE}
            for n, p in made.sites.items()
        }
        fields: dict[str, Any] = {"use_dora": True}
        made = made.replace(config=replace(made.config, **fields), sites=whole)
        note = "DoRA: the magnitudes are kept, and errors are those of B·A"
        return made, replace(record, warnings=(*record.warnings, note))

    def _layer(self, layer: Layer, options: Options, dtype: str) -> tuple[Update, LayerRecord]:
        (whole,), shift = layer.effects()
        cut = options.cut or Cut(energy=1.0)
        made, lost = cut_to(whole, cut, layer)
        scale, before = 1.0, int(whole[1].shape[0])
        if made[1].shape[0] >= before:
            (made, scale), lost = _untouched(layer, whole), 0.0
        if not cut.reads_values and cut.rank is not None:
            made = lowrank.pad(made, cut.rank)
        stored = rounded_to(dtype, made, layer.site.name)
        update = Update(layer.site, stored, shift, scale)
        scaled = (scale * widest(made[0]), made[1])
        record = measured(layer, update, [whole], whole=whole, made=scaled, wanted=whole, lost=lost)
        return update, record

    def _dtype(self, given: Sequence[Given]) -> str:
        arrays = [a for p in given[0].adapter.sites.values() for a in p.values() if is_floating(a)]
        names = {dtype_name(a) for a in arrays}
        if self.dtype is None and len(names) == 1 and compute_dtype(*names) in names | {"float32"}:
            return names.pop()
        return super()._dtype(given)


def _untouched(layer: Layer, whole: Factors) -> tuple[Factors, float]:
    """Give a LoRA's own B and A and its scale; any other method's factors, with scale 1."""
    (term,) = layer.terms
    config = term.config
    if not isinstance(config, LoraConfig) or config.use_bdlora or "start_A" in term.params:
        return whole, 1.0
    (a, _), (b, _) = list(config.shapes(term.site).items())[:2]
    return (flat(term.params[b]), flat(term.params[a])), config.scaling

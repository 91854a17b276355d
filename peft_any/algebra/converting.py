"""An adapter of any method that changes weights as a plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from peft_any._typing import DTypeLike
from peft_any.algebra.combining import Job, Made, finished
from peft_any.algebra.lowrank import Cut
from peft_any.algebra.record import LayerRecord
from peft_any.algebra.sums import Options
from peft_any.algebra.terms import Base
from peft_any.arguments import checked
from peft_any.backend import Backend, namespace
from peft_any.errors import ConfigError, UsageError, nearest
from peft_any.io._atomic import StrPath
from peft_any.method import Prompt
from peft_any.registry import method_names
from peft_any.surgery.choice import EngineLike, engine_of
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress
from peft_any.surgery.sources import AdapterLike, Given, Kinds, given_adapters


@checked
def convert(
    adapter: AdapterLike,
    out: StrPath | None = None,
    *,
    to: str = "LORA",
    rank: int | None = None,
    energy: float | None = None,
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
    """Convert an adapter to a plain LoRA that adds the same to every weight.

    Without `rank` and `energy` the LoRA is exact but for the rounding of its factors, whatever
    rank that takes: the method's own where its ΔW is a product by structure (LoRA with its
    variants, AdaLoRA, VeRA, MiSS, DeLoRA, LoHa, LoKr; given the base HRA, DEFT, PEANUT), otherwise
    up to the smaller side of a layer.

    Parameters
    ----------
    adapter : path or Adapter
        Of any method that changes weights.
    out : path, optional
        The output directory: it appears whole, with ``convert_receipt.json``, or not at all.
    to : str
        ``LORA``.
    rank : int, optional
        The largest rank of a layer: the best approximation of its ΔW.
    energy : float, optional
        The share of every ‖ΔW‖² to keep; with `rank` too, the smaller rank of the two.
    base : path or mapping of str to array, optional
        The model: needed where ΔW depends on it (DoRA, IA³, OFT, BOFT, HRA …), and where the
        adapter's arrays do not tell the sizes of its layers.
    kinds, rederive, any_base, dtype, overwrite, backend, progress, engine
        As for `combine`.

    Returns
    -------
    adapter : Adapter
    record : Record
        As of `combine`, its kind ``convert``: of every layer the rank, and how far the stored
        factors are from ΔW.

    Raises
    ------
    PeftError
        Before anything is written. `ConfigError` for methods without a ΔW; `UsageError` for
        another method than LoRA to make.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import Adapter, MissConfig
    >>> blocks = np.ones((2, 8), dtype="float32")
    >>> shards = Adapter(MissConfig(r=2, target_modules=["fc"]), {"fc": {"miss_block": blocks}})
    >>> base = {"fc.weight": np.zeros((8, 6), dtype="float32")}
    >>> made, record = convert(shards, base=base)
    >>> made.config.peft_type, made.config.r, record.error
    ('LORA', 2, 0.0)
    """
    if to.upper() != "LORA":
        wrong = to.upper() in method_names()
        raise UsageError(
            f"convert: to={to!r} cannot be made{'' if wrong else nearest(to.upper(), ['LORA'])}: "
            "a LoRA can stand for any ΔW, no other method can: give to='LORA'"
        )
    given = given_adapters([adapter])
    config = given[0].adapter.config
    if isinstance(config, Prompt):
        raise ConfigError(
            f"{given[0].label}: {config.peft_type} cannot be converted: it changes no weight, its "
            "virtual tokens stand before the input"
        )
    cut = None if rank is None and energy is None else Cut(rank=rank, energy=energy)
    fit = Fitting(rederive=rederive, kinds=kinds, any_base=any_base)
    job = Converting(
        "convert", Options(cut=cut), fit, base, dtype, backend, progress, engine_of(engine)
    )
    return finished(job, given, out, overwrite)


class Converting(Job):
    """Converts the one adapter given."""

    keeps_gains = False

    def run(self, given: Sequence[Given]) -> Made:
        """Make the LoRA, and tell which layers' factors are no smaller than the layers."""
        made, record = super().run(given)
        large = [layer.layer for layer in record.layers if _no_smaller(layer)]
        if large:
            some = ", ".join(large[:3]) + (" …" if len(large) > 3 else "")
            note = (
                f"{some}: the factors are no smaller than the layer, as in {len(large)} of "
                f"{len(record.layers)} layers: give a rank or an energy for small ones"
            )
            record = replace(record, warnings=(*record.warnings, note))
        biases = {name: p.get("lora_B.bias") for name, p in made.sites.items()}
        idle = [n for n, b in biases.items() if b is not None and not namespace(b).any(b != 0)]
        if idle:
            some = ", ".join(idle[:3]) + (" …" if len(idle) > 3 else "")
            note = (
                f"{some}: no bias changes here, but lora_bias=true counts for every layer: "
                "those without a bias cannot be merged with it, here or in Hugging Face PEFT; "
                "apply the LoRA without merging, or merge the adapter as it was"
            )
            record = replace(record, warnings=(*record.warnings, note))
        return made, record


def _no_smaller(layer: LayerRecord) -> bool:
    return layer.rank is not None and layer.rank * sum(layer.shape) >= prod(layer.shape)

"""IA³ adapters of one kind are combined by their gains: the result is IA³ again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.algebra.record import LayerRecord
from peft_any.backend import Backend, astype, move, widest
from peft_any.errors import ShapeError
from peft_any.layer import Site
from peft_any.methods.ia3 import IA3Config
from peft_any.surgery.sources import Given


def all_gains(given: Sequence[Given]) -> bool:
    """Whether every adapter is an IA³ one."""
    return all(isinstance(one.adapter.config, IA3Config) for one in given)


def combined_gains(
    given: Sequence[Given], backend: Backend, dtype: str, *, plain: bool
) -> tuple[Adapter, list[LayerRecord]]:
    """Sum the effects of IA³ adapters.

    The effect of a gain l is (l − 1)·W, so the weighted sum is that of l = 1 + Σ wᵢ·(lᵢ − 1), on
    the weight and on the bias.

    Parameters
    ----------
    given : sequence of Given
    backend : Backend
    dtype : str
    plain : bool
        Take l = Σ wᵢ·lᵢ instead, over the adapters that have the layer, as Hugging Face PEFT.

    Raises
    ------
    ShapeError
        If a layer scales its input in one adapter and its output in another.
    """
    layers: dict[str, list[tuple[Given, Array, bool]]] = {}
    for one in given:
        config: Any = one.adapter.config
        for name, params in one.adapter.sites.items():
            gain = widest(move(params["ia3_l"], backend))
            inward = config.is_feedforward(Site(name, 1, 1))
            layers.setdefault(name, []).append((one, gain, inward))
    sites: dict[str, Params] = {}
    records, inward_of = [], {}
    for name, shares in layers.items():
        labels = tuple(one.label for one, _, _ in shares)
        if len({(tuple(gain.shape), inward) for _, gain, inward in shares}) > 1:
            raise ShapeError(
                f"{name}: the gains of {' and '.join(labels)} cannot be summed: they scale "
                "different sides of the layer, or are not of one base; give base= (--base) and a "
                "rank, for a LoRA"
            )
        _, total, inward_of[name] = shares[0]
        total = 0.0 * total if plain else 0.0 * total + 1.0
        for one, gain, _ in shares:
            total = total + one.weight * (gain if plain else gain - 1.0)
        sites[name] = {"ia3_l": astype(total, dtype)}
        records.append(LayerRecord(name, labels, tuple(total.shape), (), None, None))
    return Adapter(_config([one.adapter.config for one in given], inward_of), sites), records


def _config(configs: Sequence[Any], inward: Mapping[str, bool]) -> IA3Config:
    """Name the layers as the adapters do, where that says which ones scale their input."""
    first, agree = configs[0], all(c.task_type == configs[0].task_type for c in configs)
    config = IA3Config(
        target_modules=sorted(inward),
        feedforward_modules=[name for name in sorted(inward) if inward[name]],
        fan_in_fan_out=any(c.fan_in_fan_out for c in configs),
        task_type=first.task_type if agree else None,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    lists = [(c.target_modules, c.feedforward_modules or []) for c in configs]
    whole = not any(c.exclude_modules for c in configs)
    if whole and all(isinstance(entries, list) for pair in lists for entries in pair):
        targets, feed = (
            sorted({e for entries in side for e in entries}) for side in zip(*lists, strict=True)
        )
        short = replace(config, target_modules=targets, feedforward_modules=feed)
        if all(short.is_feedforward(Site(name, 1, 1)) == side for name, side in inward.items()):
            return short
    return config

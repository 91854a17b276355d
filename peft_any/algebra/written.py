"""Changes of low rank, written as a LoRA adapter that Hugging Face PEFT loads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.algebra.lowrank import Factors, pad
from peft_any.backend import astype, creation_device, namespace
from peft_any.errors import ConfigError
from peft_any.layer import Kind, Site
from peft_any.method import Tuner
from peft_any.methods.lora import LoraConfig
from peft_any.patterns import matching
from peft_any.selection import out_projection
from peft_any.targets import configured

_COMMON = frozenset[Kind]({"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"})
"""What modules of one name may be that LoRA adapts."""


@dataclass(frozen=True)
class Update:
    """What a layer is to gain: ΔW = scale·u·v, and Δb if its bias moves.

    Attributes
    ----------
    site : Site
    factors : (array (n_out, k), array (k, width))
        k = 0 is written as rank 1 with zeros: a file has no rank 0.
    bias : array (n_out,) or None
    scale : float
        Written as α = scale·r.
    """

    site: Site
    factors: Factors
    bias: Array | None = None
    scale: float = 1.0


def lora_adapter(
    updates: Sequence[Update], configs: Sequence[Tuner] = (), *, dtype: str = "float32"
) -> Adapter:
    """Write changes as a LoRA adapter, each layer of the rank of its factors.

    Parameters
    ----------
    updates : sequence of Update
        One for each layer.
    configs : sequence of Tuner
        Those of the adapters that the changes come from: `target_modules`, `task_type` and the
        base's name are taken over where they still say the same.
    dtype : str
        Of the factors as they are stored.

    Returns
    -------
    Adapter
        With `rank_pattern` and `alpha_pattern` where layers differ.

    Raises
    ------
    ConfigError
        If LoRA cannot adapt a layer: a convolution of several groups, an embedding's bias.

    Examples
    --------
    >>> import numpy as np
    >>> change = Update(Site("fc", 3, 2), (np.ones((2, 1)), np.ones((1, 3))))
    >>> adapter = lora_adapter([change])
    >>> adapter.config.r, adapter.sites["fc"]["lora_A.weight"].shape
    (1, (1, 3))
    """
    by_name = {u.site.name: u for u in updates}
    sites = {name: u.site for name, u in by_name.items()}
    ranks = _ranks(by_name)
    config = replace(
        _common(configs, [*sites]),
        **_patterns(ranks, by_name),
        lora_bias=any(u.bias is not None for u in updates),
    )
    params = {
        name: _params(by_name[name], own, ranks[name], dtype)
        for name, own in configured(config, sites).items()
        if isinstance(own, LoraConfig)
    }
    return Adapter(config, params)


def _params(update: Update, config: LoraConfig, rank: int, dtype: str) -> Params:
    """Shape the factors as the layer's parameters."""
    u, v = pad(update.factors, rank)
    xp = namespace(u, v)
    shapes = config.shapes(update.site)
    (a, of_a), (b, of_b) = list(shapes.items())[:2]
    if config.scaling != update.scale:  # the output half of a packed attention counts twice
        u = u * (update.scale / config.scaling)
    p = {a: xp.reshape(astype(v, dtype), of_a), b: xp.reshape(astype(u, dtype), of_b)}
    if config.lora_bias:
        shift = update.bias
        if shift is None:
            shift = xp.zeros((update.site.n_out,), dtype=u.dtype, device=creation_device(u))
        p["lora_B.bias"] = astype(shift / config.scaling, dtype)
    return p


def _ranks(updates: Mapping[str, Update]) -> dict[str, int]:
    """Give every layer its rank; the two halves of a packed attention share one, as in files."""
    ranks = {name: max(int(u.factors[1].shape[0]), 1) for name, u in updates.items()}
    for name, u in updates.items():
        half = out_projection(name)
        if u.site.kind == "MultiheadAttention" and half in ranks:
            ranks[name] = ranks[half] = max(ranks[name], ranks[half])
    return ranks


def _patterns(ranks: Mapping[str, int], updates: Mapping[str, Update]) -> dict[str, Any]:
    """Say ranks and alphas: the commonest for all, and the others by name."""
    packed = [n for n, u in updates.items() if u.site.kind == "MultiheadAttention"]
    halves = set(map(out_projection, packed))
    own = {name: rank for name, rank in ranks.items() if name not in halves}
    alphas = {name: updates[name].scale * rank for name, rank in own.items()}
    r, rank_pattern = _pattern(own)
    alpha, alpha_pattern = _pattern(alphas)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Find the commonest value, and a pattern for the names that have another."""
    common = Counter(values.values()).most_common(1)[0][0] if values else 1
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        if value != common:
            # a plain name also matches what ends with it after a dot
            alone = all(v == value for other, v in values.items() if other.endswith(f".{name}"))
            pattern[name if alone else f"^{re.escape(name)}"] = value
    for name, value in values.items():
        if matching(pattern, name, common) != value:
            raise ConfigError(f"{name}: {value} cannot be told apart by the layer's name")
    return common, pattern


def _common(configs: Sequence[Tuner], names: Sequence[str]) -> LoraConfig:
    """Start the configuration with what those of the parts agree on."""

    def agreed(field: str) -> Any:
        values = [getattr(c, field, None) for c in configs]
        return values[0] if values and all(v == values[0] for v in values) else None

    return LoraConfig(
        target_modules=_targets(configs, names),
        task_type=agreed("task_type"),
        base_model_name_or_path=agreed("base_model_name_or_path"),
        fan_in_fan_out=any(getattr(c, "fan_in_fan_out", False) for c in configs),
        layer_replication=_repeated(configs),
    )


def _repeated(configs: Sequence[Tuner]) -> list[list[int]] | None:
    """Give the runs of layers that all parts repeat, since they share one base."""
    found = [getattr(c, "layer_replication", None) or None for c in configs]
    if any(runs != found[0] for runs in found):
        raise ConfigError(
            f"layer_replication: adapters of {' and '.join(map(str, found))} cannot become one: "
            "their bases have other layers; combine those of one base"
        )
    return found[0] if found else None


def _targets(configs: Sequence[Tuner], names: Sequence[str]) -> list[str]:
    """Unite the lists of targets; where rules say more than a list can, name every layer.

    So do lists of a method that passes by layers of their names which LoRA would take.
    """
    lists = [c.target_modules for c in configs if isinstance(c.target_modules, list)]
    rules = ("exclude_modules", "layers_to_transform", "layers_pattern")
    alike = all(c.kinds >= _COMMON for c in configs)
    plain = alike and all(
        getattr(c, rule, None) in (None, [], "") for c in configs for rule in rules
    )
    united = sorted({entry for entries in lists for entry in entries})
    reached = all(any(f".{n}".endswith(f".{entry}") for entry in united) for n in names)
    if configs and plain and len(lists) == len(configs) and reached:
        return united
    halves = set(map(out_projection, names))
    return sorted(name for name in names if name not in halves)

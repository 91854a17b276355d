"""What "all-linear" means where experts are stacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft_any.layout import layout, shape_of
from peft_any.method import Tuner
from peft_any.selection import Rules

_PAIR = ("gate_up_proj", "down_proj")
_ROUTERS = ("gate", "router")
_APART = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Last names of what transformers 4 had as layers of experts, and of the router."""


def with_experts(config: Tuner, weights: Mapping[str, Any]) -> Tuner:
    r"""Let "all-linear" mean what Hugging Face PEFT adapts where experts are stacked.

    LoRA adapts a pair (experts, 2·m, n) and (experts, n, m), `gate_up_proj` and `down_proj`, and
    the router by `target_parameters`, the fused one with 2r and 2α, and other layers by their last
    names. Beside a transposed pair (GPT-OSS), and for other methods, the router is left out: it is
    no linear layer in memory.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> base = {"e.gate_up_proj": np.zeros((2, 6, 4)), "e.down_proj": np.zeros((2, 4, 3))}
    >>> base["q_proj.weight"] = np.zeros((4, 4))
    >>> found = with_experts(LoraConfig(r=2, target_modules="all-linear"), base)
    >>> found.target_modules, found.target_parameters, found.rank_pattern
    (['q_proj'], ['down_proj', 'gate_up_proj'], {'.*\\.gate_up_proj': 4})
    """
    own: Any = config
    if str(config.target_modules).lower() != "all-linear":
        return config
    pairs = {
        name.removesuffix(f".{_PAIR[0]}"): plain
        for name in weights
        if (plain := _plain(weights, name)) is not None
    }
    if not pairs:
        return config
    sites, rules = layout(weights, config=config), Rules.of(config)
    linear = [n for n, s in sites.items() if rules.linear(n, s) and not rules.excluded(n)]
    above = {module.rpartition(".")[0] for module in pairs}
    routers = {n for n in linear if n.rpartition(".")[0] in above and _last(n) in _ROUTERS}
    if config.peft_type != "LORA" or not all(pairs.values()):
        return replace(config, target_modules=[n for n in linear if n not in routers])
    router = ["gate.weight"] if any(_last(n) == "gate" for n in routers) else []
    changes: dict[str, Any] = {
        "target_parameters": sorted({*(own.target_parameters or ()), *_PAIR, *router}),
        "rank_pattern": {**own.rank_pattern, r".*\.gate_up_proj": 2 * own.r},
        "alpha_pattern": {**own.alpha_pattern, r".*\.gate_up_proj": 2 * own.lora_alpha},
    }
    return replace(config, target_modules=sorted({*map(_last, linear)} - _APART), **changes)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(weights: Mapping[str, Any], name: str) -> bool | None:
    """Whether a pair stacks (n_out, n_in), and not the transposed; None where it is no pair."""
    other = f"{name.removesuffix(_PAIR[0])}{_PAIR[1]}"
    if not name.endswith(f".{_PAIR[0]}") or other not in weights:
        return None
    up, down = shape_of(weights, name), shape_of(weights, other)
    return None if len(up) != 3 or len(down) != 3 else up == (down[0], 2 * down[2], down[1])

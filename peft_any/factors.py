"""LoRA's factors: their shapes on every kind of layer, and what they do on stacks of experts."""

from __future__ import annotations

from typing import Any

from peft_any._typing import Array, Params, Shape
from peft_any.backend import creation_device, is_differentiated, namespace
from peft_any.layer import EXPERTS, Site, each_expert

EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
"""What A and B of an embedding are called."""


def factor_shapes(r: int, site: Site) -> dict[str, Shape]:
    """Name A and B, with their shapes in the layouts of torch's own layers.

    Those of experts hold all of them, of rank r each: `target_parameters`.

    Examples
    --------
    >>> factor_shapes(2, Site("m.experts.up", 12, 20, "Experts", groups=4, bias=False))
    {'lora_A.weight': (8, 3), 'lora_B.weight': (5, 8)}
    >>> factor_shapes(2, Site("wte", 9, 4, "Embedding"))
    {'lora_embedding_A': (2, 9), 'lora_embedding_B': (4, 2)}
    """
    if site.kind == "Embedding":
        return dict(zip(EMBEDDING, ((r, site.n_in), (site.n_out, r)), strict=True))
    groups = site.groups if site.kind in EXPERTS else 1
    ones = (1,) * len(site.kernel)
    return {
        "lora_A.weight": (r * groups, site.n_in // groups, *site.kernel),
        "lora_B.weight": (site.n_out // groups, r * groups, *ones),
    }


def expert_factors(p: Params, site: Site) -> tuple[Array, Array]:
    """Give B (experts, n_out, r) and A (experts, r, n_in).

    Files hold the experts one below the other in A; in B they alternate (Hugging Face PEFT).
    """
    a, experts = p["lora_A.weight"], site.groups
    a = namespace(a).reshape(a, (experts, -1, a.shape[1]))
    return _stacked(p["lora_B.weight"], experts), a


def expert_delta(p: Params, site: Site) -> Array:
    """B·A of every expert, one below the other."""
    b, a = expert_factors(p, site)
    return namespace(a, b).reshape(b @ a, (site.n_out, site.width))


def expert_residual(p: Params, x: Array, site: Site) -> Array:
    """B·(A·x) of every expert."""
    b, a = expert_factors(p, site)
    return each_expert(each_expert(x, a), b)


def by_expert(b: Array, site: Site) -> Array:
    """Put the experts' B on a block diagonal (n_out, experts·r), for A as it is stored.

    Other layers' B stays what it is.
    """
    if site.kind not in EXPERTS:
        return b
    xp, experts = namespace(b), site.groups
    b = _stacked(b, experts)
    eye = xp.eye(experts, dtype=b.dtype, device=creation_device(b))
    blocks = xp.expand_dims(b, axis=2) * xp.reshape(eye, (experts, 1, experts, 1))
    return xp.reshape(blocks, (site.n_out, b.shape[2] * experts))


def _stacked(b: Array, experts: int) -> Array:
    xp = namespace(b)
    return xp.permute_dims(xp.reshape(b, (b.shape[0], -1, experts)), (2, 0, 1))


def paired(config: Any, p: Params, site: Site) -> Params:
    """Add the factors of ΔW for all calls; not where a derivative is asked for."""
    if any(map(is_differentiated, p.values())):
        return p
    u, v = config.factors(p, site)
    return {**p, "u": u, "v": v}

"""LoRA's initial values, the products they take out of the base, and the layers it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft_any._typing import Array, Params, Shape
from peft_any.backend import namespace
from peft_any.decompositions import annihilating_factors, host_weight, starting_factors
from peft_any.errors import ConfigError, nearest
from peft_any.factors import EMBEDDING
from peft_any.layer import EXPERTS, Kind, Site
from peft_any.rng import Fresh

FOREIGN = {
    "corda": "it needs the covariance of the layer's inputs",
    "eva": "it needs the layer's inputs",
    "loftq": "it needs a quantiser",
    "lora_ga": "it needs gradients",
}
"""Inits that cannot be computed from the base alone, and why."""
VARIANTS = {
    "use_qalora": "QALoRA needs its quantised base, layers of GPTQ, and Hugging Face PEFT neither "
    "merges nor converts it: run it there, on that base"
}
"""Fields of a LoRA file that change the maths and are not supported, and what they do."""
MISFITS: dict[str, frozenset[Kind]] = {
    "lora_bias": frozenset({"Embedding", "MultiheadAttention", *EXPERTS}),
    "use_dora": frozenset({"MultiheadAttention", *EXPERTS}),
    "lora_dropout": EXPERTS,
}
"""Layer kinds that a flag of LoRA cannot adapt."""
FROZEN = (
    frozenset({"start_A", "start_B"}),
    frozenset({"start_A", "start_B", "lora_B.weight", "lora_embedding_B"}),
)
"""Parameters of LoRA that are never trained: of any, and of MiCA."""


def check_site(config: Any, site: Site) -> None:
    """Refuse a layer that LoRA, or one of its flags, cannot adapt.

    Raises
    ------
    ConfigError
    """
    if site.groups > 1 and site.kind not in EXPERTS:
        raise ConfigError(
            f"{site.name}: LORA cannot adapt a convolution of several groups: its factors mix all "
            "input channels; name it in exclude_modules"
        )
    for flag, kinds in MISFITS.items():
        if getattr(config, flag) and site.kind in kinds:
            raise ConfigError(f"{site.name}: {flag} cannot adapt a {site.kind} layer")


def has_start(init: bool | str | None) -> bool:
    """Whether an `init_lora_weights` takes an initial product out of the base.

    Examples
    --------
    >>> has_start("pissa_niter_16"), has_start("gaussian")
    (True, False)
    """
    how = str(init)
    return how in ("pissa", "olora") or (how[:12] == "pissa_niter_" and how[12:].isdigit())


def missing(init: bool | str | None, p: Params) -> str | None:
    """Say that parameters lack the product taken out of the base, if they do."""
    if not has_start(init) or "start_A" in p or EMBEDDING[0] in p:
        return None
    return f"the product that init_lora_weights={init!r} took out of the base"


def check(config: Any) -> None:
    """Refuse a LoRA configuration that contradicts itself, or an init that does not exist.

    Raises
    ------
    ConfigError
    """
    if config.r < 1:
        raise ConfigError(f"{config.where}: r={config.r} cannot be a rank: give at least 1")
    if config.use_dora and config.lora_bias:
        raise ConfigError(f"{config.where}: lora_bias cannot go with use_dora")
    check_init(config)


def check_init(config: Any) -> None:
    """Refuse an `init_lora_weights` that does not exist.

    Raises
    ------
    ConfigError
        With the names that there are.
    """
    init = config.init_lora_weights
    known = ("gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", *FOREIGN)
    if isinstance(init, str) and init not in known and not has_start(init):
        raise ConfigError(
            f"{config.where}: init_lora_weights={init!r} is not known{nearest(init, known)}: "
            f"true, false, {', '.join(known)}"
        )


def starting_pair(how: str, site: Site, r: int, scale: float, new: Fresh) -> tuple[Array, Array]:
    """Make the factors a (r, n_in) and b (n_out, r) that an `init_lora_weights` names.

    Decompositions run on the host, so that every library starts from the same numbers.

    Raises
    ------
    ConfigError
        If the init needs data or a quantiser, no base is at hand, or the layer does not fit.
    """
    if how in FOREIGN:
        raise ConfigError(
            f"{site.name}: init_lora_weights={how!r} cannot be computed here: {FOREIGN[how]}; "
            "make the adapter where that is at hand, and load it"
        )
    if site.kind not in ("Linear", "Conv1D") or r > min(site.n_in, site.n_out):
        raise ConfigError(
            f"{site.name}: init_lora_weights={how!r} cannot start a {site.kind} of {site.n_in} "
            f"inputs and {site.n_out} outputs at r={r}: it needs a linear layer of that rank"
        )
    draw, half = new.host.standard_normal, r // 2
    if how == "orthogonal":
        if r % 2:
            raise ConfigError(f"{site.name}: 'orthogonal' cannot halve r={r}: give an even rank")
        a, b = annihilating_factors(draw((r, r)), draw((site.n_in, half)), draw((site.n_out, half)))
    else:
        w = host_weight(new, site, f"init_lora_weights={how!r}")
        sketch = draw((site.n_in, min(r + 8, *w.shape))).astype(w.dtype)
        a, b = starting_factors(how, w, r, scale, sketch)
    return new.array(a), new.array(b)


def initial_factors(
    init: bool | str | None, shapes: Mapping[str, Shape], site: Site, scale: float, new: Fresh
) -> Params:
    """Draw A and B, the first two of `shapes`, as an `init_lora_weights` says."""
    (a, of_a), (b, of_b) = list(shapes.items())[:2]
    if init == "mica":
        return {a: new.zeros(of_a), b: new.array(_minor_vectors(site, of_a[0], new))}
    if site.kind == "Embedding":  # HF gives embeddings these values whatever the init's name
        return {a: new.zeros(of_a) if init else new.normal(of_a), b: new.normal(of_b)}
    if init == "gaussian":
        return {a: new.normal(of_a, 1 / of_a[0]), b: new.zeros(of_b)}
    if not isinstance(init, str):
        return {a: new.kaiming(of_a), b: new.zeros(of_b) if init else new.kaiming(of_b)}
    first, second = starting_pair(init, site, of_a[0], scale, new)
    kept = {"start_A": first, "start_B": second} if has_start(init) else {}
    return {a: first, b: second, **kept}


def _minor_vectors(site: Site, r: int, new: Fresh) -> Array:
    """The left singular vectors (n_out, r) of the base's r smallest singular values."""
    if site.kind not in ("Linear", "Conv1D", "Embedding") or r > min(site.n_in, site.n_out):
        raise ConfigError(
            f"{site.name}: init_lora_weights='mica' cannot start a {site.kind} of {site.n_in} "
            f"inputs and {site.n_out} outputs at r={r}: it needs a linear layer or an embedding "
            "of that rank"
        )
    w = host_weight(new, site, "init_lora_weights='mica'")
    return namespace(w).linalg.svd(w, full_matrices=False)[0][:, -r:]


def less_start(a: Array, b: Array, p: Params) -> tuple[Array, Array]:
    """Append the product taken out of the base, so that b·a is what is left of it.

    Raises
    ------
    ConfigError
        If the parameters do not hold that product, as in an unconverted file.
    """
    if "start_A" not in p:
        raise ConfigError(
            "init_lora_weights: this adapter cannot be applied without the product that was taken "
            "out of the base: add it with rederive=True, or convert the file where it was made"
        )
    xp = namespace(a, b)
    return xp.concat([a, p["start_A"]], axis=0), xp.concat([b, -p["start_B"]], axis=1)


def folded(config: Any, sites: Mapping[str, Params]) -> tuple[Any, dict[str, Params]]:
    """Give a LoRA of twice the rank and the same scaling, with nothing taken out of the base.

    What was read from a file that tells no start stays as it is.
    """
    if not has_start(config.init_lora_weights) or not any("start_A" in p for p in sites.values()):
        return config, dict(sites)
    grow = 2**0.5 if config.use_rslora else 2.0
    wide = replace(
        config,
        r=2 * config.r,
        lora_alpha=grow * config.lora_alpha,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: grow * v for k, v in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return wide, {name: _fold_start(p) for name, p in sites.items()}


def _fold_start(p: Params) -> Params:
    """Fold a₀ and b₀ into the factors; an embedding's, without any, get zeros."""
    names = EMBEDDING if EMBEDDING[0] in p else ("lora_A.weight", "lora_B.weight")
    a, b = (p[name] for name in names)
    if names == EMBEDDING:
        none = namespace(a, b).zeros_like
        p = {**p, "start_A": none(a), "start_B": none(b)}
    kept = {k: v for k, v in p.items() if not k.startswith("start_")}
    return {**kept, **dict(zip(names, less_start(a, b, p), strict=True))}

"""LoRA's variants: what a flag makes of its parameters; BD-LoRA's blocks, KaSA's base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from peft_any import alora, starts
from peft_any._tree import without
from peft_any._typing import Array, Params, Shape
from peft_any.backend import astype, compute_dtype, detach, namespace, to_numpy
from peft_any.blocks import block_diagonal, block_linear
from peft_any.checks import refuse
from peft_any.errors import ConfigError
from peft_any.factors import (
    EMBEDDING,
    by_expert,
    expert_delta,
    expert_residual,
    factor_shapes,
    paired,
)
from peft_any.layer import EXPERTS, Layer, Site, flat, linear, widen
from peft_any.linalg import orthogonality, row_norms
from peft_any.patterns import is_parameter, matching
from peft_any.rng import Fresh

C = TypeVar("C", bound=Any)


@dataclass(frozen=True, kw_only=True)
class KasaConfig:
    """Weights of KaSA's two regularisers, which `fit` adds to the loss.

    Attributes
    ----------
    beta : float
        Of ‖d‖².
    gamma : float
        Of ‖BᵀB − I‖ + ‖AAᵀ − I‖.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    @property
    def where(self) -> str:
        """The class's name, with which its errors begin."""
        return type(self).__name__

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            refuse(self, **{name: (getattr(self, name) >= 0, "at least 0")})

    def regularizer(self, sites: Iterable[Params]) -> Array | None:
        """Give β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖), summed over all sites (eq. 9 to 11)."""
        terms = []
        for p in sites:
            if "lora_diag" in p:
                kind = compute_dtype(*p.values())
                d, a, b = (
                    astype(p[k], kind) for k in ("lora_diag", "lora_A.weight", "lora_B.weight")
                )
                xp = namespace(a, b)
                gaps = orthogonality(xp.matrix_transpose(b)) + orthogonality(a)
                terms.append(self.beta * xp.sum(d * d) + self.gamma * gaps)
        return sum(terms[1:], terms[0]) if terms else None


@dataclass(frozen=True, kw_only=True)
class BdLoraConfig:
    """Which factors BD-LoRA makes block-diagonal.

    Attributes
    ----------
    target_modules_bd_a, target_modules_bd_b : list of str, optional
        What stands in the names of layers of which A, or B, is block-diagonal.
    nblocks : int
    match_strict : bool
        Whether a layer that neither list names is an error, or else a plain LoRA's.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    @property
    def where(self) -> str:
        """The class's name, with which its errors begin."""
        return type(self).__name__

    def __post_init__(self) -> None:
        refuse(self, nblocks=(self.nblocks >= 1, "at least 1"))

    def factor(self, site: Site) -> str | None:
        """Name the factor that is block-diagonal: "A", "B" or none.

        Raises
        ------
        ConfigError
            If the layer is named twice, or not at all.
        """
        lists = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        found = [f for f, parts in lists.items() if any(part in site.name for part in parts or ())]
        if len(found) == 1 or not (found or self.match_strict):
            return found[0] if found else None
        raise ConfigError(
            f"{site.name}: use_bdlora cannot tell which factor is block-diagonal: "
            f"target_modules_bd_a and target_modules_bd_b name it {len(found)} times; name it in "
            "one, or set match_strict=False"
        )


def check(config: Any) -> None:
    """Refuse a LoRA configuration that contradicts itself, or variants that exclude each other.

    Raises
    ------
    ConfigError
    """
    starts.check(config)
    alora.check(config)
    init = config.init_lora_weights
    others = (config.use_dora, config.lora_bias, config.target_parameters, config.kasa_config)
    if config.use_bdlora and (any(others) or init not in (True, False, None, "gaussian")):
        raise ConfigError(
            f"{config.where}: use_bdlora cannot go with use_dora, lora_bias, target_parameters, "
            "kasa_config or an init_lora_weights but true, false and gaussian"
        )
    if init == "mica" and (config.use_dora or config.lora_bias or config.target_parameters):
        raise ConfigError(
            f"{config.where}: init_lora_weights='mica' cannot go with use_dora, lora_bias or "
            "target_parameters"
        )
    if config.kasa_config is None:
        return
    start = starts.has_start(init) or init == "mica"
    if config.use_dora or config.target_parameters or start or config.lora_alpha == 0:
        raise ConfigError(
            f"{config.where}: kasa_config cannot go with use_dora, target_parameters, lora_alpha=0 "
            "or an init_lora_weights that decomposes the base"
        )


def checked(config: C, site: Site) -> C:
    """Resolve the patterns; refuse a layer that LoRA or one of its flags cannot adapt.

    Raises
    ------
    ConfigError
    """
    apart = is_parameter(site.weight, config.target_parameters or ())
    name = site.weight if apart else site.name
    r = matching(config.rank_pattern, name, config.r)
    alpha = matching(config.alpha_pattern, name, config.lora_alpha)
    if (r, alpha) != (config.r, config.lora_alpha):
        config = replace(config, r=r, lora_alpha=alpha)
    starts.check_site(config, site)
    alora.check_site(config, site)
    if config.use_bdlora:
        _check_blocks(config, site)
    if config.kasa_config is None:
        return config
    side = min(site.n_in, site.n_out)
    if site.kind != "Linear" or config.fan_in_fan_out or config.r >= side:
        raise ConfigError(
            f"{site.name}: kasa_config cannot adapt a {site.kind} of {site.n_in} inputs and "
            f"{site.n_out} outputs at r={config.r}: it needs a linear layer of more than r of each"
        )
    return config


def _check_blocks(config: Any, site: Site) -> None:
    k, factor = config.use_bdlora.nblocks, config.use_bdlora.factor(site)
    size = site.n_in if factor == "A" else site.n_out
    if site.kind != "Linear" or (factor and (size % k or config.r % k)):
        raise ConfigError(
            f"{site.name}: use_bdlora cannot adapt a {site.kind} of {site.n_in} inputs and "
            f"{site.n_out} outputs at r={config.r} by nblocks={k}: it needs a linear layer, and "
            "both sizes of the factor divisible"
        )


def shapes(config: Any, site: Site) -> dict[str, Shape]:
    """Name a LoRA's parameters, with their shapes."""
    found, ones = factor_shapes(config.r, site), (1,) * len(site.kernel)
    if config.lora_bias:
        found["lora_B.bias"] = (site.n_out,)
    if config.use_dora:
        found["lora_magnitude_vector"] = (1, site.n_out, *ones) if ones else (site.n_out,)
    if config.kasa_config:
        found["lora_diag"] = (config.r,)
    if config.use_bdlora and (factor := config.use_bdlora.factor(site)):
        rows, columns = found[f"lora_{factor}.weight"]
        found[f"lora_{factor}.weight"] = (rows, columns // config.use_bdlora.nblocks)
    return found


def initial(config: Any, site: Site, new: Fresh) -> Params:
    """Draw a LoRA's parameters."""
    own = config.shapes(site)
    p = starts.initial_factors(config.init_lora_weights, own, site, config.scaling, new)
    if config.lora_bias:
        bound = 0.0 if config.init_lora_weights else config.r**-0.5
        p["lora_B.bias"] = new.uniform((site.n_out,), bound)
    if config.use_dora:
        (q,), base = widen([p], new.base_for(site.name, "use_dora"))
        m = astype(row_norms(base.weight, *config.factors(q, site)), new.dtype)
        p |= {k: namespace(m).reshape(m, v) for k, v in own.items() if k not in p}
    if config.use_bdlora and (factor := config.use_bdlora.factor(site)):
        name = f"lora_{factor}.weight"
        wide = (6 / own[name][1]) ** 0.5  # HF draws these by He's rule, unlike LoRA's own A
        p[name] = new.uniform(own[name], wide) if factor == "A" else new.zeros(own[name])
    if config.kasa_config:
        p["lora_diag"] = new.normal((config.r,))
        p = {**p, **minor_part(config, site, new)}
    return p


def minor_part(config: Any, site: Site, new: Fresh) -> Params:
    """Give what KaSA takes out of the base, by its r smallest singular values, over s.

    The product does not depend on the signs that a library gives to singular vectors.

    Returns
    -------
    dict
        ``start_B`` (n_out, r) and ``start_A`` (r, n_in): the base loses s·start_B·start_A.
    """
    w = _weight(site, new, "kasa_config")
    b, a = _minor(config, to_numpy(w))
    return {"start_A": new.array(a), "start_B": new.array(b)}


def _weight(site: Site, new: Fresh, asks: str) -> Array:
    weight = new.base_for(site.name, asks).weight
    # no decomposition takes half precision
    return detach(astype(weight, compute_dtype(weight)))


def _minor(config: Any, w: Array) -> tuple[Array, Array]:
    u, values, vt = namespace(w).linalg.svd(w, full_matrices=False)
    keep = min(w.shape) - config.r
    return u[:, keep:] * (values[keep:] / config.scaling), vt[keep:, :]


def missing(config: Any, p: Params) -> str | None:
    """Say that parameters lack what their writer took out of the base, if they do."""
    if config.kasa_config is None:
        return starts.missing(config.init_lora_weights, p)
    return None if "start_A" in p else "the part of the base that kasa_config takes out of it"


def rederived(config: Any, p: Params, site: Site, new: Fresh) -> Params:
    """Add what a LoRA's writer took out of the base."""
    if config.kasa_config:
        w = _weight(site, new, "kasa_config")
        if not hasattr(namespace(w), "linalg"):
            return {**p, **minor_part(config, site, new)}
        b, a = _minor(config, w)  # in the base's library, which may be lazy, or trace
        return {**p, "start_A": a, "start_B": b}
    how = str(config.init_lora_weights)
    a, b = starts.starting_pair(how, site, config.r, config.scaling, new)
    return {**p, "start_A": a, "start_B": b}


def pair(config: Any, p: Params, a: Array, b: Array, site: Site) -> tuple[Array, Array]:
    """Give A and B whole, with what stands between them, less what was taken out of the base."""
    if config.use_bdlora and (factor := config.use_bdlora.factor(site)):
        k = config.use_bdlora.nblocks
        return (block_diagonal(a, k), b) if factor == "A" else (a, block_diagonal(b, k))
    if config.kasa_config:
        b = b * p["lora_diag"]
    start = starts.has_start(config.init_lora_weights) and site.kind != "Embedding"
    if config.kasa_config or start:
        a, b = starts.less_start(a, b, p)
    return a, b


def factors(config: Any, p: Params, site: Site) -> tuple[Array, Array]:
    """Give s·B (n_out, k) and A (k, width)."""
    a, b = (flat(p[n] if n in p else p[f"lora_{n[-1]}.weight"]) for n in EMBEDDING)
    a, b = pair(config, p, a, b, site)
    return config.scaling * by_expert(b, site), a


def delta(config: Any, p: Params, site: Site) -> Array:
    """s·B·A.

    Raises
    ------
    ConfigError
        If no matrix holds what the adapter does.
    """
    if config.refusal is not None:
        raise ConfigError(f"{site.name}: {config.refusal}")
    if site.kind in EXPERTS:
        return config.scaling * expert_delta(p, site)
    b, a = factors(config, p, site)
    return b @ a


def residual(config: Any, p: Params, x: Array, site: Site) -> Array:
    """s·B·(A·x), with the bias's share."""
    if site.kind in EXPERTS:
        return config.scaling * expert_residual(p, x, site)
    if config.use_bdlora:
        return config.scaling * by_blocks(config, p, x, site)
    b, a = (p["u"], p["v"]) if "u" in p else factors(config, p, site)
    return linear(linear(x, a), b, config.bias_delta(p, site))


def by_blocks(config: Any, p: Params, x: Array, site: Site) -> Array:
    """B·(A·x) of BD-LoRA."""
    k, factor = config.use_bdlora.nblocks, config.use_bdlora.factor(site)
    for name in "AB":
        x = block_linear(x, p[f"lora_{name}.weight"], k if name == factor else 1)
    return x


def gain(config: Any, p: Params, base: Layer) -> Array | None:
    """DoRA's factor of the rows, if it is one: the norms are constants (§4.3)."""
    if not config.use_dora or "gain" in p:
        return p.get("gain")
    norms = detach(row_norms(base.original, *config.factors(p, base.site)))
    m = namespace(norms).reshape(p["lora_magnitude_vector"], (-1,))
    return m / norms


def prepared(config: Any, p: Params, base: Layer) -> Params:
    """Form the factors once, and DoRA's gain."""
    if config.use_dora:
        p = {**p, "gain": gain(config, p, base)}
    whole = config.use_bdlora or base.site.kind in EXPERTS
    return p if whole else paired(config, p, base.site)


def portable(config: Any, sites: Mapping[str, Params]) -> tuple[Any, dict[str, Params]]:
    """Give configuration and parameters as a file has them: KaSA's part of the base is found again.

    Any other product taken out of the base is folded into factors of rank 2r.
    """
    if config.kasa_config is None:
        return starts.folded(config, sites)
    return config, without(sites, starts.FROZEN[0])

"""LoRA's variants: what a flag adds to its parameters, and KaSA's truncated base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_any import starts
from peft_any._typing import Array, Params, Shape
from peft_any.backend import astype, compute_dtype, detach, namespace, to_numpy
from peft_any.checks import refuse
from peft_any.errors import ConfigError
from peft_any.factors import factor_shapes
from peft_any.layer import Site, widen
from peft_any.linalg import row_norms
from peft_any.rng import Fresh


@dataclass(frozen=True, kw_only=True)
class KasaConfig:
    """Weights of KaSA's two regularisers, which are left to the user's loss.

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


def check(config: Any) -> None:
    """Refuse a LoRA configuration that contradicts itself, or variants that exclude each other.

    Raises
    ------
    ConfigError
    """
    starts.check(config)
    if config.kasa_config is None:
        return
    start = starts.has_start(config.init_lora_weights)
    if config.use_dora or config.target_parameters or start or config.lora_alpha == 0:
        raise ConfigError(
            f"{config.where}: kasa_config cannot go with use_dora, target_parameters, lora_alpha=0 "
            "or an init_lora_weights that takes a product out of the base"
        )


def check_site(config: Any, site: Site) -> None:
    """Refuse a layer that LoRA, or one of its flags, cannot adapt.

    Raises
    ------
    ConfigError
    """
    starts.check_site(config, site)
    if config.kasa_config is None:
        return
    side = min(site.n_in, site.n_out)
    if site.kind != "Linear" or config.fan_in_fan_out or config.r >= side:
        raise ConfigError(
            f"{site.name}: kasa_config cannot adapt a {site.kind} of {site.n_in} inputs and "
            f"{site.n_out} outputs at r={config.r}: it needs a linear layer of more than r of each"
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
    wide: Array = detach(astype(weight, compute_dtype(weight)))
    return wide


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


def pair(config: Any, p: Params, a: Array, b: Array) -> tuple[Array, Array]:
    """Give A and B with what stands between them, and less what was taken out of the base."""
    if config.kasa_config:
        b = b * p["lora_diag"]
    if config.kasa_config or starts.has_start(config.init_lora_weights):
        a, b = starts.less_start(a, b, p)
    return a, b


def portable(config: Any, sites: Mapping[str, Params]) -> tuple[Any, dict[str, Params]]:
    """Give configuration and parameters as a file has them: KaSA's part of the base is found again.

    Any other product taken out of the base is folded into factors of rank 2r.
    """
    if config.kasa_config is None:
        return starts.folded(config, sites)
    own = {s: {k: v for k, v in p.items() if k not in config.frozen} for s, p in sites.items()}
    return config, own

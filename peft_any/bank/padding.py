"""Adapters of one rank, so that a compiled function takes one after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.arguments import checked
from peft_any.backend import (
    astype,
    compute_dtype,
    creation_device,
    dtype_name,
    namespace,
    numpy_dtype,
)
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Site

_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


@checked
def pad_to_rank(adapter: Adapter, r: int) -> Adapter:
    """Give a LoRA the rank `r` everywhere and the scale 1, its ΔW unchanged.

    Padded adapters of the same layers and flags have the same configuration, names, shapes and
    dtypes: a function that was compiled for one of them runs with any other.

    A (k, n_in) gains r − k rows of zeros and B (n_out, k) columns. The scale s = α/k, or α/√k with
    `use_rslora`, with the numbers of `rank_pattern` and `alpha_pattern`, is multiplied into B (and
    into the bias b of `lora_bias`), in B's dtype: exact where s is a power of two, and else up
    to one rounding of each number.

    Parameters
    ----------
    adapter : Adapter
        A LoRA, DoRA included.
    r : int
        At least the largest rank that it has.

    Returns
    -------
    Adapter
        With ``r`` and ``lora_alpha`` equal, no patterns, and the sites as its `target_modules`.

    Raises
    ------
    ConfigError, ShapeError
        If it is no LoRA, lacks what its writer took from the base, or has a larger rank; or if no
        memory holds so large a one.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> p = {"lora_A.weight": np.ones((2, 5)), "lora_B.weight": np.ones((3, 2))}
    >>> made = pad_to_rank(Adapter(LoraConfig(r=2, lora_alpha=8), {"fc": p}), 4)
    >>> made.sites["fc"]["lora_B.weight"][0]
    array([4., 4., 0., 0.])
    >>> made.config.r, made.config.lora_alpha
    (4, 4)
    """
    config: Any = adapter.config
    if getattr(config, "peft_type", None) != "LORA":
        raise ConfigError(
            f"{config.where}: {config.peft_type} has no factors to pad: make a LoRA of it with "
            "peft_any.convert"
        )
    for name, p in adapter.sites.items():
        if what := config.lacks(p):
            raise ConfigError(f"{name}: the adapter lacks {what}: add it to a model first")
    config, sites = config.portable(adapter.sites)
    made = {name: _padded(_scale(config, name), name, p, r) for name, p in sites.items()}
    plain = replace(
        config,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        target_modules=sorted(made),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    return adapter.replace(config=plain, sites=made, raw=None)


def _scale(config: Any, name: str) -> float:
    """Give s at a site: patterns are resolved by its name alone."""
    return float(config.per_site(Site(name, 1, 1)).scaling)


def _padded(scale: float, name: str, p: Params, r: int) -> Params:
    made = dict(p)
    for names, axis in ((_A, 0), (_B, 1)):
        for key in names:
            if key not in p:
                continue
            x, have = p[key], int(p[key].shape[axis])
            if have > r:
                raise ShapeError(
                    f"{name}.{key}: a rank of {have} cannot be padded to {r}: give a larger one, "
                    "or cut the adapter with peft_any.resize"
                )
            xp = namespace(x)
            shape = (*x.shape[:axis], r - have, *x.shape[axis + 1 :])
            x = _times(x, scale) if axis else x
            try:
                np.empty(shape, numpy_dtype(dtype_name(x)))  # JAX ends the process that asks it
                more = xp.zeros(shape, dtype=x.dtype, device=creation_device(x))
                made[key] = xp.concat([x, more], axis=axis)
            except (MemoryError, RuntimeError, ValueError) as error:
                raise ShapeError(
                    f"{name}.{key}: a rank of {have} cannot be padded to {r}: the zeros for it, "
                    f"{shape}, cannot be held: give a smaller one ({error})"
                ) from error
    if "lora_B.bias" in p:
        made["lora_B.bias"] = _times(p["lora_B.bias"], scale)
    return made


def _times(x: Array, scale: float) -> Array:
    if scale == 1.0:
        return x
    return astype(scale * astype(x, compute_dtype(x)), dtype_name(x))

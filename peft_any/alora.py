"""Activated LoRA: where it is invoked. Greenewald et al. 2025, https://arxiv.org/abs/2504.12397."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_any._typing import Array, Params
from peft_any.backend import astype, dtype_name, from_numpy_like, is_array, namespace
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Site
from peft_any.starts import has_start

TAKES = frozenset({"alora_offsets"})
"""What a call needs beside its input."""
REFUSAL = (
    "LORA cannot be merged: alora_invocation_tokens let it act from the invocation on, and leave "
    "what is before it to the base: apply it, model.routed(alora_offsets=…).bind().layers[…](x)"
)
"""What a refused merge says."""


def calculate_alora_offsets(tokens: Sequence[int] | None, input_ids: Array) -> Array:
    """Find where sequences were last invoked, counted from their ends as in Hugging Face PEFT.

    Parameters
    ----------
    tokens : sequence of int, optional
        `LoraConfig.alora_invocation_tokens`.
    input_ids : integer array (rows, positions)
        Of any library; it may be traced.

    Returns
    -------
    integer array (rows,)
        How many last positions the adapter acts on: those from the first token of the last
        occurrence on; 0 in a row without one. It is what `PeftModel.routed` takes as
        ``alora_offsets``.

    Raises
    ------
    ShapeError
        If `input_ids` is not a matrix of whole numbers.

    Examples
    --------
    >>> calculate_alora_offsets([7, 8], np.asarray([[7, 8, 1, 7, 8, 2], [8, 7, 1, 1, 1, 7]]))
    array([3, 0])
    """
    xp = namespace(input_ids)
    if input_ids.ndim != 2 or not xp.isdtype(input_ids.dtype, "integral"):
        raise ShapeError(
            f"input_ids: {dtype_name(input_ids)} of shape {tuple(input_ids.shape)} cannot be "
            "searched: give token numbers (rows, positions)"
        )
    none = xp.zeros_like(input_ids[:, 0])
    starts = input_ids.shape[1] - len(tokens or ()) + 1
    if not tokens or starts < 1:
        return none
    ids: Any = input_ids
    found = ids[:, :starts] == tokens[0]
    for i, token in enumerate(tokens[1:], 1):
        found = found & (ids[:, i : i + starts] == token)
    place = from_numpy_like(np.arange(1, starts + 1), input_ids)[None, :]
    last = xp.max(xp.where(found, place, xp.zeros_like(place)), axis=1)
    return xp.where(last > 0, input_ids.shape[1] + 1 - last, xp.zeros_like(last))


def check(config: Any) -> None:
    """Refuse invocation tokens that are none, or flags that cannot go with them.

    Raises
    ------
    ConfigError
    """
    tokens = config.alora_invocation_tokens
    if not tokens:  # an empty list is none in HF, too
        return
    if min(tokens) < 0:
        raise ConfigError(
            f"{config.where}: alora_invocation_tokens={tokens!r} cannot be found in a sequence: "
            "give token numbers"
        )
    others = ("use_dora", "use_bdlora", "kasa_config", "target_parameters")
    clash = [name for name in others if getattr(config, name)]
    if has_start(config.init_lora_weights):
        clash.append("init_lora_weights")
    if clash:
        raise ConfigError(
            f"{config.where}: alora_invocation_tokens cannot go with {', '.join(clash)}: what "
            "comes before the invocation is the base's own"
        )


def check_site(config: Any, site: Site) -> None:
    """Refuse a layer without positions.

    Raises
    ------
    ConfigError
    """
    if config.alora_invocation_tokens and site.kind not in ("Linear", "Conv1D"):
        raise ConfigError(
            f"{site.name}: alora_invocation_tokens cannot adapt a {site.kind} layer: name linear "
            "layers alone in target_modules"
        )


def invoked(config: Any, p: Params, y: Array, site: Site) -> Array:
    """Keep what an adapter adds from each row's invocation on, and nothing before it.

    Parameters
    ----------
    config : LoraConfig
    p : dict
        With ``alora_offsets``: a whole number for all rows or one for each, None or 0 where
        there is no invocation; a list or an integer array.
    y : array (rows, positions, …, n_out) or (rows, n_out)
    site : Site

    Raises
    ------
    ConfigError, ShapeError
        If there are no offsets, or offsets for other rows.
    """
    if not config.alora_invocation_tokens:
        return y
    if "alora_offsets" not in p:
        raise ConfigError(
            f"{site.name}: alora_invocation_tokens need to know where they are: choose with "
            "model.routed(alora_offsets=calculate_alora_offsets(tokens, input_ids))"
        )
    offsets = p["alora_offsets"]
    if not is_array(offsets):
        listed = [*offsets] if isinstance(offsets, list | tuple) else [offsets]
        offsets = from_numpy_like(np.asarray([n or 0 for n in listed], dtype=np.int64), y)
    xp = namespace(y, offsets)
    offsets = xp.reshape(offsets, (-1, 1))
    if y.ndim < 2 or offsets.shape[0] not in (1, y.shape[0]):
        raise ShapeError(
            f"{site.name}: {offsets.shape[0]} alora_offsets for an output of shape "
            f"{tuple(y.shape)}: give one for each of its rows"
        )
    length = 1 if y.ndim == 2 else y.shape[1]
    left = from_numpy_like(np.arange(length, 0, -1), y)[None, :]
    on = xp.reshape(left <= offsets, (-1, length, *(1,) * (y.ndim - 2)))
    acting: Array = astype(on, dtype_name(y))
    return y * acting

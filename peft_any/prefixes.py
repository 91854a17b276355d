"""What methods that put keys and values before those of attention layers share."""

from __future__ import annotations

from peft_any._typing import Array, Shape
from peft_any.backend import namespace
from peft_any.errors import ConfigError, ShapeError
from peft_any.prompt import Prompt
from peft_any.prompts import prepend, spread


def check_heads(config: Prompt) -> None:
    """Refuse heads that do not divide the width.

    Raises
    ------
    ConfigError
    """
    heads, d = config.num_attention_heads, config.token_dim
    if heads and d and d % heads:
        raise ConfigError(
            f"{config.where}: token_dim={d} cannot be split into num_attention_heads={heads}: "
            "both are those of the keys under grouped-query attention"
        )


def table_shape(config: Prompt) -> dict[str, Shape]:
    """Name the table of all keys and values, (T, 2·L·d)."""
    width = 2 * config.size("num_layers") * config.size("token_dim")
    return {"prompt_embeddings": (config.size("num_virtual_tokens"), width)}


def key_values(config: Prompt, table: Array, batch: int) -> list[tuple[Array, Array]]:
    """Give every layer's keys and values, two arrays (batch, heads, T, d/heads)."""
    pairs = [pair(config, table, i) for i in range(config.size("num_layers"))]
    return [(spread(k, (batch,)), spread(v, (batch,))) for k, v in pairs]


def concat_to_kv(
    config: Prompt, table: Array, k: Array, v: Array, layer: int
) -> tuple[Array, Array]:
    """Put a layer's prefix before its keys and values.

    Parameters
    ----------
    config : Prompt
    table : array (T, 2·L·d)
    k, v : array (..., heads, tokens, d/heads)
    layer : int

    Returns
    -------
    k, v : array (..., heads, T + tokens, d/heads)
        In the dtypes of those given.

    Raises
    ------
    ShapeError
        If heads or widths differ, or there is no such layer.
    """
    longer = []
    for x, prefix in zip((k, v), pair(config, table, layer), strict=True):
        heads, _, width = prefix.shape
        if x.ndim < 3 or (x.shape[-3], x.shape[-1]) != (heads, width):
            raise ShapeError(
                f"{config.where}: keys or values of shape {tuple(x.shape)} cannot follow a "
                f"prefix: they must be (..., {heads}, tokens, {width})"
            )
        longer.append(prepend(prefix, x))
    return longer[0], longer[1]


def pair(config: Prompt, table: Array, layer: int) -> list[Array]:
    """Give one layer's K and V (heads, T, d/heads)."""
    if not 0 <= layer < (n := config.size("num_layers")):
        raise ShapeError(f"{config.where}: layer {layer} cannot have a prefix: there are {n}")
    # HF repeats the layers for an encoder-decoder's two submodules and deals them out by twos.
    at = layer * config.submodules % n
    d, heads, xp = config.size("token_dim"), config.size("num_attention_heads"), namespace(table)
    shape = (table.shape[0], heads, d // heads)
    rows = [table[:, i * d : (i + 1) * d] for i in (2 * at, 2 * at + 1)]
    return [xp.permute_dims(xp.reshape(a, shape), (1, 0, 2)) for a in rows]

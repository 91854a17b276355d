"""Methods that put keys and values before those of attention layers."""

from __future__ import annotations

from dataclasses import dataclass

from peft_any._typing import Array, DTypeLike, Params, Shape
from peft_any.backend import namespace
from peft_any.errors import ConfigError, ShapeError
from peft_any.initial import normal
from peft_any.prompt import Prompt
from peft_any.prompts import count, fresh, prepend, spread


class Prefixed(Prompt):
    """k′ = [K; k], v′ = [V; v] along the tokens, K and V (heads, T, d/heads) in each layer.

    A file holds them all as `prompt_embeddings` (T, 2·L·d): a row is (layer, key or value, head,
    channel).
    """

    def check(self) -> None:
        """Heads divide the width."""
        heads, d = self.num_attention_heads, self.token_dim
        if heads and d and d % heads:
            raise ConfigError(
                f"{self.where}: token_dim={d} cannot be split into num_attention_heads={heads}: "
                "both are those of the keys under grouped-query attention"
            )

    def shapes(self) -> dict[str, Shape]:
        """The table of all keys and values, standard normal."""
        width = 2 * self.size("num_layers") * self.size("token_dim")
        return {"prompt_embeddings": normal(self.size("num_virtual_tokens"), width)}

    def table(self, p: Params) -> Array:
        """Give the table (T, 2·L·d), computed where a net makes it."""
        return self.portable(p)["prompt_embeddings"]

    def key_values(self, p: Params, batch: int = 1) -> list[tuple[Array, Array]]:
        """Give every layer's keys and values, two arrays (batch, heads, T, d/heads)."""
        table = self.table(p)
        pairs = [pair(self, table, i) for i in range(self.size("num_layers"))]
        return [(spread(k, (batch,)), spread(v, (batch,))) for k, v in pairs]

    def concat_to_kv(self, p: Params, k: Array, v: Array, layer: int) -> tuple[Array, Array]:
        """Put a layer's prefix before its keys and values: see `concat_to_kv`."""
        return concat_to_kv(self, self.table(p), k, v, layer)

    def layer(
        self, *, seed: int = 0, backend: str = "auto", dtype: DTypeLike = "float32"
    ) -> PrefixLayer:
        """Make the prefix alone, without a model."""
        return PrefixLayer(self, self.init(fresh(seed, backend, dtype)))


@dataclass(frozen=True)
class PrefixLayer:
    """A prefix with its parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.prefix_tuning import PrefixTuningConfig
    >>> sizes = {"num_layers": 2, "token_dim": 6, "num_attention_heads": 3}
    >>> layer = PrefixTuningConfig(num_virtual_tokens=4, **sizes).layer(seed=0)
    >>> k, v = layer.concat_to_kv(np.zeros((1, 3, 5, 2)), np.zeros((1, 3, 5, 2)), layer=1)
    >>> k.shape
    (1, 3, 9, 2)
    """

    config: Prefixed
    params: Params

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return count(self.config, self.params)

    def key_values(self, batch: int = 1) -> list[tuple[Array, Array]]:
        """Give every layer's keys and values, two arrays (batch, heads, T, d/heads)."""
        return self.config.key_values(self.params, batch)

    def concat_to_kv(self, k: Array, v: Array, layer: int = 0) -> tuple[Array, Array]:
        """Put a layer's prefix before its keys and values (..., heads, tokens, d/heads)."""
        return self.config.concat_to_kv(self.params, k, v, layer)


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

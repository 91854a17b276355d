"""Prefix tuning: trained keys and values before those of every attention layer.

Li & Liang 2021, https://arxiv.org/abs/2101.00190.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from peft_any.contract import Array, Fresh, Params, Prompt, Shape
from peft_any.encoders import draw_encoder, encode
from peft_any.prefixes import check_heads, concat_to_kv, key_values, table_shape
from peft_any.prompts import fresh


class PrefixTuningConfig(Prompt, peft_type="PREFIX_TUNING", prefix="prompt_"):
    """k′ = [K; k], v′ = [V; v] along the tokens, K and V (heads, T, d/heads) in each layer.

    `prompt_embeddings` (T, 2·L·d) holds them all, T = `num_virtual_tokens`, L = `num_layers`:
    a row is (layer, key or value, head, channel). With grouped-query attention d = `token_dim`
    and `num_attention_heads` are those of the keys. Masks grow by ones: `prompts.extend_mask`.

    init_weights: null (standard normal) or "zero".
    prefix_projection: a fresh table is U₂·tanh(U₁·e + b₁) + b₂, e (T, d), of hidden width
        `encoder_hidden_size` (null: d), and this net is what is trained, under the names of
        torch's layers. A file holds the table alone, so what is loaded trains the table itself.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def check(self) -> None:
        """Heads divide the width."""
        check_heads(self)

    def shapes(self) -> dict[str, Shape]:
        """The table of all keys and values."""
        return table_shape(self)

    def init(self, new: Fresh) -> Params:
        """Draw the table; under `prefix_projection` the net that makes it."""
        ((count, width),), d = self.shapes().values(), self.size("token_dim")
        zero = self.init_weights == "zero"
        if self.prefix_projection:
            sizes = (count, d, self.encoder_hidden_size or d, width)
            return draw_encoder(new, sizes, zero=zero)
        return {"prompt_embeddings": (new.zeros if zero else new.normal)((count, width))}

    def portable(self, p: Params) -> Params:
        """Give the table, computed where its net is trained."""
        return p if "prompt_embeddings" in p else {"prompt_embeddings": encode(p)}

    def key_values(self, p: Params, batch: int = 1) -> list[tuple[Array, Array]]:
        """Give every layer's keys and values, two arrays (batch, heads, T, d/heads)."""
        return key_values(self, self.portable(p)["prompt_embeddings"], batch)

    def concat_to_kv(self, p: Params, k: Array, v: Array, layer: int) -> tuple[Array, Array]:
        """Put a layer's prefix before its keys and values: see `prefixes.concat_to_kv`."""
        return concat_to_kv(self, self.portable(p)["prompt_embeddings"], k, v, layer)

    def layer(
        self, *, seed: int = 0, backend: str = "auto", dtype: str = "float32"
    ) -> "PrefixLayer":
        """Make the prefix alone, without a model."""
        return PrefixLayer(self, self.init(fresh(seed, backend, dtype)))


@dataclass(frozen=True)
class PrefixLayer:
    """A prefix with its parameters.

    Examples
    --------
    >>> import numpy as np
    >>> sizes = {"num_layers": 2, "token_dim": 6, "num_attention_heads": 3}
    >>> layer = PrefixTuningConfig(num_virtual_tokens=4, **sizes).layer(seed=0)
    >>> k, v = layer.concat_to_kv(np.zeros((1, 3, 5, 2)), np.zeros((1, 3, 5, 2)), layer=1)
    >>> k.shape
    (1, 3, 9, 2)
    """

    config: PrefixTuningConfig
    params: Params

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(prod(a.shape) for a in self.params.values())

    def key_values(self, batch: int = 1) -> list[tuple[Array, Array]]:
        """Give every layer's keys and values, two arrays (batch, heads, T, d/heads)."""
        return self.config.key_values(self.params, batch)

    def concat_to_kv(self, k: Array, v: Array, layer: int = 0) -> tuple[Array, Array]:
        """Put a layer's prefix before its keys and values (..., heads, tokens, d/heads)."""
        return self.config.concat_to_kv(self.params, k, v, layer)

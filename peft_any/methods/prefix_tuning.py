"""Prefix tuning: trained keys and values before those of every attention layer.

Li & Liang 2021, https://arxiv.org/abs/2101.00190.
"""

from typing import Literal

from peft_any.contract import Fresh, Params, Prefixed
from peft_any.encoders import draw_encoder, encode


class PrefixTuningConfig(Prefixed, peft_type="PREFIX_TUNING", prefix="prompt_"):
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

    def init(self, new: Fresh) -> Params:
        """Draw the table; under `prefix_projection` the net that makes it."""
        ((count, width),), d = self.shapes().values(), self.size("token_dim")
        zero = self.init_weights == "zero"
        if self.prefix_projection:
            sizes = (count, d, self.encoder_hidden_size or d, width)
            return draw_encoder(new, sizes, zero=zero)
        return {"prompt_embeddings": new.zeros((count, width))} if zero else super().init(new)

    def portable(self, p: Params) -> Params:
        """Give the table, computed where its net is trained."""
        return p if "prompt_embeddings" in p else {"prompt_embeddings": encode(p)}

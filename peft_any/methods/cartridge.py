"""Cartridge: a trained key-value cache of a text. Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266."""

from collections.abc import Sequence

from peft_any.backend import detach, namespace
from peft_any.contract import Array, Params, Prefixed
from peft_any.errors import ConfigError, ShapeError


class CartridgeConfig(Prefixed, peft_type="CARTRIDGE", prefix="prompt_"):
    """k′ = [K; k], v′ = [V; v] along the tokens, K and V (heads, T, d/heads) in each layer.

    `prompt_embeddings` (T, 2·L·d) holds them as in prefix tuning, T = `num_virtual_tokens`, L =
    `num_layers`, d = `token_dim`; usually they start as the cache of a text's first T tokens:
    `of_cache`.

    num_frozen_tokens: the first tokens of the table that training leaves as they are. They get no
        gradient; an optimiser's weight decay would still move them.
    """

    num_frozen_tokens: int = 1

    def check(self) -> None:
        """Heads divide the width; no more tokens are frozen than there are."""
        super().check()
        frozen, count = self.num_frozen_tokens, self.num_virtual_tokens
        if frozen < 0 or (count is not None and frozen > count):
            raise ConfigError(
                f"{self.where}: num_frozen_tokens={frozen} cannot be frozen: give 0 to {count}"
            )

    def of_cache(self, cache: Sequence[tuple[Array, Array]]) -> Params:
        """Take the first tokens of a model's key-value cache.

        Parameters
        ----------
        cache : sequence of (k, v), one pair for each layer
            Arrays (1, heads, tokens, d/heads), or without the first axis.

        Raises
        ------
        ShapeError
            If layers, heads, widths or tokens are not those of the configuration.
        """
        ((count, _),), d = self.shapes().values(), self.size("token_dim")
        heads = self.size("num_attention_heads")
        flat = [a[0, ...] if a.ndim == 4 else a for pair in cache for a in pair]
        want = (heads, d // heads)
        if len(flat) != 2 * self.size("num_layers") or any(
            (a.shape[0], a.shape[2]) != want or a.shape[1] < count for a in flat
        ):
            raise ShapeError(
                f"{self.where}: a cache of shapes {[tuple(a.shape) for a in flat][:4]} … cannot "
                f"start it: give {self.num_layers} pairs ({heads}, {count} or more, {want[1]})"
            )
        xp = namespace(*flat)
        rows = [xp.reshape(xp.permute_dims(a[:, :count, :], (1, 0, 2)), (count, d)) for a in flat]
        return {"prompt_embeddings": xp.concat(rows, axis=1)}

    def table(self, p: Params) -> Array:
        """The table, whose first rows are constants to gradients."""
        table: Array = p["prompt_embeddings"]
        n = self.num_frozen_tokens
        if not n:
            return table
        return namespace(table).concat([detach(table[:n, :]), table[n:, :]], axis=0)

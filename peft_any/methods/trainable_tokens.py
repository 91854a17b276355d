"""Trainable tokens: new rows for an embedding.

Without a paper: https://huggingface.co/docs/peft/package_reference/trainable_tokens.
"""

from dataclasses import field
from typing import ClassVar, Self

from peft_any.backend import astype, from_numpy_like, is_floating, namespace
from peft_any.contract import Array, Dense, Fresh, Kind, Layer, Params, Shape, Site, Tuner
from peft_any.errors import ConfigError
from peft_any.layer import linear
from peft_any.tokens import INPUTS, check_rows, row_numbers, with_rows


class TrainableTokensConfig(Tuner, peft_type="TRAINABLE_TOKENS"):
    """E′ is E (tokens, width) with the rows D (k, width) at `token_indices`, in their order.

    An output layer that is tied to the embedding gets them too. Without `target_modules`, the
    input embedding is meant.

    init_weights: true (D is those rows of E), false (normal numbers).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Embedding", "Linear"})
    unsaid: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})
    usual: ClassVar[tuple[str, ...]] = INPUTS

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def per_site(self, site: Site) -> Self:
        """Check that the rows are there."""
        if not self.token_indices:
            raise ConfigError(f"{site.name}: token_indices is empty: list the rows to train")
        check_rows(self.token_indices, site.stored_shape[0], site.name, "token_indices")
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """D."""
        return {"trainable_tokens_delta": (len(self.token_indices), site.stored_shape[1])}

    def init(self, site: Site, new: Fresh) -> Params:
        """Copy the rows, or draw them."""
        if not self.init_weights:
            return {k: new.normal(s, 1.0) for k, s in self.shapes(site).items()}
        table = new.base_for(site.name, self.peft_type).stored()
        rows = namespace(table).take(table, from_numpy_like(self.token_indices, table), axis=0)
        return {"trainable_tokens_delta": astype(rows, new.dtype)}

    def merge(self, p: Params, base: Dense) -> Dense:
        """Replace the rows."""
        table = with_rows(base.stored(), p["trainable_tokens_delta"], self.token_indices)
        merged = Dense.of(table, base.bias, base.site)
        return merged.replace(unadapted=base.unadapted, unadapted_bias=base.unadapted_bias)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """Replace what the trained rows give."""
        rows = p["trainable_tokens_delta"]
        xp = namespace(rows, x)
        if base.site.kind == "Linear":
            bias = base.bias
            if bias is not None:
                bias = xp.take(bias, from_numpy_like(self.token_indices, bias), axis=0)
            return with_rows(base(x), linear(x, rows, bias), self.token_indices, axis=-1)
        if is_floating(x):
            return super().forward(p, x, base)
        numbers = from_numpy_like(row_numbers(self.token_indices, base.site.n_in), rows)
        own = xp.take(numbers, xp.reshape(x, (-1,)))
        new = xp.take(rows, xp.where(own > 0, own - 1, xp.zeros_like(own)), axis=0)
        hits = xp.reshape(own > 0, (*x.shape, 1))
        return xp.where(hits, xp.reshape(new, (*x.shape, rows.shape[1])), base(x))

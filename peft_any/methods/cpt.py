"""CPT: a prompt of examples, trained near their tokens. Blau et al. 2024, https://arxiv.org/abs/2410.17222."""

from typing import Any, ClassVar, Literal

from peft_any.backend import astype, detach, dtype_name, from_numpy_like, namespace
from peft_any.checks import refuse
from peft_any.contract import Array, Fresh, Params, Prepended
from peft_any.errors import ConfigError
from peft_any.prompts import distinct_above, numbered, table_rows, token_losses


class CPTConfig(Prepended, peft_type="CPT", prefix="prompt_"):
    """x′ = [E + D; x], as in prompt tuning, with E fixed and the rows of D within bounds.

    E (T, d) are the embeddings of the T `cpt_token_ids`, D (T, d) starts at zero, d = `token_dim`.
    A file holds `prompt_embeddings` (T, d), their sum, around which what is loaded goes on.

    cpt_tokens_type_mask: each token's part in its example: 1, 2, 3, 4 (input template, input,
        output template, label) in the first, 5, 6, 7, 8 in the second and so on; 0 is none.
        Labels stay as they are: no gradient reaches their rows of D.
    opt_projection_epsilon: the bound for inputs, times √(d/2048).
    opt_projection_format_epsilon: the bound for templates, times √(d/2048).
    opt_weighted_loss_type: "decay" weighs each example's label in `loss`; "none" does not.
    opt_loss_decay_factor: the weight is this, to the power of how many labels come after.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"embedding.weight"})

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def check(self) -> None:
        """Fill in what Hugging Face PEFT does; one number for each token."""
        refuse(self, task_type=(self.task_type == "CAUSAL_LM", '"CAUSAL_LM"'))
        ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        fixed: dict[str, Any] = {"cpt_token_ids": ids, "num_virtual_tokens": len(ids)}
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            given = getattr(self, name)
            fixed[name] = [1] * len(ids) if given is None else given
            if len(fixed[name]) != len(ids):
                raise ConfigError(
                    f"{self.where}: {name} of {len(fixed[name])} numbers cannot describe "
                    f"{len(ids)} cpt_token_ids: give one for each"
                )
        for name, value in {**fixed, "num_transformer_submodules": 1}.items():
            object.__setattr__(self, name, value)

    @property
    def reads_table(self) -> bool:
        """Always: E is taken out of it."""
        return True

    def init(self, new: Fresh) -> Params:
        """Take E out of the embedding table that is `new`'s base."""
        count, _ = self.shapes()["prompt_embeddings"]
        columns = new.base_for(self.where, "cpt_token_ids").weight
        return self.resumed(
            {"prompt_embeddings": table_rows(columns, count, self.cpt_token_ids, new)}
        )

    def resumed(self, p: Params) -> Params:
        """Take a table for E, with D zero."""
        if "prompt_embeddings" not in p:
            return p
        table = p["prompt_embeddings"]
        return {
            "embedding.weight": table,
            "delta_embedding.weight": namespace(table).zeros_like(table),
        }

    def settled(self, p: Params) -> Params:
        """Draw the rows of D back to their bounds, by factors that gradients take as constants."""
        if "delta_embedding.weight" not in p:
            return p
        delta = p["delta_embedding.weight"]
        xp, fixed = namespace(delta), detach(delta)
        norm = xp.sqrt(xp.sum(fixed * fixed, axis=1, keepdims=True))
        wide = (self.size("token_dim") / 2048) ** 0.5
        template = wide * (self.opt_projection_format_epsilon or 0.0)
        size = {1: template, 2: wide * (self.opt_projection_epsilon or 0.0), 3: template}
        kinds = [t % 4 if t > 0 else 0 for t in self.cpt_tokens_type_mask or []]
        bound = from_numpy_like([[size.get(k, 0.0)] for k in kinds], delta)
        bound = astype(bound, dtype_name(delta))
        longest = xp.maximum(norm, xp.maximum(bound, xp.full_like(bound, 1e-10)))
        return {**p, "delta_embedding.weight": delta * (bound / longest)}

    def portable(self, p: Params) -> Params:
        """Give the sum."""
        if "prompt_embeddings" in p:
            return p
        delta = self.settled(p)["delta_embedding.weight"]
        return {"prompt_embeddings": detach(p["embedding.weight"]) + delta}

    def loss(self, logits: Array, labels: Array, types: Array | None = None) -> Array:
        """Give the mean cross-entropy of the labels, those of the prompt's examples included.

        Parameters
        ----------
        logits : array (batch, T + tokens, vocabulary)
        labels : array (batch, tokens) of int
            -100 where the loss ignores them.
        types : array (batch, tokens) of int, optional
            As `cpt_tokens_type_mask`, counted anew; by default all are labels.

        Returns
        -------
        array ()
        """
        own, ids = self.cpt_tokens_type_mask or [], self.cpt_token_ids or []
        if max(own) % 4:
            raise ConfigError(
                f"{self.where}: cpt_tokens_type_mask ends with {max(own)}: labels of inputs "
                "cannot be told after an example without one: let its largest number be 4, 8, 12 …"
            )
        kinds, chosen = numbered(own, ids, labels, types)
        dtype = dtype_name(logits)
        weights = counted = astype((kinds > 0) & (chosen >= 0), dtype)
        if self.opt_weighted_loss_type == "decay":
            factor: Any = self.opt_loss_decay_factor or 0.0
            weights = counted * factor ** astype(distinct_above(kinds), dtype)
        xp = namespace(logits, weights)
        return xp.sum(token_losses(logits[:, :-1, :], chosen) * weights) / xp.sum(counted)

"""Prompt tuning: trained virtual tokens before the embedded input.

Lester et al. 2021, https://arxiv.org/abs/2104.08691.
"""

from collections.abc import Sequence
from typing import Any, Literal

from peft_any.contract import Fresh, Params, Prepended
from peft_any.errors import ConfigError, ShapeError
from peft_any.prompts import PromptLayer, fresh, table_rows


class PromptTuningConfig(Prepended, peft_type="PROMPT_TUNING", prefix="prompt_"):
    """x′ = [P; x]: the rows of P stand before the embedded input x (..., tokens, d).

    `prompt_embeddings` (n·T, d), T = `num_virtual_tokens`, d = `token_dim`, holds one P for each
    of n = `num_transformer_submodules` (null: 2, the encoder's and the decoder's, if `task_type`
    is SEQ_2_SEQ_LM; otherwise 1). Attention masks grow by ones: `prompts.extend_mask`.

    prompt_tuning_init: "RANDOM" (standard normal), "SAMPLE_VOCAB" (rows drawn from the embedding
        table) or "TEXT" (the rows of a text's tokens, repeated or cut to length; there is no
        tokenizer here: give `layer` their numbers).
    """

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """A text needs a tokenizer."""
        init, text = self.prompt_tuning_init, self.prompt_tuning_init_text
        if init == "TEXT" and (text is None or not self.tokenizer_name_or_path):
            raise ConfigError(
                f"{self.where}: prompt_tuning_init='TEXT' cannot stand alone: name the text and "
                "its tokenizer, prompt_tuning_init_text and tokenizer_name_or_path"
            )

    def init(self, new: Fresh, tokens: Sequence[int] | None = None) -> Params:
        """Draw the table, or take rows of the embedding table that is `new`'s base."""
        shape, init = self.shapes()["prompt_embeddings"], self.prompt_tuning_init
        if init == "RANDOM":
            return super().init(new)
        if init == "TEXT" and tokens is None:
            raise ConfigError(
                f"{self.where}: prompt_tuning_init='TEXT' cannot be computed without a tokenizer: "
                "give the text's numbers, layer(weight=…, tokens=[…]), or use 'SAMPLE_VOCAB'"
            )
        columns = new.base_for(self.where, f"prompt_tuning_init={init!r}").weight
        if columns.shape[0] != shape[1]:
            raise ShapeError(
                f"{self.where}: an embedding table of width {columns.shape[0]} cannot start a "
                f"prompt of token_dim={shape[1]}"
            )
        chosen = tokens if init == "TEXT" else None
        return {"prompt_embeddings": table_rows(columns, shape[0], chosen, new)}

    def layer(self, *, tokens: Sequence[int] | None = None, **where: Any) -> PromptLayer:
        """Make the prompt alone: as others', and with a text's `tokens` for its initial values."""
        return PromptLayer(self, self.init(fresh(**where), tokens))

"""P-tuning: virtual tokens out of a small net. Liu et al. 2021, https://arxiv.org/abs/2103.10385."""

from itertools import pairwise
from typing import Literal

from peft_any.contract import Fresh, Params, Prepended, Shape
from peft_any.encoders import draw_linear, draw_lstm, lstm, perceptron
from peft_any.errors import ConfigError
from peft_any.fields import Count, Rate


class PromptEncoderConfig(Prepended, peft_type="P_TUNING", prefix="prompt_"):
    """x′ = [P; x], as in prompt tuning, where P = f(E) and the net f is what is trained.

    `prompt_embeddings` (n·T, d) holds one P for each of n = `num_transformer_submodules`, T =
    `num_virtual_tokens`, d = `token_dim`. A file holds this table alone; what is loaded trains
    the table itself. A fresh adapter has E (n·T, d) and f under the names of torch's layers.

    encoder_reparameterization_type: "MLP" (d → h → h → d, max(·, 0) between) or "LSTM" (in both
        directions, of `encoder_num_layers`, then 2h → 2h → d).
    encoder_hidden_size: h; null: d.
    encoder_dropout: between the LSTM's layers in training; there is none here, so it must be 0
        for a fresh one.
    """

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Count = 2
    encoder_dropout: Rate = 0.0

    def init(self, new: Fresh) -> Params:
        """Draw E and the net, as torch draws its layers."""
        ((count, d),) = self.shapes().values()
        h = self.encoder_hidden_size or d
        found: Params = {"embedding.weight": new.normal((count, d))}
        if self.encoder_reparameterization_type == "MLP":
            sizes: Shape = (d, h, h, d)
        else:
            if self.encoder_dropout:
                raise ConfigError(
                    f"{self.where}: encoder_dropout={self.encoder_dropout} cannot be trained with: "
                    "the LSTM's layers are not thinned here; give 0"
                )
            found |= draw_lstm(new, "lstm_head", d, h, self.encoder_num_layers)
            sizes = 2 * h, 2 * h, d
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            found |= draw_linear(new, f"mlp_head.{2 * i}", n_in, n_out)
        return found

    def portable(self, p: Params) -> Params:
        """Give the table, computed where its net is trained."""
        if "prompt_embeddings" in p:
            return p
        x, layers = p["embedding.weight"], 3
        if self.encoder_reparameterization_type == "LSTM":
            x, layers = lstm(p, x, "lstm_head", self.encoder_num_layers), 2
        return {"prompt_embeddings": perceptron(p, x, "mlp_head", layers)}

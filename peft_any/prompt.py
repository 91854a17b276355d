"""The second, smaller contract: methods that make virtual tokens."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

from peft_any._typing import Array, Params, Shape
from peft_any.errors import ConfigError
from peft_any.initial import drawn
from peft_any.registry import Config
from peft_any.rng import Fresh


class Attended(Config):
    """A method that acts within attention: its sites are attention modules, not layers.

    `PeftModel.add` places it, and the code of the attention calls ``model.bind().attend``.
    """

    unmerged: ClassVar[str]
    """Why a merge is refused."""

    @property
    def refusal(self) -> str:
        """What a refused merge, or attachment to layers, says."""
        return (
            f"{self.peft_type} cannot be merged or attached to layers: {self.unmerged}: give it "
            "to PeftModel.add and call model.bind().attend in the attention"
        )

    @abc.abstractmethod
    def modules(self, names: Sequence[str]) -> list[str]:
        """Choose the attention modules out of all modules, in the order of their blocks."""

    @abc.abstractmethod
    def shapes(self, width: int) -> dict[str, Shape]:
        """Name the parameters of one module whose input has `width` channels."""

    def init(self, new: Fresh, width: int) -> Params:
        """Draw the parameters of one module; they add nothing."""
        return drawn(self.shapes(width), new, self.where)

    @abc.abstractmethod
    def attend(
        self,
        p: Params,
        q: Array,
        k_proj: Callable[[Array], Array],
        v_proj: Callable[[Array], Array],
    ) -> Array:
        """Compute what a module gains before its output projection, (batch, tokens, heads·c)."""


class Prompt(Config):
    """A method that makes virtual tokens: it adapts no layer and has one table of vectors.

    It puts them before embedded input, ``prepend(p, embeds, submodule=0)`` (`prompts.Prepended`),
    or before the keys and values of every layer, ``concat_to_kv(p, k, v, layer)`` and
    ``key_values(p, batch=1)`` (`prefixes.Prefixed`).
    """

    tables: ClassVar[tuple[str, ...]] = ("prompt_embeddings",)
    """The tensors of a file: those that `shapes` names."""
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are kept beside the trained ones and never trained."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def size(self, field: str) -> int:
        """Read a size that the maths needs.

        Raises
        ------
        ConfigError
            If the field is not set to a positive integer.
        """
        value = getattr(self, field)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{self.where}: {field}={value!r} cannot size a prompt: give a positive integer"
            )
        return value

    @property
    def submodules(self) -> int:
        """How many transformers take a prompt: an encoder-decoder's two, otherwise one."""
        return self.num_transformer_submodules or 1 + (self.task_type == "SEQ_2_SEQ_LM")

    @property
    def reads_table(self) -> bool:
        """Whether fresh parameters are taken out of the model's embedding table."""
        return False

    @abc.abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Name the parameters of the file, with their shapes."""

    def init(self, new: Fresh) -> Params:
        """Draw fresh parameters as Hugging Face PEFT does; unless overridden, as `shapes` says."""
        return drawn(self.shapes(), new, self.where)

    def portable(self, p: Params) -> Params:
        """Give the parameters in the form that a file carries, `shapes`."""
        return p

    def resumed(self, p: Params) -> Params:
        """Give what is trained of a file's parameters."""
        return p

    def settled(self, p: Params) -> Params:
        """Bring parameters that an optimiser has moved to where the method keeps them."""
        return p

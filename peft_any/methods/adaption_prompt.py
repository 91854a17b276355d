"""LLaMA-Adapter: gated prompts within attention. Zhang et al. 2023, https://arxiv.org/abs/2303.16199."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from peft_any.backend import namespace
from peft_any.contract import Array, Attended, Params, Shape
from peft_any.errors import ConfigError, ShapeError
from peft_any.fields import Count
from peft_any.initial import normal, zeros
from peft_any.mixtures import softmax


class AdaptionPromptConfig(Attended, peft_type="ADAPTION_PROMPT", prefix="adaption_"):
    """y = attention(x) + W_o·(g·softmax(q·K(P)ᵀ/√c)·V(P)), in the last `adapter_layers` blocks.

    `adaption_prompt` P (1, T, d), T = `adapter_len`, goes through the block's own projections of
    keys and values, and `adaption_gate` g (1,) starts at 0. The queries q are those of the block,
    turned by their positions (rotary embedding), of c channels in each head.

    target_modules: the attention's name (null: "self_attn", and "attn" of GPT-2).
    adapter_len: T. adapter_layers: of how many blocks, counted from the last.
    """

    unsaid: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})
    unmerged: ClassVar[str] = "its prompts add to attention, and no weight holds that"

    target_modules: str | None = None
    adapter_len: Count | None = None
    adapter_layers: Count | None = None

    def modules(self, names: Sequence[str]) -> list[str]:
        """Choose the attention modules out of all modules, in the order of their blocks.

        Raises
        ------
        ConfigError
            If there are fewer than `adapter_layers`.
        """
        ends = [self.target_modules] if self.target_modules else ["self_attn", "attn"]
        found = next((f for e in ends if (f := [n for n in names if n.endswith(f".{e}")])), [])
        count = self.adapter_layers or 0
        if not 1 <= count <= len(found):
            raise ConfigError(
                f"{self.where}: adapter_layers={self.adapter_layers} cannot be chosen of "
                f"{len(found)} attention modules"
            )
        return found[-count:]

    def shapes(self, width: int) -> dict[str, Shape]:
        """Name the parameters of one block, for a model of `width` d: the gate is closed."""
        if self.adapter_len is None:
            raise ConfigError(f"{self.where}: adapter_len=None cannot size a prompt: give it")
        return {"adaption_prompt": normal(1, self.adapter_len, width), "adaption_gate": zeros(1)}

    def attend(
        self,
        p: Params,
        q: Array,
        k_proj: Callable[[Array], Array],
        v_proj: Callable[[Array], Array],
    ) -> Array:
        """Compute what a block's attention gains, before its output projection.

        Parameters
        ----------
        p : dict of arrays
            The block's: ``adapter.sites["model.layers.3.self_attn"]``.
        q : array (batch, heads, tokens, c)
            The queries as the block's attention takes them.
        k_proj, v_proj : callable, (1, T, d) to (1, T, groups·c)
            The block's projections: ``model.bind().layers["model.layers.3.self_attn.k_proj"]``;
            with grouped queries, `groups` divides `heads`. GPT-2's `c_attn` gives them one
            beside the other.

        Returns
        -------
        array (batch, tokens, heads·c)
            To add to the attention's output: through `o_proj`, but as it is in GPT-2, where
            Hugging Face PEFT leaves the projection out.

        Raises
        ------
        ShapeError
            If heads and groups do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> p = {"adaption_prompt": np.ones((1, 3, 4)), "adaption_gate": np.ones(1)}
        >>> config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
        >>> config.attend(p, np.ones((1, 2, 1, 2)), lambda x: x, lambda x: x)
        array([[[1., 1., 1., 1.]]])
        """
        k, v = k_proj(p["adaption_prompt"]), v_proj(p["adaption_prompt"])
        batch, heads, tokens, c = q.shape
        groups, length = k.shape[-1] // c, k.shape[-2]
        if k.shape != v.shape or groups * c != k.shape[-1] or not groups or heads % groups:
            raise ShapeError(
                f"{self.where}: keys {tuple(k.shape)} and values {tuple(v.shape)} cannot serve "
                f"{heads} heads of {c} channels"
            )
        xp = namespace(q, k, v, p["adaption_gate"])
        k = xp.permute_dims(xp.reshape(k, (length, groups, 1, c)), (1, 2, 3, 0))
        v = xp.permute_dims(xp.reshape(v, (length, groups, 1, c)), (1, 2, 0, 3))
        q = xp.reshape(q, (batch, groups, heads // groups, tokens, c))
        shares = p["adaption_gate"] * softmax(xp.matmul(q, k) / c**0.5)
        y = xp.reshape(xp.matmul(shares, v), (batch, heads, tokens, c))
        return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), (batch, tokens, heads * c))

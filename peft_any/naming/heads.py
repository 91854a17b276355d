"""How attention layers that hold queries, keys and values in one order their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_any.errors import ConfigError
from peft_any.naming.rules import Regroup

_BY_HEADS = {"bloom", "gpt_neox", "gpt_neox_japanese", "persimmon"}
"""Model types of transformers whose rows are those of q, k and v of one head after the other."""
_BY_GROUPS = {"internlm2"}
"""Likewise by groups of heads that share keys and values."""
_JOINED = {"dbrx", "gpt2", "modernbert", "mpt", "phi3", "phi4_multimodal", "qwen"}
_AMBIGUOUS = {"query_key_value", "wqkv", "linear_qkv"}
"""Names that some models use for interleaved rows and some for joined ones."""


@dataclass(frozen=True)
class Heads:
    """What a model's configuration says of its attention.

    Attributes
    ----------
    model_type : str
    heads, shared : int or None
        Heads of the queries; of keys and values.
    width : int or None
        Rows of one head.
    interleaved : bool or None
        Whether fused rows go by groups of heads; None where it is not known.
    """

    model_type: str = ""
    heads: int | None = None
    shared: int | None = None
    width: int | None = None
    interleaved: bool | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        """Read config.json's fields, of a text model inside another too.

        Examples
        --------
        >>> Heads.of({"model_type": "gpt_neox", "num_attention_heads": 8}).interleaved
        True
        """
        inner = config.get("text_config")
        config = inner if isinstance(inner, Mapping) else config
        kind = str(config.get("model_type", ""))

        def number(*names: str) -> int | None:
            found = (config.get(name) for name in names)
            return next((n for n in found if isinstance(n, int) and n > 0), None)

        heads = number("num_attention_heads", "n_head", "n_heads")
        shared = number("num_key_value_heads", "num_kv_heads", "n_head_kv")
        interleaved: bool | None = None
        if kind == "falcon":
            new, single = config.get("new_decoder_architecture"), config.get("multi_query", True)
            interleaved = bool(new) or not single
            shared = (shared or heads) if new else 1 if single else heads
        elif kind == "gpt_bigcode":
            interleaved = not config.get("multi_query", True)
            shared = heads if interleaved else 1
        elif kind in _BY_HEADS:
            interleaved, shared = True, heads
        elif kind in _BY_GROUPS or kind in _JOINED:
            interleaved = kind in _BY_GROUPS
        size = number("hidden_size", "n_embd", "n_embed", "d_model")
        width = number("head_dim") or (size and heads and size // heads) or None
        return cls(kind, heads, shared or heads, width, interleaved)

    def groups(self, rule: Regroup) -> int:
        """Say into how many groups a fused layer's rows are ordered.

        Raises
        ------
        ConfigError
            If the configuration does not tell, and the name does not either.

        Examples
        --------
        >>> from peft_any.naming.rules import read_rules
        >>> (rule,) = read_rules("q+k+v=query_key_value")
        >>> Heads("falcon", 16, 4, 64, interleaved=True).groups(rule)
        4
        """
        last = rule.whole.rpartition(".")[2]
        if rule.groups is not None or len(rule.parts) != 3:
            return rule.groups or 1
        if self.model_type == "codegen":
            raise ConfigError(
                f"{rule.whole}: CodeGen's rows cannot be taken apart: they follow the cores that "
                "it was trained on"
            )
        unknown = self.interleaved is None and last in _AMBIGUOUS
        if unknown or (self.interleaved and self.shared is None):
            raise ConfigError(
                f"{rule.whole}: nothing tells how its rows are ordered: some models go by heads "
                f"there. Say it in the rule: {rule.whole}@1 for all queries, then all keys, then "
                f"all values; {rule.whole}@HEADS, with the number of key and value heads, for one "
                "group of heads after the other"
            )
        return self.shared or 1 if self.interleaved else 1

    def rows(self, rule: Regroup) -> list[int | None]:
        """Give the rows of queries, keys and values, where the configuration tells them."""
        lasts = [part.rpartition(".")[2] for part in rule.parts]
        queries = [last.startswith(("q", "to_q")) for last in lasts]
        if len(lasts) != 3 or sum(queries) != 1 or not (self.heads and self.shared and self.width):
            return [None] * len(lasts)
        return [(self.heads if query else self.shared) * self.width for query in queries]

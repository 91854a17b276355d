"""In which order a model holds its layers, as far as the names of its tensors tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from peft_any.errors import ConfigError

Path: TypeAlias = tuple[str, ...]
_LLAMA = (
    "self_attn mlp q_proj k_proj v_proj o_proj shared_expert shared_expert_gate "
    "gate_proj up_proj down_proj c_fc c_proj"
)
_BERT = "attention intermediate self output query key value query_proj key_proj value_proj"
_BART = "encoder decoder self_attn encoder_attn k_proj v_proj q_proj out_proj fc1 fc2"
_NEOX = "attention self_attention mlp query_key_value dense dense_h_to_4h dense_4h_to_h"
_T5 = "encoder decoder q k v o wi wi_0 wi_1 wo"
_KNOWN = {
    _LLAMA: "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo2 cohere granite stablelm "
    "starcoder2 mixtral qwen2_moe qwen3_moe olmoe gpt_oss",
    _BERT: "bert roberta xlm-roberta camembert electra deberta-v2",
    _BART: "opt bart",
    _NEOX: "gpt_neox bloom falcon",
    _T5: "t5 mt5",
    "attn mlp c_attn c_fc c_proj": "gpt2 gpt_bigcode",
    "attn mlp k_proj v_proj q_proj out_proj c_fc c_proj": "gpt_neo",
    "self_attn mlp o_proj qkv_proj gate_up_proj down_proj": "phi3",
    "attn mlp k_proj v_proj q_proj out_proj fc_in fc_out": "gptj",
    "self_attn mlp q_proj k_proj v_proj dense fc1 fc2": "phi",
    "attention ffn q_lin k_lin v_lin out_lin lin1 lin2": "distilbert",
}
"""Parts of modules in the order in which transformers makes them, and the types of such models."""
_OUTER = ("model", "transformer", "gpt_neox", "lm_head", "score")
"""What these models are made of, where heads come last."""


class UntoldOrderError(ConfigError):
    """The order of a model's layers does not follow from the names of its tensors."""


def known_parts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Give the parts of modules in their order, of a model with this ``config.json``.

    Examples
    --------
    >>> known_parts({"model_type": "gpt2"})[:5]
    ('attn', 'mlp', 'c_attn', 'c_fc', 'c_proj')
    """
    kind = str(config.get("model_type"))
    known = next((parts for parts, of in _KNOWN.items() if kind in of.split()), "")
    return (*known.split(), *_OUTER) if known else ()


def in_model_order(
    modules: Collection[str],
    tensors: Iterable[str],
    parts: Sequence[str] = (),
    *,
    vouched: bool = False,
) -> list[str]:
    """Put modules in the order in which their model holds them.

    Numbered modules follow their numbers. Others follow `parts`, or else the tensors, if these are
    seen to stand in a model's order (a ``state_dict``'s) and not in that of their names (a
    safetensors file's).

    Parameters
    ----------
    modules : collection of str
    tensors : iterable of str
        Names of all tensors, as they come.
    parts : sequence of str
        Last parts of modules' names, in the order that is known (`known_parts`).
    vouched : bool
        Whether the tensors are said to come in the model's order.

    Raises
    ------
    UntoldOrderError
        Where that cannot be told, or what is said cannot be true.

    Examples
    --------
    >>> in_model_order(["h.10.q", "h.9.q"], ["h.10.q.weight", "h.9.q.weight"])
    ['h.9.q', 'h.10.q']
    >>> in_model_order(["q", "k"], ["q.weight", "k.weight"])
    ['q', 'k']
    """
    wanted: dict[Path, set[str]] = defaultdict(set)
    ends = {tuple(name.split(".")) for name in modules}
    for name in ends:
        for i, part in enumerate(name):
            wanted[name[:i]].add(part)
    tree = _Tree(tensors)

    def walk(path: Path) -> Iterator[str]:
        if path in ends:
            yield ".".join(path)
        ways = [part for part in tree.under.get(path, ()) if part in wanted[path]]
        if all(part.isdigit() for part in ways):
            ways.sort(key=int)
        elif all(part in parts for part in ways):
            ways.sort(key=parts.index)
        elif len(ways) > 1:
            tree.trust(path, ways, vouched=vouched)
        for part in ways:
            yield from walk((*path, part))

    found = [*walk(())]
    if lost := sorted({*modules} - {*found}):
        raise UntoldOrderError(f"{', '.join(lost)}: no tensors tell their place in the model")
    return found


class _Tree:
    """Names of modules as a tree, whose branches are in the order of the tensors."""

    def __init__(self, tensors: Iterable[str]) -> None:
        self.under: dict[Path, dict[str, None]] = {}
        self.fault = ""
        before: Path = ()
        for tensor in tensors:
            name = tuple(tensor.split(".")[:-1])
            for i, part in enumerate(name):
                branches = self.under.setdefault(name[:i], {})
                if part in branches and before[: i + 1] != name[: i + 1]:
                    self.fault = self.fault or f"{'.'.join(name[: i + 1])} is in two places"
                branches[part] = None
            before = name
        for path, branches in self.under.items():
            numbers = [int(part) for part in branches if part.isdigit()]
            if numbers != sorted(numbers):
                said = f"{'.'.join((*path, str(numbers[0])))} and what follows are not by number"
                self.fault = self.fault or said

    def trust(self, path: Path, ways: list[str], *, vouched: bool) -> None:
        """Refuse to take the order of the tensors for the model's, unless it is seen to be that."""
        if not self.fault and (vouched or self._unsorted_below(path) or self._often_unsorted):
            return
        they, why = ", ".join(ways), self.fault or "they may be sorted by name"
        raise UntoldOrderError(
            f"{'.'.join((*path, ways[0]))}: the base's tensors do not tell in which order the "
            f"model has {they}: {why}: give a state_dict, as it is (with rederive=True if need "
            "be), a checkpoint whose config.json names a usual model_type, or let files hold what "
            "depends on it (save_indices=True, save_projection=True)"
        )

    def _unsorted_below(self, path: Path) -> bool:
        return any(_unsorted(own) for at, own in self.under.items() if at[: len(path)] == path)

    @cached_property
    def _often_unsorted(self) -> bool:
        """Whether places that differ in numbers alone are all in another order than by name."""
        found: dict[Path, list[bool]] = defaultdict(list)
        for path, own in self.under.items():
            found[tuple("#" if part.isdigit() else part for part in path)].append(_unsorted(own))
        return any(len(each) > 1 and all(each) for each in found.values())


def _unsorted(branches: Iterable[str]) -> bool:
    names = [part for part in branches if not part.isdigit()]
    return names != sorted(names)

r"""Rules that take the names of an adapter's modules to a base's: `--map 'OLD=NEW'`.

``REGEX=REPLACEMENT`` rewrites names as `re.sub` does. ``qkv_proj=q_proj+k_proj+v_proj`` splits a
fused module of the adapter, ``q_proj+k_proj+v_proj=qkv_proj`` fuses split ones. ``k_proj:1024``
says how many outputs a part has, ``query_key_value@8`` that the outputs lie in 8 groups, each with
its share of every part. ``{}`` in parts is an expert's number: ``experts.down_proj=experts.{}.w2``
takes a stack of experts apart, ``experts.{}.w2=experts.down_proj`` stacks them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from peft_any.errors import ConfigError, UsageError, nearest
from peft_any.io._json import read_json
from peft_any.patterns import expression

Names: TypeAlias = str | os.PathLike[str] | Mapping[str, str] | Iterable[str] | None
"""A rule, a JSON file or a preset; several; or ``{OLD: NEW}``."""

_NAME = r"[\w-]+(?:\.[\w-]+)*"
_PART = rf"{_NAME}(?::\d+)?"
_EACH = rf"{_NAME}\.\{{\}}\.{_PART}"
_PARTS = re.compile(rf"{_PART}(?:\+{_PART})+|{_EACH}(?:\+{_EACH})*")
_WHOLE = re.compile(rf"({_NAME})(?:@(\d+))?")


def _attention(within: str) -> dict[str, str]:
    """Rename an attention's projections to what models of images call them in their files."""
    heads = {"q": "query", "k": "key", "v": "value"}
    found = {rf"\battention\.{short}_proj$": f"{within}.{name}" for short, name in heads.items()}
    return found | {r"\battention\.o_proj$": "attention.output.dense"}


PRESETS: dict[str, dict[str, str]] = {
    "llava": {
        r"^model\.language_model\b": "language_model.model",
        r"^model\.(vision_tower|vision_model|multi_modal_projector|image_newline)\b": r"\1",
        r"^lm_head$": "language_model.lm_head",
    },
    "qwen2-vl": {
        r"^model\.language_model\b": "model",
        r"^model\.visual\b": "visual",
    },
    "gpt-neox": {r"^lm_head$": "embed_out"},
    "segformer": {
        r"\bstages\.(\d+)\.patch_embeddings\b": r"encoder.patch_embeddings.\1",
        r"\bstages\.(\d+)\.layer_norm$": r"encoder.layer_norm.\1",
        r"\bstages\.(\d+)\.blocks\b": r"encoder.block.\1",
        r"\battention\.sequence_reduction\.layer_norm$": "attention.self.layer_norm",
        r"\bsequence_reduction\.sequence_reduction$": "self.sr",
        r"\blayernorm_before$": "layer_norm_1",
        r"\blayernorm_after$": "layer_norm_2",
        r"\bmlp\.fc(\d)$": r"mlp.dense\1",
        r"\blinear_projections\b": "linear_c",
        **_attention("attention.self"),
    },
    "swin": {
        r"\bmlp\.fc1$": "intermediate.dense",
        r"\bmlp\.fc2$": "output.dense",
        **_attention("attention.self"),
    },
    "vit": {
        r"(^|(?<!encoder)\.)layers\.(\d+)\.mlp\.fc1$": r"\1layers.\2.intermediate.dense",
        r"(^|(?<!encoder)\.)layers\.(\d+)\.mlp\.fc2$": r"\1layers.\2.output.dense",
        r"(^|(?<!encoder)\.)layers\.(\d+)\b": r"\1encoder.layer.\2",
        **_attention("attention.attention"),
    },
    "mixtral": {
        "mlp.experts.gate_up_proj": "block_sparse_moe.experts.{}.w1+block_sparse_moe.experts.{}.w3",
        "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2",
        r"\bmlp\.gate$": "block_sparse_moe.gate",
    },
    "qwen-moe": {
        "experts.gate_up_proj": "experts.{}.gate_proj+experts.{}.up_proj",
        "experts.down_proj": "experts.{}.down_proj",
    },
    "mixtral-stacked": {
        "block_sparse_moe.experts.{}.w1+block_sparse_moe.experts.{}.w3": "mlp.experts.gate_up_proj",
        "block_sparse_moe.experts.{}.w2": "mlp.experts.down_proj",
        r"\bblock_sparse_moe\.gate$": "mlp.gate",
    },
    "qwen-moe-stacked": {
        "experts.{}.gate_proj+experts.{}.up_proj": "experts.gate_up_proj",
        "experts.{}.down_proj": "experts.down_proj",
    },
}
"""Names in the memory of transformers 5, by the names that the same models have in their files; and
the other way round for adapters that are older than stacks of experts (``-stacked``)."""


@dataclass(frozen=True)
class Rename:
    """Rewrite what a regular expression finds in a module's name.

    Attributes
    ----------
    label : str
        How messages call the rule: as it was given.
    pattern : re.Pattern
    to : str
    """

    label: str
    pattern: re.Pattern[str]
    to: str

    def __call__(self, name: str) -> str:
        """Rewrite one name."""
        return self.pattern.sub(self.to, name)


@dataclass(frozen=True)
class Regroup:
    """Split one fused module of the adapter into its parts, or fuse them.

    Attributes
    ----------
    label : str
    whole : str
        The last dotted parts of the fused module's name.
    parts : tuple of str
    sizes : tuple of int or None
        Outputs of each part, where the rule says it.
    groups : int or None
        Into how many groups the fused outputs are ordered, each with its share of every part.
    fuses : bool
    """

    label: str
    whole: str
    parts: tuple[str, ...]
    sizes: tuple[int | None, ...]
    groups: int | None
    fuses: bool

    @property
    def stacks(self) -> bool:
        """Whether the parts are those of every expert, and the whole one tensor of all."""
        return "{}" in self.parts[0]


Rule: TypeAlias = Rename | Regroup


def read_rules(names: Names) -> tuple[Rule, ...]:
    r"""Read rules, in the order in which they act, each on what the one before it made.

    Parameters
    ----------
    names : str, path, mapping or iterable of str, optional
        ``"OLD=NEW"``; the path of a ``.json`` file, which holds an object ``{OLD: NEW}``; a
        preset's name; several of these; or a mapping ``{OLD: NEW}``.

    Raises
    ------
    UsageError
        For what is no rule.

    Examples
    --------
    >>> rename, split = read_rules([r"^bert\.=", "qkv@2=q+k:4+v:4"])
    >>> rename("bert.encoder")
    'encoder'
    >>> split.parts, split.sizes, split.groups, split.fuses
    (('q', 'k', 'v'), (None, 4, 4), 2, False)
    """
    if names is None:
        return ()
    if isinstance(names, str | os.PathLike):
        names = [os.fspath(names)]
    return tuple(_read(names))


def _read(names: Any) -> Iterator[Rule]:
    if isinstance(names, Mapping):
        for old, new in names.items():
            yield _rule(str(old), str(new), f"{old}={new}")
        return
    for text in names:
        old, equals, new = str(text).rpartition("=")
        if str(text).endswith(".json"):
            yield from _read(_file(Path(text)))
        elif str(text) in PRESETS:
            yield from (_rule(a, b, str(text)) for a, b in PRESETS[str(text)].items())
        elif not equals or not old:
            raise UsageError(
                f"map {text!r}: is no rule{nearest(str(text), PRESETS)}: give OLD=NEW, a .json "
                f"file, or one of {', '.join(PRESETS)}"
            )
        else:
            yield _rule(old, new, str(text))


def _file(path: Path) -> dict[str, str]:
    found = read_json(path)
    if not all(isinstance(value, str) for value in found.values()):
        raise UsageError(f'{path}: is no map: give {{"OLD": "NEW", …}}')
    return found


def _rule(old: str, new: str, label: str) -> Rule:
    for one, many, fuses in ((new, old, True), (old, new, False)):
        whole = _WHOLE.fullmatch(one)
        if whole and _PARTS.fullmatch(many):
            return _regroup(whole, many, label, fuses)
    if re.search(r"[+@:=]", new):
        raise UsageError(
            f"map {label!r}: {new!r} cannot be a module's name: a split reads WHOLE=PART+PART, "
            "with plain names on both sides"
        )
    try:
        pattern = expression(old, f"map {label!r}")
    except ConfigError as error:
        raise UsageError(str(error)) from None
    try:
        pattern.sub(new, "")
    except (re.error, IndexError) as error:
        raise UsageError(f"map {label!r}: {old!r} cannot be replaced so: {error}") from None
    groups = [int(n) for n in re.findall(r"\\(\d+)", new)]
    if max(groups, default=0) > pattern.groups:
        raise UsageError(f"map {label!r}: {old!r} has {pattern.groups} groups, not {max(groups)}")
    return Rename(label, pattern, new)


def _regroup(whole: re.Match[str], many: str, label: str, fuses: bool) -> Regroup:
    pairs = [part.partition(":") for part in many.split("+")]
    parts = tuple(name for name, _, _ in pairs)
    if len(set(parts)) < len(parts):
        raise UsageError(f"map {label!r}: names a part twice")
    sizes = tuple(int(size) if size else None for _, _, size in pairs)
    groups = whole[2] and int(whole[2])
    if groups == 0 or 0 in sizes:
        raise UsageError(f"map {label!r}: 0 cannot be a number of groups or outputs")
    return Regroup(label, whole[1], parts, sizes, groups or None, fuses)

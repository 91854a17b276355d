"""What to try where an adapter's modules are not those of the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_APART = re.compile(r"(?:.*\.)?experts\.\d+\.(\w+)(?:\.weight)?")
_STACKED = re.compile(r"(?:.*\.)?experts\.\w+_proj")


def prefix_hint(missing: list[str], base: Mapping[str, Any]) -> str:
    """Suggest the prefix with which, or without which, all missing modules are there."""
    more = [{b[: -len(n)] for b in base if b.endswith(f".{n}")} for n in missing]
    less = [{n[: -len(b)] for b in base if b and n.endswith(f".{b}")} for n in missing]
    for found, how in ((set.intersection(*more), ""), (set.intersection(*less), "out")):
        if len(found) == 1:
            prefix = found.pop()
            rule = f"--map '^{re.escape(prefix)}='" if how else f"--map '^={prefix}'"
            return (
                f"\nall of them are there with{how} the prefix {prefix!r}: rename the "
                f"adapter's modules: {rule} (Adapter.renamed in Python)"
            )
    return ""


def experts_hint(missing: Iterable[str], tensors: Iterable[str]) -> str:
    r"""Say which `--map` brings an adapter's experts to a base that stores them otherwise.

    Examples
    --------
    >>> experts_hint(["h.mlp.experts"], ["h.block_sparse_moe.experts.0.w1.weight"])[:39]
    '\nthe base stores experts apart, and the'
    """
    names = [*tensors]
    apart = {hit[1] for name in names if (hit := _APART.fullmatch(name))}
    stacked = any(_STACKED.fullmatch(name) for name in names)
    for name in missing:
        part = _APART.fullmatch(name)
        if part and stacked:
            preset = "mixtral-stacked" if part[1] in ("w1", "w2", "w3") else "qwen-moe-stacked"
            return (
                "\nthe adapter has experts apart, and the base stores them in one tensor: give "
                f"--map {preset}, or rules like 'experts.{{}}.w2=experts.down_proj' (names=)"
            )
        if apart and "experts" in name.split(".") and not part:
            preset = "mixtral" if "w1" in apart else "qwen-moe"
            return (
                "\nthe base stores experts apart, and the adapter has them in one tensor: give "
                f"--map {preset}, or rules like 'experts.down_proj=experts.{{}}.w2' (names=)"
            )
    return ""


def empty_hint(params: Mapping[str, Mapping[str, Any]]) -> str:
    """Say where tensors of shape (0,) come from; nothing where other shapes are empty, or none.

    Examples
    --------
    >>> import numpy as np
    >>> empty_hint({"fc": {"lora_A.weight": np.zeros(0)}}).strip()[:39]
    'empty tensors are what DeepSpeed ZeRO-3'
    """
    shapes = {tuple(array.shape) for p in params.values() for array in p.values()}
    if {shape for shape in shapes if 0 in shape} != {(0,)}:
        return ""
    return (
        "\nempty tensors are what DeepSpeed ZeRO-3 saves of parameters that are not gathered: save "
        "the adapter within deepspeed.zero.GatheredParameters"
    )

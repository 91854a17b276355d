"""Methods that Hugging Face PEFT has renamed: their files are read as the methods they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_METHODS = {"BONE": "MISS"}
_BIASES = {"bone_only": "miss_only", "Bone_only": "miss_only"}
PARTS = {"MISS": {"bone_block": "miss_block"}}
"""By method, what a part of a tensor's name was, and what it is now."""


def renewed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the contents of a configuration file to the method's present names.

    Examples
    --------
    >>> renewed({"peft_type": "BONE", "r": 4, "bias": "bone_only"})
    {'peft_type': 'MISS', 'r': 4, 'bias': 'miss_only'}
    """
    name, bias = raw.get("peft_type"), raw.get("bias")
    if not isinstance(name, str) or name not in _METHODS:
        return dict(raw)
    new = {**raw, "peft_type": _METHODS[name]}
    return {**new, "bias": _BIASES[bias]} if isinstance(bias, str) and bias in _BIASES else new

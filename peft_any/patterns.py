"""Numbers by name: `rank_pattern` and its kin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft_any.errors import ConfigError


def matching(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    r"""Look a site's number up in a `rank_pattern`-like mapping of regular expressions.

    The first key, in order, that matches the whole name or the name after a dot is the one.

    Examples
    --------
    >>> matching({r"layers.\d+.q": 4, "k": 2}, "model.layers.0.q", 8)
    4
    >>> matching({"k": 2}, "layers.0.q", 8)
    8
    """
    for key, value in (pattern or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise ConfigError(f"pattern {key!r}: not a regular expression: {error}") from None
        if found:
            return value
    return default

"""Regular expressions in configurations: numbers by name, and expressions that never end."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from math import comb
from typing import Any

from peft_any.errors import ConfigError

_PATIENCE = 5.0
_STEPS = 10**8
"""What is tried in the process itself: so many steps take the matcher a second or two."""
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        for name in names:
            re.match(pattern, name), re.fullmatch(pattern, name)
    except (re.error, OverflowError, RecursionError):
        pass  # it is refused where it is used
    print(flush=True)
"""


def expression(pattern: str, where: str) -> re.Pattern[str]:
    """Compile an expression of somebody else's.

    Parameters
    ----------
    pattern : str
    where : str
        The field, for the message.

    Raises
    ------
    ConfigError
        If it is none.

    Examples
    --------
    >>> expression("q|k", "target_modules").fullmatch("k") is not None
    True
    """
    try:
        return _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {pattern!r:.80} is not a regular expression: {error}"
        ) from None


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what "[[" may mean one day
        return re.compile(pattern)


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
        if expression(rf"(.*\.)?({key})$", f"pattern {key!r:.80}").match(name):
            return value
    return default


def matching_end(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    r"""Look a site's number up as C3A and FourierFT do in Hugging Face PEFT.

    The first key that matches the name after a dot is the one; a whole name has to be the key.

    Examples
    --------
    >>> matching_end({"q.": 4}, "layers.0.qs", 8), matching_end({"q.": 4}, "qs", 8)
    (4, 8)
    >>> matching_end({"qs": 4}, "qs", 8)
    4
    """
    keys = pattern or {}
    for key, value in keys.items():
        if expression(rf".*\.{key}$", f"pattern {key!r:.80}").match(name):
            return value
    return keys.get(name, default)


def is_parameter(tensor: str, targets: Iterable[str]) -> bool:
    """Whether `target_parameters` names a tensor, in full or by its last parts.

    Examples
    --------
    >>> is_parameter("layers.0.experts.down_proj", ("experts.down_proj",))
    True
    """
    return any(tensor == target or tensor.endswith(f".{target}") for target in targets)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names as their layers follow one another: numbers in them by value.

    Examples
    --------
    >>> in_order(["h.10.fc", "h.9.fc"])
    ['h.9.fc', 'h.10.fc']
    """

    def key(name: str) -> list[tuple[int, str]]:
        parts = re.split("([0-9]+)", name)
        return [(int(part) if i % 2 else -1, part) for i, part in enumerate(parts)]

    return sorted(names, key=key)


def refuse_endless(config: Any, names: Iterable[str]) -> None:
    r"""Refuse expressions that would be tried on these names until the end of days.

    Python's matcher cannot be stopped. So those that could take long (repetitions of
    repetitions, or many of them) are first tried by a process that can.

    Raises
    ------
    ConfigError
        Naming the field and the expression.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> refuse_endless(LoraConfig(target_modules=r".*\.q_proj"), ["layers.0.q_proj"])
    """
    known = tuple(dict.fromkeys(names))
    longest = max(map(len, known), default=0)
    found = [
        (field, given, tried)
        for field, given, tried in _expressions(config)
        if _may_take_long(tried, longest, len(known))
    ]
    done = _tried(tuple(tried for *_, tried in found), known) if found else 0
    if done < len(found):
        field, given, _ = found[done]
        raise ConfigError(
            f"{config.where}: {field}: {given!r:.80} cannot be used: trying it on the names of the "
            "modules takes too long; write it without repetitions within repetitions"
        )


def _expressions(config: Any) -> Iterator[tuple[str, str, str]]:
    """Give the field, the expression as it stands there, and as it is tried."""
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str):
            yield field, value, value
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field, None) or ():
            yield field, key, rf"(.*\.)?({key})$"
    for field in ("layers_pattern", "modules_to_save"):
        value = getattr(config, field, None) or ()
        for entry in [value] if isinstance(value, str) else value:
            yield field, entry, rf"(?:^|.*?\.){entry}"


def _may_take_long(pattern: str, longest: int, count: int) -> bool:
    repeats = len(re.findall(r"[*+]|\{\d*,", pattern))
    steps = comb(longest, min(repeats, longest // 2))
    nested = re.search(r"\)[*+{]", pattern) is not None
    return nested or pattern.count("?") > 12 or steps * count > _STEPS


@lru_cache(64)
def _tried(patterns: tuple[str, ...], names: tuple[str, ...]) -> int:
    """Count the expressions that were tried in time."""
    import subprocess  # noqa: PLC0415 - for few patterns

    command = [sys.executable or "python", "-I", "-S", "-c", _TRIAL]
    task = json.dumps([patterns, names])
    try:
        subprocess.run(  # noqa: S603 - our own program, given data
            command, input=task, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except subprocess.TimeoutExpired as cause:
        return len(cause.stdout or b"")
    except (OSError, subprocess.SubprocessError):  # no processes here
        return len(patterns)
    return len(patterns)

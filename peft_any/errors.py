"""Every error the package raises on purpose; each is also the builtin a caller would expect."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any


class PeftError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the command line's."""

    exit_code = 3


class UsageError(PeftError, ValueError):
    """The call itself makes no sense: options that contradict one another."""

    exit_code = 2


class ConfigError(PeftError, ValueError):
    """A configuration with a wrong, missing, contradictory or unsupported field."""


class ShapeError(PeftError, ValueError):
    """An array whose shape or dtype does not fit its place."""


class TargetError(PeftError, ValueError):
    """Adapter tensors or configured targets without a place in the base."""


class FormatError(PeftError, ValueError):
    """A file whose contents are malformed, truncated or hostile."""

    exit_code = 5


class StorageError(PeftError, OSError):
    """Reading or writing failed: missing, unreadable, existing, read-only, full."""

    exit_code = 5


class BackendError(PeftError, RuntimeError):
    """An array library, device or dtype that is not there or does not fit."""


class Irreversible(PeftError, TypeError):  # noqa: N818 - reads as the fact it states
    """A merge that cannot be undone from the merged weight alone."""


class GradientError(PeftError, TypeError):
    """A computation that cannot be differentiated, or an array that cannot be trained."""


class TrainingError(PeftError, ArithmeticError):
    """A training step whose loss or gradient is not finite."""


class VerifyError(PeftError, ValueError):
    """A merge that did not keep what was asked of it; `receipt` says what it kept."""

    exit_code = 4
    receipt: Any = None


_MOST, _LONGEST = 5_000, 300
"""How many names are compared, of what length: the comparison takes milliseconds each."""


def nearest(name: str, known: Iterable[str], *, n: int = 3) -> str:
    """Suggest known names: ``" (nearest: 'a', 'b')"``, or an empty string.

    Examples
    --------
    >>> nearest("q_porj", ["q_proj", "lm_head"])
    " (nearest: 'q_proj')"
    """
    from difflib import get_close_matches  # noqa: PLC0415 - for errors alone

    if len(name) > _LONGEST:
        return ""
    pool = [k for k in islice(known, _MOST) if len(k) <= _LONGEST]
    close = get_close_matches(name, pool, n=n, cutoff=0.6)
    tail = name.rsplit(".", 1)[-1]
    close += [k for k in pool if k.rsplit(".", 1)[-1] == tail and k not in close][: n - len(close)]
    return f" (nearest: {', '.join(map(repr, close))})" if close else ""

"""The receipt: what went where, and how much of each change survived rounding."""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from math import isfinite, prod
from typing import Any

import numpy.typing as npt

from peft_any import __version__
from peft_any._imports import imported
from peft_any._typing import Shape
from peft_any.errors import VerifyError

SCHEMA_VERSION = 2
"""Raised whenever a field of the JSON changes its meaning or goes away."""
_WORST = 5
Host = npt.NDArray[Any]


class Clock:
    """Times the parts of a work, which together are the whole time since it was made.

    Examples
    --------
    >>> clock = Clock()
    >>> [*clock.lap("compute")], [*clock.lap("sync")]
    (['compute'], ['compute', 'sync'])
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, name: str) -> dict[str, float]:
        """End a part, and give all of them, in seconds."""
        now = time.perf_counter()
        self._seconds[name], self._since = round(now - self._since, 3), now
        return dict(self._seconds)


@dataclass(frozen=True)
class Source:
    """An adapter that took part: where it came from, its weight, digests of its files."""

    label: str
    weight: float
    peft_type: str
    path: str | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Use:
    """An adapter tensor and the base tensors it went into; none, and why."""

    adapter: str
    tensor: str
    to: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Target:
    """A configured target and the modules it matched."""

    adapter: str
    field: str
    entry: str
    matched: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What became of one touched tensor.

    Attributes
    ----------
    tensor : str
    by : tuple of str
        The methods, ``copy`` for a full new value, ``rows`` for an embedding's rows.
    dtype, shape, base_dtype, base_shape
        After and before.
    base_norm, delta_norm : float
        ‖W‖ and ‖Δ‖ (Frobenius).
    kept, error, unchanged : float
        With R = W′ − W as stored: ⟨R, Δ⟩/⟨Δ, Δ⟩, ‖R − Δ‖/‖Δ‖ (None where Δ is zero), and the
        share of elements with R = 0.
    """

    tensor: str
    by: tuple[str, ...]
    dtype: str
    shape: Shape
    base_dtype: str
    base_shape: Shape
    base_norm: float
    delta_norm: float
    kept: float | None
    error: float | None
    unchanged: float

    @property
    def relative(self) -> float | None:
        """‖Δ‖/‖W‖."""
        return self.delta_norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True, repr=False)
class Receipt:
    """The record of a merge, or of the audit of one; `to_json` is what `--json` prints.

    Attributes
    ----------
    kind : str
        ``merge`` or ``verify``.
    base, out : dict
        Path, fingerprint, counts; `out` is empty after a dry run.
    adapters, uses, targets, changes
        One entry for each adapter, adapter tensor, configured target, and touched tensor.
    copied : int
        Tensors taken over byte for byte.
    untied : tuple of str
        Tensors that shared storage before and do not any more.
    problems : tuple of str
        What `verify` found wrong.
    options, warnings, versions, seconds, peak_memory
        How it was made. `peak_memory` (bytes) is the whole process's, mapped file pages that
        are resident included; None where the system does not tell.
    """

    kind: str
    base: dict[str, Any]
    adapters: tuple[Source, ...]
    uses: tuple[Use, ...]
    targets: tuple[Target, ...]
    changes: tuple[Change, ...]
    copied: int
    out: dict[str, Any] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None

    def __repr__(self) -> str:
        said = [f"{len(self.changes)} tensors changed", f"{self.copied} as in the base"]
        said += [] if self.kept is None else [f"kept {self.kept:.4f}"]
        said += [f"{len(self.problems)} problems"] if self.problems else []
        return f"<Receipt of a {self.kind}: {', '.join(said)}>"

    @property
    def kept(self) -> float | None:
        """The share of all wanted changes together that was realised; None without any."""
        some = [(c.kept, c.delta_norm**2) for c in self.changes if c.kept is not None]
        total = sum(square for _, square in some)
        return sum(kept * square for kept, square in some) / total if total else None

    @property
    def unchanged(self) -> float | None:
        """Share of the touched tensors' elements that did not move."""
        sizes = [(c.unchanged, prod(c.shape)) for c in self.changes]
        total = sum(size for _, size in sizes)
        return sum(share * size for share, size in sizes) / total if total else None

    @property
    def worst(self) -> Change | None:
        """The touched tensor that kept least."""
        some = [c for c in self.changes if c.kept is not None]
        return min(some, key=lambda c: c.kept or 0.0, default=None)

    def check(self, min_kept: float | None = None) -> None:
        """Refuse a merge with problems, or of which too little survived.

        Raises
        ------
        VerifyError
            Listing them; its `receipt` is this one.
        """
        low = too_little(self.changes, min_kept)
        hint = ["try a wider dtype for the touched tensors (--dtype float32)"] if low else []
        faults = [*self.problems, *low, *hint]
        if faults:
            error = VerifyError("\n".join(faults))
            error.receipt = self
            raise error

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        summary = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "ok": not self.problems,
            "kept": self.kept,
            "worst": None if self.worst is None else self.worst.tensor,
            "unchanged": self.unchanged,
        }
        found: dict[str, Any] = plain(summary | asdict(self))
        for entry, change in zip(found["changes"], self.changes, strict=True):
            entry["relative"] = change.relative
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)


def too_little(changes: tuple[Change, ...], min_kept: float | None) -> list[str]:
    """Describe the touched tensors that kept less than asked, the worst first."""
    if min_kept is None:
        return []
    low = sorted((c.kept, c.tensor, c) for c in changes if c.kept is not None and c.kept < min_kept)
    said = [
        f"{name}: kept {kept:.4f} of its change, less than {min_kept:g}: {c.unchanged:.1%} of "
        f"its elements did not move in {c.dtype}"
        for kept, name, c in low[:_WORST]
    ]
    if len(low) > _WORST:
        said.append(f"and {len(low) - _WORST} more tensors")
    return said


def plain(value: Any) -> Any:
    """Bring a nest to JSON's types: tuples become lists, numbers that are not finite None.

    Examples
    --------
    >>> plain({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def to_json(value: Any, indent: int | None = 2) -> str:
    """Write plain values as JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def versions() -> dict[str, str]:
    """Name the versions of what computed."""
    found = {"peft_any": __version__, "python": platform.python_version()}
    for package in ("numpy", "ml_dtypes", "array_api_compat"):
        found[package.replace("_", "-")] = imported(package).__version__
    return found


def peak_memory() -> int | None:
    """Give the largest resident memory that this process has had, in bytes, where known."""
    try:
        import resource  # noqa: PLC0415 - Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

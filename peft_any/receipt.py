"""The receipt: what went where, and how much of each change survived rounding."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from math import isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_any import __version__
from peft_any._typing import Shape
from peft_any.errors import ShapeError, VerifyError

SCHEMA_VERSION = 1
"""Raised whenever a field of the JSON changes its meaning or goes away."""
_BLOCK = 1 << 18
"""Elements of a block: its double-precision copies stay in the cache."""
_WORST = 5
Host = npt.NDArray[Any]


@dataclass(frozen=True)
class Moments:
    """Sums over a weight W, a wanted change Δ and the realised one R = W′ − W.

    Attributes
    ----------
    base2, delta2, dot, miss2 : float
        ‖W‖², ‖Δ‖², ⟨R, Δ⟩ and ‖R − Δ‖², in double precision.
    same, size : int
        Elements with W′ = W, and all.
    """

    base2: float = 0.0
    delta2: float = 0.0
    dot: float = 0.0
    miss2: float = 0.0
    same: int = 0
    size: int = 0

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def kept(self) -> float | None:
        """⟨R, Δ⟩/⟨Δ, Δ⟩: the share of the wanted change that was realised; None without one."""
        return self.dot / self.delta2 if self.delta2 else None

    @property
    def error(self) -> float | None:
        """‖R − Δ‖/‖Δ‖."""
        return sqrt(self.miss2 / self.delta2) if self.delta2 else None

    @property
    def unchanged(self) -> float:
        """Share of elements that did not move."""
        return self.same / self.size if self.size else 1.0


def measure(
    base: Host, realised: Host, *, delta: Host | None = None, exact: Host | None = None
) -> Moments:
    """Compare a realised change with the wanted one, in blocks of rows and double precision.

    Parameters
    ----------
    base : array (m, …)
        W, as it is stored.
    realised : array (m′, …)
        W′. Rows that only one of the two has: new ones are measured against zero, lost ones
        are left out.
    delta, exact : array (m′, …), one of them
        Δ, or W + Δ before rounding.

    Examples
    --------
    >>> w, d = np.ones(4, "float16"), np.full(4, 1e-4, "float32")
    >>> lost = measure(w, (w + d).astype("float16"), delta=d)
    >>> lost.kept, lost.error, lost.unchanged
    (0.0, 1.0, 1.0)
    """
    wanted = exact if delta is None else delta
    if realised.ndim == 0 and wanted is not None:
        base, realised, wanted = base.reshape(1), realised.reshape(1), wanted.reshape(1)
    if wanted is None or wanted.shape != realised.shape or base.shape[1:] != realised.shape[1:]:
        raise ShapeError(
            f"measure: {base.shape}, {realised.shape} and "
            f"{None if wanted is None else wanted.shape} cannot be compared"
        )
    total = Moments()
    for rows in _blocks(realised):
        after = _double(realised[rows])
        before = np.zeros_like(after)
        known = _double(base[rows])
        before[: known.shape[0]] = known
        change = _double(wanted[rows])
        if delta is None:
            change -= before
        moved = after - before
        total += Moments(
            float(np.vdot(known, known)),
            float(np.vdot(change, change)),
            float(np.vdot(moved, change)),
            0.0,
            moved.size - int(np.count_nonzero(moved)),
            moved.size,
        )
        moved -= change
        total += Moments(miss2=float(np.vdot(moved, moved)))
    return total


def all_finite(array: Host) -> bool:
    """Whether an array has neither NaN nor infinities, checked in blocks.

    Examples
    --------
    >>> all_finite(np.ones(3)), all_finite(np.asarray([[1.0, np.inf]]))
    (True, False)
    """
    table = array if array.ndim else array.reshape(1)
    return all(bool(np.isfinite(_double(table[rows])).all()) for rows in _blocks(table))


def _blocks(array: Host) -> Iterator[slice]:
    width = max(array.size // max(array.shape[0], 1), 1)
    step = max(_BLOCK // width, 1)
    for start in range(0, array.shape[0], step):
        yield slice(start, start + step)


def _double(block: Host) -> Host:
    return np.ascontiguousarray(block).astype(np.float64)


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
        See `Moments`; None where Δ is zero.
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


def change_of(
    tensor: str, by: tuple[str, ...], base: Host, realised: Host, moments: Moments
) -> Change:
    """Put the numbers of one touched tensor together."""
    return Change(
        tensor,
        by,
        realised.dtype.name,
        tuple(realised.shape),
        base.dtype.name,
        tuple(base.shape),
        sqrt(moments.base2),
        sqrt(moments.delta2),
        moments.kept,
        moments.error,
        moments.unchanged,
    )


@dataclass(frozen=True)
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

    @property
    def kept(self) -> float | None:
        """The share of all wanted changes together that was realised; None without any."""
        some = [(c.kept, c.delta_norm**2) for c in self.changes if c.kept is not None]
        total = sum(square for _, square in some)
        return sum(kept * square for kept, square in some) / total if total else None

    @property
    def unchanged(self) -> float | None:
        """Share of the touched tensors' elements that did not move."""
        sizes = [(c.unchanged, int(np.prod(c.shape))) for c in self.changes]
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
            Listing them.
        """
        faults = list(self.problems) + too_little(self.changes, min_kept)
        if faults:
            raise VerifyError("\n".join(faults))

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
        return plain(summary | asdict(self))

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
    if low:
        said.append("try a wider dtype for the touched tensors (--dtype float32)")
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
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def to_json(value: Any, indent: int | None = 2) -> str:
    """Write plain values as JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def versions() -> dict[str, str]:
    """Name the versions of what computed."""
    found = {"peft_any": __version__, "python": platform.python_version()}
    for package in ("numpy", "ml-dtypes", "array-api-compat"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def peak_memory() -> int | None:
    """Give the largest resident memory that this process has had, in bytes, where known."""
    try:
        import resource  # noqa: PLC0415 - Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

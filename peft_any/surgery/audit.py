"""Comparing a merged checkpoint with the base and the adapters, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from peft_any.backend import is_floating
from peft_any.errors import nearest
from peft_any.io.checkpoint import Checkpoint
from peft_any.receipt import Change, Host, too_little
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.job import Progress
from peft_any.surgery.measure import all_finite, equal_bytes
from peft_any.surgery.plan import Plan

Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What one expected tensor is like.

    Attributes
    ----------
    problem, warning : str
        Empty if there is none.
    change : Change or None
        Of a touched tensor.
    same : bool
        Whether an untouched one is the base's.
    """

    problem: str = ""
    warning: str = ""
    change: Change | None = None
    same: bool = False


Elsewhere: TypeAlias = Callable[[list[Names], Callable[[Names, dict[str, Finding]], None]], None]
"""Has other processes look at tensors, shard by shard, and calls back with each."""


@dataclass
class Audit:
    """One comparison under way."""

    plan: Plan
    surgeon: Surgeon
    theirs: Checkpoint
    min_kept: float
    changes: list[Change] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    copied: int = 0

    def __post_init__(self) -> None:
        self._stands = {name: group[0] for group in self.theirs.tied for name in group}

    def run(self, progress: Progress | None, elsewhere: Elsewhere | None = None) -> None:
        """Compare everything."""
        base, added = self.plan.base, self.plan.added
        found: dict[str, Finding] = {}
        done = 0

        def tick(names: Names, findings: dict[str, Finding]) -> None:
            nonlocal done
            found.update(findings)
            done += sum(base.info(name).nbytes for name in names if name in base)
            if progress is not None:
                progress(done, base.nbytes, names[-1])

        expected = [*base, *added]
        if elsewhere is None:
            for name in expected:
                tick((name,), {name: self.finding(name)})
        else:
            shards = [tuple(shard) for shard in base.shards if len(shard)]
            elsewhere(shards + ([tuple(added)] if added else []), tick)
        for name in expected:
            self._note(found[name])
        for name in self.theirs:
            if name not in found:
                self._extra(name)
        config, untied = self.theirs.config, self.plan.untied
        if untied and config and config.get("tie_word_embeddings") is not False:
            self.problems.append(
                f"{' and '.join(untied)}: config.json of the merged checkpoint ties them, and the "
                "adapter makes them differ"
            )
        self.problems += too_little(tuple(self.changes), self.min_kept)

    def finding(self, name: str) -> Finding:
        """Look at one expected tensor."""
        found = self._found(name)
        if found is None:
            close = nearest(name, self.theirs)
            return Finding(f"{name}: is missing from the merged checkpoint{close}")
        source = self.plan.source(name)
        return (
            self._untouched(name, found) if source is None else self._touched(name, source, found)
        )

    def _note(self, found: Finding) -> None:
        self.problems += [found.problem] if found.problem else []
        self.warnings += [found.warning] if found.warning else []
        self.changes += [] if found.change is None else [found.change]
        self.copied += found.same

    def _found(self, name: str) -> Host | None:
        return self.theirs.get(name if name in self.theirs else self._stands.get(name, name))

    def _extra(self, name: str) -> None:
        twins = [group[0] for group in self.plan.base.tied if name in group]
        same = twins and twins[0] in self.theirs
        if same and equal_bytes(self.theirs[name], self.theirs[twins[0]]):
            self.warnings.append(f"{name}: is stored although it is tied to {twins[0]}")
        else:
            self.problems.append(f"{name}: is extra: the base has no such tensor")

    def _untouched(self, name: str, found: Host) -> Finding:
        base = self.plan.base[self.plan.added.get(name, name)]
        if equal_bytes(base, found):
            return Finding(same=True)
        if base.shape != found.shape:
            return Finding(f"{name}: has shape {found.shape}, in the base {base.shape}")
        if base.dtype != found.dtype and _same_values(base, found):
            said = f"is stored as {found.dtype.name}, in the base as {base.dtype.name}"
            return Finding(warning=f"{name}: {said}, with the same values", same=True)
        how = "" if base.dtype == found.dtype else f" ({base.dtype.name} → {found.dtype.name})"
        return Finding(f"{name}: is changed{how}, and no adapter touches it")

    def _touched(self, name: str, source: str, found: Host) -> Finding:
        shape = tuple(self.plan.view.info(source).shape)
        if shape != found.shape:
            return Finding(f"{name}: has shape {found.shape} and should have {shape}")
        if is_floating(found) and not all_finite(found):
            return Finding(f"{name}: has NaN or infinite values")
        theirs, best, strays = self.surgeon.audited(source, found)
        warning = ""
        if theirs.dtype != theirs.base_dtype:
            warning = f"{name}: is {theirs.dtype}, in the base {theirs.base_dtype}"
        doubt = self._doubt(name, theirs, best)
        if not doubt and theirs.kept is not None and strays.stray(theirs.dtype, theirs.base_dtype):
            place = [int(i) for i in np.unravel_index(strays.place, found.shape)]
            doubt = (
                f"{name}: the element at {place} is off by {strays.off:.2g}, far more than its "
                f"rounding to {theirs.dtype} and all other elements: it was changed"
            )
        return Finding(doubt, warning, theirs)

    def _doubt(self, name: str, theirs: Change, best: Change) -> str:
        if theirs.kept is None or theirs.error is None:
            if theirs.unchanged < 1:
                return f"{name}: is changed, and the adapter's change is zero"
            return ""
        margin = 1 - self.min_kept
        limit = margin + 2 * (best.error or 0.0)
        if theirs.kept > 1 + margin:
            return (
                f"{name}: holds {theirs.kept:.3f} times the adapter's change: was it merged twice, "
                "or with another scale?"
            )
        if theirs.kept >= self.min_kept and theirs.error > limit:
            return (
                f"{name}: differs from the adapter's change by {theirs.error:.3f} of its norm, and "
                f"rounding explains {best.error:.3f}: something else was changed too"
            )
        return ""


def _same_values(one: Host, two: Host) -> bool:
    if not (is_floating(one) and is_floating(two)):
        return False
    step = 1 << 18
    a, b = one.reshape(-1), two.reshape(-1)
    return all(
        np.array_equal(a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64))
        for i in range(0, a.size, step)
    )

"""Auditing a merged checkpoint, whoever made it."""

from __future__ import annotations

import time

import numpy as np

from peft_any.backend import Backend, is_floating
from peft_any.errors import nearest
from peft_any.io._atomic import StrPath
from peft_any.io.checkpoint import Checkpoint
from peft_any.naming.rules import Names
from peft_any.receipt import Change, Host, Receipt, peak_memory, too_little, versions
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress, described
from peft_any.surgery.measure import all_finite, equal_bytes
from peft_any.surgery.plan import Plan, make_plan
from peft_any.surgery.sources import Adapters, Kinds
from peft_any.surgery.ties import settle_ties

MIN_KEPT = 0.9


def verify_checkpoint(
    base: StrPath,
    adapter: Adapters,
    merged: StrPath,
    *,
    min_kept: float = MIN_KEPT,
    check: bool = True,
    strict: bool = True,
    progress: Progress | None = None,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    rederive: bool = False,
    names: Names = None,
) -> Receipt:
    """Audit a merged checkpoint, whoever made it, against the base and the adapters.

    Every touched tensor is measured as a merge measures its own; every other one must be
    byte-identical, or equal in a wider dtype.

    Parameters
    ----------
    base, adapter, strict, progress, backend, kinds, rederive, names
        As for `merge_checkpoint`.
    merged : path
        The checkpoint to audit.
    min_kept : float
        The least share of its change that each touched tensor must have kept. What is there
        beyond the change must not exceed the same margin either: 2 − `min_kept` at most is
        kept, and ‖realised − Δ‖/‖Δ‖ is at most 1 − `min_kept` above twice what rounding to the
        dtype costs.
    check : bool
        Whether problems raise; otherwise they stand in the receipt.

    Returns
    -------
    Receipt
        With `problems`.

    Raises
    ------
    VerifyError
        If there are problems.
    PeftError
        If the inputs do not fit each other or cannot be read.
    """
    start = time.perf_counter()
    fit = Fitting.read(strict=strict, rederive=rederive, backend=backend, kinds=kinds, names=names)
    with Checkpoint(base) as checkpoint, Checkpoint(merged) as theirs:
        plan = make_plan(checkpoint, adapter, fit)
        surgeon = Surgeon(plan, fit.backend)
        settle_ties(plan, lambda name: surgeon.value(name)[0])
        audit = Audit(plan, surgeon, theirs, min_kept)
        audit.run(progress)
        receipt = Receipt(
            "verify",
            described(base, checkpoint),
            plan.sources,
            plan.uses,
            plan.targets,
            tuple(audit.changes),
            audit.copied,
            described(merged, theirs),
            tuple(plan.untied),
            tuple(audit.problems),
            (*plan.warnings, *audit.warnings),
            {"min_kept": min_kept, **fit.recorded},
            versions(),
            {"verify": round(time.perf_counter() - start, 3)},
            peak_memory(),
        )
    if check:
        receipt.check()
    return receipt


class Audit:
    """One comparison under way."""

    def __init__(self, plan: Plan, surgeon: Surgeon, theirs: Checkpoint, min_kept: float) -> None:
        self.plan, self.surgeon, self.theirs, self.min_kept = plan, surgeon, theirs, min_kept
        self.changes: list[Change] = []
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.copied = 0
        self._stands = {name: group[0] for group in theirs.tied for name in group}

    def run(self, progress: Progress | None) -> None:
        """Compare everything."""
        base, total, done = self.plan.base, self.plan.base.nbytes, 0
        expected = [*base, *self.plan.added]
        for name in expected:
            found = self._found(name)
            if found is None:
                close = nearest(name, self.theirs)
                self.problems.append(f"{name}: is missing from the merged checkpoint{close}")
            else:
                source = self.plan.source(name)
                if source is None:
                    self._untouched(name, found)
                else:
                    self._touched(name, source, found)
            done += base.info(name).nbytes if name in base else 0
            if progress is not None:
                progress(done, total, name)
        for name in self.theirs:
            if name not in expected:
                self._extra(name)
        config, untied = self.theirs.config, self.plan.untied
        if untied and config and config.get("tie_word_embeddings") is not False:
            self.problems.append(
                f"{' and '.join(untied)}: config.json of the merged checkpoint ties them, and the "
                "adapter makes them differ"
            )
        self.problems += too_little(tuple(self.changes), self.min_kept)

    def _found(self, name: str) -> Host | None:
        return self.theirs.get(name if name in self.theirs else self._stands.get(name, name))

    def _extra(self, name: str) -> None:
        twins = [group[0] for group in self.plan.base.tied if name in group]
        same = twins and twins[0] in self.theirs
        if same and equal_bytes(self.theirs[name], self.theirs[twins[0]]):
            self.warnings.append(f"{name}: is stored although it is tied to {twins[0]}")
        else:
            self.problems.append(f"{name}: is extra: the base has no such tensor")

    def _untouched(self, name: str, found: Host) -> None:
        base = self.plan.base[self.plan.added.get(name, name)]
        if equal_bytes(base, found):
            self.copied += 1
        elif base.shape != found.shape:
            self.problems.append(f"{name}: has shape {found.shape}, in the base {base.shape}")
        elif base.dtype != found.dtype and _same_values(base, found):
            self.copied += 1
            self.warnings.append(
                f"{name}: is stored as {found.dtype.name}, in the base as {base.dtype.name}, with "
                "the same values"
            )
        else:
            how = "" if base.dtype == found.dtype else f" ({base.dtype.name} → {found.dtype.name})"
            self.problems.append(f"{name}: is changed{how}, and no adapter touches it")

    def _touched(self, name: str, source: str, found: Host) -> None:
        shape = tuple(self.plan.view.info(source).shape)
        if shape != found.shape:
            self.problems.append(f"{name}: has shape {found.shape} and should have {shape}")
            return
        if is_floating(found) and not all_finite(found):
            self.problems.append(f"{name}: has NaN or infinite values")
            return
        theirs, best = self.surgeon.audited(source, found)
        self.changes.append(theirs)
        if theirs.dtype != theirs.base_dtype:
            self.warnings.append(f"{name}: is {theirs.dtype}, in the base {theirs.base_dtype}")
        if theirs.kept is None or theirs.error is None:
            if theirs.unchanged < 1:
                self.problems.append(f"{name}: is changed, and the adapter's change is zero")
            return
        margin = 1 - self.min_kept
        limit = margin + 2 * (best.error or 0.0)
        if theirs.kept > 1 + margin:
            self.problems.append(
                f"{name}: holds {theirs.kept:.3f} times the adapter's change: was it merged twice, "
                "or with another scale?"
            )
        elif theirs.kept >= self.min_kept and theirs.error > limit:
            self.problems.append(
                f"{name}: differs from the adapter's change by {theirs.error:.3f} of its norm, and "
                f"rounding explains {best.error:.3f}: something else was changed too"
            )


def _same_values(one: Host, two: Host) -> bool:
    if not (is_floating(one) and is_floating(two)):
        return False
    step = 1 << 18
    a, b = one.reshape(-1), two.reshape(-1)
    return all(
        np.array_equal(a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64))
        for i in range(0, a.size, step)
    )

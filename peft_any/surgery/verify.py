"""Auditing a merged checkpoint, whoever made it."""

from __future__ import annotations

import time

from peft_any.arguments import checked
from peft_any.backend import Backend
from peft_any.io._atomic import StrPath
from peft_any.io.checkpoint import Checkpoint
from peft_any.naming.rules import Names
from peft_any.receipt import Receipt, peak_memory, versions
from peft_any.surgery.audit import Audit
from peft_any.surgery.beside import described
from peft_any.surgery.choice import EngineLike, engine_of
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.engines import Local
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress
from peft_any.surgery.planning import make_plan
from peft_any.surgery.sources import Adapters, Kinds
from peft_any.surgery.tasks import auditing
from peft_any.surgery.ties import settle_ties

MIN_KEPT = 0.9


@checked
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
    engine: EngineLike = "local",
) -> Receipt:
    """Audit a merged checkpoint, whoever made it, against the base and the adapters.

    Every touched tensor is measured as a merge measures its own; every other one must be
    byte-identical, or equal in a wider dtype.

    Parameters
    ----------
    base, adapter, strict, progress, backend, kinds, rederive, names, engine
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
    work = engine_of(engine)
    with Checkpoint(base) as checkpoint, Checkpoint(merged) as theirs:
        plan = make_plan(checkpoint, adapter, fit)
        surgeon = Surgeon(plan, fit.backend)
        settle_ties(plan, lambda name: surgeon.value(name)[0])
        audit = Audit(plan, surgeon, theirs, min_kept)
        audit.run(
            progress, None if isinstance(work, Local) else auditing(work, audit, adapter, fit)
        )
        checkpoint.refuse_changes()
        theirs.refuse_changes()
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

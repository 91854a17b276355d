"""Merging adapters into a checkpoint on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft_any._typing import DTypeLike
from peft_any.arguments import checked
from peft_any.backend import Backend, asked, is_floating
from peft_any.errors import UsageError, nearest
from peft_any.io._atomic import StrPath, taken
from peft_any.io._header import BITS
from peft_any.io._urls import place_of
from peft_any.io.checkpoint import Checkpoint
from peft_any.naming.rules import Names
from peft_any.receipt import Clock, Receipt, versions
from peft_any.surgery.beside import described
from peft_any.surgery.choice import EngineLike, engine_of
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.engines import Local
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Job, Progress
from peft_any.surgery.planning import make_plan
from peft_any.surgery.shards import byte_count
from peft_any.surgery.sources import Adapters, Kinds
from peft_any.surgery.threads import thread_count
from peft_any.surgery.ties import settle_ties


@checked
def merge_checkpoint(
    base: StrPath,
    adapter: Adapters,
    out: StrPath | None = None,
    *,
    dtype: DTypeLike | None = None,
    min_kept: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    strict: bool = True,
    progress: Progress | None = None,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    rederive: bool = False,
    names: Names = None,
    any_base: bool = False,
    resume: bool = False,
    full_hash: bool = False,
    engine: EngineLike = "local",
    threads: int | None = None,
    max_shard_size: int | str | None = None,
) -> Receipt:
    """Merge adapters into a checkpoint on disk, block by block.

    Untouched tensors are copied byte for byte. Touched ones are what double precision gives,
    rounded once; with another library than NumPy, what at least single precision gives.
    Configuration, tokenizer and other side files come along, and a receipt is written as
    ``merge_receipt.json``. The output appears whole or not at all.

    Parameters
    ----------
    base : path
        A safetensors file, or a directory or index as `Checkpoint` reads it.
    adapter : path, Adapter, mapping {path: weight}, or list of them or of (adapter, weight)
        Several act as the weighted sum of their effects, each against the base.
    out : path
        A directory; or a ``.safetensors`` file, where the base is a single one.
    dtype : str or dtype of any library, optional
        Of the touched tensors, in place of the base's: ``"float32"``, ``"bf16"`` …
    min_kept : float, optional
        The least share of its change that each touched tensor must keep.
    dry_run : bool
        Compute everything and write nothing.
    overwrite : bool
        Whether an existing output may be replaced.
    strict : bool
        Whether an adapter tensor or target without a place is an error; if not, it is left out
        and recorded.
    progress : callable (done, total, name), optional
    backend : str or Backend
        Where layers are merged, as for `resolve`.
    kinds : mapping, optional
        Layer kinds that names and shapes do not tell, as for `PeftModel`.
    rederive : bool
        As for `PeftModel.add`.
    names : rule, path of a JSON file, preset, several of these, or mapping {old: new}, optional
        How the adapters' modules are called, and split or fused, in the base: `read_rules`.
    any_base : bool
        Whether adapters may go into another base than the one that their files say they were
        made on: it is warned of then.
    resume : bool
        Go on with what a killed run of the same merge left, shard by shard; and leave what is
        finished for the next one, whatever ends this one. Without anything to go on with, a
        merge begins as ever.
    full_hash : bool
        Whether the receipt has digests of all bytes of base and output too (``sha256``), beside
        the sampled ones.
    engine : str or Engine
        What computes: ``"local"``, this process; ``"dask"``, workers, a task for each shard; or
        a Dask scheduler's address. Workers must see all files under the same paths.
    threads : int, optional
        How many work at once in this process: by default as many as it may use processors. The
        result is the same with any number, bit for bit.
    max_shard_size : int or str, optional
        Divide the output among files of at most so many bytes (``"5GB"``, ``"512MiB"``), in place
        of the base's files; a larger tensor has a file of its own.

    Returns
    -------
    Receipt

    Raises
    ------
    PeftError
        Before anything is written if inputs do not fit; `VerifyError` if too little survives or
        results overflow; `StorageError` if reading or writing fails. Nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from peft_any import PeftModel, write_safetensors
    >>> from peft_any.methods.ia3 import IA3Config
    >>> weights = {"fc.weight": np.ones((2, 3), "float32")}
    >>> config = IA3Config(target_modules=["fc"], feedforward_modules=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/base.safetensors", weights)
    ...     PeftModel(weights).add("task", config).save(f"{folder}/adapter")
    ...     done = merge_checkpoint(f"{folder}/base.safetensors", f"{folder}/adapter",
    ...                             f"{folder}/merged")
    >>> [change.tensor for change in done.changes]
    ['fc.weight']
    """
    clock = Clock()
    if out is None and not dry_run:
        raise UsageError(
            "out: nothing says where the merged checkpoint goes: give out=, or dry_run"
        )
    if min_kept is not None and not min_kept <= 1:
        raise UsageError(f"min_kept={min_kept}: cannot be reached: give a share of at most 1")
    dtype = None if dtype is None else storage_dtype(dtype)
    limit = None if max_shard_size is None else byte_count(max_shard_size)
    fit = Fitting.read(
        strict=strict,
        rederive=rederive,
        backend=backend,
        kinds=kinds,
        names=names,
        any_base=any_base,
    )
    work = engine_of(engine)
    if out is not None:
        out = place_of(out)
    with Checkpoint(base) as checkpoint:
        refuse_existing(out, overwrite, resume)
        plan = make_plan(checkpoint, adapter, fit)
        job = Job(plan, Surgeon(plan, fit.backend, dtype), out, min_kept)
        job.progress, job.resume, job.kinds = progress, resume, kinds
        job.full_hash, job.threads = full_hash, thread_count(threads)
        if checkpoint.is_remote or isinstance(out, str):  # that has threads of its own: no forks
            job.threads = 1
        job.max_shard, job.clock = limit, clock
        if not isinstance(work, Local):
            from peft_any.surgery.tasks import merging  # noqa: PLC0415 - for engines alone

            job.elsewhere = merging(work, job, adapter, fit)
        settle_ties(plan, lambda name: job.surgeon.value(name)[0])
        job.refuse_lone_file()
        made = Receipt(
            "merge",
            described(base, checkpoint, full_hash),
            plan.sources,
            plan.uses,
            plan.targets,
            (),
            0,
            untied=tuple(plan.untied),
            options={
                "dtype": dtype,
                "min_kept": min_kept,
                "dry_run": dry_run,
                "any_base": any_base,
                "max_shard_size": limit,
                **fit.recorded,
            },
            versions=versions(),
        )
        clock.lap("prepare")
        if dry_run:
            with job.run(None):
                return job.finish(made)
        return job.write(made, overwrite)


def storage_dtype(dtype: Any) -> str:
    """Read a dtype that weights are to be stored as: a name, or what any library has for it.

    Examples
    --------
    >>> storage_dtype("bf16"), storage_dtype("float")
    ('bfloat16', 'float32')
    """
    name = asked(dtype)
    floats = [n for n in BITS if is_floating(n) and BITS[n] >= 8]
    if name.lower() not in floats:
        raise UsageError(
            f"dtype {name!r}: weights cannot be stored as that{nearest(name, floats)}: choose "
            "float32, bfloat16, float16, float64, float8_e4m3fn (fp8) or float8_e5m2"
        )
    return name.lower()


def refuse_existing(out: Path | str | None, overwrite: bool, resume: bool = False) -> None:
    """Say at once, not after an hour's work, that the output is taken."""
    if isinstance(out, str):
        from peft_any.io._outgoing import refuse_taken  # noqa: PLC0415 - URLs alone need it

        refuse_taken(out, overwrite=overwrite, resume=resume)
        return
    if out is None or overwrite or not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink() or any(out.iterdir()):
        raise taken(out)

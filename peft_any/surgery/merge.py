"""Merging adapters into a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from peft_any.backend import Backend, dtype_name, is_floating, resolve
from peft_any.errors import (
    BackendError,
    StorageError,
    TargetError,
    UsageError,
    VerifyError,
    nearest,
)
from peft_any.io._atomic import StrPath, reporting
from peft_any.io._header import BITS, RANK, byte_size
from peft_any.io.checkpoint import INDEX, Checkpoint, fingerprint, output_directory, output_file
from peft_any.io.safetensors import SafetensorsFile, StreamWriter
from peft_any.receipt import Change, Receipt, peak_memory, too_little, versions
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.plan import Plan, make_plan
from peft_any.surgery.sources import Adapters, Kinds, uses
from peft_any.surgery.ties import settle_ties

RECEIPT = "merge_receipt.json"
Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with bytes done, all bytes, and the tensor at hand."""
_ALIASES = {
    "float": "float32", "fp32": "float32", "f32": "float32", "half": "float16", "fp16": "float16",
    "f16": "float16", "bf16": "bfloat16", "fp64": "float64", "f64": "float64", "double": "float64",
}  # fmt: skip


def merge_checkpoint(
    base: StrPath,
    adapter: Adapters,
    out: StrPath | None = None,
    *,
    dtype: str | None = None,
    min_kept: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    strict: bool = True,
    progress: Progress | None = None,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    rederive: bool = False,
) -> Receipt:
    """Merge adapters into a checkpoint on disk, one tensor at a time.

    Untouched tensors are copied byte for byte, touched ones computed in at least float32 and
    rounded once. Configuration, tokenizer and other side files come along, and a receipt is
    written as ``merge_receipt.json``. The output appears whole or not at all.

    Parameters
    ----------
    base : path
        A safetensors file, or a directory or index as `Checkpoint` reads it.
    adapter : path, Adapter, mapping {path: weight}, or list of them or of (adapter, weight)
        Several act as the weighted sum of their effects, each against the base.
    out : path
        A directory; or a ``.safetensors`` file, where the base is a single one.
    dtype : str, optional
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
    start = time.perf_counter()
    if out is None and not dry_run:
        raise UsageError(
            "out: nothing says where the merged checkpoint goes: give out=, or dry_run"
        )
    if min_kept is not None and not min_kept <= 1:
        raise UsageError(f"min_kept={min_kept}: cannot be reached: give a share of at most 1")
    dtype = None if dtype is None else storage_dtype(dtype)
    to = resolve(backend)
    with Checkpoint(base) as checkpoint:
        _refuse_existing(out, overwrite)
        plan = make_plan(checkpoint, adapter, kinds=kinds, strict=strict, rederive=rederive)
        job = Job(plan, Surgeon(plan, to, dtype), None if out is None else Path(out), min_kept)
        job.progress = progress
        settle_ties(plan, lambda name: job.surgeon.value(name)[0])
        job.refuse_lone_file()
        made = Receipt(
            "merge",
            {
                "path": str(base),
                "fingerprint": fingerprint(checkpoint),
                "tensors": len(checkpoint),
                "bytes": checkpoint.nbytes,
            },
            tuple(one.source for one in plan.given),
            tuple(
                use
                for one, placed in zip(plan.given, plan.placed, strict=True)
                for use in uses(one, placed.sites, plan.biases)
            ),
            plan.targets,
            (),
            0,
            untied=tuple(plan.untied),
            options={
                "dtype": dtype,
                "min_kept": min_kept,
                "dry_run": dry_run,
                "strict": strict,
                "rederive": rederive,
                "backend": str(to),
            },
            versions=versions(),
        )
        ready = time.perf_counter()
        job.seconds = {"prepare": ready - start}
        if dry_run:
            job.run(None)
            return job.finish(made, ready)
        return job.write(made, ready, overwrite)


def storage_dtype(name: str) -> str:
    """Read a dtype's name: NumPy's, or the short ones of other tools.

    Examples
    --------
    >>> storage_dtype("bf16"), storage_dtype("float")
    ('bfloat16', 'float32')
    """
    known = _ALIASES.get(name.lower(), name.lower())
    floats = [n for n in BITS if is_floating(n) and BITS[n] >= 8]
    try:
        found = dtype_name(known)
    except (BackendError, TypeError):
        found = ""
    if found not in floats:
        choice = ", ".join(["float32", "float16", "bfloat16", "float64"])
        raise UsageError(
            f"dtype {name!r}: weights cannot be stored as that{nearest(name, [*floats, *_ALIASES])}:"
            f" choose {choice}"
        )
    return found


def _refuse_existing(out: StrPath | None, overwrite: bool) -> None:
    """Say at once, not after an hour's work, that the output is taken."""
    if out is None or overwrite or not os.path.lexists(out):
        return
    path = Path(out)
    if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
        raise StorageError(
            f"{out}: the output cannot go here: it exists; choose another name or allow overwriting"
        )


@dataclass
class Job:
    """One merge under way."""

    plan: Plan
    surgeon: Surgeon
    out: Path | None
    min_kept: float | None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.changes: list[Change] = []
        self.copied = 0
        self.total = sum(
            self._size(*spec) for shard in self.base.shards for spec in self.specs(shard)
        )
        self.done = 0

    @property
    def base(self) -> Checkpoint:
        """The base."""
        return self.plan.base

    @property
    def to_file(self) -> bool:
        """Whether the output is one file."""
        return self.out is not None and self.out.name.endswith(".safetensors")

    def refuse_lone_file(self) -> None:
        """Refuse outputs that one file cannot hold."""
        if not self.to_file:
            return
        if len(self.base.shards) > 1:
            raise UsageError(
                f"{self.out}: a single file cannot hold {len(self.base.shards)} shards: give a "
                "directory"
            )
        if self.plan.untied:
            raise TargetError(
                f"{self.out}: {' and '.join(self.plan.untied)} are tied, and the adapter parts "
                "them: a single file cannot say so; give a directory, where config.json does"
            )

    def specs(self, shard: SafetensorsFile) -> list[tuple[str, str, tuple[int, ...]]]:
        """List what an output shard holds, in order, with dtypes and shapes."""
        names: list[str] = []
        for name in shard:
            names.append(name)
            names += [new for new, old in self.plan.added.items() if old == name]
        specs = []
        for name in names:
            source = self.plan.source(name)
            if source is not None:
                shape = tuple(self.plan.view.info(source).shape)
                specs.append((name, self.surgeon.dtype_of(source), shape))
            else:
                info = self.base.info(self.plan.added.get(name, name))
                specs.append((name, info.dtype, tuple(info.shape)))
        if [s[1] for s in specs] != [shard.info(n).dtype for n in shard]:
            # Wider elements first, as the safetensors library has it: each stays aligned.
            specs.sort(key=lambda spec: RANK[spec[1]])
        return specs

    @staticmethod
    def _size(_: str, dtype: str, shape: tuple[int, ...]) -> int:
        return byte_size(dtype, shape) or 0

    def run(self, folder: Path | None, names: dict[str, str] | None = None) -> None:
        """Compute everything, and write it into `folder` unless that is None."""
        for shard in self.base.shards:
            specs = self.specs(shard)
            if folder is None:
                for name, dtype, shape in specs:
                    self._tensor(name, None, shard)
                    self._tick(name, self._size(name, dtype, shape))
                continue
            path = folder / (names or {}).get(shard.path.name, shard.path.name)
            with StreamWriter(path, specs, shard.metadata) as writer:
                for name, dtype, shape in specs:
                    self._tensor(name, writer, shard)
                    self._tick(name, self._size(name, dtype, shape))
        low = too_little(tuple(self.changes), self.min_kept)
        if low:
            raise VerifyError("\n".join(low))

    def _tensor(self, name: str, writer: StreamWriter | None, shard: SafetensorsFile) -> None:
        source = self.plan.source(name)
        if source is not None:
            value, change = self.surgeon.value(source)
            self.changes.append(replace(change, tensor=name))
            if writer is not None:
                writer.write(name, value)
        else:
            self.copied += 1
            if writer is not None:
                writer.copy(name, shard, self.plan.added.get(name, name))

    def _tick(self, name: str, size: int) -> None:
        self.done += size
        if self.progress is not None:
            self.progress(self.done, self.total, name)

    def finish(self, made: Receipt, since: float, out: dict[str, Any] | None = None) -> Receipt:
        """Complete the receipt."""
        self.seconds["merge"] = time.perf_counter() - since
        return replace(
            made,
            changes=tuple(self.changes),
            copied=self.copied,
            out=out or {},
            warnings=tuple(self.plan.warnings),
            seconds={k: round(v, 3) for k, v in self.seconds.items()},
            peak_memory=peak_memory(),
        )

    def write(self, made: Receipt, since: float, overwrite: bool) -> Receipt:
        """Write the output and its receipt."""
        assert self.out is not None  # noqa: S101 - told from dry runs by the caller
        inputs = [self.base.path, *(one.source.path for one in self.plan.given if one.source.path)]
        if self.to_file:
            beside = output_file(receipt_path(self.out), overwrite=True, inputs=inputs)
            with beside as text, output_file(self.out, overwrite, inputs=inputs) as partial:
                self.run(partial.parent, {self.base.shards[0].path.name: partial.name})
                with SafetensorsFile(partial) as written:
                    out = _describe(self.out, written)
                done = self.finish(made, since, out)
                text.write_text(done.to_json() + "\n", encoding="utf-8")
            return done
        with output_directory(self.out, overwrite, inputs=inputs) as folder:
            self.run(folder)
            self._side_files(folder)
            with Checkpoint(folder) as written:
                out = _describe(self.out, written)
            done = self.finish(made, since, out)
            (folder / RECEIPT).write_text(done.to_json() + "\n", encoding="utf-8")
        return done

    def _side_files(self, folder: Path) -> None:
        base = self.base
        for relative in base.side_files:
            if relative.name == RECEIPT:
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with reporting(base.root / relative, "be copied"):
                shutil.copyfile(base.root / relative, target)
        if base.index is not None and base.index_path is not None:
            self._index(folder / base.index_path.name, base.index)
        changed = self._config()
        if changed is not None:
            text = json.dumps(changed, indent=2, ensure_ascii=False)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def _index(self, path: Path, index: dict[str, Any]) -> None:
        weight_map = dict(index["weight_map"])
        weight_map |= {new: weight_map[old] for new, old in self.plan.added.items()}
        metadata = index.get("metadata")
        metadata = dict(metadata) if isinstance(metadata, dict) else {}
        written = {**index, "metadata": {**metadata, "total_size": self.total}}
        written["weight_map"] = dict(sorted(weight_map.items()))
        text = json.dumps(written, indent=2, sort_keys=False, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    def _config(self) -> dict[str, Any] | None:
        """Give the changed config.json; None where it stays as it is."""
        before = self.base.config
        config = json.loads(json.dumps(before))
        inner = config.get("text_config")
        places = [config, inner] if isinstance(inner, dict) else [config]
        if self.plan.untied:
            config["tie_word_embeddings"] = False
            for place in places:
                if "tie_word_embeddings" in place:
                    place["tie_word_embeddings"] = False
        for name, array in self.plan.view.grown.items():
            rows = len(self.plan.view.stored(name))
            for place in places:
                if place.get("vocab_size") == rows:
                    place["vocab_size"] = len(array)
        return None if config == before else config


def receipt_path(out: Path) -> Path:
    """Name the receipt of a single file: another file's receipt beside it is left alone."""
    path = out.with_name(RECEIPT)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["out"]["path"]
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known is None or Path(known).name != out.name:
            return out.with_name(f"{out.stem}.{RECEIPT}")
    return path


def _describe(path: Path, written: Checkpoint | SafetensorsFile) -> dict[str, Any]:
    return {
        "path": str(path),
        "fingerprint": fingerprint(written),
        "tensors": len(written),
        "bytes": sum(written.info(name).nbytes for name in written),
    }

"""A merge's journal: which shards are finished, so that a killed merge goes on where it was."""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_any.backend import to_numpy
from peft_any.errors import PeftError, StorageError
from peft_any.io._atomic import reporting
from peft_any.io._fingerprint import CHECKSUM, checksum
from peft_any.io._leftovers import discard, journal_of
from peft_any.io.checkpoint import fingerprint
from peft_any.io.config import config_to_json
from peft_any.io.safetensors import SafetensorsFile
from peft_any.receipt import Change, Receipt, plain
from peft_any.surgery.plan import Plan
from peft_any.surgery.sources import Given, Kinds

_FORM = 1
_FREE = {"min_kept", "dry_run", "full_hash"}
"""Options that change no byte of the output."""


@dataclass(frozen=True)
class Finished:
    """A shard that is complete and on the device, or in the store.

    Attributes
    ----------
    file : str
        Its name.
    fingerprint : str
        Of samples of its bytes, or a checksum of all.
    changes : tuple of Change
    copied : int
        Tensors taken over byte for byte.
    tag : str
        What a store says of its contents.
    """

    file: str
    fingerprint: str
    changes: tuple[Change, ...]
    copied: int
    tag: str = ""


class Ledger(abc.ABC):
    """A line on what is merged, and one for each shard that is finished.

    Parameters
    ----------
    task : mapping
        What decides the output's bytes: `task_of`.
    out : str
        The output, for messages.

    Attributes
    ----------
    finished : dict of str to Finished
        By file name: what an earlier run finished and still stands there.
    """

    def __init__(self, task: Mapping[str, Any], out: str) -> None:
        self._out = out
        self._task = plain({"form": _FORM, **task})
        self.finished: dict[str, Finished] = {}
        self._noted: list[Finished] = []

    @property
    def notes(self) -> list[str]:
        """What a receipt should say of it."""
        count = len(self.finished)
        return [f"{self._out}: continued; {count} shards were finished before"] if count else []

    @abc.abstractmethod
    def add(self, name: str, changes: Sequence[Change], copied: int, mark: str = "") -> None:
        """Note that a shard is finished; its bytes are safe already."""

    def write(self) -> None:
        """Write down what was noted."""
        if not self._noted:
            return
        self._append([json.dumps(asdict(done)) for done in self._noted])
        self.finished |= {done.file: done for done in self._noted}
        self._noted.clear()

    @abc.abstractmethod
    def _append(self, lines: list[str]) -> None:
        """Have lines stand at the end, whatever happens next."""

    @abc.abstractmethod
    def _stands(self, done: Finished) -> bool:
        """Whether a shard is as it was noted."""

    def _take(self, lines: Sequence[str]) -> None:
        """Go on from a journal's lines; `StorageError` where it is another merge's."""
        if lines:
            self._refuse_another(lines[0])
        for line in lines[1:]:
            done = _read(line)
            if done is not None and self._stands(done):
                self.finished[done.file] = done

    def _refuse_another(self, head: str) -> None:
        out = self._out
        try:
            before = json.loads(head)
        except ValueError:
            before = {}
        faults = [*_differences(before, self._task)]
        if faults:
            raise StorageError(
                "\n".join(f"{out}: the killed merge cannot be continued: {f}" for f in faults)
                + "\ngive what was given then; a merge without resume=True (--resume) removes the "
                "partial output and begins anew"
            )


class Journal(Ledger):
    """The journal beside a partial output.

    Parameters
    ----------
    folder : Path
        The partial output, as `output_directory` gives it.
    task, out
        As for `Ledger`.
    whole : bool
        Whether every byte of a shard is told, which takes a tenth of a merge's time.

    Raises
    ------
    StorageError
        Where the journal is another merge's, naming what differs.
    """

    def __init__(
        self, folder: Path, task: Mapping[str, Any], out: str, *, whole: bool = False
    ) -> None:
        super().__init__(task, out)
        self.folder, self.whole = folder, whole
        self.path = journal_of(folder)
        if self.path.exists():
            self._go_on()

    def add(self, name: str, changes: Sequence[Change], copied: int, mark: str = "") -> None:
        """Note that a shard is finished; its bytes are on the device already."""
        mark = mark or _mark(self.folder / name, self.whole)
        self._noted.append(Finished(name, mark, tuple(changes), copied))

    def _append(self, lines: list[str]) -> None:
        begun = self.path.exists() and self.path.stat().st_size
        text = "".join(f"{line}\n" for line in ([] if begun else [json.dumps(self._task)]) + lines)
        with reporting(self.path, "be written"), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _go_on(self) -> None:
        with reporting(self.path, "be read"):
            raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1  # what follows was cut off
        self._take(raw[:whole].decode("utf-8", errors="replace").split("\n")[:-1])
        with reporting(self.path, "be written"):
            os.truncate(self.path, whole)
            for found in [*self.folder.rglob("*")]:
                name = found.relative_to(self.folder).as_posix()
                if found.is_file() and name not in self.finished:
                    discard(found)

    def _stands(self, done: Finished) -> bool:
        try:
            whole = done.fingerprint.startswith(CHECKSUM)
            return _mark(self.folder / done.file, whole) == done.fingerprint
        except PeftError:
            return False


def task_of(made: Receipt, plan: Plan, kinds: Kinds = None) -> dict[str, Any]:
    """Say what decides a merge's output: the inputs' contents, the options and the versions.

    Where inputs stand does not matter, nor what only decides whether the result is accepted.
    """
    stats = {name: shard.path.stat() for name, shard in plan.base.named_shards.items()}
    return {
        "base": {
            "fingerprint": made.base["fingerprint"],
            **{name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
        },
        "adapters": [
            [one.weight, one.source.peft_type, sorted(one.source.files.values()) or _digest(one)]
            for one in plan.given
        ],
        "options": {k: v for k, v in made.options.items() if k not in _FREE},
        "kinds": {name: str(kind) for name, kind in (kinds or {}).items()},
        "versions": made.versions,
    }


def _digest(one: Given) -> list[str]:
    """Describe an adapter that was given as an object."""
    adapter = one.adapter
    digest = hashlib.sha256(config_to_json(adapter.config, adapter.raw).encode())
    parts = {**adapter.sites, "": {**adapter.shared, **adapter.extra, **adapter.tokens}}
    for module, arrays in sorted(parts.items()):
        for name, array in sorted(arrays.items()):
            host = to_numpy(array)
            digest.update(json.dumps([module, name, host.dtype.name, host.shape]).encode())
            digest.update(np.ascontiguousarray(host).view(np.uint8).data)
    return [f"sha256:{digest.hexdigest()}"]


def _differences(before: Any, now: Mapping[str, Any]) -> Sequence[str]:
    if not isinstance(before, dict) or set(before) != set(now):
        return ["its journal is not this version's"]
    said = []
    for key, value in now.items():
        if before[key] == value:
            continue
        if isinstance(value, dict) and isinstance(before[key], dict):
            pairs = {k: (before[key].get(k), value.get(k)) for k in [*before[key], *value]}
            said += [
                f"{key}: {name} was {_short(was)} and is {_short(found)}"
                for name, (was, found) in pairs.items()
                if was != found
            ]
        else:
            said.append(f"{key}: was {_short(before[key], 200)} and is {_short(value, 200)}")
    return said


def _short(value: Any, most: int = 90) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} …"


def _mark(path: Path, whole: bool) -> str:
    if whole:
        return checksum(path)
    with SafetensorsFile(path) as file:
        return fingerprint(file)


def _read(line: str) -> Finished | None:
    try:
        found: dict[str, Any] = json.loads(line)
        changes = tuple(Change(**_lists_as_tuples(change)) for change in found.pop("changes"))
        return Finished(changes=changes, **found)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _lists_as_tuples(found: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}

"""A base model on disk, in one file or in shards, as one lazy mapping."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from peft_any.errors import FormatError, StorageError, nearest
from peft_any.io._atomic import StrPath, output_directory, output_file, reporting, storage_error
from peft_any.io._fetching import mirror_of
from peft_any.io._fingerprint import fingerprint as fingerprint
from peft_any.io._foreign import FOREIGN, disguise, way_out
from peft_any.io._header import TensorInfo
from peft_any.io._json import read_json
from peft_any.io._reader import HostArray, SafetensorsFile
from peft_any.io._ties import tied_groups
from peft_any.io._urls import path_of

__all__ = ["Checkpoint", "fingerprint", "output_directory", "output_file"]

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
SHARD_LIMIT = 10_000


class Checkpoint(Mapping[str, HostArray]):
    """A base model's weights, mapped into memory and never written to.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file; an index of shards; or a directory with ``model.safetensors``,
        with shards and their index, or with exactly one safetensors file that is no adapter.
        Or a URL of one, as fsspec opens it: tensors are then fetched when they are asked for.

    Raises
    ------
    FormatError
        Where an index or a file is malformed, they disagree, or a path leaves the directory.
    StorageError
        Where files are missing or unreadable, or the directory does not say which to take.

    Warns
    -----
    UserWarning
        Where the index states a wrong ``total_size``.
    """

    def __init__(self, path: StrPath) -> None:
        self._stack = ExitStack()
        self._mirror = mirror = self._stack.enter_context(mirror_of(path))
        self.path = Path(path_of(path)) if mirror is None else mirror.path
        """What was given, or what stands here for a URL."""
        self.source: StrPath = self.path if mirror is None else mirror.given
        """What was given."""
        self.index: dict[str, Any] | None = None
        """The index of shards as it stands in its file; None without shards."""
        self.index_path: Path | None = None
        """Where the index stands."""
        self.shards: tuple[SafetensorsFile, ...] = ()
        """The files, by name; each maps its own tensors in the order of their bytes."""
        try:
            with nullcontext() if mirror is None else mirror.telling():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with reporting(self.path, "be read"):
            chosen = self._choose()
        self.root = chosen.parent
        """The directory of the weights."""
        if chosen.name.endswith(INDEX):
            self.index_path, self.index = chosen, read_json(self._inside(chosen.name))
            self._open_shards(chosen, self.index)
        else:
            given = chosen == self.path
            self.shards = (self._file(chosen if given else self._inside(chosen.name)),)
        self._home = {name: shard for shard in self.shards for name in shard}

    def _file(self, path: Path) -> SafetensorsFile:
        return SafetensorsFile(path) if self._mirror is None else self._mirror.file(path)

    def _choose(self) -> Path:
        path = self.path
        if not path.is_dir():
            if path.name.endswith(INDEX) or not path.name.endswith(FOREIGN) or not path.is_file():
                return path
            with path.open("rb") as file:
                hint = disguise(file.read(64)) or "; convert it to safetensors first"
            raise FormatError(f"{path}: cannot be a base: only safetensors files are read{hint}")
        names = sorted(os.listdir(path))
        indices = [name for name in names if name.endswith(INDEX)]
        weights = [name for name in names if is_base(name)]
        if f"model{INDEX}" in indices:
            indices = [f"model{INDEX}"]
        if len(indices) == 1 and "model.safetensors" not in weights:
            return path / indices[0]
        if "model.safetensors" in weights and not indices:
            return path / "model.safetensors"
        if len(weights) == 1 and not indices:
            return path / weights[0]
        raise self._undecided(names, weights, indices)

    def _undecided(
        self, names: list[str], weights: list[str], indices: list[str]
    ) -> FormatError | StorageError:
        start = f"{self.path}: cannot be read as a base: "
        if not indices and any(_SHARD.search(name) for name in weights):
            return StorageError(f"{start}it holds shards without their index (*{INDEX})")
        if weights or indices:
            several = _some([*indices, *weights])
            return StorageError(f"{start}it holds {several}; give the one that is meant")
        foreign = [name for name in names if name.endswith(FOREIGN)]
        if foreign:
            hint = way_out([self.path / name for name in foreign])
            return FormatError(f"{start}it holds {_some(foreign)} but no safetensors file; {hint}")
        if any(name.endswith(".safetensors") for name in names):
            return FormatError(f"{start}it holds an adapter; give the model it was made for")
        inside = sorted({p.parent for p in self.path.glob("snapshots/*/*.safetensors")})
        more = f"; give its snapshot {' or '.join(map(str, inside))}" if inside else ""
        return StorageError(f"{start}it holds no safetensors file{more}")

    def _inside(self, name: object) -> Path:
        """The path of a file named by the directory's own contents, which may not lead out."""
        if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
            raise FormatError(f"{self.path}: {name!r:.200} cannot be the name of a shard")
        given = Path(name)
        if given.is_absolute() or given.drive or ".." in given.parts:
            raise FormatError(
                f"{self.path}: {name!r:.200} cannot be read: it is outside the directory"
            )
        try:
            real, home = (self.root / given).resolve(), self.root.resolve()
        except (OSError, RuntimeError) as cause:
            raise storage_error(self.root / given, "be read", cause) from cause
        homes = [home]
        # The Hugging Face cache: snapshots/<commit>/<name> is a link to ../../blobs/<digest>.
        homes += [p.parent / "blobs" for p in home.parents if p.name == "snapshots"][:1]
        if not any(place in real.parents for place in homes):
            raise FormatError(
                f"{self.root / given}: cannot be read: it is a link to {real}, outside the "
                "directory; copy the file in, or give the directory it belongs to"
            )
        return self.root / given

    def _open_shards(self, where: Path, index: dict[str, Any]) -> None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(
                f"{where}: weight_map cannot be {weight_map!r:.40}: it maps tensors to files"
            )
        listed: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise FormatError(
                    f"{where}: {name!r:.80} cannot be in {shard!r:.80}: a file is needed"
                )
            listed.setdefault(shard, set()).add(name)
        if len(listed) > SHARD_LIMIT:
            raise FormatError(
                f"{where}: {len(listed)} shards cannot be one model: {SHARD_LIMIT} are the limit"
            )
        paths = {shard: self._inside(shard) for shard in sorted(listed)}
        missing = [shard for shard, path in paths.items() if not os.path.exists(path)]
        if missing:
            raise StorageError(f"{where}: shards cannot be found: {_some(missing)}")
        for shard, path in paths.items():
            self.shards = (*self.shards, file := self._file(path))
            absent, extra = sorted(listed[shard] - file.keys()), sorted(file.keys() - listed[shard])
            if absent:
                close = nearest(absent[0], extra)
                raise FormatError(
                    f"{where}: tensors cannot be found in {shard}, where the index has them: "
                    f"{_some(absent)}{close}"
                )
            if extra:
                raise FormatError(
                    f"{where}: tensors of {shard} cannot be missing from the index: "
                    f"{_some(extra)}; list them there, or give {shard} alone"
                )
        size = sum(file.info(name).nbytes for file in self.shards for name in file)
        stated = index.get("metadata")
        stated = stated.get("total_size") if isinstance(stated, dict) else None
        if stated is not None and stated != size:
            warnings.warn(
                f"{where}: total_size says {stated!r:.40} and the tensors take {size} bytes",
                stacklevel=4,
            )

    def __getitem__(self, name: str) -> HostArray:
        return self._shard(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def _shard(self, name: str) -> SafetensorsFile:
        try:
            return self._home[name]
        except KeyError:
            close = nearest(str(name), self._home)
            raise KeyError(f"{self.path}: holds no tensor {name!r}{close}") from None

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range in its shard; `KeyError` where there is no such tensor."""
        return self._shard(name).info(name)

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes, in place; `KeyError` where there is no such tensor."""
        return self._shard(name).raw(name)

    def parts(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """Some of the bytes of some tensors: ``(name, start, stop)`` of each."""
        homes = [self._shard(name) for name, _, _ in wanted]
        found: dict[tuple[str, int, int], memoryview] = {}
        for home in dict.fromkeys(map(id, homes)):
            own = [one for one, its in zip(wanted, homes, strict=True) if id(its) == home]
            file = self._shard(own[0][0])
            found |= zip(own, file.parts(own), strict=True)
        return [found[one] for one in wanted]

    @property
    def is_remote(self) -> bool:
        """Whether tensors are fetched from elsewhere."""
        return self._mirror is not None

    def refuse_changes(self) -> None:
        """Refuse files elsewhere that are others than when they were opened (`StorageError`)."""
        if self._mirror is not None:
            self._mirror.refuse_changes()

    def shard_of(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor; `KeyError` where there is none."""
        return self._shard(name)

    @cached_property
    def named_shards(self) -> dict[str, SafetensorsFile]:
        """The files by their names in the index, relative to `root`."""
        return {shard.path.relative_to(self.root).as_posix(): shard for shard in self.shards}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.info(name).nbytes for name in self)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """``__metadata__`` of all files together; the first file that has a key decides."""
        return {k: v for shard in reversed(self.shards) for k, v in shard.metadata.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` beside the weights, or an empty dict."""
        if not os.path.lexists(self.root / "config.json"):
            return {}
        return read_json(self._inside("config.json"), constants=True)

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Names that stand for one tensor once the model is loaded, the stored ones first.

        safetensors files store such a tensor once; what has only one of a group's names is
        changed under all of them.
        """
        return tied_groups(self, self.config)

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """What goes along with the weights, relative to `root`: configuration, tokenizer, texts.

        Regular files of the directory and of those subdirectories that hold no weights of their
        own. Empty where a single file was given.
        """
        along = tuple(self._along())
        if self._mirror is not None:
            self._mirror.fetch(path.as_posix() for path in along)
        return along

    def _along(self) -> Iterator[Path]:
        if not (self.path.is_dir() or self.index_path):
            return
        used = {shard.path for shard in self.shards} | {self.index_path}
        for folder, folders, names in os.walk(self.root):
            here = Path(folder)
            if here != self.root and any(_is_weights(name) for name in names):
                folders.clear()
                continue
            inside = (n for n in folders if not n.startswith(".") and not (here / n).is_symlink())
            folders[:] = sorted(inside)
            for file in (here / name for name in sorted(names)):
                if file not in used and self._may_follow(file):
                    yield file.relative_to(self.root)

    def _may_follow(self, file: Path) -> bool:
        if file.name.startswith((".", "adapter_")) or _is_weights(file.name):
            return False
        try:
            return self._inside(str(file.relative_to(self.root))).is_file()
        except (FormatError, StorageError):
            return False

    def close(self) -> None:
        """Give the mappings up; arrays handed out stay valid."""
        for shard in self.shards:
            shard.close()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.source)!r}: {len(self)} tensors, {len(self.shards)} files)"


def _is_weights(name: str) -> bool:
    return name.endswith((*FOREIGN, ".safetensors", ".index.json"))


def is_base(name: str) -> bool:
    """Whether a file of that name may be a model's, and not an adapter's."""
    adapter = name.startswith((".", "adapter", "pytorch_lora_weights"))
    return name.endswith(".safetensors") and not adapter


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name!r:.200}" for name in names[:most]) + more

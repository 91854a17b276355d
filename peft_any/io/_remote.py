"""Checkpoints and adapters of file systems that fsspec opens, read by ranges of bytes."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from peft_any.errors import BackendError, FormatError, PeftError, StorageError, UsageError
from peft_any.io._parse import parse_header
from peft_any.io._reader import SafetensorsFile

_FILES = 20_000
"""The most files of a model's directory."""
_HEAD = 1 << 16
"""Bytes that are read at first: most headers are no longer."""
_KEPT = 1 << 26
"""Bytes of tensors that a file keeps beside the latest."""
OURS = ".peft_any."
"""How files begin that are there while an output is made."""
MARKER = f"{OURS}replacing"
"""What says that an output's files are being replaced: they are of two models."""
_BESIDE = ("config.json", "adapter_config.json")


@contextmanager
def reaching(url: str, action: str) -> Iterator[None]:
    """Turn whatever a file system raises into a `StorageError` about a URL."""
    try:
        yield
    except PeftError:
        raise
    except FileNotFoundError as cause:
        raise StorageError(
            f"{url}: cannot {action}: there is no such file or directory ({cause!s:.300}); check "
            "the spelling"
        ) from cause
    except Exception as cause:
        said = str(cause) or type(cause).__name__
        raise StorageError(f"{url}: cannot {action}: {said:.500}") from cause


def filesystem(url: str) -> tuple[Any, str]:
    """Open the file system of a URL; the second is the path within.

    Raises
    ------
    BackendError
        If the library that opens such URLs is missing.
    UsageError
        If there is none.
    StorageError
        If the file system refuses.
    """
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise BackendError(
            f"{url}: cannot be opened: fsspec is not installed: pip install fsspec, or "
            "'peft_any[dask]'"
        ) from error
    try:
        fs, key = url_to_fs(url)
    except ImportError as error:
        raise BackendError(
            f"{url}: cannot be opened: {error} (pip install it here and on every worker), or mount "
            "the file system and give a path"
        ) from error
    except ValueError as error:
        raise UsageError(f"{url}: cannot be opened: {error}") from error
    except Exception as error:
        raise StorageError(f"{url}: cannot be opened: {error}") from error
    with reaching(url, "be read"):
        fs.invalidate_cache()
    return fs, str(key).rstrip("/")


def info_of(fs: Any, key: str) -> dict[str, Any] | None:
    """Give what is known of a file or a directory; None where there is none, and only then."""
    try:
        return dict(fs.info(key))
    except FileNotFoundError:
        return None


class RemoteFile(SafetensorsFile):
    """A safetensors file of another file system: tensors are fetched when they are asked for.

    Parameters
    ----------
    fs : fsspec file system
    key : str
        The file there.
    path : Path
        What stands for it here.
    url : str
        For messages.
    """

    def __init__(self, fs: Any, key: str, path: Path, url: str) -> None:
        self.path, self._where = path, url
        self._fs, self._key = fs, key
        self._held: OrderedDict[str, memoryview] | None = OrderedDict()
        with reaching(url, "be read"):
            size = int(fs.info(key)["size"])
        if size == 0:
            raise FormatError(f"{url}: cannot be read: it is empty")
        head = self._fetched([(0, min(size, _HEAD))])[0]
        length = self._header_length(head[:64], size)
        missing = [(len(head), 8 + length)] if 8 + length > len(head) else []
        raw = b"".join([head, *self._fetched(missing)])[8 : 8 + length]
        self._tensors, self.metadata = parse_header(raw, size - 8 - length, url)

    def _fetched(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not ranges:
            return []
        starts, stops = zip(*ranges, strict=True)
        with reaching(self._where, "be read"):
            keys = [self._key] * len(ranges)
            found = self._fs.cat_ranges(keys, [*starts], [*stops], on_error="raise")
        for (start, stop), data in zip(ranges, found, strict=True):
            if len(data) != stop - start:
                raise StorageError(
                    f"{self._where}: cannot be read: of bytes {start} to {stop} came {len(data)}: "
                    "did it change meanwhile?"
                )
        return [bytes(data) for data in found]

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes; those of the latest are kept."""
        info, held = self.info(name), self._open(name)
        if name not in held:
            held[name] = memoryview(self._fetched([(info.start, info.stop)])[0])
        held.move_to_end(name)
        while len(held) > 1 and sum(map(len, held.values())) > _KEPT:
            held.popitem(last=False)
        return held[name]

    def part(self, name: str, start: int, stop: int) -> memoryview:
        """Some of a tensor's bytes."""
        return self.parts([(name, start, stop)])[0]

    def parts(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """Some of the bytes of some tensors, fetched together."""
        at = [(self.info(name).start, start, stop) for name, start, stop in wanted]
        for name, _, _ in wanted:
            self._open(name)
        return [memoryview(data) for data in self._fetched([(n + a, n + b) for n, a, b in at])]

    def _open(self, name: str) -> OrderedDict[str, memoryview]:
        if self._held is None:
            raise StorageError(f"{self._where}: {name!r} cannot be read: the file was closed")
        return self._held

    def reopen(self) -> None:
        """There is nothing that the kernel could copy from."""

    def close(self) -> None:
        """Forget what was fetched; arrays handed out keep theirs."""
        self._held = None


@dataclass
class Mirror(os.PathLike[str]):
    """A directory here that stands for one elsewhere: every file has its name and its size.

    What was not fetched is a hole, which no reader takes for a file of its kind.

    Attributes
    ----------
    fs : fsspec file system
    root, url : str
        The directory there, and how messages call it.
    folder : Path
        The directory here.
    path, given : Path, str
        What stands here for what was given, which may be a file.
    away : dict of str to str
        By their names relative to `folder`: the keys of what was not fetched.
    look : callable
        Lists the files there anew.
    """

    fs: Any
    root: str
    url: str
    folder: Path
    path: Path
    given: str
    away: dict[str, str] = field(default_factory=dict)
    look: Callable[[], dict[str, Any]] = dict
    _seen: dict[str, str] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def __fspath__(self) -> str:
        return str(self.path)

    def add(self, name: str, info: dict[str, Any]) -> None:
        """Make a hole for a file, unless its name cannot be one here.

        Its time stands for its version, since not every file system has times.
        """
        parts = PurePosixPath(name).parts
        odd = any(part in ("..", "/") or "\\" in part or "\0" in part for part in parts)
        if odd or not parts:
            return
        path = self.folder.joinpath(*parts)
        version = _version(info)
        when = int(version[:8], 16)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.truncate(int(info["size"]))
            os.utime(path, (when, when))
        except OSError:
            return
        known = path.relative_to(self.folder).as_posix()
        self.away[known], self._seen[known] = f"{self.root}/{name}", version

    def fetch(self, names: Iterable[str]) -> None:
        """Copy files whole."""
        for name in names:
            if (key := self.away.get(name)) is not None:
                path, url = self.folder / name, f"{self.url}/{name}"
                size = path.stat().st_size
                with reaching(url, "be read"):
                    self.fs.get_file(key, str(path))
                if path.stat().st_size != size:
                    raise StorageError(
                        f"{url}: cannot be read: of {size} bytes came {path.stat().st_size}: "
                        "did it change meanwhile?"
                    )
                del self.away[name]

    def file(self, path: Path) -> SafetensorsFile:
        """Open a safetensors file, wherever it is."""
        name = path.relative_to(self.folder).as_posix()
        if name not in self.away:
            return SafetensorsFile(path)
        self._used.add(name)
        return RemoteFile(self.fs, self.away[name], path, f"{self.url}/{name}")

    def refuse_changes(self) -> None:
        """Refuse files that are others now than when they were listed.

        Raises
        ------
        StorageError
            Listing them all.
        """
        with reaching(self.url, "be read"):
            found = self.look() if self._used else {}
        now = {name[len(self.root) :].lstrip("/"): _version(i) for name, i in found.items()}
        if other := sorted(name for name in self._used if now.get(name) != self._seen[name]):
            raise StorageError(
                f"{self.given}: cannot be relied on: {', '.join(other)} changed while it was read; "
                "begin anew when nobody writes there"
            )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Have errors name what stands there."""
        try:
            yield
        except PeftError as error:
            if error.args:
                told = str(error.args[0]).replace(str(self.folder), self.url)
                error.args = (told, *error.args[1:])
            raise


def _version(info: dict[str, Any]) -> str:
    """Digest what tells one version of a file from another; all of it is known of no file."""
    keys = "size", "ETag", "etag", "md5Hash", "mtime", "created", "LastModified", "last_modified"
    return hashlib.sha256(f"{[info.get(key) for key in keys]}".encode()).hexdigest()


def tag_of(info: dict[str, Any]) -> str:
    """Give what a store says of a file's contents, or an empty text where it does not."""
    return next((f"{key}:{info[key]}" for key in ("ETag", "etag", "md5Hash") if info.get(key)), "")


@contextmanager
def mirrored(url: str) -> Iterator[Mirror]:
    """Give the directory of a checkpoint or an adapter, or of a file that is given.

    Its small configurations are there, and its other files are holes.

    Raises
    ------
    StorageError
        If nothing is there, or too much.
    """
    fs, key = filesystem(url)
    with reaching(url, "be read"):
        lone = fs.info(key)["type"] != "directory"
        root = fs._parent(key) if lone else key  # noqa: SLF001 - fsspec has no other name for it

        def look() -> dict[str, Any]:
            fs.invalidate_cache()
            if lone and not key.endswith(".index.json"):
                names = [key, *(f"{root}/{name}" for name in _BESIDE)]
                known = {name: info_of(fs, name) for name in names}
                return {name: info for name, info in known.items() if info is not None}
            return dict(fs.find(root, detail=True))

        found = look()
        found = {k: info for k, info in found.items() if not k.startswith(f"{root}/{OURS}")}
        if info_of(fs, f"{root}/{MARKER}"):
            raise StorageError(
                f"{url}: cannot be read: a run is putting a new output in its place: wait for it; "
                "if it runs no more, write there again with overwrite=True (--overwrite), "
                "which puts the rest in place"
            )
    if len(found) > _FILES:
        raise StorageError(
            f"{url}: cannot be read: {len(found)} files are no model: {_FILES} are the limit"
        )
    above = url.rstrip("/").rpartition("/")[0] if lone else url.rstrip("/")
    with TemporaryDirectory(prefix="peft_any-", ignore_cleanup_errors=True) as place:
        folder = Path(place).resolve()
        path = folder / key.rpartition("/")[2] if lone else folder
        mirror = Mirror(fs, root, above, folder, path, url, look=look)
        with reaching(url, "be read"):
            for name, info in found.items():
                mirror.add(name[len(root) :].lstrip("/"), info)
        small = (*_BESIDE, ".index.json")
        mirror.fetch([name for name in mirror.away if name.endswith(small) and "/" not in name])
        yield mirror


def holds(url: str, name: str) -> bool:
    """Whether a directory elsewhere has a file."""
    fs, key = filesystem(url)
    with reaching(url, "be read"):
        return info_of(fs, f"{key}/{name}") is not None

"""A directory of adapters, mapped into memory as they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

from peft_any.adapter import Adapter
from peft_any.arguments import methods_checked
from peft_any.backend import dtype_name, numpy_dtype, resolve
from peft_any.errors import ConfigError, StorageError, nearest
from peft_any.io._faults import reporting
from peft_any.io._finding import CONFIG_NAME, INDEX, TENSORS, files_of, find_adapter
from peft_any.io._reader import UNTRACKED

Stamp: TypeAlias = tuple[tuple[int, ...], ...]


class Held(NamedTuple):
    """An adapter in memory, its size, and the files that it was."""

    adapter: Adapter
    size: int
    stamp: Stamp


class Gate:
    """What lets one thread at a time load an adapter, and how many hold it or wait for it."""

    def __init__(self) -> None:
        self.lock, self.wanted = Lock(), 0


@methods_checked("__init__")
class AdapterStore(Mapping[str, Adapter]):
    """The adapters of a directory, each loaded when it is asked for; the least used make room.

    An adapter is checked whole when it is loaded, its values too. It is loaded again, and checked
    again, when its files have changed since. Any number of threads may ask at the same time: an
    adapter that cannot be read is an error to those who ask for it, and to nobody else.

    Parameters
    ----------
    directory : path
        Each adapter is a directory in it, whose name is the adapter's.
    max_bytes : int
        The most that the arrays of all adapters held take. One that is larger alone is given, and
        not held.
    backend : str or Backend
        Where the arrays go. On NumPy they are views of the mapped files.
    mapped : bool
        Whether to map files rather than copy them. Half as many are mapped as a process may have
        open (``ulimit -n``), since each counts as open before Python 3.13; others are copied.
        A mapped file must be replaced (as `Adapter.save` does), never shortened in place: the
        system ends a process that reads where there is no file any more. With false an adapter
        in use is safe from that too.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from peft_any.methods.ia3 import IA3Config
    >>> adapter = Adapter(IA3Config(), {"fc": {"ia3_l": np.ones((3, 1), "float32")}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter.save(f"{folder}/fr")
    ...     store = AdapterStore(folder, max_bytes=1 << 20)
    ...     [*store], store["fr"].num_parameters, store.held
    (['fr'], 3, {'fr': 12})
    """

    def __init__(
        self,
        directory: str | Path,
        max_bytes: int,
        *,
        backend: Any = "numpy",
        mapped: bool = True,
    ) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise StorageError(f"{directory}: there is no such directory of adapters")
        if max_bytes < 0:
            raise ConfigError(f"max_bytes={max_bytes}: give the most bytes to hold, at least 0")
        resolve(backend)  # which says what is wrong with it
        self.max_bytes = max_bytes
        self._backend, self._mapped = backend, mapped
        self._lock = Lock()
        self._loading: dict[str, Gate] = {}
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.parent.name for path in self.directory.glob(f"*/{CONFIG_NAME}")))

    def __len__(self) -> int:
        return sum(1 for _ in self.directory.glob(f"*/{CONFIG_NAME}"))

    def __contains__(self, name: object) -> bool:
        return _plain(name) and (self.directory / str(name) / CONFIG_NAME).is_file()

    def get(self, name: str, /, default: Any = None) -> Any:
        """Give an adapter, or the default where there is none of that name."""
        if name not in self:
            return default
        return self[name]

    @property
    def held(self) -> dict[str, int]:
        """The adapters in memory with their bytes, the least recently used first."""
        with self._lock:
            return {name: one.size for name, one in self._held.items()}

    def __getitem__(self, name: str) -> Adapter:
        """Give an adapter, loading it where it is not held.

        Raises
        ------
        ConfigError, FormatError, ShapeError, StorageError, TargetError
            If there is none of that name, or its files are gone, damaged or no adapter.
        """
        if not _plain(name):
            raise StorageError(f"{self.directory}: {name!r} cannot name an adapter in it")
        with self._alone(name):
            return self._given(name)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Let one thread at a time in for a name; nothing is kept of names that nobody asks for."""
        with self._lock:
            gate = self._loading.setdefault(name, Gate())
            gate.wanted += 1
        try:
            with gate.lock:
                yield
        finally:
            with self._lock:
                gate.wanted -= 1
                if not gate.wanted:
                    del self._loading[name]

    def _given(self, name: str) -> Adapter:
        folder = self.directory / name
        try:
            stamp, why = _stamp(folder), ""
        except OSError as error:
            stamp, why = (), error.strerror or str(error)
        if not stamp:
            self._drop(name)
            if folder.is_dir():
                with reporting(folder, "be read"):
                    find_adapter(folder)  # which says what is missing, or no adapter's
            near = "" if folder.is_dir() else nearest(name, self)
            raise StorageError(f"{folder}: the adapter cannot be read: {why}{near}")
        with self._lock:
            found = self._held.get(name)
            if found is not None and found.stamp == stamp:
                self._held.move_to_end(name)
                return found.adapter
        self._drop(name)
        mapped = self._mapped and 2 * len(self._held) < _most_files()
        adapter = Adapter.load(folder, self._backend, mapped=mapped)
        adapter.check_finite(folder)
        if self._stamp_or_none(folder) != stamp:
            raise StorageError(f"{folder}: the adapter was written while it was read: try again")
        self._keep(name, Held(adapter, _size(adapter), stamp))
        return adapter

    def _stamp_or_none(self, folder: Path) -> Stamp | None:
        try:
            return _stamp(folder)
        except OSError:
            return None

    def _keep(self, name: str, made: Held) -> None:
        with self._lock:
            self._held[name] = made
            self._size += made.size
            while self._size > self.max_bytes:
                _, old = self._held.popitem(last=made.size > self.max_bytes)
                self._size -= old.size

    def _drop(self, name: str) -> None:
        with self._lock:
            old = self._held.pop(name, None)
            self._size -= old.size if old is not None else 0

    def __repr__(self) -> str:
        return f"AdapterStore({str(self.directory)!r}: {len(self)} adapters)"


def _plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _most_files() -> float:
    """How many files a process may have open, where mapped ones are among them."""
    if UNTRACKED:
        return inf
    try:
        import resource  # noqa: PLC0415 - Unix only
    except ImportError:
        return inf
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return inf if most == resource.RLIM_INFINITY else most


def _stamp(folder: Path) -> Stamp:
    tensors = folder / TENSORS
    index = None if tensors.exists() else next(folder.glob(f"*{INDEX}"), None)
    shards = [tensors] if index is None else files_of(index)
    stats = [path.stat() for path in (folder / CONFIG_NAME, *shards)]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


def _size(adapter: Adapter) -> int:
    parts = [*adapter.sites.values(), adapter.shared, adapter.extra, adapter.tokens, adapter.spare]
    arrays = [array for part in parts for array in part.values()]
    return sum(prod(a.shape) * numpy_dtype(dtype_name(a)).itemsize for a in arrays)

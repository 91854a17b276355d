"""A safetensors file written tensor by tensor, or anywhere at once."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from peft_any._typing import Shape
from peft_any.backend import to_numpy
from peft_any.errors import ShapeError, StorageError, UsageError
from peft_any.io._atomic import StrPath, reporting, storage_error
from peft_any.io._header import TensorInfo, format_header
from peft_any.io._reader import HostArray, SafetensorsFile

_NO_KERNEL_COPY = {
    errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EPERM
}  # fmt: skip
_CHUNK = 1 << 30
_BEGIN = 2
"""Of sync_file_range(2): write what is not being written yet, and wait for none of it."""


class _Writer:
    """A new file with a header, removed on any exception and where it stays incomplete."""

    def __init__(
        self,
        path: StrPath,
        specs: Iterable[tuple[str, str, Shape]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        """The file."""
        header, self.tensors = format_header(specs, metadata)
        self._handle = -1
        with reporting(path, "be written"):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            try:
                self._handle = os.open(path, flags, 0o666)
            except FileExistsError as cause:
                raise StorageError(f"{path}: cannot be written: it exists") from cause
        try:
            self._begin(memoryview(header))
        except BaseException:
            self.discard()
            raise

    def _begin(self, header: memoryview) -> None:
        """Write the header."""
        raise NotImplementedError

    def _lacking(self) -> str | None:
        """Name a tensor that was not written, if there is one."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush to the device and close; an incomplete file is removed and an error."""
        if self._handle < 0:
            return
        lacking = self._lacking()
        if lacking is not None:
            self.discard()
            raise UsageError(f"{self.path}: cannot be finished: {lacking!r} was not written")
        try:
            with reporting(self.path, "be written"):
                os.fsync(self._handle)
                handle, self._handle = self._handle, -1
                os.close(handle)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Close and remove the file."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            with suppress(OSError):
                os.close(handle)
        with suppress(OSError):
            self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._handle >= 0:  # one that was finished stays
            self.discard()

    def _same(self, name: str, source: SafetensorsFile, origin: str) -> TensorInfo:
        """Check that a tensor of another file fits one of this, and describe it."""
        info, theirs = self.tensors[name], source.info(origin)
        if (theirs.dtype, theirs.shape) != (info.dtype, info.shape):
            raise ShapeError(
                f"{self.path}: {name!r} cannot be copied: {theirs.dtype} {theirs.shape} stored "
                f"and {info.dtype} {info.shape} announced"
            )
        return theirs

    def _kernel_copy(
        self, source: SafetensorsFile, start: int, size: int, to: int | None = None
    ) -> int:
        """Have the kernel copy bytes to where the file stands, or `to`; count those it has."""
        done = 0
        if not hasattr(os, "copy_file_range") or (handle := source.reopen()) is None:
            return done
        try:
            while done < size:
                count = min(size - done, _CHUNK)
                at = None if to is None else to + done
                moved = os.copy_file_range(handle, self._handle, count, start + done, at)
                if moved == 0:
                    break
                done += moved
        except OSError as cause:
            if cause.errno not in _NO_KERNEL_COPY:
                raise storage_error(self.path, "be written", cause) from cause
        finally:
            os.close(handle)
        return done


class PlacedWriter(_Writer):
    """Writes a safetensors file in any order, from several threads at once.

    It has its full size from the start, and its header. Used as `StreamWriter`; what was
    written is counted apart, since other processes may write.

    Parameters
    ----------
    path, specs, metadata
        As for `StreamWriter`.

    Raises
    ------
    StorageError
        Where the file exists, cannot be written, or there is less space than it will take.
    UsageError
        For specs that cannot be stored, and an incomplete file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with PlacedWriter(f"{folder}/x", [("a", "int8", (3,))]) as out:
    ...         out.put("a", 1, b"yz")
    ...         out.put("a", 0, b"x")
    ...         out.count("a", 3)
    ...     bytes(SafetensorsFile(f"{folder}/x").raw("a"))
    b'xyz'
    """

    def _begin(self, header: memoryview) -> None:
        self._lock = Lock()
        self._left = {name: info.nbytes for name, info in self.tensors.items()}
        size = max((info.stop for info in self.tensors.values()), default=len(header))
        with reporting(self.path, "be written"):
            if hasattr(os, "fstatvfs"):
                free = os.fstatvfs(self._handle)
                if free.f_blocks and free.f_bavail * free.f_frsize < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Not posix_fallocate: ext4 takes several times longer to write into such a file.
            os.ftruncate(self._handle, size)
        self._put(header, 0)

    def put(self, name: str, at: int, data: HostArray | bytes | memoryview) -> None:
        """Write some of a tensor's bytes, beginning at its byte `at`."""
        info = self._open(name)
        raw = memoryview(data).cast("B") if isinstance(data, bytes | memoryview) else _bytes(data)
        if at < 0 or at + raw.nbytes > info.nbytes:
            raise ShapeError(
                f"{self.path}: {name!r} cannot be written: bytes {at} to {at + raw.nbytes} given "
                f"and {info.nbytes} announced"
            )
        self._put(raw, info.start + at)

    def copy(self, name: str, source: SafetensorsFile, origin: str, start: int, stop: int) -> None:
        """Write a range of a tensor's bytes from another file's, moved by the kernel if it can."""
        info = self._open(name)
        theirs = self._same(name, source, origin)
        done = start + self._kernel_copy(
            source, theirs.start + start, stop - start, info.start + start
        )
        self._put(source.part(origin, done, stop), info.start + done)

    def flush(self) -> None:
        """Have the device begin to write, where the system offers it, and go on at once."""
        if self._handle >= 0 and (begin := _writeback()) is not None:
            begin(self._handle, 0, 0, _BEGIN)  # errors show when the file is closed

    def _open(self, name: str) -> TensorInfo:
        if self._handle < 0:
            raise UsageError(f"{self.path}: {name!r} cannot be written: the file was closed")
        return self.tensors[name]

    def count(self, name: str, size: int) -> None:
        """Note that bytes were written, by whichever process."""
        self._left[name] -= size

    @property
    def handle(self) -> int:
        """The descriptor."""
        return self._handle

    def _lacking(self) -> str | None:
        return next((name for name, left in self._left.items() if left), None)

    def _put(self, raw: memoryview, at: int) -> None:
        with reporting(self.path, "be written"):
            while raw:
                done = self._pwrite(raw[:_CHUNK], at)
                raw, at = raw[done:], at + done

    def _pwrite(self, raw: memoryview, at: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._handle, raw, at)
        with self._lock:  # Windows
            os.lseek(self._handle, at, os.SEEK_SET)
            return os.write(self._handle, raw)


class StreamWriter(_Writer):
    """Writes a safetensors file tensor by tensor, in an order fixed beforehand.

    Used as a context manager; on any exception, and where a tensor was left out, the file is
    removed. The file itself is new: for an output that appears whole, write into
    `output_directory` or `output_file`.

    Parameters
    ----------
    path : path
        A name that does not exist yet.
    specs : iterable of (name, dtype, shape)
        The tensors in order, dtypes by name (``"bfloat16"``).
    metadata : mapping of str to str, optional
        Goes to ``__metadata__``.

    Raises
    ------
    StorageError
        Where the file exists, cannot be written, or the disk is full.
    UsageError
        For specs that cannot be stored, tensors out of turn, and an incomplete file.
    ShapeError
        For a tensor that does not fit its spec.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StreamWriter(f"{folder}/x", [("b", "int8", (2,)), ("a", "float32", (1,))]) as out:
    ...         out.write("b", b"ab")
    ...         out.write("a", np.ones(1, np.float32))
    ...     list(SafetensorsFile(f"{folder}/x"))
    ['b', 'a']
    """

    def _begin(self, header: memoryview) -> None:
        self._pending = iter(self.tensors)
        self._next = next(self._pending, None)
        self._put(header)

    def _lacking(self) -> str | None:
        return self._next

    def write(self, name: str, data: Any) -> None:
        """Write the next tensor: an array of any library, or its bytes as a buffer."""
        info = self._turn(name)
        if isinstance(data, bytes | bytearray | memoryview):
            raw = memoryview(data).cast("B")
            if raw.nbytes != info.nbytes:
                raise ShapeError(
                    f"{self.path}: {name!r} cannot be written: {raw.nbytes} bytes given and "
                    f"{info.nbytes} announced"
                )
        else:
            host = to_numpy(data)
            if (host.dtype.name, host.shape) != (info.dtype, info.shape):
                raise ShapeError(
                    f"{self.path}: {name!r} cannot be written: {host.dtype.name} {host.shape} "
                    f"given and {info.dtype} {info.shape} announced"
                )
            raw = _bytes(host)
        self._put(raw)
        self._next = next(self._pending, None)

    def copy(self, name: str, source: SafetensorsFile, source_name: str | None = None) -> None:
        """Write the next tensor from another file's bytes, moved by the kernel where it can."""
        self._turn(name)
        origin = name if source_name is None else source_name
        theirs = self._same(name, source, origin)
        done = self._kernel_copy(source, theirs.start, theirs.nbytes)
        self._put(source.raw(origin)[done:])
        self._next = next(self._pending, None)

    def _turn(self, name: str) -> TensorInfo:
        if self._handle < 0:
            raise UsageError(f"{self.path}: {name!r} cannot be written: the file was closed")
        if name != self._next:
            turn = "all are written" if self._next is None else f"{self._next!r} is next"
            raise UsageError(f"{self.path}: {name!r} cannot be written now: {turn}")
        return self.tensors[name]

    def _put(self, raw: memoryview) -> None:
        with reporting(self.path, "be written"):
            while raw:
                raw = raw[os.write(self._handle, raw[:_CHUNK]) :]


@cache
def _writeback() -> Callable[[int, int, int, int], Any] | None:
    """Find Linux's own sync_file_range, which Python does not offer."""
    with suppress(OSError, AttributeError):
        begin = ctypes.CDLL(None).sync_file_range
        begin.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
        return begin
    return None


def _bytes(host: HostArray) -> memoryview:
    if host.dtype.byteorder == ">":
        host = host.astype(host.dtype.newbyteorder("<"))
    return np.asarray(host, order="C").reshape(-1).view(np.uint8).data

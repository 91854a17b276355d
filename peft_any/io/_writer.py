"""A safetensors file written tensor by tensor."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
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


class StreamWriter:
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

    def __init__(
        self,
        path: StrPath,
        specs: Iterable[tuple[str, str, Shape]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        """The file."""
        header, self.tensors = format_header(specs, metadata)
        self._pending = iter(self.tensors)
        self._next = next(self._pending, None)
        self._handle = -1
        with reporting(path, "be written"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            try:
                self._handle = os.open(path, flags, 0o666)
            except FileExistsError as cause:
                raise StorageError(f"{path}: cannot be written: it exists") from cause
        try:
            self._put(memoryview(header))
        except BaseException:
            self.discard()
            raise

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
        info = self._turn(name)
        origin = name if source_name is None else source_name
        theirs = source.info(origin)
        if (theirs.dtype, theirs.shape) != (info.dtype, info.shape):
            raise ShapeError(
                f"{self.path}: {name!r} cannot be copied: {theirs.dtype} {theirs.shape} stored "
                f"and {info.dtype} {info.shape} announced"
            )
        done = self._kernel_copy(source, theirs)
        self._put(source.raw(origin)[done:])
        self._next = next(self._pending, None)

    def close(self) -> None:
        """Flush to the device and close; an incomplete file is removed and an error."""
        if self._handle < 0:
            return
        if self._next is not None:
            self.discard()
            raise UsageError(f"{self.path}: cannot be finished: {self._next!r} was not written")
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
        else:
            self.discard()

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

    def _kernel_copy(self, source: SafetensorsFile, info: TensorInfo) -> int:
        done = 0
        if not hasattr(os, "copy_file_range") or (handle := source.reopen()) is None:
            return done
        try:
            while done < info.nbytes:
                count = min(info.nbytes - done, _CHUNK)
                moved = os.copy_file_range(handle, self._handle, count, info.start + done)
                if moved == 0:
                    break
                done += moved
        except OSError as cause:
            if cause.errno not in _NO_KERNEL_COPY:
                raise storage_error(self.path, "be written", cause) from cause
        finally:
            os.close(handle)
        return done


def _bytes(host: HostArray) -> memoryview:
    if host.dtype.byteorder == ">":
        host = host.astype(host.dtype.newbyteorder("<"))
    return np.asarray(host, order="C").reshape(-1).view(np.uint8).data

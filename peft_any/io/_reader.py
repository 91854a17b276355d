"""One safetensors file, memory-mapped and trusted in nothing."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from peft_any._dtypes import numpy_dtype
from peft_any.errors import FormatError, StorageError, nearest
from peft_any.io._faults import StrPath, reading, reporting, untouched
from peft_any.io._foreign import disguise
from peft_any.io._header import BITS, HEADER_LIMIT, TensorInfo
from peft_any.io._json import regular_size
from peft_any.io._parse import parse_header

HostArray: TypeAlias = npt.NDArray[Any]
UNTRACKED = os.name == "posix" and sys.version_info >= (3, 13)
"""Whether a mapped file is not counted among the open ones."""


class SafetensorsFile(Mapping[str, HostArray]):
    """One safetensors file as a read-only mapping of names to arrays.

    The header is checked in full on opening: every byte of the file belongs to exactly one
    tensor. The data is mapped, not read: arrays are read-only views, bfloat16 and float8 ones
    in ml_dtypes' types, and remain valid after `close`. A file must not be shortened meanwhile.

    Parameters
    ----------
    path : path
        The file.

    Raises
    ------
    FormatError
        Where the contents are malformed, truncated, hostile or of another format.
    StorageError
        Where the file is missing, unreadable or not a regular file.

    Examples
    --------
    >>> import tempfile
    >>> from peft_any.io.safetensors import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/x", {"w": np.ones((2, 3), np.float16)}, {"format": "pt"})
    ...     with SafetensorsFile(f"{folder}/x") as file:
    ...         file.metadata, file.info("w").dtype, file["w"].shape
    ({'format': 'pt'}, 'float16', (2, 3))
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        """The file."""
        self._where = str(path)
        self._map: mmap.mmap | None = None
        size = regular_size(path)
        if size == 0:
            raise FormatError(f"{path}: cannot be read: it is empty")
        with reporting(path, "be read"), reading(path) as file:
            self._stat = os.fstat(file.fileno())
            size = self._stat.st_size
            head = file.read(64)
            length = self._header_length(head, size)
            file.seek(8)
            raw = file.read(length)
            more: Any = {"trackfd": False} if UNTRACKED else {}
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, **more)
        self._tensors, self.metadata = parse_header(raw, size - 8 - length, str(path))

    def _header_length(self, head: bytes, size: int) -> int:
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or size < 8:
            what = f"it is {size} bytes long and the shortest header takes 10"
        elif length > HEADER_LIMIT:
            what = f"it announces a header of {length} bytes and {HEADER_LIMIT} is the limit"
        elif length > size - 8:
            what = f"it announces a header of {length} bytes and {size - 8} follow (truncated?)"
        elif head[8:9] != b"{":
            what = "its header is not a JSON object"
        else:
            return length
        raise FormatError(f"{self._where}: cannot be read as safetensors: {what}{disguise(head)}")

    def __getitem__(self, name: str) -> HostArray:
        info = self.info(name)
        if BITS[info.dtype] % 8:
            raise FormatError(
                f"{self._where}: {name!r} cannot be an array: its {info.dtype} elements are packed "
                "into shared bytes; use `raw`"
            )
        flat = np.frombuffer(self.raw(name), np.uint8)
        return flat.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range of a tensor; `KeyError` where there is none."""
        try:
            return self._tensors[name]
        except KeyError:
            close = nearest(str(name), self._tensors)
            raise KeyError(f"{self._where}: holds no tensor {name!r}{close}") from None

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes, in place."""
        info = self.info(name)
        if self._map is None:
            raise StorageError(f"{self._where}: {name!r} cannot be read: the file was closed")
        return memoryview(self._map)[info.start : info.stop]

    def part(self, name: str, start: int, stop: int) -> memoryview:
        """Some of a tensor's bytes."""
        return self.raw(name)[start:stop]

    def parts(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """Some of the bytes of some tensors."""
        return [self.part(*one) for one in wanted]

    def reopen(self) -> int | None:
        """A fresh descriptor of the very same file, for the kernel to copy from; else None."""
        try:
            handle = untouched(self.path, os.O_RDONLY)
        except OSError:
            return None
        now, then = os.fstat(handle), self._stat
        if (now.st_dev, now.st_ino, now.st_size) == (then.st_dev, then.st_ino, then.st_size):
            return handle
        os.close(handle)
        return None

    def close(self) -> None:
        """Give the mapping up; arrays handed out keep it alive as long as they need it."""
        if self._map is not None:
            with suppress(BufferError):
                self._map.close()
            self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._where!r}: {len(self)} tensors)"

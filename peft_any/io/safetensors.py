"""Whole safetensors files, laid out byte for byte as the safetensors library does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_any.arguments import checked
from peft_any.backend import dtype_name
from peft_any.io._atomic import StrPath, output_file
from peft_any.io._header import RANK, TensorInfo
from peft_any.io._reader import HostArray, SafetensorsFile
from peft_any.io._writer import StreamWriter

__all__ = [
    "HostArray",
    "SafetensorsFile",
    "StreamWriter",
    "TensorInfo",
    "read_metadata",
    "read_safetensors",
    "write_safetensors",
]


@checked
def read_safetensors(path: StrPath) -> dict[str, HostArray]:
    """Read a whole file into memory.

    Parameters
    ----------
    path : path
        The file; `SafetensorsFile` documents what is checked and raised.

    Returns
    -------
    dict of str to numpy.ndarray
        Arrays of their own, independent of the file, in its order.
    """
    with SafetensorsFile(path) as file:
        return {name: np.array(file[name], order="C") for name in file}


def read_metadata(path: StrPath) -> dict[str, str]:
    """The ``__metadata__`` of a file, or an empty dict; checks all that `SafetensorsFile` does."""
    with SafetensorsFile(path) as file:
        return dict(file.metadata)


@checked
def write_safetensors(
    path: StrPath,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a whole file, byte for byte as the safetensors library lays it out.

    Parameters
    ----------
    path : path
        The file; it appears complete or not at all.
    tensors : mapping of str to array
        Arrays of any library and device; they are stored by dtype and name, whatever their
        order here.
    metadata : mapping of str to str, optional
        Stored in the order given.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    StorageError
        Where the file exists, cannot be written, or the disk is full.
    UsageError
        For a name, dtype or metadata that the format cannot hold.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/a.safetensors", {"w": np.ones((2, 3), np.float32)})
    ...     read_safetensors(f"{folder}/a.safetensors")["w"].shape
    (2, 3)
    """
    specs = [(name, dtype_name(value), tuple(value.shape)) for name, value in tensors.items()]
    specs.sort(key=lambda spec: (RANK.get(spec[1], -1), spec[0]))
    with output_file(path, overwrite) as partial, StreamWriter(partial, specs, metadata) as writer:
        for name, _, _ in specs:
            writer.write(name, tensors[name])

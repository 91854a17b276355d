"""The state of a training run as a safetensors file: any nest of arrays and plain values."""

from __future__ import annotations

import json
from typing import Any

from peft_any._tree import Tree, named, shape_faults
from peft_any.backend import Backend, dtype_name, from_numpy, is_array, resolve
from peft_any.errors import ConfigError, FormatError
from peft_any.io._atomic import StrPath
from peft_any.io.safetensors import SafetensorsFile, write_safetensors

KEY = "peft_any_state"
VERSION = 1


def save_state(path: StrPath, state: Tree) -> None:
    """Write a nest of dicts, lists and tuples; the file appears complete or not at all.

    Parameters
    ----------
    path : path
        A safetensors file; one that exists is replaced.
    state : nest
        Of arrays, numbers, texts, truth values and None: what an `Optimizer` keeps. Arrays keep
        every bit, Python floats too.

    Raises
    ------
    ConfigError
        For a leaf of another type, or a key that is no text.
    StorageError
        Where the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(f"{folder}/run", {"step": 3, "m": (np.ones(2),)})
    ...     load_state(f"{folder}/run", backend="numpy")
    {'step': 3, 'm': (array([1., 1.]),)}
    """
    arrays: dict[str, Any] = {}
    tree = json.dumps({"version": VERSION, "tree": _encode(state, (), arrays)})
    write_safetensors(path, arrays, {KEY: tree}, overwrite=True)


def load_state(path: StrPath, *, backend: str | Backend = "auto") -> Tree:
    """Read what `save_state` wrote, with arrays of a backend.

    Raises
    ------
    FormatError
        If the file holds no such state.
    StorageError
        If it cannot be read.
    """
    to = resolve(backend)
    with SafetensorsFile(path) as file:
        try:
            text = json.loads(file.metadata[KEY])
            version = text["version"]
            if version != VERSION:
                raise FormatError(
                    f"{path}: a training state of version {version} cannot be read: this "
                    f"peft_any reads version {VERSION}"
                )
            return _decode(text["tree"], file, to)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"{path}: is no training state: it has no {KEY!r} that describes its tensors "
                f"({error}); adapters are read by Adapter.load"
            ) from None


def refuse_other(found: Tree, want: Tree, what: str, why: str) -> None:
    """Compare a resumed nest with the one that this run would start from.

    Raises
    ------
    ConfigError
        Listing every array that is missing, unexpected or of another shape.
    """
    if faults := shape_faults(found, want):
        shown = "\n  ".join(faults[:10] + ([f"… {len(faults)} in all"] if faults[10:] else []))
        raise ConfigError(f"{what}: cannot resume: {why}:\n  {shown}")


def _encode(node: Any, path: tuple[str | int, ...], arrays: dict[str, Any]) -> Any:
    if is_array(node):
        name = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)
        while name in arrays or name == "":  # an item 0 and a key "0" cannot meet, but be safe
            name += "'"
        arrays[name] = node
        return {"array": name, "dtype": dtype_name(node)}
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str):
                raise ConfigError(f"{named(path)}: key {key!r} cannot be saved: use texts as keys")
        return {"dict": {k: _encode(v, (*path, k), arrays) for k, v in node.items()}}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_encode(v, (*path, i), arrays) for i, v in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise ConfigError(
        f"{named(path)}: a {type(node).__name__} cannot be saved: a state holds arrays, numbers, "
        "texts, truth values and None in dicts, lists and tuples"
    )


def _decode(node: Any, file: SafetensorsFile, to: Backend) -> Any:
    ((kind, value),) = ((k, v) for k, v in node.items() if k != "dtype")
    if kind == "array":
        return from_numpy(file[value].copy(), to)
    if kind == "dict":
        return {k: _decode(v, file, to) for k, v in value.items()}
    if kind in ("list", "tuple"):
        items = [_decode(v, file, to) for v in value]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return value
    raise ValueError(f"unknown kind {kind!r}")

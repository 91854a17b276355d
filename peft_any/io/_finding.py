"""Where an adapter's configuration and tensors are, and what is no adapter."""

from __future__ import annotations

import os
from pathlib import Path

from peft_any.errors import ConfigError, FormatError, StorageError, nearest
from peft_any.io._faults import reporting
from peft_any.io._foreign import PICKLES, conversion, disguise
from peft_any.io._json import regular_size
from peft_any.io._urls import local
from peft_any.io.checkpoint import INDEX as INDEX
from peft_any.io.checkpoint import Checkpoint, is_base
from peft_any.io.safetensors import SafetensorsFile

CONFIG_NAME = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_OTHERS = {
    "adapters.safetensors": "mlx-lm",
    "pytorch_lora_weights.safetensors": "diffusers",
}
"""Whose adapters have their tensors in these files."""


def find_config(folder: Path) -> Path:
    """Find the configuration of an adapter directory.

    Raises
    ------
    ConfigError
        If there is none, naming sub-directories that have one: Hugging Face PEFT gives each
        adapter that is not called "default" a directory of its own.
    """
    path = folder / CONFIG_NAME
    if path.is_file():
        return path
    _refuse_special(path)
    with reporting(folder, "be read"):  # it may vanish
        _refuse_other(folder)
        found = [*folder.glob(f"*/{CONFIG_NAME}"), *folder.glob(f"snapshots/*/{CONFIG_NAME}")]
        inside = sorted(p.parent.relative_to(folder).as_posix() for p in found)
        if inside:
            more = f": it holds the adapters {inside}; give one of these directories"
        elif any(map(is_base, (p.name for p in folder.iterdir()))):
            more = ": it holds a model; give an adapter made for one"
        else:
            more = nearest(CONFIG_NAME, [p.name for p in folder.glob("*.json")])
    raise ConfigError(f"{folder}: has no {CONFIG_NAME}{more}")


def find_adapter(path: Path, *, configured: bool = False) -> tuple[Path, Path]:
    """Find an adapter's tensor file and, unless it is already `configured`, its configuration.

    transformers' own `save_pretrained` may cut an adapter into shards, which it cannot load again;
    their index then stands for the file.

    Raises
    ------
    ConfigError
        If there is no configuration: see `find_config`.
    FormatError
        If the tensors are a pickle, with the command that converts it.
    StorageError
        If there is nothing, or no tensor file.
    """
    if not os.path.exists(local(path, "be read")):
        what = "it is a link to nothing" if os.path.islink(path) else "there is no such adapter"
        raise StorageError(f"{path}: {what}; check the spelling")
    if path.name == CONFIG_NAME and path.is_file():
        path = path.parent
    if not path.is_dir():
        _refuse_pickle(path)
        beside = path.with_name(CONFIG_NAME)
        if not configured and not (path.name == TENSORS and beside.is_file()):
            raise ConfigError(
                f"{path}: tensors alone cannot be an adapter: give the directory with its "
                f"{CONFIG_NAME} (or config= in Python){_looks(path)}"
            )
        return path, beside
    found = path / CONFIG_NAME if configured else find_config(path)
    tensors = path / TENSORS
    if tensors.is_file():
        return tensors, found
    with reporting(path, "be read"):
        names = [TENSORS.replace(".safetensors", INDEX), f"model{INDEX}"]
        index = next((path / name for name in names if (path / name).is_file()), None)
        if index is not None and any(path.glob("adapter_model-*-of-*.safetensors")):
            return index, found
        for pickle in sorted(p for p in path.iterdir() if p.suffix in PICKLES):
            _refuse_pickle(pickle)
        _refuse_other(path)
        _refuse_special(tensors)
        names = [p.name for p in path.iterdir()]
        raise StorageError(f"{path}: has no {TENSORS}{nearest(TENSORS, names)}")


def opened(tensors: Path) -> SafetensorsFile | Checkpoint:
    """Open what `find_adapter` found: a file, or shards."""
    return Checkpoint(tensors) if tensors.name.endswith(INDEX) else SafetensorsFile(tensors)


def files_of(tensors: Path) -> list[Path]:
    """List the files of what `find_adapter` found."""
    if not tensors.name.endswith(INDEX):
        return [tensors]
    with Checkpoint(tensors) as file:
        return [tensors, *(shard.path for shard in file.shards)]


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise FormatError(
            f"{path}: a pickle is never loaded: it can run any code; "
            f"{conversion(path, str(path.with_name(TENSORS)))}"
        )


def _refuse_special(path: Path) -> None:
    if os.path.lexists(path):
        regular_size(path)


def _looks(path: Path) -> str:
    regular_size(path)
    with path.open("rb") as file:
        hint = disguise(file.read(64))
    if not hint and path.suffix == ".safetensors":
        with SafetensorsFile(path) as tensors:
            kohya = any(name.endswith(".lora_down.weight") for name in tensors)
        hint = "; it looks like a LoRA of kohya's tools, which is not read" if kohya else ""
    return hint


def _refuse_other(folder: Path) -> None:
    for name, whose in _OTHERS.items():
        if (folder / name).is_file():
            raise FormatError(
                f"{folder}: holds {name}, an adapter as {whose} saves it: only Hugging Face "
                "PEFT's files are read"
            )

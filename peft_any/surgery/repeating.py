"""Repeating the layers of a checkpoint on disk: the base of an adapter with `layer_replication`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_any.arguments import checked
from peft_any.io._atomic import StrPath
from peft_any.io._header import RANK, byte_size
from peft_any.io._writer import StreamWriter
from peft_any.io.checkpoint import INDEX, Checkpoint, output_directory
from peft_any.receipt import SCHEMA_VERSION, plain, to_json
from peft_any.replication import Layers, origins, stack_of
from peft_any.surgery.beside import RECEIPT, copy_side_files, described, write_index, write_json
from peft_any.surgery.job import Progress
from peft_any.surgery.shards import Spec, byte_count, packed

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of config.json that count layers, or say one thing of each."""


@dataclass(frozen=True)
class Replication:
    """What `replicate_checkpoint` made.

    Attributes
    ----------
    base, out : dict
        Path, fingerprint, number of tensors, bytes.
    stack : str
        What the layers are in.
    layers : tuple of int
        Of every layer of the deeper model, the base's.
    config : dict of str to (before, after)
        What changed in config.json.
    """

    base: dict[str, Any]
    out: dict[str, Any]
    stack: str
    layers: tuple[int, ...]
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        head = {"schema_version": SCHEMA_VERSION, "kind": "replicate"}
        return plain(head | vars(self))

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)


@checked
def replicate_checkpoint(
    base: StrPath,
    layer_replication: Layers,
    out: StrPath,
    *,
    stack: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Replication:
    """Write a checkpoint with layers repeated, copying bytes from file to file.

    Side files come along; config.json gets the new number of layers, and its lists of one entry
    a layer are repeated likewise. The output appears whole or not at all.

    Parameters
    ----------
    base : path
        As `Checkpoint` reads it, sharded or not.
    layer_replication, stack
        As for `replicate_layers`.
    out : path
        A directory.
    max_shard_size : int or str, optional
        As for `merge_checkpoint`; without it, copies of a layer go into the layer's own file.
    overwrite : bool
        Whether an existing output may be replaced.
    progress : callable (done, total, name), optional

    Returns
    -------
    Replication

    Raises
    ------
    ConfigError, TargetError
        As `replicate_layers`, before anything is written.
    StorageError
        If reading or writing fails, or `out` exists.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from peft_any import write_safetensors
    >>> weights = {f"model.layers.{i}.fc.weight": np.full((2, 2), i) for i in range(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/base.safetensors", weights)
    ...     made = replicate_checkpoint(
    ...         f"{folder}/base.safetensors", [[0, 2], [1, 3]], f"{folder}/deeper"
    ...     )
    >>> made.layers, made.out["tensors"]
    ((0, 1, 1, 2), 4)
    """
    limit = None if max_shard_size is None else byte_count(max_shard_size)
    with Checkpoint(base) as checkpoint:
        found = origins(checkpoint, layer_replication, stack)
        place, layers = stack_of([*checkpoint], stack)
        order = tuple(old for start, end in layer_replication for old in range(start, end))
        files = _files(checkpoint, found, limit)
        before = checkpoint.config
        config = _deeper(before, order, len(layers))
        changed = {k: (before[k], config[k]) for k in config if config[k] != before[k]}
        total = sum(byte_size(*spec[1:]) or 0 for specs in files.values() for spec in specs)
        with output_directory(out, overwrite, inputs=[checkpoint.source]) as folder:
            done = 0
            for name, specs in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                home = checkpoint.named_shards.get(name, checkpoint.shards[0])
                with StreamWriter(path, specs, home.metadata) as writer:
                    for new, dtype, shape in specs:
                        old = found[new]
                        writer.copy(new, checkpoint.shard_of(old), old)
                        done += byte_size(dtype, shape) or 0
                        if progress is not None:
                            progress(done, total, new)
            copy_side_files(checkpoint, folder, without=RECEIPT)
            if (checkpoint.index is not None) if limit is None else len(files) > 1:
                homes = {spec[0]: name for name, specs in files.items() for spec in specs}
                index = folder / _index_name(checkpoint)
                write_index(index, checkpoint.index or {}, dict(sorted(homes.items())), total)
            if changed:
                write_json(folder / "config.json", config)
            checkpoint.refuse_changes()
            with Checkpoint(folder) as written:
                made = described(out, written)
        return Replication(described(base, checkpoint), made, place, order, changed)


def _files(base: Checkpoint, found: Mapping[str, str], limit: int | None) -> dict[str, list[Spec]]:
    """Say what every file holds: the base's files, or those of `limit` bytes."""
    specs: dict[str, list[Spec]] = {name: [] for name in base.named_shards}
    shard_names = {id(shard): name for name, shard in base.named_shards.items()}
    for new, old in found.items():
        info = base.info(old)
        specs[shard_names[id(base.shard_of(old))]].append((new, info.dtype, tuple(info.shape)))
    if limit is not None:
        every = [spec for held in specs.values() for spec in held]
        return packed(every, limit, _index_name(base).removesuffix(INDEX))
    for held in specs.values():
        held.sort(key=lambda spec: RANK[spec[1]])
    return {name: held for name, held in specs.items() if held}


def _index_name(base: Checkpoint) -> str:
    return f"model{INDEX}" if base.index_path is None else base.index_path.name


def _deeper(before: Mapping[str, Any], order: tuple[int, ...], count: int) -> dict[str, Any]:
    """Give the config.json of the deeper model, inner configurations too."""
    config: dict[str, Any] = json.loads(json.dumps(before))
    inner = config.get("text_config")
    for place in (config, inner) if isinstance(inner, dict) else (config,):
        for key in _COUNTS:
            if place.get(key) == count:
                place[key] = len(order)
        for key in _BY_LAYER:
            if isinstance(place.get(key), list) and len(place[key]) == count:
                place[key] = [place[key][old] for old in order]
    return config

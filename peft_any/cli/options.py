"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any

import typer

from peft_any.errors import UsageError

Base = Annotated[
    str, typer.Option(help="The model: a safetensors file, or a directory, with shards or without.")
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="ADAPTER[:WEIGHT]",
        help="An adapter. Given again: the weighted sum of the effects.",
    ),
]
MinKept = typer.Option(
    min=0.0, max=1.0, metavar="SHARE", help="The least of its change that a tensor must keep."
)
Out = Annotated[str | None, typer.Option(help="The output: a directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Backend = Annotated[
    str, typer.Option(metavar="LIBRARY[:DEVICE]", help="Where to compute: numpy, torch:cuda:0 …")
]
NoStrict = Annotated[
    bool, typer.Option("--no-strict", help="Leave out, and record, what has no place in the base.")
]
Rederive = Annotated[
    bool, typer.Option("--rederive", help="Redo the decomposition an unconverted file assumes.")
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Accept a base that the adapter was not made on.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue what a killed run of the same merge left.")
]
FullHash = Annotated[
    bool, typer.Option("--full-hash", help="Put digests of all bytes into the receipt too.")
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Divide the output among files of at most 5GB, 512MiB …"),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="OLD=NEW",
        help="Rename the adapter's modules: a regular expression and what replaces it, or "
        "qkv=q+k+v, or a .json file of such. Given again: one after the other.",
    ),
]
Engine = Annotated[
    str, typer.Option(metavar="local|dask", help="What computes: this process, or Dask's workers.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Of Dask: tcp://host:8786, or a scheduler's .json file. Without: workers here.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads that compute; by default one a processor.")
]
RunsOfLayers = Annotated[
    str, typer.Option(metavar="0:4,2:5", help="Runs of layers START:END, END excluded.")
]
Stack = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the layers are in: model.language_model.layers …"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bar, no warnings, no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def fitting(
    no_strict: bool, rederive: bool, names: list[str] | None, backend: str
) -> dict[str, Any]:
    """Give the options that say how adapters are fitted to a base, as the functions take them."""
    return {
        "strict": not no_strict,
        "rederive": rederive,
        "names": names,
        "backend": backend,
    }


def engine_at(engine: str, scheduler: str | None) -> str:
    """Join the two options that say what computes."""
    if scheduler is not None and engine != "dask":
        raise UsageError(f"--scheduler {scheduler}: is Dask's: give --engine dask with it")
    return scheduler or engine


def runs(layers: str) -> list[list[int]]:
    """Read runs of layers.

    Examples
    --------
    >>> runs("0:4,2:5")
    [[0, 4], [2, 5]]
    """
    pairs = [part.split(":") for part in layers.split(",")]
    if not all(len(pair) == 2 and all(n.strip().isdecimal() for n in pair) for pair in pairs):
        raise UsageError(
            f"--layers {layers}: cannot be read: give runs START:END of layers, END excluded, with "
            "commas between: 0:4,2:5"
        )
    return [[int(n) for n in pair] for pair in pairs]


def weighted(adapters: Sequence[str]) -> list[tuple[str, float]]:
    """Split ``ADAPTER:WEIGHT``: a number after a colon is a weight, unless such a path exists.

    Examples
    --------
    >>> weighted(["style:0.7", "subject", "c:/models/a"])
    [('style', 0.7), ('subject', 1.0), ('c:/models/a', 1.0)]
    """
    pairs = []
    for text in adapters:
        path, _, tail = text.rpartition(":")
        try:
            weight = float(tail)
        except ValueError:
            path, weight = "", 1.0
        if not path or os.path.lexists(text):
            path, weight = text, 1.0
        if not isfinite(weight):
            raise UsageError(f"{text}: {tail} cannot be a weight: give a finite number")
        pairs.append((path, weight))
    return pairs

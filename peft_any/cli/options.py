"""Options that several commands share, and what is read of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import click

from peft_any.cli.commands import Argument, flag, option
from peft_any.errors import UsageError


class Place(click.Path):
    """A path, which shells complete; ``~`` is the home directory after ``--base=`` too.

    What cannot be read is left to be refused by what reads it.
    """

    def __init__(self) -> None:
        super().__init__(readable=False)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Refuse what an unset variable leaves."""
        if not value:
            self.fail("the path is empty.", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - keeps `./a`


PATH = Place()
BASE = option(
    "--base",
    type=PATH,
    required=True,
    help="The model: a safetensors file, or a directory, with shards or without.",
)
ADAPTERS = option(
    "--adapter",
    type=PATH,
    required=True,
    multiple=True,
    metavar="ADAPTER[:WEIGHT]",
    help="An adapter. Given again: the weighted sum of the effects.",
)
ADAPTER = Argument("adapter", type=PATH, help="An adapter's directory or tensor file.")
OUT = option("--out", type=PATH, help="The output: a directory.")
OVERWRITE = flag("--overwrite", help="Replace an existing output.")
DRY_RUN = flag("--dry-run", help="Do everything but write.")
BACKEND = option(
    "--backend",
    default="auto",
    metavar="LIBRARY[:DEVICE]",
    help="Where to compute: numpy, torch:cuda:0 …",
)
NO_STRICT = flag(
    "--no-strict",
    "strict",
    callback=lambda _, __, given: not given,
    help="Leave out, and record, what has no place in the base.",
)
REDERIVE = flag("--rederive", help="Redo the decomposition an unconverted file assumes.")
ANY_BASE = flag("--any-base", help="Accept a base that the adapter was not made on.")
MAX_SHARD_SIZE = option(
    "--max-shard-size",
    metavar="SIZE",
    help="Divide the output among files of at most 5GB, 512MiB …",
)
MAP = option(
    "--map",
    "names",
    multiple=True,
    callback=lambda _, __, given: [*given] or None,
    metavar="OLD=NEW",
    help="Rename the adapter's modules: a regular expression and what replaces it, or "
    "qkv=q+k+v, or a .json file of such. Given again: one after the other.",
)
FITTING = NO_STRICT, REDERIVE, MAP, BACKEND
"""How adapters are fitted to a base."""
ENGINE = (
    option(
        "--engine",
        default="local",
        metavar="local|dask",
        help="What computes: this process, or Dask's workers.",
    ),
    option(
        "--scheduler",
        metavar="ADDRESS",
        help="Of Dask: tcp://host:8786, or a scheduler's .json file. Without: workers here.",
    ),
)
"""What computes (`engine_at`)."""
QUIET = flag("--quiet", "-q", help="No bar, no warnings, no summary.")


def min_kept(default: float | None = None) -> click.Option:
    """Make the option of how much is enough."""
    return option(
        "--min-kept",
        type=click.FloatRange(0, 1),
        default=default,
        metavar="SHARE",
        help="The least of its change that a tensor must keep.",
    )


def engine_at(engine: str, scheduler: str | None) -> str:
    """Join the two options that say what computes."""
    if scheduler is not None and engine != "dask":
        raise UsageError(f"--scheduler {scheduler}: is Dask's: give --engine dask with it")
    return scheduler or engine


def in_options(text: str, params: Iterable[click.Parameter]) -> str:
    """Say in a command's options what the library says in its arguments.

    Examples
    --------
    >>> params = [OVERWRITE, MAP, option("--sv-ratio")]
    >>> in_options("sv_ratio=0: give names=, or overwrite=True (--overwrite)", params)
    '--sv-ratio 0: give --map, or --overwrite'
    """
    for param in params:
        long = next((name for name in param.opts if name.startswith("--")), None)
        if long is not None and param.name:
            text = re.sub(rf"(?<![\w.'\"-]){param.name}=(?:True|False)\b", long, text)
            text = re.sub(rf"(?<![\w.'\"-]){param.name}=(?=[^\s,;:.)])", f"{long} ", text)
            text = re.sub(rf"(?<![\w.'\"-]){param.name}=", long, text)
            if "_" in param.name:
                text = re.sub(rf"(?<![\w.'\"-]){param.name}\b", long, text)
            text = text.replace(f"{long} ({long})", long)
    return text


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

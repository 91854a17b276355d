"""The commands that make adapters of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft_any.cli.app import Result
from peft_any.cli.commands import Argument, command, option
from peft_any.cli.console import waiting
from peft_any.cli.options import (
    ADAPTER,
    ANY_BASE,
    BACKEND,
    DRY_RUN,
    ENGINE,
    OUT,
    OVERWRITE,
    PATH,
    QUIET,
    REDERIVE,
    engine_at,
    weighted,
)
from peft_any.errors import UsageError

ENERGY = option("--energy", type=float, help="Keep this share of every ‖ΔW‖², with the least rank.")
RANK = option("--rank", type=int, help="The rank: of every layer's result, at most.")
MADE = (
    option("--base", type=PATH, help="The model, where effects or sizes depend on it."),
    REDERIVE,
    ANY_BASE,
    option("--dtype", help="Store the factors as fp32, fp16, bf16 …."),
    DRY_RUN,
    OVERWRITE,
    BACKEND,
)
"""What an adapter is made with, and how it is stored."""


def _methods(*asked: Any) -> list[str]:
    """Complete a combination's name."""
    from peft_any.algebra.sums import METHODS

    return [name for name in METHODS if name.startswith(asked[-1])]


@command(
    Argument(
        "adapter",
        type=PATH,
        nargs=-1,
        required=True,
        metavar="ADAPTER[:WEIGHT]...",
        help="Adapters, with weights.",
    ),
    OUT,
    option(
        "--method",
        default="exact",
        shell_complete=_methods,
        help="exact, or a combination type of Hugging Face PEFT: ties_svd …",
    ),
    RANK,
    ENERGY,
    option("--density", type=float, help="The share of the entries that pruning keeps."),
    option(
        "--majority-sign-method",
        default="total",
        help="How ties elects signs: total or frequency.",
    ),
    option("--svd-clamp", type=float, help="Clamp the factors at this quantile (…svd)."),
    option("--seed", default=0, help="Of what dare draws."),
    *MADE,
    *ENGINE,
    QUIET,
)
def combine(adapter: Sequence[str], *, engine: str, scheduler: str | None, **given: Any) -> Result:
    """Make one adapter of several: by default their exact weighted sum."""
    from peft_any import combine as combined

    given["engine"] = engine_at(engine, scheduler)
    return _made(combined, "combining", weighted(adapter), **given)


@command(
    ADAPTER,
    OUT,
    option("--to", default="LORA", help="The method of the result."),
    RANK,
    ENERGY,
    *MADE,
    *ENGINE,
    QUIET,
)
def convert(adapter: str, *, engine: str, scheduler: str | None, **given: Any) -> Result:
    """Make an adapter of any method a plain LoRA: exact, or the best of a rank."""
    from peft_any import convert as converted

    given["engine"] = engine_at(engine, scheduler)
    return _made(converted, "converting", adapter, **given)


@command(
    ADAPTER,
    OUT,
    option(
        "--rank", type=int, help="The rank of every layer, up or down; beside a selector, at most."
    ),
    ENERGY,
    option(
        "--sv-ratio", type=float, help="Keep singular values above the largest divided by this."
    ),
    option("--sv-fro", type=float, help="Keep this share of every ‖ΔW‖."),
    option(
        "--sv-cumulative", type=float, help="Keep this share of the sum of the singular values."
    ),
    *MADE,
    QUIET,
)
def resize(adapter: str, **given: Any) -> Result:
    """Give an adapter another rank: cut to the best approximation, or padded with zeros."""
    from peft_any import resize as resized

    return _made(resized, "resizing", adapter, **given)


def _made(
    function: Callable[..., tuple[Any, Any]],
    what: str,
    adapters: str | Sequence[tuple[str, float]],
    *,
    out: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> Result:
    """Call what makes an adapter, and show its record."""
    from peft_any.cli.report import combination

    if out is None and not dry_run:
        raise UsageError(
            f"{function.__name__}: --out is missing: say where the output goes, or give --dry-run"
        )
    with waiting(what, quiet) as tell_layer:
        place = None if dry_run else out
        given["progress"] = lambda _, __, layer: tell_layer(layer)
        _, record = function(adapters, place, **given)
    return Result(record.to_dict(), combination(record), as_json=as_json, quiet=quiet)

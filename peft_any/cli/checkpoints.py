"""The commands that look into adapters and models: inspect, extract and diff."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

import click

from peft_any.cli.app import Result
from peft_any.cli.commands import Argument, command, flag, option
from peft_any.cli.console import Table, progress
from peft_any.cli.options import (
    ADAPTER,
    BACKEND,
    BASE,
    ENGINE,
    FITTING,
    MAX_SHARD_SIZE,
    NO_STRICT,
    OUT,
    OVERWRITE,
    PATH,
    QUIET,
    engine_at,
    runs,
)
from peft_any.errors import UsageError

PLOT = option("--plot", type=PATH, metavar="FILE.png", help="Draw it.")
OVERWRITE_PLOT = flag("--overwrite", help="Replace an existing picture.")

if TYPE_CHECKING:
    from peft_any.algebra.difference import AdapterDifference
    from peft_any.surgery.comparison import CheckpointDifference
    from peft_any.surgery.extracted import Extraction
    from peft_any.surgery.pictures import Drawable


@command(
    ADAPTER,
    option("--base", type=PATH, help="A model: predict what it would keep of the adapter."),
    flag("--spectra", help="Find the singular values of every ΔW."),
    PLOT,
    OVERWRITE_PLOT,
    *FITTING,
    QUIET,
)
def inspect(
    adapter: str,
    base: str | None,
    plot: str | None,
    *,
    overwrite: bool,
    spectra: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> Result:
    """Tell an adapter's method, layers, ranks and norms."""
    from peft_any import inspect_adapter
    from peft_any.cli.report import report

    given["spectra"] = spectra or plot is not None
    draw = _drawer(plot, overwrite)
    with progress("inspecting", quiet) as step:
        found = inspect_adapter(adapter, base, progress=step, **given)
    draw(found)
    return Result(found.to_dict(), report(found), as_json=as_json, quiet=quiet)


def _drawer(plot: str | None, overwrite: bool) -> Callable[[Drawable], None]:
    """Give what draws; refuse at once what cannot be drawn."""
    if plot is None:
        return lambda _: None
    from peft_any.surgery.pictures import draw, refuse_undrawable

    refuse_undrawable(plot, overwrite=overwrite)

    def drawn(found: Drawable) -> None:
        try:
            draw(found, plot, overwrite=overwrite)
        except UsageError as nothing:  # which the result says, too
            warnings.warn(str(nothing), stacklevel=2)

    return drawn


@command(
    BASE,
    option("--model", type=PATH, required=True, help="The model that was fine-tuned from it."),
    OUT,
    option("--rank", type=click.IntRange(min=1), help="Of all factors; with --energy, the most."),
    option(
        "--energy",
        type=float,
        metavar="SHARE",
        help="Of each layer's ‖Δ‖² that its factors must hold.",
    ),
    option("--dtype", default="float32", help="Of the factors: fp32, bf16 …"),
    flag("--embeddings", help="Factors for embeddings and heads, not copies."),
    OVERWRITE,
    NO_STRICT,
    BACKEND,
    *ENGINE,
    QUIET,
)
def extract(
    base: str,
    model: str,
    out: str | None,
    *,
    engine: str,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> Result:
    """Extract a LoRA from a model and its base, and tell how much of the change it holds."""
    from peft_any import extract as extract_adapter

    with progress("extracting", quiet) as step:
        given |= {"engine": engine_at(engine, scheduler), "progress": step}
        found = extract_adapter(base, model, out, **given)
    return Result(found.to_dict(), extracted(found), as_json=as_json, quiet=quiet)


@command(
    Argument("one", type=PATH, metavar="A", help="An adapter, or a model."),
    Argument("two", type=PATH, metavar="B", help="Another one."),
    option("--base", type=PATH, help="The model of two adapters, where their changes need it."),
    PLOT,
    OVERWRITE_PLOT,
    NO_STRICT,
    BACKEND,
    QUIET,
)
def diff(
    one: str,
    two: str,
    base: str | None,
    plot: str | None,
    *,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> Result:
    """Compare two adapters by what they add to each layer, or two models tensor by tensor."""
    from peft_any import diff as compare

    draw = _drawer(plot, overwrite)
    with progress("comparing", quiet) as step:
        found = compare(one, two, base, progress=step, **given)
    draw(found)
    return Result(found.to_dict(), compared(found), as_json=as_json, quiet=quiet)


@command(
    BASE,
    option(
        "--layers",
        "layer_replication",
        required=True,
        metavar="0:4,2:5",
        help="Runs of layers START:END, END excluded.",
    ),
    option("--out", type=PATH, required=True, help="The output: a directory."),
    option(
        "--stack",
        metavar="NAME",
        help="What the layers are in: model.language_model.layers …",
    ),
    MAX_SHARD_SIZE,
    OVERWRITE,
    QUIET,
)
def replicate(
    base: str, layer_replication: str, out: str, *, as_json: bool, quiet: bool, **given: Any
) -> Result:
    """Repeat a model's layers: the base of an adapter with layer_replication."""
    from peft_any import replicate_checkpoint

    with progress("copying", quiet) as step:
        made = replicate_checkpoint(base, runs(layer_replication), out, progress=step, **given)
    order = " ".join(map(str, made.layers))
    lines = [f"{made.stack}: {len(made.layers)} layers, of the base's {order}"]
    lines += [f"config.json: {k} {old!r} → {new!r}" for k, (old, new) in made.config.items()]
    lines.append(f"{made.out['tensors']} tensors, {made.out['bytes']} bytes → {out}")
    return Result(made.to_dict(), lines, as_json=as_json, quiet=quiet)


def compared(found: AdapterDifference | CheckpointDifference) -> list[str | Table]:
    """Show a comparison: the totals, and every layer; of models, the tensors that differ most."""
    from peft_any.cli.report import ROWS, number, table
    from peft_any.surgery.comparison import CheckpointDifference

    if isinstance(found, CheckpointDifference):
        states = ", ".join(f"{count} {state}" for state, count in found.states.items())
        states = states.replace("differs", "differ")
        rows = [one for one in found.tensors if one.state not in ("identical", "equal")]
        rows.sort(key=lambda one: -(inf if one.relative is None else one.relative))
        made = table("tensor", "state", "dtypes", "‖Δ‖/‖A‖", "largest", "cosine")
        for one in rows[:ROWS]:
            made.add(
                one.tensor,
                one.state,
                " → ".join(dict.fromkeys(d for d in one.dtype if d)),
                number(one.relative, ".2e"),
                number(one.most, ".2e"),
                number(one.cosine),
            )
        more = [f"… and {len(rows) - ROWS} more"] if len(rows) > ROWS else []
        return [states, *([made] if rows else []), *more]
    lines = [f"A {found.a.peft_type} {found.a.label}", f"B {found.b.peft_type} {found.b.label}"]
    lines += [f"{name}: {one!r} → {two!r}" for name, (one, two) in found.config.items()]
    lines.append(f"cosine of the changes {number(found.cosine)}")
    made = table("layer", "‖ΔA‖", "‖ΔB‖", "cosine", "‖ΔA−ΔB‖/‖ΔA‖", "writes alike", "reads alike")
    for layer in found.layers:
        made.add(
            layer.layer,
            *(number(x, ".4g") for x in (layer.norm_a, layer.norm_b)),
            *(number(x) for x in (layer.cosine, layer.distance, *layer.overlap)),
        )
    copies = [f"{name}: ‖A−B‖/‖A‖ {number(off, '.2e')}" for name, off in found.copies.items()]
    return [*lines, *([made] if found.layers else []), *copies]


def extracted(found: Extraction) -> list[str | Table]:
    """Show an extraction: the totals, and the layers that kept least."""
    from peft_any.cli.report import ROWS, number, table

    layers, copies = found.layers, found.copies
    ranks = sorted({layer.rank for layer in layers})
    lines = [f"{len(layers)} layers with factors, {len(copies)} tensors whole, {found.same} equal"]
    if layers:
        lines[0] += f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        lines.append(f"kept {number(found.kept)} of ‖Δ‖², ‖Δ − BA‖/‖Δ‖ {number(found.error)}")
    worst = sorted(layers, key=lambda layer: layer.kept)
    more = [f"… and {len(worst) - ROWS} more, which kept more"] if len(worst) > ROWS else []
    shown: list[str | Table] = [*lines]
    if worst:
        made = table("layer", "rank", "‖Δ‖", "kept", "error", "at best", "found by")
        for layer in worst[:ROWS]:
            best = layer.least / layer.delta_norm if layer.delta_norm else 0.0
            made.add(
                layer.module,
                str(layer.rank),
                number(layer.delta_norm, ".4g"),
                number(layer.kept),
                number(layer.error),
                number(best),
                layer.way,
            )
        shown.append(made)
    place = f"→ {found.out['path']}" if found.out else "nothing was written: give --out"
    return [*shown, *more, place]

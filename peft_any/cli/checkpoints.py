"""The commands that look into adapters and models: inspect, extract and diff."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from peft_any.cli.app import Result, app
from peft_any.cli.console import progress
from peft_any.cli.options import (
    AsJson,
    Backend,
    Base,
    Debug,
    Engine,
    Map,
    MaxShardSize,
    NoStrict,
    Out,
    Overwrite,
    Quiet,
    Rederive,
    RunsOfLayers,
    Scheduler,
    Stack,
    engine_at,
    fitting,
    runs,
)

Plot = Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw it.")]

if TYPE_CHECKING:
    from peft_any.algebra.difference import AdapterDifference
    from peft_any.surgery.comparison import CheckpointDifference
    from peft_any.surgery.extracted import Extraction
    from peft_any.surgery.pictures import Drawable


@app.command()
def inspect(
    *,
    adapter: Annotated[str, typer.Argument(help="An adapter's directory or tensor file.")],
    base: Annotated[
        str | None, typer.Option(help="A model: predict what it would keep of the adapter.")
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Find the singular values of every ΔW.")
    ] = False,
    plot: Plot = None,
    no_strict: NoStrict = False,
    rederive: Rederive = False,
    names: Map = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Tell an adapter's method, layers, ranks and norms."""
    from peft_any import inspect_adapter
    from peft_any.cli.report import report

    with progress("inspecting", quiet) as step:
        found = inspect_adapter(
            adapter,
            base,
            spectra=spectra or plot is not None,
            progress=step,
            **fitting(no_strict, rederive, names, backend),
        )
    _draw(found, plot)
    return Result(found.to_dict(), report(found), as_json=as_json, quiet=quiet)


def _draw(found: Drawable, plot: str | None) -> None:
    from peft_any.surgery.pictures import draw

    if plot is not None:
        draw(found, plot)


@app.command()
def extract(
    *,
    base: Base,
    model: Annotated[str, typer.Option(help="The model that was fine-tuned from it.")],
    out: Out = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of all factors; with --energy, the most.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of each layer's ‖Δ‖² that its factors must hold."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the factors: fp32, bf16 …")] = "float32",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Factors for embeddings and heads, not copies.")
    ] = False,
    overwrite: Overwrite = False,
    no_strict: NoStrict = False,
    backend: Backend = "auto",
    engine: Engine = "local",
    scheduler: Scheduler = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Extract a LoRA from a model and its base, and tell how much of the change it holds."""
    from peft_any import extract as extract_adapter

    with progress("extracting", quiet) as step:
        found = extract_adapter(
            base,
            model,
            out,
            rank=rank,
            energy=energy,
            dtype=dtype,
            embeddings=embeddings,
            overwrite=overwrite,
            strict=not no_strict,
            backend=backend,
            engine=engine_at(engine, scheduler),
            progress=step,
        )
    return Result(found.to_dict(), extracted(found), as_json=as_json, quiet=quiet)


@app.command()
def diff(
    *,
    one: Annotated[str, typer.Argument(metavar="A", help="An adapter, or a model.")],
    two: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    base: Annotated[
        str | None, typer.Option(help="The model of two adapters, where their changes need it.")
    ] = None,
    plot: Plot = None,
    no_strict: NoStrict = False,
    backend: Backend = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Compare two adapters by what they add to each layer, or two models tensor by tensor."""
    from peft_any import diff as compare

    with progress("comparing", quiet) as step:
        found = compare(one, two, base, strict=not no_strict, backend=backend, progress=step)
    _draw(found, plot)
    return Result(found.to_dict(), compared(found), as_json=as_json, quiet=quiet)


@app.command()
def replicate(
    *,
    base: Base,
    layers: RunsOfLayers,
    out: Annotated[str, typer.Option(help="The output: a directory.")],
    stack: Stack = None,
    max_shard_size: MaxShardSize = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Repeat a model's layers: the base of an adapter with layer_replication."""
    from peft_any import replicate_checkpoint

    with progress("copying", quiet) as step:
        made = replicate_checkpoint(
            base,
            runs(layers),
            out,
            stack=stack,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=step,
        )
    order = " ".join(map(str, made.layers))
    lines = [f"{made.stack}: {len(made.layers)} layers, of the base's {order}"]
    lines += [f"config.json: {k} {old!r} → {new!r}" for k, (old, new) in made.config.items()]
    lines.append(f"{made.out['tensors']} tensors, {made.out['bytes']} bytes → {out}")
    return Result(made.to_dict(), [*map(Text, lines)], as_json=as_json, quiet=quiet)


def compared(found: AdapterDifference | CheckpointDifference) -> list[RenderableType]:
    """Show a comparison: the totals, and every layer; of models, the tensors that differ most."""
    from peft_any.cli.report import ROWS, number, table
    from peft_any.surgery.comparison import CheckpointDifference

    if isinstance(found, CheckpointDifference):
        states = ", ".join(f"{count} {state}" for state, count in found.states.items())
        rows = [one for one in found.tensors if one.state not in ("identical", "equal")]
        rows.sort(key=lambda one: -(inf if one.relative is None else one.relative))
        made = table("tensor", "state", "dtypes", "‖Δ‖/‖A‖", "largest", "cosine")
        for one in rows[:ROWS]:
            made.add_row(
                Text(one.tensor),
                one.state,
                " → ".join(dict.fromkeys(d for d in one.dtype if d)),
                number(one.relative, ".2e"),
                number(one.most, ".2e"),
                number(one.cosine),
            )
        more = [Text(f"… and {len(rows) - ROWS} more")] if len(rows) > ROWS else []
        return [Text(states), *([made] if rows else []), *more]
    lines = [f"A {found.a.peft_type} {found.a.label}", f"B {found.b.peft_type} {found.b.label}"]
    lines += [f"{name}: {one!r} → {two!r}" for name, (one, two) in found.config.items()]
    lines.append(f"cosine of the changes {number(found.cosine)}")
    made = table("layer", "‖ΔA‖", "‖ΔB‖", "cosine", "‖ΔA−ΔB‖/‖ΔA‖", "writes alike", "reads alike")
    for layer in found.layers:
        made.add_row(
            Text(layer.layer),
            *(number(x, ".4g") for x in (layer.norm_a, layer.norm_b)),
            *(number(x) for x in (layer.cosine, layer.distance, *layer.overlap)),
        )
    copies = [f"{name}: ‖A−B‖/‖A‖ {number(off, '.2e')}" for name, off in found.copies.items()]
    return [*map(Text, lines), *([made] if found.layers else []), *map(Text, copies)]


def extracted(found: Extraction) -> list[RenderableType]:
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
    shown: list[RenderableType] = [*map(Text, lines)]
    if worst:
        made = table("layer", "rank", "‖Δ‖", "kept", "error", "at best", "found by")
        for layer in worst[:ROWS]:
            best = layer.least / layer.delta_norm if layer.delta_norm else 0.0
            made.add_row(
                Text(layer.module),
                str(layer.rank),
                number(layer.delta_norm, ".4g"),
                number(layer.kept),
                number(layer.error),
                number(best),
                layer.way,
            )
        shown.append(made)
    place = f"→ {found.out['path']}" if found.out else "nothing was written: give --out"
    return [*shown, *map(Text, [*more, place])]

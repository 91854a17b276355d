"""The commands that make adapters of adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peft_any.cli.app import Result, app
from peft_any.cli.console import waiting
from peft_any.cli.options import (
    AnyBase,
    AsJson,
    Backend,
    Debug,
    Engine,
    Out,
    Overwrite,
    Quiet,
    Rederive,
    Scheduler,
    engine_at,
    weighted,
)
from peft_any.errors import UsageError

Rank = Annotated[int | None, typer.Option(help="The rank: of every layer's result, at most.")]
Energy = Annotated[
    float | None, typer.Option(help="Keep this share of every ‖ΔW‖², with the least rank.")
]
NeededBase = Annotated[
    str | None, typer.Option(help="The model, where effects or sizes depend on it.")
]
Dtype = Annotated[str | None, typer.Option(help="Store the factors as fp32, fp16, bf16 ….")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")]


@app.command()
def combine(
    *,
    adapter: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:WEIGHT]", help="Adapters, with weights.")
    ],
    out: Out = None,
    method: Annotated[
        str, typer.Option(help="exact, or a combination type of Hugging Face PEFT: ties_svd …")
    ] = "exact",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[
        float | None, typer.Option(help="The share of the entries that pruning keeps.")
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option(help="How ties elects signs: total or frequency.")
    ] = "total",
    svd_clamp: Annotated[
        float | None, typer.Option(help="Clamp the factors at this quantile (…svd).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what dare draws.")] = 0,
    base: NeededBase = None,
    rederive: Rederive = False,
    any_base: AnyBase = False,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    backend: Backend = "auto",
    engine: Engine = "local",
    scheduler: Scheduler = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Make one adapter of several: by default their exact weighted sum."""
    from peft_any import combine as combined

    sign: Any = majority_sign_method
    with waiting("combining", quiet) as tell_layer:
        _, record = combined(
            weighted(adapter),
            _place("combine", out, dry_run),
            method=method,
            rank=rank,
            energy=energy,
            density=density,
            majority_sign_method=sign,
            svd_clamp=svd_clamp,
            seed=seed,
            base=base,
            rederive=rederive,
            any_base=any_base,
            dtype=dtype,
            overwrite=overwrite,
            backend=backend,
            engine=engine_at(engine, scheduler),
            progress=lambda _, __, layer: tell_layer(layer),
        )
    return _result(record, as_json, quiet)


@app.command()
def convert(
    *,
    adapter: Annotated[str, typer.Argument(help="An adapter's directory or tensor file.")],
    out: Out = None,
    to: Annotated[str, typer.Option(help="The method of the result.")] = "LORA",
    rank: Rank = None,
    energy: Energy = None,
    base: NeededBase = None,
    rederive: Rederive = False,
    any_base: AnyBase = False,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    backend: Backend = "auto",
    engine: Engine = "local",
    scheduler: Scheduler = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Make an adapter of any method a plain LoRA: exact, or the best of a rank."""
    from peft_any import convert as converted

    with waiting("converting", quiet) as tell_layer:
        _, record = converted(
            adapter,
            _place("convert", out, dry_run),
            to=to,
            rank=rank,
            energy=energy,
            base=base,
            rederive=rederive,
            any_base=any_base,
            dtype=dtype,
            overwrite=overwrite,
            backend=backend,
            engine=engine_at(engine, scheduler),
            progress=lambda _, __, layer: tell_layer(layer),
        )
    return _result(record, as_json, quiet)


@app.command()
def resize(
    *,
    adapter: Annotated[str, typer.Argument(help="An adapter's directory or tensor file.")],
    out: Out = None,
    rank: Annotated[
        int | None,
        typer.Option(help="The rank of every layer, up or down; beside a selector, at most."),
    ] = None,
    energy: Energy = None,
    sv_ratio: Annotated[
        float | None, typer.Option(help="Keep singular values above the largest divided by this.")
    ] = None,
    sv_fro: Annotated[float | None, typer.Option(help="Keep this share of every ‖ΔW‖.")] = None,
    sv_cumulative: Annotated[
        float | None, typer.Option(help="Keep this share of the sum of the singular values.")
    ] = None,
    base: NeededBase = None,
    rederive: Rederive = False,
    any_base: AnyBase = False,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    backend: Backend = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Give an adapter another rank: cut to the best approximation, or padded with zeros."""
    from peft_any import resize as resized

    with waiting("resizing", quiet) as tell_layer:
        _, record = resized(
            adapter,
            _place("resize", out, dry_run),
            rank=rank,
            energy=energy,
            sv_ratio=sv_ratio,
            sv_fro=sv_fro,
            sv_cumulative=sv_cumulative,
            base=base,
            rederive=rederive,
            any_base=any_base,
            dtype=dtype,
            overwrite=overwrite,
            backend=backend,
            progress=lambda _, __, layer: tell_layer(layer),
        )
    return _result(record, as_json, quiet)


def _place(command: str, out: str | None, dry_run: bool) -> str | None:
    if out is None and not dry_run:
        raise UsageError(
            f"{command}: --out is missing: say where the output goes, or give --dry-run"
        )
    return None if dry_run else out


def _result(record: Any, as_json: bool, quiet: bool) -> Result:
    from peft_any.cli.report import combination

    return Result(record.to_dict(), combination(record), as_json=as_json, quiet=quiet)

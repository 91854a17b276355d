"""The command line: a thin face over the functions, and what all commands have in common."""

from __future__ import annotations

import gc
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
from rich.console import RenderableType
from rich.text import Text

from peft_any.cli.console import prepare_streams, progress, say, signals, silence, tell, waiting
from peft_any.cli.options import (
    Adapters,
    AnyBase,
    AsJson,
    Backend,
    Base,
    Debug,
    Engine,
    FullHash,
    Map,
    MaxShardSize,
    MinKept,
    NoStrict,
    Quiet,
    Rederive,
    Resume,
    Scheduler,
    Threads,
    engine_at,
    fitting,
    weighted,
)
from peft_any.errors import PeftError, UsageError, VerifyError
from peft_any.receipt import SCHEMA_VERSION

INTERNAL, STORAGE, PIPE = 1, 5, 128 + 13
"""Exit codes that no `PeftError` has; the last is what a shell gives for SIGPIPE."""
_COLLECTED = 50_000
"""Objects between two collections."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True)
class Result:
    """What a command found: a document for `--json`, and what people read of it."""

    document: dict[str, Any]
    shown: Sequence[RenderableType]
    as_json: bool
    quiet: bool = False
    error: PeftError | None = None


@app.callback(invoke_without_command=True)
def about(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Merge, verify, inspect, combine, resize, extract and compare fine-tuning adapters."""
    if version:
        from peft_any import __version__

        typer.echo(f"peft-any {__version__}")
        raise typer.Exit


@app.command()
def merge(
    *,
    base: Base,
    adapter: Adapters,
    out: Annotated[
        str | None, typer.Option(help="The output: a directory, or a .safetensors file.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store what changes as fp32, fp16, bf16 …, not as the base.")
    ] = None,
    max_shard_size: MaxShardSize = None,
    min_kept: Annotated[float | None, MinKept] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    any_base: AnyBase = False,
    resume: Resume = False,
    full_hash: FullHash = False,
    no_strict: NoStrict = False,
    rederive: Rederive = False,
    names: Map = None,
    backend: Backend = "auto",
    engine: Engine = "local",
    scheduler: Scheduler = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Merge adapters into a model, and tell how much of them survived."""
    from peft_any import merge_checkpoint
    from peft_any.cli.report import summary

    if out is None and not dry_run:
        raise UsageError("merge: --out is missing: say where the output goes, or give --dry-run")
    with progress("merging", quiet) as step:
        receipt = merge_checkpoint(
            base,
            weighted(adapter),
            out,
            dtype=dtype,
            min_kept=min_kept,
            dry_run=dry_run,
            overwrite=overwrite,
            progress=step,
            any_base=any_base,
            resume=resume,
            full_hash=full_hash,
            engine=engine_at(engine, scheduler),
            threads=threads,
            max_shard_size=max_shard_size,
            **fitting(no_strict, rederive, names, backend),
        )
    return Result(receipt.to_dict(), summary(receipt), as_json=as_json, quiet=quiet)


@app.command()
def verify(
    *,
    base: Base,
    adapter: Adapters,
    merged: Annotated[str, typer.Option(help="The merged model, whoever made it.")],
    min_kept: Annotated[float, MinKept] = 0.9,
    no_strict: NoStrict = False,
    rederive: Rederive = False,
    names: Map = None,
    backend: Backend = "auto",
    engine: Engine = "local",
    scheduler: Scheduler = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Audit a merged model against its base and its adapters."""
    from peft_any import verify_checkpoint
    from peft_any.cli.report import summary

    with progress("verifying", quiet) as step:
        receipt = verify_checkpoint(
            base,
            weighted(adapter),
            merged,
            min_kept=min_kept,
            check=False,
            progress=step,
            engine=engine_at(engine, scheduler),
            **fitting(no_strict, rederive, names, backend),
        )
    error = None
    try:
        receipt.check()
    except VerifyError as found:
        error = found
    shown = summary(receipt)
    return Result(receipt.to_dict(), shown, as_json=as_json, quiet=quiet, error=error)


@app.command()
def methods(
    *,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """List the methods."""
    from peft_any.cli.report import described, listing, remarks
    from peft_any.registry import method_names, registered_methods

    others, problems = registered_methods()
    rows = [described(name) for name in method_names()]
    rows += [{**described(name), "distribution": owner} for name, owner in others.items()]
    document = {"schema_version": SCHEMA_VERSION, "methods": rows, "problems": problems}
    return Result(document, [listing(rows), *remarks(others, problems)], as_json=as_json)


@app.command()
def demo(
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(help="head, bias, lora, dora, oft or full; again for more. All by default."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 800,
    seed: Annotated[int, typer.Option(min=0, help="Of data, initial values and batches.")] = 0,
    out: Annotated[
        str | None, typer.Option(help="Keep the trained adapters, and a figure, in this directory.")
    ] = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - `run` looks for it
) -> Result:
    """Fine-tune a published network by several methods; merge as Hugging Face PEFT does."""
    from peft_any.cli.report import scores, summary
    from peft_any.demo.run import run as run_demo
    from peft_any.demo.run import train as train_demo

    with waiting("training", quiet) as tell_method:
        options: Any = {"methods": method, "steps": steps, "seed": seed, "out": out}
        document = train_demo(backend, **options, tell=tell_method)
    table = scores(document["rows"], document["curves"])
    shown: list[RenderableType] = [Text(document["data"]), Text(), *table]
    shown += [Text(line) for line in [*document["said"], ""]]
    receipt = run_demo(lambda line: shown.append(Text(line)), backend)
    document["receipt"] = receipt.to_dict()
    shown += [Text(), *summary(receipt, "a temporary directory")]
    return Result(document, shown, as_json=as_json, quiet=quiet)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code.

    Parameters
    ----------
    args : sequence of str, optional
        In place of the process's own.
    """
    try:
        return _run([*(sys.argv[1:] if args is None else args)])
    except KeyboardInterrupt as error:  # just before a command began, or after it had ended
        return 128 + (error.args[0] if error.args else signal.SIGINT)


def _run(given: list[str]) -> int:
    as_json, quiet = "--json" in given, bool({"-q", "--quiet"} & {*given})
    resume = "--resume" in given

    def note(message: Any, *_: Any, **__: Any) -> None:
        if not quiet:
            tell("warning", " ".join(str(message).split("\n")), "yellow")

    with signals() as caught, warnings.catch_warnings():
        warnings.showwarning = note
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # results are looked at for overflow
        prepare_streams()
        try:
            command = typer.main.get_command(app)
            found = command(given or ["--help"], prog_name="peft-any", standalone_mode=False)
            code = found or 0
            if isinstance(found, Result):
                for text in [*found.document.get("warnings", ()), *found.document.get("notes", ())]:
                    note(text)
                code = show(found)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - all of them end in an exit code
            if "--debug" in given:
                traceback.print_exc()
            return failed(error, caught, as_json, resume)
        if caught:  # typer takes an interrupt for a command's regular end
            return failed(KeyboardInterrupt(), caught, as_json, resume)
    return code if given else UsageError.exit_code


def show(result: Result) -> int:
    """Print a result, and what speaks against it; give the exit code."""
    error = result.error
    if result.as_json:
        document = result.document
        if error is not None:
            document |= {"error": record(error, str(error), error.exit_code)}
        print(json.dumps(document, indent=2, allow_nan=False))
    elif not result.quiet:
        say(*result.shown)
    if error is None:
        return 0
    sys.stdout.flush()
    tell("error", str(error))
    return error.exit_code


def failed(error: BaseException, caught: Sequence[int], as_json: bool, resume: bool) -> int:
    """Say what went wrong, and give the exit code."""
    message = str(error)
    if caught:
        left = "the same command continues" if resume else "no partial output is left behind"
        code, message = 128 + caught[0], f"interrupted: {left}"
    elif isinstance(error, PeftError):
        code = error.exit_code
    elif hasattr(error, "format_message"):  # typer's own
        command = getattr(getattr(error, "ctx", None), "command_path", "peft-any")
        code, message = UsageError.exit_code, f"{error.format_message()} (see {command} --help)"
    elif isinstance(error, BrokenPipeError | SystemExit):
        silence()
        return PIPE
    elif isinstance(error, OSError):
        code, message = STORAGE, f"{error.filename or 'input or output'}: {error.strerror or error}"
        silence()
    elif isinstance(error, MemoryError):
        code, message = INTERNAL, f"not enough memory{message and ': '}{message}"
    else:
        code = INTERNAL
        message = f"internal error: {type(error).__name__}: {message} (--debug shows where)"
    tell("error", message)
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "error": record(error, message, code)}
        with suppress(OSError):
            print(json.dumps(document, indent=2), flush=True)
    return code


def record(error: BaseException, message: str, code: int) -> dict[str, Any]:
    """Describe an error for `--json`; what typer finds wrong is a `UsageError`."""
    kind = UsageError if code == UsageError.exit_code else type(error)
    return {"type": kind.__name__, "message": message, "exit_code": code}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    gc.freeze()
    gc.set_threshold(_COLLECTED)  # a command's imports alone make more than the usual hundreds
    sys.exit(run(args))

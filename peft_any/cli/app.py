"""The command line: a thin face over the functions, and what all commands have in common."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from peft_any import __version__
from peft_any.cli.commands import HELP, Commands, command, flag, option
from peft_any.cli.console import (
    Table,
    gathered,
    prepare_streams,
    progress,
    say,
    signals,
    silence,
    tell,
    waiting,
)
from peft_any.cli.options import (
    ADAPTERS,
    ANY_BASE,
    BACKEND,
    BASE,
    DRY_RUN,
    ENGINE,
    FITTING,
    MAX_SHARD_SIZE,
    OVERWRITE,
    PATH,
    QUIET,
    engine_at,
    in_options,
    min_kept,
    weighted,
)
from peft_any.errors import PeftError, UsageError, VerifyError

INTERNAL, STORAGE, PIPE = 1, 5, 128 + 13
"""Exit codes that no `PeftError` has; the last is what a shell gives for SIGPIPE."""
_COLLECTED = 50_000
"""Objects between two collections."""


@dataclass(frozen=True)
class Result:
    """What a command found: a document for `--json`, and what people read of it."""

    document: dict[str, Any]
    shown: Sequence[str | Table]
    as_json: bool
    quiet: bool = False
    error: PeftError | None = None


@command(
    BASE,
    ADAPTERS,
    option("--out", type=PATH, help="The output: a directory, or a .safetensors file."),
    option("--dtype", help="Store what changes as fp32, fp16, bf16 …, not as the base."),
    MAX_SHARD_SIZE,
    min_kept(),
    DRY_RUN,
    OVERWRITE,
    ANY_BASE,
    flag("--resume", help="Continue what a killed run of the same merge left."),
    flag("--full-hash", help="Put digests of all bytes into the receipt too."),
    *FITTING,
    *ENGINE,
    option(
        "--threads",
        type=click.IntRange(min=1),
        help="Threads that compute; by default one a processor.",
    ),
    QUIET,
)
def merge(
    base: str,
    adapter: Sequence[str],
    out: str | None,
    *,
    engine: str,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> Result:
    """Merge adapters into a model, and tell how much of them survived."""
    from peft_any import merge_checkpoint
    from peft_any.cli.report import summary

    if out is None and not given["dry_run"]:
        raise UsageError("merge: --out is missing: say where the output goes, or give --dry-run")
    with progress("merging", quiet) as step:
        given |= {"engine": engine_at(engine, scheduler), "progress": step}
        receipt = merge_checkpoint(base, weighted(adapter), out, **given)
    return Result(receipt.to_dict(), summary(receipt), as_json=as_json, quiet=quiet)


@command(
    BASE,
    ADAPTERS,
    option("--merged", type=PATH, required=True, help="The merged model, whoever made it."),
    min_kept(0.9),
    *FITTING,
    *ENGINE,
    QUIET,
)
def verify(
    base: str,
    adapter: Sequence[str],
    merged: str,
    *,
    engine: str,
    scheduler: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> Result:
    """Audit a merged model against its base and its adapters."""
    from peft_any import verify_checkpoint
    from peft_any.cli.report import summary

    with progress("verifying", quiet) as step:
        given |= {"engine": engine_at(engine, scheduler), "progress": step}
        receipt = verify_checkpoint(base, weighted(adapter), merged, check=False, **given)
    error = None
    try:
        receipt.check()
    except VerifyError as found:
        error = found
    shown = summary(receipt)
    return Result(receipt.to_dict(), shown, as_json=as_json, quiet=quiet, error=error)


@command()
def methods(*, as_json: bool) -> Result:
    """List the methods."""
    from peft_any.cli.report import described, listing, remarks
    from peft_any.receipt import SCHEMA_VERSION
    from peft_any.registry import method_names, registered_methods

    others, problems = registered_methods()
    rows = [described(name) for name in method_names()]
    rows += [{**described(name), "distribution": owner} for name, owner in others.items()]
    document = {"schema_version": SCHEMA_VERSION, "methods": rows, "problems": problems}
    return Result(document, [listing(rows), *remarks(others, problems)], as_json=as_json)


@command(
    option(
        "--method",
        "methods",
        multiple=True,
        help="head, bias, lora, dora, oft or full; again for more. All by default.",
    ),
    option(
        "--steps",
        type=click.IntRange(min=1),
        default=800,
        help="Training steps of each method.",
    ),
    option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        help="Of data, initial values and batches.",
    ),
    option("--out", type=PATH, help="Keep the trained adapters, and a figure, in this directory."),
    BACKEND,
    QUIET,
)
def demo(
    methods: Sequence[str], *, backend: str, as_json: bool, quiet: bool, **given: Any
) -> Result:
    """Fine-tune a published network by several methods; merge as Hugging Face PEFT does."""
    from peft_any.cli.report import scores, summary
    from peft_any.demo.run import run as run_demo
    from peft_any.demo.run import train as train_demo

    with waiting("training", quiet) as tell_method:
        document = train_demo(backend, methods=[*methods] or None, **given, tell=tell_method)
    shown = [document["data"], "", *scores(document["rows"], document["curves"])]
    shown += [*document["said"], ""]
    receipt = run_demo(shown.append, backend)
    document["receipt"] = receipt.to_dict()
    shown += ["", *summary(receipt, "a temporary directory")]
    return Result(document, shown, as_json=as_json, quiet=quiet)


@click.group("peft-any", cls=Commands, context_settings=HELP)
@click.version_option(__version__, message="peft-any %(version)s", help="Print the version.")
def app() -> None:
    """Merge, verify, inspect, combine, resize, extract and compare fine-tuning adapters."""


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
    quiet = bool({"-q", "--quiet"} & {*given})

    def note(message: Any, *_: Any, **__: Any) -> None:
        if not quiet:
            tell("warning", spoken(" ".join(str(message).split("\n")), given), "yellow")

    with signals() as caught, warnings.catch_warnings():
        warnings.showwarning = note
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # results are looked at for overflow
        prepare_streams()
        try:
            found = called(given or ["--help"])
            if caught:  # something took an interrupt for an error of its own
                raise KeyboardInterrupt
            code = 0
            if found is not None:
                told = (
                    text for key in ("warnings", "notes") for text in found.document.get(key, ())
                )
                for text in gathered(told):
                    note(text)
                code = show(found)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - all of them end in an exit code
            if "--debug" in given:
                import traceback

                traceback.print_exc()
            return failed(error, caught, given)
    return code if given else UsageError.exit_code


def called(args: list[str]) -> Result | None:
    """Call the command that is asked for; none where what was asked is printed already."""
    try:
        with app.make_context("peft-any", [*args]) as context:
            found: Result = app.invoke(context)
    except click.exceptions.Exit:  # after help and version
        return None
    return found


def show(result: Result) -> int:
    """Print a result, and what speaks against it; give the exit code."""
    error = result.error
    if result.as_json:
        document = result.document
        if error is not None:
            document |= {"failure": record(error, str(error), error.exit_code)}
        print(json.dumps(document, indent=2, allow_nan=False))
    elif not result.quiet:
        say(*result.shown)
    if error is None:
        return 0
    sys.stdout.flush()
    tell("error", str(error))
    return error.exit_code


def spoken(message: str, given: Sequence[str]) -> str:
    """Put what the library says into the words of the command that was given."""
    names = app.list_commands(click.Context(app))
    name = next((word for word in given if word in names), "")
    command = app.get_command(click.Context(app), name)
    return in_options(message, command.params if command else ())


def failed(error: BaseException, caught: Sequence[int], given: Sequence[str]) -> int:
    """Say what went wrong, and give the exit code."""
    message = spoken(str(error), given)
    if caught:
        resumes = "--resume" in given
        left = "the same command continues" if resumes else "no partial output is left behind"
        code, message = 128 + caught[0], f"interrupted: {left}"
    elif isinstance(error, PeftError):
        code = error.exit_code
    elif isinstance(error, click.ClickException):
        command = getattr(getattr(error, "ctx", None), "command_path", "peft-any")
        code, message = UsageError.exit_code, f"{error.format_message()} (see {command} --help)"
    elif isinstance(error, BrokenPipeError):
        silence()
        return PIPE
    elif isinstance(error, OSError):
        from peft_any.io._faults import storage_error

        place = str(error.filename or "standard output")
        code, message = STORAGE, str(storage_error(place, "be used", error))
        silence()
    elif isinstance(error, MemoryError):
        code, message = INTERNAL, f"not enough memory{message and ': '}{message}"
    else:
        code = INTERNAL
        message = f"internal error: {type(error).__name__}: {message} (--debug shows where)"
    tell("error", message)
    if "--json" in given:
        from peft_any.receipt import SCHEMA_VERSION

        document = {"schema_version": SCHEMA_VERSION, "failure": record(error, message, code)}
        with suppress(OSError):
            print(json.dumps(document, indent=2), flush=True)
    return code


def record(error: BaseException, message: str, code: int) -> dict[str, Any]:
    """Describe an error for `--json`; what Click finds wrong is a `UsageError`."""
    kind = UsageError if code == UsageError.exit_code else type(error)
    return {"type": kind.__name__, "message": message, "exit_code": code}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    if "_PEFT_ANY_COMPLETE" in os.environ:
        app.main(args, "peft-any")  # answers the shell that set it, and leaves
    gc.freeze()
    gc.set_threshold(_COLLECTED)  # a command's imports alone make more than the usual hundreds
    code = run(args)
    gc.freeze()  # or else Python looks for cycles as it leaves, which takes longer than leaving
    sys.exit(code)

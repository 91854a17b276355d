"""The command line: a thin face over `merge_checkpoint`, `verify_checkpoint`, `inspect_adapter`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from peft_any.errors import PeftError, UsageError, VerifyError, nearest

SCHEMA_VERSION = 1
ROWS = 12
"""Tensors that a summary shows; the receipt has all."""
DTYPES = {
    "float": "float32", "single": "float32", "fp32": "float32", "f32": "float32",
    "half": "float16", "fp16": "float16", "f16": "float16",
    "bf16": "bfloat16", "double": "float64", "fp64": "float64", "f64": "float64",
    "fp8": "float8_e4m3fn",
} | {n: n for n in ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")}  # fmt: skip

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
    as_json: bool = False
    quiet: bool = False
    error: PeftError | None = None


Base = Annotated[
    str, typer.Option(help="A safetensors file, or a directory with a model, sharded or not.")
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="ADAPTER[:WEIGHT]",
        help="An adapter; given several times, the weighted sum of their effects.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, warnings or summary; errors only.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
NoStrict = Annotated[
    bool, typer.Option("--no-strict", help="Let pass, and record, what has no place in the base.")
]
Rederive = Annotated[
    bool,
    typer.Option("--rederive", help="Redo the decomposition that an unconverted file assumes."),
]
MinKept = typer.Option(
    min=0.0, max=1.0, metavar="SHARE", help="Fail if any tensor keeps less of its change."
)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Merge, verify and inspect fine-tuning adapters, without torch.

    [bold]Exit codes[/bold]: 0 done, 1 internal error, 2 usage, 3 inputs that do not fit, 4 verification failed,
    5 reading or writing failed, 130 interrupted.
    """  # noqa: E501 - typer takes a line break for a paragraph
    if version:
        from peft_any import __version__

        typer.echo(f"peft-any {__version__}")
        raise typer.Exit


@app.command()
def merge(
    base: Base,
    adapter: Adapters,
    out: Annotated[str, typer.Option(help="Where the merged model goes.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the changed tensors: fp32, fp16, bf16 …; else their own.")
    ] = None,
    min_kept: Annotated[float | None, MinKept] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but write.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    no_strict: NoStrict = False,
    rederive: Rederive = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by `run`
) -> Result:
    """Merge adapters into a model, and give a receipt of how much of them survived."""
    from peft_any import merge_checkpoint

    with progress("merging", quiet) as step:
        receipt = merge_checkpoint(
            base,
            weighted(adapter),
            out,
            dtype=dtype_of(dtype),
            min_kept=min_kept,
            dry_run=dry_run,
            overwrite=overwrite,
            strict=not no_strict,
            rederive=rederive,
            progress=step,
        )
    return Result(receipt.to_dict(), summary(receipt), as_json, quiet)


@app.command()
def verify(
    base: Base,
    adapter: Adapters,
    merged: Annotated[str, typer.Option(help="The merged model to audit, whoever made it.")],
    min_kept: Annotated[float, MinKept] = 0.9,
    no_strict: NoStrict = False,
    rederive: Rederive = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by `run`
) -> Result:
    """Audit a merged model against its base and its adapters."""
    from peft_any import verify_checkpoint

    with progress("verifying", quiet) as step:
        try:
            receipt = verify_checkpoint(
                base,
                weighted(adapter),
                merged,
                min_kept=min_kept,
                strict=not no_strict,
                rederive=rederive,
                progress=step,
            )
        except VerifyError as error:
            found = getattr(error, "receipt", None)
            if found is None:
                raise
            return Result(found.to_dict(), summary(found), as_json, quiet, error)
    return Result(receipt.to_dict(), summary(receipt), as_json, quiet)


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter directory or its tensor file.")],
    base: Annotated[
        str | None, typer.Option(help="A model, to predict what a merge would keep.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `run`
) -> Result:
    """Tell an adapter's method, layers, ranks and norms, and what it would do to a base."""
    from peft_any import inspect_adapter

    found = inspect_adapter(adapter, base)
    return Result(found.to_dict(), report(found), as_json)


@app.command()
def methods(
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001 - read by `run`
) -> Result:
    """List the methods."""
    from peft_any.registry import method_names

    rows = [method_row(name) for name in method_names()]
    table = plain_table("method", "what it computes", "layers", "kind", "undone", "needs")
    for row in rows:
        cells = [row["peft_type"], row["equation"], row["layers"], row["kind"]]
        cells += ["yes" if row["reversible"] else "no", row["extensions"]]
        table.add_row(*(Text(", ".join(c) if isinstance(c, list) else c) for c in cells))
    return Result({"schema_version": SCHEMA_VERSION, "methods": rows}, [table], as_json)


@app.command()
def demo(
    backend: Annotated[
        str, typer.Option(help="numpy, torch, jax, cupy, dask, strict, with a device after a colon")
    ] = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by `run`
) -> Result:
    """Merge a real adapter into a real network, and compare with Hugging Face PEFT's result."""
    from peft_any.demo import run

    lines: list[RenderableType] = []
    receipt = run(lambda line: lines.append(Text(line)), backend)
    return Result(receipt.to_dict(), [*lines, *summary(receipt)], as_json, quiet)


def weighted(adapters: Sequence[str]) -> list[tuple[str, float]]:
    """Split ``ADAPTER:WEIGHT``, where the whole is no path and what follows the colon is a number.

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
            path = ""
        if not path or os.path.lexists(text):
            pairs.append((text, 1.0))
            continue
        if not isfinite(weight):
            raise UsageError(f"{text}: {tail} cannot be a weight: give a finite number")
        pairs.append((path, weight))
    return pairs


def dtype_of(name: str | None) -> str | None:
    """Find the dtype that a name stands for: Hugging Face's and others' short forms are known."""
    if name is None:
        return None
    found = DTYPES.get(name.lower().removeprefix("torch."))
    if found is None:
        raise UsageError(
            f"--dtype {name}: cannot store weights{nearest(name.lower(), DTYPES)}: "
            f"give one of {', '.join(sorted({*DTYPES.values()}))}, fp32, fp16, bf16"
        )
    return found


def method_row(peft_type: str) -> dict[str, Any]:
    """Describe a method, as its class declares itself."""
    from peft_any.method import Additive, Tuner
    from peft_any.registry import method_for

    cls = method_for(peft_type)
    layers = sorted(cls.kinds) if issubclass(cls, Tuner) else []
    needs = cls.needs if isinstance(cls.needs, tuple) else ("linalg",)
    return {
        "peft_type": peft_type,
        "config": cls.__name__,
        "source": " ".join((sys.modules[cls.__module__].__doc__ or "").split()),
        "equation": (cls.__doc__ or "").partition("\n")[0],
        "layers": layers,
        "kind": "adds to W" if issubclass(cls, Additive) else "maps W" if layers else "tokens",
        "reversible": issubclass(cls, Tuner) and cls.unmerge is not Tuner.unmerge,
        "extensions": list(needs),
    }


def plain_table(*head: str) -> Table:
    """Start a table without a frame, whose numbers stand to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    return table


NUMBERS = {"‖Δ‖/‖W‖", "kept", "error", "unmoved", "weight", "norm"}


def number(value: float | None, form: str = ".4f") -> str:
    """Write a number, or a dash where there is none."""
    return "–" if value is None or not isfinite(value) else format(value, form)


def summary(receipt: Any) -> list[RenderableType]:
    """Show what a receipt says: the adapters, the totals, and the tensors that kept least."""
    lines = [
        f"{source.peft_type} {source.label}"
        + (f" × {source.weight:g}" if source.weight != 1 else "")
        for source in receipt.adapters
    ]
    touched, worst = receipt.changes, receipt.worst
    done = {"merge": "changed", "verify": "checked"}.get(receipt.kind, receipt.kind)
    lines.append(f"{done} {len(touched)} tensors, {receipt.copied} are the base's own")
    if worst is not None:
        moved = f"{number(receipt.unchanged, '.2%')} of the elements did not move"
        lines.append(
            f"kept {number(receipt.kept)}, worst {number(worst.kept)} ({worst.tensor}); {moved}"
        )
    if receipt.kind == "merge":
        lines.append(f"→ {receipt.out['path']}" if receipt.out else "nothing was written (dry run)")
    table = plain_table("tensor", "by", "dtype", "‖Δ‖/‖W‖", "kept", "error", "unmoved")
    by_kept = sorted(touched, key=lambda c: 2.0 if c.kept is None else c.kept)
    for change in by_kept[:ROWS]:
        table.add_row(
            Text(change.tensor), " ".join(change.by), change.dtype, number(change.relative, ".2e"),
            number(change.kept), number(change.error, ".1e"), number(change.unchanged, ".2%"),
        )  # fmt: skip
    more = [f"and {len(touched) - ROWS} more"] if len(touched) > ROWS else []
    return [*map(Text, lines), *([table] if touched else []), *map(Text, more)]


def report(found: Any) -> list[RenderableType]:
    """Show what an inspection found."""
    return [Text(str(found))]


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Show a bar on standard error, if somebody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[at]}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None, at="")

        def step(done: int, total: int, name: str) -> None:
            bars.update(task, completed=done, total=total, at=name)

        yield step


@contextmanager
def signals() -> Iterator[list[int]]:
    """Turn the first request to stop into a KeyboardInterrupt, and let nothing stop the cleanup.

    Yields
    ------
    list of int
        The signal, once there was one.
    """
    caught: list[int] = []

    def stop(number: int, _: Any) -> None:
        if not caught:
            caught.append(number)
            raise KeyboardInterrupt

    found = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    main_thread = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in found if n is not None and main_thread}
    # A signal that is ignored stays so: `nohup`, and jobs in the background.
    mine = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for n in mine:
            signal.signal(n, stop)
        yield caught
    finally:
        for n, old in mine.items():
            signal.signal(n, old)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code.

    Parameters
    ----------
    args : sequence of str, optional
        In place of the process's own.
    """
    given = [*(sys.argv[1:] if args is None else args)]
    as_json, quiet = "--json" in given, bool({"-q", "--quiet"} & {*given})
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def note(message: Any, *_: Any, **__: Any) -> None:
        if not quiet:
            tell("warning", str(message), "yellow")

    with signals() as caught, warnings.catch_warnings():
        warnings.showwarning = note
        warnings.simplefilter("always", UserWarning)
        try:
            result = typer.main.get_command(app)(
                given or ["--help"], prog_name="peft-any", standalone_mode=False
            )
            if isinstance(result, Result):
                code = show(result, note)
            else:
                code = result or (0 if given else UsageError.exit_code)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it becomes an exit code
            if "--debug" in given:
                traceback.print_exc()
            code = failed(error, caught, as_json)
        else:
            if caught:  # older versions of typer swallow it
                code = failed(KeyboardInterrupt(), caught, as_json)
    return code


def show(result: Result, note: Callable[[str], None]) -> int:
    """Print a result on standard output, and what it warns of on standard error."""
    for text in result.document.get("warnings", ()):
        note(text)
    error = result.error
    if result.as_json:
        extra = {} if error is None else {"error": described(error, error.exit_code)}
        document = result.document | extra
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    elif not result.quiet:
        # A pipe has no width: nothing is to be cut or folded there.
        console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
        with console.capture() as text:
            console.print(*result.shown, sep="\n")
        print("\n".join(line.rstrip() for line in text.get().splitlines()))
    if error is None:
        return 0
    tell("error", str(error))
    return error.exit_code


def failed(error: BaseException, caught: Sequence[int], as_json: bool) -> int:
    """Say what went wrong, and give the exit code."""
    message = str(error)
    if caught:
        code, message = 128 + caught[0], "interrupted: no partial output is left behind"
    elif isinstance(error, PeftError):
        code = error.exit_code
    elif hasattr(error, "format_message"):
        where = getattr(getattr(error, "ctx", None), "command_path", "peft-any")
        code = UsageError.exit_code
        message = f"{error.format_message()} (see {where} --help)"
    elif isinstance(error, BrokenPipeError | SystemExit):
        silence()
        return 128 + 13  # as the shell reports a process that SIGPIPE ended
    elif isinstance(error, OSError):
        code = 5
        message = f"{error.filename or 'input or output'}: {error.strerror or error}"
        silence()
    elif isinstance(error, MemoryError):
        code, message = 1, f"not enough memory: {message or 'the system gives no more'}"
    else:
        code = 1
        message = f"internal error: {type(error).__name__}: {message} (--debug shows where)"
    tell("error", message)
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "error": described(error, code, message)}
        with suppress(OSError):
            print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)
    return code


def described(error: BaseException, code: int, message: str | None = None) -> dict[str, Any]:
    """Describe an error for `--json`."""
    text = str(error) if message is None else message
    return {"type": type(error).__name__, "message": text, "exit_code": code}


def tell(what: str, message: str, color: str = "red") -> None:
    """Write a message on standard error."""
    text = Text.assemble((f"{what}: ", f"bold {color}"), message)
    with suppress(OSError):
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def silence() -> None:
    """Let standard output go nowhere, so that Python does not fail again when it flushes it."""
    with suppress(OSError, ValueError), Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    sys.exit(run(args))

"""What commands are made of: Click's, with a module imported when its command is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
from click.core import augment_usage_errors

from peft_any.errors import nearest

HELP = {"help_option_names": ["-h", "--help"], "show_default": True}
_HOMES = {
    "merge": "app",
    "verify": "app",
    "inspect": "checkpoints",
    "combine": "adapters",
    "extract": "checkpoints",
    "diff": "checkpoints",
    "resize": "adapters",
    "convert": "adapters",
    "replicate": "checkpoints",
    "methods": "app",
    "demo": "app",
}
"""The modules of the commands, which are imported when one of their own is asked for."""


class Command(click.Command):
    """A command that is named in every error of its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command's options."""
        with augment_usage_errors(ctx):
            return super().parse_args(ctx, args)

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002
        """Give all of the sentence."""
        return self.help or ""


class Commands(click.Group):
    """All commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Name them in the help's order."""
        return [*_HOMES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> Command | None:  # noqa: ARG002
        """Import one."""
        if cmd_name not in _HOMES:
            return None
        found: Command = getattr(import_module(f"peft_any.cli.{_HOMES[cmd_name]}"), cmd_name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is asked for, or suggest the nearest."""
        if args[0] not in _HOMES and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}{nearest(args[0], _HOMES)}.")
        return super().resolve_command(ctx, args)


class Argument(click.Argument):
    """An argument whose help stands with the options' (of Click's own: since its 8.5)."""

    def __init__(self, name: str, *, help: str, **kwargs: Any) -> None:  # noqa: A002 - as in Click
        super().__init__([name], **kwargs)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:  # noqa: ARG002
        """Give what the help says."""
        return self.human_readable_name, self.help or ""


def option(*names: str, **kwargs: Any) -> click.Option:
    """Make an option that takes a value; the last name may be what the function calls it."""
    return click.Option(names, **kwargs)


def flag(*names: str, **kwargs: Any) -> click.Option:
    """Make an option that takes none."""
    return click.Option(names, is_flag=True, **kwargs)


_EVERY = (
    flag("--json", "as_json", help="Print one JSON document."),
    flag(
        "--debug", expose_value=False, help="Show where an error came from."
    ),  # `run` looks for it
)


def command(*params: click.Parameter) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function that takes what is given, and tells by its docstring."""

    def made(function: Callable[..., Any]) -> Command:
        name, text = function.__name__, function.__doc__
        return Command(name, HELP, callback=function, params=[*params, *_EVERY], help=text)

    return made

"""The command line."""

from __future__ import annotations

from peft_any.cli.app import main as main
from peft_any.cli.app import run as run

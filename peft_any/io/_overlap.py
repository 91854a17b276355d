"""Outputs that would touch an input: refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from peft_any.errors import UsageError
from peft_any.io._faults import StrPath, storage_error
from peft_any.io._urls import is_url, path_of


def refuse_overlap(out: StrPath, inputs: Iterable[StrPath]) -> None:
    """Refuse an output that is, lies inside, or contains one of the inputs.

    Parameters
    ----------
    out : path
        Where the output is to go; it need not exist.
    inputs : iterable of path
        Files and directories that must stay untouched.

    Raises
    ------
    UsageError
        Where writing `out` could change an input.
    """
    target = real(out)
    for given in map(path_of, inputs):
        if is_url(given):
            continue
        source = real(given)
        if target == source or (
            os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source)
        ):
            how = "it is the input itself"
        elif source in target.parents:
            how = f"it lies inside the input {given}"
        elif target in source.parents:
            how = f"it contains the input {given}"
        elif link := next((n for n, to in _links(given) if target in (to, *to.parents)), None):
            how = f"it contains what {link} links to"
        else:
            continue
        raise UsageError(f"{out}: the output cannot go here: {how}; choose another place")


def _links(folder: StrPath) -> Iterator[tuple[str, Path]]:
    """List the links below a directory, and where they lead."""
    for place, folders, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in (*folders, *names)):
            if os.path.islink(path):
                yield path, Path(os.path.realpath(path))


def real(path: StrPath) -> Path:
    """Follow the links of a path, which need not exist.

    Raises
    ------
    StorageError
        Where they go round in circles.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as cause:
        raise storage_error(path, "be resolved", cause) from cause

"""A new output in an old one's place, where a directory cannot be renamed in one step.

All of it stands beside the old one first. Then a marker says so, and from there on there is but one
way: what makes the old files a model goes, the new files take their places, and what makes them a
model comes last. A run that is killed in between has lost nothing: the next one goes on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from peft_any.errors import StorageError
from peft_any.io._remote import MARKER, OURS, info_of, reaching
from peft_any.io._sending import listed, move, put, remove

NEW = f"{OURS}new"
"""Where a new output stands until it takes an old one's place."""
JOURNAL = f"{OURS}journal"
"""Where it is said what is finished of an output."""


def turn(name: str) -> tuple[int, str]:
    """Sort files as they are written: what makes them a model goes last, and then the receipt."""
    ends = ".safetensors", "", ".index.json", "config.json", "_receipt.json"
    return max(i for i, end in enumerate(ends) if name.endswith(end)), name


def visible(names: Iterable[str]) -> list[str]:
    """Leave out what is there for a while alone."""
    return [name for name in names if not name.startswith(OURS)]


def put_in_place(fs: Any, root: str, url: str, names: Iterable[str]) -> None:
    """Have the files of a new output take the old one's place.

    Parameters
    ----------
    fs, root, url
        The file system, the output there, and how messages call it.
    names : iterable of str
        The new files, all of which are there.
    """
    with reaching(url, "be written"):
        task = {"new": sorted(names, key=turn), "old": visible(listed(fs, root))}
        put(fs, f"{root}/{MARKER}", json.dumps(task).encode())
    _go_on(fs, root, url, task)


def complete(fs: Any, root: str, url: str) -> None:
    """Go on where a killed run was putting files in place, if one was.

    Warns
    -----
    UserWarning
        If so.
    """
    with reaching(url, "be read"):
        fs.invalidate_cache()
        if info_of(fs, f"{root}/{MARKER}") is None:
            return
        task = json.loads(fs.cat_file(f"{root}/{MARKER}"))
    _go_on(fs, root, url, task)
    warnings.warn(
        f"{url}: a killed run had made it whole beside the old output; it is in place now",
        stacklevel=4,
    )


def _go_on(fs: Any, root: str, url: str, task: dict[str, list[str]]) -> None:
    with reaching(url, "be written"):
        staged = {*listed(fs, f"{root}/{NEW}")}
        there = {*listed(fs, root)}
        if lost := [name for name in task["new"] if name not in staged and name not in there]:
            raise StorageError(
                f"{url}: the new output cannot be put in place: {lost[0]} is neither there nor "
                f"in {NEW}; remove both and begin anew"
            )
        gone = {*task["old"]} - ({*task["new"]} - staged)  # some may be in place already
        for name in sorted(gone, key=turn, reverse=True):
            if turn(name)[0] > 1 or name not in task["new"]:
                with suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{name}")
        for name in task["new"]:
            if name in staged:
                move(fs, f"{root}/{NEW}/{name}", f"{root}/{name}")
        remove(fs, f"{root}/{NEW}")
        for name in [name for name in there if name.startswith(f"{MARKER}.")]:
            fs.rm_file(f"{root}/{name}")  # an attempt to say so
        fs.rm_file(f"{root}/{MARKER}")

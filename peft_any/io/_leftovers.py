"""What runs that were killed leave beside an output, and how a new one takes an old one's place."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from peft_any.io._lock import hidden

_RUN = r"\d+-[0-9a-f]{8}"


def journal_of(partial: Path) -> Path:
    """Name the journal of a partial output: what is finished in it, so that it can be resumed."""
    return partial.with_suffix(".journal")


def recover(final: Path, resume: bool = False) -> Path | None:
    """Put right what a killed run left beside an output, which the caller has claimed.

    A previous output that was set aside, and not yet replaced, gets its name back; partial
    outputs and replaced ones are removed.

    Parameters
    ----------
    final : Path
        The output.
    resume : bool
        Keep the last partial output that has a journal.

    Returns
    -------
    Path or None
        The partial output that was kept.

    Warns
    -----
    UserWarning
        Of everything that was found.
    """
    for found in leftovers(final, "old"):
        if not os.path.lexists(final):
            os.rename(found, final)
            warnings.warn(
                f"{final}: a killed run had set it aside; it has its name again", stacklevel=5
            )
    partial = leftovers(final, "partial")
    journals = [p for p in partial if journal_of(p).exists()]
    kept = journals[-1] if resume and journals else None
    for found in (*partial, *leftovers(final, "old", "gone")):
        if found != kept:
            more = ", which --resume would have continued" if found in journals else ""
            discard(found)
            warnings.warn(
                f"{final}: removed what a killed run left beside it: {found.name}{more}",
                stacklevel=5,
            )
    for found in leftovers(final, "journal"):
        if kept is None or found != journal_of(kept):
            discard(found)
    # An output that was being written into a partial one had its own files beside that.
    inner = re.compile(rf"\.{re.escape(hidden(final, '').name)}{_RUN}\.partial\..*")
    for found in final.parent.iterdir():
        if inner.fullmatch(found.name):
            discard(found)
    return kept


def leftovers(final: Path, *kinds: str) -> list[Path]:
    """List what runs that were killed left beside an output, the oldest first."""
    form = re.compile(rf"{re.escape(hidden(final, '').name)}{_RUN}\.(?:{'|'.join(kinds)})")
    found = [p for p in final.parent.iterdir() if form.fullmatch(p.name)]
    return sorted(found, key=lambda p: p.lstat().st_mtime)


def discard(path: Path) -> None:
    """Remove a file or a directory as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Give two files or directories each other's names in one step, where the system can."""
    import ctypes  # noqa: PLC0415 - only outputs that replace another need it

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(here, names[0], here, names[1], swap) == 0)

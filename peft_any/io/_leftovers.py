"""What runs that were killed leave beside an output, and how a new one takes an old one's place."""

from __future__ import annotations

import os
import re
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
    left = leftovers(final)
    for found in left["old"]:
        if not os.path.lexists(final):
            os.rename(found, final)
            warnings.warn(
                f"{final}: a killed run had set it aside; it has its name again", stacklevel=5
            )
    resumable = [p for p in left["partial"] if journal_of(p).exists()]
    kept = resumable[-1] if resume and resumable else None
    for found in (*left["partial"], *left["old"], *left["gone"]):
        if found != kept and os.path.lexists(found):
            more = ", which --resume would have continued" if found in resumable else ""
            discard(found)
            warnings.warn(
                f"{final}: removed what a killed run left beside it: {found.name}{more}",
                stacklevel=5,
            )
    for found in (*left["journal"], *left["inner"]):
        if kept is None or found != journal_of(kept):
            discard(found)
    return kept


def leftovers(final: Path) -> dict[str, list[Path]]:
    """List what runs that were killed left beside an output, by kind, the oldest first.

    An output that was being written into a partial one had its own files beside that: ``inner``.
    """
    stem = re.escape(hidden(final, "").name)
    form = re.compile(rf"{stem}{_RUN}\.(partial|journal|old|gone)|\.{stem}{_RUN}\.partial\..*")
    found: dict[str, list[Path]] = {k: [] for k in ("partial", "journal", "old", "gone", "inner")}
    for name in os.listdir(final.parent):
        if match := form.fullmatch(name):
            found[match[1] or "inner"].append(final.parent / name)
    for paths in found.values():
        paths.sort(key=lambda p: p.lstat().st_mtime)
    return found


def discard(path: Path) -> None:
    """Remove a file or a directory as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        import shutil  # noqa: PLC0415 - after a failure alone

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

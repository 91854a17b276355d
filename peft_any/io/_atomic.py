"""Outputs that appear whole or not at all: a hidden sibling first, one rename at the end."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from peft_any.errors import PeftError, StorageError, UsageError
from peft_any.io._faults import StrPath as StrPath
from peft_any.io._faults import is_model_file
from peft_any.io._faults import reporting as reporting
from peft_any.io._faults import storage_error as storage_error
from peft_any.io._faults import taken as taken
from peft_any.io._foreign import FOREIGN
from peft_any.io._leftovers import discard, exchange, journal_of, recover
from peft_any.io._lock import claimed, hidden
from peft_any.io._overlap import real, refuse_overlap
from peft_any.io._threads import sync, sync_all
from peft_any.io._urls import is_url, local, path_of

_FILES = {".safetensors", *FOREIGN}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@contextmanager
def output_file(
    path: StrPath,
    overwrite: bool = False,
    *,
    inputs: Iterable[StrPath] = (),
    alone: bool = True,
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    Parameters
    ----------
    path : path
        The final name.
    overwrite : bool
        Whether an existing file may be replaced.
    inputs : iterable of path
        What must not be touched, see `refuse_overlap`.
    alone : bool
        Whether a second run with the same output is refused; if not, the last one's stays.

    Yields
    ------
    Path
        A hidden name in the same directory, to be created by the block. It is removed on any
        exception, an interrupt included.

    Raises
    ------
    StorageError
        Where `path` exists, another run is writing it, it cannot be written, or the disk is full.
    UsageError
        Where `path` would touch one of `inputs`.
    """
    final = local(path, "be written")
    _check(final, overwrite, inputs, directory=False)
    made: list[Path] = []
    partial = _sibling(final, "partial")
    try:
        with reporting(path, "be written"), ExitStack() as stack:
            _make_parents(final, made)
            if alone:
                stack.enter_context(claimed(final))
                recover(final)
            stack.callback(discard, partial)
            yield partial
            if not partial.is_file():
                raise UsageError(f"{path}: the output cannot be finished: nothing was written")
            sync(partial)
            if overwrite:
                os.replace(partial, final)
            else:
                _rename_new(partial, final)
            sync(final.parent)
    except BaseException as cause:
        _remove_empty(made)
        _name_final(cause, partial, final)
        raise


@contextmanager
def output_directory(
    path: StrPath,
    overwrite: bool = False,
    *,
    inputs: Iterable[StrPath] = (),
    resume: bool = False,
    last: Callable[[Path], object] | None = None,
) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; rename it to `path` if the block succeeds.

    Parameters
    ----------
    path : path
        The final name. An empty directory may stand there. A URL's files are here while the
        block runs (`_outgoing`).
    overwrite : bool
        Whether an existing model or adapter directory may be replaced: it is renamed aside,
        the new one is renamed into place, and only then is the old one removed. A directory
        without any model file, under version control, or holding the current directory is
        never removed.
    inputs : iterable of path
        What must not be touched, see `refuse_overlap`.
    resume : bool
        Whether to go on with what an earlier run left, if it has a journal (`journal_of`), and
        to leave it there again on an exception.
    last : callable, optional
        Called with the directory when all in it is on the device, or was sent: it writes what
        tells of that.

    Yields
    ------
    Path
        A hidden directory with the same parent, empty unless it is resumed. It is removed on any
        exception, an interrupt included, unless `resume` is set and it has a journal.

    Raises
    ------
    StorageError
        Where `path` exists, another run is writing it, it cannot be written, or the disk is full.
    UsageError
        Where `path` would touch one of `inputs`, or ends as a weight file does.

    Warns
    -----
    UserWarning
        Where it finds, and removes, what a killed run left.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with output_directory(f"{folder}/out") as partial:
    ...         _ = (partial / "config.json").write_text("{}")
    ...     os.listdir(f"{folder}/out")
    ['config.json']
    """
    if Path(path).suffix in _FILES:
        raise UsageError(
            f"{path}: the output cannot go here: it is a directory of safetensors files; "
            f"leave out {Path(path).suffix}"
        )
    if is_url(path):
        from peft_any.io._outgoing import outgoing  # noqa: PLC0415 - URLs alone need it

        with outgoing(os.fspath(path), overwrite, inputs=inputs, resume=resume) as out:
            yield out.mirror.folder
            if last is not None:
                out.send()
                last(out.mirror.folder)
        return
    final = Path(path_of(path))
    _check(final, overwrite, inputs, directory=True)
    made: list[Path] = []
    partial = _sibling(final, "partial")
    try:
        with reporting(path, "be written"), ExitStack() as stack:
            _make_parents(final, made)
            stack.enter_context(claimed(final))
            partial = recover(final, resume) or partial
            _check(final, overwrite, inputs, directory=True)
            stack.callback(_drop, partial, resume)
            partial.mkdir(exist_ok=resume)
            yield partial
            known = _sync_tree(partial)
            if last is not None:
                last(partial)
                _sync_tree(partial, known)
            _move_in(partial, final, overwrite)
    except BaseException as cause:
        _remove_empty(made)
        _name_final(cause, partial, final)
        raise


def _check(final: Path, overwrite: bool, inputs: Iterable[StrPath], *, directory: bool) -> None:
    if final.name in {"", ".."} or "\0" in str(final):
        raise UsageError(f"{str(final)!r}: the output cannot go here: it needs a name of its own")
    refuse_overlap(final, inputs)
    with reporting(final, "be written"):
        try:
            os.lstat(final)
        except (FileNotFoundError, NotADirectoryError):
            return
        _check_existing(final, overwrite, directory=directory)


def _check_existing(final: Path, overwrite: bool, *, directory: bool) -> None:
    if final.is_dir() != directory:
        kinds = "a file", "a directory"
        raise StorageError(
            f"{final}: the output cannot go here: {kinds[not directory]} stands there and "
            f"{kinds[directory]} is to be written; choose another name"
        )
    if directory and not final.is_symlink() and not any(final.iterdir()):
        return
    if not overwrite:
        raise taken(final)
    if directory:
        _refuse_precious(final)


def _refuse_precious(final: Path) -> None:
    place = real(final)
    here = Path.cwd()
    if place == here or place in here.parents:
        why = "it holds the current directory"
    elif (final / ".git").exists():
        why = "it is under version control"
    elif not any(is_model_file(child.name) for child in final.iterdir()):
        why = "it holds no model or adapter"
    else:
        return
    raise StorageError(
        f"{final}: the existing directory cannot be replaced: {why}, so it is not removed; "
        "remove it yourself or choose another name"
    )


def _sync_tree(folder: Path, known: Collection[Path] = ()) -> set[Path]:
    """Sync all but the files that are known to be, and list the files."""
    walk = [*os.walk(folder, topdown=False)]
    files = {Path(place, name) for place, _, names in walk for name in names}
    sync_all([*sorted(files.difference(known)), *(Path(place) for place, _, _ in walk)])
    return files


def _sibling(final: Path, kind: str) -> Path:
    return hidden(final, f"{os.getpid()}-{os.urandom(4).hex()}.{kind}")


def _name_final(cause: BaseException, partial: Path, final: Path) -> None:
    if isinstance(cause, PeftError) and cause.args:
        cause.args = (str(cause.args[0]).replace(str(partial), str(final)), *cause.args[1:])


def _make_parents(final: Path, made: list[Path]) -> None:
    missing = [p for p in (final.parent, *final.parent.parents) if not p.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        made.append(parent)


def _drop(partial: Path, resume: bool) -> None:
    journal = journal_of(partial)
    if partial.exists() and resume and journal.exists():
        return
    discard(partial)
    discard(journal)


def _remove_empty(made: list[Path]) -> None:
    for parent in reversed(made):
        with suppress(OSError):
            parent.rmdir()


def _rename_new(partial: Path, final: Path) -> None:
    # A hard link, unlike a rename, fails where the name has been taken in the meantime.
    try:
        os.link(partial, final)
    except FileExistsError as cause:
        raise StorageError(
            f"{final}: the output cannot go here: another process made it in the meantime"
        ) from cause
    except OSError as cause:
        if cause.errno not in _NO_HARD_LINKS or os.path.lexists(final):
            raise
        os.rename(partial, final)
    else:
        partial.unlink()


def _move_in(partial: Path, final: Path, overwrite: bool) -> None:
    if not (overwrite and os.path.lexists(final)):
        os.rename(partial, final)
        sync(final.parent)
        return
    if exchange(partial, final):
        replaced = partial
    else:
        replaced = _sibling(final, "old")
        try:
            os.rename(final, replaced)
            os.rename(partial, final)
        except BaseException:
            if os.path.lexists(replaced) and not os.path.lexists(final):
                os.rename(replaced, final)
            raise
    sync(final.parent)
    # From here on it is no output that could be put back, nor a partial one to go on with.
    aside = _sibling(final, "gone")
    try:
        import shutil  # noqa: PLC0415 - only outputs that replace another need it

        os.rename(replaced, aside)
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside)
    except OSError as cause:
        warnings.warn(f"{aside}: the replaced output cannot be removed: {cause}", stacklevel=3)

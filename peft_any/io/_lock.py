"""One run at a time for each output: a lock beside it that names who holds it."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft_any.errors import StorageError
from peft_any.io._faults import reporting

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no such module
    _HAS_FLOCK = False
else:
    _HAS_FLOCK = True

_BUSY = {errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN}
_TRIES, _PAUSE = 100, 0.01


def hidden(final: Path, suffix: str) -> Path:
    """Name a hidden file beside an output: 200 bytes of its name leave room for the suffix."""
    return final.parent / f".{os.fsdecode(os.fsencode(final.name)[:200])}.{suffix}"


@contextmanager
def claimed(final: Path) -> Iterator[None]:
    """Hold an output for this run alone.

    The lock is a hidden file beside the output, held with ``flock`` and removed at the end. A
    process that dies releases it, whatever is left of the file. Where the file system has no
    such locks, whoever creates the file holds it, until that process is no more. A file of
    another machine's is believed: whether that machine's locks are seen here is not known.

    Parameters
    ----------
    final : Path
        The output; its directory exists.

    Raises
    ------
    StorageError
        Where another run holds it, naming that run; or where the directory cannot be written.
    """
    path = hidden(final, "lock")
    held: list[int] = []
    try:
        try:
            with reporting(final, "be written"):
                held.append(_acquire(path, final))
            yield
        finally:
            _release(path, held)
    finally:
        _release(path, held)  # where a request to stop came at the end of the block


def _release(path: Path, held: list[int]) -> None:
    if held:
        with suppress(OSError):
            if _same(held[0], path):
                path.unlink()
        os.close(held.pop())


def _acquire(path: Path, final: Path) -> int:
    for attempt in range(_TRIES):
        handle, mine = None, False
        try:
            handle, mine = _open(path)
            if handle is None:
                continue
            held, owner = _flock(handle), _owner(handle)
            elsewhere = owner.get("host", _host()) != _host()
            if held is False or (held and elsewhere) or (held is None and alive(owner)):
                mine = False  # whoever holds it may have been quicker than its maker
                raise _refused(final, path, owner)
            if _same(handle, path) if held else mine:
                with suppress(*([OSError] if held else [])):  # on a full disk the lock holds too
                    _sign(handle)
                return handle
            if held is None:
                # Without a name in it, it is being made, or whoever made it died there.
                last = attempt == _TRIES - 2
                _take_away(path, owner) if owner or last else time.sleep(_PAUSE)
        except BaseException as cause:
            if mine:
                path.unlink(missing_ok=True)
            if handle is not None:
                os.close(handle)
            elif not isinstance(cause, Exception):
                _remove_unsigned(path)
            raise
        os.close(handle)
    raise _refused(final, path, {})


def _open(path: Path) -> tuple[int | None, bool]:
    """Open the lock's file, and tell whether this call made it; None where it just went."""
    flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            return os.open(path, flags), False
        except FileNotFoundError:
            return None, False


def _remove_unsigned(path: Path) -> None:
    """Remove what a request to stop has cut short just when it was made."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR)
        try:  # whoever else makes it waits for this lock, and then sees that the name is gone
            if _flock(handle) and not _owner(handle) and _same(handle, path):
                path.unlink()
        finally:
            os.close(handle)


def _take_away(path: Path, owner: Mapping[str, Any]) -> None:
    """Remove what a dead process left, unless another has just taken its place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)  # of several who try, one succeeds
        handle = os.open(aside, os.O_RDONLY)
        try:
            fresh = _owner(handle) != owner
        finally:
            os.close(handle)
        if fresh:
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _flock(handle: int) -> bool | None:
    """Try to lock a file: false where another process has it, None where there are no locks."""
    if not _HAS_FLOCK:
        return None  # pragma: no cover - Windows
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        return False if cause.errno in _BUSY else None
    return True


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(signature()).encode())


def signature() -> dict[str, Any]:
    """Say which process this is, on which machine."""
    pid = os.getpid()
    return {"pid": pid, "host": _host(), "began": _began(pid), "since": time.strftime("%F %T")}


def _owner(handle: int) -> dict[str, Any]:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(handle, 4096))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process may still run: yes, where that cannot be told."""
    if not owner:
        return False
    pid = owner.get("pid")
    if owner.get("host") != _host() or not isinstance(pid, int) or pid <= 0 or os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _began(pid) == owner.get("began")


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's count: its number may have been given out again."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _host() -> str:
    return platform.node()


def _refused(final: Path, path: Path, owner: Mapping[str, Any]) -> StorageError:
    who, rest = "another process", "wait for it, or choose another place"
    if pid := owner.get("pid"):
        who = f"process {pid!s:.20}" + (" (this one)" if pid == os.getpid() else "")
        if owner.get("host") != _host():
            who += f" on {owner.get('host')!s:.80}"
            rest += f"; if it runs no more, remove {path}"
        who += f", since {owner.get('since')!s:.40},"
    return StorageError(f"{final}: the output cannot go here: {who} is writing it; {rest}")

"""One run at a time for each output of another file system: a file there that names who has it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from peft_any.errors import StorageError
from peft_any.io._lock import alive, signature
from peft_any.io._remote import reaching
from peft_any.io._sending import is_store

CLAIM = ".peft_any.claim"


class Claim:
    """An output that is this run's.

    A claim is made by a request that fails where there is one. That of a process which is known
    to be dead, since it ran on this machine, is taken over; any other is believed.

    Parameters
    ----------
    fs, root, url
        The file system, the output there, and how messages call it.
    staged : bool
        Whether the output is made beside one that stands there.

    Raises
    ------
    StorageError
        Where another run has it.
    """

    def __init__(self, fs: Any, root: str, url: str, *, staged: bool) -> None:
        self._fs, self._key, self._url = fs, f"{root}/{CLAIM}", url
        mine = {**signature(), **_machine(), "token": uuid4().hex, "staged": staged}
        self.former: dict[str, Any] = {}
        """The one that it takes the place of."""
        self._data = json.dumps(mine).encode()
        with reaching(url, "be written"):
            if not is_store(fs):
                fs.makedirs(root, exist_ok=True)
            if not self._made(self._key):
                self._take_over()
            fs.invalidate_cache()
        if not self.holds():  # the file system did not refuse a second one
            raise refusal(owner(fs, root), url)

    def _made(self, key: str) -> bool:
        try:
            self._fs.pipe_file(key, self._data, mode="create")
        except FileExistsError:
            return False
        except TypeError:  # an old version, which cannot refuse what is there
            self._fs.pipe_file(key, self._data)
        return True

    def _take_over(self) -> None:
        fs, root = self._fs, self._key.removesuffix(f"/{CLAIM}")
        before = owner(fs, root)
        aside = f"{self._key}.{before.get('token')}"  # of several who try, one makes it
        if not is_dead(before) or not self._made(aside):
            raise refusal(before, self._url)
        try:
            fs.invalidate_cache()
            if (now := owner(fs, root)) != before:
                raise refusal(now, self._url)
            fs.pipe_file(self._key, self._data)
            self.former = before
        finally:
            fs.rm_file(aside)

    def holds(self) -> bool:
        """Whether nobody else has taken the claim in its place."""
        with reaching(self._url, "be read"):
            self._fs.invalidate_cache()
            try:
                return bool(self._fs.cat_file(self._key) == self._data)
            except FileNotFoundError:
                return False

    def release(self) -> None:
        """Give it up."""
        self._fs.rm_file(self._key)


def owner(fs: Any, root: str) -> dict[str, Any]:
    """Say who claims an output; nothing, where that is not told."""
    with suppress(Exception):
        return dict(json.loads(fs.cat_file(f"{root}/{CLAIM}")[:4096]))
    return {}


def is_dead(who: Mapping[str, Any]) -> bool:
    """Whether a claim's process ran on this machine, since it was started, and is no more."""
    here = _machine()
    return bool(here) and here.items() <= who.items() and not alive(who)


def _machine() -> dict[str, Any]:
    """Tell this machine, since its start and as its containers see it, from any other."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"boot": boot, "space": os.stat("/proc/self/ns/pid").st_ino}
    return {}


def refusal(who: Mapping[str, Any], url: str) -> StorageError:
    """Give the error of an output that another run has."""
    named = f"process {who.get('pid')!s:.20} on {who.get('host')!s:.80}"
    return StorageError(
        f"{url}: the output cannot go here: {named}, since {who.get('since')!s:.40}, is writing "
        f"it; wait for it, or choose another place; if it runs no more, remove {url}/{CLAIM}"
    )

"""The journal of a merge to a URL: a small file for each shard, beside the shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft_any.errors import StorageError
from peft_any.io._fingerprint import checksum
from peft_any.io._outgoing import Outgoing
from peft_any.io._remote import reaching, tag_of
from peft_any.io._replacing import JOURNAL
from peft_any.io._sending import listed, passing, put
from peft_any.receipt import Change
from peft_any.surgery.journal import Finished, Ledger
from peft_any.surgery.shards import Piece, ShardItem


def all_sent(
    pieces: Callable[[list[ShardItem]], AbstractContextManager[Iterable[tuple[ShardItem, Piece]]]],
    items: Sequence[ShardItem],
    synced: Callable[[ShardItem, Piece], None],
    rest: Callable[[], None],
) -> Iterator[tuple[ShardItem, Piece]]:
    """Compute shards, each of which stands here until it was sent where it goes.

    Parameters
    ----------
    pieces : callable
        Computes shards, as `Job.pieces` does.
    items, synced, rest
        As for `Job.pieces`.
    """
    for item in items:
        with passing(str(item[1])) as path:
            with pieces([(item[0], path)]) as made:
                [(_, piece)] = made
            piece = replace(piece, mark=checksum(path))
        synced(item, piece)
        rest()
        yield item, piece


class Sent(Ledger):
    """What was sent of an output.

    Parameters
    ----------
    out : Outgoing
    task : mapping
        As for `Ledger`.
    resume : bool
        Whether what was sent is left for another run, if this one fails.

    Raises
    ------
    StorageError
        Where a journal stands there that is another merge's, naming what differs.
    """

    def __init__(self, out: Outgoing, task: Mapping[str, Any], *, resume: bool) -> None:
        super().__init__(task, out.final[1])
        self._sent, self._fs = out, out.mirror.fs
        self._root = f"{out.mirror.root}/{JOURNAL}"
        out.keeps = True  # while it is read: another merge's stays as it is
        with reaching(out.mirror.url, "be read"):
            found = listed(self._fs, self._root)
            names = sorted(name for name in found if name.isdigit())  # and no attempts
            said = [bytes(self._fs.cat_file(f"{self._root}/{name}")).decode() for name in names]
        self._count = int(names[-1]) + 1 if names else 0
        self._take([line for text in said for line in text.splitlines()])
        out.keeps = resume
        if found:
            self._tidy()
        if not names:
            self._append([json.dumps(self._task)])

    def add(self, name: str, changes: Sequence[Change], copied: int, mark: str = "") -> None:
        """Note that a shard is there."""
        tag = tag_of(self._sent.hold(name))
        self._noted.append(Finished(name, mark, tuple(changes), copied, tag))

    def _append(self, lines: list[str]) -> None:
        with reaching(self._sent.mirror.url, "be written"):
            text = "".join(f"{line}\n" for line in lines)
            put(self._fs, f"{self._root}/{self._count:08}", text.encode())
        self._count += 1

    def _stands(self, done: Finished) -> bool:
        """Whether the store says that it is what was sent, or its every byte does."""
        url, key = self._sent.url_of(done.file), f"{self._sent.mirror.root}/{done.file}"
        try:
            with TemporaryDirectory(prefix="peft_any-") as folder, reaching(url, "be read"):
                if not done.tag or tag_of(self._fs.info(key)) != done.tag:
                    copy = Path(folder, "shard")
                    self._fs.get_file(key, str(copy))
                    if checksum(copy) != done.fingerprint:
                        return False
            return bool(self._sent.hold(done.file))
        except StorageError:
            return False

    def _tidy(self) -> None:
        """Remove what is not finished: side files, too, are sent again."""
        with reaching(self._sent.mirror.url, "be written"):
            for name in self._sent.unfinished(self.finished):
                self._fs.rm_file(f"{self._sent.mirror.root}/{name}")

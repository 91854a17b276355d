"""Outputs on file systems that cannot rename a directory: what makes them models comes last."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft_any.errors import StorageError, UsageError
from peft_any.io._claim import CLAIM, Claim, is_dead, owner, refusal
from peft_any.io._faults import StrPath, is_model_file, taken
from peft_any.io._remote import MARKER, Mirror, filesystem, info_of, reaching
from peft_any.io._replacing import JOURNAL, NEW, complete, put_in_place, turn, visible
from peft_any.io._sending import listed, remove, send
from peft_any.io._urls import is_url

_ATTEMPT = re.compile(r"\.[0-9a-f]{32}$")


def refuse_shared(out: str, inputs: Iterable[StrPath]) -> None:
    """Refuse an output that is, lies inside, or contains one of the inputs."""
    target = f"{_settled(out)}/"
    for given in inputs:
        source = f"{_settled(given)}/"
        if is_url(given) and (target.startswith(source) or source.startswith(target)):
            raise UsageError(
                f"{out}: the output cannot go here: it shares files with the input "
                f"{os.fspath(given)}; choose another place"
            )


def _settled(url: StrPath) -> str:
    scheme, _, rest = os.fspath(url).partition("://")
    return f"{scheme}://{'/'.join(part for part in rest.split('/') if part not in ('', '.'))}"


def refuse_taken(url: str, *, overwrite: bool, resume: bool = False) -> bool:
    """Refuse an output whose place is not free, and tell whether one stands there to be replaced.

    Raises
    ------
    StorageError, UsageError
    """
    if url.endswith(".safetensors"):
        raise UsageError(f"{url}: a single file cannot be written to a URL: give a directory")
    scheme = url.partition("://")[0]
    if any(name.endswith("cache") for name in scheme.split("::")):
        raise UsageError(
            f"{url}: the output cannot go here: a cache may hide what other runs wrote: give the "
            "URL of what it is a cache of"
        )
    url = url.rstrip("/")
    fs, key = filesystem(url)
    with reaching(url, "be written"):
        if (info_of(fs, key) or {}).get("type") == "file":
            raise StorageError(f"{url}: the output cannot go here: a file is there; choose another")
        names = listed(fs, key)
    who = owner(fs, key) if CLAIM in names else {}
    if CLAIM in names and not is_dead(who):
        raise refusal(who, url)
    seen = visible(names)
    if not seen and MARKER not in names:
        return False
    if _unfinished(names, who):
        if overwrite or (resume and _has(names, JOURNAL)):
            return False
        raise StorageError(
            f"{url}: the output cannot go here: a killed run has left part of one; "
            "overwrite=True (--overwrite) removes it"
            + (", resume=True (--resume) goes on with it" if _has(names, JOURNAL) else "")
        )
    if not overwrite:
        raise taken(url)
    if MARKER not in names and not any(is_model_file(name) for name in seen):
        raise StorageError(
            f"{url}: what is there cannot be replaced: it holds no model or adapter, so it is not "
            "removed; remove it yourself or choose another name"
        )
    return True


def _has(names: Iterable[str], folder: str) -> bool:
    return any(name.startswith(f"{folder}/") for name in names)


def _unfinished(names: list[str], who: dict[str, Any]) -> bool:
    """Whether what is there is part of an output that a killed run began."""
    if MARKER in names or any(n.endswith("_receipt.json") and "/" not in n for n in names):
        return False
    return _has(names, JOURNAL) or (CLAIM in names and who.get("staged") is False)


class Outgoing:
    """An output on its way: its small files are here until the end, and then its shards are there.

    Attributes
    ----------
    mirror : Mirror
        What is here, and what was sent.
    claim : Claim
    final : tuple of str
        The place of the output, and its URL: that of `mirror` unless it takes an old one's place.
    keeps : bool
        Whether what was sent is left for another run, if this one fails.
    """

    def __init__(self, mirror: Mirror, claim: Claim, final: tuple[str, str]) -> None:
        self.mirror, self.claim, self.final = mirror, claim, final
        self.keeps = True  # until it is known whose files are there
        self._replaces = final[0] != mirror.root
        self._sent: set[str] = set()

    def url_of(self, name: str) -> str:
        """Where a file of the output goes."""
        return f"{self.mirror.url}/{name}"

    def hold(self, name: str) -> dict[str, Any]:
        """Note that a file was sent, by whichever process, and give what is known of it."""
        with reaching(self.url_of(name), "be read"):
            self.mirror.fs.invalidate_cache()
            info: dict[str, Any] = self.mirror.fs.info(f"{self.mirror.root}/{name}")
        self.mirror.add(name, info)
        return info

    def unfinished(self, known: Collection[str]) -> list[str]:
        """List what is there of the output and is not known."""
        names = visible(listed(self.mirror.fs, self.mirror.root))
        return [name for name in names if name not in known]

    def recover(self, *, resume: bool) -> None:
        """Put right what a killed run has left in a place that is claimed."""
        fs, (root, url) = self.mirror.fs, self.final
        complete(fs, root, url)
        with reaching(url, "be written"):
            names = [n for n in listed(fs, root) if not n.startswith(CLAIM)]
            beside = [n for n in names if n.startswith(f"{NEW}/")]
            home, left = NEW, beside
            if not self._replaces:
                home, left = "", [n for n in names if n not in beside]
                if visible(left) and not _unfinished([*left, CLAIM], self.claim.former):
                    raise taken(url)  # since it was looked for, or it was not seen
                remove(fs, f"{root}/{NEW}")  # of an output that has gone since
            if left and not (resume and _has(left, f"{home}/{JOURNAL}".lstrip("/"))):
                for name in left:
                    fs.rm_file(f"{root}/{name}")
                warnings.warn(f"{url}: removed what a killed run left there", stacklevel=5)
        self.keeps = False

    def send(self) -> None:
        """Send what is here and was not sent: what tells readers of a model goes last."""
        folder, fs, root = self.mirror.folder, self.mirror.fs, self.mirror.root
        with reaching(self.mirror.url, "be written"):
            for name in listed(fs, root):
                if _ATTEMPT.search(name):  # of a worker that was lost
                    fs.rm_file(f"{root}/{name}")
        self._check()
        for name in sorted(self._files() - self._sent - self.mirror.away.keys(), key=turn):
            send(folder / name, self.url_of(name))
            self._sent.add(name)

    def _files(self) -> set[str]:
        folder = self.mirror.folder
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    def finish(self) -> None:
        """Send the rest, the receipt after all else, and put it in its place."""
        self.send()
        fs, root = self.mirror.fs, self.mirror.root
        if self._replaces:
            self._check()
            self.keeps = True  # there is no way back
            put_in_place(fs, *self.final, self._files())
        else:
            with reaching(self.mirror.url, "be written"):
                remove(fs, f"{root}/{JOURNAL}")
        self._release()

    def _release(self) -> None:
        try:
            self.claim.release()
        except Exception as cause:  # noqa: BLE001 - what was to be done is done
            url = self.final[1]
            warnings.warn(f"{url}/{CLAIM}: cannot be removed: {cause}", stacklevel=4)

    def _check(self) -> None:
        if not self.claim.holds():
            raise refusal(owner(self.mirror.fs, self.final[0]), self.final[1])

    def give_up(self) -> None:
        """Remove what was sent, unless another run has taken the place, or may go on with it."""
        try:
            if not self.claim.holds():
                return
            if not self.keeps:
                remove(self.mirror.fs, self.mirror.root)
            if self._replaces or self.keeps:
                self._release()
        except Exception as cause:  # noqa: BLE001 - the first one counts
            said = f"{self.final[1]}: what was written cannot be removed: {cause}"
            warnings.warn(said, stacklevel=4)


@contextmanager
def outgoing(
    url: str, overwrite: bool = False, *, inputs: Iterable[StrPath] = (), resume: bool = False
) -> Iterator[Outgoing]:
    """Claim a place for an output, and complete it if the block succeeds.

    Parameters
    ----------
    url : str
        A directory.
    overwrite, inputs, resume
        As for `output_directory`. What takes an old output's place is made beside it.

    Raises
    ------
    StorageError
        Where something is there, another run writes it, or it cannot be written.
    UsageError
        Where it would touch one of `inputs`.
    """
    refuse_shared(url, inputs)
    replaces = refuse_taken(url, overwrite=overwrite, resume=resume)
    url = url.rstrip("/")
    fs, key = filesystem(url)
    claim = Claim(fs, key, url, staged=replaces)
    inner = f"/{NEW}" if replaces else ""
    with TemporaryDirectory(prefix="peft_any-", ignore_cleanup_errors=True) as place:
        folder = Path(place).resolve()
        mirror = Mirror(fs, f"{key}{inner}", f"{url}{inner}", folder, folder, url)
        out = Outgoing(mirror, claim, (key, url))
        try:
            with mirror.telling():
                out.recover(resume=resume)
                yield out
                out.finish()
        except BaseException:
            out.give_up()
            raise

"""Outputs on file systems that cannot rename a directory: what makes them models comes last."""

from __future__ import annotations

import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from peft_any.errors import StorageError, UsageError
from peft_any.io._faults import StrPath
from peft_any.io._remote import Mirror, filesystem, reaching
from peft_any.io._urls import is_url

CLAIM = ".peft_any.claim"
_ATTEMPT = re.compile(r"\.[0-9a-f]{32}$")
_WHOLE = {
    "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2", "tos", "memory",
}  # fmt: skip
"""Protocols of stores, where a file is there once all of it is."""


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


def refuse_taken(url: str, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output whose place is not free.

    Raises
    ------
    StorageError, UsageError
    """
    if resume:
        raise UsageError(
            f"{url}: a merge to a URL cannot be continued: leave out --resume (resume=False), or "
            "give a path of a mounted file system"
        )
    if url.endswith(".safetensors"):
        raise UsageError(f"{url}: a single file cannot be written to a URL: give a directory")
    fs, key = filesystem(url)
    with reaching(url, "be written"):
        found = [*fs.find(key)] if fs.exists(key) else []
    names = [name[len(key) :].lstrip("/") for name in found]
    if CLAIM in names:
        raise _claimed(fs, key, url)
    if not any(names) and not (found and fs.isfile(key)):
        return
    if overwrite:
        raise StorageError(
            f"{url}: the existing output cannot be replaced: this file system cannot do it in one "
            "step, and a killed run would leave neither; remove it yourself or choose another name"
        )
    raise StorageError(f"{url}: the output cannot go here: it exists; choose another name")


def _claimed(fs: Any, key: str, url: str) -> StorageError:
    owner: dict[str, Any] = {}
    with suppress(Exception):
        owner = dict(json.loads(fs.cat_file(f"{key}/{CLAIM}")[:4096]))
    who = f"process {owner.get('pid')!s:.20} on {owner.get('host')!s:.80}"
    return StorageError(
        f"{url}: the output cannot go here: {who}, since {owner.get('since')!s:.40}, is writing "
        "it; wait for it, or choose another place; if it runs no more, remove what it left there"
    )


def _is_store(fs: Any) -> bool:
    """Whether files are whole when they appear, and directories are but parts of their names."""
    return bool(_WHOLE & ({fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}))


def send(path: Path, url: str) -> None:
    """Copy a file to a URL, where it appears whole or is never looked at."""
    fs, key = filesystem(url)
    with reaching(url, "be written"):
        if _is_store(fs):
            fs.put_file(str(path), key)
        else:
            fs.makedirs(fs._parent(key), exist_ok=True)  # noqa: SLF001 - it has no other name
            own = f"{key}.{uuid4().hex}"  # an attempt
            fs.put_file(str(path), own)
            fs.mv(own, key)
        fs.invalidate_cache()
        size, there = path.stat().st_size, int(fs.info(key)["size"])
    if size != there:
        raise StorageError(f"{url}: cannot be written: of {size} bytes {there} are there")


@contextmanager
def passing(url: str) -> Iterator[Path]:
    """Give a place here for a file that is sent to a URL if the block succeeds."""
    with TemporaryDirectory(prefix="peft_any-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, url.rpartition("/")[2])
        yield path
        send(path, url)


class Outgoing:
    """An output on its way: its small files are here until the end, and then its shards are there.

    Attributes
    ----------
    mirror : Mirror
        What is here, and what was sent.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror

    def url_of(self, name: str) -> str:
        """Where a file of the output goes."""
        return f"{self.mirror.url}/{name}"

    def hold(self, name: str) -> None:
        """Note that a file was sent, by whichever process."""
        with reaching(self.url_of(name), "be read"):
            info = self.mirror.fs.info(f"{self.mirror.root}/{name}")
        self.mirror.add(name, info)

    def finish(self) -> None:
        """Send what is here: what tells readers of a model goes last, and the receipt after it."""
        folder, fs = self.mirror.folder, self.mirror.fs
        with reaching(self.mirror.url, "be written"):
            fs.invalidate_cache()
            for left in [name for name in fs.find(self.mirror.root) if _ATTEMPT.search(name)]:
                fs.rm_file(left)  # of a worker that was lost
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        for name in sorted(set(files) - self.mirror.away.keys(), key=_turn):
            send(folder / name, self.url_of(name))


def _turn(name: str) -> tuple[int, str]:
    ends = ".safetensors", "", ".index.json", "config.json", "_receipt.json"
    return max(i for i, end in enumerate(ends) if name.endswith(end)), name


@contextmanager
def outgoing(
    url: str, overwrite: bool = False, *, inputs: Iterable[StrPath] = (), resume: bool = False
) -> Iterator[Outgoing]:
    """Claim a place for an output, and complete it if the block succeeds; else nothing is left.

    Parameters
    ----------
    url : str
        A directory.
    overwrite, inputs, resume
        As for `output_directory`: nothing is replaced, and nothing is resumed.

    Raises
    ------
    StorageError
        Where something is there, another run writes it, or it cannot be written.
    UsageError
        Where it would touch one of `inputs`.
    """
    refuse_shared(url, inputs)
    refuse_taken(url, overwrite=overwrite, resume=resume)
    url = url.rstrip("/")
    fs, key = filesystem(url)
    _claim(fs, key, url)
    try:
        with TemporaryDirectory(prefix="peft_any-", ignore_cleanup_errors=True) as place:
            folder = Path(place).resolve()
            out = Outgoing(Mirror(fs, key, url, folder, folder, url))
            with out.mirror.telling():
                yield out
                out.finish()
    except BaseException:
        try:
            fs.invalidate_cache()
            fs.rm(key, recursive=True)
        except Exception as cause:  # noqa: BLE001 - the first one counts
            warnings.warn(f"{url}: what was written cannot be removed: {cause}", stacklevel=3)
        raise
    with reaching(url, "be written"):
        fs.rm_file(f"{key}/{CLAIM}")


def _claim(fs: Any, key: str, url: str) -> None:
    mine = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
    place, data = f"{key}/{CLAIM}", json.dumps(mine).encode()
    try:
        with reaching(url, "be written"):
            if not _is_store(fs):
                fs.makedirs(key, exist_ok=True)
            try:
                fs.pipe_file(place, data, mode="create")
            except TypeError:  # an old version, which cannot refuse what is there
                fs.pipe_file(place, data)
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise _claimed(fs, key, url) from error
        raise

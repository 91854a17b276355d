"""A store with S3's ways, in this process: it fails what memory and disks let pass.

Objects are whole or not there. Nothing is renamed, appended to, or opened as a file; directories
are parts of names, making one does nothing, and what is removed may not have been there. Listings
are kept until somebody asks for a new one, and what they say, or do not, is told of each object.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import fsspec
from fsspec.spec import AbstractFileSystem

Info = dict[str, Any]


class Bucket(AbstractFileSystem):  # type: ignore[misc]
    """All its instances share their objects."""

    protocol = "r2"
    objects: ClassVar[dict[str, bytes]] = {}
    listings: ClassVar[dict[str, list[Info]]] = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget all listings."""
        self.listings.clear()

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        """List what begins so, from memory if that is known."""
        path = self._strip_protocol(path).rstrip("/")
        if path not in self.listings:
            whole = {key for key in self.objects if key.startswith(f"{path}/")}
            parts = {key[len(path) + 1 :].partition("/") for key in whole}
            found = [self._file(f"{path}/{name}") for name, slash, _ in sorted(parts) if not slash]
            folders = {name for name, slash, _ in parts if slash}
            found += [_folder(f"{path}/{name}") for name in sorted(folders)]
            if not found and path in self.objects:
                found = [self._file(path)]
            if not found:
                raise FileNotFoundError(path)
            self.listings[path] = found
        known = self.listings[path]
        return [dict(info) for info in known] if detail else [info["name"] for info in known]

    def info(self, path: str, **_: Any) -> Info:
        """Tell of an object; as the listing has it, if there is one."""
        path = self._strip_protocol(path).rstrip("/")
        known = self.listings.get(self._parent(path))
        if known is not None:
            told = [info for info in known if info["name"] == path]
            if not told:
                raise FileNotFoundError(path)
            return dict(told[0])
        if path in self.objects:
            return self._file(path)
        if any(key.startswith(f"{path}/") for key in self.objects):
            return _folder(path)
        raise FileNotFoundError(path)

    def _file(self, key: str) -> Info:
        data = self.objects[key]
        tag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return {"name": key, "size": len(data), "type": "file", "ETag": f'"{tag}"'}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Read some bytes."""
        key = self._strip_protocol(path)
        if key not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[key][start:end]

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Copy an object here."""
        Path(lpath).write_bytes(self.cat_file(rpath))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Put an object; `create` refuses one that is there, as ``If-None-Match`` does."""
        key = self._strip_protocol(path)
        if mode == "create" and key in self.objects:
            raise FileExistsError(path)
        self.objects[key] = bytes(value)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        """Copy a file there."""
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy within the store."""
        self.pipe_file(path2, self.cat_file(path1))

    def rm_file(self, path: str) -> None:
        """Remove an object; nothing is said where there was none."""
        self.objects.pop(self._strip_protocol(path), None)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no directories."""

    mkdir = makedirs

    def mv(self, path1: str, *_: Any, **__: Any) -> NoReturn:
        """Objects keep their names."""
        raise NotImplementedError(f"{path1}: cannot be renamed: a store has no such request")

    def _open(self, path: str, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{path}: cannot be opened: a store reads ranges, and puts wholes"
        )


def _folder(name: str) -> Info:
    return {"name": name, "size": 0, "type": "directory"}


fsspec.register_implementation("r2", Bucket, clobber=True)

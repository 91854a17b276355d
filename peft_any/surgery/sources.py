"""The adapters of a merge as they are given, and the base as they need to see it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from peft_any._dtypes import numpy_dtype
from peft_any.adapter import Adapter
from peft_any.backend import astype, to_numpy
from peft_any.errors import ConfigError, PeftError, ShapeError, TargetError, UsageError
from peft_any.io._faults import StrPath, reading, reporting
from peft_any.io._fetching import fetched
from peft_any.io._finding import files_of, find_adapter, opened
from peft_any.io._header import BITS, TensorInfo, byte_size
from peft_any.io._threads import meanwhile
from peft_any.io.checkpoint import Checkpoint
from peft_any.io.keys import Place, read_keys
from peft_any.layer import Kind, Site
from peft_any.layout import layout, looks_like_embedding
from peft_any.method import Prompt
from peft_any.naming.nesting import named
from peft_any.naming.nesting import names as names_of
from peft_any.origin import Sampled, runs, sampled
from peft_any.receipt import Host, Source, Use
from peft_any.surgery.heads import new_heads

AdapterLike: TypeAlias = StrPath | Adapter
Adapters: TypeAlias = (
    AdapterLike | Mapping[StrPath, float] | Iterable[AdapterLike | tuple[AdapterLike, float]]
)
"""One adapter; ``{path: weight}``; or several, each alone or with its weight."""
_CHUNK = 1 << 22
"""Bytes that are digested at a time: Python's lock is taken between them."""
Kinds: TypeAlias = Mapping[str, Kind | Site] | None


@dataclass(frozen=True)
class Given:
    """One adapter of a merge.

    Attributes
    ----------
    source : Source
    adapter : Adapter
    places : dict of str to Place
        What each tensor of its file is.
    lost : tuple of str
        What `strict=False` left out, in sentences.
    moved : dict of str to tuple of str
        Where `names` took the file's modules; empty where they keep their names.
    """

    source: Source
    adapter: Adapter
    places: Mapping[str, Place]
    lost: tuple[str, ...] = ()
    moved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How messages and the receipt call it."""
        return self.source.label

    @property
    def weight(self) -> float:
        """The factor of its effect."""
        return self.source.weight

    def named(self, base: Mapping[str, Any], kinds: Kinds) -> Given:
        """Give nameless parameters the names of the base's tensors (`nesting.names`)."""
        adapter = self.adapter
        new = names_of(adapter.config, adapter.sites, base, kinds)
        if not new:
            return self
        moved = {old: tuple(new.get(n, n) for n in ns) for old, ns in self.moved.items()}
        moved |= {old: (name,) for old, name in new.items() if old not in moved}
        return replace(self, adapter=adapter.replace(sites=named(adapter.sites, new)), moved=moved)


def given_adapters(adapters: Any, *, strict: bool = True) -> list[Given]:
    """Load the adapters of a merge.

    Raises
    ------
    UsageError
        If there is none, or a weight is not a finite number.
    ConfigError
        For a prompt method: it has no merged form.
    FormatError
        If an adapter holds NaN or infinities.
    """
    found: list[Given] = []
    for item, weight in pairs(adapters):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
            raise UsageError(f"adapter {item}: {weight!r} cannot be a weight: give a number")
        given = given_one(item, float(weight), strict=strict, sound=True)
        if given.adapter.config.refusal is not None:
            raise ConfigError(f"{given.label}: {given.adapter.config.refusal}")
        if isinstance(given.adapter.config, Prompt):
            raise ConfigError(
                f"{given.label}: {given.source.peft_type} cannot be merged: it makes virtual "
                "tokens and changes no weight; keep it beside the base"
            )
        twins = sum(other.label.partition("#")[0] == given.label for other in found)
        if twins:
            label = f"{given.label}#{twins + 1}"
            given = replace(given, source=replace(given.source, label=label))
        found.append(given)
    if not found:
        raise UsageError("no adapter is given to merge")
    return found


def misfit(faults: Sequence[tuple[Given, PeftError]]) -> PeftError:
    """Join what is wrong with adapters, and the names of the bases they were made for."""
    said = [f"{one.label}: {error}" for one, error in faults]
    said += [
        f"{one.label}: was made for {base!r}, as its configuration says; is this another base?"
        for one, error in faults
        if (base := one.adapter.config.base_model_name_or_path)
        and isinstance(error, ShapeError | TargetError)
    ]
    return type(faults[0][1])("\n".join(said))


def pairs(adapters: Adapters) -> Iterator[tuple[Any, Any]]:
    """Give each adapter with its weight, neither of them checked."""
    if isinstance(adapters, str | os.PathLike | Adapter):
        yield adapters, 1.0
    elif isinstance(adapters, Mapping):
        yield from adapters.items()
    elif not isinstance(adapters, Iterable):
        raise UsageError(
            f"adapter={adapters!r}: is none: give a path, an Adapter, or several with weights"
        )
    else:
        for item in adapters:
            yield item if isinstance(item, tuple) else (item, 1.0)


def given_one(item: Any, weight: float = 1.0, *, strict: bool = True, sound: bool = False) -> Given:
    """Load one adapter, with digests of its files; if `sound`, refuse NaN and infinities."""
    if isinstance(item, Given):
        if sound:
            item.adapter.check_finite(item.label)
        return item
    if isinstance(item, Adapter):
        method = item.config.peft_type
        if sound:
            item.check_finite(f"<{method}>")
        return Given(Source(f"<{method}>", weight, method), item, dict(_own_places(item)))
    if not isinstance(item, str | os.PathLike):
        raise UsageError(f"{item!r:.60}: is no adapter: give a path or a peft_any.Adapter")
    with fetched(item) as here:
        tensors, config = find_adapter(here)
        with opened(tensors) as file:  # known to be no holes from here on
            parts = files_of(tensors)
            with meanwhile(lambda: {path.name: _digest(path) for path in parts}) as digests:
                adapter = Adapter.load(here, "numpy", strict=strict, mapped=True)
                places, unknown = read_keys(adapter.config, file)
                if sound:
                    adapter.check_finite(str(item))
            sums = {config.name: _digest(config), **digests()}
            source = Source(str(item), weight, adapter.config.peft_type, str(item), sums)
    return Given(source, adapter, places, tuple(unknown))


def _own_places(adapter: Adapter) -> Iterator[tuple[str, Place]]:
    for module, params in adapter.sites.items():
        for name in params:
            yield f"{module}.{name}", Place("site", module, name)
    for name in adapter.shared:
        yield name, Place("shared", "", name)
    for name in adapter.extra:
        yield name, Place("copy", "", name)
    for module in adapter.tokens:
        yield f"{module}.trainable_tokens_delta", Place("tokens", module)
    for name in adapter.spare:
        yield name, Place("spare", "original_module", name)


def _digest(path: Path) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with reporting(path, "be read"), reading(path) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return f"sha256:{digest.hexdigest()}"


class View(Mapping[str, Host]):
    """A checkpoint as its adapters see it: with tied names, resized tables and new heads.

    Attributes
    ----------
    aliases : dict of str to str
        Names that are not stored, and the stored tensors they are tied to.
    grown : dict of str to array
        Tensors that adapters bring in another number of rows, in the base's dtype.
    heads : list of str
        Those of them that the base lacks, in the adapter's dtype: see `new_heads`.
    """

    def __init__(self, base: Checkpoint, given: list[Given]) -> None:
        self.base = base
        self.aliases: dict[str, str] = {}
        self.grown: dict[str, Host] = {}
        self.heads: list[str] = []
        groups = {name: group[0] for group in base.tied for name in group}
        for one in given:
            for name in _needs(one.adapter):
                if name not in base and name in groups:
                    self.aliases[name] = groups[name]
        for one in given:
            for name, copy in one.adapter.extra.items():
                self._grow(name, copy, one.label)
        for one in given:
            for name in new_heads(one.adapter, self):
                self.heads.append(name)
                self.grown[name] = to_numpy(one.adapter.extra[name])

    def _grow(self, name: str, copy: Host, label: str) -> None:
        if name not in self or not looks_like_embedding(name.rpartition(".")[0]):
            return
        shape, now = tuple(copy.shape), tuple(self.info(name).shape)
        if shape != now and len(shape) == len(now) and shape[1:] == now[1:]:
            if name in self.grown:
                raise ShapeError(
                    f"{name}: {label} resizes it to {shape[0]} rows and another adapter to "
                    f"{now[0]}: they cannot act together"
                )
            self.grown[name] = astype(copy, self.info(name).dtype)

    def stored(self, name: str) -> Host:
        """Give the base's own tensor behind a name; of a new head, no rows."""
        if name in self.heads:
            return self.grown[name][:0]
        return self.base[self.aliases.get(name, name)]

    def sampled(self, name: str) -> Sampled:
        """Give a stored tensor's samples, alone where it is elsewhere."""
        name = self.aliases.get(name, name)
        info, bits = self.base.info(name), BITS[self.base.info(name).dtype]
        if not self.base.is_remote or bits % 8:
            return sampled(self.base[name])
        taken = [
            (name, one.start * bits // 8, one.stop * bits // 8) for one in runs(prod(info.shape))
        ]
        raw = b"".join(self.base.parts(taken))
        return tuple(info.shape), np.frombuffer(raw, numpy_dtype(info.dtype))

    def __getitem__(self, name: str) -> Host:
        return self.grown[name] if name in self.grown else self.stored(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from self.aliases
        yield from self.heads

    def __len__(self) -> int:
        return len(self.base) + len(self.aliases) + len(self.heads)

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in (self.base, self.aliases, self.heads))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without reading."""
        if name in self.grown:
            array = self.grown[name]
            size = byte_size(array.dtype.name, array.shape) or 0
            return TensorInfo(array.dtype.name, array.shape, 0, size)
        return self.base.info(self.aliases.get(name, name))


def _needs(adapter: Adapter) -> Iterator[str]:
    yield from (f"{module}.weight" for module in (*adapter.sites, *adapter.tokens))
    yield from (f"{module}.bias" for module in adapter.sites)
    yield from adapter.extra


def pruned(given: Given, view: View, kinds: Kinds) -> Given:
    """Leave out what has no place in the base (`strict=False`), and say so."""
    adapter = given.adapter
    known = layout(view, kinds, adapter.config)
    lost = [f"{name}: the base has no such layer" for name in adapter.sites if name not in known]
    lost += [f"{name}: the base has no such tensor" for name in adapter.extra if name not in view]
    lost += [
        f"{module}.weight: the base has no such tensor"
        for module in adapter.tokens
        if f"{module}.weight" not in view
    ]
    if not lost:
        return given
    adapter = adapter.replace(
        sites={k: v for k, v in adapter.sites.items() if k in known},
        extra={k: v for k, v in adapter.extra.items() if k in view},
        tokens={k: v for k, v in adapter.tokens.items() if f"{k}.weight" in view},
    )
    return replace(given, adapter=adapter, lost=(*given.lost, *lost))


def uses(given: Given, sites: Mapping[str, Site], biases: set[str]) -> Iterator[Use]:
    """Tell for every tensor of an adapter which base tensors it goes into."""
    adapter = given.adapter
    for key, place in given.places.items():
        to, why = _taken(given, place, sites, biases), ""
        if place.part == "spare":
            why = f"a second copy, or the value before training, of {place.name}"
        elif not to:
            why = "left out: it has no place in the base"
        yield Use(given.label, key, to, why)
    for name in adapter.spare:
        if name not in given.places:
            yield Use(given.label, name, (), "left out: it belongs to nothing")


def _taken(
    given: Given, place: Place, sites: Mapping[str, Site], biases: set[str]
) -> tuple[str, ...]:
    """Name the base tensors that a tensor of the file goes into."""
    module, _, leaf = place.name.rpartition(".") if place.part == "copy" else (place.module, "", "")
    modules = given.moved.get(module, (module,))
    if place.part == "site":
        hit = [sites[name] for name in modules if name in sites]
        weights = [site.weight for site in hit]
        both = [n for site in hit for n in (site.weight, site.bias_name)]
        return tuple(n for n in both if n in weights or n in biases)
    if place.part == "shared":
        return tuple(site.weight for site in sites.values())
    if place.part == "copy":
        names = [f"{name}.{leaf}" if name else leaf for name in modules]
        return tuple(name for name in names if name in given.adapter.extra)
    if place.part == "tokens":
        return tuple(f"{name}.weight" for name in modules if name in given.adapter.tokens)
    return ()

"""What a merge will do: the adapters that it merges, and what becomes of every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_any.completing import Placed
from peft_any.io.checkpoint import Checkpoint
from peft_any.layer import Site
from peft_any.receipt import Source, Target, Use
from peft_any.selection import saved_whole
from peft_any.surgery.sources import Given, View, uses


@dataclass(frozen=True)
class Touched:
    """Why and how a tensor changes: its site, if any, and the adapters with new values of it."""

    site: Site | None = None
    copies: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A merge, checked and ready to be carried out.

    Attributes
    ----------
    base : Checkpoint
    view : View
    given : list of Given
    placed : list of Placed
        In the same order.
    touched : dict of str to Touched
        By tensor.
    mirrored : dict of str to str
        Stored tensors that take the new value of the one they are tied to.
    added : dict of str to str
        Tensors to store that the base does not, and the one they follow: new heads the last one,
        others the one that they were tied to.
    untied : list of str
        Tensors that are not tied any more.
    warnings : list of str
    """

    base: Checkpoint
    view: View
    given: list[Given]
    placed: list[Placed]
    touched: dict[str, Touched]
    mirrored: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def parts(self, site: Site) -> list[int]:
        """Number the adapters that have parameters at a site."""
        return [i for i, placed in enumerate(self.placed) if site.name in placed.sites]

    def source(self, stored: str) -> str | None:
        """Name the touched tensor whose value a stored one gets; None where it is copied."""
        name = self.mirrored.get(stored, stored)
        return name if name in self.touched else None

    def by(self, tensor: str) -> tuple[str, ...]:
        """Say in words what changes a tensor."""
        how = self.touched[tensor]
        names = [] if how.site is None else [self._method(i) for i in self.parts(how.site)]
        return (*names, *("copy" for _ in how.copies), *("rows" for _ in how.rows))

    def _method(self, index: int) -> str:
        return self.given[index].source.peft_type

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every configured target and what it matched."""
        return tuple(
            target
            for given, placed in zip(self.given, self.placed, strict=True)
            for target in _targets(given, placed)
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The adapters."""
        return tuple(one.source for one in self.given)

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every adapter tensor and where it goes."""
        pairs = zip(self.given, self.placed, strict=True)
        return tuple(use for one, placed in pairs for use in uses(one, placed.sites, self.biases))

    @property
    def biases(self) -> set[str]:
        """Names of the biases that merging changes."""
        return {
            name
            for name, how in self.touched.items()
            if how.site is not None and name != how.site.weight
        }


def _targets(given: Given, placed: Placed) -> Iterator[Target]:
    config = placed.adapter.config
    modules = tuple(placed.sites)
    entries = getattr(config, "target_modules", None)
    if isinstance(entries, list | tuple | set | frozenset):
        for entry in sorted(entries):
            yield Target(given.label, "target_modules", entry, _ending(modules, entry))
    elif modules:
        yield Target(given.label, "target_modules", str(entries or "(the method's own)"), modules)
    for entry in saved_whole(config):
        found = (n.rpartition(".")[0] for n in placed.adapter.extra)
        hits = tuple(dict.fromkeys(m for m in found if f".{entry}." in f".{m}."))
        if hits or entry in (config.modules_to_save or ()):
            yield Target(given.label, "modules_to_save", entry, hits)
    for module in placed.adapter.tokens:
        yield Target(given.label, "trainable_token_indices", module, (module,))


def _ending(modules: tuple[str, ...], entry: str) -> tuple[str, ...]:
    return tuple(m for m in modules if m == entry or m.endswith(f".{entry}"))

"""A model: base weights, adapters by name, and which of them are active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from math import prod
from typing import Any, TypeAlias, overload

from peft_any import attention
from peft_any import parts as several
from peft_any._typing import Array, DTypeLike, Weights
from peft_any.adapter import Adapter
from peft_any.arguments import methods_checked
from peft_any.bank.rows import Bank, BoundRows, Rows
from peft_any.bound import Bound, BoundLayer, Layers, Parameters
from peft_any.checks import finite_number
from peft_any.completing import Placed, dense
from peft_any.dropout import Noise, Seed
from peft_any.errors import ConfigError, nearest
from peft_any.layer import Dense, Kind, Site, narrow, widen
from peft_any.layout import layout
from peft_any.parts import Part
from peft_any.placed import Attachable, attached, given, ported, summed
from peft_any.routed import taken
from peft_any.view import weights as view

Given: TypeAlias = Mapping[str, Any] | None


@methods_checked("__init__", "add", "remove", "activate", "update", "exchange", "unmerge", "alone")
class PeftModel:
    """Base weights with adapters beside them; the base is never changed.

    Parameters
    ----------
    weights : mapping of str to array
        The base's tensors under their checkpoint names, all of one library.
    kinds : mapping of str to Kind or Site, optional
        Layer kinds of modules whose names and shapes do not tell (see `layout.layout`).

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> weights = {"fc.weight": np.ones((3, 4), dtype="float32")}
    >>> model = PeftModel(weights)
    >>> _ = model.add("task", LoraConfig(r=2, target_modules=["fc"]), seed=0)
    >>> print(model.parameters)
    trainable params: 14 || all params: 26 || trainable%: 53.8462
    >>> bool(np.all(model.merge()["fc.weight"] == 1))
    True
    """

    def __init__(self, weights: Weights, *, kinds: Mapping[str, Kind | Site] | None = None) -> None:
        self.weights = weights
        self.kinds = kinds
        self._placed: dict[str, Placed] = {}
        self._active: dict[str, float] = {}
        self._stacked = True
        self._noise: Noise | None = None
        self._routing: dict[str, Any] = {}

    def __repr__(self) -> str:
        named = [f"{name!r}{' (active)' * (name in self._active)}" for name in self]
        return f"<PeftModel of {len(self.weights)} tensors: {', '.join(named) or 'no adapters'}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._placed)

    def __contains__(self, name: object) -> bool:
        return name in self._placed

    def __getitem__(self, name: str) -> Adapter:
        return self._known(name).adapter

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order they were added."""
        return [*self._placed]

    @property
    def active(self) -> dict[str, float]:
        """Active adapters and the weights of their effects, in order."""
        return dict(self._active)

    def add(
        self,
        name: str,
        adapter: Attachable,
        *,
        seed: int = 0,
        dtype: DTypeLike = "float32",
        rederive: bool = False,
    ) -> Adapter:
        """Attach an adapter, or a fresh one of a configuration; the first becomes active.

        Parameters
        ----------
        name : str
            The name to know it by.
        adapter : Adapter or Config
            A loaded adapter, checked against the base, or a configuration to start from.
        seed, dtype
            Of a fresh adapter's initial values.
        rederive : bool
            Redo the decomposition of the base that an unconverted PiSSA or OLoRA file assumes;
            with UniLoRA and TinyLoRA, vouch for weights in the order of the model's layers.

        Raises
        ------
        ConfigError, ShapeError, TargetError
            If the name is taken, or the adapter does not fit the base.
        """
        if name in self._placed:
            raise ConfigError(f"adapter {name!r} is already there: remove it first, or rename")
        placed = attached(
            name, adapter, self.weights, self.kinds, seed=seed, dtype=dtype, rederive=rederive
        )
        self._placed[name] = placed
        if not self._active:
            self.activate(name)
        return placed.adapter

    def remove(self, name: str) -> Adapter:
        """Take an adapter away, and give it."""
        adapter = self._known(name).adapter
        del self._placed[name]
        self._active.pop(name, None)
        return adapter

    def activate(self, names: str | Sequence[str] | Mapping[str, float]) -> None:
        """Choose the adapters that act.

        Parameters
        ----------
        names : str, sequence of str, or mapping of str to float
            One; several, one upon another in this order as in Hugging Face PEFT; or a weighted
            sum of their effects, each against the base.
        """
        weights = {names: 1.0} if isinstance(names, str) else names
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(weights, 1.0)
        for name in weights:
            self._known(name)
        self._active = {name: finite_number(name, weight) for name, weight in weights.items()}
        self._stacked = not isinstance(names, Mapping)

    def update(self, params: Mapping[str, Any]) -> None:
        """Put trained arrays {adapter: {site: {name: array}}} in the place of the adapters' own."""
        self._with(params)  # which refuses what does not fit
        self._placed = self._with(ported(params, self.weights))._placed  # noqa: SLF001 - its own class

    def settled(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Bring arrays that an optimiser has moved to where their methods keep them.

        A training loop calls it before the first step and after every one, as `fit` does; it
        matters to OFT's `coft` and to CPT, whose parameters are drawn back to their bounds.

        Parameters
        ----------
        params : mapping {adapter: {site: {name: array}}}
        """
        return {name: self._known(name).settled(sites) for name, sites in params.items()}

    def exchange(self, name: str, adapter: Adapter) -> None:
        """Put another state of an adapter, a pruned one say, in its place."""
        self._known(name)
        self._placed[name] = attached(name, adapter, self.weights, self.kinds)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let no adapter act within the block."""
        active, self._active = self._active, {}
        try:
            yield
        finally:
            self._active = active

    @property
    def parameters(self) -> Parameters:
        """The trainable arrays of all adapters, with their counts."""
        values = {name: placed.adapter.trainable() for name, placed in self._placed.items()}
        return Parameters(values, sum(prod(w.shape) for w in self.weights.values()))

    def routed(self, **routing: Any) -> PeftModel:
        """Copy whose calls and merge use more than x: ``routed(task_ids=[0, 2])`` for Poly."""
        model = copy(self)
        model._routing = taken(routing, self._placed)  # noqa: SLF001 - its own class
        return model

    @overload
    def bind(self, params: Given = None, *, rng: Seed | None = None) -> Bound: ...

    @overload
    def bind(self, params: Given = None, *, rng: Seed | None = None, rows: Rows) -> BoundRows: ...

    def bind(
        self, params: Given = None, *, rng: Seed | None = None, rows: Rows | None = None
    ) -> Bound | BoundRows:
        """Fix the parameters of the active adapters, and give the adapted layers.

        Parameters
        ----------
        params : mapping {adapter: {site: {name: array}}}, optional
            Stands in for the adapters' own arrays, in part or whole: what a gradient is taken of.
        rng : int or sequence of int, optional
            Seeds the dropout of a training step, ``(seed, step)``; without it nothing is dropped.
        rows : sequence of str, int or None, or integer array, optional
            The adapter of each row of the batches, active or not: see `Bank.bind`.
        """
        model = self._with(params or {})
        model._noise = None if rng is None else Noise.of(rng)  # noqa: SLF001 - its own class
        if rows is not None:
            return Bank(model).bind(rows)
        adapted = self.sites()

        @cache
        def every() -> dict[str, Site]:
            return {**layout(self.weights, self.kinds), **adapted}

        def make(name: str) -> BoundLayer:
            site = adapted[name] if name in adapted else every()[name]
            return model.bound_layer(site)

        trained = {name: model._known(name).read() for name in self._active}  # noqa: SLF001
        within = attention.active(self._placed, self._active)
        return Bound(Layers(adapted, every, make), trained, view.weights(model, make), within)

    def merge(self) -> dict[str, Array]:
        """Give all weights with the active adapters merged, as a new mapping.

        Untouched arrays are the base's own; touched ones are computed in at least float32 and
        rounded once to the base's dtype.
        """
        attention.refuse({name: self[name].config for name in self._active}, "merge()")
        merged = {name: self.replaced(name) for name in self.weights}
        changed = self.adapted()
        for site in self.sites().values():
            new = self.merged_site(site).tensors()
            merged |= {name: array for name, array in new.items() if name in changed}
        return merged

    def unmerge(self, merged: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Give the base weights back: exactly, or computed from merged weights alone.

        Raises
        ------
        Irreversible
            If `merged` is given and an active method cannot be undone.
        """
        if merged is None:
            return dict(self.weights)
        if len(self._active) > 1 and not self._stacked:
            raise ConfigError("a weighted sum cannot be unmerged: call unmerge() without weights")
        out = dict(merged)
        for name in reversed(self._active):
            for site in self._placed[name].sites.values():
                part = self._part(name, site)
                base = dense(out, site)
                (p,), wide = widen([part.params], base)
                out |= narrow(part.config.unmerge(p, wide), base).tensors()
            for tensor in self._placed[name].adapter.replaced(self.weights):
                out[tensor] = self.weights[tensor]
        return out

    @property
    def touched(self) -> list[str]:
        """Names of the tensors that merging the active adapters changes, in the base's order."""
        copies = {t for n in self._active for t in self._placed[n].adapter.replaced(self.weights)}
        names = copies | self.adapted().keys()
        return [name for name in self.weights if name in names]

    def merged_site(self, site: Site) -> Dense:
        """Merge one adapted layer, rounded to the base's dtypes."""
        return several.rounded(self._parts(site), self._base(site), stacked=self._stacked)

    def sites(self) -> dict[str, Site]:
        """Give the layers that the active adapters adapt, by module name."""
        return {
            key: site for name in self._active for key, site in self._placed[name].sites.items()
        }

    def adapted(self) -> dict[str, Site]:
        """Give the layers whose merge changes a tensor, by the tensor's name."""
        found = {}
        for name in self._active:
            placed = self._placed[name]
            for key, site in placed.sites.items():
                found[site.weight] = site
                if placed.configs[key].changes_bias(site):
                    found[site.bias_name] = site
        return found

    def _base(self, site: Site) -> Dense:
        bias = self.replaced(site.bias_name) if site.bias else None
        return Dense.of(self.replaced(site.weight), bias, site)

    def replaced(self, tensor: str) -> Array:
        """Give a base tensor as the active adapters' full copies and token rows leave it."""
        base = self.weights[tensor]
        copies = {
            name: new
            for name in self._active
            if (new := self._placed[name].adapter.replacement(tensor, base)) is not None
        }
        return summed(tensor, base, copies, self._active, stacked=self._stacked)

    def alone(self, name: str | None) -> PeftModel:
        """Copy with one adapter active, or none; the copy's adapters can be exchanged."""
        model = copy(self)
        model._placed = dict(self._placed)  # noqa: SLF001 - its own class
        model._active = {} if name is None else {name: 1.0}  # noqa: SLF001
        model._stacked = True  # noqa: SLF001
        return model

    def bound_layer(self, site: Site) -> BoundLayer:
        """Give one layer with the active adapters."""
        return BoundLayer(self._base(site), self._parts(site), self._stacked)

    def _with(self, params: Mapping[str, Any]) -> PeftModel:
        for name in params:
            self._known(name)
        model = copy(self)
        model._placed = {  # noqa: SLF001 - its own class
            name: given(placed, params.get(name, {})) for name, placed in self._placed.items()
        }
        return model

    def _part(self, name: str, site: Site) -> Part:
        placed = self._placed[name]
        params = placed.params(site, self._routing)
        noise = None if self._noise is None else self._noise.at(f"{name}/{site.name}")
        return Part(placed.configs[site.name], params, self._active[name], noise)

    def _parts(self, site: Site) -> list[Part]:
        active = [name for name in self._active if site.name in self._placed[name].sites]
        return [self._part(name, site) for name in active]

    def _known(self, name: str) -> Placed:
        if name not in self._placed:
            raise ConfigError(f"adapter {name!r} is not here{nearest(name, self._placed)}")
        return self._placed[name]

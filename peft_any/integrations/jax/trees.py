"""A tree's arrays under the names of a checkpoint, and the tree with others in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax

from peft_any.errors import ConfigError
from peft_any.integrations.jax.kernels import Kernel, give
from peft_any.integrations.jax.layers import (
    Layout,
    as_convolution,
    as_is,
    as_kernel,
    as_vector,
    convolution,
    is_mutable,
    is_variable,
    is_weight,
    reader,
    value,
)
from peft_any.layer import Kind, Site
from peft_any.layout import is_named, refuse_unknown
from peft_any.view.products import is_view

Kinds = Mapping[str, Kind | Site]
_WEIGHTS = frozenset({"kernel", "embedding", "scale"})
"""Flax's names of what a checkpoint calls ``weight``."""


@dataclass(frozen=True)
class Place:
    """Where an array of a tree is.

    Attributes
    ----------
    node : int
        Which of the tree's nodes: a layer, a variable or the array itself.
    attribute : str
        The layer's; empty where the node is no layer.
    layout : Layout
    shape : tuple of int
        In the tree.
    lazy : bool
        Whether a stand-in can take its place.
    """

    node: int
    attribute: str
    layout: Layout
    shape: tuple[int, ...]
    lazy: bool


class Tree:
    """A pytree of a model, read.

    Attributes
    ----------
    places : dict of str to Place
        Of its arrays of floats, by their names in a checkpoint.
    sites : dict of str to Site
        The layers of which class or name tells what they are.
    refused : dict of str to (Site, str)
        Layers of a known class that cannot be adapted: of what kind they pass for, and why.
    """

    def __init__(self, tree: Any, kinds: Kinds | None = None) -> None:
        pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_stops)
        self.structure: Any = structure
        self.nodes = [node for _, node in pairs]
        self.places: dict[str, Place] = {}
        self.sites: dict[str, Site] = {}
        self.refused: dict[str, tuple[Site, str]] = {}
        self._kinds = dict(kinds or {})
        loose: dict[str, tuple[int, Any, bool]] = {}
        for i, (path, node) in enumerate(pairs):
            name, read = ".".join(map(_key, path)), reader(node)
            if read is not None:
                found = read(node)
                for last, (attribute, layout) in found.arrays.items():
                    shape = tuple(value(getattr(node, attribute)).shape)
                    self._put(_joined(name, last), Place(i, attribute, layout, shape, found.lazy))
                if found.refused and found.site is not None:
                    self.refused[name] = replace(found.site, name=name), found.refused
                elif found.site is not None:
                    self.sites[name] = replace(found.site, name=name)
            elif is_weight(node):
                self._refuse_twice(name, loose)
                free = not is_variable(node) and _is_free(path)
                loose[name] = i, value(node), free or is_variable(node)
        for name in loose:
            self._loose(name, loose)
        self._refuse_arrays()

    @property
    def kinds(self) -> dict[str, Kind | Site]:
        """What `PeftModel` is to know of the layers."""
        return {**self.sites, **self._kinds}

    def arrays(self, nodes: list[Any] | None = None) -> Arrays:
        """Give the arrays as a checkpoint has them, of this tree or another one's nodes."""
        return Arrays(self.places, self.nodes if nodes is None else nodes)

    def nodes_of(self, tree: Any) -> list[Any]:
        """Take apart another tree of the same structure.

        Raises
        ------
        ConfigError
            If it has another one.
        """
        nodes, structure = jax.tree_util.tree_flatten(tree, is_leaf=_stops)
        if structure != self.structure:
            raise ConfigError(
                "tree: its structure is not that of the tree that was attached to: give the same "
                "tree with other arrays, or attach anew"
            )
        return nodes

    def with_values(self, values: Mapping[str, Any], nodes: list[Any]) -> Any:
        """Make the tree of nodes, with other arrays under some names."""
        new = [*map(_copied, nodes)]
        inside: dict[int, dict[str, Any]] = {}
        for name, given in values.items():
            place = self.places[name]
            made = _fitted(place, given)
            if place.attribute:
                inside.setdefault(place.node, {})[place.attribute] = made
            else:
                old = new[place.node]
                new[place.node] = old.replace(made) if is_variable(old) else made
        for i, attributes in inside.items():
            new[i] = _changed(new[i], attributes)
        return self.structure.unflatten(new)

    def _refuse_arrays(self) -> None:
        """Refuse arrays that no function of an adapter can be called with."""
        for name, place in self.places.items():
            array = _held(place, self.nodes)
            if isinstance(array, jax.ShapeDtypeStruct):
                raise ConfigError(
                    f"{name}: an abstract array cannot be adapted: give the tree of numbers, or "
                    "let JAX trace it: jax.eval_shape(lambda tree: attach_tree(tree, config)"
                    ".params, tree)"
                )
            if explicit := _explicit(array):
                raise ConfigError(
                    f"{name}: lies along the axis {explicit!r} of a mesh whose sharding is "
                    "explicit, of which JAX wants every product told: make the mesh with "
                    "axis_types=(jax.sharding.AxisType.Auto,) for each axis"
                )

    def _put(self, name: str, place: Place) -> None:
        self._refuse_twice(name, self.places)
        self.places[name] = place

    @staticmethod
    def _refuse_twice(name: str, known: Mapping[str, Any]) -> None:
        if name in known:
            raise ConfigError(f"{name}: two arrays of the tree are called so: rename one")

    def _loose(self, name: str, all_of_them: Mapping[str, tuple[int, Any, bool]]) -> None:
        """Put an array that is of no known layer, by its name among its neighbours."""
        i, array, named = all_of_them[name]
        module, _, last = name.rpartition(".")
        neighbours = {k: all_of_them.get(_joined(module, k)) for k in ("bias", "kernel", "weight")}
        layout, renamed = as_is(array), last
        if named and last in _WEIGHTS and neighbours["weight"] is None:
            renamed = "weight"
            bias = None if neighbours["bias"] is None else neighbours["bias"][1]
            site = self._site(module, last, array, bias)
            if site is not None:
                self.sites[module] = site
                if last == "kernel":
                    matrix = site.kind == "Linear"
                    sizes = site.n_in, site.n_out
                    layout = as_kernel(*sizes) if matrix else as_convolution(array)
        elif last == "bias" and named and neighbours["kernel"] is not None:
            layout = as_vector(array)
        lazy = named and not is_variable(self.nodes[i]) and array.ndim == 2
        self._put(_joined(module, renamed), Place(i, "", layout, tuple(array.shape), lazy))

    def _site(self, module: str, last: str, array: Any, bias: Any) -> Site | None:
        """Say what a dict of Flax's holds."""
        key = next((k for k in self._kinds if is_named(k, module)), None)
        given = None if key is None else self._kinds.pop(key)
        if isinstance(given, Site):
            return replace(given, name=module)
        if given is not None:
            refuse_unknown(module, given)
        if last == "embedding" and array.ndim == 2:
            return Site(module, array.shape[0], array.shape[1], "Embedding", bias=False)
        if last != "kernel" or not 2 <= array.ndim <= 5:
            return None
        if array.ndim == 2 or given == "Linear" or getattr(bias, "ndim", 1) > 1:
            n_out = array.shape[-1] if bias is None else prod(bias.shape)
            return Site(module, prod(array.shape) // n_out, n_out, bias=bias is not None)
        *kernel, n_in, n_out = array.shape
        made = convolution(n_in, n_out, tuple(kernel), 1, bias=bias is not None)
        return replace(made, name=module)


@dataclass(frozen=True)
class Info:
    """What is known of a tensor without turning it."""

    shape: tuple[int, ...]


class Arrays(Mapping[str, Any]):
    """A tree's arrays by name, turned to the checkpoint's layout only when they are asked for."""

    def __init__(self, places: Mapping[str, Place], nodes: list[Any]) -> None:
        self._places, self._nodes = places, nodes

    def __getitem__(self, name: str) -> Any:
        place = self._places[name]
        return place.layout.stored(_held(place, self._nodes))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def info(self, name: str) -> Info:
        """Give the shape alone."""
        return Info(self._places[name].layout.shape)


def _held(place: Place, nodes: list[Any]) -> Any:
    node = nodes[place.node]
    return value(getattr(node, place.attribute) if place.attribute else node)


def _explicit(array: Any) -> str | None:
    """Name an axis of a mesh of explicit sharding along which an array is cut."""
    sharding: Any = getattr(array, "sharding", None)
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    if jax.sharding.AxisType.Explicit not in kinds:
        return None
    axes = dict(zip(sharding.mesh.axis_names, kinds, strict=True))
    cut = [
        a for entry in sharding.spec for a in ([entry] if isinstance(entry, str) else entry or ())
    ]
    return next((a for a in cut if axes[a] == jax.sharding.AxisType.Explicit), None)


def _stops(x: Any) -> bool:
    return is_variable(x) or reader(x) is not None


def _key(key: Any) -> str:
    """Name a step of a path."""
    names = (getattr(key, field, None) for field in ("name", "key", "idx"))
    return str(next(name for name in names if name is not None))


def _is_free(path: tuple[Any, ...]) -> bool:
    """Whether an array stands in a dict, a list or a tuple, which the user's own code reads."""
    return not path or not hasattr(path[-1], "name")


def _joined(module: str, last: str) -> str:
    return f"{module}.{last}" if module else last


def _copied(node: Any) -> Any:
    """Copy what could be written to; arrays are shared."""
    return jax.tree.map(lambda x: x, node) if is_mutable(node) else node


def _fitted(place: Place, given: Any) -> Any:
    """Turn a checkpoint's tensor, or its stand-in, to how the tree has it."""
    if place.lazy and is_view(given):
        if place.attribute == "kernel":
            return Kernel(lambda: given.source, place.shape)
        return given if place.layout.straight else given.T
    return place.layout.own(jax.numpy.asarray(given), place.shape)


def _changed(layer: Any, attributes: Mapping[str, Any]) -> Any:
    """Copy a layer with other values of some attributes."""
    pairs, found = jax.tree_util.tree_flatten_with_path(layer)
    structure: Any = found
    made = structure.unflatten(attributes.get(_key(path[0]), leaf) for path, leaf in pairs)
    if any(isinstance(given, Kernel) for given in attributes.values()):
        give(made)
    return made

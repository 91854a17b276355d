"""Nests of dicts, lists and tuples with arrays as leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from typing import Any, TypeAlias

from peft_any._engines import ENGINES
from peft_any._libraries import find_library
from peft_any.backend import dtype_name, is_array

Tree: TypeAlias = Any
"""Nested dicts, lists and tuples of arrays; None is an empty nest."""
Path: TypeAlias = tuple[str | int, ...]


def leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Give the leaves of a nest with the keys that lead to them.

    Examples
    --------
    >>> [*leaves({"a": [1.0, None], "b": {}})]
    [(('a', 0), 1.0)]
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    elif tree is not None:
        yield path, tree


def without(sites: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> dict[str, Any]:
    """Leave arrays out of every site, by their names.

    Examples
    --------
    >>> without({"fc": {"a": 1, "b": 2}}, {"b"})
    {'fc': {'a': 1}}
    """
    return {site: {k: a for k, a in p.items() if k not in names} for site, p in sites.items()}


def first(tree: Tree) -> Any:
    """Give the first leaf of a nest; None if it has none.

    Examples
    --------
    >>> first({"a": [None, (2.0, 3.0)]})
    2.0
    """
    if not isinstance(tree, (dict, list, tuple)):
        return tree
    for value in tree.values() if isinstance(tree, dict) else tree:
        if (found := first(value)) is not None:
            return found
    return None


def tree_map(f: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply a function to every leaf, with those at the same place in other nests.

    Examples
    --------
    >>> tree_map(lambda a, b: a + b, {"a": (1, None)}, {"a": (2, None)})
    {'a': (3, None)}
    """
    if isinstance(tree, dict):
        return {k: tree_map(f, v, *[o[k] for o in others]) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return _as(tree, [tree_map(f, v, *[o[i] for o in others]) for i, v in enumerate(tree)])
    return None if tree is None else f(tree, *others)


def map_with_path(f: Callable[..., Any], tree: Tree, *others: Tree, path: Path = ()) -> Tree:
    """Apply `f(path, leaf, …)` as `tree_map` does.

    Examples
    --------
    >>> map_with_path(lambda path, x: (path, x), {"a": [1]})
    {'a': [(('a', 0), 1)]}
    """
    if isinstance(tree, dict):
        return {
            k: map_with_path(f, v, *(o[k] for o in others), path=(*path, k))
            for k, v in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        items = [
            map_with_path(f, v, *(o[i] for o in others), path=(*path, i))
            for i, v in enumerate(tree)
        ]
        return _as(tree, items)
    return None if tree is None else f(path, tree, *others)


def _as(tree: Tree, items: list[Any]) -> Tree:
    """Make a list, a tuple or a named tuple of items, as another one is."""
    if isinstance(tree, list):
        return items
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def alike(tree: Tree, other: Tree) -> bool:
    """Tell whether two nests have the same keys, and arrays of the same shapes.

    Examples
    --------
    >>> import numpy as np
    >>> alike({"a": np.ones(2)}, {"a": np.zeros(2)}), alike([np.ones(2)], [])
    (True, False)
    """
    if isinstance(tree, dict):
        if not isinstance(other, dict) or tree.keys() != other.keys():
            return False
        return all(map(alike, tree.values(), [other[key] for key in tree]))
    if isinstance(tree, (list, tuple)):
        if not isinstance(other, (list, tuple)) or len(tree) != len(other):
            return False
        return all(map(alike, tree, other))
    return bool(getattr(tree, "shape", None) == getattr(other, "shape", None))


def fused(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make one operation of a function of nests and numbers, where the arrays' library compiles.

    Elsewhere, and where it cannot be compiled because it asks for values, it runs as it is written.

    Examples
    --------
    >>> fused(lambda tree, factor: tree_map(lambda x: factor * x, tree))({"a": 2.0}, 3.0)
    {'a': 6.0}
    """
    made: dict[str, Callable[..., Any]] = {}

    @wraps(f)
    def call(*args: Any) -> Any:
        libraries = (find_library(x) for _, x in leaves(args))
        name = next((library.name for library in libraries if library is not None), "")
        if name not in made:
            made[name] = ENGINES[name].compile(f) if name in ENGINES else f
        return made[name](*args)

    return call


def named(path: Path) -> str:
    """Name a leaf in a message.

    Examples
    --------
    >>> named(("task", "mlp.fc", "lora_A.weight"))
    'task.mlp.fc.lora_A.weight'
    """
    return ".".join(str(key) for key in path if key != "") or "params"


def shape_faults(found: Tree, want: Tree) -> list[str]:
    """Describe what a nest has too much, too little or of other kinds than another.

    Examples
    --------
    >>> import numpy as np
    >>> shape_faults({"a": np.ones(2)}, {"a": np.ones(3), "b": np.ones(1)})
    ['a: (2,) of float64, not (3,) of float64', 'b: missing']
    """
    have, need = dict(leaves(found)), dict(leaves(want))
    faults = []
    for path, leaf in need.items():
        if path not in have:
            faults.append(f"{named(path)}: missing")
            continue
        kinds = [
            f"{tuple(x.shape)} of {dtype_name(x)}" if is_array(x) else ""
            for x in (have[path], leaf)
        ]
        if kinds[0] != kinds[1]:
            faults.append(f"{named(path)}: {kinds[0] or have[path]}, not {kinds[1] or leaf}")
    return faults + [f"{named(path)}: unexpected" for path in have if path not in need]

"""The layers that trees of JAX hold, by class, and how their arrays lie against a checkpoint's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import jax.numpy as jnp

from peft_any._typing import Shape
from peft_any.integrations.jax.kernels import is_usual
from peft_any.layer import CONVOLUTIONS, Kind, Site

_OF_DIMENSIONS: dict[int, Kind] = {n: kind for kind, n in CONVOLUTIONS.items()}
_NN, _NNX = "equinox.nn", "flax.nnx"


@dataclass(frozen=True)
class Layout:
    """How an array lies: the checkpoint's is it, reshaped to `split`, its axes in `order`.

    Where `flat` is given, it is then reshaped to that.

    Examples
    --------
    >>> kernel = Layout((2, 3), (1, 0))
    >>> kernel.stored(jnp.zeros((2, 3))).shape
    (3, 2)
    """

    split: Shape
    order: tuple[int, ...]
    flat: Shape | None = None

    @property
    def straight(self) -> bool:
        """Whether no axes change their places."""
        return self.order == tuple(range(len(self.order)))

    @property
    def shape(self) -> Shape:
        """The checkpoint's shape."""
        return self.turned if self.flat is None else self.flat

    @property
    def turned(self) -> Shape:
        """Sizes of the axes in their order."""
        return tuple(self.split[i] for i in self.order)

    def stored(self, array: Any) -> Any:
        """Give the array as a checkpoint has it."""
        array = _shaped(jnp.asarray(array), self.split)
        return _shaped(array if self.straight else jnp.transpose(array, self.order), self.shape)

    def own(self, stored: Any, shape: Shape) -> Any:
        """Give a checkpoint's array as the tree has it, in the tree's shape."""
        stored = _shaped(stored, self.turned)
        if not self.straight:
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            stored = jnp.transpose(stored, back)
        return _shaped(stored, shape)


def _shaped(array: Any, shape: Shape) -> Any:
    return array if tuple(array.shape) == tuple(shape) else jnp.reshape(array, shape)


def as_is(array: Any) -> Layout:
    """Say that an array lies as the checkpoint's."""
    return Layout(tuple(array.shape), tuple(range(array.ndim)))


def as_vector(array: Any) -> Layout:
    """Say that the checkpoint has an array as a vector."""
    return Layout((prod(array.shape),), (0,))


def as_kernel(n_in: int, n_out: int) -> Layout:
    """Say that inputs come first, of a matrix or of more axes on either side."""
    return Layout((n_in, n_out), (1, 0))


def as_convolution(array: Any) -> Layout:
    """Say that a convolution's window comes first, then inputs, then outputs."""
    n = array.ndim
    return Layout(tuple(array.shape), (n - 1, n - 2, *range(n - 2)))


Arrays: TypeAlias = Mapping[str, tuple[str, Layout]]


@dataclass(frozen=True)
class Described:
    """What a layer is.

    Attributes
    ----------
    arrays : mapping of str to (str, Layout)
        By a tensor's last name in a checkpoint: the layer's attribute, and how it lies.
    site : Site, optional
        Without a name; None where shapes tell enough.
    lazy : bool
        Whether the layer takes a stand-in of its weight.
    refused : str
        Why it cannot be adapted, and the way out, where its class is known and it cannot.
    """

    arrays: Arrays
    site: Site | None = None
    lazy: bool = False
    refused: str = ""


def stacked(shape: Shape, kind: Kind = "Linear") -> Described:
    """Describe layers of one shape in one array."""
    return Described(
        {},
        Site("", 1, 1, kind, (1,) if kind in CONVOLUTIONS else ()),
        refused=f"its array of shape {tuple(shape)} holds several layers of one shape, stacked for "
        "a scan or vmap: attach to a tree of one of them, and bind(params, tree) within the scan",
    )


def value(x: Any) -> Any:
    """Give what a variable of Flax NNX holds; anything else itself."""
    return x.get_value() if is_variable(x) else x


def is_variable(x: Any) -> bool:
    """Whether an object is a variable of Flax NNX."""
    nnx = sys.modules.get(_NNX)
    return nnx is not None and isinstance(x, nnx.Variable)


def is_mutable(x: Any) -> bool:
    """Whether an object is one of Flax NNX's, which can be written to."""
    nnx = sys.modules.get(_NNX)
    return nnx is not None and isinstance(x, (nnx.Variable, nnx.Module))


def is_weight(x: Any) -> bool:
    """Whether a leaf, or what a variable holds, is an array of floats."""
    x = value(x)
    return hasattr(x, "dtype") and hasattr(x, "ndim") and jnp.issubdtype(x.dtype, jnp.floating)


def reader(x: Any) -> Callable[[Any], Described] | None:
    """Give what describes a layer of a known class; None for anything else."""
    for framework, classes in _READERS.items():
        module = sys.modules.get(framework)  # of a framework that is not loaded there is no tree
        if module is not None:
            for name, read in classes.items():
                if isinstance(x, getattr(module, name)):
                    return read if _has_arrays(x) else _sharing
    return None


def _has_arrays(layer: Any) -> bool:
    given = (value(getattr(layer, name, None)) for name in ("weight", "kernel", "embedding"))
    return all(w is None or hasattr(w, "ndim") for w in given)


def _sharing(layer: Any) -> Described:
    kept = type(value(getattr(layer, "weight", None))).__name__
    why = f"its weight is a {kept}, which stands for another layer's: adapt that one"
    return Described({}, Site("", 1, 1, "Conv1d", (1,)), refused=why)


def convolution(n_in: int, n_out: int, kernel: Shape, groups: int, *, bias: bool) -> Site:
    """Describe a convolution by its window."""
    kind = _OF_DIMENSIONS[len(kernel)]
    return Site("", n_in, n_out, kind, tuple(kernel), groups, bias)


def _is_just(layer: Any, framework: str, *names: str) -> bool:
    module = sys.modules[framework]
    return type(layer) in [getattr(module, name) for name in names]


def _named(layer: Any, weight: str, bias: str | None = "bias") -> tuple[Any, Any]:
    """Give a layer's weight and bias as arrays; None where there is none."""
    pair = getattr(layer, weight), None if bias is None else getattr(layer, bias, None)
    return value(pair[0]), value(pair[1])


def _with_bias(weight: tuple[str, Layout], bias: Any) -> Arrays:
    arrays = {"weight": weight}
    return arrays if bias is None else {**arrays, "bias": ("bias", as_vector(bias))}


def _equinox_matrix(layer: Any) -> Described:
    table = isinstance(layer, sys.modules[_NN].Embedding)
    w, b = _named(layer, "weight", None if table else "bias")
    if w.ndim != 2:
        return stacked(w.shape, "Embedding" if table else "Linear")
    n, m = w.shape
    site = Site("", n, m, "Embedding", bias=False) if table else Site("", m, n, bias=b is not None)
    lazy = _is_just(layer, _NN, "Linear", "Embedding")
    return Described(_with_bias(("weight", as_is(w)), b), site, lazy)


def _equinox_convolution(layer: Any) -> Described:
    w, b = _named(layer, "weight")
    if layer.num_spatial_dims not in _OF_DIMENSIONS:
        return _unknown(layer)
    if w.ndim != 2 + layer.num_spatial_dims:
        return stacked(w.shape, _OF_DIMENSIONS[layer.num_spatial_dims])
    n_in, groups = w.shape[1] * layer.groups, layer.groups
    site = convolution(n_in, w.shape[0], w.shape[2:], groups, bias=b is not None)
    return Described(_with_bias(("weight", as_is(w)), b), site)


def _equinox_norm(layer: Any) -> Described:
    w, b = _named(layer, "weight")
    return (
        Described(_with_bias(("weight", as_is(w)), b))
        if getattr(w, "ndim", 0) == 1
        else Described({})
    )


def _flax_matrix(layer: Any) -> Described:
    w, b = _named(layer, "kernel")
    general = isinstance(layer, sys.modules[_NNX].LinearGeneral)
    ends = (len(layer.in_features), len(layer.out_features)) if general else (1, 1)
    if general and layer.batch_axis:
        return _unknown(layer, " with a batch_axis")
    if w.ndim != sum(ends):
        return stacked(w.shape)
    n_in, n_out = prod(w.shape[: ends[0]]), prod(w.shape[ends[0] :])
    site = Site("", n_in, n_out, bias=b is not None)
    lazy = _is_just(layer, _NNX, "Linear", "LinearGeneral") and is_usual(layer)
    return Described(_with_bias(("kernel", as_kernel(n_in, n_out)), b), site, lazy)


def _flax_table(layer: Any) -> Described:
    w, _ = _named(layer, "embedding", None)
    if w.ndim != 2:
        return stacked(w.shape, "Embedding")
    site = Site("", w.shape[0], w.shape[1], "Embedding", bias=False)
    return Described({"weight": ("embedding", as_is(w))}, site)


def _flax_convolution(layer: Any) -> Described:
    w, b = _named(layer, "kernel")
    if len(layer.kernel_size) not in _OF_DIMENSIONS:
        return _unknown(layer)
    if w.ndim != len(layer.kernel_size) + 2:
        return stacked(w.shape, _OF_DIMENSIONS[len(layer.kernel_size)])
    groups = layer.feature_group_count
    site = convolution(w.shape[-2] * groups, w.shape[-1], w.shape[:-2], groups, bias=b is not None)
    return Described(_with_bias(("kernel", as_convolution(w)), b), site)


def _flax_einsum(layer: Any) -> Described:
    """Read which of the kernel's axes go into the sum, and which come out of it."""
    w, b = _named(layer, "kernel")
    left, _, out = (layer.einsum_str or "").partition("->")
    given, _, own = left.partition(",")
    if not own or "." in own or len({*own}) != len(own):
        return _unknown(layer, " whose einsum_str does not name every axis of its kernel once")
    summed = [i for i, axis in enumerate(own) if axis in given and axis not in out]
    kept = [i for i, axis in enumerate(own) if axis in out and axis not in given]
    if len(summed) + len(kept) != len(own) or not summed or not kept:
        return _unknown(layer, " whose kernel has axes that are neither summed over nor new")
    if w.ndim != len(own):
        return stacked(w.shape)
    n_in, n_out = (prod(w.shape[i] for i in axes) for axes in (summed, kept))
    layout = Layout(tuple(w.shape), (*kept, *summed), (n_out, n_in))
    in_place = b is not None and b.size == n_out and [own[i] for i in kept] == [
        axis for axis in out if axis in own
    ]  # fmt: skip
    if b is not None and not in_place:
        return _unknown(layer, " whose bias lies otherwise than the kernel's axes")
    return Described(_with_bias(("kernel", layout), b), Site("", n_in, n_out, bias=b is not None))


def _unknown(layer: Any, how: str = "") -> Described:
    why = f"it is a {type(layer).__name__}{how}, which no adapter knows: leave it out"
    return Described({}, Site("", 1, 1, "Conv1d", (1,)), refused=why)


_READERS: dict[str, dict[str, Callable[[Any], Described]]] = {
    _NN: {
        "Linear": _equinox_matrix,
        "Embedding": _equinox_matrix,
        "Conv": _equinox_convolution,
        "ConvTranspose": _unknown,
        "LayerNorm": _equinox_norm,
        "RMSNorm": _equinox_norm,
        "GroupNorm": _equinox_norm,
    },
    _NNX: {
        "Linear": _flax_matrix,
        "LinearGeneral": _flax_matrix,
        "Embed": _flax_table,
        "Conv": _flax_convolution,
        "ConvTranspose": _unknown,
        "Einsum": _flax_einsum,
    },
}
"""What describes a layer, by its framework and its class."""

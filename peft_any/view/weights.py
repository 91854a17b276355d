"""A bound model's weights by name: arrays, of which the adapted ones are never formed in products.

A forward function over a dict of arrays runs with adapters as it was written. NumPy, torch, JAX
and Dask ask a foreign operand what to do; other libraries take only arrays of their own class, so
the stand-in is made one whose contents are the merged array, formed when they are looked at.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from peft_any._jaxpr import is_tracing
from peft_any._libraries import _of_type, library_of
from peft_any._typing import Array, Shape
from peft_any.backend import astype, creation_device, dtype_name, is_traced, namespace
from peft_any.bound import BoundLayer
from peft_any.errors import TargetError, nearest
from peft_any.layer import Site
from peft_any.view import products
from peft_any.view.products import is_view, plain, refusal
from peft_any.view.source import HOLDING, Held, Source, at_zero

_ASKING = frozenset({"numpy", "cupy", "torch", "jax", "dask"})
"""Libraries whose operators give way to a foreign operand."""
_RENAMED = {"power": "pow", "true_divide": "divide", "absolute": "abs", "conjugate": "conj"}
"""NumPy's ufuncs by the standard's names, where they differ."""


class AdaptedWeight:
    """An array-like that stands for the merged weight of an adapted layer.

    Products over the layer's inputs (``x @ w.T``, ``w @ x``, `matmul`, `dot`, `tensordot`, torch's
    `linear`) and rows of an embedding's table apply the adapted layer without its bias, in the
    dtypes of `BoundLayer`; whatever else is done with it is done with `merged`.
    """

    _stands_for_weight: ClassVar[bool] = True
    source: Source | Held
    flipped: bool

    @property
    def merged(self) -> Any:
        """The merged weight, made once; read-only in NumPy."""
        w = self.source.merged
        return namespace(w).matrix_transpose(w) if self.flipped != self._stored_flipped else w

    @property
    def _stored_flipped(self) -> bool:
        return self.source.site.kind in ("Conv1D", "Embedding")

    @property
    def shape(self) -> Shape:
        """The weight's shape, in the checkpoint's layout."""
        shape = tuple(self.source.stored.shape)
        return shape if self.flipped == self._stored_flipped else shape[::-1]

    ndim = property(lambda self: len(self.shape))
    dtype = property(lambda self: self.source.stored.dtype)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return int(self.source.site.width * self.source.site.n_out)

    @property
    def device(self) -> Any:
        """The device of the base's weight."""
        return creation_device(self.source.stored)

    @property
    def T(self) -> Any:  # noqa: N802 - the standard's name
        """The transposed weight."""
        if self.ndim != 2:
            w = self.merged
            return namespace(w).permute_dims(w, tuple(range(w.ndim))[::-1])
        return _stand_in(self.source, flipped=not self.flipped)

    @property
    def mT(self) -> Any:  # noqa: N802 - the standard's name
        """The transposed weight."""
        return self.T if self.ndim == 2 else namespace(self.merged).matrix_transpose(self.merged)

    def t(self) -> Any:
        """Transpose, as torch spells it."""
        return self.T

    def transpose(self, *axes: Any) -> Any:
        """Transpose, as NumPy and torch spell it."""
        exchanging = hasattr(self.source.stored, "mm")  # torch's two axes are exchanged
        turn = products.exchange if exchanging else products.transpose
        turned = turn(self, *axes)
        return self.merged.transpose(*axes) if turned is NotImplemented else turned

    contracted = products.contracted

    def dot(self, other: Any) -> Any:
        """Multiply, as NumPy spells it."""
        y = products.dot(self, other)
        return self.merged.dot(plain(other)) if y is NotImplemented else y

    def __matmul__(self, other: Any) -> Any:
        return products.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return products.matmul(other, self)

    def __getitem__(self, key: Any) -> Any:
        found = products.rows(self, key)
        return self.merged[plain(key)] if found is NotImplemented else found

    def __setitem__(self, key: Any, value: Any) -> None:
        raise refusal(self, "item assignment")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("source", "flipped", "to_dask_array"):
            if name == "to_dask_array" and hasattr(self.source.stored, "dask"):
                return lambda: self.merged
            raise AttributeError(name)
        if name.endswith("_") and not name.startswith("_"):
            raise refusal(self, name)
        known = type(self).__jax_array__ is not None
        return getattr(self.for_jax if known else self.merged, name)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return namespace(*self.source.arrays)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(map(is_view, kwargs.get("out", ()))) or (method == "at" and is_view(inputs[0])):
            raise refusal(self, ufunc.__name__)
        f = ufunc if method == "__call__" else getattr(ufunc, method)
        merged = self.merged if ufunc.__name__ not in products.OF_VIEWS else None
        if method != "__call__":
            return f(*plain(inputs), **kwargs)
        if merged is not None and getattr(type(merged), "__array_ufunc__", None) is None:
            f = getattr(namespace(merged), _RENAMED.get(f.__name__, f.__name__))
        return products.call(f, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return products.call(func, args, kwargs)

    @classmethod
    def __tape_function__(cls, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        return products.call(func, args, kwargs, name=name)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        return products.call(func, args, kwargs, torch_like=True)

    @property
    def __jax_array__(self) -> Any:
        # JAX's operators look for this before they ask the other operand, which knows better
        if sys._getframe(1).f_code.co_name.startswith(("_operator_", "deferring_")):  # noqa: SLF001
            raise AttributeError
        return lambda: self.for_jax

    @property
    def for_jax(self) -> Any:
        """What JAX's functions take: the array, or an operation of what is being traced."""
        if not is_tracing() or self.ndim != 2:
            return self.merged
        turned = self.flipped != self._stored_flipped
        source: Any = self.source
        w = source.symbol(lambda s: _stand_in(s, flipped=self._stored_flipped))
        return namespace(w).matrix_transpose(w) if turned else w

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np  # noqa: PLC0415 - host data, asked for by NumPy

        if copy is None:  # which NumPy 1.26's array() does not know
            return np.asarray(self.merged, dtype=dtype)
        return np.array(self.merged, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        w = self.merged
        return (w[i, ...] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<adapted weight {self.source.site.weight} of shape {self.shape}, {self.dtype}>"

    __hash__ = object.__hash__


def _install() -> None:
    two = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]
    two += ["and", "or", "xor", "lshift", "rshift"]
    for name in two:
        f = getattr(operator, f"__{name}__")
        setattr(AdaptedWeight, f"__{name}__", lambda self, other, f=f: f(self.merged, plain(other)))
        setattr(
            AdaptedWeight, f"__r{name}__", lambda self, other, f=f: f(plain(other), self.merged)
        )
    for name in [*two, "matmul"]:
        setattr(AdaptedWeight, f"__i{name}__", _no_writing)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        f = getattr(operator, f"__{name}__")
        setattr(AdaptedWeight, f"__{name}__", lambda self, other, f=f: f(self.merged, plain(other)))
    for name in ("neg", "pos", "abs", "invert"):
        f = getattr(operator, f"__{name}__")
        setattr(AdaptedWeight, f"__{name}__", lambda self, f=f: f(self.merged))
    for kind in (bool, float, int, complex):
        setattr(AdaptedWeight, f"__{kind.__name__}__", lambda self, f=kind: f(self.merged))


def _no_writing(self: AdaptedWeight, other: Any) -> Any:  # noqa: ARG001
    raise refusal(self, "in-place arithmetic")


_install()
_classes: dict[type, type] = {}


def _class_of(like: Array) -> type:
    """Make the class of stand-ins for arrays of a class."""
    kind = type(like)
    if kind not in _classes:
        library = library_of(like)
        body: dict[str, Any] = {"__module__": __name__}
        bases: tuple[type, ...] = (AdaptedWeight,)
        if library.name not in _ASKING:
            bases, body["__module__"] = (AdaptedWeight, kind), kind.__module__
        if library.name in ("cupy", "torch", "jax", "strict"):
            body["__array_ufunc__"] = None  # NumPy's operators give way to the reflected ones
        if where := HOLDING.get(library.name):
            body[where] = property(lambda w: _stand_in(Held(w.source), flipped=w.flipped))
        if library.name != "jax":
            body["__jax_array__"] = None
        made = type("AdaptedWeight", bases, body)
        if library.name == "jax":
            # JAX's jitted functions take no foreign arrays but trees: a tree of the merged one
            library.module.tree_util.register_pytree_node(
                made, lambda w: ((w.for_jax,), None), lambda _, merged: merged[0]
            )
        _of_type[made] = library
        _classes[kind] = made
    return _classes[kind]


def _stand_in(source: Source | Held, *, flipped: bool) -> Any:
    """Make the stand-in of a weight, or of that weight transposed."""
    known = [a for a in source.arrays if library_of(a).name]
    recorded = [a for a in source.arrays if not library_of(a).name]
    kind = _class_of((recorded or known)[0])
    w: Any = object.__new__(kind)
    w.source, w.flipped = source, flipped
    return w


class Weights(Mapping[str, Any]):
    """All tensors of a bound model by their checkpoint names.

    Parameters
    ----------
    tensors : mapping of str to callable
        How each is made.

    Examples
    --------
    >>> w = Weights({"fc.weight": lambda: 1, "fc.bias": lambda: 2})
    >>> w.nested()
    {'fc': {'weight': 1, 'bias': 2}}
    """

    def __init__(self, tensors: Mapping[str, Callable[[], Any]]) -> None:
        self._tensors = tensors
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            if name not in self._tensors:
                raise TargetError(f"{name}: no such tensor{nearest(name, self._tensors)}")
            made = self._tensors[name]()
            if is_traced(made):
                return made
            self._made[name] = made
        return self._made[name]

    def __repr__(self) -> str:
        return f"<Weights: {len(self)} tensors>"

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __setitem__(self, name: str, value: Any) -> None:
        raise refusal(None, f"weights[{name!r}] = …")

    def nested(self) -> dict[str, Any]:
        """Give the tensors as nested dicts, by the parts of their dotted names.

        Raises
        ------
        TargetError
            If a name is also the beginning of another.
        """
        tree: dict[str, Any] = {}
        for name in self:
            *path, last = name.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
                if not isinstance(node, dict):
                    raise TargetError(f"{name}: cannot be nested: {part} is itself a tensor")
            if last in node:
                raise TargetError(f"{name}: cannot be nested: other names begin with it")
            node[last] = self[name]
        return tree


def weights(model: Any, make: Callable[[str], BoundLayer]) -> Weights:
    """Give the tensors of a model whose parameters are fixed."""
    adapted = model.adapted()

    def maker(name: str) -> Callable[[], Any]:
        site = adapted.get(name)
        return lambda: model.replaced(name) if site is None else _adapted(model, make, name, site)

    return Weights({name: maker(name) for name in model.weights})


def _adapted(model: Any, make: Callable[[str], BoundLayer], name: str, site: Site) -> Any:
    """Make the stand-in of an adapted weight, or the adapted bias."""
    if name == site.weight:
        source = Source(lambda: make(site.name), site)
        return _stand_in(source, flipped=site.kind in ("Conv1D", "Embedding"))
    bound = make(site.name)
    if site.is_conv:
        return model.merged_site(site).bias
    return astype(at_zero(bound), dtype_name(bound.base.bias))

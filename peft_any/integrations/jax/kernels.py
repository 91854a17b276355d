"""Kernels of Flax's layers that are never formed: the layer's own product applies the adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peft_any.view.source import Source

_PROMOTE = "flax.nnx.nn.dtypes"


@jax.tree_util.register_pytree_node_class
class Kernel:
    """An adapted kernel in its layer's shape, inputs first; a pytree of what it is made of.

    Parameters
    ----------
    make : callable
        Gives the source, when it is asked for.
    shape : tuple of int
    """

    def __init__(self, make: Callable[[], Source], shape: tuple[int, ...]) -> None:
        self._make, self.shape = make, shape
        self._opened: tuple[Callable[[Any], Source], Any] | None = None

    @property
    def source(self) -> Source:
        """The layer without its bias."""
        if not hasattr(self, "_source"):
            self._source = self._make()
        return self._source

    @property
    def dtype(self) -> Any:
        """The base's."""
        return self.source.stored.dtype

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def __getitem__(self, key: Any) -> Any:
        return self if key is Ellipsis else self.__jax_array__()[key]

    def __jax_array__(self) -> Any:
        return jnp.reshape(jnp.asarray(self.source.merged).T, self.shape)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Give the arrays, and what makes a kernel of them."""
        if self._opened is None:
            self._opened = self.source.opened()
        make, nest = self._opened
        return (nest,), (make, self.shape)

    @classmethod
    def tree_unflatten(cls, how: Any, nest: tuple[Any]) -> Kernel:
        """Make it of whatever stands for arrays, which is not looked at."""
        make, shape = how
        kernel = cls(lambda: make(nest[0]), shape)
        kernel._opened = make, nest[0]
        return kernel


def is_usual(layer: Any) -> bool:
    """Whether a linear layer of Flax multiplies as Flax does where nothing else is asked for."""
    products = lax.dot_general, None
    usual = getattr(layer, "dot_general_cls", None) is None and layer.dot_general in products
    return usual and layer.promote_dtype is sys.modules[_PROMOTE].promote_dtype


def give(layer: Any) -> None:
    """Let a linear layer of Flax multiply by a kernel."""
    layer.promote_dtype, layer.dot_general = promoted, product


def promoted(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Bring arrays to one dtype as Flax does; a kernel stays, and computes in whatever it gets."""
    plain: Any = sys.modules[_PROMOTE].promote_dtype
    if not any(isinstance(x, Kernel) for x in args):
        return plain(args, dtype=dtype, inexact=inexact)
    if dtype is None:
        dtype = jnp.result_type(*(x.dtype for x in args if x is not None))
    rest = iter(plain(tuple(x for x in args if not isinstance(x, Kernel)), dtype=dtype))
    return tuple(x if isinstance(x, Kernel) else next(rest) for x in args)


def product(x: Any, kernel: Any, dimension_numbers: Any, **asked: Any) -> Any:
    """Contract as `lax.dot_general`; whatever is asked for beside takes the merged kernel."""
    (left, _), (batch, _) = dimension_numbers
    if not isinstance(kernel, Kernel):
        return lax.dot_general(x, kernel, dimension_numbers, **asked)
    if batch or any(value is not None for value in asked.values()):
        merged = kernel.__jax_array__().astype(x.dtype)
        return lax.dot_general(x, merged, dimension_numbers, **asked)
    n = len(left)
    x = jnp.moveaxis(x, left, range(x.ndim - n, x.ndim))
    lead = x.shape[: x.ndim - n]
    y: Any = kernel.source.layer(jnp.reshape(x, (*lead, -1)))
    return jnp.reshape(y, (*lead, *kernel.shape[n:]))

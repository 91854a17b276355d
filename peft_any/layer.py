"""What is adapted: every kind of layer seen as one dense matrix (n_out, width)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

from peft_any._typing import Array, Params
from peft_any.backend import (
    astype,
    compute_dtype,
    dense,
    dtype_name,
    is_array,
    is_differentiated,
    is_floating,
    namespace,
)
from peft_any.errors import ConfigError, ShapeError
from peft_any.site import CONVOLUTIONS as CONVOLUTIONS
from peft_any.site import EXPERTS as EXPERTS
from peft_any.site import KINDS as KINDS
from peft_any.site import MATRICES as MATRICES
from peft_any.site import Kind as Kind
from peft_any.site import Site as Site
from peft_any.tape.space import Space


def linear(x: Array, w: Array, b: Array | None = None, plus: Array | None = None) -> Array:
    """Apply a dense layer: ``x @ wᵀ + b + plus``.

    Parameters
    ----------
    x : array (..., n_in), floating, or (...) of integers
        Integers stand for one-hot rows, as the input of an embedding.
    w : array (n_out, n_in)
    b : array (n_out,), optional
    plus : array (..., n_out), optional

    Returns
    -------
    array (..., n_out)

    Examples
    --------
    >>> import numpy as np
    >>> w = np.asarray([[1.0, 2.0], [3.0, 4.0]])
    >>> linear(np.asarray([1.0, 1.0]), w)
    array([3., 7.])
    >>> linear(np.asarray([1]), w)
    array([[2., 4.]])
    """
    xp = namespace(x, w, b, plus)
    if is_floating(x):
        if isinstance(xp, Space):  # which records it as one step
            return xp._linear(x, w, b, plus)  # noqa: SLF001
        return dense(x, w, b, plus)
    y: Array = xp.reshape(xp.take(w.T, xp.reshape(x, (-1,)), axis=0), (*x.shape, w.shape[0]))
    y = y if b is None else y + b
    return y if plus is None else y + plus


def flat(a: Array) -> Array:
    """View an array as a matrix: the first axis against all the others.

    Examples
    --------
    >>> import numpy as np
    >>> flat(np.zeros((4, 3, 2, 2))).shape
    (4, 12)
    """
    if a.ndim == 2:
        return a
    return namespace(a).reshape(a, (a.shape[0], prod(a.shape[1:])))


def stack(a: Array, site: Site) -> Array:
    """View the rows of all experts, one below the other, as (experts, rows, …)."""
    return namespace(a).reshape(a, (site.groups, a.shape[0] // site.groups, -1))


def each_expert(x: Array, w: Array) -> Array:
    """Apply every expert to its own part of the input.

    Parameters
    ----------
    x : array (..., experts · n_in)
    w : array (experts, n_out, n_in)

    Returns
    -------
    array (..., experts · n_out)

    Examples
    --------
    >>> import numpy as np
    >>> each_expert(np.asarray([1.0, 1.0, 2.0]), np.asarray([[[1.0]], [[3.0]], [[5.0]]]))
    array([ 1.,  3., 10.])
    """
    xp, (experts, n_out, n_in) = namespace(x, w), w.shape
    parts = xp.reshape(x, (*x.shape[:-1], experts, 1, n_in))
    return xp.reshape(parts @ xp.matrix_transpose(w), (*x.shape[:-1], experts * n_out))


def check_input(x: Array, site: Site) -> None:
    """Check that a layer can be called on an array.

    Raises
    ------
    ShapeError
        If its last axis is not the layer's input, or it holds integers and is no embedding's.
    """
    if not is_floating(x):
        if site.kind != "Embedding":
            raise ShapeError(
                f"{site.name}: {dtype_name(x)} values cannot go into a {site.kind} layer: it "
                "takes floats, and embeddings alone take token numbers"
            )
    elif tuple(x.shape[-1:]) != (site.reads,):
        raise ShapeError(
            f"{site.name}: an input of shape {tuple(x.shape)} cannot go into the layer: it takes "
            f"(..., {site.reads})"
        )


class Layer(Protocol):
    """A layer that can be called: a `Dense`, or one that already carries an adapter."""

    @property
    def weight(self) -> Array:
        """The matrix (n_out, width)."""
        ...

    @property
    def bias(self) -> Array | None:
        """The bias (n_out,), if there is one."""
        ...

    @property
    def adapted(self) -> bool:
        """Whether the layer already carries an adapter."""
        ...

    @property
    def original(self) -> Array:
        """The weight before any adapter: what DoRA measures when adapters are stacked."""
        ...

    @property
    def original_bias(self) -> Array | None:
        """The bias before any adapter."""
        ...

    @property
    def site(self) -> Site:
        """Where the layer sits."""
        ...

    def __call__(self, x: Array) -> Array:
        """Apply the layer."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A layer as a flat matrix, whatever its kind.

    Attributes
    ----------
    weight : array (n_out, width)
        A `Conv1D`'s and an `Embedding`'s stored matrix transposed, a convolution's kernel
        flattened to (n_out, n_in/groups · kernel), a norm's weights as a column (n_out, 1),
        experts one below the other.
    bias : array (n_out,) or None
    site : Site
    unadapted : array (n_out, width), optional
        The weight before any adapter, where `weight` already carries some.
    unadapted_bias : array (n_out,), optional
        Likewise the bias.

    Examples
    --------
    >>> import numpy as np
    >>> table = np.arange(6.0).reshape(3, 2)
    >>> Dense.of(table, None, Site("wte", 3, 2, "Embedding"))(np.asarray([2]))
    array([[4., 5.]])
    """

    weight: Array
    bias: Array | None
    site: Site
    unadapted: Array | None = None
    unadapted_bias: Array | None = None

    @property
    def adapted(self) -> bool:
        """Whether an adapter was merged into this layer."""
        return self.unadapted is not None

    @property
    def original(self) -> Array:
        """The weight before any adapter was merged into this layer."""
        return self.weight if self.unadapted is None else self.unadapted

    @property
    def sure_bias(self) -> Array:
        """The bias, or a refusal to merge into a layer without one."""
        if self.bias is None:
            raise ConfigError(
                f"{self.site.name}: a bias correction cannot be merged: the base layer has no "
                "bias; apply the adapter without merging"
            )
        return self.bias

    @property
    def original_bias(self) -> Array | None:
        """The bias before any adapter was merged into this layer."""
        return self.bias if self.unadapted is None else self.unadapted_bias

    @classmethod
    def of(cls, weight: Array, bias: Array | None, site: Site) -> Dense:
        """See a stored weight, in the checkpoint's own layout, as a flat matrix.

        Raises
        ------
        ShapeError
            If weight or bias do not have the site's shapes.
        """
        if tuple(weight.shape) != site.stored_shape:
            raise ShapeError(
                f"{site.name}: a weight of shape {tuple(weight.shape)} cannot be a {site.kind} "
                f"of {site.n_in} inputs and {site.n_out} outputs: it has shape {site.stored_shape}"
            )
        if bias is not None and tuple(bias.shape) != (site.n_out,):
            raise ShapeError(
                f"{site.name}: a bias of shape {tuple(bias.shape)} cannot serve {site.n_out} "
                f"outputs: it has shape {(site.n_out,)}"
            )
        if site.kind in ("Conv1D", "Embedding", "TransposedExperts"):
            weight = namespace(weight).matrix_transpose(weight)
        if site.kind in EXPERTS:
            weight = namespace(weight).reshape(weight, (site.n_out, site.width))
        return cls(flat(weight), bias, site)

    @classmethod
    def formed(cls, layer: Layer) -> Dense:
        """See any layer as a matrix, which is formed here if it carries an adapter."""
        if isinstance(layer, Dense):
            return layer
        before = layer.original, layer.original_bias
        return cls(layer.weight, layer.bias, layer.site, *before)

    def stored(self) -> Array:
        """Give the weight in the checkpoint's layout: the inverse of `of`."""
        xp = namespace(self.weight)
        if self.site.kind in ("Conv1D", "Embedding"):
            return xp.matrix_transpose(self.weight)
        if self.site.kind in EXPERTS:
            weight = stack(self.weight, self.site)
            return weight if self.site.kind == "Experts" else xp.matrix_transpose(weight)
        if self.site.is_conv or self.site.kind == "Norm":
            weight = xp.reshape(self.weight, self.site.stored_shape)
            return weight
        return self.weight

    def tensors(self) -> dict[str, Array]:
        """Give weight and bias under their checkpoint names and in its layout."""
        found = {self.site.weight: self.stored()}
        return found if self.bias is None else {**found, self.site.bias_name: self.bias}

    def replace(self, **changes: Any) -> Dense:
        """Copy with another weight or bias."""
        return replace(self, **changes)

    def __call__(self, x: Array) -> Array:
        """Apply the layer; a convolution takes flattened patches (..., width)."""
        if self.site.kind == "Norm":
            y: Array = x * self.weight[:, 0]
            return y if self.bias is None else y + self.bias
        if self.site.kind in EXPERTS:
            return each_expert(x, stack(self.weight, self.site))
        return linear(x, self.weight, self.bias)


def widen(params: Sequence[Params], base: Dense) -> tuple[list[Params], Dense]:
    """Bring parameters and base to one compute dtype: float32, or float64 where either has it.

    Examples
    --------
    >>> import numpy as np
    >>> base = Dense(np.ones((1, 1), dtype="float16"), None, Site("fc", 1, 1))
    >>> str(widen([], base)[1].weight.dtype)
    'float32'
    """
    floats = [{k: v for k, v in p.items() if is_array(v) and is_floating(v)} for p in params]
    name = compute_dtype(base.weight, *(v for f in floats for v in f.values()))
    pairs = zip(params, floats, strict=True)

    def wide(array: Array | None) -> Any:
        return None if array is None else astype(array, name)

    return [p | {k: wide(v) for k, v in f.items()} for p, f in pairs], Dense(
        wide(base.weight), wide(base.bias), base.site, wide(base.unadapted),
        wide(base.unadapted_bias),
    )  # fmt: skip


def narrow(merged: Dense, like: Dense) -> Dense:
    """Round a merged layer, once, to the dtypes of the base it came from."""
    bias = merged.bias
    if bias is not None and like.bias is not None:
        bias = astype(bias, dtype_name(like.bias))
    return Dense(astype(merged.weight, dtype_name(like.weight)), bias, merged.site)


def merged_for_calls(config: Any, p: Params, base: Layer) -> Params:
    """Add the merged layer to a method's parameters, of which one product costs less than several.

    Not where a derivative is asked for: a step of training merges for one call alone.
    """
    if any(map(is_differentiated, p.values())):
        return p
    return {**p, "merged": config.merge(p, Dense.formed(base))}

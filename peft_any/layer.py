"""What is adapted: every kind of layer seen as one dense matrix (n_out, width)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Protocol, TypeAlias

from peft_any._typing import Array, Params, Shape
from peft_any.backend import astype, compute_dtype, dtype_name, is_array, is_floating, namespace
from peft_any.errors import ConfigError, ShapeError
from peft_any.tape.products import dense

Kind: TypeAlias = Literal[
    "Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Norm"
]
"""torch's class names; `Conv1D` is transformers' transposed linear layer (`fan_in_fan_out`),
`MultiheadAttention` the packed `in_proj_weight` of torch's attention, and `Norm` what follows a
normalisation, w ⊙ x + b, of as many groups as it has channels."""

KINDS: frozenset[Kind] = frozenset(Kind.__args__)  # type: ignore[attr-defined]
MATRICES: frozenset[Kind] = KINDS - {"Norm"}
CONVOLUTIONS: dict[Kind, int] = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}


@dataclass(frozen=True)
class Site:
    """Where an adapter sits: a module of the base, its sizes and its kind.

    Parameters
    ----------
    name : str
        Dotted module path, as in the base checkpoint without ``.weight``.
    n_in, n_out : int
        in/out features; in/out channels of a convolution; an embedding's rows (tokens) and
        columns (width).
    kind : Kind
        The layer's class.
    kernel : tuple of int
        A convolution's kernel; empty otherwise.
    groups : int
        A convolution's groups.
    bias : bool
        Whether the layer has a bias.

    Examples
    --------
    >>> Site("conv", 6, 8, "Conv2d", kernel=(3, 3)).width
    54
    >>> Site("wte", 100, 16, "Embedding").stored_shape
    (100, 16)
    """

    name: str
    n_in: int
    n_out: int
    kind: Kind = "Linear"
    kernel: Shape = ()
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"{self.name}: layer kind {self.kind!r} is not one of {sorted(KINDS)}"
            )
        if len(self.kernel) != CONVOLUTIONS.get(self.kind, 0):
            raise ShapeError(
                f"{self.name}: a {self.kind} cannot have the kernel {self.kernel}: it has "
                f"{CONVOLUTIONS.get(self.kind, 0)} spatial dimensions"
            )
        if self.groups < 1 or self.n_in % self.groups or self.n_out % self.groups:
            raise ShapeError(
                f"{self.name}: {self.groups} groups cannot divide {self.n_in} inputs and "
                f"{self.n_out} outputs"
            )

    @property
    def width(self) -> int:
        """Columns of the flat weight: inputs one output reads, kernel positions included."""
        return self.n_in // self.groups * prod(self.kernel)

    @property
    def reads(self) -> int:
        """Length of the input's last axis."""
        return self.n_in if self.kind == "Norm" else self.width

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return self.kind in CONVOLUTIONS

    @property
    def weight(self) -> str:
        """Name of the weight tensor in the base checkpoint."""
        return self.name + self._sep + ("in_proj_weight" if self._packed else "weight")

    @property
    def bias_name(self) -> str:
        """Name of the bias tensor in the base checkpoint."""
        return self.name + self._sep + ("in_proj_bias" if self._packed else "bias")

    @property
    def _packed(self) -> bool:
        return self.kind == "MultiheadAttention"

    @property
    def _sep(self) -> str:
        return "." if self.name else ""

    @property
    def stored_shape(self) -> Shape:
        """Shape of the weight tensor in the base checkpoint."""
        if self.kind in ("Conv1D", "Embedding"):
            return (self.n_in, self.n_out)
        if self.kind == "Norm":
            return (self.n_out,)
        return (self.n_out, self.n_in // self.groups, *self.kernel)


def linear(x: Array, w: Array, b: Array | None = None) -> Array:
    """Apply a dense layer: ``x @ wᵀ + b``.

    Parameters
    ----------
    x : array (..., n_in), floating, or (...) of integers
        Integers stand for one-hot rows, as the input of an embedding.
    w : array (n_out, n_in)
    b : array (n_out,), optional

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
    xp = namespace(x, w, b)
    if is_floating(x):
        own = getattr(xp, "_linear", None)  # a tape's, which records it as one step
        return dense(x, w, b) if own is None else own(x, w, b)  # type: ignore[no-any-return]
    y: Array = xp.reshape(xp.take(w.T, xp.reshape(x, (-1,)), axis=0), (*x.shape, w.shape[0]))
    return y if b is None else y + b


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
    flattened: Array = namespace(a).reshape(a, (a.shape[0], prod(a.shape[1:])))
    return flattened


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
    def original(self) -> Array:
        """The weight before any adapter: what DoRA measures when adapters are stacked."""
        ...

    @property
    def site(self) -> Site:
        """Where the layer sits."""
        ...

    def __call__(self, x: Array) -> Array:
        """Apply the layer."""
        ...


@dataclass(frozen=True)
class Dense:
    """A layer as a flat matrix, whatever its kind.

    Attributes
    ----------
    weight : array (n_out, width)
        A `Conv1D`'s and an `Embedding`'s stored matrix transposed, a convolution's kernel
        flattened to (n_out, n_in/groups · kernel), a norm's weights as a column (n_out, 1).
    bias : array (n_out,) or None
    site : Site
    unadapted : array (n_out, width), optional
        The weight before any adapter, where `weight` already carries some.

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

    @property
    def original(self) -> Array:
        """The weight before any adapter was merged into this layer."""
        return self.weight if self.unadapted is None else self.unadapted

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
        if site.kind in ("Conv1D", "Embedding"):
            weight = namespace(weight).matrix_transpose(weight)
        return cls(flat(weight), bias, site)

    def stored(self) -> Array:
        """Give the weight in the checkpoint's layout: the inverse of `of`."""
        xp = namespace(self.weight)
        if self.site.kind in ("Conv1D", "Embedding"):
            weight: Array = xp.matrix_transpose(self.weight)
            return weight
        if self.site.is_conv or self.site.kind == "Norm":
            weight = xp.reshape(self.weight, self.site.stored_shape)
            return weight
        return self.weight

    def replace(self, **changes: Any) -> Dense:
        """Copy with another weight or bias."""
        return replace(self, **changes)

    def __call__(self, x: Array) -> Array:
        """Apply the layer; a convolution takes flattened patches (..., width)."""
        if self.site.kind == "Norm":
            y: Array = x * self.weight[:, 0]
            return y if self.bias is None else y + self.bias
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
    return [p | {k: astype(v, name) for k, v in f.items()} for p, f in pairs], Dense(
        astype(base.weight, name),
        None if base.bias is None else astype(base.bias, name),
        base.site,
        None if base.unadapted is None else astype(base.unadapted, name),
    )


def narrow(merged: Dense, like: Dense) -> Dense:
    """Round a merged layer, once, to the dtypes of the base it came from."""
    bias = merged.bias
    if bias is not None and like.bias is not None:
        bias = astype(bias, dtype_name(like.bias))
    return Dense(astype(merged.weight, dtype_name(like.weight)), bias, merged.site)

"""Where an adapter sits: a layer's name, kind and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any, Literal, TypeAlias, cast, get_args

from peft_any._typing import Shape
from peft_any.errors import ConfigError, ShapeError

Kind: TypeAlias = Literal[
    "Linear",
    "Conv1D",
    "Embedding",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "MultiheadAttention",
    "Norm",
    "Experts",
    "TransposedExperts",
]
"""torch's class names; `Conv1D` is transformers' transposed linear layer (`fan_in_fan_out`),
`MultiheadAttention` the packed `in_proj_weight` of torch's attention, `Norm` what follows a
normalisation, w ⊙ x + b, of as many groups as it has channels, and `Experts` a stack
(experts, n_out, n_in) of matrices, each a group, or (experts, n_in, n_out)."""

KINDS: frozenset[Kind] = frozenset(get_args(Kind))
EXPERTS: frozenset[Kind] = frozenset({"Experts", "TransposedExperts"})
_UNFOLDED: frozenset[Kind] = EXPERTS | {"Norm"}
MATRICES: frozenset[Kind] = KINDS - EXPERTS - {"Norm"}
CONVOLUTIONS: dict[Kind, int] = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}


@dataclass(frozen=True)
class Site:
    """Where an adapter sits: a module of the base, its sizes and its kind.

    Parameters
    ----------
    name : str
        Dotted module path, as in the base checkpoint without ``.weight``; of experts, the
        tensor's own.
    n_in, n_out : int
        in/out features, of all experts together; in/out channels of a convolution; an
        embedding's rows (tokens) and columns (width).
    kind : Kind
        The layer's class.
    kernel : tuple of int
        A convolution's kernel; empty otherwise.
    groups : int
        A convolution's groups, or how many experts there are.
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
        sizes: tuple[Any, ...] = self.n_in, self.n_out, self.groups
        kind, kernel = cast("tuple[Any, Any]", (self.kind, self.kernel))
        whole = isinstance(kernel, tuple | list) and (*sizes, *kernel)
        if not whole or not all(isinstance(size, Integral) for size in whole):
            raise ShapeError(
                f"{self.name}: sizes {sizes} and kernel {kernel!r:.60} cannot be a layer's: give "
                "whole numbers, and a tuple of them"
            )
        if not isinstance(kind, str) or kind not in KINDS:
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
        return self.n_in if self.kind in _UNFOLDED else self.width

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return self.kind in CONVOLUTIONS

    @property
    def weight(self) -> str:
        """Name of the weight tensor in the base checkpoint."""
        if self.kind in EXPERTS:
            return self.name
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
        if self.kind in EXPERTS:
            sides = self.n_out // self.groups, self.n_in // self.groups
            return (self.groups, *(sides if self.kind == "Experts" else sides[::-1]))
        return (self.n_out, self.n_in // self.groups, *self.kernel)

"""Arrays under recording, the steps that made them, and the sweep back over those steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any, ClassVar

from peft_any._engines import detach, own
from peft_any._typing import Shape
from peft_any.backend import creation_device
from peft_any.errors import GradientError
from peft_any.tape.rules import is_complex

_serial = count().__next__


class Recording:
    """One recording: what it recorded may not be used in another, nor after its gradients."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open = True


class Node:
    """A recorded step: where its cotangents go, and how they become those of its operands.

    To an `even` one goes a single number where its cotangent is the same everywhere.
    """

    __slots__ = ("__weakref__", "dtype", "edges", "even", "recording", "serial", "shape")

    def __init__(
        self, recording: Recording, edges: Any, shape: Shape, dtype: Any, *, even: bool = False
    ) -> None:
        self.recording, self.edges, self.shape, self.dtype = recording, edges, shape, dtype
        self.even = even
        self.serial = _serial()


class Var:
    """An array under recording; one without a node is a constant.

    It has what the standard says of arrays. It cannot be written to, nor leave the recording.
    """

    __slots__ = ("__weakref__", "node", "value")
    __array_priority__: ClassVar[float] = 1000.0
    __hash__ = None  # type: ignore[assignment]
    value: Any
    node: Node | None
    T: ClassVar[Any]
    space: ClassVar[Any]
    depth: ClassVar[int] = 0

    shape = property(lambda self: tuple(self.value.shape))
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: creation_device(self.value))
    mT = property(lambda self: self.space.matrix_transpose(self))  # noqa: N815

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        n = 1
        for k in self.value.shape:
            n *= k
        return n

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return self.space

    def __repr__(self) -> str:
        kind = "constant" if self.node is None else "traced"
        return f"<{kind} array of shape {self.shape}, {self.dtype}>"

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            key = tuple(map(self.space.lower, key))
        return self.space._getitem(self, key)  # noqa: SLF001 - an operation as the others

    def __setitem__(self, key: Any, value: Any) -> None:
        raise GradientError(
            "an array under value_and_grad cannot be written to: make a new one, with "
            "xp.where(mask, new, old) or xp.concat([...])"
        )

    def to_device(self, device: Any, /, *, stream: Any = None) -> Any:  # noqa: ARG002
        """Move to another device of the library."""
        return self.space._to_device(self, device)  # noqa: SLF001

    def detach(self) -> Any:
        """Give the same values as a constant."""
        return self.space.wrap(detach(self.value))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._leave("__array__", "as a NumPy array")(*[dtype][: dtype is not None])

    def __float__(self) -> float:
        return self._leave("__float__", "as a Python float")()

    def __int__(self) -> int:
        return self._leave("__int__", "as a Python int")()

    def __index__(self) -> int:
        return self._leave("__index__", "as an index")()

    def __complex__(self) -> complex:
        return self._leave("__complex__", "as a Python complex")()

    def __bool__(self) -> bool:
        return self._leave("__bool__", "as a condition")()

    def _leave(self, method: str, how: str) -> Callable[..., Any]:
        if self.node is not None:
            raise GradientError(
                f"a traced array of shape {self.shape} cannot be used {how}: its gradient would "
                "be lost; use functions of xp = peft_any.backend.namespace(x) (xp.where for a "
                "choice), return it with has_aux=True, or take peft_any.detach(x)"
            )
        return getattr(self.value, method)


_ARITHMETIC = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "pow": "pow",
    "matmul": "matmul", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and",
    "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}  # fmt: skip
_COMPARE = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal",
}  # fmt: skip
_SINGLE = {"neg": "negative", "pos": "positive", "abs": "abs", "invert": "bitwise_invert"}


def _operators(names: dict[str, str]) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Give the operation of each operator: its name in the standard, and how to compute it.

    Not by the standard's function: torch's take no scalars in places, and promote otherwise.
    """
    return {f"_{k}": (name, getattr(operator, f"__{k}__")) for k, name in names.items()}


UNARY = _operators(_SINGLE) | {"_T": ("_T", operator.attrgetter("T"))}
BINARY = _operators(_ARITHMETIC | _COMPARE)
REFLECTED = tuple(f"_{k}" for k in _ARITHMETIC)


def sweep(
    xp: Any, roots: Sequence[tuple[Node, Any]], leaves: Sequence[Node], *, keep: bool
) -> list[Any]:
    """Carry cotangents back from the roots to the leaves; None for a leaf they do not reach.

    Unless `keep`, each step is dropped as the sweep passes it, with the arrays it held.
    """
    grads: dict[Node, Any] = {}
    queue: list[tuple[int, Node]] = []
    wanted = set(leaves)

    def give(node: Node, g: Any) -> None:
        if node.dtype is not None and (g.shape != node.shape or g.dtype != node.dtype):
            g = settle(xp, g, () if node.even and g.ndim == 0 else node.shape, node.dtype)
        if node not in grads:
            grads[node] = g
            heappush(queue, (-node.serial, node))
        elif node.dtype is None:
            grads[node] = {**grads[node], **g}
        else:
            grads[node] = grads[node] + g

    for node, g in roots:
        give(node, g)
    while queue:
        _, node = heappop(queue)
        if node in wanted:
            continue
        g, edges = grads.pop(node), [*node.edges]
        if not keep:
            node.edges = ()
        while edges:
            parent, pull = edges.pop(0)
            h = pull(g)
            if h is not None:
                give(parent, h)
            del h, pull
    return _apart(xp, [grads.get(leaf) for leaf in leaves])


def _apart(xp: Any, grads: list[Any]) -> list[Any]:
    """Give gradients memory of their own, where they share it."""
    seen: set[int] = set()
    for i, g in enumerate(grads):
        if g is not None:
            grads[i] = xp.asarray(g, copy=True) if id(g) in seen else own(g)
            seen.add(id(grads[i]))
    return grads


def settle(xp: Any, g: Any, shape: Shape, dtype: Any) -> Any:
    """Bring a cotangent to the shape and dtype of its operand: the adjoint of broadcasting."""
    if g.ndim == 0 and shape:
        g = xp.broadcast_to(g, shape)
    elif g.shape != shape:
        extra = len(g.shape) - len(shape)
        axes = tuple(range(extra)) + tuple(
            i + extra for i, n in enumerate(shape) if n == 1 and g.shape[i + extra] != 1
        )
        g = xp.sum(g, axis=axes) if axes else g
        g = xp.broadcast_to(xp.reshape(g, shape), shape) if g.shape != shape else g
    if g.dtype != dtype:
        if is_complex(g.dtype) and not is_complex(dtype):
            g = xp.real(g)
        g = xp.astype(g, dtype)
    return g

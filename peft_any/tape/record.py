"""How a function of the library below becomes one that records what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft_any.errors import GradientError
from peft_any.tape.rules import EVEN, is_inexact
from peft_any.tape.var import Node, Recording, Var

_new = object.__new__
ESCAPED = (
    "a traced array was used outside of the value_and_grad that it belongs to: return it "
    "(has_aux=True), or keep peft_any.detach(x)"
)


def deep(kind: type[Var], x: Any) -> Any:
    """Put the values of a tape's arrays in their places, in a nest of tuples, lists and dicts."""
    if isinstance(x, kind):
        return x.value
    if isinstance(x, dict):
        return {k: deep(kind, v) for k, v in x.items()}
    return type(x)(deep(kind, v) for v in x) if type(x) in (tuple, list) else x


def edges_of(kind: type[Var], args: Sequence[Any], label: str) -> tuple[list[Any], Any]:
    """Take the values of arguments, and the nodes of the traced ones by position."""
    values, edges = list(args), None
    for i, a in enumerate(args):
        if isinstance(a, kind):
            values[i] = a.value
            node = a.node
            if node is not None:
                if edges is None:
                    edges = [(i, node)]
                    _check(node, node.recording, label)
                else:
                    _check(node, edges[0][1].recording, label)
                    edges.append((i, node))
    return values, edges


def _check(node: Node, recording: Recording, label: str) -> None:
    if node.recording is not recording or not recording.open:
        raise GradientError(f"xp.{label}: {ESCAPED}")


def recorded(space: Any, raw: Callable[..., Any], rule: Any, label: str) -> Callable[..., Any]:
    """Make the recording form of a function that has a rule."""
    kind, below, even = space.kind, space.__dict__.get("main", space).raw, rule in EVEN

    def call(*args: Any, **kwargs: Any) -> Any:
        values, edges = edges_of(kind, args, label)
        if kwargs:
            _no_traced(kind, kwargs, label)
            kwargs = {k: deep(kind, v) for k, v in kwargs.items()}
        out = raw(*values, **kwargs)
        if edges is None:
            return space.constant(out) if isinstance(out, tuple) else space.wrap(out)
        if isinstance(out, tuple):
            return _record_tuple(space, rule(below, out, *values, **kwargs), out, edges)
        pulls = rule(below, out, *values, **kwargs)
        if pulls is None:
            return space.wrap(out)
        kept = [(n, p) for i, n in edges if (p := pulls[i] if i < len(pulls) else None)]
        var = _new(kind)
        var.value = out
        var.node = Node(edges[0][1].recording, kept, out.shape, out.dtype, even=even)
        return var

    return call


def binary(
    space: Any, raw: Callable[[Any, Any], Any], rule: Any, same: Any, label: str
) -> Callable[[Any, Any], Any]:
    """Make the recording form of an operator: as `recorded`, shorter, for it is asked most.

    `rule` is None where the result is a constant; `same` is the rule for twice the same array.
    """
    kind, below, depth = space.kind, space.raw, space.depth

    def call(a: Any, b: Any) -> Any:
        m = n = None
        if type(a) is kind:
            a, m = a.value, a.node
        if type(b) is kind:
            b, n = b.value, b.node
        elif isinstance(b, Var) and b.depth > depth:
            return NotImplemented  # an inner tape records it
        out = raw(a, b)
        if rule is None or m is n is None:
            return space.constant(out)
        node: Any = n if m is None else m
        recording = node.recording
        if not recording.open or not (n is None or n.recording is recording):
            raise GradientError(f"xp.{label}: {ESCAPED}")
        twice = m is n and same is not None
        if twice:
            edges = [(m, *same(below, out, a))]
        else:
            pull, push = rule(below, out, a, b)
            edges = [] if m is None or pull is None else [(m, pull)]
            if n is not None and push is not None:
                edges.append((n, push))
        var = _new(kind)
        var.value, var.node = out, Node(recording, edges, out.shape, out.dtype, even=twice)
        return var

    return call


def unary(space: Any, raw: Callable[[Any], Any], rule: Any, label: str) -> Callable[[Any], Any]:
    """Make the recording form of an operator of one array, as `binary` that of two."""
    kind, below = space.kind, space.raw

    def call(a: Any) -> Any:
        x, node = a.value, a.node
        out = raw(x)
        if rule is None or node is None:
            return space.wrap(out)
        if not node.recording.open:
            raise GradientError(f"xp.{label}: {ESCAPED}")
        var = _new(kind)
        var.value = out
        var.node = Node(node.recording, [(node, *rule(below, out, x))], out.shape, out.dtype)
        return var

    return call


def _record_tuple(space: Any, pulls: Any, out: Any, edges: Any) -> Any:
    """Record a function of several results: a node for each, over one that gathers them."""
    recording, count = edges[0][1].recording, len(out)

    def gather(pull: Callable[..., Any]) -> Callable[[Any], Any]:
        def back(g: dict[int, Any]) -> Any:
            return pull([g.get(i) for i in range(count)])

        return back

    whole = Node(recording, [(n, gather(p)) for i, n in edges if (p := pulls[i])], (), None)
    parts = [
        space.wrap(y, Node(recording, [(whole, partial(_part, i))], y.shape, y.dtype))
        if is_inexact(y.dtype)
        else space.wrap(y)
        for i, y in enumerate(out)
    ]
    return type(out)(*parts) if hasattr(out, "_fields") else tuple(parts)


def _part(i: int, g: Any) -> dict[int, Any]:
    return {i: g}


def _no_traced(kind: type[Var], kwargs: dict[str, Any], label: str) -> None:
    for name, value in kwargs.items():
        if isinstance(value, kind) and value.node is not None:
            raise GradientError(f"xp.{label}: {name}= cannot be traced: give it by position")


def sequence(space: Any, raw: Any, rule: Any, label: str) -> Callable[..., Any]:
    """Make the recording form of a function that takes a sequence of arrays."""
    record = recorded(space, lambda *xs, **kw: raw(list(xs), **kw), rule, label)
    return lambda arrays, /, **kwargs: record(*arrays, **kwargs)


def composite(space: Any, build: Callable[..., Any], raw: Any) -> Callable[..., Any]:
    """Make the recording form of a function that is computed by others when it is traced."""
    kind = space.kind

    def traced(x: Any) -> bool:
        if isinstance(x, kind):
            return x.node is not None
        return type(x) in (list, tuple) and any(map(traced, x))

    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(map(traced, args)) and not any(map(traced, kwargs.values())):
            return space.constant(raw(*deep(kind, args), **deep(kind, kwargs)))
        return build(
            space.__dict__.get("main", space),
            *(space.lift(a) for a in args),
            **{k: space.lift(v) for k, v in kwargs.items()},
        )

    return call


def question(space: Any, raw: Callable[..., Any]) -> Callable[..., Any]:
    """Make the form of a function whose result is a constant, whatever it is asked of."""
    kind = space.kind

    def call(*args: Any, **kwargs: Any) -> Any:
        return space.constant(raw(*deep(kind, args), **deep(kind, kwargs)))

    return call


def unruled(space: Any, raw: Callable[..., Any], label: str) -> Callable[..., Any]:
    """Make the form of a function without a rule: for constants alone."""
    kind = space.kind

    def call(*args: Any, **kwargs: Any) -> Any:
        _, edges = edges_of(kind, [*args, *kwargs.values()], label)
        if edges is not None:
            raise GradientError(
                f"xp.{label}: has no derivative rule: use functions that have one, give its "
                "derivative with peft_any.custom_vjp, or take peft_any.detach of its operands"
            )
        return space.constant(raw(*deep(kind, args), **deep(kind, kwargs)))

    return call

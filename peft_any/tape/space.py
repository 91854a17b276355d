"""The tape: an Array API namespace that records what it computes, for libraries without autograd.

Reverse accumulation (Griewank and Walther 2008, https://doi.org/10.1137/1.9780898717761, ch. 3).
A function of the standard is differentiated by one rule, written in functions of the standard; an
array of an outer tape may stand wherever a plain one does, so derivatives of derivatives need
nothing of their own. Cotangents of complex arrays follow torch: of a real loss they are
∂L/∂Re + i·∂L/∂Im.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

from peft_any._libraries import UNKNOWN, _of_type
from peft_any._typing import Namespace
from peft_any.backend import is_array
from peft_any.errors import GradientError
from peft_any.tape import fft, protocols
from peft_any.tape.linalg import LINALG_COMPOSITES, LINALG_RULES
from peft_any.tape.rules import RULES, is_inexact
from peft_any.tape.shapes import COMPOSITES, PASS, SEQUENCES, put
from peft_any.tape.var import OPERATORS, Node, Recording, Var, sweep

_new = object.__new__
_within: ContextVar[Space | None] = ContextVar("peft_any_tape", default=None)
"""The tape whose recording this code runs in."""


class Space(ModuleType):
    """The recording namespace over another one."""

    def __init__(self, raw: Namespace, root: str, outer: Space | None, part: str = "") -> None:
        super().__init__(f"tape[{raw.__name__}]")
        self.raw, self.root, self.under, self.part = raw, root, outer, part
        self.records: frozenset[str] = frozenset({self.__name__, root})
        self.depth = 1
        if outer is not None:
            self.records, self.depth = self.records | outer.records, outer.depth + 1

    def wrap(self, value: Any, node: Node | None = None) -> Any:
        """Make a value of the namespace below an array of this one."""
        var = _new(self.kind)
        var.value, var.node = value, node
        return var

    def lift(self, x: Any) -> Any:
        """Take an array as a constant; anything else as it is."""
        return x if isinstance(x, self.kind) or not is_array(x) else self.wrap(x)

    def lower(self, x: Any) -> Any:
        """Give the value of an array of this namespace; anything else as it is."""
        return x.value if isinstance(x, self.kind) else x

    def constant(self, result: Any) -> Any:
        """Wrap what a function without a derivative gave."""
        if isinstance(result, tuple):
            parts = [self.constant(r) for r in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        if isinstance(result, list):
            return [self.constant(r) for r in result]
        return self.wrap(result) if is_array(result) else result

    def __getattr__(self, name: str) -> Any:
        if name == "kind":
            made: Any = _kind(self)
        elif name in ("linalg", "fft") and not self.part:
            made = Space(getattr(self.raw, name), self.root, self.under, name)
            made.kind = self.kind
            made.main = self
        elif name.startswith("__"):
            return getattr(self.raw, name)
        else:
            made = protocols.giving_way(name, self._function(name))
        self.__dict__[name] = made
        return made

    def _function(self, name: str) -> Any:
        raw: Any
        if name in OPERATORS:
            name, raw = OPERATORS[name]
        elif name in _OPERATIONS:
            raw = _OPERATIONS[name]
        else:
            raw = partial(put, self.raw) if name == "_put" else getattr(self.raw, name)
        if not callable(raw) or isinstance(raw, type) or name in _QUESTIONS:
            return raw if name not in _QUESTIONS else self._question(raw)
        rules = {"linalg": LINALG_RULES, "fft": fft.RULES}.get(self.part, RULES)
        composites = {"linalg": LINALG_COMPOSITES, "fft": fft.COMPOSITES}.get(self.part, COMPOSITES)
        shared = self.part and name in RULES and name not in rules
        label = f"{self.part}.{name}" if self.part else name
        if shared or (self.part and name in COMPOSITES and name not in composites):
            return getattr(self.__dict__["main"], name)
        if name in composites:
            return _composite(self, composites[name], raw)
        if name in SEQUENCES:
            return _sequence(self, raw, RULES[name], label)
        if name in rules:
            return _recorded(self, raw, rules[name], label)
        return self._question(raw) if name in PASS else _unruled(self, raw, label)

    def _question(self, raw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.constant(raw(*_deep(self, args), **_deep(self, kwargs)))

        return call


def _deep(space: Space, x: Any) -> Any:
    if isinstance(x, space.kind):
        return x.value
    if isinstance(x, dict):
        return {k: _deep(space, v) for k, v in x.items()}
    return type(x)(_deep(space, v) for v in x) if type(x) in (tuple, list) else x


_QUESTIONS = ("result_type", "isdtype", "can_cast", "finfo", "iinfo", "__array_namespace_info__")
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "_getitem": operator.getitem,
    "_to_device": lambda x, device: x.to_device(device),
}


def _edges_of(kind: type, args: Sequence[Any], label: str) -> tuple[list[Any], Any]:
    """Take the values of arguments, and the nodes of the traced ones by position."""
    values, edges = list(args), None
    for i, a in enumerate(args):
        if isinstance(a, kind):
            values[i] = a.value  # type: ignore[attr-defined]
            node = a.node  # type: ignore[attr-defined]
            if node is not None:
                if edges is None:
                    edges = [(i, node)]
                    if not node.recording.open:
                        raise GradientError(f"xp.{label}: {_ESCAPED}")
                else:
                    if node.recording is not edges[0][1].recording:
                        raise GradientError(f"xp.{label}: {_ESCAPED}")
                    edges.append((i, node))
    return values, edges


_ESCAPED = (
    "a traced array was used outside of the value_and_grad that it belongs to: return it "
    "(has_aux=True), or keep peft_any.detach(x)"
)


def _recorded(space: Space, raw: Callable[..., Any], rule: Any, label: str) -> Callable[..., Any]:
    """Make the recording form of a function that has a rule."""
    kind, below = space.kind, space.__dict__.get("main", space).raw

    def call(*args: Any, **kwargs: Any) -> Any:
        values, edges = _edges_of(kind, args, label)
        if kwargs:
            _no_traced(kind, kwargs, label)
            kwargs = {k: _deep(space, v) for k, v in kwargs.items()}
        out = raw(*values, **kwargs)
        if edges is None:
            return space.constant(out) if isinstance(out, tuple) else space.wrap(out)
        if isinstance(out, tuple):
            return _record_tuple(space, below, rule, out, values, edges, kwargs)
        pulls = rule(below, out, *values, **kwargs)
        if pulls is None:
            return space.wrap(out)
        kept = [(n, p) for i, n in edges if (p := pulls[i] if i < len(pulls) else None)]
        var = _new(kind)
        var.value = out
        var.node = Node(edges[0][1].recording, kept, out.shape, out.dtype)
        return var

    return call


def _record_tuple(  # noqa: PLR0917 - what `_recorded` has at hand
    space: Space, below: Any, rule: Any, out: Any, values: Any, edges: Any, kwargs: Any
) -> Any:
    """Record a function of several results: a node for each, over one that gathers them."""
    recording = edges[0][1].recording
    pulls = rule(below, out, *values, **kwargs)
    like = list(out)

    def gather(pull: Callable[..., Any]) -> Callable[[Any], Any]:
        def back(g: dict[int, Any]) -> Any:
            return pull([g.get(i) for i in range(len(like))])

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


def _no_traced(kind: type, kwargs: dict[str, Any], label: str) -> None:
    for name, value in kwargs.items():
        if isinstance(value, kind) and value.node is not None:  # type: ignore[attr-defined]
            raise GradientError(f"xp.{label}: {name}= cannot be traced: give it by position")


def _sequence(space: Space, raw: Any, rule: Any, label: str) -> Callable[..., Any]:
    """Make the recording form of a function that takes a sequence of arrays."""
    record = _recorded(space, lambda *xs, **kw: raw(list(xs), **kw), rule, label)
    return lambda arrays, /, **kwargs: record(*arrays, **kwargs)


def _composite(space: Space, build: Callable[..., Any], raw: Any) -> Callable[..., Any]:
    """Make the recording form of a function that is computed by others when it is traced."""
    kind = space.kind

    def traced(x: Any) -> bool:
        if isinstance(x, kind):
            return x.node is not None
        return type(x) in (list, tuple) and any(map(traced, x))

    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(map(traced, args)) and not any(map(traced, kwargs.values())):
            return space.constant(raw(*_deep(space, args), **_deep(space, kwargs)))
        return build(
            space.__dict__.get("main", space),
            *(space.lift(a) for a in args),
            **{k: space.lift(v) for k, v in kwargs.items()},
        )

    return call


def _unruled(space: Space, raw: Any, label: str) -> Callable[..., Any]:
    kind = space.kind

    def call(*args: Any, **kwargs: Any) -> Any:
        _, edges = _edges_of(kind, [*args, *kwargs.values()], label)
        if edges is not None:
            raise GradientError(
                f"xp.{label}: has no derivative rule: use functions that have one, give its "
                "derivative with peft_any.custom_vjp, or take peft_any.detach of its operands"
            )
        return space.constant(raw(*_deep(space, args), **_deep(space, kwargs)))

    return call


def _kind(space: Space) -> type[Var]:
    """Make the class of a namespace's arrays."""
    extra = protocols.methods() if space.root in ("numpy", "cupy") else {}
    body = {"__slots__": (), "space": space, "depth": space.depth, **extra}
    kind = type("Traced", (Var,), body)
    _of_type[kind] = UNKNOWN  # found at once: the question is asked at every step
    return kind


def custom(
    space: Space, forward: Callable[..., Any], backward: Callable[..., Any], arrays: Sequence[Any]
) -> Any:
    """Record `forward(*arrays) -> (out, saved)` as one step, whose way back is `backward`."""
    box: list[Any] = []

    def raw(*values: Any) -> Any:
        out, saved = forward(*values)
        box.append(saved)
        return out

    def rule(xp: Any, out: Any, *values: Any) -> list[Callable[[Any], Any]]:
        saved, last = box.pop(), [(None, None)]

        def cotangents(g: Any) -> Any:
            if last[0][0] is not g or g is None:
                given = g
                if isinstance(out, tuple):
                    pairs = zip(g, out, strict=True)
                    given = tuple(xp.zeros_like(y) if h is None else h for h, y in pairs)
                last[0] = (g, backward(saved, given))
            return last[0][1]

        def one(i: int) -> Callable[[Any], Any]:
            return lambda g: cotangents(g)[i]

        return [one(i) for i in range(len(values))]

    return _recorded(space, raw, rule, getattr(forward, "__name__", "custom_vjp"))(*arrays)


_spaces: dict[Any, Space] = {}


def space_of(raw: Namespace, root: str) -> Space:
    """Find the tape over a namespace, itself over another tape where one is recording."""
    outer = _within.get()
    if isinstance(raw, Space):
        outer = raw if outer is None or raw.depth > outer.depth else outer
    below = outer if outer is not None and outer.root == root else None
    key = below or raw
    if key not in _spaces:
        _spaces[key] = Space(key, root, below)
    return _spaces[key]


def record(
    space: Space, run: Callable[[list[Any]], tuple[list[Any], Any]], leaves: Sequence[Any]
) -> tuple[list[Any], Any, Callable[..., list[Any]], Recording]:
    """Run a function of traced arrays; give its traced outputs, its extras, and the way back."""
    recording = Recording()
    inputs = [space.wrap(x, Node(recording, (), tuple(x.shape), x.dtype)) for x in leaves]
    token = _within.set(space)
    try:
        outputs, aux = run(list(inputs))
    finally:
        _within.reset(token)
    nodes = [x.node for x in inputs]
    ends: list[Node | None] = []
    for y in outputs:
        node = y.node if isinstance(y, space.kind) else None
        if node is not None and node.recording is not recording:
            raise GradientError(_ESCAPED)
        ends.append(node)
    values = [space.lower(y) for y in outputs]

    def back(gs: Sequence[Any], *, keep: bool) -> list[Any]:
        if not recording.open:
            raise GradientError("these gradients were taken already, and what they need is gone")
        recording.open = keep
        roots = [(n, g) for n, g in zip(ends, gs, strict=True) if n is not None]
        found = sweep(space.raw, roots, nodes, keep=keep)
        if not keep:
            ends.clear()
        pairs = zip(found, leaves, strict=True)
        return [space.raw.zeros_like(x) if g is None else g for g, x in pairs]

    return values, aux, back, recording

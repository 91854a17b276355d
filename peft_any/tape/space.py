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

from peft_any._kernels import dense
from peft_any._libraries import UNKNOWN, _of_type
from peft_any._typing import Namespace
from peft_any.backend import is_array
from peft_any.errors import GradientError
from peft_any.tape import fft, protocols
from peft_any.tape.indexing import put
from peft_any.tape.linalg import LINALG_COMPOSITES, LINALG_RULES
from peft_any.tape.record import (
    ESCAPED,
    binary,
    composite,
    question,
    recorded,
    sequence,
    unary,
    unruled,
)
from peft_any.tape.rules import RULES, SAME
from peft_any.tape.shapes import COMPOSITES, PASS, SEQUENCES
from peft_any.tape.var import BINARY, REFLECTED, UNARY, Node, Recording, Var, sweep

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
        elif name in BINARY or name in UNARY:
            made = self._operator(name)
        else:
            made = protocols.giving_way(name, self._function(name))
        self.__dict__[name] = made
        return made

    def _operator(self, short: str) -> Any:
        name, raw = (BINARY | UNARY)[short]
        if short in UNARY:
            return unary(self, raw, RULES.get(name), name)
        return binary(self, raw, RULES.get(name), SAME.get(name), name)

    def _function(self, name: str) -> Any:
        raw: Any
        if name in _OPERATIONS:
            raw = _OPERATIONS[name]
        else:
            raw = partial(put, self.raw) if name == "_put" else getattr(self.raw, name)
        if not callable(raw) or isinstance(raw, type) or name in _QUESTIONS:
            return raw if name not in _QUESTIONS else question(self, raw)
        rules = {"linalg": LINALG_RULES, "fft": fft.RULES}.get(self.part, RULES)
        composites = {"linalg": LINALG_COMPOSITES, "fft": fft.COMPOSITES}.get(self.part, COMPOSITES)
        shared = self.part and name in RULES and name not in rules
        label = f"{self.part}.{name}" if self.part else name
        if shared or (self.part and name in COMPOSITES and name not in composites):
            return getattr(self.__dict__["main"], name)
        if name in composites:
            return composite(self, composites[name], raw)
        if name in SEQUENCES:
            return sequence(self, raw, RULES[name], label)
        if name in rules:
            return recorded(self, raw, rules[name], label)
        return question(self, raw) if name in PASS else unruled(self, raw, label)


_QUESTIONS = ("result_type", "isdtype", "can_cast", "finfo", "iinfo", "__array_namespace_info__")
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "_getitem": operator.getitem,
    "_linear": dense,
    "_to_device": lambda x, device: x.to_device(device),
}


def _kind(space: Space) -> Any:
    """Make the class of a namespace's arrays, with its operators."""
    extra = protocols.methods() if space.root in ("numpy", "cupy") else {}
    body = {"__slots__": (), "space": space, "depth": space.depth, **extra}
    kind: Any = type("Traced", (Var,), body)
    _of_type[kind] = UNKNOWN  # found at once: the question is asked at every step
    space.__dict__["kind"] = kind
    for short in (*UNARY, *BINARY):
        setattr(kind, f"_{short}__", getattr(space, short))
    kind.T = property(space._T)  # noqa: SLF001 - an operation as the others
    for short in REFLECTED:
        setattr(kind, f"__r{short[1:]}__", _reflected(getattr(space, short)))
    return kind


def _reflected(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: f(other, self)


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

    return recorded(space, raw, rule, getattr(forward, "__name__", "custom_vjp"))(*arrays)


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
            raise GradientError(ESCAPED)
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

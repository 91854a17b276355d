"""How two adapters differ: the angle between their changes, layer by layer, by their factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import sqrt
from typing import Any

from peft_any._typing import Array, Shape
from peft_any.algebra.blockwise import square
from peft_any.algebra.lowrank import Factors, dot, norm, spectrum, svd, total
from peft_any.algebra.terms import Base, Term, base_layer, opened, placed, terms_by_layer
from peft_any.backend import Backend, namespace, resolve, to_numpy
from peft_any.receipt import SCHEMA_VERSION, Host, Source, plain, to_json
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.job import Progress
from peft_any.surgery.measure import measure
from peft_any.surgery.sources import Kinds, given_adapters


@dataclass(frozen=True)
class LayerDifference:
    """How two adapters change one layer.

    Attributes
    ----------
    layer : str
    shape : (n_out, width)
    norm_a, norm_b : float
        ‖ΔA‖ and ‖ΔB‖; zero where an adapter does not have the layer.
    cosine : float or None
        ⟨ΔA, ΔB⟩/(‖ΔA‖·‖ΔB‖); None where either is zero.
    distance : float or None
        ‖ΔA − ΔB‖/‖ΔA‖.
    rank_a, rank_b : int or None
        How many singular values are not rounding; None where a method has no small factors.
    outputs, inputs : tuple of float
        Cosines of the principal angles between the column spaces of ΔA and ΔB (what they write),
        and between the row spaces (what they read), the largest first. Empty where either has no
        small factors.
    """

    layer: str
    shape: Shape
    norm_a: float
    norm_b: float
    cosine: float | None
    distance: float | None
    rank_a: int | None = None
    rank_b: int | None = None
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()

    @property
    def overlap(self) -> tuple[float | None, float | None]:
        """Mean squares of the cosines: 1 where the smaller space lies in the other."""
        return _mean_square(self.outputs), _mean_square(self.inputs)


@dataclass(frozen=True)
class AdapterDifference:
    """What `diff` finds of two adapters; `to_json` is what ``--json`` prints.

    Attributes
    ----------
    a, b : Source
    config : dict of str to (value, value)
        Fields that differ.
    layers : tuple of LayerDifference
    copies : dict of str to float or None
        ‖A − B‖/‖A‖ of the tensors that they carry whole; None where only one does, or the shapes
        differ.
    base : dict
        Path, where one was given.
    """

    a: Source
    b: Source
    config: dict[str, tuple[Any, Any]]
    layers: tuple[LayerDifference, ...]
    copies: dict[str, float | None] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)

    @property
    def cosine(self) -> float | None:
        """The cosine of the whole changes, all layers together."""
        a, b = (sqrt(sum(getattr(x, n) ** 2 for x in self.layers)) for n in ("norm_a", "norm_b"))
        dots = (x.cosine * x.norm_a * x.norm_b for x in self.layers if x.cosine is not None)
        return sum(dots) / a / b if a and b else None

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        head = {"schema_version": SCHEMA_VERSION, "kind": "diff", "of": "adapters"}
        found: dict[str, Any] = plain(head | {"cosine": self.cosine} | asdict(self))
        for entry, layer in zip(found["layers"], self.layers, strict=True):
            entry["overlap"] = [*layer.overlap]
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)


def compare_adapters(
    a: Any,
    b: Any,
    base: Base = None,
    *,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    strict: bool = True,
    progress: Progress | None = None,
) -> AdapterDifference:
    """Compare two adapters by what they add to each layer (`diff`)."""
    to = resolve(backend)
    one, two = given_adapters([a, b], strict=strict)
    layers = []
    with opened(base, [one, two]) as view:
        fits = placed([one, two], view, Fitting(strict=strict, kinds=kinds))
        terms = terms_by_layer([one, two], fits, to)
        owners: dict[str, list[str]] = {}
        for label, fit in zip("ab", fits, strict=True):
            for name in fit.sites:
                owners.setdefault(name, []).append(label)
        for i, (name, some) in enumerate(terms.items()):
            sides = dict(zip(owners[name], some, strict=True))
            layers.append(_layer(name, sides, view, to))
            if progress is not None:
                progress(i + 1, len(terms), name)
    return AdapterDifference(
        one.source,
        two.source,
        _fields(one.adapter.config, two.adapter.config),
        tuple(layers),
        _copies(one.adapter.extra, two.adapter.extra),
        {} if base is None or isinstance(base, Mapping) else {"path": str(base)},
    )


def _layer(
    name: str, sides: Mapping[str, Term], view: Mapping[str, Any] | None, to: Backend
) -> LayerDifference:
    changes = {who: term.effect(base_layer(view, term, to))[0] for who, term in sides.items()}
    shape = next((int(u.shape[0]), int(v.shape[1])) for u, v in changes.values())
    if any(u.shape[1] >= min(shape) for u, _ in changes.values()):
        return _formed(name, shape, {who: u @ v for who, (u, v) in changes.items()})
    spaces = {who: _spaces(factors) for who, factors in changes.items()}
    norms = {who: _number(norm(factors)) for who, factors in changes.items()}
    product, gap = 0.0, 0.0
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()
    if len(changes) == 2:
        product = _number(dot(changes["a"], changes["b"]))
        gap = _number(norm(total([(1.0, changes["a"]), (-1.0, changes["b"])])))
        outputs, inputs = (_cosines(*pair) for pair in zip(*spaces.values(), strict=True))
    found = _numbers(name, shape, norms, product, gap)
    ranks: dict[str, Any] = {f"rank_{who}": int(u.shape[1]) for who, (u, _) in spaces.items()}
    return replace(found, **{"rank_a": 0, "rank_b": 0, **ranks}, outputs=outputs, inputs=inputs)


def _formed(name: str, shape: Shape, changes: Mapping[str, Array]) -> LayerDifference:
    """Compare changes without small factors as they are."""
    squares = {who: square(delta) for who, delta in changes.items()}
    gap2 = square(changes["a"] - changes["b"]) if len(changes) == 2 else 0.0
    product = (sum(squares.values()) - gap2) / 2 if len(changes) == 2 else 0.0
    norms = {who: sqrt(length) for who, length in squares.items()}
    return _numbers(name, shape, norms, product, sqrt(gap2))


def _numbers(
    name: str, shape: Shape, norms: Mapping[str, float], product: float, gap: float
) -> LayerDifference:
    a, b = (norms.get(who, 0.0) for who in "ab")
    cosine = max(min(product / a / b, 1.0), -1.0) if a and b else None
    distance = (gap if len(norms) == 2 else a) / a if a else None
    return LayerDifference(name, shape, a, b, cosine, distance)


def _number(x: Array) -> float:
    return float(to_numpy(x))


def _spaces(factors: Factors) -> tuple[Array, Array]:
    """Give bases (n_out, k) and (width, k) of what a change writes and reads."""
    u, s, vt = svd(factors)
    values = to_numpy(s)
    least = float(values[0]) * 1e-6 if values.size else 0.0  # factors are float32 at best
    k = int((values > least).sum())
    return u[:, :k], namespace(vt).matrix_transpose(vt)[:, :k]


def _cosines(one: Array, two: Array) -> tuple[float, ...]:
    xp = namespace(one, two)
    values: Host = to_numpy(spectrum((xp.matrix_transpose(one), two)))
    return tuple(min(float(x), 1.0) for x in values)


def _mean_square(cosines: tuple[float, ...]) -> float | None:
    return sum(c * c for c in cosines) / len(cosines) if cosines else None


def _fields(one: Any, two: Any) -> dict[str, tuple[Any, Any]]:
    """List the fields of two configurations that differ, the method among them."""
    sides = [{"peft_type": c.peft_type} | vars(c) for c in (one, two)]
    names = dict.fromkeys((*sides[0], *sides[1]))
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _copies(one: Mapping[str, Array], two: Mapping[str, Array]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in dict.fromkeys((*one, *two)):
        a, b = one.get(name), two.get(name)
        found[name] = None
        if a is not None and b is not None and tuple(a.shape) == tuple(b.shape):
            sums = measure(to_numpy(a), to_numpy(b), exact=to_numpy(b))
            found[name] = sqrt(sums.delta2 / sums.base2) if sums.base2 else None
    return found

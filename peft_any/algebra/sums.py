"""How the shares of several adapters in one layer become one low-rank change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from struct import pack, unpack
from typing import Any

import numpy as np

from peft_any._typing import Array
from peft_any.algebra import lowrank
from peft_any.algebra.blockwise import square
from peft_any.algebra.distances import error_of, gap, length
from peft_any.algebra.lowrank import Cut, Factors
from peft_any.algebra.rangefinder import approximate
from peft_any.algebra.record import LayerRecord
from peft_any.algebra.sparse import Rows, Rule, Sign, combined
from peft_any.algebra.terms import Term, base_layer, site_of_terms
from peft_any.algebra.written import Update
from peft_any.backend import (
    Backend,
    astype,
    compute_dtype,
    dtype_name,
    from_numpy_like,
    is_floating,
    namespace,
    to_numpy,
    widest,
)
from peft_any.errors import ConfigError, UsageError, VerifyError, nearest
from peft_any.extras import non_finite
from peft_any.layer import Site, flat
from peft_any.linalg import as_product
from peft_any.rng import Fresh, TorchGenerator

_PRUNING = {
    "ties": Rule("magnitude", elect=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elect=True),
    "magnitude_prune": Rule("magnitude"),
}
RULES = {"linear": Rule(), **_PRUNING}
"""Methods that act on A and on B apart, as in Hugging Face PEFT."""
ON_DELTA = {"svd": Rule(), **{f"{name}_svd": rule for name, rule in _PRUNING.items()}}
"""Methods that act on ΔW and then cut its rank."""
METHODS = ("exact", "cat", *RULES, *ON_DELTA)


@dataclass(frozen=True)
class Options:
    """How to combine.

    Attributes
    ----------
    method : str
        One of `METHODS`.
    cut : Cut or None
        What is left of each layer's rank.
    density : float or None
    sign : {"total", "frequency"}
    clamp : float or None
        Quantile of the entries of U·S and Vᵀ at which both are clamped.
    seed : int
        Of what random pruning draws.
    """

    method: str = "exact"
    cut: Cut | None = None
    density: float | None = None
    sign: Sign = "total"
    clamp: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.method
        if name not in METHODS:
            raise UsageError(
                f"method {name!r}: is not known{nearest(name, METHODS)}: choose one of "
                f"{', '.join(METHODS)}"
            )
        prunes = self.rule is not None and self.rule.prune is not None
        if prunes and self.density is None:
            raise UsageError(f"{name}: needs density=, the share of the entries to keep")
        if not prunes and self.density is not None:
            raise UsageError(f"{name}: density={self.density} has no effect: leave it out")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"{name}: density={self.density}: give a share in (0, 1]")
        if self.sign not in ("total", "frequency"):
            raise UsageError(f"majority_sign_method={self.sign!r}: give 'total' or 'frequency'")
        if self.cut is not None and (name in RULES or name == "cat"):
            raise UsageError(
                f"{name}: the rank follows from the adapters' and cannot be chosen: take method "
                f"{'exact' if name in ('cat', 'linear') else f'{name}_svd'!r}, which cuts it"
            )
        if self.clamp is not None and (name not in ON_DELTA or not 0 < self.clamp <= 1):
            raise UsageError(
                f"{name}: svd_clamp={self.clamp}: it is a quantile in (0, 1], for the methods "
                "that end in svd"
            )
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: cannot be negative")

    @property
    def rule(self) -> Rule | None:
        """How entries are pruned and summed; None for the exact sum."""
        rule = RULES.get(self.method) or ON_DELTA.get(self.method)
        return rule and replace(rule, density=self.density or 1.0, sign=self.sign)


@dataclass(frozen=True)
class Layer:
    """One layer's shares, where the base's layer is to be found, and what random pruning draws."""

    terms: Sequence[Term]
    view: Mapping[str, Any] | None
    backend: Backend
    draws: TorchGenerator

    @property
    def site(self) -> Site:
        """The layer."""
        return site_of_terms(self.terms)

    def effects(self) -> tuple[list[Factors], Array | None]:
        """Give every ΔW as factors, not weighted, and the weighted sum of the Δb."""
        factors, shift = [], None
        for term in self.terms:
            pair, db = term.effect(base_layer(self.view, term, self.backend))
            factors.append(pair)
            if db is not None:
                db = term.weight * db
                shift = db if shift is None else shift + db
        return factors, shift


def combine_layer(layer: Layer, options: Options, *, dtype: str) -> tuple[Update, LayerRecord]:
    """Combine the shares in one layer, and measure the result against the exact sum.

    Parameters
    ----------
    layer : Layer
    options : Options
    dtype : str
        In which the factors will be stored: the errors are those of the rounded ones.
    """
    effects, shift = layer.effects()
    pairs = zip(layer.terms, effects, strict=True)
    whole = lowrank.total((term.weight, pair) for term, pair in pairs)
    wanted: Factors | Array = whole
    if options.method in RULES:
        made = wanted = _apart(layer, options)
        lost = 0.0
    elif options.method in ON_DELTA:
        rounded = [(_single(t.weight), f) for t, f in zip(layer.terms, effects, strict=True)]
        wanted = lowrank.total(rounded)
        if options.method != "svd":
            wanted = _on_delta(layer, effects, options)
        made, lost = cut_to(wanted, options.cut, layer)
        if options.clamp is not None:
            made = _clamped(made, options.clamp)
            lost = (
                length(gap(made, wanted if isinstance(wanted, tuple) else as_product(wanted))) ** 2
            )
    else:
        made, lost = cut_to(whole, options.cut, layer)
    update = Update(layer.site, rounded_to(dtype, made, layer.site.name), shift)
    record = measured(layer, update, effects, whole=whole, made=made, wanted=wanted, lost=lost)
    return update, record


def measured(
    layer: Layer,
    update: Update,
    effects: Sequence[Factors],
    *,
    whole: Factors,
    made: Factors,
    wanted: Factors | Array,
    lost: float,
) -> LayerRecord:
    """Measure what is stored against what was wanted, and against the exact sum.

    Parameters
    ----------
    layer, update, effects
    whole : Factors
        The exact sum.
    made : Factors
        What `update` holds, before it was rounded.
    wanted : Factors, or array (n_out, width)
        What `made` approximates.
    lost : float
        ‖made − wanted‖².
    """
    u, v = map(widest, update.factors)
    stored = (update.scale * u, v)
    size = length(whole)
    of = size if wanted is whole else _size(wanted)
    error = error_of(stored, made, wanted, lost)
    off = error if wanted is whole else length(gap(stored, whole)) / size if size else None
    return LayerRecord(
        layer.site.name,
        tuple(term.label for term in layer.terms),
        (layer.site.n_out, layer.site.width),
        tuple(int(v.shape[0]) for _, v in effects),
        max(int(v.shape[0]), 1),
        size,
        lost / of**2 if of else 0.0,
        error,
        off,
    )


def _size(wanted: Factors | Array) -> float:
    return length(wanted) if isinstance(wanted, tuple) else sqrt(square(wanted))


def rounded_to(dtype: str, factors: Factors, name: str) -> Factors:
    """Round factors to the dtype in which they are kept.

    Raises
    ------
    VerifyError
        If they overflow it.
    """
    with np.errstate(over="ignore"):
        u, v = (astype(part, dtype) for part in factors)
    if non_finite({name: {"u": u, "v": v}}):
        raise VerifyError(
            f"{name}: the result cannot be stored: it overflows {dtype}; give a dtype with a "
            "larger range (--dtype float32 or bfloat16)"
        )
    return u, v


def cut_to(wanted: Factors | Array, cut: Cut | None, layer: Layer) -> tuple[Factors, float]:
    """Cut a rank, and give what is left out, ‖made − wanted‖².

    Parameters
    ----------
    wanted : Factors, or array (m, n)
        Where factors are no smaller than the matrix, it is the matrix that is approximated.
    cut : Cut, optional
        None: cut to what the matrix has room for.
    layer : Layer
    """
    if isinstance(wanted, tuple):
        u, v = wanted
        k, most = v.shape[0], min(u.shape[0], v.shape[1])
        if k == 0 or (cut is None and k < most):
            return lowrank.pad(wanted, max(k, 1)), 0.0
        if cut is None or k < most or cut.selector not in (None, "energy"):
            best = lowrank.truncate(wanted, cut or Cut(energy=1.0))
            left = [float(s) for s in to_numpy(best.spectrum)[best.rank :]] if cut else []
            return lowrank.pad(best.factors, max(best.rank, 1)), sum(s * s for s in left)
        wanted = u @ v
    new = Fresh(0, layer.backend, key=layer.site.name, dtype=dtype_name(wanted))
    near = approximate(wanted, cut or Cut(energy=1.0), new)
    return lowrank.pad(near.factors, max(near.rank, 1)), near.residual**2


def _single(value: float) -> float:
    """Round to single precision, in which Hugging Face PEFT holds the weights."""
    return float(unpack("f", pack("f", value))[0])


def _apart(layer: Layer, options: Options) -> Factors:
    """Combine the A's and the B's, each weighted by ±√|w·s|: Hugging Face PEFT's definition."""
    terms, draws = layer.terms, layer.draws
    pairs = [_plain_factors(term, options.method) for term in terms]
    ranks = sorted({int(a.shape[0]) for a, _ in pairs})
    if len(ranks) > 1:
        raise ConfigError(
            f"{terms[0].site.name}: {options.method} cannot combine adapters of ranks {ranks}: "
            "their A's and B's must have one size; take method 'exact', or one that ends in _svd"
        )
    configs: list[Any] = [term.config for term in terms]
    scales = [term.weight * c.scaling for term, c in zip(terms, configs, strict=True)]
    roots = [_single(sqrt(abs(s))) for s in scales]
    signed = [-root if s < 0 else root for root, s in zip(roots, scales, strict=True)]
    rule = options.rule or Rule()
    name = compute_dtype(*(x for pair in pairs for x in pair))
    a = combined([Rows(astype(flat(a), name)) for a, _ in pairs], signed, rule, draws)
    b = combined([Rows(astype(flat(b), name)) for _, b in pairs], roots, rule, draws)
    return b, a


def _plain_factors(term: Term, method: str) -> tuple[Array, Array]:
    """Give A and B as they are stored."""
    config: Any = term.config
    if config.peft_type != "LORA" or _altered(term):
        kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type
        raise ConfigError(
            f"{term.site.name}: {method} cannot combine {kind}: it acts on LoRA's A and B apart; "
            "take method 'exact', or one that ends in _svd"
        )
    (a, _), (b, _) = list(config.shapes(term.site).items())[:2]
    return term.params[a], term.params[b]


def _altered(term: Term) -> bool:
    """Whether a LoRA is more than A and B."""
    config: Any = term.config
    return bool(config.use_dora or config.use_bdlora) or "start_A" in term.params


def _on_delta(layer: Layer, effects: Sequence[Factors], options: Options) -> Array:
    """Combine the ΔW entry by entry, in the layout in which the base stores the weight."""
    arrays = [a for t in layer.terms for a in t.params.values() if is_floating(a)]
    name = compute_dtype(*arrays)
    turned = layer.site.kind in ("Conv1D", "Embedding") or any(
        getattr(t.config, "fan_in_fan_out", False) for t in layer.terms
    )
    xp = namespace(*(u for u, _ in effects))
    rows = []
    for u, v in effects:
        left, right = (xp.matrix_transpose(v), xp.matrix_transpose(u)) if turned else (u, v)
        left, right = astype(left, name), astype(right, name)
        whole = right.shape[0] >= min(layer.site.n_out, layer.site.width)
        rows.append(Rows(left @ right) if whole else Rows(left, right))
    weights = [_single(term.weight) for term in layer.terms]
    made = combined(rows, weights, options.rule or Rule(), layer.draws)
    return xp.matrix_transpose(made) if turned else made


def _clamped(factors: Factors, quantile: float) -> Factors:
    """Clamp U·S and Vᵀ at ± a quantile of all their entries.

    It depends on the signs of the singular vectors, which no library fixes: here the largest
    entry of every column of U is positive.
    """
    u, s, vt = lowrank.svd(factors)
    k = int(factors[1].shape[0])
    host = to_numpy(u[:, :k])
    if not prod(host.shape):
        return factors
    signs = np.sign(host[np.argmax(np.abs(host), axis=0), np.arange(host.shape[1])])
    left, right = host * (signs * to_numpy(s[:k])), to_numpy(vt[:k, :]) * signs[:, None]
    high = float(np.quantile(np.concatenate([np.ravel(left), np.ravel(right)]), quantile))
    low, high = min(-high, high), max(-high, high)
    left, right = (from_numpy_like(np.clip(x, low, high), u) for x in (left, right))
    return left, right

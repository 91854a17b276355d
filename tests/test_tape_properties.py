"""Hypothesis draws shapes, dtypes and arguments for every rule of the tape.

Gradients are compared with finite differences, and with torch's and JAX's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_any.tape import fft
from peft_any.tape.linalg import LINALG_COMPOSITES, LINALG_RULES
from peft_any.tape.rules import RULES
from peft_any.tape.shapes import COMPOSITES
from peft_any.testing import missing
from peft_any.testing.gradients import difference, finite_differences, gradients, weighed

Function = Callable[..., Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

SINGLE = {"float64": "float32", "complex128": "complex64"}
NORMS = ("backward", "ortho", "forward")


@dataclass
class Drawn:
    """A function of arrays, and arrays."""

    f: Function = field(repr=False)
    operands: list[np.ndarray]
    about: Any = None
    without: tuple[str, ...] = ()
    """Libraries that cannot compute it, or differentiate it otherwise."""

    @property
    def exact(self) -> bool:
        return all(x.dtype.name in SINGLE for x in self.operands)


def filled(draw: Draw, shape: Any, low: float, high: float, dtype: str = "float64") -> np.ndarray:
    """Draw numbers in a range; hypothesis chooses the seed, as nothing depends on single values."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    x = rng.uniform(low, high, shape)
    return np.asarray(x + 1j * rng.uniform(low, high, shape) if "complex" in dtype else x, dtype)


def words(text: str) -> list[str]:
    return text.split()


def kinds(*, complex_too: bool) -> st.SearchStrategy[str]:
    double = st.sampled_from(["float64", "complex128"] if complex_too else ["float64"])
    return double.flatmap(lambda d: st.sampled_from([d, d, d, SINGLE[d]]))


def shapes(low: int = 0, *, side: int = 1, most: int = 3) -> st.SearchStrategy[Any]:
    return hnp.array_shapes(min_dims=low, max_dims=most, min_side=side, max_side=3)


def axis_of(draw: Draw, ndim: int) -> int:
    return int(draw(st.integers(-ndim, ndim - 1)))


def named(path: str, **kwargs: Any) -> Function:
    """Look up a function of the namespace, "fft.rfft" say, and fix its options."""
    return lambda xp, *xs: operator.attrgetter(path)(xp)(*xs, **kwargs)


# Elementwise

REAL_LINE = (-2.0, 2.0)
UNARY: dict[str, tuple[tuple[float, float], tuple[float, float] | None]] = {
    **dict.fromkeys(
        words("exp square sin cos sinh cosh tanh abs negative positive"), (REAL_LINE, (0.3, 1.4))
    ),
    **dict.fromkeys(words("expm1 tan asinh atan"), ((-1.2, 1.2), (0.2, 0.6))),
    **dict.fromkeys(words("log sqrt reciprocal log1p"), ((0.3, 2.0), (0.3, 1.4))),
    **dict.fromkeys(words("log2 log10"), ((0.3, 2.0), None)),
    **dict.fromkeys(words("asin acos atanh"), ((-0.9, 0.9), (0.2, 0.6))),
    **dict.fromkeys(words("conj real imag sign"), (REAL_LINE, (0.3, 1.4))),
    "acosh": ((1.2, 3.0), None),
}
"""Where each is smooth: real numbers, and both parts of complex ones."""
COMPLEX_ONLY = {"conj", "real", "imag", "sign"}


@st.composite
def unary(draw: Draw, name: str) -> Drawn:
    line, plane = UNARY[name]
    dtype = draw(kinds(complex_too=plane is not None))
    if name in COMPLEX_ONLY:
        dtype = "complex128"
    low, high = plane if "complex" in dtype and plane else line
    x = filled(draw, draw(shapes(side=0)), low, high, dtype)
    return Drawn(named(name), [x], without=("jax",) if name == "sign" else ())


ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "pow": operator.pow,
}
BINARY = [*ARITHMETIC, "atan2", "hypot", "logaddexp", "maximum", "minimum", "copysign", "remainder"]


@st.composite
def binary(draw: Draw, name: str) -> Drawn:
    one, other = (draw(kinds(complex_too=name in ARITHMETIC)) for _ in range(2))
    low, high = (
        (0.5, 2.0) if name in ARITHMETIC else (0.6, 0.9) if name == "remainder" else (0.3, 2.0)
    )
    both = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3, min_side=0))
    way = draw(st.sampled_from(["two", "two", "same", "left", "right"]))
    x = filled(draw, both.input_shapes[0], low, high, one)
    if way == "two" or name not in ARITHMETIC:
        y = filled(draw, both.input_shapes[1], low, high, other)
        return Drawn(named(name), [x, y])
    symbol, number = ARITHMETIC[name], draw(st.sampled_from([2, 0.5, 3.0, 1]))
    if way == "same":
        return Drawn(lambda xp, a: symbol(a, a), [x], "same")
    if way == "left":
        return Drawn(lambda xp, a: symbol(number, a), [x], number)
    return Drawn(lambda xp, a: symbol(a, number), [x], number)


OTHERS = ["where", "clip", "clip-arrays", "full"]


@st.composite
def choices(draw: Draw, name: str) -> Drawn:
    three = draw(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3))
    x, y, z = (filled(draw, s, *REAL_LINE) for s in three.input_shapes)
    if name == "where":
        return Drawn(lambda xp, a, b, c: xp.where(a > 0.0, b * a, c), [x, y, z])
    if name == "clip":
        low, high = sorted(draw(st.tuples(*[st.floats(-1.9, 1.9)] * 2)))
        ends = draw(st.sampled_from([(low, high), (low, None), (None, high)]))
        return Drawn(lambda xp, a: xp.clip(a, *ends), [x], ends)
    if name == "full":
        return Drawn(
            lambda xp, a: xp.full_like(xp.broadcast_to(a, (2, *a.shape)), xp.sum(a)),
            [x],
            without=("torch", "jax"),  # whose values must be numbers
        )
    # the bounds broadcast to the clipped array
    whole = filled(draw, three.result_shape, *REAL_LINE)
    return Drawn(lambda xp, a, b: xp.clip(a, b - 1.0, b + 0.5), [whole, y])


# Reductions

REDUCTIONS = ["sum", "mean", "prod", "max", "min", "var", "std"]


@st.composite
def reduction(draw: Draw, name: str) -> Drawn:
    shape = draw(shapes(1, side=2 if name in ("var", "std") else 1))
    ndim = len(shape)
    some = st.lists(st.integers(0, ndim - 1), min_size=1, max_size=ndim, unique=True)
    axis = draw(st.one_of(st.none(), st.integers(-ndim, ndim - 1), some.map(tuple)))
    options: dict[str, Any] = {"axis": axis, "keepdims": draw(st.booleans())}
    if name in ("var", "std"):
        options["correction"] = draw(st.sampled_from([0.0, 1.0]))
    dtype = draw(kinds(complex_too=name in ("sum", "mean", "prod")))
    return Drawn(named(name, **options), [filled(draw, shape, *REAL_LINE, dtype)], options)


@st.composite
def cumulative(draw: Draw, name: str) -> Drawn:
    shape = draw(shapes(1))
    options = {"axis": axis_of(draw, len(shape)), "include_initial": draw(st.booleans())}
    dtype = draw(kinds(complex_too=True))
    return Drawn(named(name, **options), [filled(draw, shape, *REAL_LINE, dtype)], options)


# Moving entries

MOVES = words(
    "reshape permute_dims matrix_transpose moveaxis expand_dims squeeze broadcast_to flip "
    "roll tril triu tile repeat concat stack unstack diff meshgrid broadcast_arrays astype "
    "sort asarray"
)


@st.composite
def move(draw: Draw, name: str) -> Drawn:  # noqa: C901, PLR0911, PLR0912 - a line for each
    shape = draw(shapes(2 if name in ("matrix_transpose", "tril", "triu") else 1))
    ndim = len(shape)
    axis, order = axis_of(draw, ndim), tuple(draw(st.permutations(range(ndim))))
    times = tuple(draw(st.lists(st.integers(1, 2), min_size=ndim, max_size=ndim)))
    shift = draw(st.integers(-4, 4))
    x = filled(draw, shape, *REAL_LINE, draw(kinds(complex_too=name != "sort")))
    y = filled(draw, shape, *REAL_LINE, x.dtype.name)

    def of(f: Function, *about: Any, two: bool = False) -> Drawn:
        return Drawn(f, [x, y] if two else [x], about)

    if name == "reshape":
        new = tuple(shape[i] for i in order)
        return of(lambda xp, a: (xp.reshape(a, new), xp.reshape(a, (-1,))), new)
    if name == "permute_dims":
        return of(lambda xp, a: xp.permute_dims(a, order), order)
    if name == "moveaxis":
        return of(lambda xp, a: xp.moveaxis(a, axis, order[0]), axis, order[0])
    if name in ("expand_dims", "squeeze"):
        at = draw(st.integers(-ndim - 1, ndim))
        if name == "expand_dims":
            return of(lambda xp, a: xp.expand_dims(a, axis=at), at)
        return of(lambda xp, a: xp.squeeze(xp.expand_dims(a, axis=at) * 2.0, axis=at), at)
    if name == "broadcast_to":
        return of(lambda xp, a: xp.broadcast_to(xp.expand_dims(a, axis=0), (2, 3, *shape)))
    if name == "flip":
        return of(lambda xp, a: (xp.flip(a), xp.flip(a, axis=axis), xp.flip(a, axis=order)), axis)
    if name == "roll":
        several = tuple(range(ndim))
        return of(
            lambda xp, a: (
                xp.roll(a, shift),
                xp.roll(a, shift, axis=axis),
                xp.roll(a, several, axis=order),
            ),
            shift,
            axis,
            order,
        )
    if name in ("tril", "triu"):
        return of(named(name, k=shift), shift)
    if name == "tile":
        fewer = times[: draw(st.integers(1, ndim))]
        return of(lambda xp, a: (xp.tile(a, times), xp.tile(a, (3, *times)), xp.tile(a, fewer)))
    if name == "repeat":
        counts = draw(hnp.arrays("int64", shape[axis], elements=st.integers(0, 2)))
        given = draw(st.sampled_from([2, counts]))
        if given is not counts:
            return of(lambda xp, a: (xp.repeat(a, 2), xp.repeat(a, 2, axis=axis)), axis)
        made = of(lambda xp, a: xp.repeat(a, xp.asarray(counts), axis=axis), axis, counts)
        made.without = ("jax",)  # compiled, its length must be known
        return made
    if name == "concat":
        return of(
            lambda xp, a, b: (xp.concat([a, b, a], axis=axis), xp.concat([a, b], axis=None)),
            axis,
            two=True,
        )
    if name == "stack":
        at = draw(st.integers(-ndim - 1, ndim))
        return of(lambda xp, a, b: xp.stack([a, b, a], axis=at), at, two=True)
    if name == "unstack":
        return of(lambda xp, a: tuple(xp.unstack(a, axis=axis)), axis)
    if name == "diff":
        n = draw(st.integers(1, 2))
        return of(
            lambda xp, a, b: (
                xp.diff(a, axis=axis, n=n),
                xp.diff(a, axis=axis, prepend=b),
                xp.diff(a, axis=axis, append=b),
            ),
            axis,
            n,
            two=True,
        )
    if name == "meshgrid":
        how = draw(st.sampled_from(["xy", "ij"]))
        return of(
            lambda xp, a, b: tuple(
                xp.meshgrid(xp.reshape(a, (-1,)), xp.reshape(b, (-1,))[:2], indexing=how)
            ),
            how,
            two=True,
        )
    if name == "broadcast_arrays":
        thin = filled(draw, shape[-1:], *REAL_LINE)
        return Drawn(lambda xp, a, b: tuple(xp.broadcast_arrays(a, b)), [x, thin])
    if name == "astype":
        return of(lambda xp, a: xp.astype(a, xp.complex128) ** 2)
    if name == "sort":
        options = {"axis": axis, "descending": draw(st.booleans())}
        return of(named("sort", **options), options)
    made = of(named(name))
    if name == "asarray":
        made.without = ("torch",)  # whose asarray detaches, or warns that it does no more
    return made


INDEXING = ["slices", "integers", "rows", "mask", "take", "take_along_axis"]


@st.composite
def indexing(draw: Draw, name: str) -> Drawn:
    shape = draw(shapes(1))
    x = filled(draw, shape, *REAL_LINE, draw(kinds(complex_too=True)))
    axis = axis_of(draw, len(shape))
    n = shape[axis]
    if name == "slices":
        key = draw(hnp.basic_indices(shape, allow_newaxis=True, max_dims=5))
        parts = key if isinstance(key, tuple) else (key,)
        back = any(isinstance(k, slice) and (k.step or 1) < 0 for k in parts)
        return Drawn(lambda xp, a: a[key], [x], key, ("torch",) if back else ())
    if name == "integers":
        key = draw(hnp.integer_array_indices(shape, result_shape=shapes(1, most=2)))
        return Drawn(lambda xp, a: a[tuple(xp.asarray(k) for k in key)], [x], key)
    if name == "mask":
        mask = draw(hnp.arrays("bool", shape))
        return Drawn(lambda xp, a: a[xp.asarray(mask)], [x], mask, ("jax",))
    places = st.integers(0, n - 1)
    if name == "take_along_axis":
        chosen = draw(
            hnp.arrays(
                "int64",
                [4 if i == axis % x.ndim else m for i, m in enumerate(shape)],
                elements=places,
            )
        )
        return Drawn(
            lambda xp, a: xp.take_along_axis(a, xp.asarray(chosen), axis=axis), [x], (axis, chosen)
        )
    rows = draw(hnp.arrays("int64", st.integers(1, 4), elements=places))
    if name == "take":
        return Drawn(lambda xp, a: xp.take(a, xp.asarray(rows), axis=axis), [x], (axis, rows))
    lead = (slice(None),) * (axis % x.ndim)
    return Drawn(lambda xp, a: a[(*lead, xp.asarray(rows), ...)], [x], (lead, rows))


# Products

PRODUCTS = [
    "matmul",
    "vecdot",
    "tensordot",
    "linalg.outer",
    "linalg.cross",
    "linalg.vector_norm",
    "linalg.matrix_norm",
]


@st.composite
def product(draw: Draw, name: str) -> Drawn:
    dtype = draw(kinds(complex_too="norm" not in name))
    options: dict[str, Any] = {}
    if name in ("matmul", "vecdot"):
        core = {"matmul": "(m?,n),(n,p?)->(m?,p?)", "vecdot": "(n),(n)->()"}[name]
        found = draw(hnp.mutually_broadcastable_shapes(signature=core, max_dims=2, max_side=3))
        both = found.input_shapes
    elif name == "tensordot":
        ours, theirs, shared = (draw(shapes(most=2)) for _ in range(3))
        both, k = ((*ours, *shared), (*shared, *theirs)), len(shared)
        there = tuple(range(len(ours), len(ours) + k)), tuple(range(k))
        order = draw(st.permutations(range(k)))
        turned = tuple(tuple(side[i] for i in order) for side in there)
        options["axes"] = draw(st.sampled_from([k, turned]))
    elif name == "linalg.outer":
        both = draw(shapes(1, most=1)), draw(shapes(1, most=1))
    elif name == "linalg.cross":
        shape = draw(shapes(most=2))
        both = ((*shape, 3),) * 2
    else:
        low = 2 if "matrix" in name else 1
        shape, options["keepdims"] = draw(shapes(low)), draw(st.booleans())
        orders = ("fro", "nuc", 2, -2, 1, -1, inf, -inf) if low == 2 else (2, 1, 3, 0.5, inf, -inf)
        options["ord"] = draw(st.sampled_from(orders))
        if low == 1:
            options["axis"] = draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
        return Drawn(named(name, **options), [filled(draw, shape, *REAL_LINE, dtype)], options)
    operands = [filled(draw, shape, *REAL_LINE, dtype) for shape in both]
    return Drawn(named(name, **options), operands, options)


# Matrices

MATRICES = words(
    "inv solve solve-vector det slogdet cholesky qr qr-complete eigh eigvalsh eigvals svd "
    "svd-full svdvals pinv matrix_power trace diagonal"
)
TALL = {"qr", "qr-complete", "svd", "svd-full", "svdvals", "pinv", "diagonal"}


def size2(xp: Any, x: Any) -> Any:
    """Square the sizes of entries: signs and phases of vectors are anybody's choice."""
    return xp.real(x * xp.conj(x)) if "complex" in str(x.dtype) else x * x


def adjoint(xp: Any, a: Any) -> Any:
    t = xp.matrix_transpose(a)
    return xp.conj(t) if "complex" in str(a.dtype) else t


def span(xp: Any, q: Any, k: int) -> Any:
    return q[..., k:] @ adjoint(xp, q[..., k:])


@st.composite
def matrix(draw: Draw, name: str) -> Drawn:  # noqa: C901, PLR0911 - a line for each
    """Draw matrices whose eigenvalues and singular values are well apart."""
    m, n = draw(st.tuples(*[st.integers(1, 3)] * 2))
    n = n if name in TALL else m
    dtype = draw(st.sampled_from(["float64", "complex128"]))
    lead, k = draw(st.sampled_from([(), (2,)])), min(m, n)
    a = 2.0 * np.eye(m, n) * np.arange(1, n + 1) + filled(draw, (*lead, m, n), -0.3, 0.3, dtype)
    about: Any = (m, n)

    def of(f: Function, *more: np.ndarray, without: tuple[str, ...] = ()) -> Drawn:
        return Drawn(f, [a, *more], about, without)

    if name == "solve":
        b = filled(draw, (*lead, m, draw(st.integers(1, 2))), *REAL_LINE, dtype)
        return of(named("linalg.solve"), b)
    if name == "solve-vector":
        return of(named("linalg.solve"), filled(draw, (m,), *REAL_LINE, dtype))
    if name == "slogdet":
        return of(lambda xp, a: tuple(xp.linalg.slogdet(a)))
    if name == "cholesky":
        upper = draw(st.booleans())
        return of(lambda xp, a: xp.linalg.cholesky(a @ adjoint(xp, a), upper=upper))
    if name == "qr":
        return of(lambda xp, a: tuple(xp.linalg.qr(a)))
    if name == "qr-complete":

        def whole(xp: Any, a: Any) -> Any:
            q, r = xp.linalg.qr(a, mode="complete")
            return q[..., :k], r, span(xp, q, k)

        return of(whole, without=("torch", "jax"))
    if name == "eigh":

        def symmetric(xp: Any, a: Any) -> Any:
            values, v = xp.linalg.eigh(a + adjoint(xp, a))
            return values, size2(xp, v)

        return of(symmetric)
    if name == "eigvalsh":
        return of(lambda xp, a: xp.linalg.eigvalsh(a + adjoint(xp, a)))
    if name == "eigvals":
        return of(lambda xp, a: xp.sum(xp.linalg.eigvals(a) ** 3, axis=-1))
    if name in ("svd", "svd-full"):
        full = name == "svd-full"

        def parts(xp: Any, a: Any) -> Any:
            u, s, vh = xp.linalg.svd(a, full_matrices=full)
            v = adjoint(xp, vh)
            rest = (span(xp, u, k), span(xp, v, k)) if full else ()
            return size2(xp, u[..., :k]), s, size2(xp, v[..., :k]), *rest

        return of(parts, without=("torch", "jax") if full else ())
    if name == "matrix_power":
        about = draw(st.integers(-2, 4))
        return of(lambda xp, a: xp.linalg.matrix_power(a, about))
    if name in ("trace", "diagonal"):
        about = draw(st.integers(-2, 2))
        assume(-m < about < n)
        return of(named(f"linalg.{name}", offset=about))
    return of(named(f"linalg.{name}"))


# Fourier transforms

FOURIER = words("fft ifft rfft irfft hfft ihfft fftn ifftn rfftn irfftn fftshift ifftshift")


@st.composite
def fourier(draw: Draw, name: str) -> Drawn:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=5))
    ndim = len(shape)
    real = name in ("rfft", "ihfft", "rfftn", "irfftn")
    x = filled(draw, shape, *REAL_LINE, "float64" if real else "complex128")
    options: dict[str, Any] = {"norm": draw(st.sampled_from(NORMS))}
    if name.endswith("shift"):
        options = {"axes": draw(st.one_of(st.none(), st.integers(0, ndim - 1)))}
    elif name == "irfftn":
        # of what is a transform of real numbers: for anything else libraries differ
        axes = tuple(draw(st.permutations(range(ndim))))
        sizes = tuple(shape[i] for i in axes)
        return Drawn(
            lambda xp, a: xp.fft.irfftn(3.0 * xp.fft.rfftn(a, axes=axes), s=sizes, axes=axes), [x]
        )
    elif name.endswith("n"):
        axes = tuple(draw(st.permutations(range(ndim)))[: draw(st.integers(1, ndim))])
        sizes = tuple(draw(st.integers(1, 6)) for _ in axes)
        options |= draw(st.sampled_from([{}, {"axes": axes}, {"axes": axes, "s": sizes}]))
    else:
        options |= {"n": draw(st.sampled_from([None, 2, 3, 5, 6])), "axis": axis_of(draw, ndim)}
    if name not in ("irfft", "hfft"):
        return Drawn(named(f"fft.{name}", **options), [x], options)
    axis = options["axis"] % ndim
    assume(options["n"] is not None or shape[axis] > 1)
    lead = (slice(None),) * axis

    def of(xp: Any, a: Any) -> Any:
        first, rest = a[(*lead, slice(0, 1), ...)], a[(*lead, slice(1, None), ...)]
        first = xp.astype(xp.real(first), a.dtype)  # the mean of real numbers is real
        return named(f"fft.{name}", **options)(xp, xp.concat([first, rest], axis=axis))

    return Drawn(of, [x], options)


FAMILIES: dict[str, tuple[Callable[[str], st.SearchStrategy[Drawn]], list[str]]] = {
    "unary": (unary, [*UNARY]),
    "binary": (binary, BINARY),
    "choices": (choices, OTHERS),
    "reductions": (reduction, REDUCTIONS),
    "cumulative": (cumulative, ["cumulative_sum", "cumulative_prod"]),
    "moves": (move, MOVES),
    "indexing": (indexing, INDEXING),
    "products": (product, PRODUCTS),
    "matrices": (matrix, MATRICES),
    "fourier": (fourier, FOURIER),
}
EVERY = [(family, name) for family, (_, names) in FAMILIES.items() for name in names]


def agree(drawn: Drawn, library: str, value: Any, grads: Any) -> None:
    """Compare with a library's own gradients; single precision loses digits to cancellation."""
    if missing(library) or library in drawn.without:
        return
    got = gradients(library, weighed(drawn.f), drawn.operands)
    bounds = (1e-11, 1e-9) if drawn.exact else (1e-3, 1e-3)
    size = max(1.0, sum(float(np.sum(np.abs(x))) for x in drawn.operands))
    assert abs(got[0] - value) <= bounds[0] * max(size, abs(value))
    assert difference(got[1], grads) <= bounds[1]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_rules_are_derivatives(family: str, name: str) -> None:
    @settings(max_examples=20)
    @given(FAMILIES[family][0](name))
    def check(drawn: Drawn) -> None:
        loss = weighed(drawn.f)
        value, grads = gradients("numpy", loss, drawn.operands)
        if drawn.exact:
            coarse = finite_differences(loss, drawn.operands)
            fine = finite_differences(loss, drawn.operands, step=2e-5)
            assume(difference(coarse, fine) < 1e-6)  # no kink within reach
            assert difference(grads, coarse) < 3e-6
        agree(drawn, "torch", value, grads)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_agree_with_jax(family: str) -> None:
    if reason := missing("jax"):
        pytest.skip(reason)
    strategy, names = FAMILIES[family]

    @settings(max_examples=min(25, 4 * len(names)))
    @given(st.sampled_from(names).flatmap(strategy))
    def check(drawn: Drawn) -> None:
        assume("jax" not in drawn.without)
        value, grads = gradients("numpy", weighed(drawn.f), drawn.operands)
        agree(drawn, "jax", value, grads)

    check()


def test_every_rule_is_drawn() -> None:
    rules = {**RULES, **COMPOSITES, **LINALG_RULES, **LINALG_COMPOSITES}
    rules |= {**fft.RULES, **fft.COMPOSITES}
    drawn = {name.removeprefix("linalg.").partition("-")[0] for _, name in EVERY}
    public = {name for name in rules if not name.startswith("_")}
    assert public - drawn == {"eig", "full_like"}  # whose rows are in test_tape.py; as "full"

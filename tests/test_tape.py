"""The tape's rules: against torch, JAX and finite differences; its errors, memory and threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from peft_any.layer import linear
from peft_any.testing.gradients import ENGINES, difference, finite_differences, gradients, weighed

Function = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """A function of arrays with the shapes and ranges of its operands."""

    name: str
    f: Function
    shapes: tuple[tuple[int, ...], ...]
    low: float = -2.0
    high: float = 2.0
    dtype: str = "float64"
    without: tuple[str, ...] = ()
    """Engines that lack the function, or its derivative."""

    def operands(self) -> list[np.ndarray]:
        rng = np.random.default_rng(len(self.name))
        drawn = [rng.uniform(self.low, self.high, s) for s in self.shapes]
        if self.dtype == "complex128":
            drawn = [d + 1j * rng.uniform(self.low, self.high, d.shape) for d in drawn]
        return drawn


def unary(names: str, low: float = -2.0, high: float = 2.0, **kw: Any) -> list[Row]:
    return [
        Row(n, lambda xp, x, n=n: getattr(xp, n)(x), ((3, 2),), low, high, **kw)
        for n in names.split()
    ]


def binary(names: str, low: float = 0.5, high: float = 2.0, **kw: Any) -> list[Row]:
    return [
        Row(
            f"{n}-{i}",
            lambda xp, x, y, n=n: getattr(xp, n)(x, y),
            shapes,
            low,
            high,
            **kw,
        )
        for n in names.split()
        for i, shapes in enumerate([((3, 2), (3, 2)), ((3, 1), (2,)), ((), (2, 3))])
    ]


def row(name: str, f: Function, *shapes: tuple[int, ...], **kw: Any) -> Row:
    return Row(name, f, shapes, **kw)


def spd(xp: Any, a: Any) -> Any:
    n = a.shape[-1]
    return (
        a @ xp.conj(xp.matrix_transpose(a)) + n * xp.eye(n, dtype=a.dtype)
        if "complex" in str(a.dtype)
        else a @ xp.matrix_transpose(a) + n * xp.eye(n, dtype=a.dtype)
    )


def sym(xp: Any, a: Any) -> Any:
    t = xp.matrix_transpose(a)
    return 0.5 * (a + (xp.conj(t) if "complex" in str(a.dtype) else t))


def index(xp: Any, values: Any, like: Any) -> Any:
    return xp.asarray(values)


def basis(xp: Any, q: Any, n: int) -> Any:
    """Give what a column's sign, or the choice of the columns after the n-th, cannot change."""
    first, rest = q[..., :n], q[..., n:]
    size = xp.real(first * xp.conj(first)) if "complex" in str(q.dtype) else first * first
    other = xp.matrix_transpose(rest)
    return size, rest @ (xp.conj(other) if "complex" in str(q.dtype) else other)


def by_eigenvalue(xp: Any, values: Any, v: Any) -> Any:
    """Give what the order of eigenvalues and the phases of eigenvectors cannot change."""
    if "complex" not in str(v.dtype):
        return xp.sum(v * v * xp.expand_dims(values, axis=-2), axis=-1)
    return xp.sum(xp.real(v * xp.conj(v)) * xp.expand_dims(values, axis=-2), axis=-1)


NATIVE = ("torch", "jax")
A, V, S = (3, 4), (4,), (2, 3, 3)

ROWS = [
    *unary("exp expm1 square sin cos tan sinh cosh tanh asinh atan abs negative positive"),
    *unary("log log1p log2 log10 sqrt reciprocal", 0.3, 2.0),
    *unary("asin acos atanh", -0.9, 0.9),
    *unary("acosh", 1.2, 3.0),
    *binary("add subtract multiply divide pow atan2 hypot logaddexp maximum minimum"),
    *binary("copysign", -2.0, 2.0),
    *binary("remainder", 0.6, 0.9),
    # operators and scalars
    row(
        "operators",
        lambda xp, a, b: (2.0 - a) * b / 3.0 + (-a) ** 2 + 1.0 / b - b * b,
        A,
        A,
        low=0.5,
    ),
    row("power-of-scalar", lambda xp, a: 2.0**a + a**3 + a**0.5 + a**0, A, low=0.5),
    row("same-operand", lambda xp, a: a * a + a / (a + 3.0) - a - a, A),
    row("where", lambda xp, a, b: xp.where(a > b, a * b, a - b), A, V),
    row("where-scalar", lambda xp, a: xp.where(a > 0.0, a, 0.0 * a), A),
    row("clip", lambda xp, a: xp.clip(a, -1.0, 1.0), A),
    row("clip-arrays", lambda xp, a, b: xp.clip(a, b - 1.0, b + 0.5), A, V),
    # reductions
    *[
        row(
            f"{n}-{axis}-{keep}",
            lambda xp, a, n=n, axis=axis, keep=keep: getattr(xp, n)(a, axis=axis, keepdims=keep),
            (2, 3, 4),
        )
        for n in ("sum", "mean", "prod", "max", "min", "var", "std")
        for axis in (None, 1, (0, -1))
        for keep in (False, True)
    ],
    row("var-corrected", lambda xp, a: xp.var(a, axis=1, correction=1.0), A),
    row("prod-zero", lambda xp, a: xp.prod(a * xp.astype(a > 0.0, a.dtype), axis=1), A),
    row("cumulative_sum", lambda xp, a: xp.cumulative_sum(a, axis=1), A),
    row(
        "cumulative_sum-initial",
        lambda xp, a: xp.cumulative_sum(a, axis=0, include_initial=True),
        A,
    ),
    row("cumulative_prod", lambda xp, a: xp.cumulative_prod(a, axis=1), (2, 5)),
    row("logsumexp", lambda xp, a: xp.log(xp.sum(xp.exp(a - xp.max(a)), axis=1)) + xp.max(a), A),
    # shapes
    row("reshape", lambda xp, a: xp.reshape(a, (2, -1)), A),
    row("permute_dims", lambda xp, a: xp.permute_dims(a, (2, 0, 1)), (2, 3, 4)),
    # NumPy 1.26 has no mT.
    row("mT", lambda xp, a: getattr(a, "mT", xp.matrix_transpose(a)), (2, 3, 4)),
    row("transposes", lambda xp, a: (xp.matrix_transpose(a), a[0, ...].T), (2, 3, 4)),
    row("moveaxis", lambda xp, a: xp.moveaxis(a, (0, 1), (-1, 0)), (2, 3, 4)),
    row("expand-squeeze", lambda xp, a: xp.squeeze(xp.expand_dims(a, axis=1), axis=1), A),
    row("broadcast_to", lambda xp, a: xp.broadcast_to(a, (2, 3, 4)), (3, 1)),
    row("broadcast_arrays", lambda xp, a, b: tuple(xp.broadcast_arrays(a, b)), (3, 1), V),
    row("meshgrid", lambda xp, a, b: tuple(xp.meshgrid(a, b)), (3,), V),
    row("meshgrid-ij", lambda xp, a, b: tuple(xp.meshgrid(a, b, indexing="ij")), (3,), V),
    row("flip", lambda xp, a: (xp.flip(a), xp.flip(a, axis=0)), A),
    row("roll", lambda xp, a: (xp.roll(a, 2), xp.roll(a, (1, -1), axis=(0, 1))), A),
    row("tril-triu", lambda xp, a: (xp.tril(a), xp.triu(a, k=1)), A),
    row("tile", lambda xp, a: (xp.tile(a, (2, 1, 3)), xp.tile(a, (2,))), A),
    row("repeat", lambda xp, a: (xp.repeat(a, 2), xp.repeat(a, 3, axis=1)), A),
    row(
        "concat",
        lambda xp, a, b: (xp.concat([a, b], axis=1), xp.concat([a, b], axis=None)),
        A,
        (3, 2),
    ),
    row("stack", lambda xp, a, b: (xp.stack([a, b]), xp.stack([a, a], axis=-1)), A, A),
    row("unstack", lambda xp, a: tuple(xp.unstack(a, axis=1)), A),
    row("diff", lambda xp, a: (xp.diff(a), xp.diff(a, axis=0, n=2)), (4, 3)),
    row("astype", lambda xp, a: xp.astype(xp.astype(a, xp.float32), xp.float64) * 1.0, A),
    # indexing
    row("slices", lambda xp, a: (a[1:, ::2, 0], a[..., -1], a[0, 1, 2]), (3, 4, 5)),
    row(
        "slices-backwards",
        lambda xp, a: a[::-1, :, 3:0:-2],
        (3, 4, 5),
        without=("torch", "torch:tape"),
    ),
    row("newaxis", lambda xp, a: (a[:, None, :], a[None, ...], a[1, None, 1:]), A),
    row("take", lambda xp, a: xp.take(a, index(xp, [2, 0, 2, 2], a), axis=0), A),
    row("take-last", lambda xp, a: xp.take(a, index(xp, [1, 1], a), axis=-1), (2, 3, 4)),
    row(
        "take_along_axis",
        lambda xp, a: xp.take_along_axis(
            a, index(xp, [[2, 0, 0], [1, 1, 1], [0, 1, 2]], a), axis=1
        ),
        A,
    ),
    row(
        "indices",
        lambda xp, a: a[index(xp, [0, 2, 0], a), index(xp, [1, -3, 1], a)],
        A,
    ),
    row(
        "indices-of-rows",
        lambda xp, a: (a[index(xp, [[0, 2], [0, -1]], a), ...], a[0, index(xp, [1, 1], a), ...]),
        (3, 4, 2),
        without=("strict",),  # which has indices of every axis or none
    ),
    row(
        "mask",
        lambda xp, a: a[index(xp, [True, False, True], a)],
        A,
        without=("jax", "jax:tape"),  # where it is compiled, a mask makes no shape
    ),
    row("sort", lambda xp, a: (xp.sort(a, axis=0), xp.sort(a, descending=True)), (4, 3)),
    # products
    *[
        row(f"linear-{i}", lambda xp, x, w, b: (linear(x, w, b), linear(x, w)), shape, (2, 4), (2,))
        for i, shape in enumerate([(4,), (3, 4), (2, 3, 4), (0, 4)])
    ],
    *[
        row(f"matmul-{i}", lambda xp, a, b: a @ b, *shapes)
        for i, shapes in enumerate(
            [
                ((3, 4), (4, 2)),
                ((4,), (4,)),
                ((3, 4), (4,)),
                ((4,), (4, 2)),
                ((2, 3, 4), (4, 2)),
                ((2, 3, 4), (4,)),
                ((4,), (2, 4, 3)),
                ((2, 1, 3, 4), (5, 4, 2)),
                ((3, 4), (2, 4, 1)),
            ]
        )
    ],
    row("vecdot", lambda xp, a, b: (xp.vecdot(a, b), xp.vecdot(a, a)), A, A),
    row("vecdot-axis", lambda xp, a, b: xp.vecdot(a, b, axis=-2), A, (3, 1)),
    row(
        "tensordot",
        lambda xp, a, b: (xp.tensordot(a, b, axes=1), xp.tensordot(a, b, axes=((0,), (1,)))),
        (3, 3),
        (3, 3),
    ),
    row("tensordot-0", lambda xp, a, b: xp.tensordot(a, b, axes=0), A, (2,)),
    row("outer", lambda xp, a, b: xp.linalg.outer(a, b), (3,), V),
    row("cross", lambda xp, a, b: xp.linalg.cross(a, b), (2, 3), (2, 3)),
    row(
        "vector_norm",
        lambda xp, a: tuple(
            xp.linalg.vector_norm(a, axis=0, ord=o)
            for o in (2, 1, 3, float("inf"), -float("inf"), 0)
        ),
        A,
    ),
    row(
        "matrix_norm",
        lambda xp, a: tuple(
            xp.linalg.matrix_norm(a, ord=o) for o in ("fro", "nuc", 2, -2, 1, -1, float("inf"))
        ),
        A,
    ),
    row(
        "norms-keepdims",
        lambda xp, a: (
            xp.linalg.matrix_norm(a, keepdims=True),
            xp.linalg.matrix_norm(a, ord="nuc", keepdims=True),
            xp.linalg.matrix_norm(a, ord=1, keepdims=True),
            xp.linalg.vector_norm(a, keepdims=True),
        ),
        A,
    ),
    # matrices
    row("inv", lambda xp, a: xp.linalg.inv(spd(xp, a)), S),
    row("solve", lambda xp, a, b: xp.linalg.solve(spd(xp, a), b), S, (2, 3, 2)),
    row("solve-vector", lambda xp, a, b: xp.linalg.solve(spd(xp, a), b), (3, 3), (3,)),
    row("det", lambda xp, a: xp.linalg.det(a), S),
    row("slogdet", lambda xp, a: tuple(xp.linalg.slogdet(a)), S),
    row("cholesky", lambda xp, a: xp.linalg.cholesky(spd(xp, a)), S),
    row("cholesky-upper", lambda xp, a: xp.linalg.cholesky(spd(xp, a), upper=True), S),
    row("qr-tall", lambda xp, a: tuple(xp.linalg.qr(a)), (4, 3)),
    row("qr-square", lambda xp, a: tuple(xp.linalg.qr(a)), S),
    row("qr-wide", lambda xp, a: tuple(xp.linalg.qr(a)), A),
    *[
        row(
            f"qr-complete-{i}",
            lambda xp, a, n=n: (
                xp.linalg.qr(a, mode="complete")[1],
                *basis(xp, xp.linalg.qr(a, mode="complete")[0], n),
            ),
            shape,
            without=NATIVE,
        )
        for i, (shape, n) in enumerate([((4, 2), 2), ((2, 4, 3), 3)])
    ],
    row("qr-complete-wide", lambda xp, a: tuple(xp.linalg.qr(a, mode="complete")), (2, 3)),
    *[
        row(
            f"svd-full-{i}",
            lambda xp, a, n=n: (
                *basis(xp, xp.linalg.svd(a)[0], n),
                xp.linalg.svd(a)[1],
                *basis(xp, xp.matrix_transpose(xp.linalg.svd(a)[2]), n),
            ),
            shape,
            without=NATIVE,
        )
        for i, (shape, n) in enumerate([((4, 2), 2), ((3, 3), 3), ((2, 4), 2)])
    ],
    row("eig", lambda xp, a: by_eigenvalue(xp, *xp.linalg.eig(a)), S, without=("jax", "jax:tape")),
    row("eigvals", lambda xp, a: xp.sum(xp.linalg.eigvals(a) ** 3, axis=-1), S),
    row(
        "eigh",
        lambda xp, a: (xp.linalg.eigh(sym(xp, a))[0], xp.abs(xp.linalg.eigh(sym(xp, a))[1])),
        S,
    ),
    row("eigvalsh", lambda xp, a: xp.linalg.eigvalsh(sym(xp, a)), S),
    *[
        row(
            f"svd-{i}",
            lambda xp, a: tuple(xp.abs(x) for x in xp.linalg.svd(a, full_matrices=False)),
            shape,
        )
        for i, shape in enumerate([(4, 3), (3, 3), (3, 4)])
    ],
    row("svdvals", lambda xp, a: xp.linalg.svdvals(a), A),
    row("pinv-tall", lambda xp, a: xp.linalg.pinv(a), (4, 3)),
    row("pinv-wide", lambda xp, a: xp.linalg.pinv(a), (2, 4)),
    row(
        "matrix_power",
        lambda xp, a: tuple(xp.linalg.matrix_power(spd(xp, a), n) for n in (3, 1, -2)),
        S,
    ),
    row("trace", lambda xp, a: (xp.linalg.trace(a), xp.linalg.trace(a, offset=1)), S),
    row(
        "diagonal",
        lambda xp, a: tuple(xp.linalg.diagonal(a, offset=k) for k in (0, 1, -1, 3)),
        (2, 3, 4),
    ),
]

COMPLEX = [
    *unary(
        "exp log sqrt square reciprocal sin cos sinh cosh tanh abs negative conj real imag",
        0.3,
        1.5,
        dtype="complex128",
    ),
    *unary("sign", dtype="complex128", without=("jax",)),  # whose derivative is zero
    *unary("tan asin acos atan asinh atanh expm1 log1p", 0.2, 0.6, dtype="complex128"),
    *binary("add subtract multiply divide pow", dtype="complex128"),
    row(
        "c-sum-prod",
        lambda xp, a: (xp.sum(a), xp.mean(a, axis=0), xp.prod(a, axis=1)),
        A,
        dtype="complex128",
    ),
    row(
        "c-linear",
        lambda xp, x, w: linear(xp.real(x), w),
        A,
        (2, 4),
        dtype="complex128",
        without=("torch", "torch:tape"),
    ),
    row("c-matmul", lambda xp, a, b: a @ b, (2, 3, 4), (4, 2), dtype="complex128"),
    row("c-matmul-vector", lambda xp, a, b: (a @ b, b @ b), A, V, dtype="complex128"),
    row("c-vecdot", lambda xp, a, b: xp.vecdot(a, b), A, A, dtype="complex128"),
    row(
        "c-index",
        lambda xp, a: (a[1:, ::2], xp.where(xp.real(a) > 0, a, 2.0 * a)),
        A,
        dtype="complex128",
    ),
    row(
        "c-norm",
        lambda xp, a: (xp.linalg.vector_norm(a), xp.linalg.matrix_norm(a)),
        A,
        dtype="complex128",
    ),
    row("c-var", lambda xp, a: xp.sum(xp.abs(a) ** 2), A, dtype="complex128"),
    row("c-inv", lambda xp, a: xp.linalg.inv(spd(xp, a)), S, dtype="complex128"),
    row(
        "c-solve", lambda xp, a, b: xp.linalg.solve(spd(xp, a), b), S, (2, 3, 2), dtype="complex128"
    ),
    row("c-det", lambda xp, a: (xp.linalg.det(a), *xp.linalg.slogdet(a)), S, dtype="complex128"),
    row("c-cholesky", lambda xp, a: xp.linalg.cholesky(spd(xp, a)), S, dtype="complex128"),
    row("c-qr", lambda xp, a: tuple(xp.linalg.qr(a)), (4, 3), dtype="complex128"),
    row(
        "c-eigh",
        lambda xp, a: (xp.linalg.eigh(sym(xp, a))[0], xp.abs(xp.linalg.eigh(sym(xp, a))[1])),
        S,
        dtype="complex128",
    ),
    row(
        "c-svd",
        lambda xp, a: tuple(xp.abs(x) for x in xp.linalg.svd(a, full_matrices=False)),
        (3, 4),
        dtype="complex128",
    ),
    row(
        "c-svd-full",
        lambda xp, a: (*basis(xp, xp.linalg.svd(a)[0], 2), xp.linalg.svd(a)[1]),
        (4, 2),
        dtype="complex128",
        without=NATIVE,
    ),
    row(
        "c-qr-complete",
        lambda xp, a: basis(xp, xp.linalg.qr(a, mode="complete")[0], 2),
        (4, 2),
        dtype="complex128",
        without=NATIVE,
    ),
    row(
        "c-eig",
        lambda xp, a: by_eigenvalue(xp, *xp.linalg.eig(a)),
        S,
        dtype="complex128",
        without=("jax", "jax:tape"),
    ),
    row("c-pinv", lambda xp, a: xp.linalg.pinv(a), (4, 3), dtype="complex128"),
    row(
        "mixed-kinds", lambda xp, a: xp.astype(xp.real(a), xp.complex128) * a, A, dtype="complex128"
    ),
]

NORMS = ("backward", "ortho", "forward")


def each_norm(name: str, **kw: Any) -> Function:
    return lambda xp, a: tuple(getattr(xp.fft, name)(a, norm=n, **kw) for n in NORMS)


FFT = [
    *[
        row(f"{name}-{n}", each_norm(name, n=n, axis=0), (5, 2), dtype=dtype)
        for name, dtype in (("fft", "complex128"), ("ifft", "complex128"), ("rfft", "float64"),
                            ("ihfft", "float64"))
        for n in (None, 4, 7, 12)
    ],
    *[
        row(f"{name}-{n}", lambda xp, a, name=name, n=n: tuple(
            getattr(xp.fft, name)(xp.concat([xp.astype(xp.real(a[:1, ...]), a.dtype), a[1:, ...]]),
                                  n=n, axis=0, norm=norm) for norm in NORMS), (5, 2), dtype="complex128")  # noqa: E501
        for name in ("irfft", "hfft") for n in (9, 10, 6, 13)
    ],
    *[
        row(f"{name}-{i}", each_norm(name, **kw), (3, 4), dtype=dtype)
        for name, dtype in (("fftn", "complex128"), ("ifftn", "complex128"), ("rfftn", "float64"))
        for i, kw in enumerate(({}, {"axes": (1, 0)}, {"s": (4, 3), "axes": (0, 1)}))
    ],
    row("irfftn", lambda xp, a: xp.fft.irfftn(xp.fft.rfftn(a, axes=(0, 1)), s=(3, 4), axes=(0, 1)), (3, 4)),  # noqa: E501
    row("fftshift", lambda xp, a: (xp.fft.fftshift(a), xp.fft.ifftshift(a, axes=1)), (3, 4)),
]  # fmt: skip

EVERY = [*ROWS, *COMPLEX, *FFT]


@pytest.mark.parametrize("case", EVERY, ids=lambda r: r.name)
def test_every_rule_is_the_derivative(case: Row) -> None:
    operands, loss = case.operands(), weighed(case.f)
    value, grads = gradients("numpy", loss, operands)
    if case.name != "astype":  # single precision in between
        numeric = finite_differences(loss, operands)
        assert difference(grads, numeric) < 1e-6
    assert np.isclose(value, float(loss(operands)))


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("case", EVERY, ids=lambda r: r.name)
def test_every_rule_agrees_on_every_engine(case: Row, engine: str) -> None:
    operands, loss = case.operands(), weighed(case.f)
    if engine in case.without:
        pytest.skip(f"{engine} lacks this function, or its derivative")
    want = gradients("numpy", loss, operands)
    got = gradients(engine, loss, operands)
    assert abs(got[0] - want[0]) < 1e-11 * max(1.0, abs(want[0]))
    assert difference(got[1], want[1]) < 1e-10

"""Derivative rules of solutions and decompositions of matrices.

Decompositions: Giles 2008, https://people.maths.ox.ac.uk/gilesm/files/NA-08-01.pdf; complex ones:
Wan and Zhang 2019, https://arxiv.org/abs/1909.02659; pseudo-inverse: Golub and Pereyra 1973,
https://doi.org/10.1137/0710036.
"""

from __future__ import annotations

from typing import Any

from peft_any.backend import creation_device
from peft_any.tape.products import LINALG_COMPOSITES as LINALG_COMPOSITES
from peft_any.tape.products import LINALG_RULES as LINALG_RULES
from peft_any.tape.products import adjoint, composite, linalg
from peft_any.tape.rules import conj, is_complex


@linalg("inv")
def _(xp: Any, y: Any, a: Any) -> Any:
    return (lambda g: -(adjoint(xp, y) @ g @ adjoint(xp, y)),)


@linalg("solve")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    def right(g: Any) -> Any:
        if b.ndim > 1:
            return xp.linalg.solve(adjoint(xp, a), g)
        return xp.linalg.solve(adjoint(xp, a), xp.expand_dims(g, axis=-1))[..., 0]

    def left(g: Any) -> Any:
        h = right(g)
        if b.ndim == 1:
            return -(xp.expand_dims(h, axis=-1) * conj(xp, xp.expand_dims(y, axis=-2)))
        return -(h @ adjoint(xp, y))

    return left, right


def _matrix(xp: Any, g: Any) -> Any:
    return xp.expand_dims(xp.expand_dims(g, axis=-1), axis=-1)


@linalg("det")
def _(xp: Any, y: Any, a: Any) -> Any:
    return (lambda g: _matrix(xp, g * conj(xp, y)) * adjoint(xp, xp.linalg.inv(a)),)


@linalg("slogdet")
def _(xp: Any, y: Any, a: Any) -> Any:
    def back(gs: list[Any]) -> Any:
        sign, size = gs
        g = xp.zeros_like(y[1]) if size is None else size
        if sign is not None and is_complex(a.dtype):
            turn = xp.imag(xp.conj(sign) * y[0])
            g = xp.astype(g, a.dtype) - 1j * xp.astype(turn, a.dtype)
        elif is_complex(a.dtype):
            g = xp.astype(g, a.dtype)
        return _matrix(xp, g) * adjoint(xp, xp.linalg.inv(a))

    return (back,)


def _half(xp: Any, m: Any) -> Any:
    """Give the lower triangle, the diagonal halved."""
    n = m.shape[-1]
    return xp.tril(m) * (1.0 - 0.5 * xp.eye(n, dtype=_real(xp, m), device=creation_device(m)))


def _real(xp: Any, m: Any) -> Any:
    return xp.real(m).dtype if is_complex(m.dtype) else m.dtype


@linalg("cholesky")
def _(xp: Any, y: Any, a: Any, /, *, upper: bool = False) -> Any:
    def back(g: Any) -> Any:
        low, g = (adjoint(xp, y), adjoint(xp, g)) if upper else (y, g)
        middle = _half(xp, adjoint(xp, low) @ g)
        up = adjoint(xp, low)
        s = adjoint(xp, xp.linalg.solve(up, adjoint(xp, xp.linalg.solve(up, middle))))
        return 0.5 * (s + adjoint(xp, s))

    return (back,)


def _leading(xp: Any, q: Any, g: Any, k: int) -> Any:
    """Turn the cotangent of a whole orthogonal matrix into that of its first k columns.

    The others are any basis of what is left: they turn with the first ones and not among
    themselves, so a function that reads their span alone gets its derivative.
    """
    first, rest = q[..., :k], q[..., k:]
    if rest.shape[-1] == 0:
        return g
    return g[..., :k] - rest @ (adjoint(xp, g[..., k:]) @ first)


@linalg("qr")
def _(xp: Any, y: Any, a: Any, /, *, mode: str = "reduced") -> Any:
    q_all, r_all = y
    m, n = a.shape[-2:]
    k = min(m, n)
    q = q_all[..., :k]

    def square(gq: Any, gr: Any, r: Any) -> Any:
        middle = r @ adjoint(xp, gr) - adjoint(xp, gq) @ q
        low = _half(xp, middle)
        inner = gq + q @ (low + adjoint(xp, low))
        return adjoint(xp, xp.linalg.solve(r, adjoint(xp, inner)))

    def back(gs: list[Any]) -> Any:
        gq, gr = (xp.zeros_like(x) if g is None else g for g, x in zip(gs, y, strict=True))
        gq, gr, r = _leading(xp, q_all, gq, k), gr[..., :k, :], r_all[..., :k, :]
        if m >= n:
            return square(gq, gr, r)
        rest = gr[..., m:]
        first = square(gq + a[..., m:] @ adjoint(xp, rest), gr[..., :m], r[..., :m])
        return xp.concat([first, q @ rest], axis=-1)

    return (back,)


def _gaps(xp: Any, v: Any) -> Any:
    """Differences v_j − v_i, ones on the diagonal."""
    eye = xp.eye(v.shape[-1], dtype=v.dtype, device=creation_device(v))
    return xp.expand_dims(v, axis=-2) - xp.expand_dims(v, axis=-1) + eye


@linalg("eigh")
def _(xp: Any, y: Any, a: Any) -> Any:
    values, v = y

    def back(gs: list[Any]) -> Any:
        eye = xp.eye(v.shape[-1], dtype=values.dtype, device=creation_device(v))
        inner = eye * xp.expand_dims(xp.zeros_like(values) if gs[0] is None else gs[0], axis=-1)
        if gs[1] is not None:
            inner = inner + (adjoint(xp, v) @ gs[1]) * (1.0 - eye) / _gaps(xp, values)
        return v @ xp.astype(inner, v.dtype) @ adjoint(xp, v)

    return (back,)


@linalg("eig")
def _(xp: Any, y: Any, a: Any) -> Any:
    values, v = y

    def back(gs: list[Any]) -> Any:
        eye = xp.eye(v.shape[-1], dtype=v.dtype, device=creation_device(v))
        up = adjoint(xp, v)
        inner = eye * xp.expand_dims(xp.zeros_like(values) if gs[0] is None else gs[0], axis=-2)
        if gs[1] is not None:  # the columns keep their length
            part = up @ gs[1]
            length = xp.expand_dims(xp.sum(eye * part, axis=-2), axis=-2)
            length = xp.astype(xp.real(length), v.dtype) if is_complex(v.dtype) else length
            inner = inner + (part - (up @ v) * length) * (1.0 - eye) / conj(xp, _gaps(xp, values))
        return xp.linalg.solve(up, inner @ up)

    return (back,)


@composite("eigvals")
def _(xp: Any, a: Any) -> Any:
    return xp.linalg.eig(a)[0]


@composite("eigvalsh")
def _(xp: Any, a: Any) -> Any:
    return xp.linalg.eigh(a)[0]


@linalg("svd")
def _(xp: Any, y: Any, a: Any, /, *, full_matrices: bool = True) -> Any:
    u_all, s, vh_all = y
    k = s.shape[-1]
    u, vh = u_all[..., :k], vh_all[..., :k, :]

    def back(gs: list[Any]) -> Any:
        gu, gvh = gs[0], gs[2]
        if gu is not None:
            gu = _leading(xp, u_all, gu, k)
        if gvh is not None:
            gvh = adjoint(xp, _leading(xp, adjoint(xp, vh_all), adjoint(xp, gvh), k))
        eye = xp.eye(s.shape[-1], dtype=s.dtype, device=creation_device(s))
        column, row = xp.expand_dims(s, axis=-1), xp.expand_dims(s, axis=-2)
        size = xp.zeros_like(s) if gs[1] is None else gs[1]
        inner = xp.astype(eye * xp.expand_dims(size, axis=-1), u.dtype)
        gaps = _gaps(xp, s * s)
        outside = None
        if gu is not None:
            part = adjoint(xp, u) @ gu
            skew = part - adjoint(xp, part)
            inner = inner + skew * (1.0 - eye) / gaps * row
            if is_complex(u.dtype):
                inner = inner + skew * eye / (2.0 * column)
            outside = ((gu - u @ part) / row) @ vh
        if gvh is not None:
            part = gvh @ adjoint(xp, vh)
            skew = adjoint(xp, part) - part
            inner = inner + column * (skew * (1.0 - eye) / gaps)
            rest = u @ ((gvh - part @ vh) / column)
            outside = rest if outside is None else outside + rest
        total = u @ inner @ vh
        return total if outside is None else total + outside

    return (back,)


@composite("svdvals")
def _(xp: Any, a: Any) -> Any:
    return xp.linalg.svd(a, full_matrices=False)[1]


@linalg("pinv")
def _(xp: Any, p: Any, a: Any, **kwargs: Any) -> Any:
    def back(g: Any) -> Any:
        ph, gh = adjoint(xp, p), adjoint(xp, g)
        first = gh - a @ (p @ gh)
        second = gh - (gh @ p) @ a
        return -(ph @ g @ ph) + first @ (p @ ph) + (ph @ p) @ second

    return (back,)


@composite("matrix_power")
def _(xp: Any, a: Any, n: int) -> Any:
    if n <= 0:
        if n == 0:
            eye = xp.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            return xp.broadcast_to(eye, a.shape)
        a, n = xp.linalg.inv(a), -n
    y = None
    while n:
        if n & 1:
            y = a if y is None else y @ a
        n >>= 1
        a = a @ a if n else a
    return y


@linalg("diagonal")
def _(xp: Any, y: Any, a: Any, /, *, offset: int = 0) -> Any:
    rows, columns = a.shape[-2:]
    n = y.shape[-1]

    def back(g: Any) -> Any:
        device = creation_device(g)
        hot = xp.eye(rows, columns, k=offset, dtype=_real(xp, g), device=device)
        if n == 0:
            return xp.zeros_like(a)
        row = xp.arange(rows, device=device) + min(offset, 0)
        row = xp.where(row < 0, xp.zeros_like(row), row)
        row = xp.where(row > n - 1, xp.full_like(row, n - 1), row)
        return xp.expand_dims(xp.take(g, row, axis=-1), axis=-1) * hot

    return (back,)


@composite("trace")
def _(xp: Any, a: Any, /, *, offset: int = 0, dtype: Any = None) -> Any:
    a = a if dtype is None else xp.astype(a, dtype)
    return xp.sum(xp.linalg.diagonal(a, offset=offset), axis=-1)

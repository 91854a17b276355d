"""Derivative rules of Fourier transforms: the adjoint is the other transform, scaled otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_any.tape.rules import Rule

RULES: dict[str, Rule] = {}
COMPOSITES: dict[str, Rule] = {}

_ADJOINT = {"backward": "forward", "forward": "backward", "ortho": "ortho"}


def _fit(xp: Any, x: Any, n: int, axis: int) -> Any:
    """Cut, or fill with zeros, to a length."""
    have, lead = x.shape[axis], (slice(None),) * (axis % x.ndim)
    if have >= n:
        return x if have == n else x[(*lead, slice(0, n), ...)]
    reps, rest = divmod(n - have, have)
    zeros = xp.zeros_like(x)
    tail = zeros[(*lead, slice(0, rest), ...)]
    return xp.concat([x, *[zeros] * reps, tail], axis=axis)


def _complex(inverse: str) -> Rule:
    def of(
        xp: Any, y: Any, x: Any, /, *, n: int | None = None, axis: int = -1, norm: str = "backward"
    ) -> Any:
        back = getattr(xp.fft, inverse)
        size = x.shape[axis]
        return (lambda g: _fit(xp, back(g, axis=axis, norm=_ADJOINT[norm]), size, axis),)

    return of


RULES["fft"], RULES["ifft"] = _complex("ifft"), _complex("fft")


def _rfft(
    xp: Any, y: Any, x: Any, /, *, n: int | None = None, axis: int = -1, norm: str = "backward"
) -> Any:
    size = x.shape[axis]
    length = size if n is None else n

    def back(g: Any) -> Any:
        whole = xp.fft.ifft(_fit(xp, g, length, axis), axis=axis, norm=_ADJOINT[norm])
        return _fit(xp, xp.real(whole), size, axis)

    return (back,)


def _irfft(
    xp: Any, y: Any, x: Any, /, *, n: int | None = None, axis: int = -1, norm: str = "backward"
) -> Any:
    size, length = x.shape[axis], y.shape[axis]

    def back(g: Any) -> Any:
        h = xp.fft.rfft(g, axis=axis, norm=_ADJOINT[norm])
        twice = (length - 1) // 2  # frequencies that stand for their negatives too
        lead = (slice(None),) * (axis % x.ndim)
        parts = [
            h[(*lead, slice(0, 1), ...)],
            2.0 * h[(*lead, slice(1, 1 + twice), ...)],
            h[(*lead, slice(1 + twice, None), ...)],
        ]
        return _fit(xp, xp.concat(parts, axis=axis), size, axis)

    return (back,)


RULES["rfft"], RULES["irfft"] = _rfft, _irfft


def _sizes(x: Any, s: Sequence[int] | None, axes: Sequence[int] | None) -> list[tuple[int, Any]]:
    """Pair the axes of a transform with their lengths."""
    if axes is None:
        axes = range(x.ndim) if s is None else range(x.ndim - len(s), x.ndim)
    return list(zip(axes, s if s is not None else [None] * len(axes), strict=True))


def _over_axes(name: str) -> Rule:
    def of(xp: Any, x: Any, /, *, s: Any = None, axes: Any = None, norm: str = "backward") -> Any:
        for axis, n in _sizes(x, s, axes):
            x = getattr(xp.fft, name)(x, n=n, axis=axis, norm=norm)
        return x

    return of


COMPOSITES["fftn"], COMPOSITES["ifftn"] = _over_axes("fft"), _over_axes("ifft")


def _rfftn(xp: Any, x: Any, /, *, s: Any = None, axes: Any = None, norm: str = "backward") -> Any:
    *others, (axis, n) = _sizes(x, s, axes)
    x = xp.fft.rfft(x, n=n, axis=axis, norm=norm)
    for other, m in others:
        x = xp.fft.fft(x, n=m, axis=other, norm=norm)
    return x


def _irfftn(xp: Any, x: Any, /, *, s: Any = None, axes: Any = None, norm: str = "backward") -> Any:
    *others, (axis, n) = _sizes(x, s, axes)
    for other, m in others:
        x = xp.fft.ifft(x, n=m, axis=other, norm=norm)
    return xp.fft.irfft(x, n=n, axis=axis, norm=norm)


def _hfft(xp: Any, x: Any, /, *, n: Any = None, axis: int = -1, norm: str = "backward") -> Any:
    return xp.fft.irfft(xp.conj(x), n=n, axis=axis, norm=_ADJOINT[norm])


def _ihfft(xp: Any, x: Any, /, *, n: Any = None, axis: int = -1, norm: str = "backward") -> Any:
    return xp.conj(xp.fft.rfft(x, n=n, axis=axis, norm=_ADJOINT[norm]))


def _shift(xp: Any, x: Any, /, *, axes: Any = None, sign: int = 1) -> Any:
    axes = range(x.ndim) if axes is None else (axes,) if isinstance(axes, int) else axes
    for axis in axes:
        n = x.shape[axis]
        x = xp.roll(x, n // 2 if sign > 0 else -(n // 2), axis=axis)
    return x


COMPOSITES |= {
    "rfftn": _rfftn,
    "irfftn": _irfftn,
    "hfft": _hfft,
    "ihfft": _ihfft,
    "fftshift": _shift,
    "ifftshift": lambda xp, x, /, *, axes=None: _shift(xp, x, axes=axes, sign=-1),
}

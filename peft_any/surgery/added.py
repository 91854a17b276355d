"""Sums with a product of small factors, W + u·v."""

from __future__ import annotations

from functools import cached_property
from math import sqrt

import numpy as np

from peft_any.receipt import Host
from peft_any.surgery.sums import LARGE, PANEL, TINY, Sums, above, few, lost, products

_FLOPS = 1_000_000
"""Multiplications of one product: OpenBLAS has a quick way for so small ones."""
_WIDE = 1024


class Added(Sums):
    """The sums W + u·v.

    Parameters
    ----------
    u, v : array (m, k), array (k, n), float64
    bound : array (m,), float32
        Twice what a row's product in single precision may be off by.
    """

    def __init__(self, u: Host, v: Host, bound: Host) -> None:
        self.u, self.v, self.bound = np.ascontiguousarray(u), v, bound
        self.singles = self.u.astype(np.float32), v.astype(np.float32)
        self.columns = np.ascontiguousarray(v.T)
        squares = np.einsum("ij,ij->i", self.u @ (v @ v.T), self.u)
        self._squares: Host = np.maximum(squares, 0)  # where terms cancel

    @classmethod
    def of(cls, u: Host, v: Host, sample: Host) -> Added | None:
        """Bound the errors; None where too many of weights like `sample` would be doubtful."""
        largest = max(float(max(a.max(initial=0.0), -a.min(initial=0.0))) for a in (u, v))
        if not largest <= LARGE:
            return None
        longest = sqrt(np.einsum("ij,ij->j", v, v).max(initial=0.0))  # with Cauchy-Schwarz
        bound = lost(v.shape[0]) * longest * np.sqrt(np.einsum("ij,ij->i", u, u)) + TINY
        twice = above(bound)
        sizes = np.abs(sample.astype(np.float64))
        return cls(u, v, twice) if few(twice.max(initial=0, keepdims=True), sizes, len(v)) else None

    @cached_property
    def panels(self) -> Host:
        """Give v as the compiled pass reads it: (n // 32, k, 32)."""
        k, whole = len(self.v), self.v.shape[1] // PANEL
        cut = self.singles[1][:, : whole * PANEL].reshape(k, whole, PANEL)
        return np.ascontiguousarray(np.swapaxes(cut, 0, 1))

    def given(self, rows: slice) -> tuple[Host | None, ...]:
        """All of it."""
        return self.singles[0][rows], self.panels, self.u[rows], self.columns, self.bound[rows]

    def squares(self, rows: slice) -> float:
        """Of the lengths of the product's rows."""
        return float(np.sum(self._squares[rows]))

    def delta(self, weights: Host, start: int, out: Host) -> Host:  # noqa: ARG002 - not needed
        """u·v, in pieces."""
        u, v = self.singles
        (rows, n), k = out.shape, v.shape[0]
        wide = min(_WIDE, n)
        most = max(_FLOPS // (wide * max(k, 1)), 8)
        high = -(-rows // -(-rows // most))
        for i in range(0, rows, high):
            part = slice(i, min(i + high, rows))
            left = u[start + part.start : start + part.stop]
            for j in range(0, n, wide):
                np.matmul(left, v[:, j : j + wide], out=out[part, j : j + wide])
        return self.bound[start : start + rows]

    def exact(self, base: Host, start: int, rows: Host, columns: Host) -> Host:  # noqa: ARG002
        """u·v."""
        u, v = self.u.take(start + rows, axis=0), self.columns.take(columns, axis=0)
        return products(u, v)

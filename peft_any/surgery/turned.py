"""Sums with a product of the weights themselves and blocks along a diagonal, W + W·v."""

from __future__ import annotations

from functools import cached_property
from math import lcm

import numpy as np

from peft_any.receipt import Host
from peft_any.surgery.passes import chosen
from peft_any.surgery.sums import CHUNK, LARGE, PANEL, TINY, Sums, above, few, lost, products

_WIDE, _WIDEST = 256, 512
"""Blocks may be filled up with zeros to `_WIDE`; the compiled pass knows none above `_WIDEST`."""
_HIDDEN = 2.0**-120
"""What subnormal factors lose, for sizes that sum to 1, and more."""
_TINIEST = np.float32(2.0**-64)
"""Rows whose squares underflow are shorter."""


class Turned(Sums):
    """The sums W + W·diag(v₁, v₂ …).

    Parameters
    ----------
    blocks : array (n/b, b, b), float64
        n is a multiple of 32.
    """

    def __init__(self, blocks: Host) -> None:
        self.blocks = blocks
        squares = np.einsum("kij,kij->kj", blocks, blocks)
        self._lengths: Host = np.sqrt(squares.reshape(-1, PANEL).max(axis=1))

    @classmethod
    def of(cls, turn: Host, n: int, sample: Host) -> Turned | None:
        """Give the way to W·diag(`turn`) in single precision, if it is one.

        Parameters
        ----------
        turn : array (n/b, b, b), or (1, b, b) for n/b equal blocks, float64
        n : int
        sample : array (rows, n)

        Returns
        -------
        Turned or None
            None where n is no multiple of 32, where blocks are large, and where too many of
            weights like `sample` would be doubtful.
        """
        b = turn.shape[-1]
        wide = lcm(b, PANEL)
        if n % PANEL or wide > max(_WIDE, b) or wide > _WIDEST:
            return None
        blocks = np.broadcast_to(turn - np.eye(b), (n // b, b, b))
        if not max(blocks.max(), -blocks.min()) <= LARGE:
            return None
        sums, shape = cls(blocks), (-1, n // wide, wide // PANEL, PANEL)
        sizes = np.abs(sample.astype(np.float64)).reshape(shape)
        long = np.sqrt(np.sum(sizes * sizes, axis=(2, 3), keepdims=True))
        bound = sums.bound(compiled=chosen()[1] is not None).reshape(n // wide, -1, 1) * long
        return sums if few(bound + TINY, sizes, b) else None

    def bound(self, *, compiled: bool) -> Host:
        """Give twice what single precision may be off by, in 32 columns, for rows of length 1."""
        b = self.blocks.shape[-1]
        steps = min(b, CHUNK) + -(-b // CHUNK) if compiled else b
        slack = 1 + 2.0**-8  # of lengths in single precision, and of the compiled pass's root
        return above(lost(steps) * slack * self._lengths + _HIDDEN)  # with Cauchy-Schwarz

    @cached_property
    def columns(self) -> Host:
        """Give the columns of the blocks (n, b), in double precision."""
        b = self.blocks.shape[-1]
        return np.ascontiguousarray(np.swapaxes(self.blocks, 1, 2)).reshape(-1, b)

    @cached_property
    def panels(self) -> Host:
        """Give the blocks as the compiled pass reads them: columns by 32, with zeros beside."""
        b = self.blocks.shape[-1]
        wide = lcm(b, PANEL)
        some = wide // b
        whole = np.zeros((len(self.blocks) // some, some, b, some, b), np.float32)
        for i in range(some):
            whole[:, i, :, i, :] = self.blocks[i::some]
        cut = np.swapaxes(whole.reshape(-1, wide, wide // PANEL, PANEL), 1, 2)
        return np.ascontiguousarray(cut).reshape(-1, wide, PANEL)

    @cached_property
    def singles(self) -> Host:
        """Give the blocks in single precision."""
        return self.blocks.astype(np.float32)

    def given(self, rows: slice) -> tuple[Host | None, ...]:  # noqa: ARG002 - all alike
        """All but u."""
        return None, self.panels, None, self.columns, self._bound

    @cached_property
    def _bound(self) -> Host:
        return self.bound(compiled=True)

    def delta(self, weights: Host, start: int, out: Host) -> Host:  # noqa: ARG002 - all alike
        """W·v, block by block."""
        k, b, _ = self.singles.shape
        left, into = (np.swapaxes(a.reshape(-1, k, b), 0, 1) for a in (weights, out))
        np.matmul(left, self.singles, out=into)
        squares = np.einsum("kij,kij->ki", left, left).max(axis=0)
        bound: Host = self.bound(compiled=False).max() * (np.sqrt(squares) + _TINIEST)
        return bound + np.float32(TINY)

    def exact(self, base: Host, start: int, rows: Host, columns: Host) -> Host:  # noqa: ARG002
        """W·v."""
        b, n = self.blocks.shape[-1], base.shape[1]
        w = base.reshape(-1, b).take(rows * (n // b) + columns // b, axis=0)
        return products(w.astype(np.float64), self.columns.take(columns, axis=0))

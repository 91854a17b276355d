"""Sums of pruned arrays: magnitude pruning, DARE and TIES, by blocks of rows.

TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708. DARE: Yu et al. 2023,
https://arxiv.org/abs/2311.03099. As Hugging Face PEFT 0.21 defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from peft_any._typing import Array
from peft_any.backend import astype, dtype_name, from_numpy_like, namespace, to_numpy
from peft_any.rng import TorchGenerator

Sign: TypeAlias = Literal["total", "frequency"]
Host: TypeAlias = npt.NDArray[Any]
_BLOCK = 1 << 20
"""Elements of a block."""
_FEW = 1 << 22
"""Values up to which a part of them is sorted instead of counted again."""


@dataclass(frozen=True)
class Rows:
    """A matrix by blocks of rows: made when they are asked for, never all at once.

    Attributes
    ----------
    left : array (m, k) or (m, n)
    right : array (k, n) or None
        The other factor; None where `left` is the matrix.
    """

    left: Array
    right: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def blocks(self) -> Iterator[Array]:
        """Make the blocks, from the first row to the last."""
        m, n = self.shape
        step = max(_BLOCK // max(n, 1), 1)
        for start in range(0, m, step):
            rows = self.left[start : min(start + step, m), :]
            yield rows if self.right is None else rows @ self.right


@dataclass(frozen=True)
class Rule:
    """How matrices are made one.

    Attributes
    ----------
    prune : {None, "magnitude", "random"}
        What of each is kept: all, the largest `density` of the entries, or each entry with the
        probability `density` and divided by it.
    elect : bool
        Whether only entries of the sign that prevails are averaged (TIES); otherwise all are
        summed.
    density : float
    sign : {"total", "frequency"}
        Whether the sum's sign prevails or that of more entries; zero counts as positive.
    """

    prune: Literal["magnitude", "random"] | None = None
    elect: bool = False
    density: float = 1.0
    sign: Sign = "total"


def combined(
    rows: Sequence[Rows], weights: Sequence[float], rule: Rule, draws: TorchGenerator | None = None
) -> Array:
    """Prune matrices, weight them, and sum them or average those of the sign that prevails.

    Parameters
    ----------
    rows : sequence of Rows
        All of one shape (m, n) and dtype.
    weights : sequence of float
    rule : Rule
    draws : TorchGenerator, optional
        For random pruning: one number of [0, 1) for each entry, the first matrix first.

    Returns
    -------
    array (m, n)

    Examples
    --------
    >>> import numpy as np
    >>> pair = [Rows(np.asarray([[3.0, -1.0]])), Rows(np.asarray([[1.0, 2.0]]))]
    >>> combined(pair, [1.0, 1.0], Rule(elect=True))
    array([[2., 2.]])
    >>> combined(pair, [1.0, 1.0], Rule("magnitude", density=0.5))
    array([[3., 2.]])
    """
    prune = rule.prune if rule.density < 1 else None
    if prune == "magnitude":
        pruned = [_largest(r, int(rule.density * prod(r.shape))) for r in rows]
    elif prune == "random" and draws is not None:
        pruned = [_sampled(r, rule.density, draws) for r in rows]
    else:
        pruned = [_all for _ in rows]
    parts = []
    for blocks in zip(*(r.blocks() for r in rows), strict=True):
        kept = [keep(block) for keep, block in zip(pruned, blocks, strict=True)]
        parts.append(_elected(kept, weights, rule.sign) if rule.elect else _summed(kept, weights))
    return parts[0] if len(parts) == 1 else namespace(*parts).concat(parts, axis=0)


def _all(block: Array) -> Array:
    return block


def _summed(blocks: Sequence[Array], weights: Sequence[float]) -> Array:
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total = total + block * weight
    return total


def _elected(blocks: Sequence[Array], weights: Sequence[float], sign: Sign) -> Array:
    xp = namespace(*blocks)
    signs = [xp.sign(block) for block in blocks]
    ballots, equal = (blocks, signs)[sign == "frequency"], [1.0] * len(blocks)
    votes: Any = _summed(ballots, equal)
    ones = xp.ones_like(votes)
    prevailing = xp.where(votes >= 0, ones, -ones)
    agree = [astype(s == prevailing, dtype_name(votes)) for s in signs]
    total = _summed([block * mask for block, mask in zip(blocks, agree, strict=True)], weights)
    count: Any = _summed(agree, equal)
    return total / xp.where(count > 1, count, ones)


def _largest(rows: Rows, keep: int) -> Callable[[Array], Array]:
    """Keep the largest of a matrix; of equal ones at the limit, the first."""
    if keep < 1:
        return lambda block: block * 0.0
    limit, quota, equal = threshold(lambda: (np.abs(to_numpy(b)) for b in rows.blocks()), keep)
    return _Limit(limit, None if quota == equal else quota)


@dataclass
class _Limit:
    """Keeps what exceeds a limit, and the first `quota` entries that equal it; None: all."""

    limit: float
    quota: int | None
    seen: int = field(default=0)

    def __call__(self, block: Array) -> Array:
        xp = namespace(block)
        size = xp.abs(block)
        mask = size >= self.limit
        if self.quota is not None:
            equal = np.ravel(to_numpy(size == self.limit))
            order = np.cumsum(equal) + self.seen
            self.seen = int(order[-1]) if order.size else self.seen
            late = np.reshape(equal & (order > self.quota), tuple(block.shape))
            mask = xp.logical_and(mask, xp.logical_not(from_numpy_like(late, block)))
        return block * astype(mask, dtype_name(block))


def threshold(blocks: Callable[[], Iterator[Host]], keep: int) -> tuple[float, int, int]:
    """Find the `keep`-th largest of many numbers that are not negative, without holding them all.

    They are counted by the upper bits of their representation, which has the order of the
    numbers; only those with the bits in question are sorted.

    Parameters
    ----------
    blocks : callable
        Gives the numbers in blocks of one floating dtype, the same whenever it is called.
    keep : int
        From 1 to how many there are.

    Returns
    -------
    limit : float
        That number.
    quota : int
        How many of those equal to it are among the `keep` largest.
    equal : int
        How many are equal to it.

    Examples
    --------
    >>> threshold(lambda: iter([np.asarray([3.0, 1.0]), np.asarray([2.0, 1.0])]), 3)
    (1.0, 1, 2)
    """
    prefix, known, width, left = 0, 0, 0, keep
    while True:
        counts = np.zeros(1 << 16, dtype=np.int64)
        for block in blocks():
            bits, width = _bits(block)
            bits = bits[bits >> np.uint64(width - known) == prefix] if known else bits
            part = (bits >> np.uint64(width - known - 16)) & np.uint64(0xFFFF)
            counts += np.bincount(part.astype(np.int64), minlength=1 << 16)
        above = np.cumsum(counts[::-1])[::-1]
        chosen = int(np.flatnonzero(above >= left)[-1])
        left -= int(above[chosen] - counts[chosen])
        prefix, known = (prefix << 16) | chosen, known + 16
        if counts[chosen] <= _FEW or known == width:
            break
    found = np.concatenate([_with(block, prefix, known) for block in blocks()])
    limit = np.partition(found, found.size - left)[found.size - left]
    greater, equal = int(np.sum(found > limit)), int(np.sum(found == limit))
    return float(limit), left - greater, equal


def _bits(block: Host) -> tuple[Host, int]:
    flat = np.ravel(block)
    width = 8 * flat.dtype.itemsize
    return flat.view(f"uint{width}").astype(np.uint64), width


def _with(block: Host, prefix: int, known: int) -> Host:
    bits, width = _bits(block)
    return np.ravel(block)[bits >> np.uint64(width - known) == prefix]


def _sampled(rows: Rows, density: float, draws: TorchGenerator) -> Callable[[Array], Array]:
    """Keep each entry of a matrix with a probability, and divide what is kept by it.

    The draws are made at once, as bits: those of the next matrix follow them in the stream.
    """
    name = dtype_name(rows.left)
    chance = np.dtype(name).type(density)
    m, n = rows.shape
    bits = np.packbits(draws.random((m * n,), name) < chance)
    return _Sample(bits, density)


@dataclass
class _Sample:
    """Keeps the entries whose bits are set, from the first to the last."""

    bits: Host
    density: float
    seen: int = field(default=0)

    def __call__(self, block: Array) -> Array:
        size = prod(block.shape)
        first, last = self.seen // 8, -(-(self.seen + size) // 8)
        bits = np.unpackbits(self.bits[first:last])[self.seen % 8 :][:size]
        self.seen += size
        mask = np.reshape(bits, tuple(block.shape)).astype(dtype_name(block))
        return block * from_numpy_like(mask, block) / self.density

"""Two checkpoints of one architecture, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from peft_any.backend import astype, compute_dtype, is_floating
from peft_any.io._header import TensorInfo
from peft_any.io.checkpoint import Checkpoint
from peft_any.receipt import Host
from peft_any.surgery.measure import all_finite, equal_bytes, row_blocks

Sound: TypeAlias = tuple[bool, bool]
"""Whether the base's tensor, and the model's, holds no NaN and no infinity."""


@dataclass(frozen=True)
class Couple:
    """A base and a model made from it; a tied tensor has all its names in both.

    Attributes
    ----------
    base, model : Checkpoint
    """

    base: Checkpoint
    model: Checkpoint

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names that stand for one tensor in either checkpoint."""
        return tuple(dict.fromkeys((*self.base.tied, *self.model.tied)))

    @cached_property
    def names(self) -> list[str]:
        """Every name of either checkpoint, stored or tied, in the order of the base."""
        named = dict.fromkeys((*self.base, *self.model))
        for group in self.groups:
            if any(name in named for name in group):
                named |= dict.fromkeys(group)
        return [*named]

    def stored(self, checkpoint: Checkpoint, name: str) -> str | None:
        """Say under which name a checkpoint stores a tensor; None where it does not."""
        if name in checkpoint:
            return name
        mates = (mate for group in self.groups if name in group for mate in group)
        return next((mate for mate in mates if mate in checkpoint), None)

    def infos(self, name: str) -> tuple[TensorInfo | None, TensorInfo | None]:
        """Dtypes and shapes of the two, without reading; None for what is not there."""
        here, there = (self.stored(side, name) for side in (self.base, self.model))
        return (
            None if here is None else self.base.info(here),
            None if there is None else self.model.info(there),
        )

    @property
    def shared(self) -> list[str]:
        """Names that both have."""
        return [name for name in self.names if None not in self.infos(name)]

    def by_shard(self) -> list[tuple[str, ...]]:
        """Give the names that both have, grouped by the file that holds them in the base."""
        found: dict[int, list[str]] = {}
        for name in self.shared:
            home = self.base.shard_of(self.stored(self.base, name) or name)
            found.setdefault(id(home), []).append(name)
        return [*map(tuple, found.values())]

    def tensors(self, name: str) -> tuple[Host, Host]:
        """Give the two tensors of a name that both have."""
        here, there = (self.stored(side, name) for side in (self.base, self.model))
        assert here is not None  # noqa: S101 - told by `infos`
        assert there is not None  # noqa: S101 - likewise
        return self.base[here], self.model[there]

    def equal(self, name: str) -> bool:
        """Whether the two tensors hold the same numbers, whatever their dtypes."""
        one, two = self.tensors(name)
        if one.shape != two.shape:
            return False
        if one.dtype == two.dtype and equal_bytes(one, two):
            return True
        if not (is_floating(one) and is_floating(two)):
            return bool(np.array_equal(one, two))
        return not any(np.any(gap) for _, gap in self.gaps(name))

    def sound(self, name: str) -> Sound:
        """Whether the two tensors of a name can be computed with."""
        one, two = (not is_floating(a) or all_finite(a) for a in self.tensors(name))
        return one, two

    def gaps(self, name: str) -> Iterator[tuple[slice, Host]]:
        """Give the model's floating tensor less the base's, in blocks of rows.

        In float32, or float64 where either tensor is.
        """
        one, two = (a.reshape(1) if a.ndim == 0 else a for a in self.tensors(name))
        dtype = compute_dtype(one, two)
        for rows in row_blocks(two):
            yield rows, astype(two[rows], dtype) - astype(one[rows], dtype)

    def difference(self, name: str) -> Host:
        """Give the whole of it as one array."""
        one, two = self.tensors(name)
        whole = np.empty(two.shape, compute_dtype(one, two))
        for rows, gap in self.gaps(name):
            whole[rows] = gap
        return whole

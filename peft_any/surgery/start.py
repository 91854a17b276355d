"""A tensor of the base as full copies and new rows leave it, before any method acts on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peft_any.backend import is_floating
from peft_any.errors import FormatError
from peft_any.receipt import Host
from peft_any.surgery.added import Added
from peft_any.surgery.measure import Moments, all_finite
from peft_any.surgery.rounding import widened
from peft_any.surgery.sums import Sums
from peft_any.surgery.turned import Turned

_SAMPLE, _MANY = 1 << 14, 1 << 16
"""Elements that tell how large a tensor's weights are; and that are worth to be told."""
_SMALL = 2.0**-100
"""Gains below may have lost digits in single precision."""
_FAINT = 2.0**-80
"""Mean squares below may have lost digits in single precision, or all."""
_SEEN = 1e-6
"""Of ‖Δ‖²/‖W‖²: single precision measures larger ones as W′ − W."""


@dataclass(frozen=True)
class Start:
    """A tensor as full copies and new rows leave it, before any method.

    Attributes
    ----------
    where : str
        What the base calls it, for messages.
    name : str
    stored : array
        The base's own, mapped.
    shape : tuple of int
        Of the result; more or fewer rows than stored where a vocabulary changes.
    dtype : str
        Of the result.
    replaced : sequence of (weight, copy or None, {row: new value} as (rows, values) or None)
    """

    where: str
    name: str
    stored: Host
    shape: tuple[int, ...]
    dtype: str
    replaced: tuple[tuple[float, Host | None, tuple[Host, Host] | None], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether bfloat16 weights stay bfloat16: so many that single precision measures them."""
        stored = self.stored
        return (
            not self.replaced
            and stored.size >= _MANY
            and stored.dtype.name == self.dtype == "bfloat16"
        )

    def added(self, u: Host, v: Host) -> Sums | None:
        """Say how to add u·v in single precision, if that is possible."""
        return Added.of(u, v, self._sample) if self.plain else None

    def turned(self, blocks: Host) -> Sums | None:
        """Say how to multiply by blocks along a diagonal, likewise."""
        sample = self._sample
        return Turned.of(blocks, sample.shape[1], sample) if self.plain else None

    @property
    def _sample(self) -> Host:
        table = self.stored.reshape(self.stored.shape[0], -1)
        return table[:: -(-table.size // _SAMPLE)]

    def summed(
        self, sums: Sums, rows: slice, gain: Host | None = None
    ) -> tuple[Host, Moments] | None:
        """Give rows of g ⊙ (W + Δ), rounded; None where that takes double precision."""
        if gain is not None and np.any((gain != 0) & (np.abs(gain) < _SMALL)):
            return None
        base = self.stored[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            made, moments = sums.rounded(base.reshape(base.shape[0], -1), rows.start, gain)
        seen = moments.base2 > _FAINT * moments.size
        seen &= gain is None or moments.delta2 > _SEEN * moments.base2
        return (made.reshape(base.shape), moments) if moments.finite and seen else None

    def rows(self, start: int, stop: int) -> Host:
        """Give rows in double precision.

        Raises
        ------
        FormatError
            If the base has NaN or infinities there.
        """
        if not is_floating(self.stored):
            return self._integers(start, stop)
        base = widened(self.stored[start:stop] if self.stored.ndim else self.stored)
        if not all_finite(base):
            raise FormatError(
                f"{self.where}: cannot be merged into: the base has NaN or infinite values there; "
                "get an undamaged copy of it"
            )
        plain = [weight for weight, *_ in self.replaced] == [1.0]
        made = base
        for weight, copy, some in self.replaced:
            new = base.copy() if copy is None else widened(copy[start:stop] if copy.ndim else copy)
            if some is not None:
                index, values = some
                here = (index >= start) & (index < stop)
                new[index[here] - start] = widened(values[here])
            made = new if plain else made + weight * (new - base)
        return made

    def _integers(self, start: int, stop: int) -> Host:
        (_, copy, _), *_ = self.replaced
        whole = self.stored if copy is None else copy
        return whole[start:stop] if whole.ndim else whole

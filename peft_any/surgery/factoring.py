"""What an extraction is, told to other processes: what differs by shard, and factors by layer."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Self, TypeAlias

import numpy as np

from peft_any.algebra.blockwise import distance
from peft_any.algebra.lowrank import Cut, Factors
from peft_any.algebra.rangefinder import approximate
from peft_any.backend import astype, dtype_name, from_numpy, resolve, to_numpy
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.layer import Dense, Site
from peft_any.rng import Fresh
from peft_any.surgery.couple import Couple, Sound
from peft_any.surgery.engines import Item, Recipe, Result, absolute, same_checkpoint
from peft_any.surgery.extracted import Layer
from peft_any.surgery.measure import all_finite

Factored: TypeAlias = tuple[Factors, Layer]
Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Pair(Recipe[Item, Result]):
    """Work on two checkpoints.

    Attributes
    ----------
    base, model : str
    fingerprints : tuple of str
        Of the two, where the command was given.
    """

    base: str
    model: str
    fingerprints: tuple[str, str]

    @classmethod
    def of(cls, couple: Couple, *args: Any, **more: Any) -> Self:
        """Describe the work on two checkpoints that are open here."""
        both = couple.base, couple.model
        base, model = (absolute(one.source) for one in both)
        marks = fingerprint(couple.base), fingerprint(couple.model)
        return cls(base, model, marks, *args, **more)

    @contextmanager
    def open(self) -> Iterator[Callable[[Item], Result]]:
        """Open the checkpoints; the function reads what an item needs of both."""
        with Checkpoint(self.base) as base, Checkpoint(self.model) as model:
            both = zip((self.base, self.model), (base, model), self.fingerprints, strict=True)
            for given in both:
                same_checkpoint(*given)
            yield partial(self.work, Couple(base, model))

    @abc.abstractmethod
    def work(self, couple: Couple, item: Item, /) -> Result:
        """Do a piece."""


class Comparing(Pair[Names, dict[str, Sound]]):
    """Tensors of two models compared."""

    def work(self, couple: Couple, names: Names, /) -> dict[str, Sound]:
        """Give those that differ, and whether either side's numbers can be computed with."""
        return {name: couple.sound(name) for name in names if not couple.equal(name)}


@dataclass(frozen=True)
class Factoring(Pair[Site, Factored]):
    """The layers of an extraction.

    Attributes
    ----------
    cut : Cut
    backend, dtype : str
        Where to compute, and in what to store the factors.
    seed : int
    """

    cut: Cut
    backend: str
    dtype: str
    seed: int

    def work(self, couple: Couple, site: Site, /) -> Factored:
        """Factor what changed in a layer, and measure what the stored factors miss."""
        start, to = time.perf_counter(), resolve(self.backend)
        stored = couple.difference(site.weight)
        delta = Dense.of(stored, None, site).weight
        new = Fresh(self.seed, to, key=site.name, dtype=dtype_name(delta))
        found = approximate(from_numpy(delta, to), self.cut, new)
        with np.errstate(over="ignore"):
            u, v = (astype(to_numpy(a), self.dtype) for a in found.factors)
        finite = all_finite(u) and all_finite(v)
        layer = Layer(
            site.name,
            site.weight,
            tuple(stored.shape),
            found.rank,
            found.norm,
            distance(delta, (u, v)) if finite else inf,
            found.least,
            found.way,
            round(time.perf_counter() - start, 3),
        )
        return (u, v), layer

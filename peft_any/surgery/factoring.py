"""What an extraction is, told to other processes: layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TypeAlias

import numpy as np

from peft_any.algebra.blockwise import distance
from peft_any.algebra.lowrank import Cut, Factors
from peft_any.algebra.rangefinder import approximate
from peft_any.backend import astype, dtype_name, from_numpy, resolve, to_numpy
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.layer import Dense, Site
from peft_any.rng import Fresh
from peft_any.surgery.couple import Couple
from peft_any.surgery.engines import Recipe, absolute, same_checkpoint
from peft_any.surgery.extracted import Layer
from peft_any.surgery.measure import all_finite

Factored: TypeAlias = tuple[Factors, Layer]


@dataclass(frozen=True)
class Factoring(Recipe[Site, Factored]):
    """The layers of an extraction.

    Attributes
    ----------
    base, model : str
    fingerprints : tuple of str
        Of the two, where the command was given.
    cut : Cut
    backend, dtype : str
        Where to compute, and in what to store the factors.
    seed : int
    """

    base: str
    model: str
    fingerprints: tuple[str, str]
    cut: Cut
    backend: str
    dtype: str
    seed: int

    @classmethod
    def of(cls, couple: Couple, cut: Cut, *, backend: str, dtype: str, seed: int) -> Factoring:
        """Describe the extraction from two checkpoints."""
        both = couple.base, couple.model
        base, model = (absolute(one.source) for one in both)
        marks = fingerprint(couple.base), fingerprint(couple.model)
        return cls(base, model, marks, cut, backend, dtype, seed)

    @contextmanager
    def open(self) -> Iterator[Callable[[Site], Factored]]:
        """Open the checkpoints; the function reads a layer and factors it."""
        with Checkpoint(self.base) as base, Checkpoint(self.model) as model:
            both = zip((self.base, self.model), (base, model), self.fingerprints, strict=True)
            for given in both:
                same_checkpoint(*given)
            yield partial(self.factored, Couple(base, model))

    def factored(self, couple: Couple, site: Site) -> Factored:
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

"""Batches by number: the same one for the same number, whatever was asked before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_any._tree import leaves, named, tree_map
from peft_any.backend import from_numpy_like, is_array, namespace
from peft_any.errors import ConfigError, ShapeError


class Batches:
    """An endless row of batches, epoch after epoch, each epoch in an order of its own.

    Parameters
    ----------
    data
        A list of batches; with `batch_size`, a nest of arrays with one first axis; or a function
        of the number of the batch.
    batch_size : int, optional
    shuffle : bool
        Whether every epoch has another order.
    seed : int

    Raises
    ------
    ConfigError, ShapeError
        If there is no batch in `data`.

    Examples
    --------
    >>> batches = Batches((np.arange(5), np.arange(5)), batch_size=2, shuffle=False)
    >>> batches[1], batches[2]
    ((array([2, 3]), array([2, 3])), (array([0, 1]), array([0, 1])))
    """

    def __init__(
        self, data: Any, *, batch_size: int | None = None, shuffle: bool = True, seed: int = 0
    ) -> None:
        self._data, self._shuffle, self._seed = data, shuffle, seed
        self._size = batch_size
        self._order: tuple[int, Any] = (-1, None)
        if seed < 0:
            raise ConfigError(f"seed {seed}: cannot be negative: use any integer from 0 on")
        if callable(data):
            if batch_size is not None:
                raise ConfigError("data: a function makes its own batches: leave batch_size out")
            return
        self._count = len(listed(data, "data")) if batch_size is None else _rows(data)
        if batch_size is not None and not 1 <= batch_size <= self._count:
            raise ConfigError(f"data: {self._count} rows cannot fill a batch_size={batch_size}")

    def __getitem__(self, i: int) -> Any:
        if callable(self._data):
            return self._data(i)
        size = self._size or 1
        epoch, place = divmod(i, self._count // size)
        rows = self._epoch(epoch)[place * size : (place + 1) * size]
        if self._size is None:
            return self._data[int(rows[0])]

        def cut(a: Any) -> Any:
            index = from_numpy_like(rows, a)
            return namespace(a).take(a, index, axis=0)

        return tree_map(cut, self._data)

    def _epoch(self, epoch: int) -> Any:
        if self._order[0] != epoch:
            order = np.arange(self._count)
            if self._shuffle:
                stream = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
                order = np.random.Generator(np.random.PCG64(stream)).permutation(order)
            self._order = epoch, order
        return self._order[1]


def listed(batches: Any, name: str) -> Any:
    """Give a list of batches; refuse what is none.

    Raises
    ------
    ConfigError
    """
    odd = isinstance(batches, str | bytes | Mapping) or not hasattr(batches, "__getitem__")
    if odd or not hasattr(batches, "__len__"):
        raise ConfigError(
            f"{name}: a {type(batches).__name__} is no list of batches: give a list"
            + ", or a function of a batch's number, or batch_size= to cut arrays" * (name == "data")
        )
    if len(batches) == 0:
        raise ConfigError(f"{name}: there is no batch in it")
    return batches


def _rows(data: Any) -> int:
    counts = {named(path): a.shape[0] for path, a in leaves(data) if is_array(a) and a.ndim}
    if len(counts) != sum(1 for _ in leaves(data)) or len({*counts.values()}) != 1:
        raise ShapeError(
            f"data: first axes of {counts} cannot be cut into batches: with batch_size every leaf "
            "is an array, and all have one length"
        )
    return int(next(iter(counts.values())))

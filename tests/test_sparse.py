"""Pruned sums by blocks of rows, against the same in one piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_any.algebra import sparse
from peft_any.algebra.sparse import Rows, Rule, combined, threshold
from peft_any.rng import TorchGenerator

floats = st.sampled_from(["float32", "float64"])


@given(data=st.data(), dtype=floats, few=st.sampled_from([1, 5, 1 << 22]))
def test_the_threshold_is_the_sorted_one(data: st.DataObject, dtype: str, few: int) -> None:
    width = 8 * np.dtype(dtype).itemsize
    entries = st.floats(0, 2.0**99, width=width) | st.sampled_from([0.0, 1.0, 1.5])
    parts = data.draw(st.lists(hnp.arrays(dtype, st.integers(1, 9), elements=entries), min_size=1))
    values = np.concatenate(parts)
    keep = data.draw(st.integers(1, values.size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_FEW", few)
        limit, quota, equal = threshold(lambda: iter(parts), keep)
    assert limit == np.sort(values)[::-1][keep - 1]
    assert equal == np.sum(values == limit)
    assert quota == keep - np.sum(values > limit)


def naive(arrays: list[np.ndarray], weights: list[float], rule: Rule, seed: int) -> np.ndarray:
    """Prune, elect and sum whole arrays, as the papers have it."""
    draws, pruned = TorchGenerator(seed), []
    for a in arrays:
        mask = np.ones(a.size, bool)
        if rule.prune == "magnitude" and rule.density < 1:
            order = np.argsort(-np.abs(a), axis=None, kind="stable")
            mask = np.zeros(a.size, bool)
            mask[order[: int(rule.density * a.size)]] = True
        kept = a * mask.reshape(a.shape)
        if rule.prune == "random" and rule.density < 1:
            name = a.dtype.name
            kept = a * (draws.random(a.shape, name) < a.dtype.type(rule.density)) / rule.density
        pruned.append(kept)
    stack = np.stack(pruned)
    shares = stack * np.asarray(weights).reshape(-1, 1, 1)
    if not rule.elect:
        return np.asarray(shares.sum(axis=0))
    votes = stack.sum(axis=0) if rule.sign == "total" else np.sign(stack).sum(axis=0)
    agree = np.sign(stack) == np.where(votes >= 0, 1, -1)
    return np.asarray((shares * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1))


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prune=st.sampled_from([None, "magnitude", "random"]),
    elect=st.booleans(),
    density=st.sampled_from([0.01, 0.3, 0.77, 1.0]),
    sign=st.sampled_from(["total", "frequency"]),
    coarse=st.booleans(),
    block=st.sampled_from([1, 16, 1 << 20]),
)
def test_blocks_make_no_difference(
    seed: int, count: int, shape: tuple[int, int], coarse: bool, block: int, **rules: Any
) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for _ in range(count)]
    if coarse:  # many entries of one size
        arrays = [np.round(a) for a in arrays]
    weights = [float(w) for w in rng.standard_normal(count)]
    rule = Rule(**rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_BLOCK", block)
        got = combined([Rows(a) for a in arrays], weights, rule, TorchGenerator(seed))
    np.testing.assert_allclose(got, naive(arrays, weights, rule, seed), rtol=1e-12, atol=1e-13)


def test_products_are_formed_by_blocks() -> None:
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((40, 3)), rng.standard_normal((3, 30))
    rule = Rule("magnitude", elect=True, density=0.3)
    sizes = []

    class Watched(Rows):
        def blocks(self) -> Any:
            for block in super().blocks():
                sizes.append(block.shape)
                yield block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_BLOCK", 300)
        got = combined([Watched(u, v), Watched(-u, v)], [1.0, 0.5], rule)
    assert set(sizes) == {(10, 30)}
    want = naive([u @ v, -u @ v], [1.0, 0.5], rule, 0)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

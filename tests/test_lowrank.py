"""Low-rank algebra against dense decompositions, on every array library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any.algebra.lowrank import (
    Cut,
    Factors,
    dot,
    norm,
    pad,
    spectrum,
    svd,
    total,
    truncate,
    widest,
)
from peft_any.backend import to_numpy
from peft_any.errors import ShapeError, UsageError
from peft_any.testing import Lib

sizes = st.integers(1, 12)
EPS = 2.3e-16


def draw(m: int, k: int, n: int, seed: int, dtype: str = "float64") -> Factors:
    """Draw factors."""
    rng = np.random.default_rng([seed, 1])
    return rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)


def dense(factors: Factors) -> np.ndarray:
    """Form the product in double precision."""
    u, v = (np.asarray(to_numpy(a), dtype="float64") for a in factors)
    return u @ v


@given(m=sizes, k=st.integers(1, 30), n=sizes, seed=st.integers(0, 2**32), deficient=st.booleans())
def test_the_decomposition_is_the_products(
    m: int, k: int, n: int, seed: int, deficient: bool
) -> None:
    factors = draw(m, k, n, seed)
    if deficient:
        factors[0][:, k // 2 :] = 0.0 if k < 2 else factors[0][:, :1]
    whole = dense(factors)
    want = np.linalg.svd(whole, compute_uv=False)
    bound = 100 * EPS * float(np.linalg.norm(factors[0]) * np.linalg.norm(factors[1])) + 1e-300
    u, s, vt = svd(factors)
    p = min(m, n, k)
    assert (u.shape, s.shape, vt.shape) == ((m, p), (p,), (p, n))
    assert np.all(np.abs(s - want[:p]) <= bound)
    assert np.all(want[p:] <= bound)
    assert np.all(np.abs((u * s) @ vt - whole) <= bound)
    assert np.linalg.norm(u.T @ u - np.eye(p)) <= 1e-13
    assert np.linalg.norm(vt @ vt.T - np.eye(p)) <= 1e-13
    assert np.all(np.abs(spectrum(factors) - s) <= bound)
    assert abs(float(norm(factors)) - np.linalg.norm(whole)) <= bound


@given(m=sizes, n=sizes, k=st.integers(1, 30), rank=st.integers(1, 14), seed=st.integers(0, 2**32))
def test_no_matrix_of_the_rank_is_nearer(m: int, n: int, k: int, rank: int, seed: int) -> None:
    factors = draw(m, k, n, seed)
    whole = dense(factors)
    s = np.linalg.svd(whole, compute_uv=False)
    best = truncate(factors, Cut(rank=rank))
    assert best.rank == min(rank, m, n, k)
    missed = np.linalg.norm(whole - dense(best.factors))
    scale = 1e-13 * np.linalg.norm(factors[0]) * np.linalg.norm(factors[1])
    assert abs(missed - np.linalg.norm(s[best.rank :])) <= scale
    want = np.sum(s[best.rank :] ** 2) / np.sum(s**2)
    assert best.discarded == pytest.approx(want, abs=1e-13)


@given(share=st.floats(0.01, 1.0), k=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_a_share_is_met_by_the_fewest_values(share: float, k: int, seed: int) -> None:
    factors = draw(12, k, 9, seed)
    s = np.linalg.svd(dense(factors), compute_uv=False)[: min(k, 9)]
    for cut, parts, least in (
        (Cut(energy=share), s**2, share),
        (Cut(sv_fro=share), s**2, share**2),
        (Cut(sv_cumulative=share), s, share),
    ):
        rank = truncate(factors, cut).rank
        held = np.cumsum(parts) / np.sum(parts)
        assert held[rank - 1] >= least - 1e-12
        assert rank == 1 or held[rank - 2] < least + 1e-12
    rank = truncate(factors, Cut(sv_ratio=1 / share)).rank
    assert rank == max(1, int(np.sum(s > s[0] * share)))


def test_a_share_of_one_keeps_the_numerical_rank() -> None:
    u, v = draw(20, 4, 20, 0)
    twice = np.concatenate([u, u], axis=1), np.concatenate([v, v], axis=0)
    assert truncate(twice, Cut(energy=1.0)).rank == 4
    assert truncate(twice, Cut(energy=1.0, rank=3)).rank == 3
    assert truncate(twice, Cut(rank=7)).rank == 7


def test_small_values_are_not_lost_beside_a_large_one() -> None:
    s = [1.0, 1e-9, 1e-9]
    assert Cut(energy=1.0).keep(s) == 3
    assert Cut(energy=0.999999).keep(s) == 1
    assert Cut(sv_cumulative=1 - 1.5e-9).keep(s) == 2
    assert Cut(energy=0.9).keep([3.0, 1.0]) == 1  # 0.9 and 1/10 in binary are not quite that


def test_a_zero_matrix_has_rank_none() -> None:
    zeros = np.zeros((4, 2)), np.ones((2, 3))
    best = truncate(zeros, Cut(energy=0.9))
    assert (best.rank, best.discarded) == (0, 0.0)
    assert best.factors[0].shape == (4, 0)
    assert truncate(zeros, Cut(rank=2)).rank == 2
    assert not np.any(dense(truncate(zeros, Cut(rank=2)).factors))


@given(
    m=sizes,
    n=sizes,
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_sums_are_exact(m: int, n: int, ranks: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    # small integers: every product and sum is exact
    pairs = [
        (
            rng.integers(-9, 9, (m, k)).astype("float64"),
            rng.integers(-9, 9, (k, n)).astype("float64"),
        )
        for k in ranks
    ]
    weights = [float(w) for w in rng.integers(-3, 4, len(ranks))]
    summed = total(zip(weights, pairs, strict=True))
    assert summed[0].shape == (m, sum(ranks))
    want = sum(w * dense(pair) for w, pair in zip(weights, pairs, strict=True))
    np.testing.assert_array_equal(dense(summed), want)
    padded = pad(summed, sum(ranks) + 3)
    assert padded[1].shape[0] == sum(ranks) + 3
    np.testing.assert_array_equal(dense(padded), want)
    assert float(dot(summed, pairs[0])) == np.sum(want * dense(pairs[0]))


def test_a_norm_survives_cancellation() -> None:
    u, v = draw(50, 3, 40, 0)
    moved = v.copy()
    moved[0, 0] += 1e-9
    apart = total([(1.0, (u, v)), (-1.0, (u, moved))])
    want = np.linalg.norm(u @ (v - moved))
    assert float(norm(apart)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("m", "k", "n"), [(9, 3, 7), (5, 12, 7), (4, 2, 1)])
def test_libraries_agree(lib: Lib, m: int, k: int, n: int) -> None:
    if reason := lib.lacks(("linalg",)):
        pytest.skip(reason)
    one, two = draw(m, k, n, 3, "float32"), draw(m, 2, n, 4, "float32")
    whole = dense(one) - 0.5 * dense(two)
    s = np.linalg.svd(whole, compute_uv=False)[: min(m, n, k + 2)]

    def best(u: np.ndarray, v: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[object, ...]:
        pair = total([(1.0, (u, v)), (-0.5, (y, z))])
        cut = truncate(pair, Cut(rank=2))
        a, b = pad(cut.factors, 4)
        return a @ b, cut.spectrum, norm(pair), dot(pair, pair)

    product, values, length, square = lib.call(best, *one, *two)
    nearest = (svd((whole, np.eye(n)))[0][:, :2]) @ (svd((whole, np.eye(n)))[0][:, :2].T @ whole)
    lib.check(product, nearest, rtol=1e-13)
    lib.check(values, s, rtol=1e-13)
    lib.check(length, np.asarray(np.linalg.norm(whole)), rtol=1e-13)
    lib.check(square, np.asarray(np.sum(whole**2)), rtol=1e-13)


def test_values_choose_on_every_library(lib: Lib) -> None:
    if reason := lib.lacks(("linalg",)):
        pytest.skip(reason)
    if not lib.has_values:
        pytest.skip("a rank cannot be chosen by values where there are none")
    pair = lib.array(np.diag([3.0, 2.0, 1e-3])), lib.array(np.eye(3))
    assert truncate(pair, Cut(energy=0.999)).rank == 2
    assert truncate(pair, Cut(sv_ratio=2)).rank == 2
    assert truncate(pair, Cut(energy=0.5)).discarded == pytest.approx(4 / 13, rel=1e-6)


def test_single_precision_where_a_library_has_no_double() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(False):
        u, v = (jax.numpy.asarray(a) for a in draw(6, 2, 5, 0, "float32"))
        assert str(widest(u).dtype) == "float32"
        got = np.asarray(spectrum((u, v)))
    want = np.linalg.svd(dense(draw(6, 2, 5, 0, "float32")), compute_uv=False)[:2]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"sv_fro": 1.5}, "sv_fro=1.5"),
        ({"sv_ratio": 0.5}, "sv_ratio=0.5"),
        ({"sv_ratio": float("inf")}, "sv_ratio=inf"),
        ({"energy": 0.5, "sv_fro": 0.5}, "energy= and sv_fro="),
    ],
)
def test_impossible_cuts_are_refused(numbers: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Cut(**numbers)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="cannot be summed"):
        total([(1.0, draw(2, 1, 3, 0)), (1.0, draw(3, 1, 2, 0))])
    with pytest.raises(ShapeError, match="cannot be summed"):
        total([])
    with pytest.raises(ShapeError, match="truncate them"):
        pad(draw(4, 3, 4, 0), 2)


def test_the_selectors_of_kohya() -> None:
    # kohya counts with searchsorted over cumulative sums of all values, zeros included
    rng = np.random.default_rng(7)
    for size in (3, 20):
        s = np.sort(rng.random(size))[::-1]
        for target in (0.3, 0.7, 0.95):
            cumulative = int(np.searchsorted(np.cumsum(s) / s.sum(), target)) + 1
            fro = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), target**2)) + 1
            assert Cut(sv_cumulative=target).keep(s) == cumulative
            assert Cut(sv_fro=target).keep(s) == fro
            assert Cut(sv_fro=target, rank=2).keep(s) == min(2, fro)

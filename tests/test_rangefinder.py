"""The range finder against full decompositions: residuals, proofs, energy, libraries."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any.algebra import rangefinder
from peft_any.algebra.blockwise import blocks, cross, distance, like, product, square
from peft_any.algebra.certificate import Certificate, Sketch
from peft_any.algebra.lowrank import Cut
from peft_any.algebra.rangefinder import SLACK, approximate
from peft_any.backend import dtype_name, resolve, to_numpy
from peft_any.rng import Fresh
from peft_any.testing import Lib

NUMPY = resolve("numpy")
INDEX = np.arange(1, 301)
SPECTRA = {
    "decaying slowly": INDEX**-0.5,
    "decaying": 1.0 / INDEX,
    "decaying fast": np.exp(-INDEX / 3.0),
    "flat": np.ones(300),
    "a step at the rank": np.where(INDEX <= 12, 1.0, 1e-3),
    "a step after the rank": np.where(INDEX <= 20, 1.0, 1e-3),
    "a step before the rank": np.where(INDEX <= 4, 1.0, 1e-3),
    "a faint rest": np.where(INDEX <= 12, 1.0, 1e-6),
}
RANK = 12


def matrix(values: np.ndarray, m: int, n: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Make a matrix (m, n) of given singular values, n of them."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(values))))[0]
    return ((u * values) @ v.T).astype(dtype)


def best(delta: np.ndarray, rank: int) -> float:
    """Find the smallest residual of a rank by the full decomposition."""
    s = np.linalg.svd(delta.astype("float64"), compute_uv=False)
    return sqrt(float(np.sum(s[rank:][::-1] ** 2)))


def gap(delta: np.ndarray, factors: tuple[np.ndarray, np.ndarray]) -> float:
    u, v = (np.asarray(to_numpy(a), "float64") for a in factors)
    return float(np.linalg.norm(delta.astype("float64") - u @ v))


def fresh(seed: int = 0, dtype: str = "float32") -> Fresh:
    return Fresh(seed, NUMPY, dtype=dtype)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_residual_is_within_one_percent_of_the_best(
    spectrum: str, dtype: str, shape: tuple[int, int]
) -> None:
    delta = matrix(SPECTRA[spectrum], *shape, dtype=dtype)
    found, least = approximate(delta, Cut(rank=RANK), fresh(dtype=dtype)), best(delta, RANK)
    assert found.way == "range finder"
    assert found.rank == RANK
    assert gap(delta, found.factors) <= (1 + SLACK) * least
    # float32's factors round the product: that much the written difference may be above
    assert found.residual == pytest.approx(gap(delta, found.factors), rel=1e-3, abs=0)
    assert found.norm == pytest.approx(np.linalg.norm(delta.astype("float64")), rel=1e-12)
    assert least * 0.99 <= found.least * 1.01
    assert found.least <= least * (1 + 1e-9)
    assert all(np.asarray(a).dtype == dtype for a in found.factors)


def test_noise_is_within_one_percent_of_the_best() -> None:
    delta = np.random.default_rng(0).standard_normal((600, 700)).astype("float32")
    found = approximate(delta, Cut(rank=4), fresh())
    assert found.way == "range finder"
    assert best(delta, 4) <= gap(delta, found.factors) <= (1 + SLACK) * best(delta, 4)


def test_what_cannot_be_proved_is_decomposed_in_full() -> None:
    delta = np.random.default_rng(0).standard_normal((140, 150)).astype("float32")
    found = approximate(delta, Cut(rank=16), fresh(), slack=1e-9)
    assert found.way == "svd"
    assert found.residual == pytest.approx(best(delta, 16), rel=1e-5)
    assert found.least <= found.residual


def test_an_exact_rank_is_found_to_rounding() -> None:
    delta = matrix(np.ones(RANK), 400, 300)
    found = approximate(delta, Cut(rank=RANK), fresh())
    assert found.way == "range finder"
    assert gap(delta, found.factors) <= 3e-7 * found.norm


@given(
    k=st.integers(1, 10),
    width=st.integers(10, 30),
    decay=st.floats(0.0, 2.0),
    blind=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_nothing_is_proved_that_is_not_so(
    k: int, width: int, decay: float, blind: bool, seed: int
) -> None:
    """Any subspace may be asked about: a blind one does not know the leading directions at all."""
    values = np.arange(1, 81.0) ** -decay
    delta = matrix(values, 90, 80, seed, "float64")
    rng = np.random.default_rng(seed + 1)
    start = rng.standard_normal((80, width))
    if blind:
        lead = np.linalg.svd(delta)[2][:k]
        start = start - lead.T @ (lead @ start)
    q = np.linalg.qr(delta @ start)[0]
    u, s, vt = np.linalg.svd(q.T @ delta, full_matrices=False)
    whole = float(np.sum(delta**2))
    sketch = Sketch(q @ u, vt.T, tuple(s.tolist()), whole)
    proof = Certificate(delta, sketch, fresh(seed, "float64"))
    for norm2 in proof.norms2():
        assert proof.least(k, norm2) <= best(delta, k) * (1 + 1e-9) + 1e-7 * sqrt(whole)
    proved = proof.proved(k, SLACK)
    if proved is not None:
        assert sqrt(sketch.residual2(k)) <= (1 + SLACK) * best(delta, k) * (1 + 1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("spectrum", ["decaying", "decaying fast", "flat", "a step after the rank"])
def test_energy_takes_hardly_more_than_the_smallest_rank(spectrum: str, energy: float) -> None:
    delta = matrix(SPECTRA[spectrum], 300, 320, dtype="float64")
    found = approximate(delta, Cut(energy=energy), fresh(dtype="float64"))
    s = np.linalg.svd(delta, compute_uv=False)
    fewest = Cut(energy=energy).keep(s, 1e-12 * s[0])
    assert fewest <= found.rank <= fewest * 1.02 + 1
    kept = 1 - (gap(delta, found.factors) / found.norm) ** 2
    assert kept >= energy - 1e-12


def test_energy_and_rank_together_take_the_smaller() -> None:
    delta = matrix(SPECTRA["decaying"], 300, 320)
    assert approximate(delta, Cut(energy=0.999, rank=5), fresh()).rank == 5
    assert approximate(delta, Cut(energy=0.3, rank=50), fresh()).rank == 1


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (3, 900), (900, 3), (200, 200)])
def test_any_shape(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(0).standard_normal(shape).astype("float32")
    found = approximate(delta, Cut(rank=500), fresh())
    assert found.rank == min(shape)
    assert gap(delta, found.factors) <= 1e-5 * found.norm


def test_nothing_has_rank_zero() -> None:
    found = approximate(np.zeros((5, 6), "float32"), Cut(rank=2), fresh())
    assert (found.rank, found.norm, found.residual, found.least) == (0, 0.0, 0.0, 0.0)
    assert [a.shape for a in found.factors] == [(5, 0), (0, 6)]


@pytest.mark.parametrize("cut", [Cut(rank=RANK), Cut(energy=0.95)], ids=["rank", "energy"])
def test_libraries_agree(lib: Lib, cut: Cut) -> None:
    if not lib.has_values or lib.row == "strict:minimal":
        pytest.skip("shapes alone, or no decompositions, decide nothing")
    delta = matrix(SPECTRA["decaying fast"], 300, 310)
    want = approximate(delta, cut, fresh())
    got = approximate(lib.array(delta), cut, Fresh(0, lib.backend))
    assert (got.way, got.rank) == (want.way, want.rank)
    assert got.residual == pytest.approx(want.residual, rel=1e-4)
    for a, b in zip(got.factors, want.factors, strict=True):
        lib.check(a, b, rtol=2e-3)


def test_jax_without_doubles_is_proved_on_the_host() -> None:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        delta = matrix(SPECTRA["a faint rest"], 300, 310)
        found = approximate(jax.numpy.asarray(delta), Cut(rank=RANK), Fresh(0, resolve("jax")))
    finally:
        jax.config.update("jax_enable_x64", before)
    assert found.way == "range finder"
    assert resolve("auto", *found.factors).name == "jax"
    assert found.residual <= (1 + SLACK) * best(delta, RANK)


def test_a_seed_gives_the_same_factors() -> None:
    delta = np.random.default_rng(0).standard_normal((300, 310)).astype("float32")
    one, two = (approximate(delta, Cut(rank=3), fresh(5)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.factors, two.factors, strict=True))


def test_signs_do_not_depend_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = matrix(SPECTRA["decaying fast"], 300, 310)
    found = approximate(delta, Cut(rank=5), fresh())
    monkeypatch.setattr(rangefinder, "_SMALL", 1000)
    full = approximate(delta, Cut(rank=5), fresh())
    assert (found.way, full.way) == ("range finder", "svd")
    for a, b in zip(found.factors, full.factors, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.all(np.max(full.factors[0], axis=0) >= -np.min(full.factors[0], axis=0))


def test_blocks_make_the_whole(lib: Lib, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lib.has_values:
        pytest.skip("shapes alone have no sums")
    monkeypatch.setattr("peft_any.algebra.blockwise._BLOCK", 20)
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((11, 6)).astype("float32")
    q, x = rng.standard_normal((11, 2)), rng.standard_normal((6, 2))
    there, wide = lib.array(delta), delta.astype("float64")
    assert len([*blocks(there)]) == 4
    assert square(there) == pytest.approx(float(np.sum(wide**2)))
    lib.check(product(there, lib.array(x)), wide @ x, rtol=1e-12)
    lib.check(cross(there, lib.array(q)), wide.T @ q, rtol=1e-12)
    pair = lib.array(q), lib.array(np.ascontiguousarray(x.T))
    assert distance(there, pair) == pytest.approx(float(np.linalg.norm(wide - q @ x.T)))
    assert dtype_name(like(lib.array(q), there)) == "float32"

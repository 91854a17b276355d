"""What records say of errors, against dense differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import combine
from peft_any.adapter import Adapter
from peft_any.algebra.distances import error_of, gap, length
from peft_any.algebra.lowrank import Cut, total, truncate
from peft_any.methods.lora import LoraConfig
from tests.test_lowrank import dense, draw

sizes = st.integers(1, 12)


@given(m=sizes, n=sizes, k=sizes, seed=st.integers(0, 2**32), apart=st.floats(-12, 1))
def test_lengths_survive_cancellation(m: int, n: int, k: int, seed: int, apart: float) -> None:
    u, v = draw(m, k, n, seed)
    moved = v + 10.0**apart * draw(m, k, n, seed + 1)[1]
    want = float(np.linalg.norm(u @ (v - moved)))
    whole = float(np.linalg.norm(u) * (np.linalg.norm(v) + np.linalg.norm(moved)))
    near = length(total([(1.0, (u, v)), (-1.0, (u, moved))]))
    assert near == pytest.approx(want, rel=1e-6, abs=1e-15 * whole)
    # by the difference of the factors, nothing is lost but what v and moved have lost themselves
    assert length(gap((u, v), (u, moved))) == pytest.approx(want, rel=1e-11, abs=1e-300)


@given(
    shape=st.tuples(sizes, sizes, sizes),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_errors_are_those_of_the_stored_factors(
    shape: tuple[int, int, int], rank: int, seed: int, dtype: str
) -> None:
    wanted = draw(*shape, seed)
    best = truncate(wanted, Cut(rank=rank))
    stored = tuple(part.astype(dtype).astype("float64") for part in best.factors)
    lost = float(np.sum(np.asarray(best.spectrum)[best.rank :] ** 2))
    whole = dense(wanted)
    want = np.linalg.norm(dense((stored[0], stored[1])) - whole) / np.linalg.norm(whole)
    for target in (wanted, whole):
        found = error_of((stored[0], stored[1]), best.factors, target, lost)
        assert found == pytest.approx(want, rel=1e-6, abs=2e-14)


def test_nothing_wanted_has_no_error() -> None:
    zeros = np.zeros((3, 1)), np.ones((1, 2))
    assert error_of(zeros, zeros, zeros, 0.0) is None
    assert error_of(zeros, zeros, np.zeros((3, 2)), 0.0) is None


def test_large_pruned_sums_are_cut_nearly_at_best() -> None:
    """Where the full decomposition would be slow, the range finder proves its residual."""
    rng = np.random.default_rng(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["fc"])

    def lora() -> Adapter:
        a, b = rng.standard_normal((4, 300)), rng.standard_normal((260, 4))
        return Adapter(config, {"fc": {"lora_A.weight": a, "lora_B.weight": b}})

    options: Any = {"method": "ties_svd", "density": 0.5, "rank": 6}
    pair = [(lora(), 1.0), (lora(), 1.0)]
    made, record = combine(pair, **options)
    full, _ = combine(pair, **{**options, "rank": 260})
    p, q = made.sites["fc"], full.sites["fc"]
    wanted = q["lora_B.weight"] @ q["lora_A.weight"]
    got = p["lora_B.weight"] @ p["lora_A.weight"]
    s = np.linalg.svd(wanted, compute_uv=False)
    missed = float(np.linalg.norm(got - wanted))
    assert missed <= 1.01 * np.linalg.norm(s[6:])
    (layer,) = record.layers
    assert layer.error == pytest.approx(missed / np.linalg.norm(wanted), rel=1e-9)
    assert layer.discarded == pytest.approx((missed / np.linalg.norm(wanted)) ** 2, rel=1e-6)

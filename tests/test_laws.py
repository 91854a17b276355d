"""Laws 1–4 over the table: identity, merge = forward, unmerge∘merge, libraries agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any.backend import resolve
from peft_any.errors import Irreversible
from peft_any.layer import EXPERTS, Dense
from peft_any.method import Additive
from peft_any.rng import Fresh
from tests.cases import CASES, Case
from tests.conftest import Lib

ROUNDING = {"float32": 6e-8, "float64": 1.2e-16}
table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
leading = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def inputs(case: Case, lead: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Draw an input of the row's layer with the given leading shape."""
    rng = np.random.default_rng([seed, 3])
    if case.site.kind == "Embedding":
        return rng.integers(0, case.site.n_in, lead)
    return rng.standard_normal((*lead, case.site.reads)).astype(dtype)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, relative to the largest entry wanted."""
    return float(np.max(np.abs(got - want), initial=0.0)) / max(float(np.max(np.abs(want))), 1e-30)


@table
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(["float32", "float64"]))
def test_a_fresh_adapter_changes_nothing(case: Case, seed: int, dtype: str) -> None:
    base = case.base(seed, dtype=dtype)
    p = case.fresh(base, seed, dtype)
    merged = case.config.at(case.site).merge(p, base)
    change = relative(merged.weight, base.weight)
    if case.identity is not None:
        if base.bias is not None:
            change = max(change, relative(merged.bias, base.bias))
        assert change > 1e-3, "the row says that a fresh adapter is not the identity"
        return
    assert change <= 50 * ROUNDING[dtype]
    if base.bias is not None:
        np.testing.assert_array_equal(merged.bias, base.bias)


@table
@given(
    seed=st.integers(0, 2**32),
    lead=leading,
    bias=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_forward_is_the_merged_layer(
    case: Case, seed: int, lead: tuple[int, ...], bias: bool, dtype: str
) -> None:
    config = case.config.at(case.site)
    bias = (bias and case.site.kind != "Embedding") or config.changes_bias(case.site)
    base = case.base(seed, dtype=dtype, bias=bias)
    p, x = case.params(base, seed, dtype), inputs(case, lead, dtype, seed)
    merged = config.merge(p, base)
    assert merged.weight.shape == base.weight.shape
    assert merged.weight.dtype == base.weight.dtype
    assert relative(config.forward(p, x, base), merged(x)) <= 200 * ROUNDING[dtype]
    ready = config.prepare(p, base)
    assert relative(config.forward(ready, x, base), merged(x)) <= 200 * ROUNDING[dtype]
    assert relative(config.merge(ready, base).weight, merged.weight) <= 50 * ROUNDING[dtype]
    if base.bias is not None:
        moved = not np.array_equal(merged.bias, base.bias)
        assert moved == config.changes_bias(case.site)
    dw, _ = config.effect(p, base)
    assert relative(base.weight + dw, merged.weight) <= 50 * ROUNDING[dtype]


@table
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(["float32", "float64"]))
def test_unmerging_gives_the_base_back(case: Case, seed: int, dtype: str) -> None:
    config, base = case.config.at(case.site), case.base(seed, dtype=dtype)
    p = case.params(base, seed, dtype)
    merged = config.merge(p, base)
    if not case.reverts:
        with pytest.raises(Irreversible, match=case.site.name):
            config.unmerge(p, merged)
        return
    again = config.unmerge(p, merged)
    size = max(1.0, relative(merged.weight, base.weight))
    assert relative(again.weight, base.weight) <= case.reverts * size * ROUNDING[dtype]
    if base.bias is not None:
        assert relative(again.bias, base.bias) <= case.reverts * size * ROUNDING[dtype]


@table
def test_every_library_gives_numpys_numbers(case: Case, lib: Lib) -> None:
    config, base = case.config.at(case.site), case.base()
    if reason := lib.lacks(config.needs):
        pytest.skip(reason)
    p, x = case.params(base), inputs(case, (2, 3), "float32", 0)

    def adapt(p, x, weight, bias):
        layer = Dense(weight, bias, case.site)
        merged = config.merge(p, layer)
        return config.forward(p, x, layer), merged.weight, merged.bias, merged.stored()

    y, weight, bias, stored = lib.call(adapt, p, x, base.weight, base.bias)
    merged = config.merge(p, base)
    lib.check(y, config.forward(p, x, base), rtol=5e-6)
    lib.check(weight, merged.weight, rtol=5e-6)
    lib.check(stored, merged.stored(), rtol=5e-6)
    assert tuple(stored.shape) == case.site.stored_shape
    if base.bias is not None:
        lib.check(bias, merged.bias, rtol=5e-6)


# Computed from the base weight, not drawn.
MEASURED = {"lora_magnitude_vector", "delora_w_norm", "deft_R"}


@table
def test_one_seed_draws_the_same_numbers_everywhere(case: Case, lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    config, base = case.config.at(case.site), case.base()
    if reason := lib.lacks(config.needs):
        pytest.skip(reason)
    there = Dense(lib.array(base.weight), None, case.site)
    drawn = config.init(case.site, Fresh(7, lib.backend, key=case.site.name, base=there))
    want = config.init(
        case.site, Fresh(7, resolve("numpy"), key=case.site.name, base=base.replace(bias=None))
    )
    assert list(drawn) == list(want)
    for name, value in want.items():
        lib.check(drawn[name], value, rtol=1e-6 if name in MEASURED else 0.0)


@table
def test_parameters_have_the_names_and_shapes_announced(case: Case) -> None:
    config = case.config.at(case.site)
    p = config.init(case.site, Fresh(0, resolve("numpy"), base=case.base()))
    announced = config.shapes(case.site)
    assert {
        k: v.shape for k, v in p.items() if k in announced or k not in config.frozen
    } == announced


ADDITIVE = [case for case in CASES if isinstance(case.config, Additive)]
OF_RANK_R = {"ADALORA", "LORA", "VERA"}


@pytest.mark.parametrize("case", ADDITIVE, ids=lambda case: case.name)
@given(seed=st.integers(0, 2**32))
def test_the_factors_multiply_to_delta(case: Case, seed: int) -> None:
    config: Any = case.config.at(case.site)
    p = case.params(case.base(seed, dtype="float64"), seed, "float64")
    u, v = config.factors(p, case.site)
    delta = config.delta(p, case.site)
    assert delta.shape == (u.shape[0], v.shape[1])
    assert relative(u @ v, delta) <= 1e-14
    if config.peft_type in OF_RANK_R:
        trained = p["start_A"].shape[0] if "start_A" in p else 0
        experts = case.site.groups if case.site.kind in EXPERTS else 1
        assert u.shape[1] == (config.r + trained) * experts
    else:  # no wider than the matrix, or than the products of the parts' columns
        assert u.shape[1] <= max(min(delta.shape), (getattr(config, "r", None) or 0) ** 2)

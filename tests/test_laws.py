"""Laws 1–4 over the table: identity, merge = forward, unmerge∘merge, libraries agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any.bound import BoundLayer
from peft_any.layer import EXPERTS
from peft_any.method import Additive, Tuner
from peft_any.parts import Part, rounded
from peft_any.testing import Lib, laws, stepping
from peft_any.testing.strategies import dtypes, leads
from tests.cases import CASES, Case

table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
seeds = st.integers(0, 2**32)


@table
@given(seed=seeds, dtype=dtypes)
def test_a_fresh_adapter_changes_nothing(case: Case, seed: int, dtype: str) -> None:
    laws.identity(case, seed, dtype)


@table
def test_nothing_is_written_in_place(case: Case) -> None:
    laws.untouched(case)


@table
@given(seed=seeds, lead=leads, bias=st.booleans(), dtype=dtypes)
def test_forward_is_the_merged_layer(
    case: Case, seed: int, lead: tuple[int, ...], bias: bool, dtype: str
) -> None:
    laws.merging(case, seed, lead, dtype, bias=bias)


@table
@given(seed=seeds, dtype=dtypes)
def test_training_drops_what_its_noise_says(case: Case, seed: int, dtype: str) -> None:
    stepping.dropping(case, seed, dtype)


SETTLING = [c for c in CASES if type(c.config).settled is not Tuner.settled]


@pytest.mark.parametrize("case", SETTLING, ids=lambda case: case.name)
@given(seed=seeds, dtype=dtypes)
def test_parameters_settle_once(case: Case, seed: int, dtype: str) -> None:
    stepping.settling(case, seed, dtype)


@pytest.mark.parametrize("case", SETTLING, ids=lambda case: case.name)
def test_they_settle_alike_on_every_library(case: Case, lib: Lib) -> None:
    stepping.settling_on(case, lib)


CALLED = [c for c in CASES if not c.site.is_conv and c.site.kind not in EXPERTS]


@pytest.mark.parametrize("case", CALLED, ids=lambda case: case.name)
def test_two_adapters_one_upon_another_apply_as_they_merge(case: Case) -> None:
    base, site = case.base(dtype="float64"), case.site
    parts = [Part(case.resolved, case.params(base, seed, "float64")) for seed in (1, 2)]
    x: Any = np.random.default_rng(0).standard_normal((3, site.n_in))
    if site.kind == "Embedding":
        x = np.arange(site.n_in)
    want = rounded(parts, base, stacked=True)(x)
    y = BoundLayer(base, parts, stacked=True)(x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-10 * np.abs(want).max())


@table
@given(seed=seeds, dtype=dtypes)
def test_unmerging_gives_the_base_back(case: Case, seed: int, dtype: str) -> None:
    laws.unmerging(case, seed, dtype)


@table
def test_every_library_gives_numpys_numbers(case: Case, lib: Lib) -> None:
    if reason := lib.lacks(case.resolved.needs):
        pytest.skip(reason)
    laws.libraries(case, lib)


EACH = {case.config.peft_type: case for case in CALLED}


@pytest.mark.parametrize("case", [*EACH.values()], ids=[*EACH])
def test_nothing_gives_nothing_on_every_library(case: Case, lib: Lib) -> None:
    if reason := lib.lacks(case.resolved.needs):
        pytest.skip(reason)
    site, base = case.site, case.base()
    of = () if site.kind == "Embedding" else (site.n_in,)
    x = np.zeros((0, 3, *of), "int64" if site.kind == "Embedding" else "float32")
    bias = None if base.bias is None else lib.array(base.bias)
    there = base.replace(weight=lib.array(base.weight), bias=bias)
    y = case.resolved.forward(lib.array(case.params(base)), lib.array(x), there)
    lib.check(y, np.zeros((0, 3, site.n_out), "float32"), rtol=0)


# Computed from the base weight, not drawn.
MEASURED = {"lora_magnitude_vector", "delora_w_norm", "deft_R", "frod_U", "frod_lambda_l"}


@table
def test_one_seed_draws_the_same_numbers_everywhere(case: Case, lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    if reason := lib.lacks(case.resolved.needs):
        pytest.skip(reason)
    laws.seeds(case, lib, MEASURED)


@table
def test_parameters_have_the_names_and_shapes_announced(case: Case) -> None:
    laws.announced(case)


@table
def test_files_hold_it_all(case: Case) -> None:
    laws.files(case)


ADDITIVE = [case for case in CASES if isinstance(case.config, Additive)]
OF_RANK_R = {"ADALORA", "LORA", "VERA"}


@pytest.mark.parametrize("case", ADDITIVE, ids=lambda case: case.name)
@given(seed=st.integers(0, 2**32))
def test_the_factors_multiply_to_delta(case: Case, seed: int) -> None:
    laws.factors(case, seed)
    config: Any = case.resolved
    p = case.params(case.base(seed, dtype="float64"), seed, "float64")
    u, v = config.factors(p, case.site)
    if config.peft_type in OF_RANK_R:
        trained = p["start_A"].shape[0] if "start_A" in p else 0
        experts = case.site.groups if case.site.kind in EXPERTS else 1
        assert u.shape[1] == (config.r + trained) * experts
    else:  # no wider than the matrix, or than the products of the parts' columns
        assert u.shape[1] <= max(
            min(u.shape[0], v.shape[1]), (getattr(config, "r", None) or 0) ** 2
        )

"""Every row of the table through a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_any import merge, merge_checkpoint
from peft_any.backend import numpy_dtype
from peft_any.io.checkpoint import Checkpoint
from peft_any.surgery.rounding import nearest, widened
from tests.cases import CASES, Case
from tests.models import single
from tests.test_combine import adapter_of, weights_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_is_merged_on_disk_as_in_memory(case: Case, dtype: str, tmp_path: Path) -> None:
    base = case.base(3)
    weights = {k: v.astype(numpy_dtype(dtype)) for k, v in weights_of(base).items()}
    kinds = {case.site.name: case.site}
    adapter = adapter_of(case, case.base(3, dtype="float64"), 1)
    file = single(tmp_path / "base", weights)
    receipt = merge_checkpoint(file, adapter, tmp_path / "out", kinds=kinds)
    exact = merge({k: v.astype("float64") for k, v in weights.items()}, adapter, kinds=kinds)
    with Checkpoint(tmp_path / "out") as merged:
        assert merged.keys() == weights.keys()
        for key, value in exact.items():
            got, want = widened(merged[key]), widened(nearest(value, dtype))
            # float32 may part where double precision itself ends; bfloat16 has room to spare
            np.testing.assert_allclose(got, want, rtol=0 if dtype == "bfloat16" else 2e-7, atol=0)
    moved = {key for key, value in exact.items() if np.any(value != widened(weights[key]))}
    assert moved <= {change.tensor for change in receipt.changes}

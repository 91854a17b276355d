"""Mixed batches: every row of a batch is what its own adapter gives, on both paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any import (
    Adapter,
    ConfigError,
    FormatError,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    ShapeError,
    move,
    pad_to_rank,
    stack,
    value_and_grad,
)
from peft_any.backend import namespace, to_numpy
from peft_any.bank.data import StackedLayer
from peft_any.bank.factors import factored, factors_of, few
from peft_any.bank.mixed import MixedLayer
from peft_any.bound import BoundLayer
from peft_any.errors import UsageError
from peft_any.layer import Dense
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.parts import Part
from peft_any.testing import Lib
from tests.cases import CASES, Case
from tests.racing import race

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
    paths = ["grouped", "stacked", "joined"] if stackable else ["grouped"]
    if stackable and lib.name == "dask":  # which cannot see a matrix in chunks as a stack
        paths.remove("stacked")

    def apply(p, q, weight, bias, x):
        return [mixed(case, p, q, weight, bias, path=path)(x) for path in paths]

    for got in lib.call(apply, p, q, base.weight, base.bias, x):
        lib.check(got, want, rtol=5e-6)


@table
def test_rows_may_be_numbers_in_an_array(case: Case, lib: Lib) -> None:
    config, base = case.config.at(case.site), case.base()
    if reason := lib.lacks(config.needs):
        pytest.skip(reason)
    if FIRST[config.peft_type] != case.name:
        pytest.skip("one row of each method: the mixture's own code is the same for all")
    p, q = case.params(base, 0), case.params(base, 1)
    x = case.inputs((len(ROWS), 3))
    alone = mixed(case, p, q, base.weight, base.bias, path=None).layers
    want = np.stack([alone[k](x[i]) for i, k in enumerate(ROWS)])

    def apply(p, q, weight, bias, given):
        layers = mixed(case, p, q, weight, bias, path=None).layers
        return StackedLayer(layers)(given["x"], given["rows"])

    rows = np.asarray(ROWS, dtype="int32") - 1
    lib.check(
        lib.call(apply, p, q, base.weight, base.bias, {"x": x, "rows": rows}), want, rtol=5e-6
    )


@table
def test_the_rank_of_factors_is_estimated_before_they_are_formed(case: Case) -> None:
    config, base = case.config.at(case.site), case.base()
    if not factored(config, case.site):
        pytest.skip("adds no product of factors")
    found = factors_of(BoundLayer(base, [Part(config, case.params(base, 0))], stacked=True))
    assert found is not None
    assert found["a"].shape[0] <= 2 * config.rank(case.site)


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


def moved(host: PeftModel, library: str, names: Iterable[str] | None = None) -> PeftModel:
    """Make the same model of another library, with all adapters or some."""
    model = PeftModel(move(host.weights, library))
    for name in host.names if names is None else names:
        model.add(name, host[name])
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
        for path in ("joined", "stacked", "grouped"):
            y = MixedLayer(layer.layers, layer.rows, path)(x)
            np.testing.assert_allclose(y, np.stack(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("names", [["lora0", "lora1"], ["lora0", "oft", "ia3"]])
def test_gradients_reach_each_rows_adapter_alone(library: str, names: list[str]) -> None:
    pytest.importorskip(library)
    if library == "jax":
        pytest.importorskip("jax").config.update("jax_enable_x64", True)
    host = model_of([2, 3, 1])
    model = moved(host, library)
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


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_row_is_not_harmed_by_another_adapter_s_numbers(value: float) -> None:
    model = model_of([2, 3, 1])
    broken = {k: np.full_like(v, value) for k, v in model.parameters["lora0"]["fc"].items()}
    x, rows = np.random.default_rng(1).standard_normal((2, 6)), ["lora0", "lora1"]
    want = model.bind(rows=rows).layers["fc"](x)
    model.update({"lora0": {"fc": broken}})
    with np.errstate(invalid="ignore"):
        got = model.bind(rows=rows).layers["fc"](x)
    assert not np.isfinite(got[0]).any()
    np.testing.assert_allclose(got[1], want[1], rtol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("names", [["lora0", "lora1"], ["oft", "ia3"], ["lora0", "oft", "ia3"]])
@pytest.mark.parametrize("numbers", [False, True])
def test_no_row_s_input_harms_another_s_gradient(
    library: str, names: list[str], *, numbers: bool
) -> None:
    pytest.importorskip(library)
    host = model_of([2, 3, 1])
    model = moved(host, library, names)
    rows: Any = [*names, names[0], None]
    if numbers:
        rows = move(np.asarray([*range(len(names)), 0, -1]), library)
    x = np.random.default_rng(1).standard_normal((len(names) + 2, 6))

    def slopes(value: float) -> Any:
        x[-1] = value
        given = move(x, library)

        def loss(params: Any) -> Any:
            y = model.bind(params, rows=rows).layers["fc"](given)
            return (y[:-1, ...] ** 2).sum()

        with np.errstate(invalid="ignore"):
            return value_and_grad(loss)(model.parameters)[1]

    clean = slopes(1.0)
    for value in (np.inf, np.nan):
        found = slopes(value)
        for name in names:
            for key, want in clean[name]["fc"].items():
                got = to_numpy(found[name]["fc"][key])
                np.testing.assert_allclose(got, to_numpy(want), rtol=1e-9)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_rows_are_integers_of_any_width(library: str, dtype: str) -> None:
    pytest.importorskip(library)
    model = PeftModel(move({"fc.weight": np.ones((3, 4), "float32")}, library))
    adapter = model.add("0", replace(PARTNER, target_modules=["fc"], init_lora_weights=False))
    bank = stack([adapter] * 300, model.weights)
    x = move(np.ones((3, 4), "float32"), library)
    for rows in ([127, 0, 3], []):
        bound = bank.bind(move(np.asarray(rows, dtype), library))
        y = to_numpy(bound.layers["fc"](x[: len(rows), ...]))
        want = to_numpy(model.bind().layers["fc"](x[: len(rows), ...]))
        np.testing.assert_allclose(y, want, rtol=1e-6)


def test_the_joined_path_is_taken_where_it_costs_little() -> None:
    layer = model_of([2, 3, 1]).bind(rows=["lora0", "lora1", None]).layers["fc"]
    layer(np.ones((3, 6)))
    assert taken_by(layer) == {"joined"}
    site = layer.base.site
    assert few(128, replace(site, n_in=256, n_out=256), 1 << 20)
    assert few(512, replace(site, n_in=1023, n_out=1023), 32)
    assert not few(512, replace(site, n_in=1023, n_out=1023), 33)
    small = replace(site, n_in=64, n_out=64)
    assert few(128, small, 1024)
    assert not few(128, small, 1025)


def taken_by(layer: Any) -> set[str]:
    """Tell the paths that a mixed layer has prepared."""
    return {path for path, ready in layer._made.items() if ready is not None}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shares", [(8, 8, 8, 8), (9, 7, 8, 8), (29, 1, 1, 1)])
def test_rows_in_equal_shares_are_stacked(library: str, shares: tuple[int, ...]) -> None:
    pytest.importorskip(library)
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((512, 2048)), "fc.bias": rng.standard_normal(512)}
    model = PeftModel(move(weights, library))
    for i in range(len(shares)):
        config = LoraConfig(r=32, init_lora_weights=False, target_modules=["fc"])
        model.add(f"a{i}", config, seed=i, dtype="float64")
    rows = rng.permutation([f"a{i}" for i, share in enumerate(shares) for _ in range(share)])
    x = move(rng.standard_normal((32, 2, 2048)), library)
    layer = model.bind(rows=rows.tolist()).layers["fc"]
    want = np.asarray(MixedLayer(layer.layers, layer.rows, "grouped")(x))
    np.testing.assert_allclose(np.asarray(layer(x)), want, rtol=1e-9, atol=1e-9)
    assert ("stacked" in taken_by(layer)) == (max(shares) < 29)
    below = model.bind(rows=[None] * 32).layers["fc"](x)
    assert np.abs(np.asarray(below) - want).max() > 1e-3


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("n", [24, 800, 1030])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_what_a_call_prepares_serves_the_next(library: str, n: int, count: int, bias: bool) -> None:
    pytest.importorskip(library)
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((n, n + 8)), "fc.bias": rng.standard_normal(n)}
    model = PeftModel(move(weights if bias else {"fc.weight": weights["fc.weight"]}, library))
    for i in range(count):
        config = LoraConfig(r=8 if i else 5, init_lora_weights=False, target_modules=["fc"])
        model.add(f"a{i}", config, seed=i, dtype="float64")
    even, uneven = [*model.names] * 3, [*model.names, None, *["a0"] * 15]
    for names in (even, uneven, ["a0"] * 20):
        layer = model.bind(rows=names).layers["fc"]
        alone = MixedLayer(layer.layers, layer.rows, "grouped")
        for lead in ((), (1,), (3,), (1,), (1,), (2, 2), (0,)):
            x = move(rng.standard_normal((len(names), *lead, n + 8)), library)
            kept = to_numpy(x).copy()
            for _ in range(2):
                got, want = to_numpy(layer(x)), to_numpy(alone(x))
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
            assert layer._last[3] is not None
            np.testing.assert_array_equal(to_numpy(x), kept)
        single = to_numpy(layer(move(to_numpy(x).astype("float32"), library)))
        assert single.dtype == np.float32
        with pytest.raises(ShapeError, match=f"{len(names)} rows"):
            layer(x[1:, ...])


def test_a_prepared_call_is_differentiated_and_mapped() -> None:
    torch = pytest.importorskip("torch")
    model = PeftModel({"fc.weight": torch.randn(800, 800).double()})
    for i in range(4):
        config = LoraConfig(r=12, init_lora_weights=False, target_modules=["fc"])
        model.add(f"a{i}", config, seed=i, dtype="float64")
    for rows in (["a0", "a1"] * 10, ["a0", "a1", "a2", "a3", None] * 4, ["a0"] * 20):
        layer, x = model.bind(rows=rows).layers["fc"], torch.randn(20, 800).double()
        alone = MixedLayer(layer.layers, layer.rows, "grouped")
        for _ in range(2):
            slopes = [torch.func.grad(lambda x, one=one: one(x).square().sum())(x)
                      for one in (layer, alone)]  # fmt: skip
            torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
            given = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(layer(given).square().sum(), given)
            torch.testing.assert_close(slope, slopes[1], rtol=1e-10, atol=1e-10)
            mapped = torch.func.vmap(layer, in_dims=1, out_dims=1)(x[:, None, :].expand(-1, 3, -1))
            want = alone(x)[:, None, :].expand(-1, 3, -1)
            torch.testing.assert_close(mapped, want, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(layer(x), alone(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [["a", "b", None], ["a", "a", "a"], "numbers", None])
def test_what_was_called_without_derivatives_has_them_after(rows: Any) -> None:
    torch = pytest.importorskip("torch")
    model = PeftModel({"fc.weight": torch.randn(12, 8)})
    for name, config in (("a", LoraConfig), ("b", IA3Config)):
        more: Any = {"feedforward_modules": []} if name == "b" else {"init_lora_weights": False}
        model.add(name, config(target_modules=["fc"], **more))
    rows = torch.tensor([0, 1, -1]) if isinstance(rows, str) else rows
    params = {
        a: {s: {k: v.clone().requires_grad_() for k, v in p.items()} for s, p in sites.items()}
        for a, sites in model.parameters.items()
        if a in model.active or rows is not None
    }
    bound, x = model.bind(params, rows=rows), torch.randn(3, 8)
    with torch.no_grad():
        before = bound.layers["fc"](x)
    for _ in range(2):
        y = bound.layers["fc"](x)
        torch.testing.assert_close(y.detach(), before)
        y.square().sum().backward()
        for p in params["a"]["fc"].values():
            assert p.grad is not None
            assert p.grad.abs().max() > 0
    with torch.no_grad():  # as an optimizer does
        for p in params["a"]["fc"].values():
            p.mul_(2.0)
        want = model.bind(params, rows=rows).layers["fc"](x)
        assert (want - before).abs().max() > 1e-3
        torch.testing.assert_close(bound.layers["fc"](x), want)


@pytest.mark.parametrize("how", ["layers", "weights", "merged", "rows", "numbers"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_was_called_in_inference_mode_is_differentiated_after(how: str, *, dora: bool) -> None:
    torch = pytest.importorskip("torch")
    model = PeftModel({"fc.weight": torch.randn(12, 8)})
    for name in "ab":
        config = LoraConfig(target_modules=["fc"], use_dora=dora, init_lora_weights=False)
        model.add(name, config)
    rows = {"rows": ["a", "b", "b"], "numbers": torch.tensor([0, 1, 1])}
    bound: Any = model.bind(rows=rows[how]) if how in rows else model.bind()
    x = torch.randn(3, 8, requires_grad=True)

    def call(x: Any) -> Any:
        if how in ("weights", "merged"):
            w = bound.weights["fc.weight"]
            return x @ (w.merged if how == "merged" else w).T
        return bound.layers["fc"](x)

    with torch.inference_mode():
        before = call(x)
    (slope,) = torch.autograd.grad(call(x).sum(), x)
    assert slope.abs().min() > 0
    torch.testing.assert_close(call(x).detach(), before.clone())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_torch_compiles_a_mixed_layer(engine: str) -> None:
    torch = pytest.importorskip("torch")
    host = model_of([2, 3, 1], dtype="float32")
    model = moved(host, "torch")
    x, stacked = torch.randn(3, 2, 6), model.bind(rows=torch.tensor([0])).layers["fc"].stacked
    for rows in (["lora0", None, "lora1"], ["oft", "lora0", "ia3"]):
        layer = model.bind(rows=rows).layers["fc"]
        want = layer(x)
        torch.testing.assert_close(torch.compile(layer, backend=engine)(x), want)
    compiled = torch.compile(stacked, backend=engine)
    for rows in (["lora0", None, "lora1"], ["oft", "lora0", "ia3"]):
        numbers = torch.tensor([-1 if name is None else model.names.index(name) for name in rows])
        want = model.bind(rows=rows).layers["fc"](x)
        torch.testing.assert_close(compiled(x, numbers), want)


@pytest.mark.filterwarnings("ignore:Dynamo (detected|does not know)")
@pytest.mark.parametrize("rows", [["lora0", None, "lora1"], ["oft", "lora0", "ia3"], "numbers"])
def test_a_layer_that_was_called_is_compiled_whole(rows: Any) -> None:
    torch = pytest.importorskip("torch")
    host = model_of([2, 3, 1], dtype="float32")
    model = moved(host, "torch")
    layer = model.bind(rows=torch.tensor([0, -1, 3]) if rows == "numbers" else rows).layers["fc"]
    torch._dynamo.reset()
    layer(torch.randn(3, 6))
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    for shape in ((3, 6), (3, 4, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(whole(x), layer(x))
    torch._dynamo.reset()

    def binding(x: Any) -> Any:
        return model.bind().layers["fc"](x)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(binding, backend="eager", fullgraph=True)(x)


@pytest.mark.filterwarnings("ignore:Dynamo (detected|does not know)")
def test_torch_compiles_binding_and_other_rows_and_parameters_compile_nothing() -> None:
    torch = pytest.importorskip("torch")
    from torch._dynamo.testing import CompileCounter

    names = ["lora0", "oft"]
    host = model_of([2, 3, 1], dtype="float32")
    model = moved(host, "torch", names)
    x, some = torch.randn(3, 6), model.parameters

    def loss(params: Any, rows: Any = None) -> Any:
        return model.bind(params, rows=rows).layers["fc"](x).square().sum()

    for calls in (
        [()] * 3,
        [(torch.tensor(rows),) for rows in ([0, -1, 1], [1, 0, 0], [-1, -1, 1])],
    ):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(loss, backend=counter)
        for i, call in enumerate(calls):
            params = {
                a: {s: {k: v * (i + 1) for k, v in p.items()} for s, p in sites.items()}
                for a, sites in some.items()
            }
            before = counter.frame_count
            torch.testing.assert_close(compiled(params, *call), loss(params, *call))
            assert counter.frame_count == before or i < 2


def test_other_rows_and_other_adapters_compile_nothing_on_jax() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(3)
    base = {"fc.weight": rng.standard_normal((8, 6)), "fc.bias": rng.standard_normal(8)}
    model, fields = PeftModel(move(base, "jax")), {"target_modules": ["fc"]}
    settings = [
        {"r": 4, "lora_alpha": 3},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "rank_pattern": {"fc": 5}, "alpha_pattern": {"fc": 7}},
    ]
    plain = PeftModel(base)
    for i, more in enumerate(settings):
        config = LoraConfig(init_lora_weights=False, **more, **fields)
        made = plain.add(f"a{i}", config, seed=i, dtype="float64")
        model.add(f"a{i}", pad_to_rank(made, 6))
    assert len({str(model[name].config) for name in model.names}) == 1
    x, traces = move(rng.standard_normal((4, 6)), "jax"), []

    @jax.jit
    def run(params: Any, rows: Any) -> Any:
        traces.append(rows)
        return model.bind(params, rows=rows).layers["fc"](x)

    names, params = model.names, {name: model[name].trainable() for name in model.names}
    for order in ([0, 1, 2], [2, 0, 1]):
        given = {name: params[names[k]] for name, k in zip(names, order, strict=True)}
        for rows in ([0, -1, 2, 1], [1, 1, -1, 0]):
            wanted = [None if k < 0 else names[order[k]] for k in rows]
            want = plain.bind(rows=wanted).layers["fc"](np.asarray(x))
            got = run(given, jax.numpy.asarray(rows))
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    assert len(traces) == 1
    assert np.isnan(run(params, jax.numpy.asarray([0, 1, 3, 0]))[2]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", [False, "pissa"])
def test_a_padded_adapter_changes_nothing(dora: bool, bias: bool, start: Any) -> None:
    rng = np.random.default_rng(0)
    weights = {f"{n}.weight": rng.standard_normal((7, 6)) for n in "ab"}
    weights |= {f"{n}.bias": rng.standard_normal(7) for n in "ab"}
    config = LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, use_dora=dora, lora_bias=bias and not (start or dora),
        init_lora_weights=start, rank_pattern={"a": 3}, alpha_pattern={"b": 5},
        target_modules=["a", "b"],
    )  # fmt: skip
    model = PeftModel(weights)
    made = model.add("x", config, dtype="float64")
    moved = {
        s: {k: v + 0.1 * rng.standard_normal(v.shape) for k, v in p.items()}
        for s, p in made.trainable().items()
    }
    model.update({"x": moved})
    padded = PeftModel(weights)
    got = padded.add("x", pad_to_rank(model["x"], 8))
    assert {tuple(p["lora_A.weight"].shape) for p in got.sites.values()} == {(8, 6)}
    for name, want in model.merge().items():
        np.testing.assert_allclose(padded.merge()[name], want, rtol=1e-12, atol=1e-14)
    with pytest.raises(ShapeError, match=r"cannot be padded to 2.*resize"):
        pad_to_rank(model["x"], 2)
    with pytest.raises(ConfigError, match="convert"):
        pad_to_rank(model_of([1, 1, 1])["oft"], 8)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("r", [10**12, 1 << 63])
def test_no_memory_holds_a_rank_that_is_told_so(library: str, r: int) -> None:
    pytest.importorskip(library)
    p = {"lora_A.weight": np.ones((1, 5)), "lora_B.weight": np.ones((3, 1))}
    adapter = Adapter(LoraConfig(r=1), {"fc": move(p, library)})
    with pytest.raises(ShapeError, match=rf"fc\.lora_A\.weight: .* padded to {r}: .*smaller"):
        pad_to_rank(adapter, r)


def test_what_no_row_can_take_is_refused() -> None:
    model = model_of([2, 3, 1])
    config = PromptTuningConfig(num_virtual_tokens=2, token_dim=6)
    prompt = model.add("prompt", config)
    for refused in (
        lambda: model.bind(rows=["prompt", "lora0"]),
        lambda: stack({"prompt": prompt, "lora0": model["lora0"]}, model.weights).bind([0, 1]),
        lambda: model.bind(rows=["lora0"]).swap("lora0", prompt),
    ):
        with pytest.raises(ConfigError, match=r"PROMPT_TUNING makes virtual tokens"):
            refused()
    with pytest.raises(ConfigError, match="'__base__': the name means a row without one"):
        stack({"__base__": model["lora0"]}, model.weights)


def test_stack_makes_a_bank() -> None:
    model, x = model_of([2, 3, 1]), np.random.default_rng(1).standard_normal((4, 6))
    bank = stack([model[name] for name in model.names], model.weights)
    assert bank.names == ["0", "1", "2", "3", "4"]
    want = model.bind(rows=["lora2", None, "ia3", "oft"]).layers["fc"](x)
    for rows in (["2", None, "4", "3"], [2, -1, 4, 3], np.asarray([2, -1, 4, 3])):
        np.testing.assert_allclose(bank.bind(rows).layers["fc"](x), want, rtol=1e-12)
    bound = bank.bind(np.asarray([2, 2, 0, -1]))
    before = bound.layers["fc"](x)
    bank.swap("2", model["oft"])
    after = bound.layers["fc"](x)
    np.testing.assert_array_equal(before[2:], after[2:])
    np.testing.assert_allclose(after[:2], bank.bind(["3"] * 4).layers["fc"](x)[:2])
    with pytest.raises(ConfigError, match="number 7"):
        bank.bind(np.asarray([7]))
    with pytest.raises(ShapeError, match="one integer"):
        bank.bind(np.asarray([0.5]))


def test_what_add_refuses_a_swap_refuses_too() -> None:
    model = PeftModel({"fc.weight": np.random.default_rng(0).standard_normal((8, 6))})
    made = model.add("a", LoraConfig(r=2, target_modules=["fc"]), dtype="float64")
    raw = made.replace(config=LoraConfig(r=2, init_lora_weights="olora", target_modules=["fc"]))
    whole = {k: v.astype("int64") for k, v in made.sites["fc"].items()}
    bank = stack({"a": made}, model.weights)
    for put in (lambda new: model.add("b", new), lambda new: bank.swap("a", new),
                lambda new: model.exchange("a", new)):  # fmt: skip
        with pytest.raises(ConfigError, match="rederive"):
            put(raw)
        with pytest.raises(ShapeError, match="no floats"):
            put(made.replace(sites={"fc": whole}))
    with pytest.raises(ShapeError, match="no floats"):
        bank.swap("a", {"fc": whole})


def whole_net() -> PeftModel:
    """Make a model whose adapters have copies of layers, biases and rows of a table too."""
    rng = np.random.default_rng(5)
    shapes = {"wte.weight": (7, 6), "fc.weight": (8, 6), "fc.bias": (8,), "head.weight": (5, 8)}
    model = PeftModel({k: rng.standard_normal(s) for k, s in shapes.items()})
    on: Any = {"target_modules": ["fc"], "init_lora_weights": False}
    configs = {
        "copied": LoraConfig(r=2, modules_to_save=["head"], **on),
        "tokens": LoraConfig(r=3, trainable_token_indices={"wte": [3, 5]}, **on),
        "biased": LoraConfig(r=2, bias="all", **on),
        "table": LoraConfig(r=2, init_lora_weights=False, target_modules=["wte", "fc"]),
        "ia3": IA3Config(target_modules=["fc"], feedforward_modules=[]),
        "other": LoraConfig(r=2, modules_to_save=["head"], **on),
    }
    for i, (name, config) in enumerate(configs.items()):
        made = model.add(name, config, seed=i, dtype="float64")
        moved = {
            site: {k: v + rng.standard_normal(v.shape) for k, v in p.items()}
            for site, p in made.trainable().items()
        }
        model.update({name: moved})
    return model


WHOLE_ROWS = ["copied", None, "tokens", "biased", "other", "table", "ia3", "copied", "tokens"]


def passed(layers: Any, tokens: Any) -> Any:
    return layers["head"](np.tanh(layers["fc"](layers["wte"](tokens))))


@pytest.mark.parametrize("rows", [WHOLE_ROWS, ["copied"] * 9, [None] * 9, ["copied", "other"] * 5])
@pytest.mark.parametrize("numbers", [False, True])
def test_rows_have_their_own_copies_biases_and_tokens(rows: list[Any], *, numbers: bool) -> None:
    model = whole_net()
    tokens = np.random.default_rng(2).integers(0, 7, (len(rows), 4))
    tokens[:, :2] = 3, 5
    given: Any = rows
    if numbers:
        given = np.asarray([-1 if name is None else model.names.index(name) for name in rows])
    got = passed(model.bind(rows=given).layers, tokens)
    for name, row, own in zip(rows, got, tokens, strict=True):
        model.activate([] if name is None else name)
        np.testing.assert_allclose(row, passed(model.bind().layers, own), rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_copies_of_each_rows_adapter() -> None:
    model, tokens = whole_net(), np.asarray([[3, 1], [5, 3], [3, 5]])
    rows = ["copied", "other", "tokens"]
    params = {name: dict(model.parameters[name]) for name in rows}

    def loss(p: Any, keep: int) -> Any:
        y = passed_on_tape(model.bind(p, rows=rows).layers, tokens)
        return namespace(y).sum(y[keep, ...] ** 2)

    for keep, name in enumerate(rows):
        _, grads = value_and_grad(lambda p, keep=keep: loss(p, keep))(params)
        for other in rows:
            size = max(float(np.max(np.abs(g))) for p in grads[other].values() for g in p.values())
            assert (size > 1e-6) == (other == name)
    assert np.any(value_and_grad(lambda p: loss(p, 0))(params)[1]["copied"][""]["head.weight"])


def passed_on_tape(layers: Any, tokens: Any) -> Any:
    y = layers["fc"](layers["wte"](tokens))
    return layers["head"](namespace(y).tanh(y))


@pytest.mark.parametrize("numbers", [False, True])
def test_rows_are_thinned_as_their_adapters_are(*, numbers: bool) -> None:
    model = PeftModel({"fc.weight": np.random.default_rng(0).standard_normal((8, 6))})
    for i, rate in enumerate((0.5, 0.0, 0.9)):
        config = LoraConfig(r=2, lora_dropout=rate, init_lora_weights=False, target_modules=["fc"])
        model.add(f"a{i}", config, seed=i, dtype="float64")
    rows: Any = ["a0", "a1", None, "a0", "a2"]
    x = np.random.default_rng(1).standard_normal((5, 40, 6))
    given = np.asarray([0, 1, -1, 0, 2]) if numbers else rows
    plain = model.bind(rows=given).layers["fc"](x)

    def thinned(seed: int) -> Any:
        return model.bind(rng=seed, rows=given).layers["fc"](x)

    one, again, other = thinned(3), thinned(3), thinned(4)
    np.testing.assert_array_equal(one, again)
    for i, changes in enumerate((True, False, False, True, True)):
        assert np.allclose(one[i], plain[i]) != changes
        assert np.allclose(one[i], other[i]) != changes
    assert not np.allclose((one - plain)[0], (one - plain)[3])  # a row's draws are its own
    if not numbers:  # the rows of an adapter are what it makes of them alone
        model.activate("a0")
        alone = model.bind(rng=3).layers["fc"](x[[0, 3]])
        np.testing.assert_allclose(one[[0, 3]], alone, rtol=1e-12)
    mean = np.mean([thinned(seed) for seed in range(400)], axis=0)
    np.testing.assert_allclose(mean[[0, 3]], plain[[0, 3]], atol=0.2 * float(np.abs(plain).max()))


def test_numbers_name_what_is_there_for_good() -> None:
    model = model_of([2, 3, 1])
    bank, x = stack([model[name] for name in model.names], model.weights), np.ones((2, 6))
    want = bank.bind(["1", None]).layers["fc"](x)
    np.testing.assert_array_equal(bank.bind([np.int64(1), np.int32(-1)]).layers["fc"](x), want)
    with pytest.raises(ConfigError, match="number 5: there are 5 adapters"):
        bank.bind([0, 5])
    with pytest.raises(ConfigError, match=r"1\.0 names no adapter"):
        bank.bind([1.0])


ROWS_READ = [None, ["a", None], None, np.asarray([0, -1]), np.asarray([0, -1])]


def test_no_thread_ever_sees_a_torn_adapter() -> None:
    model = PeftModel({f"fc{i}.weight": np.zeros((2, 2)) for i in range(2)})
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["fc0", "fc1"])
    model.add("a", config, dtype="float64")
    bank = stack({"a": model["a"]}, model.weights)
    bound, ones, seen = bank.bind(["a", None]), np.ones((2, 2)), set[float]()

    def state(c: float, r: int) -> Any:
        p = {"lora_A.weight": np.full((r, 2), c), "lora_B.weight": np.full((2, r), c)}
        fields = replace(config, r=r, lora_alpha=r)
        return model["a"].replace(config=fields, sites={"fc0": p, "fc1": p})

    bound.swap("a", state(1.0, 1))

    def write(new: Any) -> Any:
        return lambda: bound.swap("a", new)

    def read(rows: Any) -> Any:
        own = bound if rows is None else bank.bind(rows)

        def look() -> Any:
            layers = own.layers
            y = np.stack([layers["fc0"](ones), layers["fc1"](ones)])
            seen.add(float(y[0, 0, 0]))
            torn = np.any(y[:, 1]) or np.ptp(y[:, 0]) or y[0, 0, 0] not in (2.0, 8.0, 16.0)
            return y if torn else None

        return look

    writers = [write(state(1.0, 1)), write(state(2.0, 1)), write(state(2.0, 2))]
    assert not race(*writers, *map(read, ROWS_READ))
    assert len(seen) > 1  # what was written was read, too


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_arrays_of_another_library_are_moved_as_an_adapter_s_are(library: str) -> None:
    pytest.importorskip(library)
    model, x = model_of([2, 3, 1]), np.ones((2, 6))
    bound, new = model.bind(rows=["lora0", None]), model["lora0"].trainable()
    new = {s: {k: 2 * v for k, v in p.items()} for s, p in new.items()}
    bound.swap("lora0", move(new, library))
    model.update({"lora0": move(new, library)})
    for name, array in model["lora0"].trainable()["fc"].items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, new["fc"][name])
    model.activate("lora0")
    want = model.bind().layers["fc"](x)[0]
    np.testing.assert_allclose(bound.layers["fc"](x)[0], want, rtol=1e-12)


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
    lost = {s: {k: v * np.nan for k, v in p.items()} for s, p in model["lora0"].trainable().items()}
    model.update({"lora0": lost})  # values are no matter of either
    bound.swap("lora0", lost)
    assert np.isnan(bound.layers["fc"](x)[0]).all()
    np.testing.assert_array_equal(bound.layers["fc"](x)[1], y[1])
    with pytest.raises(FormatError, match="NaN"):
        model["lora0"].check_finite()
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


@pytest.mark.parametrize("rows", [3, {"lora0": 1}, {"lora0"}, b"lora0", [True], [["lora0"]]])
def test_what_is_no_list_of_rows_is_told_so(rows: Any) -> None:
    model = model_of([1, 1, 1])
    with pytest.raises(ConfigError, match=r"^rows.*: give a (list|name)"):
        model.bind(rows=rows)


@pytest.mark.parametrize(
    "new",
    [None, "lora0", [], {"fc": None}, {"fc": {"lora_A.weight": None}}, {"fc": {"a": [[1.0]]}}],
)
def test_what_is_no_adapter_is_swapped_for_none(new: Any) -> None:
    model, x = model_of([1, 1, 1]), np.ones((1, 6))
    bound = model.bind(rows=["lora0"])
    before = bound.layers["fc"](x)
    for name in ("lora0", 0, ["lora0"]):
        with pytest.raises(UsageError, match=r"^Bank\.swap: (new|name).* cannot be taken: give a"):
            bound.swap(name, new)
    np.testing.assert_array_equal(bound.layers["fc"](x), before)


@pytest.mark.parametrize("library", ["dask", "strict"])
def test_a_bank_is_one_on_libraries_that_do_no_more_than_the_standard(library: str) -> None:
    pytest.importorskip({"dask": "dask.array", "strict": "array_api_strict"}[library])
    host, x = model_of([2, 3, 1]), np.random.default_rng(1).standard_normal((5, 2, 6))
    model = moved(host, library)
    padded = stack([pad_to_rank(one[name], 4) for one in (host, model) for name in ("lora0",)],
                   model.weights)  # fmt: skip
    banks = [
        (one, stack({name: one[name] for name in one.names}, one.weights)) for one in (host, model)
    ]
    lists = (["lora0", None, "lora1", "lora0", "lora2"], ["oft", "lora0", None, "ia3", "oft"])
    numbers = np.asarray([0, -1, 1, 0, 2])

    def seen(bank: Any, given: Any, rows: Any) -> Any:
        return to_numpy(bank.bind(rows).layers["fc"](given))

    given = move(x, library)
    for rows in (*lists, numbers, [0, -1, 1, 0, 2]):
        want, got = (
            seen(bank, own, rows) for (_, bank), own in zip(banks, (x, given), strict=True)
        )
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    taken = move(numbers, library)
    got = seen(banks[1][1], given, taken)
    np.testing.assert_allclose(got, seen(banks[0][1], x, numbers), rtol=1e-10, atol=1e-12)
    got = seen(padded, given, ["0", "1", None, "0", "1"])
    want = seen(banks[0][1], x, ["lora0", "lora0", None, "lora0", "lora0"])
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    for one, bank in banks:
        bank.swap("lora0", one["oft"])
    got, want = (
        seen(bank, own, lists[0]) for (_, bank), own in zip(banks, (x, given), strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)

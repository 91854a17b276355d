"""Methods that are applied and never merged: their laws, on every library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import (
    Adapter,
    ConfigError,
    PeftModel,
    ShapeError,
    Site,
    convert,
    inspect_adapter,
    merge_checkpoint,
    resize,
)
from peft_any.alora import calculate_alora_offsets
from peft_any.io.safetensors import write_safetensors
from peft_any.methods.lily import LilyConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.poly import PolyConfig
from peft_any.testing import Lib, applying, descent, laws
from peft_any.testing.gradients import ENGINES
from peft_any.testing.strategies import dtypes
from tests.cases import ROUTED, RoutedCase

never = pytest.mark.parametrize(
    "case", [c for c in ROUTED if c.config.refusal is not None], ids=lambda case: case.name
)
table = pytest.mark.parametrize("case", ROUTED, ids=lambda case: case.name)


@table
@given(seed=st.integers(0, 2**32), dtype=dtypes)
def test_a_fresh_adapter_changes_nothing(case: RoutedCase, seed: int, dtype: str) -> None:
    applying.identity(case, seed, dtype)


@table
@given(seed=st.integers(0, 2**32), dtype=dtypes)
def test_preparing_changes_nothing(case: RoutedCase, seed: int, dtype: str) -> None:
    applying.preparing(case, seed, dtype)


@table
def test_nothing_is_written_in_place(case: RoutedCase) -> None:
    laws.untouched(case)


@never
def test_a_merge_is_refused_with_the_way_out(case: RoutedCase) -> None:
    applying.refusing(case)
    base = case.base()
    p, config = case.params(base), case.config.at(case.site)
    refusal = f"{case.site.name}: {config.peft_type} cannot be merged: .+: .+"
    for refused in (config.merge, config.effect):
        with pytest.raises(ConfigError, match=refusal):
            refused(p, base)
    model = PeftModel(base.tensors())
    model.add("a", replace(case.config, target_modules=[case.site.name]))
    with pytest.raises(ConfigError, match=refusal):
        model.merge()


@table
def test_every_library_gives_numpys_numbers(case: RoutedCase, lib: Lib) -> None:
    applying.libraries(case, lib)


@table
def test_one_seed_draws_the_same_numbers_everywhere(case: RoutedCase, lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    laws.announced(case)
    laws.seeds(case, lib)


@table
def test_files_hold_it_all(case: RoutedCase) -> None:
    laws.files(case)


@table
def test_gradients_are_finite_differences(case: RoutedCase) -> None:
    descent.differences(descent.of_layer(case, "forward"))


@table
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(case: RoutedCase, engine: str) -> None:
    descent.engines(descent.of_layer(case, "forward"), engine)


def stacked(config: LilyConfig) -> PeftModel:
    """Put a Lily adapter on eleven layers of two names."""
    rng = np.random.default_rng(0)
    names = [f"h.{i}.{end}" for i in range(11) for end in ("q", "v")]
    weights = {f"{n}.weight": rng.standard_normal((5, 4)).astype("float32") for n in names}
    model = PeftModel(weights)
    model.add("a", config)
    return model


def test_lily_shares_factors_in_the_file_and_in_training(tmp_path) -> None:
    model = stacked(LilyConfig(r=2, stride_A=4, target_modules=["q", "v"], init_weights=False))
    trained = model.parameters["a"]
    assert [s for s, p in trained.items() if "lily_B.weight" in p] == ["h.0.q", "h.0.v"]
    heads = [s for s, p in trained.items() if "lily_A.weight" in p]
    assert heads == [f"h.{i}.{end}" for i in (0, 4, 8) for end in ("q", "v")]
    moved = {"a": {s: {k: v + 1 for k, v in p.items()} for s, p in trained.items()}}
    model.update(moved)
    sites = model["a"].sites
    for name, p in sites.items():
        i, end = int(name.split(".")[1]), name[-1]
        first = sites[f"h.{i // 4 * 4}.{end}"]
        np.testing.assert_array_equal(p["lily_A.weight"], first["lily_A.weight"])
        np.testing.assert_array_equal(p["lily_B.weight"], sites[f"h.0.{end}"]["lily_B.weight"])
    np.testing.assert_array_equal(
        sites["h.10.v"]["lily_B.weight"], moved["a"]["h.0.v"]["lily_B.weight"]
    )
    model["a"].save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.num_parameters == model["a"].num_parameters
    assert again.sites.keys() == sites.keys()


def test_lily_shares_nothing_between_layers_named_one_by_one() -> None:
    model = stacked(LilyConfig(r=2, stride_A=4, target_modules="all-linear"))
    assert all(len(p) == 3 for p in model.parameters["a"].values())
    model = stacked(LilyConfig(r=2, target_modules=r"h\.\d+\.[qv]"))
    assert sum("lily_B.weight" in p for p in model.parameters["a"].values()) == 1


def test_lily_trains_one_factor_in_torch_modules() -> None:
    torch = pytest.importorskip("torch")
    from peft_any.integrations.torch import attach

    root = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    attach(root, LilyConfig(r=2, stride_A=2, target_modules=r"\d", init_weights=False))
    trained = [p for p in root.parameters() if p.requires_grad]
    inside = {n.rpartition("lily_")[2]: p for n, p in root.named_parameters() if "lily_" in n}
    assert set(inside) == {"A.weight", "B.weight", "router.weight"}
    factors = [n for n, _ in root.named_parameters() if "lily_" in n]
    assert len([n for n in factors if n.endswith("lily_B.weight")]) == 1
    assert len([n for n in factors if n.endswith("lily_A.weight")]) == 2
    assert len([n for n in factors if n.endswith("lily_router.weight")]) == 3
    root(torch.ones(1, 4)).sum().backward()
    assert all(p.grad is not None for p in trained if p.shape != (4, 4) and p.ndim == 2)


def test_a_checkpoint_is_not_merged(tmp_path) -> None:
    model = stacked(LilyConfig(r=2, target_modules=["q"]))
    model["a"].save(tmp_path / "a")
    write_safetensors(tmp_path / "base.safetensors", model.weights)
    with pytest.raises(ConfigError, match=r"a: LILY cannot be merged: .+ whole batch: apply it"):
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def poly(**fields: Any) -> tuple[PeftModel, np.ndarray]:
    """Make a model with a Poly adapter of random factors."""
    rng = np.random.default_rng(0)
    model = PeftModel({"fc.weight": rng.standard_normal((6, 4)).astype("float64")})
    config = PolyConfig(r=2, target_modules=["fc"], init_weights=False, **fields)
    made = model.add("a", config, dtype="float64")
    p = made.sites["fc"]
    z = 3 * rng.standard_normal(p["poly_router.module_logits"].shape)
    model.update({"a": {"fc": {**p, "poly_router.module_logits": z}}})
    return model, rng.standard_normal((3, 5, 4))


def test_one_task_of_poly_can_be_merged(tmp_path) -> None:
    model, x = poly(n_tasks=3, n_splits=2)
    tasks = [2, 0, 2]
    y = model.routed(task_ids=tasks).bind().layers["fc"](x)
    for row, task in enumerate(tasks):
        alone = model.routed(task_ids=task)
        np.testing.assert_allclose(alone.bind().layers["fc"](x)[row], y[row], rtol=1e-12)
        merged = alone.merge()
        np.testing.assert_allclose(x[row] @ merged["fc.weight"].T, y[row], rtol=1e-11)
        back = alone.unmerge(merged)["fc.weight"]
        np.testing.assert_allclose(back, model.weights["fc.weight"], rtol=1e-12)
        adapter = model["a"]
        config, sites = adapter.config.of_task(adapter.sites, task)
        adapter.replace(config=config, sites=sites).save(tmp_path / f"{row}")
        write_safetensors(tmp_path / "base.safetensors", model.weights, overwrite=True)
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / f"{row}", tmp_path / f"m{row}")
        again = PeftModel(model.weights)
        again.add("a", Adapter.load(tmp_path / f"{row}"))
        np.testing.assert_allclose(again.merge()["fc.weight"], merged["fc.weight"], rtol=1e-12)


def test_poly_refuses_what_it_cannot_route() -> None:
    model, x = poly(n_tasks=3)
    for refused in (model.merge, lambda: model.bind().layers["fc"](x)):
        with pytest.raises(ConfigError, match=r"n_tasks=3 .*routed\(task_ids=…\).* of_task"):
            refused()
    with pytest.raises(ConfigError, match="2 tasks have no ΔW in common"):
        model.routed(task_ids=[0, 1]).merge()
    with pytest.raises(ShapeError, match="2 tasks for input"):
        model.routed(task_ids=[0, 1]).bind().layers["fc"](x)
    for ids in (3, [-1], []):
        with pytest.raises(ConfigError, match="n_tasks=3"):
            model.routed(task_ids=ids).bind().layers["fc"](x)
    with pytest.raises(ConfigError, match="nearest: 'task_ids'"):
        model.routed(task_id=0)
    with pytest.raises(ConfigError, match="task 3 is not there"):
        model["a"].config.of_task(model["a"].sites, 3)
    with pytest.raises(ShapeError, match="n_splits=3"):
        poly(n_splits=3)
    with pytest.raises(ConfigError, match="poly_type"):
        PolyConfig(poly_type="other")


def test_poly_draws_its_shares_in_training() -> None:
    model, x = poly(n_tasks=2)
    for ids in (1, [1, 0, 1]):
        routed = model.routed(task_ids=ids)
        y, first, same, other = (routed.bind(rng=seed).layers["fc"](x) for seed in (None, 1, 1, 2))
        np.testing.assert_array_equal(first, same)
        assert not np.allclose(first, other)
        assert not np.allclose(first, y)


def test_tasks_reach_rows_modules_and_compiled_calls() -> None:
    model, x = poly(n_tasks=3)
    routed = model.routed(task_ids=1)
    y = routed.bind().layers["fc"](x)
    mixed = routed.bind(rows=["a", None, "a"]).layers["fc"](x)
    np.testing.assert_allclose(mixed[::2], y[::2], rtol=1e-12)
    np.testing.assert_allclose(mixed[1], x[1] @ model.weights["fc.weight"].T, rtol=1e-12)
    weights = routed.bind().weights
    np.testing.assert_allclose(x @ weights["fc.weight"].T, y, rtol=1e-12)
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    there = PeftModel({"fc.weight": jax.numpy.asarray(model.weights["fc.weight"])})
    there.add("a", model["a"])

    def call(x: Any, ids: Any) -> Any:
        return there.routed(task_ids=ids).bind().layers["fc"](x)

    tasks = [2, 0, 1]
    want = model.routed(task_ids=tasks).bind().layers["fc"](x)
    got = jax.jit(call)(jax.numpy.asarray(x), jax.numpy.asarray(tasks))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_poly_adapter_of_one_task_acts_in_torch_modules() -> None:
    torch = pytest.importorskip("torch")
    from peft_any.integrations.torch import attach

    model, x = poly()
    layer = torch.nn.Linear(4, 6, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(model.weights["fc.weight"])
    root = torch.nn.ModuleDict({"fc": layer}).eval()  # in training Poly draws
    attach(root, model["a"])
    y = root["fc"](torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(y, model.bind().layers["fc"](x), rtol=1e-12)


INVOKED = [[9, 5, 2, 5, 2, 7], [5, 2, 9, 9, 9, 5], [2, 5, 9, 9, 9, 9]]
OFFSETS = [3, 6, 0]


def test_invocations_are_found_on_every_library(lib: Lib) -> None:
    def find(ids: Any) -> Any:
        return calculate_alora_offsets([5, 2], ids)

    lib.check(lib.call(find, np.asarray(INVOKED)), np.asarray(OFFSETS), rtol=0)


@given(
    ids=st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=3),
    tokens=st.lists(st.integers(0, 2), max_size=7),
)
def test_an_invocation_is_the_last_occurrence(ids: list[list[int]], tokens: list[int]) -> None:
    def offset(row: list[int]) -> int:
        n = len(tokens)
        found = [i for i in range(len(row) - n + 1) if n and row[i : i + n] == tokens]
        return len(row) - found[-1] if found else 0

    got = calculate_alora_offsets(tokens, np.asarray(ids))
    assert [*got] == [offset(row) for row in ids]


def activated(**fields: Any) -> tuple[PeftModel, np.ndarray]:
    """Make a model with an adapter that acts from its invocation on."""
    rng = np.random.default_rng(0)
    model = PeftModel({"fc.weight": rng.standard_normal((6, 4))})
    given = {"r": 2, "init_lora_weights": False, "target_modules": ["fc"], **fields}
    model.add("a", LoraConfig(alora_invocation_tokens=[5, 2], **given), dtype="float64")
    return model, rng.standard_normal((3, 6, 4))


def test_positions_before_the_invocation_are_the_bases() -> None:
    model, x = activated(lora_dropout=0.5)
    base = x @ model.weights["fc.weight"].T
    p = model["a"].sites["fc"]
    change = 4 * x @ p["lora_A.weight"].T @ p["lora_B.weight"].T
    acts = np.arange(6) >= 6 - np.asarray(OFFSETS)[:, None]
    want = base + change * acts[:, :, None]
    for offsets in (OFFSETS, [3, 6, None], np.asarray(OFFSETS)):
        bound = model.routed(alora_offsets=offsets).bind()
        got = bound.layers["fc"](x)
        np.testing.assert_allclose(got, want, rtol=1e-12)
        np.testing.assert_array_equal(got[~acts], base[~acts])
        np.testing.assert_allclose(x @ bound.weights["fc.weight"].T, want, rtol=1e-12)
    dropped = model.routed(alora_offsets=OFFSETS).bind(rng=1).layers["fc"](x)
    np.testing.assert_array_equal(dropped[~acts], base[~acts])
    assert not np.allclose(dropped[acts], want[acts])
    flat = model.routed(alora_offsets=[1, 0, 2]).bind().layers["fc"](x[:, 0, :])
    np.testing.assert_allclose(flat, (base + change * [[[1]], [[0]], [[1]]])[:, 0], rtol=1e-12)


def test_rows_of_a_batch_keep_their_own_invocations() -> None:
    model, x = activated()
    config = LoraConfig(r=3, init_lora_weights=False, target_modules=["fc"])
    model.add("plain", config, seed=1, dtype="float64")
    routed = model.routed(alora_offsets=OFFSETS)
    alone = routed.bind().layers["fc"](x)
    model.activate("plain")
    plain = model.bind().layers["fc"](x)
    want = np.stack([plain[0], alone[1], alone[2]])
    got = routed.bind(rows=["plain", "a", "a"]).layers["fc"](x)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    arrays = model.routed(alora_offsets=np.asarray(OFFSETS))
    for rows in (["plain", "a", "a"], np.asarray([1, 0, 0])):
        got = arrays.bind(rows=rows).layers["fc"](x)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_activated_lora_refuses_what_it_cannot_do(tmp_path) -> None:
    model, x = activated()
    with pytest.raises(ConfigError, match=r"fc: .*routed\(alora_offsets=calculate_alora_offsets"):
        model.bind().layers["fc"](x)
    for offsets in ([1, 2], [[1], [2]]):
        with pytest.raises(ShapeError, match=r"fc: 2 alora_offsets for .*\(3, 6, 6\).* each"):
            model.routed(alora_offsets=offsets).bind().layers["fc"](x)
    with pytest.raises(ConfigError, match="no adapter takes it"):
        poly()[0].routed(alora_offsets=3)
    with pytest.raises(ConfigError, match=r"wte: .* cannot adapt a Embedding layer"):
        LoraConfig(alora_invocation_tokens=[1]).at(Site("wte", 5, 4, "Embedding"))
    with pytest.raises(ShapeError, match=r"float64 of shape \(2, 3\) cannot be searched"):
        calculate_alora_offsets([1], np.zeros((2, 3)))
    model["a"].save(tmp_path / "a")
    assert inspect_adapter(tmp_path / "a").sites[0].rank == 2
    write_safetensors(tmp_path / "base.safetensors", model.weights)
    refusal = "a: LORA cannot be merged: alora_invocation_tokens .*routed"
    with pytest.raises(ConfigError, match=refusal):
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out")
    for made in (convert, resize):
        with pytest.raises(ConfigError, match=refusal):
            made(tmp_path / "a", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["alora", "poly"])
def test_torch_modules_are_routed_within_a_block(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from peft_any.integrations.torch import attach, merge_into

    model, x = activated() if kind == "alora" else poly(n_tasks=3)
    name, values = ("alora_offsets", OFFSETS) if kind == "alora" else ("task_ids", [2, 0, 1])
    layer = torch.nn.Linear(4, 6, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(model.weights["fc.weight"])
    root = torch.nn.ModuleDict({"fc": layer}).eval()  # in training Poly draws
    task = attach(root, model["a"])
    want = model.routed(**{name: values}).bind().layers["fc"](x)
    for routing in (values, torch.tensor(values)):
        with task.routed(**{name: routing}):
            y = root["fc"](torch.tensor(x))
        np.testing.assert_allclose(y.detach().numpy(), want, rtol=1e-12)
    with pytest.raises(ConfigError, match=name), task.routed(**{name: values}), task.routed():
        root["fc"](torch.tensor(x))
    with pytest.raises(ConfigError, match=name):
        root["fc"](torch.tensor(x))
    with (
        pytest.raises(ConfigError, match=f"nearest: '{name}'"),
        task.routed(**{f"{name}s": values}),
    ):
        pass
    with pytest.raises(ConfigError, match=name):
        merge_into(root)

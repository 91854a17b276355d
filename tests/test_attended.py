"""The method that acts within attention: its laws, gradients and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import (
    Adapter,
    AdapterStore,
    ConfigError,
    PeftModel,
    ShapeError,
    TargetError,
    merge_checkpoint,
    stack,
)
from peft_any.backend import namespace, resolve
from peft_any.io.safetensors import write_safetensors
from peft_any.layer import linear
from peft_any.methods.adaption_prompt import AdaptionPromptConfig
from peft_any.methods.lora import LoraConfig
from peft_any.rng import Fresh
from peft_any.testing import Lib
from peft_any.testing.gradients import ENGINES, difference, finite_differences, gradients, like

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)


def drawn() -> tuple[dict[str, Any], list[np.ndarray]]:
    """Draw prompts of a block with 4 heads in 2 groups, its queries and projections."""
    rng = np.random.default_rng(0)
    p = {k: rng.standard_normal(s) for k, s in CONFIG.shapes(8).items()}
    return p, [rng.standard_normal(s) for s in ((2, 4, 5, 2), (4, 8), (4, 8))]


def term(p: Any, q: Any, k: Any, v: Any) -> Any:
    return CONFIG.attend(p, q, lambda x: linear(x, k), lambda x: linear(x, v))


def loss(p: Any, *rest: Any) -> Any:
    y = term(p, *rest)
    n = np.arange(np.prod(y.shape, dtype=int))
    return namespace(y).sum(y * y * like(np.cos(1.0 + n).reshape(y.shape), y))


def test_a_fresh_prompt_adds_nothing_and_is_the_same_everywhere(lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    want = CONFIG.init(Fresh(3, resolve("numpy"), dtype="float64"), 8)
    _, rest = drawn()
    assert not term(want, *rest).any()
    assert {k: v.shape for k, v in want.items()} == CONFIG.shapes(8)
    for name, value in CONFIG.init(Fresh(3, lib.backend, dtype="float64"), 8).items():
        lib.check(value, want[name], rtol=0.0)


def test_every_library_gives_numpys_numbers(lib: Lib) -> None:
    p, rest = drawn()
    lib.check(lib.call(term, p, *rest), term(p, *rest), rtol=1e-14)


def test_gradients_are_finite_differences() -> None:
    p, rest = drawn()
    _, got = gradients("numpy", loss, p, *rest)
    assert difference(got, finite_differences(loss, p, *rest)) < 1e-8


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(engine: str) -> None:
    p, rest = drawn()
    _, want = gradients("numpy", loss, p, *rest)
    _, got = gradients(engine, loss, p, *rest)
    assert difference(got, want) < 1e-12


def test_the_last_blocks_are_chosen() -> None:
    names = [f"h.{i}.{part}" for i in range(11) for part in ("attn", "mlp")]
    assert CONFIG.modules(names) == ["h.9.attn", "h.10.attn"]
    with pytest.raises(ConfigError, match=r"adapter_layers=2 .* of 0 attention"):
        CONFIG.modules(["h.0.mlp"])


def test_what_it_is_not_is_refused(tmp_path) -> None:
    p, (q, k, v) = drawn()
    weights = {"h.0.attn.k.weight": k.astype("float32")}
    adapter = Adapter(CONFIG, {"h.0.attn": p})
    with pytest.raises(ConfigError, match="adapter_layers=2 cannot be chosen of 1 attention"):
        PeftModel(weights).add("a", CONFIG)
    adapter.save(tmp_path / "a")
    write_safetensors(tmp_path / "base.safetensors", weights)
    with pytest.raises(ConfigError, match=r"a: ADAPTION_PROMPT cannot be merged.*\.attend in"):
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out")
    with pytest.raises(ShapeError, match="cannot serve 4 heads of 2 channels"):
        term(p, q, k[:3], v[:3])
    with pytest.raises(ConfigError, match="adapter_len=0"):
        AdaptionPromptConfig(adapter_len=0)
    with pytest.raises(ConfigError, match="adapter_len=None"):
        AdaptionPromptConfig().shapes(8)


def blocks(count: int, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Weights of attention with 4 heads in 2 groups, in the order of a safetensors file."""
    rng = np.random.default_rng(1)
    sizes = {"q": 8, "k": 4, "v": 4, "o": 8}
    made = {
        f"layers.{i}.self_attn.{side}_proj.weight": rng.standard_normal((n, 8)).astype(dtype)
        for i in range(count)
        for side, n in sizes.items()
    }
    return dict(sorted(made.items()))


def test_the_last_blocks_of_a_base_are_the_last_by_number_and_start_with_nothing() -> None:
    model = PeftModel(blocks(11))
    assert [*model.add("a", CONFIG).sites] == ["layers.9.self_attn", "layers.10.self_attn"]
    _, (q, *_) = drawn()
    for module in ("layers.8.self_attn", "layers.10.self_attn"):
        y = model.bind().attend(module, q)
        assert y.shape == (2, 5, 8)
        assert not y.any()
    assert model.parameters.trainable == 2 * (3 * 8 + 1)


def test_a_bound_model_attends_with_all_active_adapters_by_their_weights() -> None:
    weights, (p, (q, *_)), at = blocks(2), drawn(), "layers.1.self_attn"
    model = PeftModel(weights)
    for name in "ab":
        model.add(name, CONFIG, seed=ord(name))
    given = {name: {at: p} for name in "ab"}
    k, v, o = (weights[f"{at}.{side}_proj.weight"] for side in "kvo")
    one = linear(term(p, q, k, v), o)
    np.testing.assert_allclose(model.bind(given).attend(at, q), one, rtol=1e-12)
    model.activate({"a": 0.5, "b": 2.0})
    np.testing.assert_allclose(model.bind(given).attend(at, q), 2.5 * one, rtol=1e-12)
    half = model.bind(given).attend(at, q.astype("float16"))
    assert half.dtype == np.float16
    with model.disabled():
        assert not model.bind(given).attend(at, q).any()


def test_projections_of_the_prompt_are_adapted_with_the_layers() -> None:
    weights, (p, (q, *_)), at = blocks(2), drawn(), "layers.1.self_attn"
    model = PeftModel(weights)
    model.add("a", CONFIG)
    model.add("b", LoraConfig(r=2, target_modules=["v_proj"]))
    model.activate(["a", "b"])
    lora = {k: np.ones_like(a) for k, a in model["b"].sites[f"{at}.v_proj"].items()}
    given = {"a": {at: p}, "b": {f"{at}.v_proj": lora}}
    k, v, o = (weights[f"{at}.{side}_proj.weight"] for side in "kvo")
    delta = 4 * lora["lora_B.weight"] @ lora["lora_A.weight"]  # α/r = 8/2
    want = linear(term(p, q, k, v + delta), o)
    np.testing.assert_allclose(model.bind(given).attend(at, q), want, rtol=1e-12)


def test_gpt2_gives_keys_and_values_from_one_layer_and_projects_no_sum() -> None:
    rng, at = np.random.default_rng(2), "h.0.attn"
    c_attn = rng.standard_normal((8, 24))
    weights = {f"{at}.c_attn.weight": c_attn, f"{at}.c_proj.weight": np.eye(8)}
    model = PeftModel(weights, kinds={"c_attn": "Conv1D"})
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    model.add("a", config)
    p, q = drawn()[0], rng.standard_normal((2, 4, 5, 2))
    _, k, v = np.split(c_attn.T, 3)
    got = model.bind({"a": {at: p}})
    np.testing.assert_allclose(got.attend(at, q), term(p, q, k, v), rtol=1e-12)
    with model.disabled():
        assert model.bind().attend(at, q).shape == got.attend(at, q).shape


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bound_model_has_gradients(engine: str) -> None:
    p, (q, k, v) = drawn()
    at = "layers.0.self_attn"

    def bound(p: Any, q: Any, k: Any, v: Any) -> Any:
        weights = {f"{at}.{side}_proj.weight": a for side, a in zip("kv", (k, v), strict=True)}
        model = PeftModel(weights)
        model.add("a", AdaptionPromptConfig(adapter_len=3, adapter_layers=1), dtype="float64")
        y = model.bind({"a": {at: p}}).attend(at, q)
        n = np.arange(np.prod(y.shape, dtype=int))
        return namespace(y).sum(y * y * like(np.cos(1.0 + n).reshape(y.shape), y))

    _, want = gradients("numpy", loss, p, q, k, v)
    _, got = gradients(engine, bound, p, q, k, v)
    assert difference(got, want) < 1e-12


def test_a_model_refuses_what_attention_alone_can_do() -> None:
    model, (p, (q, *_)) = PeftModel(blocks(2)), drawn()
    model.add("a", CONFIG)
    with pytest.raises(ConfigError, match=r"adapter 'a': merge\(\): ADAPTION_PROMPT cannot be"):
        model.merge()
    with pytest.raises(TargetError, match="mlp: has no projections of keys and values"):
        model.bind().attend("mlp", q)
    at = "layers.1.self_attn"
    with pytest.raises(TargetError, match=r"modules \['layers\.1\.self_attn'\] are not those"):
        model.add("b", Adapter(CONFIG, {at: p}))
    short = {f"layers.{i}.self_attn": {**p, "adaption_gate": np.zeros(2)} for i in range(2)}
    with pytest.raises(ShapeError, match=r"layers\.0\.self_attn: parameters .* do not fit"):
        model.add("b", Adapter(CONFIG, short))
    bare = {"h.0.attn.out.weight": np.eye(8)}
    with pytest.raises(TargetError, match="has neither k_proj nor c_attn"):
        PeftModel(bare).add("a", AdaptionPromptConfig(adapter_len=3, adapter_layers=1))


def test_a_batch_that_would_mix_them_is_refused_before_it_is_called(tmp_path: Path) -> None:
    model, lora = PeftModel(blocks(2)), LoraConfig(r=2, target_modules=["q_proj"])
    model.add("a", CONFIG)
    model.add("b", lora)
    within = r"adapter 'a': {}: ADAPTION_PROMPT cannot be"
    for rows in (["a", None], [1, 0], np.asarray([1, 1])):
        with pytest.raises(ConfigError, match=within.format(r"bind\(rows=…\)")):
            model.bind(rows=rows)
    bound = model.bind(rows=["b", None])
    assert bound.layers["layers.1.self_attn.q_proj"](np.ones((2, 8))).shape == (2, 8)
    two = {name: model[name] for name in "ab"}
    with pytest.raises(ConfigError, match=within.format(r"stack\(\)")):
        stack(two, blocks(2))
    bank = stack({"a": two["b"]}, blocks(2))
    with pytest.raises(ConfigError, match=within.format(r"swap\(\)")):
        bank.swap("a", two["a"])
    for name, adapter in two.items():
        adapter.save(tmp_path / name)
    stored = stack(AdapterStore(tmp_path, 10**6), blocks(2))
    with pytest.raises(ConfigError, match=within.format(r"bind\(rows=…\)")):
        stored.bind(["b", "a"])
    stored.bind(["b", None])


def test_attach_refuses_what_no_module_of_torch_can_do() -> None:
    torch = pytest.importorskip("torch")
    from peft_any.integrations.torch import attach

    block = torch.nn.Module()
    block.self_attn = torch.nn.Module()
    for side in "qkvo":
        setattr(block.self_attn, f"{side}_proj", torch.nn.Linear(8, 8))
    net = torch.nn.ModuleDict({"layers": block})
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    with pytest.raises(ConfigError, match=r"adapter 'default': attach\(\): ADAPTION_PROMPT"):
        attach(net, config)

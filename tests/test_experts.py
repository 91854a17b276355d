"""Routers over LoRA experts: laws on every library, refusals, and the way they choose."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_any import (
    Adapter,
    ConfigError,
    PeftModel,
    ShapeError,
    Site,
    StorageError,
    move,
    read_safetensors,
    value_and_grad,
    write_safetensors,
)
from peft_any.arrow import ArrowRouter
from peft_any.errors import FormatError
from peft_any.experts import ArrowConfig, arrow_of, load_arrow
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.methods.xlora import XLoraConfig
from peft_any.testing import Lib, check_method
from peft_any.xlora import experts_in, experts_of, load_xlora, xlora_of, xlora_scalings


def experts(count: int, n_in: int = 6, n_out: int = 5, **fields: Any) -> list[Adapter]:
    """Draw LoRAs of rank 2 on one layer."""
    rng = np.random.default_rng(count)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], **fields)
    return [
        Adapter(
            config,
            {
                "fc": {
                    "lora_A.weight": rng.standard_normal((2, n_in)),
                    "lora_B.weight": rng.standard_normal((n_out, 2)),
                }
            },
        )
        for _ in range(count)
    ]


def delta(expert: Adapter, less: tuple[Any, Any] = (0, 0)) -> np.ndarray:
    p = expert.sites["fc"]
    return 1.5 * (p["lora_B.weight"] - less[1]) @ (p["lora_A.weight"] - less[0])


def chosen(x: np.ndarray, deltas: list[np.ndarray], top_k: int, temperature: float) -> np.ndarray:
    """Route tokens as the paper says, with dense matrices."""
    prototypes = np.stack([np.linalg.svd(d)[2][0] for d in deltas])
    scores = np.abs(x @ prototypes.T) / temperature
    least = np.sort(scores, axis=-1)[..., -top_k, None]
    e = np.where(scores >= least, np.exp(scores), 0)
    shares = e / e.sum(axis=-1, keepdims=True)
    return sum(shares[..., i, None] * (x @ d.T) for i, d in enumerate(deltas))


@pytest.mark.parametrize(("top_k", "temperature", "general"), [(1, 1.0, 2), (3, 0.3, 0)])
def test_arrow_chooses_as_its_paper_says(
    lib: Lib, top_k: int, temperature: float, general: int
) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    if reason := lib.lacks(("linalg",)):
        pytest.skip(reason)
    tasks, others = experts(4), experts(general)
    means = [
        sum(one.sites["fc"][f"lora_{n}.weight"] for one in others) / max(general, 1) for n in "AB"
    ]
    deltas = [delta(one, (means[0], means[1])) for one in tasks]
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((5, 6)), rng.standard_normal((2, 3, 6))
    model = PeftModel({"fc.weight": lib.array(weight)})
    given = [Adapter(one.config, lib.array(one.sites)) for one in tasks]
    generals = [Adapter(one.config, lib.array(one.sites)) for one in others]
    arrow = arrow_of(given, general=generals, top_k=top_k, router_temperature=temperature)
    model.add("arrow", arrow)

    def apply(x: Any) -> Any:
        return model.bind().layers["fc"](x)

    got = lib.call(apply, x)
    want = x @ weight.T + chosen(x, deltas, top_k, temperature)
    lib.check(got, want, rtol=1e-10)


def test_every_law_holds() -> None:
    config = ArrowConfig(r=2, n_experts=3, top_k=2)
    found = check_method(
        config, [Site("fc", 6, 5)], reverts=0, seeds=[0], backends=["numpy", "torch"]
    )
    assert "fc: gradients" in " ".join(found.passed)


def test_arrow_cannot_be_merged() -> None:
    model = PeftModel({"fc.weight": np.ones((5, 6))})
    model.add("arrow", arrow_of(experts(3)))
    with pytest.raises(ConfigError, match=r"fc: ARROW cannot be merged: every token .*bind"):
        model.merge()


def test_a_router_is_saved_as_one(tmp_path) -> None:
    arrow = arrow_of(experts(3), top_k=1, router_temperature=0.5)
    arrow.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.config.top_k == 1
    x, one, other = np.ones((4, 6)), *(PeftModel({"fc.weight": np.ones((5, 6))}) for _ in "ab")
    one.add("a", arrow)
    other.add("a", again)
    np.testing.assert_array_equal(one.bind().layers["fc"](x), other.bind().layers["fc"](x))


def test_what_cannot_be_an_expert_is_named() -> None:
    tasks = experts(2)
    ia3 = Adapter(IA3Config(), {"fc": {"ia3_l": np.ones((5, 1))}})
    p = tasks[0].sites["fc"]
    dora = replace(tasks[0].config, use_dora=True)
    shaped = {**p, "lora_B.weight": p["lora_B.weight"][:4]}
    both = {"fc": p, "up": {k: np.ones((3, 3)) for k in p}}
    table = {"lora_embedding_A": p["lora_A.weight"], "lora_embedding_B": p["lora_B.weight"]}
    rows: list[tuple[type[Exception], str, list[Adapter], dict[str, Any]]] = [
        (ConfigError, "none to choose", [], {}),
        (ConfigError, r"experts\[1\]: IA3 cannot be", [tasks[0], ia3], {}),
        (ConfigError, r"general\[0\]: IA3 cannot be", tasks, {"general": [ia3]}),
        (ConfigError, r"experts\[0\]: .* use_dora", [tasks[0].replace(config=dora)], {}),
        (
            ConfigError,
            "full copies",
            [tasks[0].replace(extra={"h.weight": p["lora_A.weight"]})],
            {},
        ),
        (ConfigError, "up among 1", [tasks[0], tasks[0].replace(sites=both)], {}),
        (ShapeError, "fc: .* cannot stand", [tasks[0], tasks[0].replace(sites={"fc": shaped})], {}),
        (ConfigError, "is no linear layer", [tasks[0].replace(sites={"fc": table})], {}),
        (ShapeError, "ranks differ", [tasks[0].replace(sites=both)], {"top_k": 1}),
        (ConfigError, "top_k=3 must be at most n_experts=2", tasks, {}),
        (ConfigError, "router_temperature=0", tasks, {"top_k": 1, "router_temperature": 0}),
    ]
    for error, words, given, options in rows:
        with pytest.raises(error, match=words):
            arrow_of(given, **options)
    assert move(arrow_of(tasks, top_k=2).sites, "numpy").keys() == {"fc"}


def test_calls_scale_experts_on_every_library(lib: Lib) -> None:
    tasks = experts(2)
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((5, 6)), rng.standard_normal((2, 3, 6))
    p = {"layers.0.weight": rng.standard_normal((2, 6)), "layers.0.bias": np.zeros(2)}

    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    model = PeftModel({"fc.weight": lib.array(weight)})
    model.add("mixed", experts_of([Adapter(t.config, lib.array(t.sites)) for t in tasks]))

    def apply(x: Any, p: Any) -> Any:
        return model.routed(scalings=xlora_scalings(p, x, 1)).bind().layers["fc"](x)

    shares = np.exp(x @ p["layers.0.weight"].T)
    shares /= shares.sum(axis=-1, keepdims=True)
    changes = [shares[..., i, None] * (x @ delta(task).T) for i, task in enumerate(tasks)]
    lib.check(lib.call(apply, x, p), x @ weight.T + sum(changes), rtol=1e-10)


def test_the_gate_is_trained() -> None:
    tasks, rng = experts(2), np.random.default_rng(1)
    model = PeftModel({"fc.weight": rng.standard_normal((5, 6))})
    model.add("mixed", experts_of(tasks))
    x = rng.standard_normal((2, 3, 6))
    p = {"layers.0.weight": rng.standard_normal((2, 6)), "layers.0.bias": np.zeros(2)}

    def loss(p: Any) -> Any:
        y = model.routed(scalings=xlora_scalings(p, x, 1)).bind().layers["fc"](x)
        return (y * y).__array_namespace__().sum(y * y)

    value, grads = value_and_grad(loss)(p)
    for key, grad in grads.items():
        step = 1e-6 * rng.standard_normal(grad.shape)
        moved = (loss({**p, key: p[key] + step}) - loss({**p, key: p[key] - step})) / 2
        np.testing.assert_allclose(np.sum(grad * step), moved, rtol=1e-5, atol=1e-9)
    assert value > 0


def test_a_gate_and_its_experts_are_trained_and_saved(tmp_path) -> None:
    tasks, rng = experts(2), np.random.default_rng(2)
    paths = {str(i): str(tmp_path / str(i)) for i in range(2)}
    gate = XLoraConfig(hidden_size=4, adapters=paths, xlora_depth=2, xlora_size=3,
                       use_trainable_adapters=True)  # fmt: skip
    model = PeftModel({"fc.weight": rng.standard_normal((5, 6))})
    model.add("x", xlora_of(gate, tasks, seed=3))
    x, hidden = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 3, 4))

    def loss(p: Any) -> Any:
        y = model.routed(hidden=hidden).bind(p).layers["fc"](x)
        return y.__array_namespace__().sum(y * y)

    params = {"x": model["x"].trainable()}
    before, grads = value_and_grad(loss)(params)
    assert {*grads["x"]} == {"", "fc"}
    moved = {s: {k: v - 1e-3 * grads["x"][s][k] for k, v in p.items()}
             for s, p in params["x"].items()}  # fmt: skip
    assert loss({"x": moved}) < before
    model.update({"x": moved})
    model["x"].save(tmp_path / "x")
    for one, path in zip(experts_in(model["x"]), paths.values(), strict=True):
        one.save(path)
    again = PeftModel(model.weights)
    again.add("x", load_xlora(tmp_path / "x"))
    got, want = (m.routed(hidden=hidden).bind().layers["fc"](x) for m in (again, model))
    np.testing.assert_array_equal(got, want)
    once = model["x"].config.scalings(model["x"].shared, hidden)
    np.testing.assert_allclose(model.routed(scalings=once).bind().layers["fc"](x), want, rtol=1e-12)
    shutil.rmtree(paths["1"])
    with pytest.raises(StorageError, match=r"1 of its experts are not here, '.*1' among them"):
        load_xlora(tmp_path / "x")
    with pytest.raises(ConfigError, match="XLoraConfig: holds no experts"):
        experts_in(Adapter.load(tmp_path / "x"))


def test_a_gate_refuses_what_does_not_fit_together() -> None:
    tasks, wide = experts(2), experts(1, n_in=7)
    gate = XLoraConfig(adapters={"0": "", "1": ""})
    rows: list[tuple[type[Exception], str, Any]] = [
        (ShapeError, r"fc: experts of \[\(6, 5\), \(7, 5\)\] inputs", [tasks[0], *wide]),
        (ConfigError, "names 2 experts, and 3 are given", [*tasks, *wide]),
        (ConfigError, r"experts\[1\]: IA3 cannot be", [tasks[0], Adapter(IA3Config(), {})]),
    ]
    for error, words, given in rows:
        with pytest.raises(error, match=words):
            xlora_of(gate, given)
    for fields, words in (
        ({"top_k_lora": 3}, "top_k_lora=3 must be at most the 2 adapters"),
        ({"softmax_temperature": 0}, "softmax_temperature=0 must be above 0"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"xlora_depth": 0}, "xlora_depth=0 must be from 1 to 1000"),
    ):
        with pytest.raises(ConfigError, match=words):
            XLoraConfig(adapters={"0": "", "1": ""}, **fields)
    numbered = XLoraConfig(adapters={str(i): f"e{i}" for i in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)})
    assert numbered.experts == [f"e{i}" for i in range(11)]
    assert XLoraConfig(adapters={"b": "y", "a": "x"}).experts == ["y", "x"]


def test_experts_refuse_other_scalings() -> None:
    model, x = PeftModel({"fc.weight": np.ones((5, 6))}), np.ones((2, 3, 6))
    model.add("mixed", experts_of(experts(2)))
    with pytest.raises(ConfigError, match=r"fc: .*routed\(scalings=…\)"):
        model.bind().layers["fc"](x)
    with pytest.raises(ShapeError, match=r"fc: scalings of shape \(2, 3, 3\) .*positions, 2\)"):
        model.routed(scalings=np.ones((2, 3, 3))).bind().layers["fc"](x)
    gate = {"layers.0.weight": np.eye(2), "layers.0.bias": np.zeros(2)}
    flat = xlora_scalings(gate, x[..., :2], 1, enable_softmax_topk=True)
    np.testing.assert_array_equal(flat, np.full((2, 3, 1, 2), 0.5))


GATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    "raw": {"enable_softmax": False},
    "few": {"top_k_lora": 2},
    "few-again": {"top_k_lora": 2, "enable_softmax_topk": True},
    "layers": {"layerwise_scalings": True},
    "layers-few": {"layerwise_scalings": True, "top_k_lora": 1, "enable_softmax": False},
}
LAYERS = ["h.0.fc", "h.1.fc"]


def gate_of(fields: dict[str, Any], depth: int = 2) -> tuple[XLoraConfig, list[Adapter], Any]:
    """Make a gate's configuration, three experts of two layers, and the layers' weights."""
    rng = np.random.default_rng(3)
    weights = {f"{name}.weight": rng.standard_normal((6, 4)) for name in LAYERS}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["fc"], init_lora_weights=False)
    tasks = [PeftModel(weights).add("a", config, seed=i, dtype="float64") for i in range(3)]
    named = {str(i): f"expert-{i}" for i in range(3)}
    given = {"xlora_depth": depth, "xlora_size": 5, **fields}
    return XLoraConfig(hidden_size=4, adapters=named, **given), tasks, weights


def expected_scalings(config: XLoraConfig, p: Any, hidden: np.ndarray) -> np.ndarray:
    """Compute a gate's scalings (rows, positions, layers, experts) as the paper says."""
    y = hidden
    for i, name in enumerate(config.layers):
        y = y @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        y = y if i == len(config.layers) - 1 else np.maximum(y, 0)
    y = y.reshape((*hidden.shape[:2], -1, 3))

    def shares(logits: np.ndarray, acts: Any) -> np.ndarray:
        e = np.where(acts, np.exp(logits), 0.0)
        return e / e.sum(axis=-1, keepdims=True)

    if config.enable_softmax:
        y = shares(y / config.softmax_temperature, np.ones_like(y, dtype=bool))
    if config.top_k_lora is not None:
        kept = y >= np.sort(y, axis=-1)[..., -config.top_k_lora, None]
        y = shares(y, kept) if config.enable_softmax_topk else np.where(kept, y, 0.0)
    return config.global_scaling_weight * np.broadcast_to(y, (*hidden.shape[:2], 2, 3))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_mixes_its_experts_by_token(name: str) -> None:
    config, tasks, weights = gate_of(GATES[name])
    made = xlora_of(config, tasks, order=LAYERS)
    model = PeftModel(weights)
    model.add("x", made)
    rng = np.random.default_rng(4)
    hidden, x = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5, 4))
    shares = expected_scalings(config, made.shared, hidden)
    found = made.config.scalings(made.shared, hidden)
    layered = config.layerwise_scalings
    np.testing.assert_allclose(found, shares if layered else shares[:, :, 0], rtol=1e-12)
    bound = model.routed(hidden=hidden).bind()
    given = model.routed(scalings=found).bind()
    for i, layer in enumerate(LAYERS):
        want = x @ weights[f"{layer}.weight"].T
        for e, expert in enumerate(tasks):
            a, b = (expert.sites[layer][f"lora_{k}.weight"] for k in "AB")
            want = want + shares[:, :, i, e, None] * (3.0 * (x @ a.T) @ b.T)
        np.testing.assert_allclose(bound.layers[layer](x), want, rtol=1e-10)
        np.testing.assert_allclose(given.layers[layer](x), want, rtol=1e-10)
    first = made.config.passing(made.shared, (2, 5))
    assert first.shape == (2, 5, 3)
    assert not np.any(first)


def test_a_gate_says_what_it_lacks() -> None:
    config, tasks, weights = gate_of({"layerwise_scalings": True})
    x = np.ones((1, 2, 4))
    for made, routing, said in (
        (xlora_of(config, tasks, order=LAYERS), {}, "the gate needs the base's last hidden"),
        (xlora_of(config, tasks), {"hidden": x}, "no file says for which"),
    ):
        model = PeftModel(weights)
        model.add("x", made)
        with pytest.raises(ConfigError, match=said):
            model.routed(**routing).bind().layers["h.0.fc"](x)
    with pytest.raises(ConfigError, match=r"order: lacks h\.1\.fc"):
        xlora_of(config, tasks, order=LAYERS[:1])
    with pytest.raises(ConfigError, match="LoraConfig: is no gate"):
        xlora_of(tasks[0], tasks)


def test_a_gate_is_read_with_the_layers_that_its_file_lost(tmp_path) -> None:
    config, tasks, _ = gate_of({})
    paths = {str(i): str(tmp_path / f"expert-{i}") for i in range(3)}
    for path, expert in zip(paths.values(), tasks, strict=True):
        expert.save(path)
    made = xlora_of(replace(config, adapters=paths), tasks)
    made.save(tmp_path / "x")
    # Hugging Face PEFT writes layer 0 into the file of the expert "0", without its number
    file = tmp_path / "x" / "adapter_model.safetensors"
    kept = {k: v.copy() for k, v in read_safetensors(file).items()}
    first = "base_model.internal_xlora_classifier.layers"
    lost = {f"{first}.{k}": kept.pop(f"{first}.0.{k}") for k in ("weight", "bias")}
    write_safetensors(file, kept, overwrite=True)
    with pytest.raises(FormatError, match=r"layers\.0: Hugging Face PEFT left these layers"):
        load_xlora(tmp_path / "x")
    (tmp_path / "x" / "0").mkdir()
    write_safetensors(tmp_path / "x" / "0" / file.name, lost)
    for key, value in load_xlora(tmp_path / "x").shared.items():
        np.testing.assert_array_equal(value, made.shared[key])
    with pytest.raises(ConfigError, match="LORA is no X-LoRA"):
        load_xlora(paths["0"])
    along = {"base_model.lora_model.fc.lora_A.weight": np.ones((1, 4))}
    write_safetensors(tmp_path / "expert-0" / file.name, along, overwrite=True)
    with pytest.raises(FormatError, match="an expert that was saved along with its X-LoRA gate"):
        Adapter.load(paths["0"])


@pytest.mark.parametrize("general", [0, 2])
def test_a_router_is_read_with_its_experts(general: int, tmp_path) -> None:
    names = [*(f"task_{i}" for i in range(3)), *(f"gks_{i}" for i in range(general))]
    for name, one in zip(names, experts(3 + general), strict=True):
        one.save(tmp_path / name)
    router = ArrowRouter(
        top_k=2,
        router_temperature=0.5,
        use_gks=bool(general),
        task_adapter_names=names[:3],
        gks_adapter_names=names[3:],
    )
    (own,) = experts(1)
    own.replace(config=replace(own.config, arrow_config=router)).save(tmp_path / "arrow_router")
    if general:
        with pytest.raises(ConfigError, match=r"use_gks=True: .* give subtracted=True if"):
            load_arrow(tmp_path)
    read = [Adapter.load(tmp_path / name) for name in names]
    for subtracted in (False, True):
        got = load_arrow(tmp_path, subtracted=subtracted)
        less = [] if subtracted else read[3:]
        want = arrow_of(read[:3], general=less, top_k=2, router_temperature=0.5)
        assert got.config == want.config
        for key, value in want.sites["fc"].items():
            np.testing.assert_array_equal(got.sites["fc"][key], value)
    with pytest.raises(ConfigError, match="is no router of experts: arrow_config=None"):
        load_arrow(tmp_path / "task_0")
    model = PeftModel({"fc.weight": np.ones((5, 6))})
    with pytest.raises(ConfigError, match="an Arrow router cannot act alone"):
        model.add("a", Adapter.load(tmp_path / "arrow_router"))

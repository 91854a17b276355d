"""Adapters on pytrees of JAX: what they compute, how they train, and how their arrays lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import peft_any  # noqa: E402
from peft_any.adapter import Adapter  # noqa: E402
from peft_any.errors import ConfigError, TargetError  # noqa: E402
from peft_any.integrations.jax import attach_tree, detach_tree, merge_tree  # noqa: E402
from peft_any.methods.ia3 import IA3Config  # noqa: E402
from peft_any.methods.lora import LoraConfig  # noqa: E402
from peft_any.methods.oft import OFTConfig  # noqa: E402
from peft_any.methods.prompt_tuning import PromptTuningConfig  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.testing.libraries import set_up  # noqa: E402
from tests.cases import CASES, Case  # noqa: E402
from tests.jax_layers import FORMS, input_of  # noqa: E402

set_up("jax")
# in JAX's own session a missing framework is an error
needed = import_module if os.environ.get("PEFT_ANY_REQUIRE") == "jax" else pytest.importorskip
eqx, nnx = needed("equinox"), needed("flax.nnx")


def fits(form: str, case: Case) -> bool:
    kind = case.site.kind
    wanted = {"Linear", "Embedding", "Norm", "Conv1d", "Conv2d", "Conv3d"}
    return kind in wanted if form != "dict" else True


USUAL = {"lora", "dora", "lora-conv2", "lora-embedding", "lora-bias", "ia3"}


def pairs() -> list[tuple[str, Case]]:
    """Give a row of each method and kind of layer one of the forms, in turn; usual ones all."""
    found = []
    unlike = {(case.config.peft_type, case.site.kind): case for case in CASES}
    usual = [case for case in CASES if case.name in USUAL]
    for i, case in enumerate({case.name: case for case in [*unlike.values(), *usual]}.values()):
        forms = [form for form in FORMS if fits(form, case)]
        chosen = forms if case.name in USUAL else [forms[i % len(forms)]]
        found += [(form, case) for form in chosen]
    return found


PAIRS = pairs()


def config_of(case: Case) -> Any:
    if getattr(case.config, "target_parameters", None):
        return case.config
    alone = getattr(case.config, "feedforward_modules", None)  # wants its names among a list's
    name = case.site.name
    return replace(case.config, target_modules=name if alone else [name])


def trained(weights: Any, config: Any, kinds: Any = None, seed: int = 0) -> Any:
    """Give an adapter as training leaves it, and the weights that NumPy merges."""
    rng = np.random.default_rng(seed)
    model = PeftModel(weights, kinds=kinds)
    fresh = model.add("a", config, seed=seed, dtype="float64")
    noisy = {
        s: {k: v + 0.2 * rng.standard_normal(v.shape) for k, v in p.items()}
        for s, p in fresh.trainable().items()
    }
    model.update({"a": noisy})
    return model["a"], model.merge()


def close(got: Any, want: Any, rtol: float = 1e-10) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= rtol * max(np.abs(want).max(initial=0), 1e-30)


@pytest.mark.parametrize(
    ("form", "case"), PAIRS, ids=[f"{form}-{case.name}" for form, case in PAIRS]
)
def test_an_adapted_tree_is_the_merged_tree(form: str, case: Case) -> None:
    base, how = case.base(dtype="float64"), FORMS[form]
    tree, x = how.make(base), input_of(case.site)
    adapter, want = trained(base.tensors(), config_of(case), {case.site.name: case.site})
    task = attach_tree(tree, adapter, kinds={case.site.name: case.site} if form == "dict" else None)

    @jax.jit
    def found(params: Any, x: Any) -> Any:
        merged = merge_tree(task, params)
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        outputs = [how.call(t, case.site, x) for t in (task.bind(params), merged)]
        return dict(task._read.arrays(task._read.nodes_of(merged))), outputs

    merged, (y, z) = found(task.params, x)
    close(y, z)
    for name, array in merged.items():
        close(array, want[name])
    assert detach_tree(task) is tree
    close(how.call(tree, case.site, x), how.call(how.make(base), case.site, x), 0.0)


class Net(eqx.Module):
    """Two layers of Equinox's and a function between them."""

    layers: list[Any]
    act: Any

    def __call__(self, x: Any) -> Any:
        return self.layers[1](self.act(self.layers[0](x)))


def equinox_net(seed: int = 0) -> Net:
    one, two = jax.random.split(jax.random.key(seed))
    of: Any = {"dtype": jnp.float32}
    return Net([eqx.nn.Linear(6, 8, key=one, **of), eqx.nn.Linear(8, 4, key=two, **of)], jnp.tanh)


class Flax(nnx.Module):
    """The same with Flax's, with a norm that keeps statistics."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.layers[1](jnp.tanh(self.norm(self.layers[0](x))))


def dict_net(seed: int = 0) -> Any:
    net = equinox_net(seed)
    return {"layers": [{"kernel": f.weight.T, "bias": f.bias} for f in net.layers]}


def run(net: Any, x: Any) -> Any:
    """Call any of them on a batch."""
    if isinstance(net, Net):
        return jax.vmap(net)(x)
    if isinstance(net, Flax):
        return net(x)
    first, second = net["layers"]
    hidden = jnp.tanh(x @ first["kernel"] + first["bias"])
    return hidden @ second["kernel"] + second["bias"]


NETS = {"equinox": equinox_net, "flax": Flax, "dict": dict_net}
nets = pytest.mark.parametrize("net", [make() for make in NETS.values()], ids=[*NETS])
BOTH = {"target_modules": ["layers.0", "layers.1"]}
RANDOM = LoraConfig(r=2, init_lora_weights=False, **BOTH)
X = jnp.linspace(-1, 1, 18, dtype="float32").reshape(3, 6)
GOAL = 0.5 * jnp.asarray([[-1.0], [0.0], [1.0]], "float32")


class TestTraining:
    """Parameters are a pytree; the tree is not touched."""

    @nets
    def test_a_few_steps_of_optax_and_the_file(self, net: Any, tmp_path: Path) -> None:
        optax = pytest.importorskip("optax")
        task = attach_tree(net, LoraConfig(r=2, **BOTH), seed=3)
        close(run(task.bind(), X), run(net, X), 1e-6)
        before = [np.array(a) for a in jax.tree.leaves(net) if eqx.is_array(a)]
        rule = optax.adamw(0.05)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            value, slopes = jax.value_and_grad(
                lambda p: ((run(task.bind(p), X) - GOAL) ** 2).mean()
            )(params)
            updates, state = rule.update(slopes, state, params)
            return optax.apply_updates(params, updates), state, value

        params, losses = task.params, []
        state = rule.init(params)
        for _ in range(80):
            params, state, value = step(params, state)
            losses.append(float(value))
        assert losses[-1] < 0.5 * losses[0]
        after = [a for a in jax.tree.leaves(net) if eqx.is_array(a)]
        for one, two in zip(before, after, strict=True):
            close(two, one, 0.0)
        learnt = task.updated(params)
        assert learnt.names == ["default"]
        want = run(learnt.bind(), X)
        assert float(jnp.abs(want - run(task.bind(), X)).max()) > 0.1
        learnt.save(tmp_path / "a")
        again = attach_tree(net, Adapter.load(tmp_path / "a"))
        close(run(merge_tree(again), X), want, 1e-5)

    @nets
    @pytest.mark.parametrize("method", [RANDOM, IA3Config(feedforward_modules=[], **BOTH)])
    def test_gradients_are_those_of_the_merged_tree(self, net: Any, method: Any) -> None:
        wide = jax.tree.map(lambda a: a.astype("float64") if eqx.is_inexact_array(a) else a, net)
        task, x = attach_tree(wide, method, dtype="float64"), X.astype("float64")
        losses = [
            lambda p: jnp.sum(run(task.bind(p), x) ** 2),
            lambda p: jnp.sum(run(merge_tree(task, p), x) ** 2),
        ]
        got, want = (jax.jit(jax.grad(f))(task.params) for f in losses)
        assert jax.tree.structure(got) == jax.tree.structure(task.params)
        jax.tree.map(lambda a, b: close(a, b, 1e-8), got, want)

    def test_the_parameters_are_kept_where_the_method_keeps_them(self) -> None:
        config = OFTConfig(oft_block_size=2, coft=True, eps=1e-3, **BOTH)
        task = attach_tree(equinox_net(), config)
        moved = jax.tree.map(lambda a: a + 1.0, task.params)
        settled = task.settled(moved)
        assert float(jnp.abs(settled["default"]["layers.0"]["oft_R.weight"]).max()) < 0.1

    def test_dropout_acts_in_products_and_is_refused_elsewhere(self) -> None:
        config = replace(RANDOM, lora_dropout=0.5)
        for net in (dict_net(), Flax()):
            task = attach_tree(net, config)
            still, again = run(task.bind(), X), run(task.bind(rng=(0, 1)), X)
            close(again, run(task.bind(rng=(0, 1)), X), 0.0)
            assert float(jnp.abs(still - again).max()) > 1e-3
        net = {"conv": nnx.Conv(2, 2, (1,), rngs=nnx.Rngs(0))}
        config = replace(config, target_modules=["conv"])
        with pytest.raises(ConfigError, match="conv: cannot drop inputs"):
            attach_tree(net, config).bind(rng=1)

    def test_what_else_a_layer_of_flax_is_asked_for(self) -> None:
        config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
        for asked in (
            {"precision": "highest"},
            {"preferred_element_type": jnp.float32},
            {"dtype": jnp.bfloat16},
            {"dot_general": lambda *args, **how: 2 * jax.lax.dot_general(*args, **how)},
            {"use_bias": False},
        ):
            net = {"fc": nnx.Linear(6, 4, rngs=nnx.Rngs(0), **asked)}
            task = attach_tree(net, config)
            got, want = task.bind()["fc"](X), merge_tree(task)["fc"](X)
            assert got.dtype == want.dtype
            close(got, want, 2e-2 if "dtype" in asked else 1e-5)
        kernel = attach_tree({"fc": nnx.Linear(6, 4, rngs=nnx.Rngs(0))}, config).bind()["fc"].kernel
        assert (kernel.shape, kernel.ndim, kernel.dtype) == ((6, 4), 2, jnp.float32)
        assert kernel[0].shape == (4,)


class TestTransformations:
    """What JAX does with functions of an adapted tree."""

    @nets
    def test_the_tree_as_an_argument_of_a_jitted_function(self, net: Any) -> None:
        task = attach_tree(net, RANDOM)
        arrays, rest = eqx.partition(net, eqx.is_array)
        other = jax.tree.map(lambda a: a + 0.1 if a.dtype.kind == "f" else a, arrays)
        f = jax.jit(lambda p, t: run(task.bind(p, eqx.combine(t, rest)), X))
        close(f(task.params, arrays), run(merge_tree(task), X), 1e-5)
        whole = eqx.combine(other, rest)
        close(f(task.params, other), run(merge_tree(task, tree=whole), X), 1e-5)

    @nets
    def test_adapters_of_equal_shapes_by_vmap(self, net: Any) -> None:
        tasks = [attach_tree(net, RANDOM, seed=s) for s in range(3)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(t.params for t in tasks))
        xs = jnp.stack([X, X + 1.0, X - 1.0])
        apply = jax.jit(jax.vmap(lambda p, x: run(tasks[0].bind(p), x)))
        for y, task, x in zip(apply(stacked, xs), tasks, xs, strict=True):
            close(y, run(merge_tree(task), x), 1e-5)

    def test_no_weight_is_merged_in_products(self) -> None:
        big = {"layers": [{"kernel": jnp.ones((64, 32), "float32")}]}
        nets = [(big, lambda t: X64 @ t["layers"][0]["kernel"])]
        linear = eqx.nn.Linear(64, 32, key=jax.random.key(0), dtype=jnp.float32)
        nets.append(({"layers": [linear]}, lambda t: jax.vmap(t["layers"][0])(X64)))
        flax = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        nets.append(({"layers": [flax]}, lambda t: t["layers"][0](X64)))
        general = nnx.LinearGeneral((8, 8), (4, 8), axis=(-2, -1), rngs=nnx.Rngs(0))
        nets.append(({"layers": [general]}, lambda t: t["layers"][0](X64.reshape(3, 8, 8))))
        for net, call in nets:
            task = attach_tree(net, LoraConfig(r=2, target_modules=["layers.0"]))
            apply = jax.jit(lambda p, t=task, f=call: f(t.bind(p)))
            merged = jax.jit(lambda p, t=task, f=call: f(merge_tree(t, p)))
            counts = [f.lower(task.params).cost_analysis()["flops"] for f in (apply, merged)]
            assert counts[0] < 0.8 * counts[1]

    def test_an_adapted_module_is_an_argument_too(self) -> None:
        task = attach_tree(equinox_net(), RANDOM)
        y = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))(task.bind(), X)
        close(y, run(merge_tree(task), X), 1e-5)
        bound = attach_tree(Flax(), RANDOM).bind()
        close(nnx.jit(lambda m, x: m(x))(bound, X), bound(X), 1e-5)

    @nets
    def test_trees_bound_anew_are_traced_once(self, net: Any) -> None:
        task, traced = attach_tree(net, RANDOM), []

        @eqx.filter_jit
        def apply(tree: Any) -> Any:
            traced.append(1)
            return run(tree, X)

        moved = jax.tree.map(lambda a: a + 1.0, task.params)
        ys = [apply(task.bind(params)) for params in (task.params, moved)]
        assert len(traced) == 1
        for y, params in zip(ys, (task.params, moved), strict=True):
            close(y, run(merge_tree(task, params), X), 1e-5)

    def test_flax_scans_over_an_adapted_cell(self) -> None:
        net = nnx.RNN(nnx.OptimizedLSTMCell(6, 4, rngs=nnx.Rngs(0)))
        names = ["cell.dense_i", "cell.dense_h"]
        task = attach_tree(net, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        y = task.bind()(X[None])
        close(y, merge_tree(task)(X[None]), 1e-5)
        assert float(jnp.abs(y - net(X[None])).max()) > 1e-3


X64 = jnp.ones((3, 64), "float32")


class TestTrees:
    """What trees there are."""

    @nets
    def test_several_adapters_act_one_upon_another(self, net: Any) -> None:
        first = attach_tree(net, RANDOM, "a")
        both = attach_tree(first, OFTConfig(oft_block_size=2, init_weights=False, **BOTH), "b")
        assert both.names == ["a", "b"]
        merged = attach_tree(merge_tree(first), both.adapter("b"))
        close(run(both.bind(), X), run(merge_tree(merged), X), 1e-5)
        close(
            run(both.without("a").bind(), X), run(attach_tree(net, both.adapter("b")).bind(), X), 0
        )
        assert first.names == ["a"]
        assert detach_tree(both) is net
        with pytest.raises(ConfigError, match="'a' is already there"):
            attach_tree(both, RANDOM, "a")

    @nets
    def test_whole_copies_and_biases(self, net: Any) -> None:
        config = LoraConfig(
            r=2, target_modules=["layers.0"], modules_to_save=["layers.1"], bias="lora_only"
        )
        task = attach_tree(net, config)
        loose = task.params["default"][""]
        assert loose.keys() == {"layers.0.bias", "layers.1.weight", "layers.1.bias"}
        assert loose["layers.1.weight"].shape == (4, 8)
        moved = jax.tree.map(lambda a: a + 0.1, task.params)
        close(run(task.bind(moved), X), run(merge_tree(task, moved), X), 1e-5)
        assert float(jnp.abs(run(task.bind(moved), X) - run(net, X)).max()) > 0.05

    def test_a_layer_alone(self) -> None:
        layer = eqx.nn.Linear(6, 4, key=jax.random.key(0))
        task = attach_tree(layer, LoraConfig(r=2, target_modules=[""], init_lora_weights=False))
        close(jax.vmap(task.bind())(X), jax.vmap(merge_tree(task))(X), 1e-5)

    def test_attention_of_flax(self) -> None:
        layer = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=nnx.Rngs(0))
        names = ["query", "key", "value", "out"]
        config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=True)
        task = attach_tree(layer, config)
        assert sorted(task.params["default"]) == sorted(names)
        shapes = jax.tree.map(jnp.shape, task.params["default"]["out"])
        assert shapes["lora_A.weight"] == (2, 6)
        y = merge_tree(task)(X[None])
        close(task.bind()(X[None]), y, 1e-5)
        assert float(jnp.abs(y - layer(X[None])).max()) > 1e-3
        x = X.reshape(1, 3, 6)
        state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
        plain = attach_tree(state, task.adapter(), kinds={"out": "Linear"})
        for one, two in zip(
            jax.tree.leaves(merge_tree(plain)),
            jax.tree.leaves(nnx.to_pure_dict(nnx.state(merge_tree(task), nnx.Param))),
            strict=True,
        ):
            close(one, two, 1e-6)
        assert x.shape == (1, 3, 6)

    def test_a_state_of_flax(self) -> None:
        graph, params, rest = nnx.split(Flax(), nnx.Param, ...)
        task = attach_tree(params, RANDOM)
        got = nnx.merge(graph, task.bind(), rest)(X)
        close(got, run(attach_tree(Flax(), task.adapter()).bind(), X), 1e-5)

    def test_parameters_of_linen(self) -> None:
        from flax import linen

        class Both(linen.Module):
            @linen.compact
            def __call__(self, x: Any) -> Any:
                return linen.Dense(4, name="out")(jnp.tanh(linen.Dense(8, name="up")(x)))

        params = Both().init(jax.random.key(0), X)
        config = LoraConfig(r=2, target_modules=["up", "out"], init_lora_weights=False)
        task = attach_tree(params, config)
        assert sorted(task.params["default"]) == ["params.out", "params.up"]
        close(Both().apply(task.bind(), X), Both().apply(merge_tree(task), X), 1e-5)

    def test_a_checkpoint_s_tensors(self) -> None:
        base = {"a.fc.weight": jnp.ones((4, 6)), "a.fc.bias": jnp.zeros(4)}
        task = attach_tree(base, LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
        close(X @ task.bind()["a.fc.weight"].T, X @ merge_tree(task)["a.fc.weight"].T, 1e-5)

    def test_convolutions_in_dicts_are_flax_s(self) -> None:
        net = {"conv": {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.zeros(5)}}
        net["norm"] = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
        net["table"] = {"embedding": jnp.ones((7, 5))}
        task = attach_tree(net, LoraConfig(r=2, target_modules=["conv", "table"]))
        assert jax.tree.map(jnp.shape, task.params["default"]["conv"]) == {
            "lora_A.weight": (2, 2, 3, 3),
            "lora_B.weight": (5, 2, 1, 1),
        }
        assert merge_tree(task)["conv"]["kernel"].shape == (3, 3, 2, 5)
        assert "norm.weight" in task._read.places

    def test_what_is_not_the_tree_s_own_is_its_own(self) -> None:
        net = equinox_net()
        task = attach_tree(net, LoraConfig(r=2, target_modules=["layers.0"]))
        bound = task.bind()
        assert bound.layers[1] is net.layers[1]
        assert bound.layers[0].bias is net.layers[0].bias
        assert bound.act is net.act


class TestRefusals:
    """What cannot be attached is told."""

    def test_prompts(self) -> None:
        config = PromptTuningConfig(num_virtual_tokens=2, token_dim=4)
        with pytest.raises(ConfigError, match="adapts no layer"):
            attach_tree(equinox_net(), config)

    def test_nothing_to_adapt(self) -> None:
        with pytest.raises(TargetError, match="no array of floats"):
            attach_tree({"a": jnp.arange(3)}, RANDOM)

    def test_abstract_arrays(self) -> None:
        config = LoraConfig(r=2, target_modules=["fc"])
        net = {"fc": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32)}}
        with pytest.raises(ConfigError, match=r"^fc\.weight: an abstract array.*jax\.eval_shape"):
            attach_tree(net, config)
        found = jax.eval_shape(lambda tree: attach_tree(tree, config).params, net)
        assert found["default"]["fc"]["lora_A.weight"].shape == (2, 6)

    def test_explicit_sharding(self) -> None:
        kinds, along = jax.sharding.AxisType, jax.sharding.PartitionSpec(None, "m")
        config = LoraConfig(r=2, target_modules=["fc"])
        for kind, spec in ((kinds.Explicit, along), (kinds.Explicit, None), (kinds.Auto, along)):
            mesh = jax.make_mesh((1,), ("m",), axis_types=(kind,))
            lies = jax.sharding.NamedSharding(mesh, spec or jax.sharding.PartitionSpec())
            net = {"fc": {"kernel": jax.device_put(jnp.ones((6, 4)), lies)}}
            if kind == kinds.Explicit and spec:
                with pytest.raises(
                    ConfigError, match=r"^fc\.weight: lies along the axis 'm' .*Auto"
                ):
                    attach_tree(net, config)
            else:
                assert attach_tree(net, config).bind()["fc"]["kernel"].shape == (6, 4)

    def test_no_such_kind(self) -> None:
        net = {"fc": {"kernel": jnp.ones((3, 2, 4))}}
        with pytest.raises(ConfigError, match=r"kinds\['fc'\]: 'Lineer' is not one of"):
            attach_tree(net, RANDOM, kinds={"fc": "Lineer"})

    def test_a_weight_that_stands_for_another_s(self) -> None:
        class Tied(eqx.Module):
            shared: eqx.nn.Shared

            def __init__(self) -> None:
                table = eqx.nn.Embedding(9, 6, key=jax.random.key(0), dtype=jnp.float32)
                head = eqx.nn.Linear(6, 9, False, dtype=jnp.float32, key=jax.random.key(0))
                where, get = (lambda pair: pair[1].weight), (lambda pair: pair[0].weight)
                self.shared = eqx.nn.Shared((table, head), where, get)

            def __call__(self, tokens: Any) -> Any:
                table, head = self.shared()
                return jax.vmap(head)(jax.vmap(table)(tokens))

        net, tokens = Tied(), jnp.arange(4)
        config = LoraConfig(r=2, target_modules=["shared.pytree.1"], init_lora_weights=False)
        with pytest.raises(TargetError, match=r"shared\.pytree\.1: .*adapt that one"):
            attach_tree(net, config)
        task = attach_tree(net, replace(config, target_modules=["shared.pytree.0"]))
        y = merge_tree(task)(tokens)
        close(task.bind()(tokens), y, 1e-5)
        assert float(jnp.abs(y - net(tokens)).max()) > 1e-3

    def test_no_such_layer(self) -> None:
        with pytest.raises(TargetError, match=r"layers\.7"):
            attach_tree(equinox_net(), LoraConfig(target_modules=["layers.7"]))

    def test_another_structure(self) -> None:
        task = attach_tree(dict_net(), RANDOM)
        with pytest.raises(ConfigError, match="its structure is not"):
            task.bind(tree={"layers": []})

    def test_two_arrays_of_one_name(self) -> None:
        net = {"a": {"b": {"weight": jnp.ones((2, 2))}}, "a.b": {"weight": jnp.ones((2, 2))}}
        with pytest.raises(ConfigError, match=r"a\.b\.weight: two arrays"):
            attach_tree(net, RANDOM)

    def test_layers_that_are_stacked_or_of_other_classes(self) -> None:
        keys, rngs = jax.random.split(jax.random.key(0), 3), nnx.Rngs(0)
        scanned = nnx.Linear(2, 2, rngs=rngs)
        scanned.kernel = nnx.Param(jnp.ones((3, 2, 2)))
        net = {
            "stack": eqx.filter_vmap(lambda k: eqx.nn.Linear(2, 2, key=k))(keys),
            "table": eqx.filter_vmap(lambda k: eqx.nn.Embedding(2, 2, key=k))(keys),
            "conv": eqx.filter_vmap(lambda k: eqx.nn.Conv1d(2, 2, 1, key=k))(keys),
            "scanned": scanned,
            "norm": eqx.nn.LayerNorm((2, 2)),
            "up": eqx.nn.ConvTranspose1d(2, 2, 1, key=keys[0]),
            "flax": nnx.ConvTranspose(2, 2, (1,), rngs=rngs),
            "wide": nnx.Conv(2, 2, (1, 1, 1, 1), rngs=rngs),
            "batched": nnx.LinearGeneral(2, 2, batch_axis={0: 3}, rngs=rngs),
            "free": nnx.Einsum("ab,b...->a...", (2, 2), rngs=rngs),
            "diagonal": nnx.Einsum("ab,bc->abc", (2, 2), rngs=rngs),
            "turned": nnx.Einsum("a,abc->cb", (2, 2, 3), (3, 2), rngs=rngs),
            "fc": eqx.nn.Linear(2, 2, key=keys[0]),
        }
        reasons = {
            "stack": r"shape \(3, 2, 2\) holds several layers",
            "table": "several layers",
            "conv": "several layers",
            "scanned": "several layers",
            "up": "it is a ConvTranspose1d, which no adapter knows: leave it out",
            "flax": "it is a ConvTranspose,",
            "wide": "it is a Conv,",
            "batched": "LinearGeneral with a batch_axis",
            "free": "Einsum whose einsum_str does not name",
            "diagonal": "Einsum whose kernel has axes that are neither",
            "turned": "Einsum whose bias lies otherwise",
        }
        for name, why in reasons.items():
            for config in (
                LoraConfig(r=1, target_modules=["fc", name]),
                LoraConfig(r=1, target_modules=f"fc|{name}"),
                Adapter(LoraConfig(r=1), {name: {}}),
            ):
                with pytest.raises(TargetError, match=f"^{name}: cannot be adapted: .*{why}"):
                    attach_tree(net, config)
        everywhere = LoraConfig(r=1, target_modules="all-linear")
        with pytest.raises(TargetError, match=r"^scanned: .*; stack: "):
            attach_tree(net, everywhere)
        without = {k: v for k, v in net.items() if k not in ("stack", "scanned")}
        assert [*attach_tree(without, everywhere).params["default"]] == ["fc"]
        assert [*attach_tree(net, LoraConfig(r=1, target_modules=["fc"])).params["default"]] == [
            "fc"
        ]

    def test_the_way_out_of_stacked_layers(self) -> None:
        """One layer is attached to, and each turn of the scan binds its own."""
        keys = jax.random.split(jax.random.key(0), 3)
        stack = eqx.filter_vmap(lambda k: eqx.nn.MLP(6, 6, 5, 1, key=k, dtype=jnp.float32))(keys)
        each, rest = eqx.partition(stack, eqx.is_array)
        blocks = [
            eqx.combine(jax.tree.map(lambda a, i=i: a[i], each), rest) for i in range(len(keys))
        ]
        tasks = [attach_tree(block, RANDOM, seed=i) for i, block in enumerate(blocks)]
        params = jax.tree.map(lambda *a: jnp.stack(a), *(task.params for task in tasks))

        def turn(x: Any, given: Any) -> Any:
            p, arrays = given
            return jax.vmap(tasks[0].bind(p, eqx.combine(arrays, rest)))(x), None

        got = jax.jit(lambda p, x: jax.lax.scan(turn, x, (p, each))[0])(params, X)
        want = X
        for task in tasks:
            want = jax.vmap(merge_tree(task))(want)
        close(got, want, 1e-5)

    @pytest.mark.parametrize(
        ("rule", "kernel", "bias", "shape"),
        [
            ("btd,dnh->btnh", (6, 2, 4), (2, 4), (3, 2, 6)),
            ("btd,ndh->btnh", (2, 6, 4), None, (3, 2, 6)),
            ("btnh,nhd->btd", (2, 3, 8), (8,), (3, 2, 2, 3)),
            ("...d,ckdh->c...kh", (2, 2, 6, 2), None, (3, 6)),
        ],
    )
    def test_einsums(self, rule: str, kernel: Any, bias: Any, shape: Any) -> None:
        rngs = nnx.Rngs(0)
        net = {"sum": nnx.Einsum(rule, kernel, bias, rngs=rngs)}
        config = LoraConfig(r=2, target_modules=["sum"], init_lora_weights=False)
        task = attach_tree(net, config)
        p = task.params["default"]["sum"]
        assert (p["lora_A.weight"].shape, p["lora_B.weight"].shape) == ((2, 6), (8, 2))
        x = jax.random.normal(jax.random.key(1), shape, "float32")
        change = (4.0 * p["lora_B.weight"] @ p["lora_A.weight"]).astype("float32")
        own = rule.partition(",")[2].partition("->")[0]
        kept = [i for i, axis in enumerate(own) if axis in rule.partition("->")[2]]
        order = [*kept, *(i for i in range(len(own)) if i not in kept)]
        turned = change.reshape([kernel[i] for i in order]).transpose(np.argsort(order))
        want = net["sum"](x) + jnp.einsum(rule, x, turned)
        close(task.bind()["sum"](x), want, 1e-5)
        close(merge_tree(task)["sum"](x), want, 1e-5)
        slopes = jax.grad(lambda p: (task.bind(p)["sum"](x) ** 2).sum())(task.params)
        assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(slopes))


@pytest.fixture(scope="module")
def findings() -> Any:
    """Run `tests/sharded_trees.py` on four virtual CPU devices."""
    root = str(Path(peft_any.__file__).parents[1])
    devices = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    command = [sys.executable, "-m", "tests.sharded_trees"]
    run = subprocess.run(command, check=False, env=env, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", NETS)
def test_arrays_lie_as_they_lay(findings: Any, name: str) -> None:
    found = findings[name]
    assert found["devices"] == 4
    assert found["fresh"], "new parameters are on all devices of the mesh"
    assert found["merged"], "a merged weight lies as the tree's does"
    assert all(found["spread"])
    assert found["finite"]
    assert max(found["far"]) < 1e-5


def test_nothing_is_imported_that_the_tree_is_not_of() -> None:
    code = (
        "import sys, peft_any; assert 'jax' not in sys.modules\n"
        "import jax.numpy as jnp\n"
        "from peft_any.integrations.jax import attach_tree\n"
        "net = {'fc': {'kernel': jnp.ones((4, 3))}}\n"
        "attach_tree(net, peft_any.LoraConfig(r=1, target_modules=['fc'])).bind()\n"
        "assert not {'equinox', 'flax', 'torch'} & {*sys.modules}\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

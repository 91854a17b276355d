"""Adapters on torch modules: what they compute, how they train, and that they leave no trace."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.parametrizations import weight_norm  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.errors import ConfigError, TargetError  # noqa: E402
from peft_any.integrations.torch import (  # noqa: E402
    attach,
    attached,
    detach_adapter,
    merge_into,
)
from peft_any.layer import EXPERTS  # noqa: E402
from peft_any.methods.boft import BOFTConfig  # noqa: E402
from peft_any.methods.cpt import CPTConfig  # noqa: E402
from peft_any.methods.ia3 import IA3Config  # noqa: E402
from peft_any.methods.lora import LoraConfig  # noqa: E402
from peft_any.methods.multitask_prompt_tuning import (  # noqa: E402
    MultitaskPromptTuningConfig,
)
from peft_any.methods.oft import OFTConfig  # noqa: E402
from peft_any.methods.p_tuning import PromptEncoderConfig  # noqa: E402
from peft_any.methods.poly import PolyConfig  # noqa: E402
from peft_any.methods.prefix_tuning import PrefixTuningConfig  # noqa: E402
from peft_any.methods.prompt_tuning import PromptTuningConfig  # noqa: E402
from peft_any.methods.vera import VeraConfig  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from tests.cases import CASES, Case  # noqa: E402
from tests.torch_layers import Net, input_of, layer_of  # noqa: E402

MODULES = [case for case in CASES if case.site.kind not in EXPERTS]
"""Rows whose layer is a module; experts are parameters of one: `tests.hf.test_parameters`."""
rows = pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
RTOL = 1e-10


def net_of(case: Case, seed: int = 0) -> Net:
    """Make a module of a row's layer, in float64; of what draws in training, not in training."""
    net = Net(case.site.name, layer_of(case.base(seed, dtype="float64")))
    return net.train(not case.config.draws)


def config_of(case: Case) -> Any:
    """Let a row's configuration target its layer."""
    alone = getattr(case.config, "feedforward_modules", None)  # wants its names among a list's
    name = case.site.name
    return replace(case.config, target_modules=name if alone else [name])


def adapter_of(case: Case, net: Net, seed: int = 0) -> Adapter:
    """Make an adapter as training leaves it."""
    weights = {name: p.detach() for name, p in net.state_dict().items()}
    model = PeftModel(weights, kinds={case.site.name: case.site})
    fresh = model.add("a", config_of(case), seed=seed, dtype="float64")
    new = torch.Generator().manual_seed(seed)
    trained = fresh.trainable()
    noise = lambda a: a + 0.2 * torch.randn(a.shape, generator=new, dtype=a.dtype)  # noqa: E731
    model.update({"a": {s: {k: noise(v) for k, v in p.items()} for s, p in trained.items()}})
    return model["a"]


def merged_net(case: Case, net: Net, adapter: Adapter) -> Net:
    """Load the weights that a PeftModel merges into a copy of the module."""
    twin = copy.deepcopy(net)
    model = PeftModel(dict(net.state_dict()), kinds={case.site.name: case.site})
    model.add("a", adapter)
    twin.load_state_dict(model.merge())
    return twin


def close(got: Any, want: Any, rtol: float = RTOL) -> None:
    size = float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=rtol * max(size, 1e-30))


@rows
def test_a_module_with_an_adapter_is_the_merged_module(case: Case) -> None:
    net = net_of(case)
    x = input_of(case.site, torch.float64)
    adapter = adapter_of(case, net)
    want = merged_net(case, net, adapter)(x)
    before, keys = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    trace = {name: {*vars(m)} for name, m in net.named_modules()}
    held = attach(net, adapter)
    close(net(x), want)
    assert net.state_dict().keys() == keys.keys()
    with held.disabled():
        close(net(x), before, 1e-15)
    back = detach_adapter(net)
    assert {name: {*vars(m)} for name, m in net.named_modules()} == trace
    assert all(p.requires_grad for p in net.parameters())
    close(net(x), before, 0.0)
    for site, p in adapter.sites.items():
        for name, array in p.items():
            assert torch.equal(back.sites[site][name], array)
    attach(net, adapter)
    close(merge_into(net)(x), want)
    assert {name: {*vars(m)} for name, m in net.named_modules()} == trace


@rows
def test_gradients_are_those_of_the_bound_model(case: Case) -> None:
    net = net_of(case)
    x = input_of(case.site, torch.float64)
    adapter = adapter_of(case, net)
    layer = copy.deepcopy(net.get_submodule(case.site.name))
    held = attach(net, adapter)
    y = net(x)
    shape = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    trained = dict(held.named_parameters())
    if not y.requires_grad:
        assert case.name in {"oft-prime", "oft-1-term", "adalora-emptied"}  # nothing to train
        return
    got = torch.autograd.grad((y * shape).sum(), [*trained.values()], allow_unused=True)

    model = PeftModel(dict(net.state_dict()), kinds={case.site.name: case.site})
    own = model.add("a", adapter)
    params = {
        s: {k: v.detach().clone().requires_grad_() for k, v in p.items()}
        for s, p in own.trainable().items()
    }
    model.update({"a": params})
    prefix = f"{case.site.name}."
    values = {k.removeprefix(prefix): v for k, v in model.merge().items() if k.startswith(prefix)}
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    z = torch.func.functional_call(layer, values, args)
    z = z[0] if isinstance(z, tuple) else z
    leaves = {f"{s}.{k}" if s else k: v for s, p in params.items() for k, v in p.items()}
    assert leaves.keys() == trained.keys()
    want = torch.autograd.grad((z * shape).sum(), [*leaves.values()], allow_unused=True)
    slopes = dict(zip(leaves, want, strict=True))
    for name, b in zip(trained, got, strict=True):
        a = slopes[name]
        if a is None:
            assert b is None or not b.detach().abs().max() > 0, name
        elif a.numel():
            close(b, a, 1e-9)


def mlp(**kinds: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, **kinds), nn.Tanh(), nn.Linear(8, 4, **kinds))


def of_integers(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return layer


RANDOM = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
X = torch.linspace(-1, 1, 18).reshape(3, 6)


class TestTraining:
    """Parameters for torch's own optimisers."""

    def test_a_few_steps_and_the_file(self, tmp_path: Path) -> None:
        net = mlp()
        frozen = {k: v.clone() for k, v in net.state_dict().items()}
        held = attach(net, LoraConfig(r=2, target_modules=["0", "2"]), seed=3)
        optimizer = torch.optim.AdamW(held.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = ((net(X) - 1.0) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(torch.equal(frozen[k], v) for k, v in net.state_dict().items())
        assert [p.grad for p in net[0].parameters(recurse=False)] == [None, None]
        y = net(X).detach()
        held.save(tmp_path / "a")
        again = mlp()
        attach(again, Adapter.load(tmp_path / "a"))
        close(again(X), y, 1e-6)

    def test_what_the_module_s_parameters_are(self) -> None:
        net = mlp()
        held = attach(net, VeraConfig(r=4, target_modules=["0", "2"]))
        own = {id(p) for p in held.parameters()}
        assert own == {id(p) for p in net.parameters() if p.requires_grad}
        assert [name for name, _ in held.named_parameters()] == [
            "0.vera_lambda_d",
            "0.vera_lambda_b",
            "2.vera_lambda_d",
            "2.vera_lambda_b",
        ]
        assert not [name for name in net.state_dict() if "vera" in name]

    def test_frozen_parameters_stay_frozen_and_others_come_back(self) -> None:
        net = mlp()
        net[0].bias.requires_grad_(False)
        attach(net, RANDOM, "a")
        attach(net, RANDOM, "b", seed=1)
        detach_adapter(net, "a")
        assert not any(p.requires_grad for n, p in net.named_parameters() if "peft_any" not in n)
        detach_adapter(net, "b")
        assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]

    def test_dropout_follows_torch_s_seed_and_only_in_training(self) -> None:
        net = mlp()
        attach(net, replace(RANDOM, lora_dropout=0.5))
        still = net.eval()(X)
        close(net(X), still, 0.0)
        net.train()
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(net(X))
        close(runs[0], runs[1], 0.0)
        assert not torch.equal(runs[0], runs[2])
        assert not torch.equal(runs[0], still)

    def test_a_convolution_thins_what_its_adapter_reads(self) -> None:
        net, x = nn.Sequential(nn.Conv1d(4, 3, 3)), torch.randn(1, 4, 9)
        plain = net(x).detach()
        attach(net, replace(RANDOM, target_modules=["0"], lora_dropout=0.5))
        still = net.eval()(x).detach()
        net.train()
        runs = torch.stack([net(x).detach() for _ in range(4000)])
        error = runs.std(0) / len(runs) ** 0.5
        assert ((runs.mean(0) - still).abs() < 6 * error).all()
        assert (runs.std(0) > 0.1 * (still - plain).abs()).all()

    def test_several_on_a_convolution_draw_apart(self) -> None:
        net, x = nn.Sequential(nn.Conv1d(4, 3, 3)), torch.randn(1, 4, 9)
        one = replace(RANDOM, target_modules=["0"], lora_dropout=0.5)
        attach(net, one, "a")
        attach(net, replace(one, lora_dropout=0.0, use_dora=True), "b", seed=1)
        still = net.eval()(x).detach()
        runs = torch.stack([net.train()(x).detach() for _ in range(4000)])
        error = runs.std(0) / len(runs) ** 0.5
        assert ((runs.mean(0) - still).abs() < 6 * error).all()

    @pytest.mark.parametrize("case", ["class", "method", "stacked"])
    def test_dropout_through_a_weight_is_refused(self, case: str) -> None:
        class Own(nn.Conv2d):
            """What it does with its weight is not known."""

        net = nn.Sequential((Own if case == "class" else nn.Conv2d)(2, 2, 2))
        lora = LoraConfig(r=1, target_modules=["0"], lora_dropout=0.5)
        boft = BOFTConfig(boft_block_size=2, boft_dropout=0.5, target_modules=["0"])
        attach(net, boft if case == "method" else lora)
        if case == "stacked":
            attach(net, OFTConfig(oft_block_size=2, target_modules=["0"]), "b")
        x = torch.ones(1, 2, 4, 4)
        assert net.eval()(x).shape == (1, 2, 3, 3)
        with pytest.raises(ConfigError, match=r"(LORA|OFT) cannot drop inputs of a (Own|Conv2d)"):
            net.train()(x)

    def test_a_router_that_is_drawn_in_training_draws_without_a_rate(self) -> None:
        net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 3, 4)
        task = attach(net, PolyConfig(r=1, target_modules=["0"], n_tasks=2, init_weights=False))
        with task.routed(task_ids=[0, 1]):
            still, runs = net.eval()(x), [net.train()(x) for _ in range(2)]
        assert not torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], still)

    def test_a_rate_without_effect_changes_nothing(self) -> None:
        net, x = nn.Sequential(nn.Conv2d(2, 2, 2)), torch.ones(1, 2, 4, 4)
        config = OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False)
        attach(net, replace(config, target_modules=["0"]))
        close(net.train()(x), net.eval()(x), 1e-6)


class TestSeveral:
    """More than one adapter, one upon another as a PeftModel stacks them."""

    @pytest.mark.parametrize(
        "other",
        [RANDOM, OFTConfig(oft_block_size=2, target_modules=["0"]), replace(RANDOM, use_dora=True)],
        ids=["lora", "oft", "dora"],
    )
    def test_they_act_as_in_a_model(self, other: Any) -> None:
        net = mlp()
        model = PeftModel({k: v.clone() for k, v in net.state_dict().items()})
        for seed, (name, config) in enumerate({"a": RANDOM, "b": other}.items()):
            adapter = model.add(name, config, seed=seed)
            p = adapter.sites["0"]
            sites = {**adapter.sites, "0": {k: v + 0.1 for k, v in p.items()}}
            model.exchange(name, adapter.replace(sites=sites))
            attach(net, model[name], name)
        assert [*attached(net)] == ["a", "b"]
        model.activate(["a", "b"])
        twin = mlp()
        twin.load_state_dict(model.merge())
        close(net(X), twin(X), 1e-6)
        close(merge_into(net)(X), twin(X), 1e-6)
        assert not attached(net)

    def test_a_module_within_has_its_own_of_the_same_name(self) -> None:
        net, alone = nn.Sequential(mlp(), nn.Tanh()), nn.Sequential(mlp(), nn.Tanh())
        plain = net(X)
        inner = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        attach(net[0], inner, seed=1)
        attach(net, replace(RANDOM, target_modules=["0.0", "0.2"]))
        attach(alone[0], inner, seed=1)
        both = net(X)
        assert not torch.allclose(both, alone(X))
        for module in (net, net[0]):
            with pytest.raises(ConfigError, match=r"cannot be merged: .* acts there too"):
                merge_into(module)
        close(net(X), both, 0.0)
        detach_adapter(net)
        close(net(X), alone(X), 0.0)
        assert not any(p.requires_grad for n, p in net.named_parameters() if "peft_any" not in n)
        detach_adapter(net[0])
        close(net(X), plain, 0.0)
        assert all(p.requires_grad for p in net.parameters())

    def test_a_merge_takes_no_layer_of_a_module_within(self) -> None:
        net = nn.Sequential(mlp(), nn.Linear(4, 4))
        attach(net[0], RANDOM)
        attach(net, replace(RANDOM, target_modules=["1"]))
        want = net(X)
        close(merge_into(net)(X), want, 1e-6)
        assert [*attached(net[0])] == ["default"]
        close(merge_into(net[0])(X), net[0](X), 0.0)
        close(net(X), want, 1e-6)

    def test_one_that_is_off_is_not_merged(self) -> None:
        net = mlp()
        task = attach(net, RANDOM)
        want = net(X)
        with task.disabled():
            with pytest.raises(ConfigError, match="'default': is switched off and cannot"):
                merge_into(net)
            with task.disabled():
                pass
            close(net(X), mlp()(X), 0.0)  # the outer block still holds
        close(net(X), want, 0.0)

    def test_one_of_them_off(self) -> None:
        net, alone = mlp(), mlp()
        first = attach(net, RANDOM, "a")
        attach(net, RANDOM, "b", seed=1)
        attach(alone, RANDOM, "b", seed=1)
        with first.disabled():
            close(net(X), alone(X), 1e-6)
        assert detach_adapter(net, "a").config == RANDOM
        close(net(X), alone(X), 1e-6)


class TestWholeCopies:
    """What an adapter carries beside its method."""

    config = LoraConfig(
        r=2, target_modules=["0"], modules_to_save=["2"], bias="lora_only", init_lora_weights=False
    )

    def test_copies_and_biases_act_and_train(self) -> None:
        net = mlp()
        want = net[2](torch.tanh(net[0](X)))
        held = attach(net, replace(self.config, init_lora_weights=True))
        names = [name for name, _ in held.named_parameters()]
        assert names == ["0.lora_A.weight", "0.lora_B.weight", "0.bias", "2.weight", "2.bias"]
        close(net(X), want, 1e-6)
        with torch.no_grad():
            for parameter in held.parameters():
                parameter.add_(0.1)
        net(X).sum().backward()
        assert all(p.grad is not None for p in held.parameters())
        adapter = held.adapter
        twin = mlp()
        model = PeftModel(dict(twin.state_dict()))
        model.add("a", adapter)
        twin.load_state_dict(model.merge())
        close(net(X), twin(X), 1e-6)
        close(merge_into(net)(X), twin(X), 1e-6)

    def test_two_copies_of_one_tensor_are_refused_and_nothing_is_left(self) -> None:
        net = mlp()
        attach(net, self.config, "a")
        before = {name: {*vars(m)} for name, m in net.named_modules()}
        with pytest.raises(ConfigError, match=r"0\.bias.*'a' and 'b'"):
            attach(net, self.config, "b")
        assert {name: {*vars(m)} for name, m in net.named_modules()} == before

    def test_rows_of_a_tied_table(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.wte, self.fc = nn.Embedding(7, 5), nn.Linear(5, 5)
                self.lm_head = nn.Linear(5, 7, bias=False)
                self.lm_head.weight = self.wte.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.lm_head(self.fc(self.wte(x)))

        net, x = Tied(), torch.arange(7)
        config = LoraConfig(r=2, target_modules=["fc"], trainable_token_indices={"wte": [5, 2]})
        held = attach(net, config)
        with torch.no_grad():
            dict(held.named_parameters())["wte.weight"].add_(1.0)
        twin = Tied()
        with torch.no_grad():
            twin.wte.weight[[5, 2]] += 1.0
        close(net(x), twin(x), 1e-6)
        detach_adapter(net)
        assert torch.equal(net(x), Tied()(x))
        held = attach(net, held.adapter)
        merge_into(net)
        close(net(x), twin(x), 1e-6)
        assert held.adapter.tokens["wte"].shape == (2, 5)

    def test_a_tensor_that_is_only_saved_along_is_of_all_that_share_it(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.wte, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
                self.head.weight = self.wte.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.wte(x))

        net, twin, x = Tied(), Tied(), torch.arange(7)
        config = LoraConfig(r=2, target_modules=["wte"])
        adapter = detach_adapter(net, attach(net, config).name)
        grown = net.wte.weight.detach() + 1.0
        adapter = adapter.replace(extra={"wte.weight": grown})
        held = attach(net, adapter)
        with torch.no_grad():
            twin.wte.weight.copy_(grown)
        close(net(x), twin(x), 1e-6)
        assert [*held.adapter.extra] == ["wte.weight"]
        close(merge_into(net)(x), twin(x), 1e-6)
        assert net.head.weight is net.wte.weight
        attach(net, replace(config, target_modules=["head"], modules_to_save=["wte"]))
        assert net.head.weight is net.wte.weight

    def test_statistics_of_a_whole_copy_are_its_own(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        held = attach(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
        net(X)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert held.adapter.extra["1.num_batches_tracked"] == 1
        y = net.eval()(X)
        close(merge_into(net)(X), y, 1e-6)
        assert net[1].num_batches_tracked == 1

    def test_a_tied_weight_is_set_apart_before_a_merge(self) -> None:
        net = nn.ModuleDict({"wte": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
        net["head"].weight = net["wte"].weight
        net["a"], net["b"] = nn.Linear(5, 5), nn.Linear(5, 5)
        net["a"].bias = net["b"].bias
        net.config = type("Config", (), {"tie_word_embeddings": True})()
        config = LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
        held = attach(net, config)
        before, after = net["wte"].weight.detach().clone(), net["wte"](torch.arange(7)).detach()
        merge_into(net)
        assert torch.equal(net["head"].weight, before)
        close(net["wte"].weight.detach(), after, 1e-6)
        assert not net.config.tie_word_embeddings
        assert net["a"].bias is not net["b"].bias  # which a saved model would lose
        assert torch.equal(net["a"].bias, net["b"].bias)
        assert held.module is net


class TestTorchs:
    """What else one does with a module."""

    def test_copies_and_pickles(self) -> None:
        net = mlp()
        attach(net, RANDOM)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            close(twin(X), net(X), 0.0)
            merge_into(twin)
            assert not attached(twin)
        assert attached(net)

    def test_checkpoints_of_the_base_go_in_and_out(self) -> None:
        net, other = mlp(), mlp()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        attach(net, RANDOM)
        assert net.load_state_dict(other.state_dict()) == ([], [])
        attach(other, RANDOM)
        close(net(X), other(X), 1e-6)

    def test_parameters_that_a_checkpoint_put_there_come_back_too(self) -> None:
        net = mlp()
        attach(net, RANDOM)
        net.load_state_dict(mlp().state_dict(), assign=True)
        assert not net[0].weight.requires_grad
        net[2].bias = None
        detach_adapter(net)
        assert all(p.requires_grad for p in net.parameters())

    def test_moves_and_casts(self) -> None:
        net = mlp()
        held = attach(net, RANDOM)
        want = net(X)
        close(net.double()(X.double()), want.double(), 1e-6)
        assert {p.dtype for p in held.parameters()} == {torch.float64}
        assert net.to("meta")(X.double().to("meta")).device.type == "meta"

    def test_half_precision_is_rounded_once(self) -> None:
        net = mlp(dtype=torch.bfloat16)
        held = attach(net, RANDOM)
        assert {p.dtype for p in held.parameters()} == {torch.float32}
        y = net(X.bfloat16())
        assert y.dtype == torch.bfloat16
        twin = copy.deepcopy(merge_into(net)).float()
        close(y.float(), twin(X), 0.03)

    def test_autocast(self) -> None:
        net = mlp()
        attach(net, RANDOM)
        want = net(X)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(X)
        assert y.dtype == torch.bfloat16
        close(y.float(), want, 0.03)

    def test_autocast_leaves_lookups_as_they_are(self) -> None:
        net, x = nn.Sequential(nn.Embedding(7, 5)), torch.arange(7)
        attach(net, replace(RANDOM, target_modules=["0"]))
        want = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.float32
        close(y, want, 0.03)

    def test_torch_s_fused_layers_do_not_read_past_the_adapter(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        x = torch.randn(2, 3, 8)
        names = ["self_attn", "linear1", "linear2"]
        attach(layer, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        want = layer(x)
        with torch.no_grad():
            close(layer(x), want.detach(), 1e-5)

    def test_a_table_that_bounds_its_rows_bounds_the_adapted_ones(self) -> None:
        net, x = nn.Sequential(nn.Embedding(7, 5, max_norm=0.5)), torch.arange(7)
        attach(net, replace(RANDOM, target_modules=["0"]))
        y = net(x).detach()
        assert y.norm(dim=1).max() < 0.5001
        close(merge_into(net)(x), y, 1e-6)

    def test_a_layer_that_is_gone_does_not_keep_an_adapter_on(self) -> None:
        net = mlp()
        attach(net, RANDOM)
        del net[2]
        assert sorted(detach_adapter(net).sites) == ["0", "2"]
        close(net(X), mlp()[:2](X), 0.0)

    def test_a_layer_of_two_names_has_the_first(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(6, 6)
                self.b = self.a

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(self.a(x))

        net = Twice()
        with pytest.raises(TargetError, match="'b' matches no layer"):
            attach(net, LoraConfig(r=2, target_modules=["a", "b"]))
        attach(net, LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
        y = net(X)
        close(merge_into(net)(X), y, 1e-6)


class TestRefused:
    """What cannot be attached is said, and the module is as before."""

    def test_names(self) -> None:
        net = mlp()
        attach(net, RANDOM)
        with pytest.raises(ConfigError, match="'default' is already there"):
            attach(net, RANDOM)
        with pytest.raises(ConfigError, match=r"'defalt' is not on this module.*default"):
            detach_adapter(net, "defalt")

    def test_neither_an_adapter_nor_a_configuration(self) -> None:
        with pytest.raises(ConfigError, match="'adapter' cannot be attached"):
            attach(mlp(), "adapter")

    def test_nothing_matches(self) -> None:
        net = mlp()
        with pytest.raises(TargetError, match="'3' matches no layer"):
            attach(net, LoraConfig(target_modules=["3"]))
        assert not attached(net)

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            (lambda: nn.ConvTranspose2d(6, 6, 3), "it is of the class ConvTranspose2d"),
            (lambda: nn.Bilinear(6, 6, 3), "it is of the class Bilinear"),
            (lambda: nn.LSTM(6, 6), r"it is of the class LSTM.*modules_to_save=\['0'\]"),
            (lambda: nn.GRUCell(6, 6), "it is of the class GRUCell"),
            (lambda: weight_norm(nn.Linear(6, 6)), "its weight is computed from others"),
            (lambda: weight_norm(nn.Conv1d(6, 6, 3)), "its weight is computed from others"),
            (lambda: of_integers(nn.Linear(6, 6)), "its weight is of int8, as quantised ones are"),
        ],
    )
    def test_layers_of_other_kinds_are_refused_where_they_are_named(
        self, made: Any, said: str
    ) -> None:
        net = nn.Sequential(made(), nn.Linear(6, 4))
        for named in (["0", "1"], "0|1"):
            config = LoraConfig(r=2, target_modules=named)
            with pytest.raises(TargetError, match=f"^0: cannot be adapted: {said}"):
                attach(net, config)
        assert not attached(net)
        attach(net, replace(config, exclude_modules=["0"]))

    def test_what_holds_no_tensors_yet_or_none_by_name(self) -> None:
        with pytest.raises(TargetError, match=r"^0\.weight: cannot be read: the layer is lazy"):
            attach(nn.Sequential(nn.LazyLinear(4)), RANDOM)
        with pytest.raises(TargetError, match=r"^ReLU: cannot be adapted: it holds no tensor"):
            attach(nn.ReLU(), RANDOM)

    def test_a_layer_whose_weight_is_computed_since_it_was_attached_to(self) -> None:
        net = mlp()
        attach(net, RANDOM)
        weight_norm(net[2])
        for use in (lambda: net(X), lambda: merge_into(net)):
            with pytest.raises(ConfigError, match=r"weight: .* its weight is computed from others"):
                use()
        assert sorted(detach_adapter(net).sites) == ["0", "2"]
        close(net(X), mlp()(X), 1e-6)

    def test_a_prompt(self) -> None:
        config = PromptTuningConfig(num_virtual_tokens=2, token_dim=4)
        with pytest.raises(ConfigError, match="a Sequential cannot take a prompt"):
            attach(mlp(), config)

    def test_a_forward_that_another_library_replaced(self) -> None:
        net = mlp()
        net[2].forward = lambda x: x
        with pytest.raises(ConfigError, match=r"2: .*its forward was replaced"):
            attach(net, RANDOM)
        assert all("peft_any" not in m._modules for m in net.modules())

    def test_ia3_without_a_bias_to_scale(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3, bias=False))
        attach(net, IA3Config(target_modules=["0"], feedforward_modules=[]))
        assert net(torch.ones(2, 4)).shape == (2, 3)


class Reader(nn.Module):
    """Looks tokens up and sums them, as a model of transformers is called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.config = type("Config", (), {"hidden_size": 4, "num_layers": 2, "n_head": 2})()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        labels: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        **more: Any,
    ) -> Any:
        assert position_ids is None
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            x = x * attention_mask[:, -x.shape[1] :, None]
        found = {"logits": self.head(x.cumsum(1)), "labels": labels, "mask": attention_mask}
        return type("Output", (), {**found, **more})()


class Cache:
    def __init__(self, size: int) -> None:
        self.get_seq_length = lambda: size


class TestPrompts:
    """Virtual tokens on a model as transformers has them; its own are compared in `tests.hf`."""

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    @pytest.mark.parametrize(
        "config",
        [
            PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=3),
            PromptEncoderConfig(num_virtual_tokens=2),
            CPTConfig(cpt_token_ids=[3, 1], cpt_tokens_type_mask=[1, 4], task_type="CAUSAL_LM"),
        ],
        ids=lambda config: config.peft_type,
    )
    def test_rows_stand_before_the_input(self, config: Any) -> None:
        net = Reader()
        plain = net(self.ids).logits
        held = attach(net, config)
        tasks = {"task_ids": torch.tensor([2, 0])} if config.peft_type.startswith("MULTI") else {}
        mask = torch.ones_like(self.ids)
        out = net(self.ids, mask, position_ids=mask, token_type_ids=mask, **tasks)
        own = held.adapter
        x = own.config.prepend(own.shared, net.wte(self.ids), **tasks)
        close(out.logits, net.head(x.cumsum(1)), 1e-6)
        assert out.mask.shape == (2, 5)
        out.logits.sum().backward()
        assert all(p.grad is not None for p in held.parameters())
        again = net(self.ids[:, -1:], mask, past_key_values=Cache(5))
        assert again.mask.shape == (2, 5)
        close(again.logits, net.head(net.wte(self.ids[:, -1:])), 1e-6)
        labelled = net(self.ids, labels=self.ids, **tasks)
        if config.peft_type == "CPT":
            close(labelled.loss, config.loss(labelled.logits, self.ids), 1e-6)
        else:
            assert labelled.labels.tolist() == [[-100, -100, 1, 2, 3], [-100, -100, 4, 5, 6]]
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge_into(net)
        detach_adapter(net)
        close(net(self.ids).logits, plain, 0.0)

    def test_sizes_are_the_model_s(self) -> None:
        made = attach(Reader(), PrefixTuningConfig(num_virtual_tokens=3)).adapter.config
        sizes = made.num_layers, made.token_dim, made.num_attention_heads
        assert sizes == (2, 4, 2)

    def test_a_prefix_does_not_train_without_the_cache(self) -> None:
        net = Reader()
        attach(net, PrefixTuningConfig(num_virtual_tokens=3))
        net.gradient_checkpointing = True
        with pytest.raises(ConfigError, match="cannot train with gradient checkpointing"):
            net(self.ids)

    def test_what_is_refused(self) -> None:
        net = Reader()
        config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        attach(net, config)
        for call, said in (
            ({"attention_mask": torch.ones(1, 1, 2, 2)}, "cannot be lengthened"),
            ({}, "neither input_ids nor inputs_embeds"),
        ):
            with pytest.raises(ConfigError, match=said):
                net(**call)
        with pytest.raises(ConfigError, match="takes a prompt already"):
            attach(net, config, "b")
        detach_adapter(net)
        with pytest.raises(ConfigError, match="embeddings of width 4"):
            attach(net, replace(config, token_dim=6))
        net.forward = net.forward
        with pytest.raises(ConfigError, match="forward was replaced"):
            attach(net, config)

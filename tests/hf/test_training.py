"""Training parity: 100 steps of Hugging Face PEFT, and ours from the same start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_any._tree import leaves, tree_map  # noqa: E402
from peft_any.adapter import Adapter  # noqa: E402
from peft_any.backend import from_numpy, namespace, resolve, to_numpy  # noqa: E402
from peft_any.dropout import Noise  # noqa: E402
from peft_any.methods.adalora import AdaLoraConfig  # noqa: E402
from peft_any.methods.boft import BOFTConfig  # noqa: E402
from peft_any.methods.ia3 import IA3Config  # noqa: E402
from peft_any.methods.loha import LoHaConfig  # noqa: E402
from peft_any.methods.lokr import LoKrConfig  # noqa: E402
from peft_any.methods.lora import LoraConfig  # noqa: E402
from peft_any.methods.oft import OFTConfig  # noqa: E402
from peft_any.methods.p_tuning import PromptEncoderConfig  # noqa: E402
from peft_any.methods.prefix_tuning import PrefixTuningConfig  # noqa: E402
from peft_any.methods.prompt_tuning import PromptTuningConfig  # noqa: E402
from peft_any.methods.vera import VeraConfig  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.train import adamw, lora_plus  # noqa: E402
from peft_any.train.loop import Run, fit  # noqa: E402
from peft_any.variants import KasaConfig  # noqa: E402
from tests.hf import reference  # noqa: E402

STEPS, N_IN, HIDDEN, N_OUT = 100, 8, 12, 5
RATE = {"lr": 3e-3, "weight_decay": 0.05}
BOTH = ["fc1", "fc2"]
CONFIGS = {
    "lora": LoraConfig(r=3, target_modules=BOTH),
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules=BOTH),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=BOTH),
    "kasa": LoraConfig(r=3, kasa_config=KasaConfig(beta=0.05, gamma=0.02), target_modules=BOTH),
    "adalora": AdaLoraConfig(
        init_r=6,
        target_r=3,
        tinit=10,
        tfinal=20,
        deltaT=5,
        total_step=STEPS,
        orth_reg_weight=0.1,
        target_modules=BOTH,
    ),
    "ia3": IA3Config(target_modules=BOTH, feedforward_modules=["fc2"]),
    "loha": LoHaConfig(r=2, target_modules=BOTH),
    "lokr": LoKrConfig(r=2, decompose_both=True, target_modules=BOTH),
    "oft": OFTConfig(oft_block_size=4, target_modules=BOTH),
    "oft-exact": OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=BOTH),
    # HF's bound is in single precision: with one row and this eps it is exact.
    "oft-coft": OFTConfig(
        oft_block_size=4, coft=True, eps=0.25, block_share=True, target_modules=BOTH
    ),
    "boft": BOFTConfig(boft_block_size=4, target_modules=BOTH),
    "boft-2": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=BOTH),
    "vera": VeraConfig(r=6, target_modules=BOTH),
}
SIZES = {"num_virtual_tokens": 4, "token_dim": 8, "num_layers": 2, "num_attention_heads": 2}
PROMPTS: dict[str, Any] = {
    "prompt": PromptTuningConfig(num_virtual_tokens=4, token_dim=8),
    "prefix": PrefixTuningConfig(**SIZES),
    "projected": PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=6, **SIZES),
    "perceptron": PromptEncoderConfig(num_virtual_tokens=4, token_dim=8, encoder_hidden_size=6),
    "lstm": PromptEncoderConfig(
        num_virtual_tokens=4,
        token_dim=8,
        encoder_hidden_size=6,
        encoder_reparameterization_type="LSTM",
    ),
}
NETS = {"projected", "perceptron", "lstm"}
"""A file holds what the net gives, and not the net."""
TABLES = {"prompt", "perceptron", "lstm"}
"""Tokens before the input; the others are keys and values."""
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class BlockDiagonal(reference.BlockDiagonal):
    """What Hugging Face PEFT's CUDA kernel does, and its way back."""

    @staticmethod
    def backward(grad: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        b = blocks.shape[-1]
        runs = [slice(b * i, b * i + b) for i in range(blocks.shape[1])]
        return [torch.stack([torch.stack([g[run, run] for run in runs]) for g in grad])]


@pytest.fixture(autouse=True)
def _with_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.hf_boft, "_FBD_CUDA", BlockDiagonal)


class Net(nn.Module):
    """Two layers and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(N_IN, HIDDEN), nn.Linear(HIDDEN, N_OUT)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return SimpleNamespace(loss=((self.fc2(torch.tanh(self.fc1(x))) - y) ** 2).mean())


def loss(bound: Any, batch: Any) -> Any:
    x, y = batch
    h = bound.layers["fc1"](x)
    xp = namespace(h)
    gap = bound.layers["fc2"](xp.tanh(h)) - y
    return xp.mean(gap * gap)


def batches(dtype: str) -> list[Any]:
    rng = np.random.default_rng(1)
    turn = rng.normal(size=(N_IN, N_OUT))
    made = []
    for _ in range(10):
        x = rng.normal(size=(16, N_IN))
        made.append((x.astype(dtype), np.sin(x @ turn).astype(dtype)))
    return made


def start(config: Any, folder: Path, dtype: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Make Hugging Face PEFT's model with a trained-looking adapter, and save the adapter."""
    torch.manual_seed(0)
    net = Net().to(getattr(torch, dtype))
    base = reference.state_of(net)
    with reference.quietly():
        model = peft.get_peft_model(net, reference.config_of(config))
    for key, p in model.named_parameters():
        if "ranknum" in key:  # moving to float64 makes HF train AdaLoRA's divisor
            p.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((0.2 * noise).to(p.dtype))
    with reference.quietly():
        model.save_pretrained(folder)
    return model.train(), base


def theirs(model: Any, dtype: str) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **RATE)
    states, losses, data = [], [], batches(dtype)
    for step in range(STEPS):
        x, y = map(torch.tensor, data[step % 10])
        value = model.base_model(x, y).loss
        if getattr(model.peft_config["default"], "kasa_config", None):
            value = value + model.base_model._get_kasa_loss()
        value.backward()
        rule.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step + 1)
        rule.zero_grad()
        losses.append(float(value.detach()))
        if getattr(model.peft_config["default"], "coft", False):
            with torch.no_grad():
                model.base_model(x, y)  # draws the blocks back that the step has moved
        states.append(
            {k: reference.host(p).copy() for k, p in model.named_parameters() if p.requires_grad}
        )
    return states, losses


def match(params: Any, state: dict[str, np.ndarray], rtol: float) -> None:
    flat = {f"{s}.{k}": to_numpy(a) for s, p in params["task"].items() for k, a in p.items()}
    short = {
        k.removeprefix(reference.PREFIX)
        .replace(".default", "")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): v
        for k, v in state.items()
    }
    assert flat.keys() == short.keys()
    for key, want in short.items():
        assert flat[key].dtype == want.dtype
        size = float(np.max(np.abs(want)))
        np.testing.assert_allclose(flat[key], want, rtol=0, atol=rtol * size, err_msg=key)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_hundred_steps(name: str, dtype: str, library: str, tmp_path: Path) -> None:
    # HF computes KaSA's regulariser in float32, whatever the parameters are.
    rtol = TOLERANCE["float32" if name == "kasa" else dtype]
    hf, base = start(CONFIGS[name], tmp_path, dtype)
    states, losses = theirs(hf, dtype)
    backend = resolve(library)
    model = PeftModel({k: from_numpy(v, backend) for k, v in base.items()})
    model.add("task", Adapter.load(tmp_path))
    data = tree_map(lambda a: from_numpy(a, backend), batches(dtype))
    masked: list[Any] = []

    def follow(run: Run) -> None:
        if name == "adalora":  # step by step
            match(run.params, states[run.step - 1], TOLERANCE[dtype])
            masked.append(run.allocators["task"]["mask"])

    rule = adamw(RATE["lr"], weight_decay=RATE["weight_decay"])
    run = fit(model, loss, data, steps=STEPS, optimizer=rule, shuffle=False, callbacks=[follow])
    match(run.params, states[-1], rtol)
    if name == "adalora":
        want = hf.peft_config["default"].rank_pattern
        assert {f"{s}.lora_E.default": m for s, m in masked[-1].items()} == want
        assert sum(sum(m) for m in want.values()) == 6
        hf.save_pretrained(tmp_path / "theirs")
        model["task"].save(tmp_path / "ours")
        saved = [Adapter.load(tmp_path / who) for who in ("theirs", "ours")]
        assert saved[0].config.rank_pattern == saved[1].config.rank_pattern
        for (path, a), (_, b) in zip(leaves(saved[0].sites), leaves(saved[1].sites), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype], err_msg=str(path))
    else:
        np.testing.assert_allclose(run.losses, losses, rtol=rtol)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens(kind: str, dtype: str, library: str, tmp_path: Path) -> None:
    config = PROMPTS[kind]
    base = reference.prompt_model(replace(config, **SIZES))
    with reference.quietly():
        hf = peft.get_peft_model(base, reference.config_of(config, task_type="CAUSAL_LM")).to(
            getattr(torch, dtype)
        )
        hf.save_pretrained(tmp_path / "start")
    adapter = Adapter.load(tmp_path / "start")
    if kind in NETS:
        adapter = adapter.replace(shared=encoder_of(hf))
    rng = np.random.default_rng(2)
    turn = rng.normal(size=(8, 8) if kind in TABLES else (4, 4)).astype(dtype)
    rule = torch.optim.AdamW([p for p in hf.parameters() if p.requires_grad], **RATE)
    for _ in range(STEPS):
        made = hf.get_prompt(batch_size=2)
        if kind not in TABLES:
            cache = getattr(made, "self_attention_cache", made).layers
            made = torch.stack([a for layer in cache for a in (layer.keys, layer.values)])
        (torch.sin(made @ torch.tensor(turn)) ** 2).mean().backward()
        rule.step()
        rule.zero_grad()
    backend = resolve(library)
    model = PeftModel({"fc.weight": from_numpy(turn, backend)})
    model.add("task", adapter)

    def total(bound: Any, batch: Any) -> Any:
        p = bound.params["task"][""]
        xp = namespace(*p.values())
        if kind in TABLES:
            table = adapter.config.portable(p)["prompt_embeddings"]
        else:
            pairs = adapter.config.key_values(p, 2)
            table = xp.stack([a for pair in pairs for a in pair])
        return xp.mean(xp.sin(table @ batch) ** 2)

    ours = adamw(RATE["lr"], weight_decay=RATE["weight_decay"])
    run = fit(model, total, [from_numpy(turn, backend)], steps=STEPS, optimizer=ours)
    want = encoder_of(hf)
    if kind not in NETS:
        want = {"prompt_embeddings": want["embedding.weight"]}
    close({k: to_numpy(a) for k, a in run.params["task"][""].items()}, want, dtype)
    hf.save_pretrained(tmp_path / "theirs")
    model["task"].save(tmp_path / "ours")
    saved = [Adapter.load(tmp_path / who) for who in ("ours", "theirs")]
    assert saved[0].config == saved[1].config
    close(saved[0].shared, saved[1].shared, dtype)
    with reference.quietly():
        again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").to(getattr(torch, dtype))
    table = reference.host(again.prompt_encoder["default"].embedding.weight)
    single = saved[0].shared["prompt_embeddings"].astype("float32")  # as HF makes its table
    np.testing.assert_array_equal(table, single)


def encoder_of(hf: Any) -> dict[str, np.ndarray]:
    """What Hugging Face PEFT trains of a prompt, under its names."""
    trained = hf.prompt_encoder["default"].named_parameters()
    return {k: reference.host(p).copy() for k, p in trained}


def close(got: Any, want: Any, dtype: str) -> None:
    assert got.keys() == want.keys()
    for key, one in want.items():
        assert got[key].dtype == one.dtype
        bound = TOLERANCE[dtype] * np.max(np.abs(one))
        np.testing.assert_allclose(got[key], one, rtol=0, atol=bound, err_msg=key)


def test_lora_plus_with_a_rate_of_its_own_for_embeddings(tmp_path: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(11, N_IN), nn.Linear(N_IN, N_OUT)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(self.words(ids)))

    torch.manual_seed(0)
    net = Words().double()
    base = reference.state_of(net)
    config = LoraConfig(r=3, target_modules=["words", "fc"], init_lora_weights=False)
    with reference.quietly():
        hf = peft.get_peft_model(net, reference.config_of(config)).double()
        hf.save_pretrained(tmp_path)
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 4e-3}
    rule = create_loraplus_optimizer(hf, torch.optim.AdamW, loraplus_weight_decay=0.05, **rates)
    ids = np.random.default_rng(4).integers(0, 11, 20)
    for _ in range(STEPS):
        rule.zero_grad()
        (torch.sin(hf.base_model(torch.tensor(ids))) ** 2).mean().backward()
        rule.step()
    model = PeftModel(base, kinds={"words": "Embedding"})
    model.add("task", Adapter.load(tmp_path))

    def total(bound: Any, ids: Any) -> Any:
        y = bound.layers["fc"](np.tanh(bound.layers["words"](ids)))
        return np.mean(np.sin(y) ** 2)

    ours = lora_plus(adamw(1e-3, weight_decay=0.05), ratio=8.0, embedding_ratio=4.0)
    run = fit(model, total, [ids], steps=STEPS, optimizer=ours)
    state = {k: reference.host(p) for k, p in hf.named_parameters() if p.requires_grad}
    match(run.params, state, TOLERANCE["float64"])


DROPPING = {
    "lora": LoraConfig(r=3, lora_dropout=0.4, target_modules=BOTH),
    "dora": LoraConfig(r=3, lora_dropout=0.4, use_dora=True, target_modules=BOTH),
    "adalora": replace(CONFIGS["adalora"], lora_dropout=0.4),
    "vera": VeraConfig(r=6, vera_dropout=0.4, target_modules=BOTH),
    "loha": LoHaConfig(r=2, rank_dropout=0.4, target_modules=BOTH),
    "lokr": LoKrConfig(r=2, rank_dropout=0.4, target_modules=BOTH),
    "lokr-scaled": LoKrConfig(r=2, rank_dropout=0.4, rank_dropout_scale=True, target_modules=BOTH),
    "oft": OFTConfig(oft_block_size=4, module_dropout=0.5, target_modules=BOTH),
    "boft": BOFTConfig(boft_block_size=2, boft_dropout=0.5, target_modules=BOTH),
    "boft-2": BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5, target_modules=BOTH
    ),
}
SINGLE = {"boft", "boft-2", "lokr-scaled"}
"""Where Hugging Face PEFT's mask is in single precision."""


@pytest.mark.parametrize("name", DROPPING)
def test_dropout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our draws in the place of torch's, Hugging Face PEFT's layer gives the same."""
    hf, base = start(DROPPING[name], tmp_path, "float64")
    model = PeftModel(base)
    model.add("task", Adapter.load(tmp_path))
    x = np.random.default_rng(5).normal(size=(7, N_IN))
    noise = Noise.of((3, 1)).at("task/fc1")

    def thin(self: Any, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        if not self.training:
            return input
        return input * torch.tensor(noise.at("input").thinned(np.ones(x.shape), self.p))

    def rand(n: int) -> torch.Tensor:
        return torch.ones(1) if n == 1 else torch.tensor(noise.at("rank").host.random(n))

    stream = noise.host
    monkeypatch.setattr(nn.Dropout, "forward", thin)
    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "randint", lambda low, n, size: torch.tensor([stream.integers(n)]))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(stream.permutation(n)))
    with torch.no_grad():
        layer = hf.base_model.model.get_submodule("fc1")
        want = layer(torch.tensor(x)).numpy()
        plain = layer.eval()(torch.tensor(x)).numpy()
    got = model.bind(rng=(3, 1)).layers["fc1"](x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 if name in SINGLE else 1e-12)
    assert np.allclose(want, plain) == (name == "oft")

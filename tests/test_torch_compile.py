"""Adapted torch modules under `torch.compile`: one graph, and the same numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from peft_any.integrations.torch import attach  # noqa: E402
from peft_any.methods.lora import LoraConfig  # noqa: E402
from tests.cases import CASES  # noqa: E402
from tests.test_torch_modules import adapter_of, close, net_of  # noqa: E402
from tests.torch_layers import input_of  # noqa: E402

WHOLE = [
    "lora",
    "dora",
    "lora-embedding",
    "lora-conv2",
    "lora-attention",
    "lora-conv1d-transposed",
    "ia3-feedforward-regex",
    "loha",
    "oft",
    "boft",
    "road",
    "glora",
    "vblora",
    "ln-tuning",
]
"""Rows that compile to one graph."""
APART = ["fourierft", "waveft", "tokens"]
"""Rows whose method places values by numbers of the host: their layers run beside the graph."""
RANDOM = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)


def compiled(module: Any, engine: str = "eager", *, whole: bool = True) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend=engine, fullgraph=whole)


@pytest.mark.parametrize("name", [*WHOLE, *APART])
def test_a_layer_of_every_kind(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    net = net_of(case)
    attach(net, adapter_of(case, net))
    x = input_of(case.site, torch.float64)
    close(compiled(net, whole=name not in APART)(x), net(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_training_with_dropout(kind: str) -> None:
    """The compiled module draws what the plain one draws, and has its gradients."""
    layers = {"linear": (nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
              "conv": (nn.Conv1d(6, 5, 2), nn.Tanh(), nn.Conv1d(5, 3, 2))}  # fmt: skip
    net = nn.Sequential(*layers[kind]).double()
    task = attach(net, replace(RANDOM, lora_dropout=0.4), dtype="float64")
    x = torch.randn((4, 6, 6), dtype=torch.float64)
    got = []
    for run in (net, compiled(net)):
        torch.manual_seed(0)
        y = run(x)
        got.append([y.detach(), *torch.autograd.grad(y.sum(), [*task.parameters()])])
    for ours, plain in zip(*got, strict=True):
        close(ours, plain)


def test_switched_off_it_is_another_graph() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    task = attach(net, RANDOM)
    x, run = torch.randn(4, 6), compiled(net)
    adapted = run(x)
    with task.disabled():
        plain = run(x)
    assert not torch.allclose(adapted, plain)
    close(run(x), adapted, 0.0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own, of its insides
def test_machine_code() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    task = attach(net, replace(RANDOM, use_dora=True))
    x = torch.randn(4, 6)
    plain, fast = net(x), compiled(net, "inductor")(x)
    close(fast, plain, 1e-5)
    wanted = torch.autograd.grad(plain.sum(), [*task.parameters()])
    for g, want in zip(torch.autograd.grad(fast.sum(), [*task.parameters()]), wanted, strict=True):
        close(g, want, 1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_llama(*, dora: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    names = ["q_proj", "v_proj", "o_proj", "down_proj"]
    attach(llama, replace(RANDOM, target_modules=names, use_dora=dora))
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    run = compiled(lambda x: llama(x, use_cache=False).logits)
    close(run(ids), llama(ids).logits, 1e-5)

"""X-LoRA, live: the gate's scalings and the scaled experts are Hugging Face PEFT's."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

from peft.tuners.xlora.layer import XLoraLayer  # noqa: E402

from peft_any import Adapter, ConfigError, FormatError, PeftModel  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from peft_any.xlora import experts_of, load_xlora, xlora_of, xlora_scalings  # noqa: E402
from tests.hf.models import base_of, quietly  # noqa: E402
from tests.hf.test_experts import IDS, loaded, saved  # noqa: E402
from tests.hf.test_live import ROUNDING, compare  # noqa: E402

LAYERS = [
    f"model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("depth", "fields"),
    [
        (1, {"softmax_temperature": 0.5}),
        (2, {"layerwise_scalings": True, "top_k_lora": 2, "global_scaling_weight": 1.5}),
        (3, {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}),
    ],
)
def test_xlora_is_hfs(depth: int, fields: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    experts = saved(tmp_path, 3)
    base = base_of("llama").eval().to(getattr(torch, dtype))
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        xlora_depth=depth,
        xlora_size=8,
        adapters={str(i): path for i, path in enumerate(experts)},
        **fields,
    )
    with quietly(), torch.no_grad():
        theirs = peft.get_peft_model(base, config).eval().to(getattr(torch, dtype))
        want = theirs(IDS).logits
        gate = theirs.base_model.internal_xlora_classifier
        p = gate.state_dict()
        ours = base_of("llama").eval().to(getattr(torch, dtype))
        hidden = ours(IDS, output_hidden_states=True).hidden_states[-1]
        raw = {k: v for k, v in fields.items() if "top" not in k and "global" not in k}
        first = xlora_scalings(p, hidden, len(LAYERS), **raw)
        compare(
            {"s": first.numpy()},
            {"s": theirs.base_model.internal_xlora_scalings.numpy()},
            ROUNDING[dtype],
        )
        scalings = xlora_scalings(p, hidden, len(LAYERS), **fields)
        mixed = experts_of([loaded(path, dtype) for path in experts], order=LAYERS)
        plain = ours(IDS).logits
        with attach(ours, mixed).routed(scalings=scalings):
            got = ours(IDS).logits
    assert (want - plain).abs().max() > 0.01
    compare({"y": got.numpy()}, {"y": want.numpy()}, ROUNDING[dtype])


@pytest.mark.parametrize("again", [False, True])
def test_shares_of_any_size_are_hfs(again: bool) -> None:
    """A share among the largest acts however far it is below the first; 0 never does."""
    y = torch.tensor([[0.0, -900.0, -1000.0], [300.0, 0.0, -700.0], [0.0, 0.0, 0.0]])
    gate = SimpleNamespace(top_k_lora=2, enable_softmax_topk=again)
    layer = SimpleNamespace(config=gate, layer_number=0)
    want = XLoraLayer.get_maybe_topk_scalings(layer, y[None, :, None, :])[0]
    p = {"layers.0.weight": torch.eye(3), "layers.0.bias": torch.zeros(3)}
    fields = {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": again}
    got = xlora_scalings(p, y[None], 1, **fields)[0, :, 0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


FILES = ("adapter_config.json", "adapter_model.safetensors")
AGAIN = {"enable_softmax_topk": True, "enable_softmax": False}
GATES: dict[str, dict[str, Any]] = {
    "one": {"xlora_depth": 1, "softmax_temperature": 0.5},
    "no-dropout": {"xlora_depth": 2, "xlora_dropout_p": 0.0, "scaling_pass_value": 0.25},
    "layers": {"xlora_depth": 2, "layerwise_scalings": True, "top_k_lora": 2},
    "deep": {"xlora_depth": 3, "global_scaling_weight": 1.5, "use_trainable_adapters": True},
    # what is done to the gate's shares is done to those of the first pass, too
    "passing": {"scaling_pass_value": 0.25, "global_scaling_weight": 1.5, "top_k_lora": 2},
    "passing-again": {**AGAIN, "scaling_pass_value": -0.5, "top_k_lora": 3},
    "passing-nothing": {**AGAIN, "top_k_lora": 1},
}


def gated(experts: list[str], name: str = "default", **fields: Any) -> Any:
    """Let Hugging Face PEFT put a gate with trained-looking numbers over experts."""
    base = base_of("llama").eval()
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        xlora_size=8,
        adapters={str(i): path for i, path in enumerate(experts)},
        **fields,
    )
    with quietly():
        theirs = peft.get_peft_model(base, config, name).eval()
    draw = torch.Generator().manual_seed(5)
    for key, p in theirs.named_parameters():
        if "classifier" in key:
            p.data.copy_(torch.randn(p.shape, generator=draw))
    return theirs


def logits(adapter: Adapter) -> Any:
    """Apply an adapter to a plain model: once for the hidden states, once for the logits."""
    ours = base_of("llama").eval()
    task = attach(ours, adapter)
    with torch.no_grad():
        with task.routed(scalings=adapter.config.passing(adapter.shared, IDS.shape)):
            hidden = ours(IDS, output_hidden_states=True).hidden_states[-1]
        with task.routed(hidden=hidden):
            return ours(IDS).logits.numpy()


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("gate", [*GATES])
def test_what_hf_saves_is_read_and_what_we_save_hf_loads(
    gate: str, name: str, tmp_path: Path
) -> None:
    theirs = gated(saved(tmp_path, 3), name, **GATES[gate])
    with quietly(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "x")
        want = theirs(IDS).logits.numpy()
        plain = base_of("llama").eval()(IDS).logits.numpy()
    assert abs(want - plain).max() > 0.01
    folder = tmp_path / "x" / ("" if name == "default" else name)
    adapter = load_xlora(folder, order=LAYERS, backend="torch")
    net = theirs.base_model.internal_xlora_classifier.state_dict()
    assert {f"internal_xlora_classifier.{k}" for k in net} == adapter.shared.keys()
    compare({"y": logits(adapter)}, {"y": want}, ROUNDING["float32"])

    adapter.save(tmp_path / "again")
    assert (tmp_path / "again" / FILES[0]).read_bytes() == (folder / FILES[0]).read_bytes()
    Adapter.load(tmp_path / "again").save(tmp_path / "third")
    assert (tmp_path / "again" / FILES[1]).read_bytes() == (
        tmp_path / "third" / FILES[1]
    ).read_bytes()
    base = base_of("llama").eval()
    base.config.use_cache = False
    with quietly(), torch.no_grad():
        again = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
        compare({"y": again(IDS).logits.numpy()}, {"y": want}, ROUNDING["float32"])


def test_a_gate_that_hf_cut_down_needs_the_directories_beside_it(tmp_path: Path) -> None:
    theirs = gated(saved(tmp_path, 3), xlora_depth=2)
    with quietly():
        theirs.save_pretrained(tmp_path / "x")
    with pytest.raises(FormatError, match=r"expert that was saved along .*from its own directory"):
        Adapter.load(tmp_path / "x" / "1")
    for i in range(3):
        shutil.rmtree(tmp_path / "x" / str(i))
    with pytest.raises(FormatError, match=r"layers\.0: Hugging Face PEFT left .*selected_adapters"):
        Adapter.load(tmp_path / "x")


def test_experts_of_other_ranks_and_layers_stand_side_by_side(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1)
    for i, fields in enumerate(
        (
            {"r": 3, "target_modules": ["q_proj"], "use_rslora": True},
            {"r": 1, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        )
    ):
        with quietly():
            model = peft.get_peft_model(
                base_of("llama"), peft.LoraConfig(**fields, init_lora_weights=False)
            )
            model.save_pretrained(tmp_path / f"more{i}")
        paths.append(str(tmp_path / f"more{i}"))
    theirs = gated(paths, xlora_depth=2, layerwise_scalings=True)
    with quietly(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "x")
        want = theirs(IDS).logits.numpy()
    names = [name for name, _ in base_of("llama").named_modules()]
    adapter = load_xlora(tmp_path / "x", order=names, backend="torch")
    assert adapter.config.r == 3
    compare({"y": logits(adapter)}, {"y": want}, ROUNDING["float32"])
    with pytest.raises(ConfigError, match=r"layerwise_scalings has shares .*order="):
        logits(load_xlora(tmp_path / "x", backend="torch"))
    with pytest.raises(ConfigError, match=r"order: lacks .*embed_tokens among 7 layers"):
        load_xlora(tmp_path / "x", order=[])
    with pytest.raises(ConfigError, match="names 3 experts, and 1 are given"):
        load_xlora(tmp_path / "x", paths[:1])
    with pytest.raises(ConfigError, match="LORA is no X-LoRA"):
        load_xlora(paths[0])
    with pytest.raises(ConfigError, match=r"LoraConfig: is no gate"):
        xlora_of(Adapter.load(paths[0]), [])


def test_a_gate_alone_does_not_act(tmp_path: Path) -> None:
    experts = saved(tmp_path, 2)
    with quietly():
        gated(experts).save_pretrained(tmp_path / "x")
    weights = {k: v.numpy() for k, v in base_of("llama").state_dict().items()}
    with pytest.raises(ConfigError, match=r"cannot act without its 2 experts.*load_xlora"):
        PeftModel(weights).add("x", Adapter.load(tmp_path / "x"))
    model = PeftModel(weights)
    model.add("x", load_xlora(tmp_path / "x"))
    assert model["x"].num_parameters == 2 * 16 + 2
    with pytest.raises(ConfigError, match=r"XLORA cannot be merged: every token"):
        model.merge()
    with pytest.raises(ConfigError, match=r"needs the base's last hidden states"):
        model.bind().layers[LAYERS[0]](weights["model.embed_tokens.weight"])

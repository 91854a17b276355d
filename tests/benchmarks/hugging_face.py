"""The same merge and the same training step in Hugging Face PEFT, on torch's CPU.

PEFT runs BOFT with one butterfly factor here: more need its CUDA extension. That is less work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_any.io.config import config_to_dict
from peft_any.layer import Dense
from peft_any.method import Tuner


def layer_of(config: Tuner, base: Dense) -> Any:
    """Wrap a linear layer of the base's sizes, with parameters that look trained."""
    fields = config_to_dict(config) | {"target_modules": ["fc"], "inference_mode": False}
    fields = {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version")}
    if "feedforward_modules" in fields:
        fields["feedforward_modules"] = []
    if "total_step" in fields:
        fields["total_step"] = 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.nn.ModuleDict({"fc": torch.nn.Linear(base.site.n_in, base.site.n_out)})
        theirs = PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type](**fields)
        layer = peft.get_peft_model(model, theirs).base_model.model["fc"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return layer


def merge_of(config: Tuner, base: Dense) -> Callable[[], object]:
    """Give a call that merges the adapter of a linear layer into its weight, and undoes it not."""
    layer = layer_of(config, base)
    weight = layer.get_base_layer().weight

    def merge() -> object:
        with torch.no_grad():
            layer.merge()
            layer.merged_adapters.clear()
            return weight

    return merge


def step_of(config: Tuner, base: Dense, x: Any, target: Any) -> Callable[[], object]:
    """Give a call that trains the adapter of one linear layer by a step of AdamW."""
    layer = layer_of(config, base).train()
    inputs, wanted = torch.tensor(x), torch.tensor(target)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> object:
        optimizer.zero_grad()
        gap = layer(inputs) - wanted
        value = torch.mean(gap * gap)
        value.backward()
        optimizer.step()
        return value

    return step


def mixed_layer_of(model: Any, names: list[str]) -> Callable[[Any], object]:
    """Give the linear layer of a model's LoRAs as PEFT calls it with `adapter_names`.

    It has the model's own base, so that neither side finds it in the processor's caches alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = model.weights["fc.weight"].shape
        linear = torch.nn.Linear(size[1], size[0])
        for part, own in linear.named_parameters():
            own.data = model.weights[f"fc.{part}"]
        net: Any = torch.nn.ModuleDict({"fc": linear})
        for i, name in enumerate(model):
            config = peft.LoraConfig(r=model[name].config.r, target_modules=["fc"])
            if i:
                net.add_adapter(name, config)
            else:
                net = peft.get_peft_model(net, config, adapter_name=name)
    layer = net.eval().base_model.model["fc"]
    with torch.no_grad():
        for name in model:
            for factor, held in (("A", layer.lora_A), ("B", layer.lora_B)):
                held[name].weight.copy_(model[name].sites["fc"][f"lora_{factor}.weight"])

    def call(x: Any) -> object:
        with torch.no_grad():
            return layer(x, adapter_names=names)

    return call

"""The same merge in Hugging Face PEFT, on torch's CPU."""

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


def merge_of(config: Tuner, p: dict[str, Any], base: Dense) -> Callable[[], object]:
    """Give a call that merges the adapter of one linear layer into its weight, and undoes it not.

    A factor that Hugging Face PEFT cannot run on a CPU (more than one butterfly factor) is run
    with one factor, which is less work.
    """
    fields = config_to_dict(config) | {"target_modules": ["fc"]}
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
    weight = layer.get_base_layer().weight

    def merge() -> object:
        with torch.no_grad():
            layer.merge()
            layer.merged_adapters.clear()
            return weight

    return merge

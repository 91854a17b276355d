"""The methods measured, with the bounds set for each, and a layer to adapt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from peft_any.backend import resolve
from peft_any.layer import Dense, Site
from peft_any.method import Tuner
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lokr import LoKrConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.vera import VeraConfig
from peft_any.rng import Fresh


class Row(NamedTuple):
    """A method, and the most that its layer call may cost relative to the base's product."""

    name: str
    config: Tuner
    call: float | None


ROWS = [
    Row("LoRA r16", LoraConfig(r=16), 1.12),
    Row("DoRA r16", LoraConfig(r=16, use_dora=True), 1.35),
    Row("AdaLoRA r16", AdaLoraConfig(init_r=16, total_step=1000), None),
    Row("IA³", IA3Config(target_modules=["fc"], feedforward_modules=[]), 1.05),
    Row("LoKr r8", LoKrConfig(r=8), 1.45),
    Row("LoHa r16", LoHaConfig(r=16), 1.6),
    Row("OFT b32", OFTConfig(oft_block_size=32), 1.15),
    Row("BOFT b32 m3", BOFTConfig(boft_block_size=32, boft_n_butterfly_factor=3), 1.3),
    Row("VeRA r256", VeraConfig(r=256), 1.4),
]


def fitting(config: Tuner, n: int) -> Tuner:
    """Make the butterfly's blocks so small that a layer of `n` inputs has enough of them."""
    if isinstance(config, BOFTConfig):
        return replace(config, boft_block_size=min(config.boft_block_size, n // 8))
    return config


def adapted(config: Tuner, n: int) -> tuple[Tuner, dict[str, Any], Dense]:
    """Make a trained-looking adapter of an n × n layer."""
    rng = np.random.default_rng(0)
    site = Site("fc", n, n)
    weight = (rng.standard_normal((n, n)) / n**0.5).astype("float32")
    base = Dense(weight, rng.standard_normal(n).astype("float32"), site)
    config = fitting(config, n).at(site)
    new = Fresh(0, resolve("numpy"), key="fc", base=base)
    p = {**config.init_shared([site], new), **config.init(site, new)}
    for name in config.shapes(site):
        p[name] = (p[name] + 0.02 * rng.standard_normal(p[name].shape)).astype("float32")
    return config, p, base

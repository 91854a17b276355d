"""The methods compared with Hugging Face PEFT's, with the formulas one would write by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from peft_any.layer import Site
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.beft import BeftConfig
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.c3a import C3AConfig
from peft_any.methods.deft import DeftConfig
from peft_any.methods.delora import DeloraConfig
from peft_any.methods.fourierft import FourierFTConfig
from peft_any.methods.frod import FrodConfig
from peft_any.methods.glora import GloraConfig
from peft_any.methods.gralora import GraloraConfig
from peft_any.methods.hira import HiraConfig
from peft_any.methods.hra import HRAConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lily import LilyConfig
from peft_any.methods.ln_tuning import LNTuningConfig
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lokr import LoKrConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.miss import MissConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.osf import OSFConfig
from peft_any.methods.peanut import PeanutConfig
from peft_any.methods.poly import PolyConfig
from peft_any.methods.pvera import PveraConfig
from peft_any.methods.randlora import RandLoraConfig
from peft_any.methods.road import RoadConfig
from peft_any.methods.shira import ShiraConfig
from peft_any.methods.supertuning import SupertuningConfig
from peft_any.methods.trainable_tokens import TrainableTokensConfig
from peft_any.methods.unilora import UniLoraConfig
from peft_any.methods.vblora import VBLoRAConfig
from peft_any.methods.vera import VeraConfig
from peft_any.methods.waveft import WaveFTConfig
from tests.cases import Case, RoutedCase

Call = Callable[[Any], Any]
Hand = Callable[[Any, dict[str, Any], Any, Any], Call]
"""(config, parameters, weight, bias) to a call of x (rows, n), by NumPy alone."""
MOST = "at most, "
"""Before a column's name: what the least that a call or a merge can do would reach in it."""
TASKS = [0, 1]
"""Of a routed call's two sequences."""


class Compared(NamedTuple):
    """A method, and the times by which it is to be faster than Hugging Face PEFT.

    Attributes
    ----------
    name : str
    config : Tuner
    hand : callable, optional
        The formula by hand; None: a product with the merged weight.
    target : float
        Of HF PEFT ÷ ours, in every column but those of whole steps and calls: there it is 1.
    rank : int
        Of the product of two matrices that a merge has to form; 0 where it need not.
    """

    name: str
    config: Any
    hand: Hand | None = None
    target: float = 1.0
    rank: int = 0

    def case(self, n: int) -> Case:
        """Make a row of a layer (n, n)."""
        config = self.config
        if isinstance(config, TrainableTokensConfig):
            return Case(self.name, config, Site("fc", n, n, "Embedding", bias=False))
        if isinstance(config, PolyConfig | LilyConfig):
            routing = {"task_ids": TASKS} if isinstance(config, PolyConfig) else {}
            return RoutedCase(self.name, config, Site("fc", n, n), routing=routing)
        return Case(self.name, config, Site("fc", n, n))


def lora(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """LoRA, DoRA with its gain computed once."""
    down, up = p["lora_A.weight"].T, config.scaling * p["lora_B.weight"].T
    if not config.use_dora:
        return lambda x: x @ w.T + b + (x @ down) @ up
    gain = p["lora_magnitude_vector"] / np.linalg.norm(w + (down @ up).T, axis=1)
    return lambda x: (x @ w.T + (x @ down) @ up) * gain + b


def pair(up: str, down: str, scale: Callable[[Any], float] = lambda c: c.scaling) -> Hand:
    """Two factors."""

    def of(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
        left, right = scale(config) * p[up].T, p[down].T
        return lambda x: x @ w.T + b + (x @ right) @ left

    return of


def ia3(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """IA³ on outputs: HF's order, and its bias scaled too."""
    gain = p["ia3_l"].reshape(-1)
    return lambda x: (x @ w.T + b) * gain


def adalora(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """Two factors and a diagonal."""
    scale = config.lora_alpha / (config.init_r + 1e-5)
    right, left = (p["lora_A"] * p["lora_E"]).T, scale * p["lora_B"].T
    return lambda x: x @ w.T + b + (x @ right) @ left


def vera(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """Shared factors and two diagonals; PVeRA's mean alike."""
    r, own = config.r, type(config).__name__[:4].lower().rstrip("c")
    if own == "pver":
        a, bb, d, e = (p[f"pvera_{k}"] for k in ("A", "B", "lambda_d", "lambda_b"))
    else:
        a, bb, d, e = (p[f"vera_{k}"] for k in ("A", "B", "lambda_d", "lambda_b"))
    right, left = a[:r].T * d[:r], bb.T * e
    return lambda x: x @ w.T + b + (x @ right) @ left


def beft(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """Another bias."""
    shift = b + p["beft_bias"].reshape(-1)
    return lambda x: x @ w.T + shift


def delora(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """Two factors of unit vectors."""
    a, bb = p["delora_A"], p["delora_B"]
    scale = p["delora_lambda"] / config.r / np.linalg.norm(a, axis=1) / np.linalg.norm(bb, axis=0)
    right, left = (a * p["delora_w_norm"]).T, (bb * scale).T
    return lambda x: x @ w.T + b + (x @ right) @ left


def hra(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """Two products with U, and the base's."""
    u = p["hra_u"] / np.linalg.norm(p["hra_u"], axis=0)
    eye = 0.5 * np.eye(u.shape[1], dtype=u.dtype)
    left = (u @ np.linalg.inv(eye + np.triu(u.T @ u, 1))).T
    return lambda x: (x - (x @ u) @ left) @ w.T + b


def miss(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """A sum of shards."""
    return lambda x: x @ w.T + b + x.reshape(len(x), -1, config.r).sum(axis=1) @ p["miss_block"]


def road(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """A rotation of pairs of outputs."""
    half = config.group_size // 2
    theta, alpha = (p[k].reshape(-1, half) for k in ("road_theta", "road_alpha"))
    cos, sin = alpha * np.cos(theta), alpha * np.sin(theta)

    def call(x: Any) -> Any:
        y = (x @ w.T + b).reshape(len(x), -1, 2, half)
        u, v = y[:, :, 0], y[:, :, 1]
        return np.stack([u * cos - v * sin, v * cos + u * sin], axis=2).reshape(len(x), -1)

    return call


def oft(config: Any, p: dict[str, Any], w: Any, b: Any) -> Call:
    """Blocks turn the input."""
    size = config.oft_block_size
    upper = np.zeros((p["oft_R.weight"].shape[0], size, size), p["oft_R.weight"].dtype)
    upper[:, *np.triu_indices(size, 1)] = p["oft_R.weight"]
    q, eye = upper - upper.transpose(0, 2, 1), np.eye(size, dtype=upper.dtype)
    r = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q

    def call(x: Any) -> Any:
        blocks = x.T.reshape(-1, size, len(x))
        return (r.transpose(0, 2, 1) @ blocks).reshape(-1, len(x)).T @ w.T + b

    return call


N, BATCH = 2048, 256
COMPARED = [
    Compared("LoRA r16", LoraConfig(r=16), lora),
    Compared("DoRA r16", LoraConfig(r=16, use_dora=True), lora),
    Compared("AdaLoRA r16", AdaLoraConfig(init_r=16, total_step=1000), adalora),
    Compared("BEFT", BeftConfig(), beft),
    Compared("BOFT b32", BOFTConfig(boft_block_size=32), target=10),
    Compared("C3A b256", C3AConfig(), target=5),
    Compared("DEFT r8", DeftConfig(alpha=8)),
    Compared("DeLoRA r8", DeloraConfig(), delora),
    Compared("FourierFT 1000", FourierFTConfig(), target=5),
    Compared("GLoRA r8", GloraConfig()),
    Compared("GraLoRA r32", GraloraConfig()),
    Compared("HiRA r32", HiraConfig(r=32)),
    Compared("HRA r8", HRAConfig(), hra, 5),
    Compared("IA³", IA3Config(target_modules=["fc"], feedforward_modules=[]), ia3),
    Compared("Lily r16", LilyConfig(r=16)),
    Compared("LN tuning", LNTuningConfig()),
    Compared("LoHa r16", LoHaConfig(r=16)),
    Compared("LoKr r8", LoKrConfig(r=8)),
    Compared("MiSS r64", MissConfig(r=64), miss),
    Compared("MiSS bat r64", MissConfig(r=64, init_weights="bat")),
    Compared("OFT b32", OFTConfig(oft_block_size=32), oft, 10),
    Compared("FRoD", FrodConfig()),
    Compared("OSF", OSFConfig(), rank=N),
    Compared("PEANuT r32", PeanutConfig()),
    Compared("Poly r8, 4 skills", PolyConfig(n_tasks=2)),
    Compared("PVeRA r256", PveraConfig(), vera, rank=256),
    Compared("RandLoRA r32", RandLoraConfig(r=32), target=5, rank=N),
    Compared("RoAd", RoadConfig(), road),
    Compared("SHiRA r32", ShiraConfig()),
    Compared("Super-Tuning", SupertuningConfig()),
    Compared("trainable tokens", TrainableTokensConfig(token_indices=list(range(64)))),
    Compared("UniLoRA r4", UniLoraConfig(r=4, theta_d_length=256)),
    Compared("VB-LoRA r4", VBLoRAConfig()),
    Compared("VeRA r256", VeraConfig(), vera, rank=256),
    Compared("WaveFT 2592", WaveFTConfig(), target=5),
]
"""With Hugging Face PEFT's defaults, but for ranks that make methods comparable."""

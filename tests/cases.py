"""THE table: one row for every method, flag and layer kind; all laws run over it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from peft_any import testing
from peft_any.layer import Site
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.adamss import AdamssConfig
from peft_any.methods.adaption_prompt import AdaptionPromptConfig
from peft_any.methods.beft import BeftConfig
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.c3a import C3AConfig
from peft_any.methods.cartridge import CartridgeConfig
from peft_any.methods.cpt import CPTConfig
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
from peft_any.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.osf import OSFConfig
from peft_any.methods.p_tuning import PromptEncoderConfig
from peft_any.methods.peanut import PeanutConfig
from peft_any.methods.poly import PolyConfig
from peft_any.methods.prefix_tuning import PrefixTuningConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.methods.psoft import PsoftConfig
from peft_any.methods.pvera import PveraConfig
from peft_any.methods.randlora import RandLoraConfig
from peft_any.methods.road import RoadConfig
from peft_any.methods.shira import ShiraConfig
from peft_any.methods.supertuning import SupertuningConfig
from peft_any.methods.tinylora import TinyLoraConfig
from peft_any.methods.trainable_tokens import TrainableTokensConfig
from peft_any.methods.unilora import UniLoraConfig
from peft_any.methods.vblora import VBLoRAConfig
from peft_any.methods.vera import VeraConfig
from peft_any.methods.waveft import WaveFTConfig
from peft_any.methods.xlora import XLoraConfig
from peft_any.testing import prompting
from peft_any.variants import BdLoraConfig, KasaConfig

SINGLE = {"C3A", "DEFT", "FOURIERFT", "FROD", "OSF"}
"""Methods that Hugging Face PEFT computes in float32, whatever the dtypes."""


@dataclass(frozen=True)
class Case(testing.Case):
    """One row; its name is also that of its golden file.

    Attributes
    ----------
    hf : str or None
        Why Hugging Face PEFT has no such case; None: it has, and a golden file holds its result.
    """

    hf: str | None = None

    @property
    def single(self) -> bool:
        """Whether Hugging Face PEFT computes it in float32, even where all is float64."""
        config = self.config
        kasa = getattr(config, "kasa_config", None)
        # Torch's normal numbers are drawn in it, alike to 1e-6.
        drawn = config.peft_type == "TINYLORA" and not config.save_projection
        return config.peft_type in SINGLE or kasa is not None or drawn


RANDOM = "HF's init_weights=False draws every factor"
DRAWN = "its initial values are random in HF too"
TURNED = "HF's init_weights=False draws the rotation"
KASA = "it takes the smallest singular values out of the base"
FC = Site("fc", 12, 32)
UP = Site("up", 12, 32)
MASK = [True, False, False, True, True, False]
WTE = Site("wte", 11, 8, "Embedding", bias=False)
FACTORS = "compared live; its file would be too large"
# Truncated Cayley loses length in planes of singular value 1: the default K = 5 may come near.
TRUNCATED = 3000.0
LOUD: dict[str, Any] = {"init_vector_bank_bound": 1.0}
WHOLE = "compared live, on whole models"
HIDDEN = np.random.default_rng(7).standard_normal((2, 3, 5))
HARD = "HF initialises every vector at random"

CASES = [
    Case("lora", LoraConfig(r=4, lora_alpha=10), FC),
    Case("lora-no-bias", LoraConfig(r=3), Site("a.fc", 13, 7, bias=False)),
    Case("lora-rank-above-size", LoraConfig(r=16), Site("fc", 5, 3)),
    Case("rslora", LoraConfig(r=5, lora_alpha=3, use_rslora=True), FC),
    Case("lora-bias", LoraConfig(r=2, lora_bias=True), FC),
    Case("lora-pattern", LoraConfig(r=2, rank_pattern={"fc": 3}, alpha_pattern={"f.": 7}), FC),
    Case("lora-gaussian", LoraConfig(r=4, init_lora_weights="gaussian"), FC),
    Case("lora-random", LoraConfig(r=4, init_lora_weights=False), FC, identity=RANDOM),
    Case("lora-orthogonal", LoraConfig(r=4, init_lora_weights="orthogonal"), FC),
    Case("pissa", LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa"), FC),
    Case("pissa-niter", LoraConfig(r=4, init_lora_weights="pissa_niter_3"), FC),
    Case("pissa-rslora", LoraConfig(r=4, use_rslora=True, init_lora_weights="pissa"), FC),
    Case("olora", LoraConfig(r=4, lora_alpha=2, init_lora_weights="olora"), FC),
    Case(
        "lora-conv1d-transposed", LoraConfig(r=4, fan_in_fan_out=True), Site("fc", 6, 9, "Conv1D")
    ),
    Case("lora-embedding", LoraConfig(r=4), Site("wte", 11, 6, "Embedding", bias=False)),
    Case("lora-conv1", LoraConfig(r=3), Site("c", 5, 7, "Conv1d", (3,))),
    Case("lora-conv2", LoraConfig(r=3), Site("c", 5, 7, "Conv2d", (3, 2))),
    Case("lora-conv2-1x1", LoraConfig(r=3), Site("c", 5, 7, "Conv2d", (1, 1), bias=False)),
    Case("lora-conv3", LoraConfig(r=3, use_rslora=True), Site("c", 2, 3, "Conv3d", (3, 2, 2))),
    Case("lora-attention", LoraConfig(r=3), Site("attn", 6, 18, "MultiheadAttention")),
    Case(
        "lora-experts",
        LoraConfig(r=2, target_parameters=["experts.up"]),
        Site("m.experts.up", 12, 20, "Experts", groups=4, bias=False),
    ),
    Case(
        "lora-experts-pattern",
        LoraConfig(
            r=4,
            lora_alpha=6,
            init_lora_weights=False,
            rank_pattern={"experts.up": 1},
            alpha_pattern={"experts.up": 3},
            target_parameters=["experts.up"],
        ),
        Site("m.experts.up", 6, 9, "Experts", groups=3, bias=False),
        identity=RANDOM,
    ),
    Case(
        "lora-parameter",
        LoraConfig(r=3, use_rslora=True, target_parameters=["fc.weight"]),
        Site("a.fc", 13, 7),
    ),
    Case(
        "lora-experts-transposed",
        LoraConfig(r=3, use_rslora=True, target_parameters=["experts.up"]),
        Site("m.experts.up", 12, 8, "TransposedExperts", groups=2, bias=False),
    ),
    Case(
        "bdlora-a",
        LoraConfig(
            r=4, lora_alpha=10, use_bdlora=BdLoraConfig(target_modules_bd_a=["f"], nblocks=2)
        ),
        FC,
    ),
    Case(
        "bdlora-b",
        LoraConfig(
            r=6,
            use_rslora=True,
            init_lora_weights=False,
            use_bdlora=BdLoraConfig(target_modules_bd_b=["a."], nblocks=3),
        ),
        Site("a.fc", 13, 9, bias=False),
    ),
    Case(
        "bdlora-neither",
        LoraConfig(r=3, use_bdlora=BdLoraConfig(nblocks=4, match_strict=False)),
        Site("a.fc", 13, 7),
    ),
    Case("mica", LoraConfig(r=4, lora_alpha=10, init_lora_weights="mica"), FC),
    Case(
        "mica-conv1d-transposed",
        LoraConfig(r=3, fan_in_fan_out=True, init_lora_weights="mica"),
        Site("fc", 6, 9, "Conv1D"),
    ),
    Case("mica-embedding", LoraConfig(r=4, init_lora_weights="mica"), WTE),
    Case("kasa", LoraConfig(r=4, lora_alpha=10, kasa_config=KasaConfig()), FC, KASA),
    Case(
        "kasa-rslora",
        LoraConfig(r=2, use_rslora=True, kasa_config=KasaConfig(beta=0.5, gamma=0)),
        Site("a.fc", 13, 7, bias=False),
        KASA,
    ),
    Case(
        "kasa-pattern",
        LoraConfig(r=9, rank_pattern={"fc": 3}, kasa_config=KasaConfig(), init_lora_weights=False),
        FC,
        KASA,
    ),
    Case("dora", LoraConfig(r=4, lora_alpha=10, use_dora=True), FC, reverts=0),
    Case("dora-no-bias", LoraConfig(r=3, use_dora=True), Site("fc", 13, 7, bias=False), reverts=0),
    Case("dora-rslora", LoraConfig(r=4, use_dora=True, use_rslora=True), FC, reverts=0),
    Case(
        "dora-conv1d-transposed",
        LoraConfig(r=4, use_dora=True, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        reverts=0,
    ),
    Case(
        "dora-embedding",
        LoraConfig(r=4, use_dora=True),
        Site("wte", 11, 6, "Embedding", bias=False),
        reverts=0,
    ),
    Case(
        "dora-conv2", LoraConfig(r=3, use_dora=True), Site("c", 5, 7, "Conv2d", (3, 3)), reverts=0
    ),
    Case("dora-pissa", LoraConfig(r=3, use_dora=True, init_lora_weights="pissa"), FC, reverts=0),
    # AdaLoRA
    Case("adalora", AdaLoraConfig(init_r=4, target_r=2, lora_alpha=10, total_step=10), FC),
    Case("adalora-default-ranks", AdaLoraConfig(total_step=10, tinit=2, tfinal=3, deltaT=2), FC),
    Case("adalora-no-bias", AdaLoraConfig(init_r=3, total_step=9), Site("a.fc", 13, 7, bias=False)),
    Case("adalora-rank-above-size", AdaLoraConfig(init_r=16, total_step=9), Site("fc", 5, 3)),
    Case(
        "adalora-pruned",
        AdaLoraConfig(init_r=6, total_step=9, rank_pattern={"a.fc.lora_E": MASK}),
        Site("a.fc", 13, 7),
    ),
    Case(
        "adalora-alpha-zero",  # the scale is then kept/(init_r + 1e-5)
        AdaLoraConfig(init_r=6, lora_alpha=0, total_step=9, rank_pattern={"fc.lora_E": MASK}),
        FC,
    ),
    Case(
        "adalora-ignored-fields",
        AdaLoraConfig(init_r=3, r=5, use_rslora=True, alpha_pattern={"fc": 99}, total_step=9),
        FC,
    ),
    Case(
        "adalora-random",
        AdaLoraConfig(init_r=4, init_lora_weights=False, total_step=9),
        FC,
        identity=RANDOM,
    ),
    Case(
        "adalora-conv1d-transposed",
        AdaLoraConfig(init_r=4, fan_in_fan_out=True, total_step=9),
        Site("fc", 6, 9, "Conv1D"),
    ),
    Case("adalora-conv2", AdaLoraConfig(init_r=3, total_step=9), Site("c", 5, 7, "Conv2d", (3, 2))),
    Case(
        "adalora-conv2-1x1",
        AdaLoraConfig(init_r=3, total_step=9),
        Site("c", 5, 7, "Conv2d", (1, 1), bias=False),
    ),
    Case(
        "adalora-emptied",  # all triplets pruned: ΔW = 0
        AdaLoraConfig(init_r=2, total_step=9, rank_pattern={"fc.lora_E": [False, False]}),
        FC,
    ),
    # IA³
    Case("ia3", IA3Config(), FC, reverts=3),
    Case("ia3-no-bias", IA3Config(), Site("a.fc", 13, 7, bias=False), reverts=3),
    Case("ia3-feedforward", IA3Config(feedforward_modules=["fc"]), FC, reverts=3),
    Case(
        "ia3-feedforward-regex",
        IA3Config(feedforward_modules=r"a\.f."),
        Site("a.fc", 13, 7),
        reverts=3,
    ),
    Case(
        "ia3-regex-not-in-full",
        IA3Config(feedforward_modules=r"fc"),
        Site("a.fc", 13, 7),
        reverts=3,
    ),
    Case(
        "ia3-undotted-suffix",
        IA3Config(target_modules=r"a\.two", feedforward_modules=["wo"]),
        Site("a.two", 13, 7),
        reverts=3,
    ),
    Case("ia3-random", IA3Config(init_ia3_weights=False), FC, identity=HARD, reverts=3),
    Case(
        "ia3-conv1d-transposed",
        IA3Config(fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        reverts=3,
    ),
    Case(
        "ia3-conv1d-transposed-feedforward",
        IA3Config(feedforward_modules=["fc"], fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        reverts=3,
    ),
    Case("ia3-conv2", IA3Config(), Site("c", 5, 7, "Conv2d", (3, 2)), reverts=3),
    Case(
        "ia3-conv2-feedforward",
        IA3Config(feedforward_modules=["c"]),
        Site("c", 5, 7, "Conv2d", (3, 2)),
        reverts=3,
    ),
    Case("ia3-conv2-groups", IA3Config(), Site("c", 6, 9, "Conv2d", (2, 2), groups=3), reverts=3),
    Case(
        "ia3-conv2-groups-feedforward",
        IA3Config(feedforward_modules=["c"]),
        Site("c", 6, 9, "Conv2d", (2, 2), groups=3),
        reverts=3,
    ),
    Case(
        "ia3-conv2-depthwise",
        IA3Config(feedforward_modules=["c"]),
        Site("c", 5, 5, "Conv2d", (3, 3), groups=5),
        reverts=3,
    ),
    Case("ia3-conv3", IA3Config(), Site("c", 2, 3, "Conv3d", (3, 2, 1), bias=False), reverts=3),
    Case(
        "ia3-conv3-feedforward",
        IA3Config(feedforward_modules=["c"]),
        Site("c", 2, 3, "Conv3d", (3, 2, 1)),
        reverts=3,
    ),
    # LoHa
    Case("loha", LoHaConfig(r=3, alpha=10), FC),
    Case("loha-no-bias", LoHaConfig(r=2), Site("a.fc", 13, 7, bias=False)),
    Case("loha-rank-above-size", LoHaConfig(r=16), Site("fc", 5, 3)),
    Case("loha-rank-1-wide", LoHaConfig(r=1), Site("fc", 61, 53)),  # Khatri-Rao in every call
    Case("loha-pattern", LoHaConfig(r=2, rank_pattern={"fc": 3}, alpha_pattern={"f.": 7}), FC),
    Case("loha-random", LoHaConfig(r=3, init_weights=False), FC, identity=RANDOM),
    Case("loha-conv1", LoHaConfig(r=3), Site("c", 5, 7, "Conv1d", (3,))),
    Case(
        "loha-conv1-effective",
        LoHaConfig(r=3, use_effective_conv2d=True),
        Site("c", 5, 7, "Conv1d", (4,)),
    ),
    Case(
        "loha-conv1-kernel-1",
        LoHaConfig(r=3, use_effective_conv2d=True),
        Site("c", 5, 7, "Conv1d", (1,)),
    ),
    Case("loha-conv2", LoHaConfig(r=3), Site("c", 5, 7, "Conv2d", (3, 2))),
    Case(
        "loha-conv2-effective",
        LoHaConfig(r=3, use_effective_conv2d=True),
        Site("c", 5, 7, "Conv2d", (3, 2)),
    ),
    Case(
        "loha-conv2-effective-1xk",
        LoHaConfig(r=2, use_effective_conv2d=True),
        Site("c", 5, 7, "Conv2d", (1, 3)),
    ),
    Case(
        "loha-conv2-1x1",
        LoHaConfig(r=3, use_effective_conv2d=True),
        Site("c", 5, 7, "Conv2d", (1, 1)),
    ),
    Case("loha-conv2-groups", LoHaConfig(r=2), Site("c", 6, 9, "Conv2d", (2, 2), groups=3)),
    Case(
        "loha-conv2-groups-effective",
        LoHaConfig(r=2, use_effective_conv2d=True),
        Site("c", 6, 9, "Conv2d", (2, 2), groups=3),
    ),
    Case("loha-linear-effective", LoHaConfig(r=2, use_effective_conv2d=True), FC),
    # LoKr: w1 and w2 whole or as factors
    Case("lokr", LoKrConfig(r=8, alpha=3), FC),  # both whole
    Case("lokr-low-rank", LoKrConfig(r=1, alpha=2), Site("fc", 14, 22)),  # w2 as factors
    Case("lokr-both", LoKrConfig(r=1, decompose_both=True), Site("fc", 12, 40)),  # both as factors
    Case(
        "lokr-left-only",
        LoKrConfig(r=4, decompose_both=True, decompose_factor=9),
        Site("fc", 18, 27),
    ),
    Case("lokr-primes", LoKrConfig(r=3), Site("fc", 13, 7, bias=False)),  # w1 is 1×1
    Case("lokr-factor", LoKrConfig(r=1, decompose_factor=4), Site("fc", 12, 32)),
    Case(
        "lokr-factor-above-root", LoKrConfig(r=3, decompose_factor=8), Site("fc", 16, 24)
    ),  # l > k
    Case("lokr-factor-not-dividing", LoKrConfig(r=2, decompose_factor=5), Site("fc", 12, 32)),
    Case("lokr-factor-whole", LoKrConfig(r=2, decompose_factor=6), Site("fc", 6, 6)),  # w2 is 1×1
    Case("lokr-tall", LoKrConfig(r=2), Site("fc", 7, 60)),
    Case("lokr-wide-columns", LoKrConfig(r=40), Site("fc", 36, 272)),  # stacked products of w1
    Case(
        "lokr-pattern",
        LoKrConfig(r=9, rank_pattern={"fc": 1}, alpha_pattern={"f.": 7}),
        Site("fc", 14, 22),
    ),
    Case("lokr-random", LoKrConfig(r=2, init_weights=False), FC, identity=RANDOM),
    Case("lokr-lycoris", LoKrConfig(r=8, init_weights="lycoris"), FC),
    Case("lokr-lycoris-low-rank", LoKrConfig(r=1, init_weights="lycoris"), Site("fc", 14, 22)),
    Case("lokr-conv1", LoKrConfig(r=8), Site("c", 6, 10, "Conv1d", (3,))),  # HF's scrambled order
    Case("lokr-conv1-kernel-1", LoKrConfig(r=8), Site("c", 6, 10, "Conv1d", (1,))),  # likewise
    Case("lokr-conv1-low-rank", LoKrConfig(r=1), Site("c", 6, 10, "Conv1d", (3,))),
    Case(
        "lokr-conv1-effective",
        LoKrConfig(r=2, use_effective_conv2d=True),
        Site("c", 22, 15, "Conv1d", (3,)),
    ),
    Case(
        "lokr-conv1-effective-rank-1",
        LoKrConfig(r=1, use_effective_conv2d=True),
        Site("c", 6, 10, "Conv1d", (3,)),
        hf="torch.kron fails on the strides of HF's tensors of rank 1",
    ),
    Case("lokr-conv2", LoKrConfig(r=8), Site("c", 6, 10, "Conv2d", (3, 2))),
    Case("lokr-conv2-low-rank", LoKrConfig(r=1), Site("c", 6, 10, "Conv2d", (3, 2))),
    Case(
        "lokr-conv2-both",
        LoKrConfig(r=1, decompose_both=True),
        Site("c", 12, 40, "Conv2d", (3, 2), bias=False),
    ),
    Case(
        "lokr-conv2-effective",
        LoKrConfig(r=1, use_effective_conv2d=True),
        Site("c", 6, 10, "Conv2d", (3, 2)),
    ),
    Case(
        "lokr-conv2-1x1",
        LoKrConfig(r=1, use_effective_conv2d=True),
        Site("c", 6, 10, "Conv2d", (1, 1)),
    ),
    Case("lokr-conv2-groups", LoKrConfig(r=1), Site("c", 12, 9, "Conv2d", (2, 2), groups=3)),
    Case(
        "lokr-conv2-groups-effective",
        LoKrConfig(r=1, use_effective_conv2d=True),
        Site("c", 12, 9, "Conv2d", (2, 2), groups=3),
    ),
    # VeRA
    Case("vera", VeraConfig(r=5), FC),
    Case("vera-no-bias", VeraConfig(r=3, d_initial=0.5), Site("a.fc", 13, 7, bias=False)),
    Case("vera-rank-above-size", VeraConfig(r=40, projection_prng_key=7), Site("fc", 5, 3)),
    Case("vera-regenerated", VeraConfig(r=4, save_projection=False, projection_prng_key=12345), FC),
    Case("vera-random", VeraConfig(r=4, init_weights=False), FC, identity=RANDOM),
    Case(
        "vera-conv1d-transposed", VeraConfig(r=4, fan_in_fan_out=True), Site("fc", 6, 9, "Conv1D")
    ),
    Case("oft", OFTConfig(oft_block_size=4), FC, reverts=TRUNCATED),
    Case(
        "oft-no-bias",
        OFTConfig(oft_block_size=3),
        Site("a.fc", 15, 7, bias=False),
        reverts=TRUNCATED,
    ),
    Case("oft-r", OFTConfig(r=4, oft_block_size=0), FC, reverts=TRUNCATED),
    Case("oft-block-above-size", OFTConfig(num_cayley_neumann_terms=2), Site("fc", 6, 5)),
    Case("oft-block-no-divisor", OFTConfig(oft_block_size=5), FC, reverts=TRUNCATED),  # 4, not 6
    Case(
        "oft-r-no-divisor", OFTConfig(r=5, oft_block_size=0), FC, reverts=TRUNCATED
    ),  # 4 blocks of 3
    Case("oft-prime", OFTConfig(oft_block_size=5), Site("fc", 13, 7)),  # blocks of 1: no rotation
    Case(
        "oft-1-term",
        OFTConfig(oft_block_size=4, num_cayley_neumann_terms=1),  # no rotation
        FC,
        idle=("oft_R.weight",),
    ),
    Case("oft-3-terms", OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3), FC),
    Case("oft-8-terms", OFTConfig(oft_block_size=4, num_cayley_neumann_terms=8), FC),
    Case("oft-exact", OFTConfig(oft_block_size=4, use_cayley_neumann=False), FC),
    Case(
        "oft-exact-odd",
        OFTConfig(oft_block_size=19, use_cayley_neumann=False),
        Site("fc", 57, 5, bias=False),
        reverts=40,
    ),
    Case("oft-share", OFTConfig(oft_block_size=4, block_share=True), FC, reverts=TRUNCATED),
    Case(
        "oft-share-exact-r",
        OFTConfig(r=3, oft_block_size=0, block_share=True, use_cayley_neumann=False),
        FC,
    ),
    Case("oft-coft", OFTConfig(oft_block_size=4, coft=True, eps=0.9), FC),
    Case("oft-coft-eps", OFTConfig(oft_block_size=4, coft=True), FC),
    Case(
        "oft-coft-share-exact",
        OFTConfig(oft_block_size=4, coft=True, eps=0.3, block_share=True, use_cayley_neumann=False),
        FC,
    ),
    Case(
        "oft-random",
        OFTConfig(oft_block_size=4, init_weights=False),
        FC,
        identity=RANDOM,
        reverts=TRUNCATED,
    ),
    # HF sums overlapping patches: its fresh convolution is not the identity, nor its own merge.
    Case(
        "oft-conv2",
        OFTConfig(oft_block_size=3),
        Site("c", 4, 5, "Conv2d", (3, 3)),
        reverts=TRUNCATED,
    ),
    Case(
        "oft-conv2-exact-r",
        OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False),
        Site("c", 4, 5, "Conv2d", (3, 3), bias=False),
    ),
    Case(
        "oft-conv2-1x1",
        OFTConfig(oft_block_size=2),
        Site("c", 6, 5, "Conv2d", (1, 1)),
        reverts=TRUNCATED,
    ),
    Case("oft-embedding", OFTConfig(oft_block_size=4), WTE, reverts=TRUNCATED),
    Case(
        "oft-embedding-share-exact",
        OFTConfig(r=2, oft_block_size=0, block_share=True, use_cayley_neumann=False),
        WTE,
    ),
    Case("boft", BOFTConfig(), FC),
    Case("boft-odd-blocks", BOFTConfig(boft_block_size=3), Site("a.fc", 15, 7, bias=False)),
    Case("boft-num", BOFTConfig(boft_block_size=0, boft_block_num=2), Site("fc", 22, 7)),
    Case("boft-one-block", BOFTConfig(boft_block_size=0, boft_block_num=1), Site("fc", 21, 7)),
    Case("boft-2-factors", BOFTConfig(boft_n_butterfly_factor=2), Site("fc", 24, 7)),
    Case(
        "boft-4-factors",  # of b/2 = 1, fused to blocks of 16
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=4),
        Site("fc", 48, 5, bias=False),
        reverts=40,
    ),
    Case(
        "boft-3-factors-apart",  # too wide to fuse all: 64 and 128 fuse, the third stays alone
        BOFTConfig(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=3),
        Site("fc", 256, 3),
        reverts=60,
        hf=FACTORS,
    ),
    Case("boft-random", BOFTConfig(init_weights=False), FC, identity=RANDOM),
    Case("boft-conv2", BOFTConfig(boft_block_size=6), Site("c", 4, 5, "Conv2d", (3, 3))),
    Case(
        "boft-conv2-factors",
        BOFTConfig(boft_block_size=6, boft_n_butterfly_factor=2),
        Site("c", 4, 5, "Conv2d", (3, 3), bias=False),
    ),
    # BEFT
    Case("beft", BeftConfig(), FC),
    Case("beft-random", BeftConfig(init_weights=False), FC, identity=RANDOM),
    # C3A
    Case("c3a", C3AConfig(block_size=4), FC, identity=DRAWN),
    Case("c3a-zero", C3AConfig(block_size=2, init_weights=True), Site("a.fc", 14, 6, bias=False)),
    Case("c3a-odd", C3AConfig(block_size=3, init_weights="gaussian"), Site("fc", 12, 6), DRAWN),
    Case(
        "c3a-pattern",
        C3AConfig(block_size=5, block_size_pattern={"fc": 6}, init_weights="kaiming_uniform"),
        Site("fc", 12, 18),
        identity=DRAWN,
    ),
    # DEFT; at sites where no entry of P is so near 0 that a difference crosses relu's kink
    Case("deft", DeftConfig(r=4), UP, reverts=0),
    Case("deft-alpha", DeftConfig(r=4, alpha=6), Site("a.fc", 13, 7, bias=False), reverts=0),
    Case("deft-qr", DeftConfig(r=3, decomposition_method="qr"), UP, reverts=0),
    Case("deft-rank-above-size", DeftConfig(r=9), Site("up", 12, 5), reverts=0),
    Case("deft-random", DeftConfig(r=4, init_weights=False), UP, identity=RANDOM, reverts=0),
    Case("deft-scale", DeftConfig(r=4, init_weights=False, init_scale=3.0), UP, RANDOM, reverts=0),
    Case("deft-para", DeftConfig(r=4, para=True), UP, identity="it removes a subspace", reverts=0),
    Case(
        "deft-conv1d-transposed",
        DeftConfig(r=3, fan_in_fan_out=True),
        Site("up", 6, 9, "Conv1D"),
        reverts=0,
    ),
    # DeLoRA
    Case("delora", DeloraConfig(r=4), FC, reverts=60),
    Case(
        "delora-pattern",
        DeloraConfig(r=2, rank_pattern={"fc": 3}, lambda_pattern={"f.": 7}),
        Site("a.fc", 13, 7, bias=False),
        reverts=60,
    ),
    Case("delora-lambda", DeloraConfig(r=3, delora_lambda=4), FC, reverts=60),
    Case("delora-random", DeloraConfig(r=4, init_weights=False), FC, RANDOM, reverts=60),
    # FourierFT
    Case("fourierft", FourierFTConfig(n_frequency=50), FC, identity=DRAWN),
    Case("fourierft-zero", FourierFTConfig(n_frequency=30, init_weights=True), Site("fc", 7, 9)),
    Case(
        "fourierft-pattern",
        FourierFTConfig(n_frequency_pattern={"fc": 20}, scaling=20.0, random_loc_seed=3),
        Site("a.fc", 13, 8, bias=False),
        identity=DRAWN,
    ),
    Case(
        "fourierft-conv1d-transposed",
        FourierFTConfig(n_frequency=40, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        identity=DRAWN,
    ),
    # GLoRA
    Case("glora", GloraConfig(r=3), FC, reverts=60),
    Case("glora-no-bias", GloraConfig(r=3), Site("a.fc", 13, 7, bias=False), reverts=60),
    Case(
        "glora-vectors",
        GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector"),
        FC,
        reverts=100,
    ),
    Case("glora-constants", GloraConfig(config_A_B="constant", config_C="none"), FC, reverts=60),
    Case("glora-none", GloraConfig(config_A_B="none", config_D_E="none", r=2), FC, reverts=60),
    Case("glora-random", GloraConfig(r=3, init_weights=False), FC, RANDOM, reverts=60),
    # GraLoRA
    Case("gralora", GraloraConfig(r=4, alpha=6), FC),
    Case("gralora-blocks", GraloraConfig(r=6, gralora_k=3), Site("a.fc", 12, 9, bias=False)),
    Case("gralora-hybrid", GraloraConfig(r=4, hybrid_r=3), FC),
    Case("gralora-random", GraloraConfig(r=4, init_weights=False), FC, RANDOM),
    Case(
        "gralora-conv1d-transposed",
        GraloraConfig(r=4, hybrid_r=2, fan_in_fan_out=True),
        Site("fc", 6, 8, "Conv1D"),
    ),
    # HiRA
    Case("hira", HiraConfig(r=4), FC, reverts=0),
    Case("hira-pattern", HiraConfig(r=2, rank_pattern={"fc": 3}), Site("a.fc", 13, 7), reverts=0),
    Case("hira-gaussian", HiraConfig(r=4, init_weights="gaussian"), FC, reverts=0),
    Case("hira-random", HiraConfig(r=4, init_weights=False), FC, RANDOM, reverts=0),
    Case(
        "hira-conv1d-transposed",
        HiraConfig(r=4, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        reverts=0,
    ),
    Case("hira-embedding", HiraConfig(r=4), WTE, reverts=0),
    Case("hira-conv1", HiraConfig(r=3), Site("c", 5, 7, "Conv1d", (3,)), reverts=0),
    Case("hira-conv2", HiraConfig(r=3), Site("c", 5, 7, "Conv2d", (3, 2)), reverts=0),
    Case("hira-conv3", HiraConfig(r=3), Site("c", 2, 3, "Conv3d", (3, 2, 2)), reverts=0),
    # HRA
    Case("hra", HRAConfig(r=4), FC, reverts=40),
    Case("hra-odd", HRAConfig(r=3), Site("a.fc", 13, 7, bias=False), HARD, reverts=40),
    Case("hra-gram-schmidt", HRAConfig(r=3, apply_GS=True), FC, HARD, reverts=40),
    Case("hra-many", HRAConfig(r=24), Site("fc", 40, 6), reverts=200),
    Case("hra-random", HRAConfig(r=4, init_weights=False), FC, RANDOM, reverts=40),
    Case("hra-conv2", HRAConfig(r=4), Site("c", 4, 5, "Conv2d", (3, 3)), reverts=40),
    # MiSS
    Case("miss", MissConfig(r=4), FC),
    Case("miss-rest", MissConfig(r=5), Site("a.fc", 13, 7, bias=False)),
    Case("miss-mini", MissConfig(r=4, mini_r=8, init_weights="mini"), FC),
    Case("miss-bat", MissConfig(r=4, init_weights="bat"), FC, reverts=2000),
    Case("miss-random", MissConfig(r=4, init_weights=False), FC, RANDOM),
    # PEANuT
    Case("peanut", PeanutConfig(r=4), FC, reverts=0),
    Case(
        "peanut-deep",
        PeanutConfig(r=3, depth=2, act_fn="silu", scaling=0.5),
        Site("a.fc", 13, 7, bias=False),
        reverts=0,
    ),
    Case("peanut-gelu", PeanutConfig(r=3, depth=1, act_fn="gelu"), FC, reverts=0),
    Case("peanut-laplace", PeanutConfig(r=3, depth=1, act_fn="laplace"), FC, reverts=0),
    Case("peanut-xielu", PeanutConfig(r=3, act_fn="xielu"), FC, reverts=0),
    Case("peanut-random", PeanutConfig(r=4, init_weights=False), FC, RANDOM, reverts=0),
    # PVeRA
    Case("pvera", PveraConfig(r=5), FC),
    Case("pvera-no-bias", PveraConfig(r=3, d_initial=0.5), Site("a.fc", 13, 7, bias=False)),
    Case("pvera-regenerated", PveraConfig(r=4, save_projection=False, projection_prng_key=9), FC),
    Case("pvera-random", PveraConfig(r=4, init_weights=False), FC, identity=RANDOM),
    Case(
        "pvera-conv1d-transposed", PveraConfig(r=4, fan_in_fan_out=True), Site("fc", 6, 9, "Conv1D")
    ),
    # RandLoRA
    Case("randlora", RandLoraConfig(r=5, randlora_alpha=10), FC),
    Case("randlora-wide", RandLoraConfig(r=4), Site("a.fc", 13, 7, bias=False)),
    Case("randlora-rank-above-size", RandLoraConfig(r=9), Site("fc", 5, 3)),
    Case(
        "randlora-regenerated",
        RandLoraConfig(r=4, save_projection=False, projection_prng_key=3, randlora_alpha=7),
        FC,
    ),
    Case("randlora-sparse", RandLoraConfig(r=3, sparse=True, randlora_alpha=7), FC),
    Case("randlora-very-sparse", RandLoraConfig(r=3, very_sparse=True, randlora_alpha=7), FC),
    Case("randlora-random", RandLoraConfig(r=4, init_weights=False), FC, identity=RANDOM),
    Case(
        "randlora-conv1d-transposed",
        RandLoraConfig(r=4, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
    ),
    # RoAd
    Case("road", RoadConfig(group_size=8), FC, reverts=100),
    Case("road-2", RoadConfig(variant="road_2", group_size=4), FC, reverts=400),
    Case("road-4", RoadConfig(variant="road_4", group_size=2), Site("a.fc", 13, 6), reverts=400),
    Case("road-no-bias", RoadConfig(group_size=6), Site("fc", 5, 6, bias=False), reverts=100),
    Case("road-random", RoadConfig(group_size=8, init_weights=False), FC, RANDOM, reverts=2000),
    # SHiRA
    Case("shira", ShiraConfig(r=2), FC),
    Case("shira-seed", ShiraConfig(r=1, random_seed=5), Site("a.fc", 13, 7, bias=False)),
    Case("shira-random", ShiraConfig(r=2, init_weights=False), FC, RANDOM),
    # Super-Tuning
    Case("supertuning", SupertuningConfig(sparsity=0.9), FC),
    Case(
        "supertuning-supra",
        SupertuningConfig(sparsity=0.8, select_top=False, r=3),
        Site("a.fc", 13, 7, bias=False),
    ),
    Case("supertuning-alpha", SupertuningConfig(sparsity=0.9, r=2, lora_alpha=5), FC),
    Case(
        "supertuning-random", SupertuningConfig(sparsity=0.9, r=2, init_weights=False), FC, RANDOM
    ),
    # WaveFT
    Case("waveft", WaveFTConfig(n_frequency=50), FC),
    Case(
        "waveft-odd",
        WaveFTConfig(n_frequency=30, wavelet_family="db3", scaling=3.0, random_loc_seed=1),
        Site("a.fc", 13, 7, bias=False),
    ),
    Case("waveft-sym", WaveFTConfig(n_frequency=60, wavelet_family="sym4"), FC),
    Case("waveft-coif", WaveFTConfig(n_frequency=60, wavelet_family="coif2"), Site("fc", 9, 22)),
    Case("waveft-coif4", WaveFTConfig(n_frequency=60, wavelet_family="coif4"), Site("fc", 9, 22)),
    Case("waveft-sparse", WaveFTConfig(n_frequency=40, use_idwt=False), FC),
    Case("waveft-pattern", WaveFTConfig(n_frequency_pattern={"fc": 9}), Site("a.fc", 13, 8)),
    Case("waveft-share", WaveFTConfig(n_frequency=40, proportional_parameters=True), FC),
    Case("waveft-random", WaveFTConfig(n_frequency=40, init_weights=False), FC, RANDOM),
    Case(
        "waveft-conv1d-transposed",
        WaveFTConfig(n_frequency=20, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
    ),
    # VB-LoRA
    Case("vblora", VBLoRAConfig(**LOUD, r=3, num_vectors=6, vector_length=4), FC, identity=DRAWN),
    Case(
        "vblora-three",
        VBLoRAConfig(**LOUD, r=2, num_vectors=9, vector_length=1, topk=3),
        Site("a.fc", 13, 7, bias=False),
        identity=DRAWN,
    ),
    Case(
        "vblora-one",
        VBLoRAConfig(**LOUD, r=2, num_vectors=5, vector_length=2, topk=1),
        FC,
        identity=DRAWN,
        idle=("vblora_logits_A", "vblora_logits_B"),  # the one of the best one
    ),
    Case(
        "vblora-spread",
        VBLoRAConfig(**LOUD, r=2, num_vectors=6, vector_length=4, init_logits_std=2.0),
        FC,
        identity=DRAWN,
    ),
    Case(
        "vblora-conv1d-transposed",
        VBLoRAConfig(**LOUD, r=2, num_vectors=6, vector_length=3, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        identity=DRAWN,
    ),
    Case(
        "vblora-short",
        VBLoRAConfig(
            **LOUD, r=3, num_vectors=6, vector_length=4, topk=3, save_only_topk_weights=True
        ),
        FC,
        identity=DRAWN,
        hf="HF takes the weights' logarithms: compared live, in tests/hf/test_vblora.py",
    ),
    # UniLoRA
    Case("unilora", UniLoraConfig(r=3, theta_d_length=50, init_theta_d_bound=1.0), FC, DRAWN),
    Case(
        "unilora-saved",
        UniLoraConfig(r=2, theta_d_length=9, proj_seed=3, save_indices=True, init_theta_d_bound=1),
        Site("a.fc", 13, 7, bias=False),
        identity=DRAWN,
    ),
    Case(
        "unilora-longer",  # some of θ has no place
        UniLoraConfig(r=2, theta_d_length=300, init_weights=False),
        FC,
        identity=DRAWN,
    ),
    Case(
        "unilora-conv1d-transposed",
        UniLoraConfig(r=4, theta_d_length=20, init_theta_d_bound=1.0, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        identity=DRAWN,
    ),
    # TinyLoRA
    Case("tinylora", TinyLoraConfig(u=9, init_weights="uniform", init_v_bound=1.0), FC, DRAWN),
    Case("tinylora-zero", TinyLoraConfig(r=3, u=2, weight_tying=1.0), FC),
    Case(
        "tinylora-seeded",
        TinyLoraConfig(r=9, u=3, save_projection=False, projection_seed=7, init_weights=False),
        Site("a.fc", 13, 7, bias=False),
        identity=RANDOM,
    ),
    Case(
        "tinylora-embedding",
        TinyLoraConfig(r=3, u=5, weight_tying=0.5, init_weights="uniform", init_v_bound=1.0),
        WTE,
        identity=DRAWN,
    ),
    Case(
        "tinylora-conv1d-transposed",
        TinyLoraConfig(u=4, init_weights="uniform", init_v_bound=1.0, fan_in_fan_out=True),
        Site("fc", 6, 9, "Conv1D"),
        identity=DRAWN,
    ),
    # FRoD
    Case("frod", FrodConfig(sparse_rate=0.1), FC, reverts=0),
    Case(
        "frod-wide",  # fewer outputs than inputs: V is orthogonal
        FrodConfig(sparse_rate=0.2, projection_prng_key=3, regularization_alpha=0.1),
        Site("layers.0.attention.output.dense", 13, 7, bias=False),
        reverts=0,
    ),
    Case("frod-diagonal", FrodConfig(sparse_rate=0.0), Site("a.fc", 8, 8), reverts=0),
    Case("frod-full", FrodConfig(sparse_rate=1.0), Site("fc", 5, 9), reverts=0),
    Case("frod-random", FrodConfig(init_weights=False), FC, identity=RANDOM, reverts=0),
    Case(
        "frod-conv1d-transposed",
        FrodConfig(sparse_rate=0.1, fan_in_fan_out=True),
        Site("h.3.fc", 6, 9, "Conv1D"),
        reverts=0,
    ),
    # OSF
    Case("osf", OSFConfig(), FC, reverts=0),
    Case("osf-rank", OSFConfig(effective_rank=3), Site("fc", 20, 9), reverts=0),
    Case("osf-share", OSFConfig(effective_rank=0.25), Site("a.fc", 13, 7, bias=False), reverts=0),
    Case(
        "osf-pattern",
        OSFConfig(effective_rank=2, rank_pattern={"q": 1, "^a.f": 0.5}),
        Site("a.fc", 8, 8),
        reverts=0,
    ),
    Case("osf-random", OSFConfig(init_weights=False), FC, identity=RANDOM, reverts=0),
    # AdaMSS
    Case("adamss", AdamssConfig(r=6, num_subspaces=3, subspace_rank=2), FC),
    Case("adamss-no-bias", AdamssConfig(r=4, num_subspaces=2), Site("a.fc", 13, 7, bias=False)),
    Case("adamss-defaults", AdamssConfig(), Site("fc", 9, 40)),
    Case("adamss-each-row", AdamssConfig(r=3, num_subspaces=9, subspace_rank=4), Site("fc", 8, 5)),
    Case(
        "adamss-dynamic",
        AdamssConfig(
            r=5, num_subspaces=3, subspace_rank=4, use_dynamic_rank=True, svd_threshold=0.4
        ),
        Site("fc", 20, 24),
    ),
    Case("adamss-seed", AdamssConfig(r=5, num_subspaces=2, random_seed=3), Site("fc", 30, 20)),
    Case(
        "adamss-random",
        AdamssConfig(r=6, num_subspaces=3, init_weights=None),
        FC,
        identity="HF's init_weights=None draws B",
    ),
    # PSOFT
    Case("psoft", PsoftConfig(r=5, psoft_alpha=7), FC),
    Case("psoft-no-bias", PsoftConfig(r=7), Site("a.fc", 13, 7, bias=False)),
    Case("psoft-one-direction", PsoftConfig(r=1), FC),
    Case("psoft-halves", PsoftConfig(r=4, ab_svd_init="pissa_init"), FC),
    Case(
        "psoft-low-rank",
        PsoftConfig(r=4, psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=5),
        Site("fc", 24, 20),
    ),
    Case("psoft-free", PsoftConfig(r=4, psoft_orth=False), FC),
    Case("psoft-rotation", PsoftConfig(r=6, psoft_mag_a=False, psoft_mag_b=False), FC),
    Case("psoft-outputs", PsoftConfig(r=4, psoft_mag_a=False), FC),
    Case("psoft-inputs", PsoftConfig(r=4, psoft_mag_b=False), FC),
    Case("psoft-series", PsoftConfig(r=4, use_cayley_neumann=True), FC),
    Case(
        "psoft-3-terms",
        PsoftConfig(r=4, use_cayley_neumann=True, num_cayley_neumann_terms=3),
        FC,
    ),
    Case(
        "psoft-bounded",
        PsoftConfig(r=5, use_cayley_neumann=True, cayley_neumann_eps=0.3),
        FC,
    ),
    Case("psoft-random", PsoftConfig(r=4, init_weights=False), FC, identity=TURNED),
    Case(
        "psoft-free-random",
        PsoftConfig(r=4, psoft_orth=False, init_weights=False),
        FC,
        identity=TURNED,
    ),
    # LN tuning
    Case("ln-tuning", LNTuningConfig(), Site("norm", 12, 12, "Norm", groups=12), reverts=0),
    Case(
        "ln-tuning-no-bias",
        LNTuningConfig(),
        Site("a.norm", 7, 7, "Norm", groups=7, bias=False),
        reverts=0,
    ),
    Case("ln-tuning-linear", LNTuningConfig(), FC, reverts=0),
    Case("ln-tuning-embedding", LNTuningConfig(), WTE, reverts=0),
    Case("ln-tuning-conv2", LNTuningConfig(), Site("c", 4, 6, "Conv2d", (3, 2)), reverts=0),
    # Trainable tokens
    Case("tokens", TrainableTokensConfig(token_indices=[3, 0, 10]), WTE, reverts=0),
    Case(
        "tokens-random",
        TrainableTokensConfig(token_indices=[3], init_weights=False),
        WTE,
        identity=DRAWN,
        reverts=0,
    ),
    Case(
        "tokens-linear",
        TrainableTokensConfig(token_indices=[31, 2]),
        Site("fc", 12, 32, bias=False),
        reverts=0,
    ),
    Case(
        "tokens-linear-bias",
        TrainableTokensConfig(token_indices=[0]),
        FC,
        reverts=0,
        hf="HF's call forgets the layer's bias, and its merge does not",
    ),
]


@dataclass(frozen=True)
class RoutedCase(Case):
    """One row of a method that is applied and cannot be merged."""

    reverts: float = 0


ROUTED = [
    RoutedCase("lily", LilyConfig(r=4, scaling=1.5), FC),
    RoutedCase("lily-more", LilyConfig(r=3, num_B=5), Site("a.fc", 13, 7, bias=False)),
    RoutedCase("lily-stride", LilyConfig(r=2, stride_A=3), FC),
    RoutedCase("poly", PolyConfig(r=3), FC, reverts=20, routing={"task_ids": [0, 0]}),
    RoutedCase("poly-tasks", PolyConfig(r=4, n_tasks=3), FC, routing={"task_ids": [2, 0]}),
    RoutedCase(
        "poly-heads",
        PolyConfig(r=2, n_tasks=4, n_skills=3, n_splits=4),
        Site("a.fc", 12, 8, bias=False),
        routing={"task_ids": [1, 3]},
    ),
    RoutedCase(
        "poly-random",
        PolyConfig(r=4, n_tasks=2, init_weights=False),
        FC,
        RANDOM,
        routing={"task_ids": [1, 0]},
    ),
    RoutedCase(
        "alora",
        LoraConfig(r=3, alora_invocation_tokens=[5, 2]),
        FC,
        routing={"alora_offsets": [2, 0]},
    ),
    RoutedCase(
        "alora-bias",
        LoraConfig(r=2, lora_bias=True, alora_invocation_tokens=[1]),
        Site("a.fc", 13, 7),
        routing={"alora_offsets": [1, 9]},
    ),
    RoutedCase(
        "xlora",
        XLoraConfig(hidden_size=5, adapters={"0": "", "1": ""}, r=3, use_trainable_adapters=True),
        FC,
        routing={"hidden": HIDDEN},
        hf=WHOLE,
    ),
    RoutedCase(
        "xlora-embedding",
        XLoraConfig(hidden_size=5, adapters={"0": "", "1": ""}, r=2, use_trainable_adapters=True),
        WTE,
        routing={"hidden": HIDDEN},
        hf=WHOLE,
    ),
    RoutedCase(
        "xlora-layerwise",
        XLoraConfig(
            hidden_size=5,
            adapters={"a": "", "b": "", "c": ""},
            xlora_depth=3,
            xlora_size=4,
            layerwise_scalings=True,
            top_k_lora=2,
            global_scaling_weight=1.5,
            use_trainable_adapters=True,
            r=2,
            order=["other", "a.fc"],
        ),
        Site("a.fc", 13, 7, bias=False),
        routing={"scalings": HIDDEN[..., :3]},
        idle=tuple(  # the gate, of which these are the results
            f"internal_xlora_classifier.layers.{i}.{leaf}"
            for i, leaf in product((0, 3, 6), ("weight", "bias"))
        ),
        hf=WHOLE,
    ),
    RoutedCase("lily-random", LilyConfig(r=4, init_weights=False), FC, identity=RANDOM),
]


@dataclass(frozen=True)
class PromptCase(prompting.PromptCase):
    """One row of a method that makes virtual tokens."""

    hf: str | None = None


HEADS = {"num_attention_heads": 2, "num_layers": 3}

PROMPTS = [
    PromptCase("prompt", PromptTuningConfig(num_virtual_tokens=5, token_dim=12)),
    PromptCase(
        "prompt-encoder-decoder",
        PromptTuningConfig(num_virtual_tokens=3, token_dim=7, task_type="SEQ_2_SEQ_LM"),
    ),
    PromptCase(
        "prompt-vocabulary",
        PromptTuningConfig(num_virtual_tokens=3, token_dim=7, prompt_tuning_init="SAMPLE_VOCAB"),
    ),
    PromptCase(
        "prompt-text",
        PromptTuningConfig(
            num_virtual_tokens=4,
            token_dim=7,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="classify this",
            tokenizer_name_or_path="t5-base",
        ),
        start={"tokens": [4, 1]},
        hf="HF needs the tokenizer",
    ),
    PromptCase("prefix", PrefixTuningConfig(num_virtual_tokens=5, token_dim=12, **HEADS)),
    PromptCase(
        "prefix-zero",
        PrefixTuningConfig(num_virtual_tokens=1, token_dim=6, init_weights="zero", **HEADS),
    ),
    PromptCase(
        "prefix-projection",
        PrefixTuningConfig(
            num_virtual_tokens=4,
            token_dim=6,
            prefix_projection=True,
            encoder_hidden_size=9,
            **HEADS,
        ),
    ),
    # Decoder layer l takes the keys and values of layer 2l mod L, as HF deals them out.
    PromptCase(
        "prefix-encoder-decoder",
        PrefixTuningConfig(num_virtual_tokens=4, token_dim=6, task_type="SEQ_2_SEQ_LM", **HEADS),
    ),
    PromptCase("p-tuning", PromptEncoderConfig(num_virtual_tokens=5, token_dim=12)),
    PromptCase(
        "p-tuning-encoder-decoder",
        PromptEncoderConfig(
            num_virtual_tokens=3, token_dim=7, encoder_hidden_size=9, task_type="SEQ_2_SEQ_LM"
        ),
    ),
    PromptCase(
        "p-tuning-lstm",
        PromptEncoderConfig(
            num_virtual_tokens=4,
            token_dim=6,
            encoder_hidden_size=5,
            encoder_reparameterization_type="LSTM",
        ),
    ),
    PromptCase(
        "p-tuning-lstm-1",
        PromptEncoderConfig(
            num_virtual_tokens=3,
            token_dim=6,
            encoder_hidden_size=4,
            encoder_num_layers=1,
            encoder_reparameterization_type="LSTM",
        ),
    ),
    PromptCase("multitask", MultitaskPromptTuningConfig(num_virtual_tokens=5, token_dim=12)),
    PromptCase(
        "multitask-encoder-decoder",
        MultitaskPromptTuningConfig(
            num_virtual_tokens=3, token_dim=7, num_tasks=4, num_ranks=2, task_type="SEQ_2_SEQ_LM"
        ),
    ),
    PromptCase("cartridge", CartridgeConfig(num_virtual_tokens=5, token_dim=12, **HEADS)),
    PromptCase(
        "cartridge-unfrozen",
        CartridgeConfig(num_virtual_tokens=4, token_dim=6, num_frozen_tokens=0, **HEADS),
    ),
    PromptCase("cpt", CPTConfig(cpt_token_ids=[3, 1, 4], token_dim=12, task_type="CAUSAL_LM")),
    PromptCase(
        "cpt-types",
        CPTConfig(
            cpt_token_ids=[3, 1, 4, 1, 5, 9],
            cpt_tokens_type_mask=[0, 1, 2, 3, 4, 6],
            opt_projection_epsilon=0.3,
            opt_projection_format_epsilon=5.0,
            token_dim=8,
            task_type="CAUSAL_LM",
        ),
    ),
    PromptCase(
        "cpt-decay",
        CPTConfig(
            cpt_token_ids=[3, 1, 4, 1, 5, 9],
            cpt_tokens_type_mask=[2, 4, 4, 6, 8, 8],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.7,
            token_dim=8,
            task_type="CAUSAL_LM",
        ),
    ),
]


@dataclass(frozen=True)
class AttendedCase:
    """One row of a method that acts within attention.

    Attributes
    ----------
    model : str
        transformers' name of the architecture.
    width, heads, groups : int
        Of its attention; 3 blocks.
    """

    name: str
    config: AdaptionPromptConfig
    model: str
    width: int = 16
    heads: int = 4
    groups: int = 4
    hf: str | None = None


ATTENDED = [
    AttendedCase("adaption-prompt", AdaptionPromptConfig(adapter_len=5, adapter_layers=2), "llama"),
    AttendedCase(
        "adaption-prompt-groups",
        AdaptionPromptConfig(adapter_len=3, adapter_layers=3, target_modules="self_attn"),
        "mistral",
        width=16,
        groups=2,
    ),
    AttendedCase(
        "adaption-prompt-gpt", AdaptionPromptConfig(adapter_len=1, adapter_layers=1), "gpt2"
    ),
]

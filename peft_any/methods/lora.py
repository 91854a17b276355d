"""LoRA: low-rank adaptation. Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

from collections.abc import Iterable, Mapping
from dataclasses import field
from math import sqrt
from typing import ClassVar, Self

from peft_any import alora, starts, variants
from peft_any.arrow import ArrowRouter, alone
from peft_any.contract import Additive, Array, Fresh, Kind, Layer, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Excludes, FanInFanOut, Rate
from peft_any.layer import EXPERTS, MATRICES


class LoraConfig(Additive, Biases, ByLayer, Excludes, FanInFanOut, peft_type="LORA"):
    """ΔW = s·B·A, with A (r, n_in), for convolutions (r, n_in, kernel), B (n_out, r), s = α/r.

    use_rslora: s = α/√r (https://arxiv.org/abs/2312.03732). layer_replication: `replicate_layers`.
    use_dora: W′ = m ⊙ (W + ΔW)/‖W + ΔW‖ by rows, m (n_out,) starting at ‖W‖
        (https://arxiv.org/abs/2402.09353). lora_bias: the bias gains s·b, b (n_out,).
    rank_pattern, alpha_pattern: r and α by site. target_parameters: stacks of experts.
    alora_invocation_tokens: it acts from these on, by `routed` (https://arxiv.org/abs/2504.12397).
    use_bdlora: A, then stored (r, n_in/k), or B, (n_out, r/k), of k blocks on the diagonal.
    kasa_config: ΔW = s·B·diag(d)·A − N, `lora_diag` d (r,), where N is the part of W by its r
        smallest singular values (https://arxiv.org/abs/2412.06071). arrow_config: `load_arrow`.
    init_lora_weights: true (A uniform, B = 0), false (both random), "gaussian", "orthogonal" (B·A =
        0, r even), "mica" (A = 0; B, W's left singular vectors of least values, stays,
        https://arxiv.org/abs/2604.01694), or a B₀·A₀ taken out of W, and folded into rank 2r by
        files: ΔW = s·(B·A − B₀·A₀), "pissa" and "pissa_niter_k" by leading singular triplets
        (https://arxiv.org/abs/2404.02948), "olora" by QR (https://arxiv.org/abs/2406.01775).
    """

    kinds: ClassVar[frozenset[Kind]] = MATRICES | EXPERTS
    thins: ClassVar[str] = "lora_dropout"
    refused: ClassVar[Mapping[str, str]] = starts.VARIANTS

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: Rate = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    layer_replication: list[list[int]] | None = None
    kasa_config: variants.KasaConfig | None = None
    use_bdlora: variants.BdLoraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    arrow_config: ArrowRouter | None = None

    def check(self) -> None:
        """Some variants exclude others."""
        variants.check(self)

    @property
    def frozen(self) -> frozenset[str]:
        """What was taken out of the base; MiCA's B."""
        return starts.FROZEN[self.init_lora_weights == "mica"]

    @property
    def separable(self) -> bool:
        """All but KaSA, which decomposes the weight, and BD-LoRA, whose rows' places matter."""
        return not (self.kasa_config or self.use_bdlora)

    @property
    def certain(self) -> bool:
        """What KaSA takes out of the base."""
        return self.kasa_config is not None

    @property
    def takes(self) -> frozenset[str]:
        """Where each row is invoked, with `alora_invocation_tokens`."""
        return alora.TAKES if self.alora_invocation_tokens else frozenset()

    @property
    def refusal(self) -> str | None:
        """With `alora_invocation_tokens`, and of a router."""
        return alora.REFUSAL if self.alora_invocation_tokens else alone(self)

    @property
    def scaling(self) -> float:
        """α/r, or α/√r with `use_rslora`."""
        return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)

    def per_site(self, site: Site) -> Self:
        """Resolve the patterns; refuse what has no merged form."""
        return variants.checked(self, site)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A and B in the layouts of torch's own layers."""
        return variants.shapes(self, site)

    def init(self, site: Site, new: Fresh) -> Params:
        """A uniform and B zero unless `init_lora_weights` says otherwise."""
        return variants.initial(self, site, new)

    def changes_bias(self, site: Site) -> bool:
        """With `lora_bias`."""
        return self.lora_bias

    def lacks(self, p: Params) -> str | None:
        """The product taken out of the base."""
        return variants.missing(self, p)

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Add A₀ and B₀."""
        return variants.rederived(self, p, site, new)

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give s·B (n_out, k) and A (k, width): ΔW is their product."""
        return variants.factors(self, p, site)

    def delta(self, p: Params, site: Site) -> Array:
        """s·B·A."""
        return variants.delta(self, p, site)

    def bias_delta(self, p: Params, site: Site) -> Array | None:
        """s·b."""
        return self.scaling * p["lora_B.bias"] if self.lora_bias else None

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """s·B·(A·x)."""
        return alora.invoked(self, p, variants.residual(self, p, x, site), site)

    def regularizer(self, sites: Iterable[Params]) -> Array | None:
        """KaSA's β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖) over all sites (eq. 9 to 11)."""
        return None if self.kasa_config is None else self.kasa_config.regularizer(sites)

    def gain(self, p: Params, base: Layer) -> Array | None:
        """m/‖W + ΔW‖ by rows, with `use_dora`: W before any adapter, norms constant (§4.3)."""
        return variants.gain(self, p, base)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Form the factors once; measure the rows once, with `use_dora`."""
        return variants.prepared(self, p, base)

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Fold the product taken out of the base into factors of rank 2r."""
        return variants.portable(self, sites)

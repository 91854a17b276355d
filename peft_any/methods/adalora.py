"""AdaLoRA: adaptive budget allocation. Zhang et al. 2023, https://arxiv.org/abs/2303.10512."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, ClassVar, Self

from peft_any.backend import creation_device, namespace
from peft_any.checks import refuse
from peft_any.contract import Additive, Array, Kind, Params, Shape, Site
from peft_any.errors import ConfigError
from peft_any.fields import Biases, ByLayer, Count, Excludes, FanInFanOut, Inside, Rate, within
from peft_any.initial import normal, zeros
from peft_any.linalg import orthogonality
from peft_any.starts import check_init


class AdaLoraConfig(
    Additive, Biases, ByLayer, Excludes, FanInFanOut, peft_type="ADALORA", prefix="lora_"
):
    """ΔW = s·B·diag(E)·A, with A (r, width), B (n_out, r), E (r, 1) and s = α/(init_r + 10⁻⁵).

    Training starts with r = init_r triplets (a column of B, an entry of E, a row of A) at every
    site and prunes them to `target_r` on average. The scale stays that of the initial rank.

    init_r, target_r, tinit, tfinal, deltaT, beta1, beta2, total_step: the schedule of training.
    orth_reg_weight: the weight of `regularizer` in the loss.
    rank_pattern: the triplets kept at each site, ``{"<site>.lora_E": [true, false, …]}``.
    init_lora_weights: true (A and B normal, σ = 0.02; E = 0) or false (all standard normal).
    lora_alpha: not above 0, α is the site's number of kept triplets.
    r, use_rslora, alpha_pattern: no effect, as in Hugging Face PEFT; `at` sets r.
    """

    thins: ClassVar[str] = "lora_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D", "Conv2d"})
    kernels = "ungrouped"
    separable: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        "target_parameters": "AdaLoRA adapts modules alone: name them in target_modules",
        "use_dora": "AdaLoRA has no magnitude vector: leave it out",
    }

    target_r: Count = 8
    init_r: Count = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: Count = 1  # noqa: N815 - Hugging Face PEFT's name
    beta1: Inside = 0.85
    beta2: Inside = 0.85
    orth_reg_weight: Annotated[float, within(0)] = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: Rate = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None

    def check(self) -> None:
        """The schedule must fit its steps."""
        total = self.total_step or 0
        refuse(
            self,
            total_step=(total >= 1, "the number of training steps (HF PEFT demands it)"),
            tinit=(self.tinit < total - self.tfinal, "less than total_step - tfinal"),
        )
        check_init(self)

    def kept(self, name: str) -> list[bool]:
        """Give the mask (init_r,) of the triplets kept at a site: all, where none is given."""
        mask = (self.rank_pattern or {}).get(f"{name}.lora_E")
        if mask is None:
            return [True] * self.init_r
        if len(mask) != self.init_r:
            raise ConfigError(
                f"{name}: a rank_pattern of {len(mask)} entries cannot mask init_r={self.init_r} "
                "triplets: give one entry for each"
            )
        return mask

    def per_site(self, site: Site) -> Self:
        """Set r to the number of triplets kept."""
        masked = f"{site.name}.lora_E" in (self.rank_pattern or {})
        return replace(self, r=sum(map(bool, self.kept(site.name))) if masked else self.init_r)

    @property
    def scaling(self) -> float:
        """α/(init_r + 10⁻⁵)."""
        # HF divides by the initial rank, which it never saves, also after pruning.
        return (self.lora_alpha if self.lora_alpha > 0 else float(self.r)) / (self.init_r + 1e-5)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A and B, normal, and E, zero; flat for a convolution too."""
        r, usual = self.r, bool(self.init_lora_weights)
        std = 0.02 if usual else 1.0
        a, b = normal(r, site.width, std=std), normal(site.n_out, r, std=std)
        return {"lora_A": a, "lora_E": zeros(r, 1) if usual else normal(r, 1), "lora_B": b}

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give s·B·diag(E) (n_out, r) and A (r, width)."""
        values = self.scaling * namespace(p["lora_E"]).matrix_transpose(p["lora_E"])
        return p["lora_B"] * values, p["lora_A"]

    def regularizer(self, sites: Iterable[Params]) -> Array:
        """Give orth_reg_weight · the mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ over all sites (eq. 4)."""
        own = [p for p in sites if "lora_E" in p]
        pairs = [(p["lora_A"], namespace(p["lora_B"]).matrix_transpose(p["lora_B"])) for p in own]
        gaps = [orthogonality(rows) for pair in pairs for rows in pair]
        return (self.orth_reg_weight / len(gaps)) * sum(gaps[1:], gaps[0])

    def prune(self, p: Params, mask: Sequence[bool]) -> Params:
        """Keep the triplets that the mask (init_r,) marks, as a saved file does."""
        xp, e, keep = namespace(*p.values()), p["lora_E"], [i for i, k in enumerate(mask) if k]
        if e.shape[0] == len(keep):  # pruned already
            return dict(p)
        rows = xp.asarray([*keep, 0], device=creation_device(e))[:-1]  # integers, even if none
        return {k: xp.take(v, rows, axis=int(k == "lora_B")) for k, v in p.items()}

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Prune every site to `rank_pattern`."""
        return self, {name: self.prune(p, self.kept(name)) for name, p in sites.items()}

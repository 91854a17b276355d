"""VB-LoRA: factors out of one bank of vectors. Li et al. 2024, https://arxiv.org/abs/2405.15179."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from peft_any.backend import namespace
from peft_any.checks import check_divides, refuse
from peft_any.contract import Additive, Array, Fresh, Kind, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Count, Excludes, FanInFanOut, Rate, within
from peft_any.initial import uniform
from peft_any.mixtures import largest, largest_shares, placed_shares


class VBLoRAConfig(Additive, Biases, ByLayer, Excludes, FanInFanOut, peft_type="VBLORA"):
    """ΔW = B·A, whose rows and columns are pieces of length l, each a mixture of k vectors.

    All sites share the trained `vblora_vector_bank` (N, l), N = `num_vectors` of l =
    `vector_length`, a divisor of n_in and n_out. A piece is Σ wⱼ·bankⱼ over the k = `topk` largest
    of its logits, w = softmax of these: `vblora_logits_A` (r, n_in/l, N) along A's rows and
    `vblora_logits_B` (n_out/l, r, N) along B's columns.

    save_only_topk_weights: sites hold the k places, `…_topk_indices` (…, k), and their weights but
        the last, which is the rest to 1, `…_topk_weights` (…, k − 1); a fresh adapter's places are
        then fixed.
    init_logits_std: of normal logits. init_vector_bank_bound: of the uniform bank.
    """

    thins: ClassVar[str] = "vblora_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    frozen: ClassVar[frozenset[str]] = frozenset(
        f"vblora_logits_{side}_topk_indices" for side in "AB"
    )

    r: Count = 4
    num_vectors: Count = 256
    vector_length: Count = 256
    topk: Count = 2
    save_only_topk_weights: bool = False
    vblora_dropout: Rate = 0.0
    init_vector_bank_bound: Annotated[float, within(0)] = 0.02
    init_logits_std: Annotated[float, within(0)] = 0.1

    def check(self) -> None:
        """No more vectors are chosen than there are."""
        most = f"at most num_vectors={self.num_vectors}"
        refuse(self, topk=(self.topk <= self.num_vectors, most))

    def per_site(self, site: Site) -> Self:
        """Check that the pieces fit."""
        check_divides("vector_length", self.vector_length, site)
        return self

    def _logits(self, site: Site) -> dict[str, Shape]:
        n, m = site.n_in // self.vector_length, site.n_out // self.vector_length
        of = {"A": (self.r, n, self.num_vectors), "B": (m, self.r, self.num_vectors)}
        return {f"vblora_logits_{side}": shape for side, shape in of.items()}

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The logits, or the places and weights of the largest."""
        shapes = self._logits(site)
        if not self.save_only_topk_weights:
            return shapes
        short = {"indices": self.topk, "weights": self.topk - 1}
        return {
            f"{name}_topk_{what}": (*shape[:2], count)
            for name, shape in shapes.items()
            for what, count in short.items()
        }

    def init(self, site: Site, new: Fresh) -> Params:
        """Normal logits."""
        found: Params = {}
        for name, shape in self._logits(site).items():
            logits = new.normal(shape, self.init_logits_std)
            if self.save_only_topk_weights:
                places, weights = largest(logits, self.topk)
                found[f"{name}_topk_indices"] = new.array(places)
                found[f"{name}_topk_weights"] = new.array(weights)
            else:
                found[name] = logits
        return found

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """The bank, uniform."""
        sizes = self.num_vectors, self.vector_length
        return {"vblora_vector_bank": uniform(self.init_vector_bank_bound, *sizes)}

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """B (n_out, r) and A (r, n_in)."""
        bank = p["vblora_vector_bank"]
        a, b = (self._shares(p, f"vblora_logits_{side}") @ bank for side in "AB")
        xp = namespace(bank)
        columns = xp.reshape(xp.permute_dims(b, (0, 2, 1)), (site.n_out, self.r))
        return columns, xp.reshape(a, (self.r, site.n_in))

    def _shares(self, p: Params, name: str) -> Array:
        """Every vector's share in every piece (…, …, N)."""
        if name in p:
            return largest_shares(p[name], self.topk)
        weights, places = p[f"{name}_topk_weights"], p[f"{name}_topk_indices"]
        return placed_shares(weights, places, self.num_vectors)

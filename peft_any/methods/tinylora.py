"""TinyLoRA: a few numbers for a layer, or for all. Morris et al. 2026, https://arxiv.org/abs/2602.04118."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from peft_any._tree import without
from peft_any.backend import astype, dtype_name, namespace, to_numpy
from peft_any.contract import Additive, Array, Fresh, Kind, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Count, FanInFanOut, Positive, Rate, Share
from peft_any.initial import normal, uniform, zeros
from peft_any.projections import held, leading_pair, normal_projection, place_of


class TinyLoraConfig(Additive, Biases, ByLayer, FanInFanOut, peft_type="TINYLORA"):
    """ΔW = B·R·A with R = Σᵢ vᵢ·Pᵢ, of which the vector v (u,) alone is trained.

    `tinylora_A` (r, n_in) and `tinylora_B` (n_out, r) are √S·Vᵀ and U·√S of the base's r largest
    singular values, `tinylora_P` (u, r, r) is random; all three are frozen, and r is no more than
    n_in or n_out. Groups of layers that follow one another share a v, `tinylora_v.0` and on.

    weight_tying: of L layers there are L·(1 − `weight_tying`) groups, rounded, and at least one.
    projection_seed: of P, for the layer's place among the adapted ones: normal of variance 1/r.
    save_projection: whether the file holds P, which tells the layer's place, and so its group;
        else both follow from the order of the model's layers.
    init_weights: true: v = 0; "uniform": of ±`init_v_bound`; false: standard normal.
    """

    thins: ClassVar[str] = "tinylora_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D", "Embedding"})
    frozen: ClassVar[frozenset[str]] = frozenset(f"tinylora_{w}" for w in ("A", "B", "P", "group"))
    grouped: ClassVar[frozenset[str]] = frozenset({"tinylora_v"})
    ordered: ClassVar[bool] = True

    r: Count = 2
    u: Count = 64
    weight_tying: Share = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: Positive = 0.02
    tinylora_dropout: Rate = 0.0
    init_weights: bool | Literal["uniform"] = True

    @property
    def certain(self) -> bool:
        """With P at hand, which tells the layer's place."""
        return self.save_projection

    def _rank(self, site: Site) -> int:
        return min(self.r, site.n_in, site.n_out)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A and B, which an embedding has the other way round, and P."""
        r, rows, columns = self._rank(site), site.n_out, site.n_in
        if site.kind == "Embedding":
            rows, columns = columns, rows
        found: dict[str, Shape] = {"tinylora_A": (r, columns), "tinylora_B": (rows, r)}
        return {**found, "tinylora_P": (self.u, r, r)} if self.save_projection else found

    def init(self, site: Site, new: Fresh) -> Params:
        """Decompose the base, in single precision as HF does; draw P."""
        weight = new.base_for(site.name, "TINYLORA").weight
        turned = site.kind == "Embedding"
        host = to_numpy(astype(weight, "float32"))
        a, b = leading_pair(host.T if turned else host, self._rank(site), dtype_name(weight))
        return self._placed({"tinylora_A": new.array(a), "tinylora_B": new.array(b)}, site, new)

    def _placed(self, p: Params, site: Site, new: Fresh) -> Params:
        """Add the projection and the group, of the layer's place among the adapted ones."""
        names = [s.name for s in new.sites] or [site.name]
        own, groups = names.index(site.name), self._groups(len(names))
        shape, at = (self.u, self._rank(site), self._rank(site)), new.array([own])

        def draw(i: int) -> Any:
            return normal_projection(shape, self.projection_seed + i)

        if "tinylora_P" not in p:
            p = {**p, "tinylora_P": new.array(draw(own).copy())}
        elif groups > 1:
            order = sorted(range(len(names)), key=lambda i: i != own)
            at = place_of(p["tinylora_P"], draw, order, f"{site.name}.tinylora_P")
        xp = namespace(at)
        group = at // max(1, len(names) // groups)
        return {**p, "tinylora_group": xp.where(group < groups, group, groups - 1)}

    def _groups(self, layers: int) -> int:
        return max(1, round(layers * (1.0 - self.weight_tying)))

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """A v for each group: zero, unless `init_weights` says otherwise."""
        v = zeros(self.u) if self.init_weights else normal(self.u)
        v = uniform(self.init_v_bound, self.u) if self.init_weights == "uniform" else v
        return {f"tinylora_v.{i}": v for i in range(self._groups(len(sites)))}

    def lacks(self, p: Params) -> str | None:
        """The group, and P without `save_projection`."""
        return None if "tinylora_group" in p else "its group and projection (save_projection)"

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Add what the layer's place tells, a projection in the base's precision."""
        found = self._placed(dict(p), site, new)
        if "tinylora_P" in p:
            return found
        weight = new.base_for(site.name, "TINYLORA").weight
        return found | held({"tinylora_P": found["tinylora_P"]}, dtype_name(weight))

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Leave out what the file does not hold."""
        less = {"tinylora_group"} if self.save_projection else {"tinylora_group", "tinylora_P"}
        return self, without(sites, less)

    def _middle(self, p: Params) -> Array:
        """R (r, r)."""
        count = sum(name.startswith("tinylora_v.") for name in p)
        vectors = [p[f"tinylora_v.{i}"] for i in range(count)]
        xp = namespace(p["tinylora_P"], *vectors)
        v = xp.take(xp.stack(vectors), p["tinylora_group"], axis=0)
        r: int = p["tinylora_P"].shape[1]
        return xp.reshape(v @ xp.reshape(p["tinylora_P"], (self.u, r * r)), (r, r))

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """B (n_out, r) and R·A (r, n_in); Aᵀ and (B·R)ᵀ of an embedding."""
        a, b, middle = p["tinylora_A"], p["tinylora_B"], self._middle(p)
        return (a.T, (b @ middle).T) if site.kind == "Embedding" else (b, middle @ a)

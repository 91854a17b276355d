"""AdaMSS: adaptive multi-subspaces. Zheng et al. 2025, https://openreview.net/forum?id=8ZdWmpYxT0."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

from peft_any._tree import without
from peft_any.backend import namespace
from peft_any.blocks import diagonal
from peft_any.checks import OURS, refuse
from peft_any.clusters import grouped
from peft_any.contract import Additive, Array, Fresh, Kind, Layer, Params, Shape, Site
from peft_any.decompositions import seeded_svd
from peft_any.errors import ShapeError
from peft_any.fields import ByLayer, Count
from peft_any.segments import beside_bias, places, segments

_ROWS = "adamss_rows", "adamss_found_rows"  # of an adapter begun here; found for a file's segments


class AdamssConfig(Additive, ByLayer, peft_type="ADAMSS"):
    """[ΔW Δb] = Bᵢ·Aᵢ·V in the rows of segment i, where V holds directions of the base's [W b].

    `adamss_newB` V (R, n_in), with a column more where the layer has a bias, is Vᵀ of the R largest
    singular values of [W b], R = min(r, n_out, columns), and frozen. The K segments are clusters
    (k-means) of the rows of U; `adamss_rows` (n_out,) gives each row's place when they stand one
    below the other; files of Hugging Face PEFT lack it, and it is found again. Trained are
    `adamss_A.0` A₀ (rᵢ, R) and `adamss_B.0` B₀ (rows of the segment, rᵢ), and so on.

    num_subspaces: K, at most n_out.
    subspace_rank: rᵢ, at most the rows of the segment.
    use_dynamic_rank: rᵢ also counts only the singular values of the segment of U whose squares are
        above `svd_threshold` of the largest.
    random_seed: of torch's generator, which draws the sketch for the decomposition.
    init_weights: "orthogonal" (B = 0, A the segments' own directions), null (B random as well), or
        "peft_any", in our files alone: they hold the rows.
    use_asa: no effect here: Hugging Face PEFT's training stops some segments (`asa_…`, `…_warmup`,
        `mask_interval`).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    inner: ClassVar[str] = r"\d*"
    frozen: ClassVar[frozenset[str]] = frozenset({"adamss_newB", *_ROWS})
    certain: ClassVar[bool] = True
    begun: ClassVar[str] = "init_weights"

    r: Count = 100
    num_subspaces: Count = 5
    subspace_rank: Count = 1
    init_weights: str | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def check(self) -> None:
        """Of booleans, only false has a meaning."""
        if self.init_weights is False:
            object.__setattr__(self, "init_weights", None)  # HF writes it so
        known = self.init_weights in ("orthogonal", None, OURS)
        refuse(self, init_weights=(known, '"orthogonal" or null'))

    def _count(self, site: Site) -> int:
        """K."""
        return min(self.num_subspaces, site.n_out)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """V, the segments' A and B, of sizes that the base decides, and the places of the rows."""
        columns = site.n_in + site.bias
        rank = min(self.r, site.n_out, columns)
        found: dict[str, Shape] = {"adamss_newB": (rank, columns)}
        for i in range(self._count(site)):
            found |= {f"adamss_A.{i}": (-1, rank), f"adamss_B.{i}": (-1, -1)}
        return {**found, **({"adamss_rows": (site.n_out,)} if self.init_weights == OURS else {})}

    def init(self, site: Site, new: Fresh) -> Params:
        """Decompose the base and cluster its rows, on the host."""
        w = beside_bias(new.base_for(site.name, "adamss_newB"))
        u, _, v = seeded_svd(w, min(self.r, *w.shape), 2, self.random_seed, new)
        xp, labels = namespace(w), grouped(u, self._count(site))
        a, b = {}, {}
        for i in range(self._count(site)):
            own = u[labels == i, :]
            _, s, right = xp.linalg.svd(own, full_matrices=False)
            rank = min(self.subspace_rank, len(s))
            if self.use_dynamic_rank:
                rank = min(rank, max(int(xp.sum(s**2 > self.svd_threshold * s[0] ** 2)), 1))
            a[f"adamss_A.{i}"] = new.array(right[:rank, :])
            b[f"adamss_B.{i}"] = new.normal((len(own), rank), 0.01 * (self.init_weights is None))
        return {"adamss_newB": new.array(v), **a, **b, "adamss_rows": new.array(places(labels))}

    def lacks(self, p: Params) -> str | None:
        """The rows, in Hugging Face PEFT's files."""
        return None if any(name in p for name in _ROWS) else "the rows of its segments"

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Find the rows again, where neither rounding nor another sketch can tell others."""
        sizes = [p[f"adamss_B.{i}"].shape[0] for i in range(self._count(site))]
        rows = places(segments(p["adamss_newB"], sizes, self.random_seed, new))
        return {**p, "adamss_found_rows": new.array(rows)}

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Say that the adapter was begun here, and holds its rows."""
        begun = any("adamss_rows" in p for p in sites.values())
        return replace(self, init_weights=OURS) if begun else self, without(sites, _ROWS[1:])

    def _joined(self, p: Params, site: Site) -> tuple[Array, Array]:
        """U (n_out, Σrᵢ), of the B with their rows in place, and A·V (Σrᵢ, columns)."""
        if (known := p.get("joined")) is not None:
            return known
        k = sum(name.startswith("adamss_A.") for name in p)
        a, b = ([p[f"adamss_{side}.{i}"] for i in range(k)] for side in "AB")
        ranks, columns = [x.shape[0] for x in a], [x.shape[1] for x in b]
        if (sum(x.shape[0] for x in b), columns) != (site.n_out, ranks):
            raise ShapeError(
                f"{site.name}: segments of {[tuple(x.shape) for x in b]} cannot make {site.n_out} "
                f"outputs of {ranks} directions: their rows are these, their columns those"
            )
        rows = next(p[name] for name in _ROWS if name in p)
        xp = namespace(rows, *a)
        return xp.take(diagonal(b), rows, axis=0), xp.concat(a) @ p["adamss_newB"]

    def prepare(self, p: Params, base: Layer) -> Params:
        """Join the segments once."""
        return {**p, "joined": self._joined(p, base.site)}

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """The segments' B in their rows, and their A·V."""
        left, right = self._joined(p, site)
        return left, right[:, : site.n_in]

    def rank(self, site: Site) -> int:
        """Σrᵢ at most."""
        return self._count(site) * self.subspace_rank

    def changes_bias(self, site: Site) -> bool:
        """Where there is one."""
        return site.bias

    def bias_delta(self, p: Params, site: Site) -> Array | None:
        """Of V's last column."""
        left, right = self._joined(p, site)
        return left @ right[:, site.n_in] if right.shape[1] > site.n_in else None

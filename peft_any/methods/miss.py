"""MiSS: matrix shard sharing, once Bone, whose files are read too. Kang & Yin 2024, https://arxiv.org/abs/2409.15371."""

from typing import ClassVar, Literal, Self

from peft_any.backend import creation_device, inv, namespace
from peft_any.checks import check_divides
from peft_any.contract import Array, Dense, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.errors import ShapeError
from peft_any.fields import Biases, ByLayer, Count, Excludes, Rate
from peft_any.initial import kaiming, zeros
from peft_any.layer import linear, merged_for_calls
from peft_any.linalg import packed
from peft_any.outputs import added


class MissConfig(Tuner, Biases, ByLayer, Excludes, peft_type="MISS"):
    """W′ = W + Mᵀ·[I I …], that is ΔW[o, j] = M[j mod r, o], with `miss_block` M (r, n_out).

    init_weights: true (M = 0), false (M uniform), or another form of the same idea:
        "mini": M is `miss_block` (r, mini_r), repeated along the outputs (mini_r divides n_out);
        "bat": each tile T (r, r) of W becomes T + T·Mᵢ + Mᵢ, with one block Mᵢ of `miss_block`
        (n_out/r, r, r) for each row of tiles (r divides n_in and n_out).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})

    r: Count = 64
    miss_dropout: Rate = 0.0
    mini_r: Count = 1
    init_weights: bool | Literal["bat", "mini"] = True

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override] # depends on the form
        """Only the tiles' unmerging inverts matrices."""
        return ("linalg",) if self.init_weights == "bat" else ()

    def per_site(self, site: Site) -> Self:
        """Check that shards and tiles fit."""
        n, r = site.n_in, self.r
        if r > n:
            raise ShapeError(f"{site.name}: r={r} cannot shard {n} inputs: give at most {n}")
        if self.init_weights == "bat":
            check_divides("r", r, site)
        if self.init_weights == "mini":
            check_divides("mini_r", self.mini_r, site, inputs=False)
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """M, or its repeated part, or the blocks of the tiles: zero."""
        r, m = self.r, site.n_out
        forms: dict[bool | str, Shape] = {"bat": (m // r, r, r), "mini": (r, self.mini_r)}
        start = zeros if self.init_weights else kaiming
        return {"miss_block": start(*forms.get(self.init_weights, (r, m)))}

    def shards(self, p: Params, site: Site) -> Array:
        """M (r, n_out)."""
        m: Array = p["miss_block"]
        if self.init_weights == "mini":
            m = namespace(m).tile(m, (1, site.n_out // self.mini_r))
        return m

    def merge(self, p: Params, base: Dense) -> Dense:
        """Add M to every shard, or turn every tile."""
        w, m = base.weight, p["miss_block"]
        if self.init_weights == "bat":
            eye = namespace(w).eye(self.r, dtype=w.dtype, device=creation_device(w))
            return base.replace(weight=self._tiled(w, eye + m, m))
        return base.replace(weight=self._shifted(w, self.shards(p, base.site)))

    def prepare(self, p: Params, base: Layer) -> Params:
        """Merge tiles, for calls."""
        return merged_for_calls(self, p, base) if self.init_weights == "bat" else p

    def product(self, p: Params, base: Dense) -> tuple[Array, Array] | None:
        """Mᵀ, and the identity repeated over the shards; tiles have no small product."""
        if self.init_weights == "bat":
            return None
        m = self.shards(p, base.site)
        xp, shards = namespace(m), -(-base.site.n_in // self.r)
        eye = xp.eye(self.r, dtype=m.dtype, device=creation_device(m))
        return xp.matrix_transpose(m), xp.tile(eye, (1, shards))[:, : base.site.n_in]

    def _shifted(self, w: Array, m: Array) -> Array:
        """W + Mᵀ·[I I …], shard by shard; what is left over is the first of the last shard's."""
        xp, (rows, n), r = namespace(w), w.shape, self.r
        even, m = n - n % r, xp.reshape(packed(xp.matrix_transpose(m)), (rows, 1, r))
        whole: Array = xp.reshape(xp.reshape(w[:, :even], (rows, -1, r)) + m, (rows, even))
        if even < n:
            whole = xp.concat([whole, w[:, even:] + m[:, 0, : n - even]], axis=1)
        return whole

    def _tiled(self, w: Array, factor: Array, shift: Array) -> Array:
        """Give T·factorᵢ + shiftᵢ for every tile T of the i-th row of tiles."""
        xp, (m, n), r = namespace(w), w.shape, self.r
        product = xp.reshape(w, (m // r, n, r)) @ factor
        tiles = xp.reshape(product, (m // r, r, n // r, r)) + shift[:, :, None, :]
        return xp.reshape(tiles, (m, n))

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x) + (the sum of x's shards)·M; tiles are merged."""
        if self.init_weights == "bat":
            return super().forward(p, x, base)
        return added(base, x, self._added(p, x, base.site))

    def _added(self, p: Params, x: Array, site: Site) -> Array:
        xp, lead, over = namespace(x), tuple(x.shape[:-1]), -site.n_in % self.r
        if over:
            none = xp.zeros((*lead, over), dtype=x.dtype, device=creation_device(x))
            x = xp.concat([x, none], axis=-1)
        shards = xp.reshape(x, (*lead, (site.n_in + over) // self.r, self.r))
        # some libraries multiply by ones sooner than they sum
        ones = xp.ones((shards.shape[-2],), dtype=x.dtype, device=creation_device(x))
        return linear(ones @ shards, xp.matrix_transpose(self.shards(p, site)))

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Thin what is sharded; tiles are never thinned, as in HF."""
        if self.init_weights == "bat":
            return self.forward(p, x, base)
        thin = noise.at("input").thinned(x, self.miss_dropout)
        return added(base, x, self._added(p, thin, base.site))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """Subtract M from every shard; tiles are (T′ − Mᵢ)·(I + Mᵢ)⁻¹."""
        w, m = merged.weight, p["miss_block"]
        if self.init_weights != "bat":
            return merged.replace(weight=self._shifted(w, -self.shards(p, merged.site)))
        back = inv(namespace(w).eye(self.r, dtype=w.dtype, device=creation_device(w)) + m)
        return merged.replace(weight=self._tiled(w, back, -(m @ back)))

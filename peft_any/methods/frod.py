"""FRoD: full rank by rotational degrees. Wan et al. 2026, https://doi.org/10.1609/aaai.v40i31.39813."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

from peft_any import joint
from peft_any._tree import without
from peft_any.backend import astype, is_differentiated, namespace
from peft_any.checks import OURS, refuse
from peft_any.contract import Array, Dense, Fresh, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.fields import Biases, ByLayer, FanInFanOut, Rate, Share
from peft_any.layer import linear
from peft_any.outputs import added

_U = "frod_U", "frod_found_U"  # of an adapter begun here; found for the V of a file


class FrodConfig(Tuner, Biases, ByLayer, FanInFanOut, peft_type="FROD"):
    """W′ = U·(S + diag(λ))·Vᵀ, with `frod_lambda_l` λ (n_in,) and a sparse S (n_in, n_in).

    S has the k values `frod_lambda_s_values` (k,) at `frod_s_indices` (2, k), off the diagonal.
    U (n_out, n_in), of columns of length 1, and the first λ follow from the base, W = U·diag(λ)·Vᵀ.
    Layers of a role, the last two parts of their names, share V (n_in, n_in): `frod_V.self_query`.

    sparse_rate: k = `sparse_rate`·n_in² rounded down, at least 1 unless 0; "peft_any" in our files.
    projection_prng_key: seed of the places, drawn by torch's CPU generator.
    regularization_alpha: of the matrices that are inverted on the way to V.
    save_projection: true; Hugging Face PEFT pairs the V that it loads with the U of its own V.
    init_weights: true (S = 0), or false (S, and what λ gains, of deviation 0.1).
    progressbar, runtime_offload_base_weight: no effect.
    """

    thins: ClassVar[str] = "frod_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    needs: ClassVar[tuple[str, ...]] = ("linalg",)
    frozen: ClassVar[frozenset[str]] = frozenset({*_U, *joint.SHARED})
    grouped: ClassVar[frozenset[str]] = frozenset(joint.SHARED)
    certain: ClassVar[bool] = True
    begun: ClassVar[str] = "sparse_rate"

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: Rate = 0.0
    init_weights: bool = True
    sparse_rate: Share | Literal["peft_any"] = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def check(self) -> None:
        """A file must hold V."""
        why = "true: without V, whose signs are its writer's, a file fits no other machine: merge"
        refuse(self, save_projection=(self.save_projection, f"{why} it there (merge_and_unload)"))

    def shapes(self, site: Site) -> dict[str, Shape]:
        """λ and S's values."""
        n, rate = site.n_in, self.sparse_rate
        k = -1 if isinstance(rate, str) else min(max(int(n * n * rate), rate > 0), n * (n - 1))
        return {"frod_lambda_l": (n,), "frod_lambda_s_values": (k,)}

    def init(self, site: Site, new: Fresh) -> Params:
        """λ of the base, S zero."""
        (u, scale), shapes = self._spread(site, new), self.shapes(site).items()
        draw = new.zeros if self.init_weights else lambda shape: new.normal(shape, 0.1)
        p = {name: draw(shape) for name, shape in shapes}
        return {**p, "frod_lambda_l": p["frod_lambda_l"] + astype(scale, new.dtype), "frod_U": u}

    def _spread(self, site: Site, new: Fresh) -> tuple[Array, Array]:
        v, *_ = joint.named(joint.role_of(site.name))
        return joint.spread(new.base_for(site.name, "FROD").weight, new.shared[v])

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """V, places and their bounds, for each role."""
        found = dict[str, Shape]()
        for role, (site, *_) in joint.by_role(sites).items():
            n, (k,) = self.shapes(site).values()
            found |= zip(joint.named(role), (2 * n, (2, k), (2,)), strict=True)
        return found

    def init_shared(self, sites: Sequence[Site], new: Fresh) -> Params:
        """Decompose the layers of each role jointly; draw the places, role by role."""
        stream, found = new.torch(self.projection_prng_key), dict[str, Array]()
        for role, own in joint.by_role(sites).items():
            weights = [new.base_for(site.name, "FROD").weight for site in own]
            (n,), (k,) = self.shapes(own[0]).values()
            v = joint.joint_basis(weights, self.regularization_alpha)
            values = v, joint.off_diagonal_places(stream, n, k), [n, n]
            found |= zip(joint.named(role), map(new.array, values), strict=True)
        return found

    def lacks(self, p: Params) -> str | None:
        """U, in every file."""
        return None if any(name in p for name in _U) else "U, which follows from the base's weight"

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Find U again."""
        return {**p, "frod_found_U": self._spread(site, new)[0]}

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Leave U out; say that the adapter was begun here: HF's U would be of another V."""
        begun = any("frod_U" in p for p in sites.values())
        return replace(self, sparse_rate=OURS) if begun else self, without(sites, _U)

    def _factors(self, p: Params, site: Site) -> tuple[Array, Array, Array]:
        """U (n_out, n_in), S + diag(λ) and Vᵀ (n_in, n_in)."""
        v, places, _ = (p[name] for name in joint.named(joint.role_of(site.name)))
        middle = joint.with_diagonal(p["frod_lambda_s_values"], places, p["frod_lambda_l"])
        return next(p[name] for name in _U if name in p), middle, namespace(v).matrix_transpose(v)

    def merge(self, p: Params, base: Dense) -> Dense:
        """U·(S + diag(λ))·Vᵀ, and what other adapters have added to W."""
        u, middle, v = self._factors(p, base.site)
        whole = (u @ middle) @ v if u.shape[0] < u.shape[1] else u @ (middle @ v)
        before = base.unadapted
        return base.replace(weight=whole if before is None else base.weight + (whole - before))

    def prepare(self, p: Params, base: Layer) -> Params:
        """Merge, for calls; a step of training multiplies the batch alone."""
        trained = any(map(is_differentiated, (p["frod_lambda_l"], p["frod_lambda_s_values"])))
        return p if trained else {**p, "merged": self.merge(p, Dense.formed(base))}

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """What `prepare` has merged; or V, S + diag(λ) and U, one after the other."""
        merged: Dense | None = p.get("merged")
        if merged is not None:
            return merged(x)
        y = self._applied(p, x, base.site)
        if base.adapted:
            return added(base, x, y - linear(x, base.original))
        return y if base.bias is None else y + base.bias

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Thin the input of the change."""
        thin = noise.at("input").thinned(x, self.frod_dropout)
        return added(base, x, self._applied(p, thin, base.site) - linear(thin, base.original))

    def _applied(self, p: Params, x: Array, site: Site) -> Array:
        u, middle, v = self._factors(p, site)
        return linear(linear(linear(x, v), middle), u)

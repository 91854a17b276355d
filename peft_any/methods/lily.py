"""Lily: low-rank interconnected adaptation. Zhong et al. 2024, https://arxiv.org/abs/2407.09946."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from peft_any.backend import namespace
from peft_any.contract import Array, Kind, Params, Routed, Shape, Site
from peft_any.fields import ByLayer, Count, Excludes, within
from peft_any.initial import kaiming, zeros
from peft_any.layer import linear
from peft_any.mixtures import softmax
from peft_any.patterns import in_order


class LilyConfig(Routed, ByLayer, Excludes, peft_type="LILY"):
    """y = W·x + b + s·(Σₑ pₑ·Bₑ)ᵀ·h, h = A·x, with a mixture p of k = `num_B` factors Bₑ.

    `lily_A.weight` is A (r, n_in), `lily_B.weight` the Bₑ (r, n_out) one below the other
    (k·r, n_out), and `lily_router.weight` R (k, r): p is the mean of softmax(R·h) over all tokens
    of all rows of the batch, so that what a row gives depends on the others.

    stride_A: this many consecutive layers share A, and all share B, of those that one entry of
        `target_modules` names and that have one shape; a file holds them once for every layer.
    num_B: k. scaling: s. init_weights: true (B = 0), false (B random).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    why: ClassVar[str] = "its mixture of factors depends on the whole batch"

    r: Count = 32
    stride_A: Count = 1  # noqa: N815 - HF's name
    num_B: Annotated[int, within(2)] = 2  # noqa: N815 - the router chooses among them
    scaling: float = 1.0
    init_weights: bool = True

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A, the Bₑ, and the router: uniform, and B zero unless `init_weights` is false."""
        blank = zeros if self.init_weights else kaiming
        return {
            "lily_A.weight": kaiming(self.r, site.n_in),
            "lily_B.weight": blank(self.num_B * self.r, site.n_out),
            "lily_router.weight": kaiming(self.num_B, self.r),
        }

    def ties(self, sites: Mapping[str, Params]) -> dict[tuple[str, str], str]:
        """B is the group's first layer's; A that of the first of each `stride_A` layers."""
        groups: dict[object, list[str]] = {}
        for name in in_order(sites):
            p = sites[name]
            sizes = p["lily_A.weight"].shape[1], p["lily_B.weight"].shape[1]
            groups.setdefault((self._target(name), *sizes), []).append(name)
        tied: dict[tuple[str, str], str] = {}
        for names in groups.values():
            for i, name in enumerate(names):
                first = names[i // self.stride_A * self.stride_A]
                tied |= {(name, "lily_A.weight"): first, (name, "lily_B.weight"): names[0]}
        return {(name, key): first for (name, key), first in tied.items() if name != first}

    def _target(self, name: str) -> str:
        """The entry of `target_modules` that names a layer; HF asks for no dot before it."""
        named = self.target_modules
        if isinstance(named, str) and named != "all-linear":
            return named
        listed = named if isinstance(named, list) else []
        return max((t for t in listed if name.endswith(t)), key=len, default=name)

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Two products, with the factor mixed in between."""
        xp, k = namespace(x, p["lily_A.weight"]), self.num_B
        h = linear(x, p["lily_A.weight"])
        shares = softmax(linear(h, p["lily_router.weight"]))
        mean = xp.mean(xp.reshape(shares, (-1, k)), axis=0)
        flat = xp.reshape(p["lily_B.weight"], (k, self.r * site.n_out))
        mixed = xp.reshape(mean[None, :] @ flat, (self.r, site.n_out))
        return linear(self.scaling * h, xp.matrix_transpose(mixed))

"""IA³: infused adapters by inhibiting and amplifying inner activations.

Liu et al. 2022, https://arxiv.org/abs/2205.05638.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from operator import mul, truediv
from typing import ClassVar, Self

from peft_any.backend import namespace
from peft_any.contract import Array, Dense, Kind, Layer, Params, Shape, Site, Tuner
from peft_any.errors import ConfigError
from peft_any.fields import Excludes, FanInFanOut
from peft_any.initial import normal, ones
from peft_any.outputs import scaled, spread
from peft_any.patterns import expression


class IA3Config(Tuner, Excludes, FanInFanOut, peft_type="IA3"):
    """y = l ⊙ (W·x + b), with l (n_out, 1); in a feed-forward layer y = W·(l ⊙ x) + b, l (1, n_in).

    A convolution's l is (1, channels, 1, 1[, 1]) in both.

    feedforward_modules: which layers scale their input: those whose names end with one of a
        list, or match a regular expression in full; none by default.
    init_ia3_weights: true (l = 1) or false (standard normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D", "Conv2d", "Conv3d"})
    separable: ClassVar[bool] = True

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    def check(self) -> None:
        """Feed-forward layers are among the targets."""
        feed, target = self.feedforward_modules, self.target_modules
        if isinstance(feed, list) and isinstance(target, list) and not {*feed} <= {*target}:
            raise ConfigError(
                f"{self.where}: feedforward_modules {sorted({*feed} - {*target})} cannot scale "
                "their inputs: they must be among target_modules"
            )
        if isinstance(feed, str):
            expression(feed, f"{self.where}: feedforward_modules")

    def is_feedforward(self, site: Site) -> bool:
        """Whether the layer scales its input."""
        feed = self.feedforward_modules
        if isinstance(feed, str):
            return expression(feed, "feedforward_modules").fullmatch(site.name) is not None
        # HF asks for no dot before the entry: "wo" matches "two" too.
        return site.name.endswith(tuple(feed or ()))

    def changes_bias(self, site: Site) -> bool:
        """Only where the output is scaled."""
        return not self.is_feedforward(site)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The vector l, as a row, a column or a convolution's channels: ones."""
        feed, start = self.is_feedforward(site), ones if self.init_ia3_weights else normal
        size = site.n_in if feed else site.n_out
        if site.is_conv:
            return {"ia3_l": start(1, size, *(1,) * len(site.kernel))}
        return {"ia3_l": start(1, size) if feed else start(size, 1)}

    def merge(self, p: Params, base: Dense) -> Dense:
        """Scale W's rows and the bias, or W's columns."""
        gain, shift = self._gains(p, base.site)
        bias = base.bias if shift is None or base.bias is None else base.bias * shift
        return base.replace(weight=spread(mul, base.weight, gain), bias=bias)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """l ⊙ base(x), or base(l ⊙ x)."""
        if not self.is_feedforward(base.site):
            gain = namespace(p["ia3_l"]).reshape(p["ia3_l"], (base.site.n_out,))
            return scaled(base(x), gain) if type(base) is Dense else base(x) * gain
        gain, _ = self._gains(p, base.site)
        if base.site.groups > 1:  # every group reads inputs of its own
            return super().forward(p, x, base)
        return base(x * namespace(gain).reshape(gain, (base.site.width,)))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """W′/l: within two roundings of every entry, however small l is; where l = 0, NaN.

        HF divides by l + 10⁻⁸ instead, which is off by 10⁻⁸/l and hides what l = 0 has erased.
        """
        gain, shift = self._gains(p, merged.site)
        bias = merged.bias if shift is None or merged.bias is None else merged.bias / shift
        return merged.replace(weight=spread(truediv, merged.weight, gain), bias=bias)

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Say that no layer is feed-forward: HF would guess where the field is null."""
        feed = self.feedforward_modules
        return replace(self, feedforward_modules=[] if feed is None else feed), dict(sites)

    def _gains(self, p: Params, site: Site) -> tuple[Array, Array | None]:
        """Factors of the flat weight, (n_out, 1), (1, width) or (n_out, width), and of the bias."""
        scale = p["ia3_l"]
        xp = namespace(scale)
        if not self.is_feedforward(site):
            return xp.reshape(scale, (site.n_out, 1)), xp.reshape(scale, (site.n_out,))
        groups, taps = site.groups, prod(site.kernel)
        each = (groups, 1, site.n_in // groups, 1)
        every = (groups, site.n_out // groups if groups > 1 else 1, site.n_in // groups, taps)
        gain = xp.broadcast_to(xp.reshape(scale, each), every)
        return xp.reshape(gain, (every[0] * every[1], site.width)), None

"""The contract: a method is a frozen dataclass of numbers with pure functions of arrays."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from peft_any._typing import Array, DTypeLike, Params, Shape
from peft_any.backend import plus_product, resolve, summed
from peft_any.checks import OURS, check_site, refuse_restart
from peft_any.dropout import Noise, dropped
from peft_any.errors import ConfigError, Irreversible
from peft_any.factors import paired
from peft_any.initial import drawn
from peft_any.layer import MATRICES, Dense, Kind, Layer, Site, linear
from peft_any.linalg import as_product
from peft_any.outputs import added, gained
from peft_any.prompt import Prompt as Prompt
from peft_any.registry import Config as Config
from peft_any.registry import method_for as method_for
from peft_any.rng import Fresh
from peft_any.single import AdaptedLayer as AdaptedLayer


class Tuner(Config):
    """A method that maps a dense layer to a dense layer.

    Every method but `at` is called on a configuration already resolved for its site by `at`,
    with arrays of one library, device and floating dtype; none writes to its inputs.
    """

    kinds: ClassVar[frozenset[Kind]] = MATRICES
    """Layer kinds that the method supports."""
    kernels: ClassVar[Literal["any", "ungrouped", "square"]] = "any"
    """Which convolutions: all, those of one group, or of these those with equal sides."""
    copied: ClassVar[frozenset[str]] = frozenset()
    """Shared arrays that Hugging Face PEFT's files hold once more for every site."""
    thins: ClassVar[str] = ""
    """The field with the rate at which training thins the adapter's input, if there is one."""
    draws: ClassVar[bool] = False
    """Whether training draws numbers whatever the rates of dropout."""
    inner: ClassVar[str] = "(weight|bias)?"
    """What may follow the first part of a parameter's name, as a regular expression."""
    usual: ClassVar[tuple[str, ...]] = ()
    """Modules, by last part, of which the first that is there is the target where none is named."""
    ordered: ClassVar[bool] = False
    """Whether what they lack follows from the order of the model's layers: it is taken unasked
    where that is told (`in_model_order`). A file may then hold no tensor of any site."""

    target_modules: list[str] | str | None = None

    @property
    def separable(self) -> bool:
        """Whether no row of the merged weight depends on another row, of weight or parameters."""
        return False

    @property
    def certain(self) -> bool:
        """Whether what parameters lack follows from the base without doubt: it is taken unasked."""
        return False

    def at(self, site: Site) -> Self:
        """Resolve what depends on the site: numbers by patterns, and sizes.

        Raises
        ------
        ConfigError
            If the method does not support the layer's kind, or a number does not fit it.
        ShapeError
            If the layer's sizes do not fit the method's.
        """
        check_site(self, site)
        return self.per_site(site)

    def among(self, sites: Sequence[Site]) -> Self:  # noqa: ARG002
        """Resolve, before `at`, what depends on all sites together; mostly nothing does."""
        return self

    def per_site(self, site: Site) -> Self:  # noqa: ARG002 - a hook: most methods need no site
        """Give the configuration with this site's numbers; the default has none of its own."""
        return self

    @abc.abstractmethod
    def shapes(self, site: Site) -> dict[str, Shape]:
        """Name the site's parameters, by the checkpoint's suffixes, with their shapes.

        A shape may say how its array starts (`initial`). A size of −1 is for the base to decide.
        """

    def init(self, site: Site, new: Fresh) -> Params:
        """Draw fresh parameters as Hugging Face PEFT does; unless overridden, as `shapes` says."""
        return drawn(self.shapes(site), new, self.where)

    @abc.abstractmethod
    def merge(self, p: Params, base: Dense) -> Dense:
        """Give the adapted layer as a plain one."""

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """Apply the adapted layer to `x`; overridden where that is cheaper than merging."""
        merged: Dense | None = p.get("merged")
        return (self.merge(p, Dense.formed(base)) if merged is None else merged)(x)

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Apply the adapted layer in training, without what `noise` drops."""
        return dropped(self, p, x, base, noise)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Add what every call with these parameters would compute anew, under names of its own.

        `forward` and `merge` give the same without. Where `forward` only merges: the merged layer.
        """
        plain = type(self).forward is Tuner.forward
        return {**p, "merged": self.merge(p, Dense.formed(base))} if plain else p

    def settled(self, p: Params) -> Params:
        """Bring the parameters to where training keeps them, after each of its steps."""
        return p

    def effect(self, p: Params, base: Dense) -> tuple[Array, Array | None]:
        """Give what merging adds to the weight, and to the bias if it changes it."""
        merged = self.merge(p, base)
        moves = merged.bias is not None and self.changes_bias(base.site)
        return merged.weight - base.weight, merged.bias - base.sure_bias if moves else None

    def product(self, p: Params, base: Dense) -> tuple[Array, Array] | None:  # noqa: ARG002
        """Give u (n_out, k) and v (k, width): merging adds u·v to the weight; None for large k."""
        return None

    def blockwise(self, p: Params, site: Site) -> tuple[Array, Any] | None:  # noqa: ARG002
        """Give blocks t (k, b, b), or (1, b, b) for all alike, and a gain g (n_out,) or None.

        Merging makes g ⊙ (W·diag(t)) of the weight; None where it does otherwise.
        """
        return None

    def changes_bias(self, site: Site) -> bool:  # noqa: ARG002
        """Whether merging changes the layer's bias."""
        return False

    def unmerge(self, p: Params, merged: Dense) -> Dense:  # noqa: ARG002
        """Recover the base from the merged layer alone; `Irreversible` where that is not enough."""
        raise Irreversible(
            f"{merged.site.name}: {self.peft_type} cannot be unmerged from the merged weight "
            "alone: keep the base weights (a PeftModel does)"
        )

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:  # noqa: ARG002
        """Name the arrays that all sites share, with their shapes; most methods have none."""
        return {}

    def init_shared(self, sites: Sequence[Site], new: Fresh) -> Params:
        """Draw the arrays that all sites share; `merge` and `forward` get them among `p`."""
        return drawn(self.shared_shapes(sites), new, self.where)

    def begin(self, site: Site, new: Fresh) -> Params:
        """Draw all that a single site needs: the shared arrays, and its own."""
        refuse_restart(self, site.name)
        new.shared = self.init_shared([site], new)
        return {**new.shared, **self.init(site, new)}

    def lacks(self, p: Params) -> str | None:  # noqa: ARG002
        """Name what the parameters lack because their writer took it from the base, if anything."""
        return None

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:  # noqa: ARG002
        """Add what the parameters lack, from the base (`new.base`)."""
        return p

    def ties(self, sites: Mapping[str, Params]) -> dict[tuple[str, str], str]:  # noqa: ARG002
        """Say of parameters (site, name) at which other site the one stands that they repeat."""
        return {}

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Give configuration and parameters in the form that a file carries."""
        said: dict[str, Any] = dict.fromkeys(self.marks, OURS)
        return (replace(self, **said) if said else self), dict(sites)

    def layer(
        self,
        n_in: int,
        n_out: int,
        *,
        kind: Kind = "Linear",
        kernel: Shape = (),
        weight: Array | None = None,
        bias: Array | None = None,
        seed: int = 0,
        backend: str = "auto",
        dtype: DTypeLike = "float32",
    ) -> AdaptedLayer:
        """Make one adapted layer, without a model.

        Parameters
        ----------
        n_in, n_out, kind, kernel
            As in `Site`.
        weight, bias : array, optional
            The base layer in the checkpoint's layout; needed by initial values that read it.
        seed : int
            Seed of the initial values: the same numbers on every library.
        backend, dtype : str
            Where the parameters live, and their dtype.

        Examples
        --------
        >>> from peft_any.methods.lora import LoraConfig
        >>> LoraConfig(r=8, lora_alpha=16).layer(768, 768, seed=0).num_parameters
        12288
        """
        site = Site("layer", n_in, n_out, kind, kernel, bias=bias is not None)
        base = None if weight is None else Dense.of(weight, bias, site)
        to, config = resolve(backend, weight, bias), self.at(site)
        new = Fresh(seed, to, key=site.name, dtype=dtype, base=base)
        return AdaptedLayer(config, site, config.begin(site, new), base)


class Additive(Tuner):
    """W′ = W + ΔW, where ΔW does not depend on W; or g ⊙ (W + ΔW), with a gain g by rows."""

    order: ClassVar[int] = 1
    """The power of `r` that the k of `factors` is; 0 where it does not follow from `r`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.delta is Additive.delta and cls.factors is Additive.factors:
            raise ConfigError(f"{cls.__qualname__}: says nothing of ΔW: give `delta` or `factors`")

    def delta(self, p: Params, site: Site) -> Array:
        """Form ΔW (n_out, width), a new array: the product of the factors, unless overridden."""
        u, v = self.factors(p, site)
        return u @ v

    def onto(self, p: Params, weight: Array, site: Site, *, minus: bool = False) -> Array:
        """Give weight + ΔW, or weight − ΔW; overridden where ΔW has few entries."""
        if type(self).delta is Additive.delta:
            return plus_product(weight, *self.factors(p, site), minus=minus)
        return summed(weight, self.delta(p, site), p.values(), minus=minus)

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give u (n_out, k) and v (k, width) with ΔW = u·v; overridden where k can be small."""
        return as_product(self.delta(p, site))

    def rank(self, site: Site) -> int:
        """Estimate the k of `factors` before they are formed."""
        most, r = min(site.n_out, site.width), getattr(self, "r", None)
        return most if r is None or not self.order else int(r**self.order)

    def bias_delta(self, p: Params, site: Site) -> Array | None:  # noqa: ARG002
        """Give what is added to the bias (n_out,), if anything."""
        return None

    def gain(self, p: Params, base: Layer) -> Array | None:  # noqa: ARG002
        """Give the factor g (n_out,) of the rows of W + ΔW, if the method has one."""
        return None

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Compute ΔW·x + Δb, by the factors where they are given; overridden where that is dear."""
        shift = self.bias_delta(p, site)
        if type(self).factors is Additive.factors:
            return linear(x, self.delta(p, site), shift)
        u, v = (p["u"], p["v"]) if "u" in p else self.factors(p, site)
        return linear(linear(x, v), u, shift)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Form the factors once, where calls multiply by them."""
        own = type(self).factors is not Additive.factors
        plain = own and type(self).residual is Additive.residual
        return paired(self, p, base.site) if plain else super().prepare(p, base)

    def effect(self, p: Params, base: Dense) -> tuple[Array, Array | None]:
        """ΔW, Δb."""
        if self.gain(p, base) is not None:
            return super().effect(p, base)
        return self.delta(p, base.site), self.bias_delta(p, base.site)

    def merge(self, p: Params, base: Dense) -> Dense:
        """g ⊙ (W + ΔW), b + Δb."""
        bias = base.bias if (db := self.bias_delta(p, base.site)) is None else base.sure_bias + db
        weight, gain = self.onto(p, base.weight, base.site), self.gain(p, base)
        return base.replace(weight=weight if gain is None else gain[:, None] * weight, bias=bias)

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """W′ − ΔW, b′ − Δb: exact but for one rounding of each sum; rows with a gain are lost."""
        if self.gain(p, merged) is not None:
            return super().unmerge(p, merged)
        shift = self.bias_delta(p, merged.site)
        bias = merged.bias if shift is None else merged.sure_bias - shift
        weight = self.onto(p, merged.weight, merged.site, minus=True)
        return merged.replace(weight=weight, bias=bias)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x) + residual(x); a gain scales all of it but the bias."""
        more, gain = self.residual(p, x, base.site), self.gain(p, base)
        return added(base, x, more) if gain is None else gained(base, x, gain, more)

"""X-LoRA: a gate over LoRA experts. Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_any._typing import Array, Params, Shape
from peft_any.activations import clipped
from peft_any.adapter import Adapter
from peft_any.backend import astype, dtype_name, namespace
from peft_any.checks import check_fields
from peft_any.errors import ConfigError, ShapeError
from peft_any.experts import stacked
from peft_any.layer import Kind, Site, linear
from peft_any.mixtures import largest_shares, softmax
from peft_any.rng import Fresh
from peft_any.routed import Routed

_A, _B = "experts_A.weight", "experts_B.weight"


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Routed, peft_type="EXPERTS", prefix="experts_"):
    """y = W·x + b + Σₑ pₑ·Bₑ·Aₑ·x, with the p of each token given to the call as `scalings`.

    `experts_A.weight` (E·r, n_in) holds the E = `n_experts` matrices Aₑ one below the other, and
    `experts_B.weight` (n_out, E·r) the scaled Bₑ side by side. `experts_of` makes them of adapters.

    order: the layers that `scalings` (rows, positions, layers, E) are for, in their order there.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    why: ClassVar[str] = "every call scales its experts"

    r: int = 8
    n_experts: int = 2
    order: list[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "r", "n_experts")

    @property
    def takes(self) -> frozenset[str]:
        """The experts' shares."""
        return frozenset({"scalings"})

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The experts' factors."""
        k = self.n_experts * self.r
        return {_A: (k, site.n_in), _B: (site.n_out, k)}

    def init(self, site: Site, new: Fresh) -> Params:
        """A uniform, B zero."""
        shapes = self.shapes(site)
        return {_A: new.kaiming(shapes[_A]), _B: new.zeros(shapes[_B])}

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Two products, with each token's scalings in between."""
        if "scalings" not in p:
            raise ConfigError(
                f"{site.name}: experts need their scalings: give model.routed(scalings=…), as "
                "xlora_scalings makes them"
            )
        scalings: Array = p["scalings"]
        if scalings.ndim == x.ndim + 1 and self.order and site.name in self.order:
            scalings = scalings[..., self.order.index(site.name), :]
        if tuple(scalings.shape) != (*x.shape[:-1], self.n_experts):
            raise ShapeError(
                f"{site.name}: scalings of shape {tuple(p['scalings'].shape)} for input of shape "
                f"{tuple(x.shape)}: give (rows, positions, {self.n_experts}), or with an axis of "
                f"{len(self.order or ())} layers before the last"
            )
        xp, h = namespace(x, scalings, p[_A]), linear(x, p[_A])
        shares = xp.expand_dims(astype(scalings, dtype_name(h)), axis=-1)
        parts = xp.reshape(h, (*x.shape[:-1], self.n_experts, self.r)) * shares
        return linear(xp.reshape(parts, h.shape), p[_B])


def experts_of(experts: Sequence[Adapter], order: Sequence[str] | None = None) -> Adapter:
    """Put LoRA adapters side by side, for calls that scale each of them by token.

    Parameters
    ----------
    experts : sequence of Adapter
        LoRAs of one rank on the same linear layers.
    order : sequence of str, optional
        The layers in the model's own order, which is that of X-LoRA's scalings; by default in
        that of the first adapter.

    Returns
    -------
    Adapter
        To be applied by `PeftModel.add` and `PeftModel.routed`, as ``scalings``.

    Raises
    ------
    ConfigError, ShapeError
        If an adapter is no plain LoRA, or they differ in layers, ranks or shapes.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import LoraConfig, PeftModel
    >>> model = PeftModel({"fc.weight": np.zeros((3, 4), "float32")})
    >>> config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    >>> tasks = [model.add(name, config, seed=i) for i, name in enumerate("ab")]
    >>> _ = model.add("mixed", experts_of(tasks))
    >>> model.activate("mixed")
    >>> scalings = np.zeros((5, 6, 2), "float32")
    >>> y = model.routed(scalings=scalings).bind().layers["fc"](np.ones((5, 6, 4), "float32"))
    >>> bool(np.all(y == 0))
    True
    """
    r, sites = stacked(experts)
    made = {name: {_A: a, _B: b} for name, (a, b, _) in sites.items()}
    config = ExpertsConfig(
        r=r, n_experts=len(experts), target_modules=[*made], order=[*(order or made)]
    )
    return Adapter(config, made)


def xlora_scalings(
    p: Mapping[str, Array],
    hidden: Array,
    layers: int,
    *,
    layerwise_scalings: bool = False,
    enable_softmax: bool = True,
    softmax_temperature: float = 1.0,
    top_k_lora: int | None = None,
    enable_softmax_topk: bool = False,
    global_scaling_weight: float = 1.0,
) -> Array:
    """Scale experts by token as X-LoRA's classifier does, under Hugging Face PEFT's names.

    Parameters
    ----------
    p : mapping of str to array
        The classifier's ``layers.<i>.weight`` and ``layers.<i>.bias``, with ReLU between them: a
        file has them after ``internal_xlora_classifier.``.
    hidden : array (rows, positions, hidden_size)
        The base's last hidden states, without experts.
    layers : int
        How many layers the experts adapt.
    layerwise_scalings, enable_softmax, softmax_temperature, top_k_lora, enable_softmax_topk, \
    global_scaling_weight
        As in the classifier's configuration.

    Returns
    -------
    array (rows, positions, layers, experts)

    Examples
    --------
    >>> import numpy as np
    >>> p = {"layers.0.weight": np.zeros((2, 4)), "layers.0.bias": np.zeros(2)}
    >>> xlora_scalings(p, np.ones((1, 1, 4)), 1)
    array([[[[0.5, 0.5]]]])
    """
    numbers = sorted({int(name.split(".")[-2]) for name in p})
    y, xp = hidden, namespace(hidden, *p.values())
    for i in numbers:
        y = linear(y, p[f"layers.{i}.weight"], p[f"layers.{i}.bias"])
        y = y if i == numbers[-1] else clipped(y, 0.0)
    count = y.shape[-1] // layers if layerwise_scalings else y.shape[-1]
    lead = tuple(hidden.shape[:-1])
    y = xp.reshape(y, (*lead, layers if layerwise_scalings else 1, count))
    if enable_softmax:
        y = softmax(y / softmax_temperature)
    if top_k_lora is not None:
        top: Any = largest_shares(y, top_k_lora)
        y = top if enable_softmax_topk else y * astype(top > 0.0, dtype_name(y))
    elif enable_softmax_topk:
        y = softmax(y)
    return global_scaling_weight * xp.broadcast_to(y, (*lead, layers, count))  # type: ignore[no-any-return]

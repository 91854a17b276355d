"""X-LoRA's gate, which scales LoRA experts by token, and experts so scaled, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_any._typing import Array
from peft_any.activations import clipped
from peft_any.backend import astype, creation_device, dtype_name, is_floating, namespace
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Site, linear
from peft_any.mixtures import among_largest, softmax, softmax_but_zeros


def scaled_experts(
    factors: tuple[Array, Array], x: Array, scalings: Array, order: Sequence[str], site: Site
) -> Array:
    """Compute Σₑ pₑ·Bₑ·Aₑ·x.

    Parameters
    ----------
    factors : array (E·r, n_in) and array (n_out, E·r)
        All Aₑ one below the other, and all Bₑ side by side.
    x : array (…, n_in), or of integers (…)
    scalings : array (…, E) or (…, layers, E)
    order : sequence of str
        The names of those layers.
    site : Site

    Raises
    ------
    ShapeError
        If the scalings are not those of x.
    """
    a, b = factors
    shape, count = tuple(scalings.shape), scalings.shape[-1]
    lead = tuple(x.shape[:-1] if is_floating(x) else x.shape)
    if scalings.ndim == len(lead) + 2 and site.name in order:
        scalings = scalings[..., order.index(site.name), :]
    if tuple(scalings.shape) != (*lead, count) or a.shape[0] % count:
        raise ShapeError(
            f"{site.name}: scalings of shape {shape} for input of shape {tuple(x.shape)} and "
            f"factors of {a.shape[0]} ranks in all: give (rows, positions, experts), or with an "
            f"axis of {len(order)} layers before the last"
        )
    xp, h = namespace(scalings, a), linear(x, a)
    shares = xp.expand_dims(astype(scalings, dtype_name(h)), axis=-1)
    parts = xp.reshape(h, (*lead, count, a.shape[0] // count)) * shares
    return linear(xp.reshape(parts, h.shape), b)


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
    y = _weighed(y, top_k_lora, enable_softmax_topk, global_scaling_weight)
    return xp.broadcast_to(y, (*lead, layers, count))


def _weighed(y: Any, top: int | None, again: bool, weight: float) -> Any:
    """Keep the `top` largest shares alone, take their softmax `again`, and weigh them."""
    if top is not None:
        y = y * astype(among_largest(y, top), dtype_name(y))
    return weight * (softmax_but_zeros(y) if again else y)


def passing(config: Any, p: Mapping[str, Array], lead: Sequence[int]) -> Array:
    """Give the scalings (…, experts) of the pass whose hidden states an X-LoRA's gate reads.

    Parameters
    ----------
    config : XLoraConfig
    p : mapping of str to array
        Its net, for the library and dtype.
    lead : sequence of int
        The shape of the tokens.
    """
    like = next(iter(p.values()))
    xp = namespace(like)
    y = xp.full(
        (*lead, config.count),
        config.scaling_pass_value,
        dtype=like.dtype,
        device=creation_device(like),
    )
    return _weighed(y, config.top_k_lora, config.enable_softmax_topk, config.global_scaling_weight)


_FIELDS = (
    "layerwise_scalings",
    "enable_softmax",
    "softmax_temperature",
    "top_k_lora",
    "enable_softmax_topk",
    "global_scaling_weight",
)


def gated(
    config: Any,
    names: Sequence[str],
    p: Mapping[str, Array],
    hidden: Array | None,
    site: str | None = None,
) -> Array:
    """Scale experts as an X-LoRA configuration says, in all layers or one.

    Parameters
    ----------
    config : XLoraConfig
    names : sequence of str
        Of the net's layers among `p`, in order.
    p : mapping of str to array
    hidden : array (…, hidden_size), optional
    site : str, optional
        Compute this layer's scalings alone, where layers differ.

    Returns
    -------
    array (…, experts), or (…, layers, experts)

    Raises
    ------
    ConfigError
        If the hidden states are not given, or it is not known which layer `site` is.
    """
    if hidden is None:
        raise ConfigError(
            f"{site}: the gate needs the base's last hidden states: give model.routed(hidden=…), "
            "or scalings=…"
        )
    if site is not None and config.layerwise_scalings and site not in (config.order or ()):
        raise ConfigError(
            f"{site}: layerwise_scalings has shares for each layer, and no file says for which: "
            "give load_xlora order=, the modules' names in the model's order"
        )
    net = {
        f"layers.{i}.{k}": p[f"{n}.{k}"] for i, n in enumerate(names) for k in ("weight", "bias")
    }
    last, count = f"layers.{len(names) - 1}", config.count
    layers = net[f"{last}.bias"].shape[0] // count
    if site is not None and config.layerwise_scalings:
        first = config.order.index(site) * count
        own, layers = slice(first, first + count), 1
        net[f"{last}.bias"] = net[f"{last}.bias"][own]
        net[f"{last}.weight"] = net[f"{last}.weight"][own, :]
    hidden = astype(hidden, dtype_name(net[f"{last}.weight"]))
    found = xlora_scalings(net, hidden, layers, **{k: getattr(config, k) for k in _FIELDS})
    alone = site is not None or not config.layerwise_scalings
    return found[..., 0, :] if alone else found

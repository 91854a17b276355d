"""The layers of a checkpoint that adapters can sit on, from tensor names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from peft_any._typing import Shape
from peft_any.errors import ConfigError, ShapeError, TargetError, nearest
from peft_any.layer import CONVOLUTIONS, EXPERTS, KINDS, Kind, Site
from peft_any.patterns import expression, is_parameter

_EMBEDDING = re.compile(
    r"wte|wpe|shared|relative_attention_bias|embed_(in|tokens|positions|languages|types)"
    r"|(\w+_)?(emb|embd|embed|embeds|embedding|embeddings)"
)
"""Last parts of the names of embeddings in transformers' and torch's usual models."""
OUTPUT = re.compile(
    r"(.*\.)?(lm_head|embed_out|lm_head\.decoder|predictions\.decoder|vocab_projector"
    r"|generator_lm_head|lm_loss|pred_layer\.proj)|proj_out"
)
"""Output embeddings in transformers' usual models: what "all-linear" leaves out."""
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?|weight|bias")
"""Tensors of torch's and Equinox's recurrent layers, of which some are matrices."""
_SHOWN = 3
"""How many tensors or layers an error names."""


def looks_like_embedding(module: str) -> bool:
    """Whether a module is called as an input or output embedding usually is.

    Examples
    --------
    >>> [looks_like_embedding(name) for name in ("h.wte", "lm_head", "fc")]
    [True, True, False]
    """
    last = module.rpartition(".")[2]
    return bool(_EMBEDDING.fullmatch(last) or OUTPUT.fullmatch(module))


def shape_of(weights: Mapping[str, Any], name: str) -> Shape:
    """Look a tensor's shape up without reading it, where the mapping can tell (`info`)."""
    info = getattr(weights, "info", None)
    found = weights[name] if info is None else info(name)
    if not hasattr(found, "shape"):
        raise ShapeError(f"{name}: {found!r:.60} is no array: give arrays by names")
    return tuple(found.shape)


def layout(
    weights: Mapping[str, Any],
    kinds: Mapping[str, Kind | Site] | None = None,
    config: Any = None,
) -> dict[str, Site]:
    """Find the layers of a checkpoint that adapters can sit on.

    ``<m>.weight`` of two dimensions is a `Linear`, or an `Embedding` where it has no bias and
    the last part of m is a usual embedding's name (wte, wpe, shared, relative_attention_bias,
    embed_tokens, ``*embedding(s)``, ``*emb``…), or a `Conv1D` where the length of the bias, its
    own or that of a layer with the same last name, proves it, or else where
    ``config.fan_in_fan_out`` says so. Three to five dimensions are convolutions (of one group).
    ``<m>.in_proj_weight`` with three times as many rows as columns is torch's packed attention.
    One dimension is a `Norm`, for methods that adapt some; three that ``target_parameters``
    names are `Experts`, or `TransposedExperts` where the lengths of a pair (gate_up_proj,
    down_proj) prove it.

    Parameters
    ----------
    weights : mapping of str to array, or anything with ``shape``
        A tensor named ``weight`` alone belongs to the module ``""``.
    kinds : mapping of str to Kind or Site, optional
        Overrides, by module name, by its last dotted parts, or by regular expression; a `Site`
        also tells a convolution's groups.
    config : Config, optional
        Read for `fan_in_fan_out`, `kinds` and `target_parameters`.

    Returns
    -------
    dict of str to Site
        By module name, in the order of `weights`.

    Raises
    ------
    TargetError
        If an entry of `kinds` matches no module, or contradicts a shape.

    Examples
    --------
    >>> import numpy as np
    >>> tensors = {"wte.weight": np.zeros((9, 4)), "fc.weight": np.zeros((8, 4))}
    >>> [(site.kind, site.n_in, site.n_out) for site in layout(tensors).values()]
    [('Embedding', 9, 4), ('Linear', 4, 8)]
    """
    shapes = {name: shape_of(weights, name) for name in weights}
    flag = bool(getattr(config, "fan_in_fan_out", False))
    norms = "Norm" in getattr(config, "kinds", ())
    parameters = tuple(getattr(config, "target_parameters", None) or ())
    proofs = _proofs(shapes)
    real = _has_real(proofs, kinds)
    unused = dict(kinds or {})
    sites = {}
    guess: Kind
    for tensor, shape in shapes.items():
        module, _, last = tensor.rpartition(".")
        if len(shape) == 3 and is_parameter(tensor, parameters):
            module, guess = tensor, _expert_kind(tensor, shapes)
        elif last == "in_proj_weight" and len(shape) == 2 and shape[0] == 3 * shape[1]:
            guess = "MultiheadAttention"
        elif last == "weight" and len(shape) == 2:
            named = is_parameter(tensor, parameters)
            guess = "Linear" if named else _matrix_kind(module, shapes, proofs, flag, real)
        elif last == "weight" and 3 <= len(shape) <= 5:
            guess = (*CONVOLUTIONS,)[len(shape) - 3]
        elif last == "weight" and len(shape) == 1 and norms:
            guess = "Norm"
        else:
            continue
        said = kinds or {}
        key = module if module in said else next((k for k in said if is_named(k, module)), None)
        given = None if key is None else said[key]
        if key is not None:
            unused.pop(key, None)
        groups = given.groups if isinstance(given, Site) else 1
        kind = given.kind if isinstance(given, Site) else given or guess
        site = _site(module, shape, kind, groups)
        sites[module] = replace(site, bias=site.bias_name in shapes)
    if unused:
        hints = ((k, unadapted(partial(is_named, k), weights, sites)) for k in unused)
        lost = (f"kinds[{k!r}]: matches no layer{h or nearest(k, sites)}" for k, h in hints)
        raise TargetError("\n".join(lost))
    return sites


def refuse_unknown(module: str, kind: object) -> None:
    """Refuse what is no kind of layer.

    Raises
    ------
    ConfigError
    """
    if kind not in KINDS:
        raise ConfigError(f"kinds[{module!r}]: {kind!r} is not one of {', '.join(sorted(KINDS))}")


def _site(module: str, shape: Shape, kind: Kind, groups: int = 1) -> Site:
    refuse_unknown(module, kind)
    if len(shape) != {"Norm": 1}.get(kind, 3 if kind in EXPERTS else 2 + CONVOLUTIONS.get(kind, 0)):
        raise TargetError(f"{module}: a weight of shape {shape} cannot be a {kind}")
    if kind in EXPERTS:
        experts, m, n = shape if kind == "Experts" else (shape[0], shape[2], shape[1])
        return Site(module, experts * n, experts * m, kind, groups=experts)
    if kind == "Norm":
        return Site(module, shape[0], shape[0], kind, groups=shape[0])
    if kind in ("Conv1D", "Embedding"):
        return Site(module, shape[0], shape[1], kind)
    return Site(module, shape[1] * groups, shape[0], kind, shape[2:], groups)


def _expert_kind(tensor: str, shapes: Mapping[str, Shape]) -> Kind:
    """Tell the orientation of experts from a gated pair: what one half gives, the other takes."""
    module = tensor.rpartition(".")[0]
    up, down = (shapes.get(f"{module}.{name}", ()) for name in ("gate_up_proj", "down_proj"))
    plain = len(up) == len(down) == 3 and up[1:] == (2 * down[2], down[1])
    turned = len(up) == len(down) == 3 and up[1:] == (down[2], 2 * down[1])
    return "TransposedExperts" if turned and not plain else "Experts"


def _proofs(shapes: Mapping[str, Shape]) -> dict[str, Kind]:
    """Tell the orientation of each matrix whose bias has the length of just one side."""
    proven: dict[str, Kind] = {}
    for tensor, shape in shapes.items():
        module, _, last = tensor.rpartition(".")
        bias = shapes.get(tensor.removesuffix("weight") + "bias")
        if last == "weight" and len(shape) == 2 and bias and shape[0] != shape[1]:
            if bias == shape[:1]:
                proven[module] = "Linear"
            elif bias == shape[1:]:
                proven[module] = "Conv1D"
    return proven


def _has_real(proofs: Mapping[str, Kind], kinds: Mapping[str, Kind | Site] | None) -> bool:
    """Whether a Conv1D is proven, or said to be there."""
    said = {v.kind if isinstance(v, Site) else v for v in (kinds or {}).values()}
    return "Conv1D" in {*proofs.values(), *said}


def _matrix_kind(
    module: str, shapes: Mapping[str, Shape], proofs: Mapping[str, Kind], flag: bool, real: bool
) -> Kind:
    if not _has_bias(module, shapes) and _EMBEDDING.fullmatch(module.rpartition(".")[2]):
        return "Embedding"
    told = _told(module, shapes, proofs, real)
    return told or ("Conv1D" if flag and not OUTPUT.fullmatch(module) else "Linear")


def _has_bias(module: str, shapes: Mapping[str, Shape]) -> bool:
    return (f"{module}.bias" if module else "bias") in shapes


def _told(
    module: str, shapes: Mapping[str, Shape], proofs: Mapping[str, Kind], real: bool
) -> Kind | None:
    """Read a matrix's orientation from the biases of the checkpoint, where they tell it."""
    if module in proofs:
        return proofs[module]
    whole, _, last = module.rpartition(".")
    if last == "out_proj" and (f"{whole}.in_proj_weight" if whole else "in_proj_weight") in shapes:
        return "Linear"  # the output half of torch's packed attention
    if not _has_bias(module, shapes):
        # transformers' Conv1D always has a bias: one without is linear where there are real ones.
        return "Linear" if real else None
    for peers in ([m for m in proofs if m.rpartition(".")[2] == last], proofs):
        found = {proofs[m] for m in peers}
        if len(found) == 1:
            return found.pop()
    return None


def orientations(
    weights: Mapping[str, Any],
    modules: Iterable[str],
    kinds: Mapping[str, Kind | Site] | None = None,
) -> dict[str, Kind | None]:
    """Tell Linear from Conv1D where `kinds` or the biases of the checkpoint do.

    None where they only tell that the checkpoint has both; absent where they tell nothing.

    Examples
    --------
    >>> import numpy as np
    >>> tensors = {"a.fc.weight": np.zeros((2, 3)), "a.fc.bias": np.zeros(3)}
    >>> tensors |= {"b.fc.weight": np.zeros((3, 3)), "b.fc.bias": np.zeros(3)}
    >>> orientations(tensors, ["b.fc"])
    {'b.fc': 'Conv1D'}
    """
    asked = list(modules)
    if not asked:
        return {}
    shapes = {name: shape_of(weights, name) for name in weights}
    proofs = _proofs(shapes)
    told: dict[str, Kind | None] = {}
    for module in asked:
        given = next((v for k, v in (kinds or {}).items() if is_named(k, module)), None)
        kind = given.kind if isinstance(given, Site) else given
        kind = kind or _told(module, shapes, proofs, _has_real(proofs, kinds))
        if kind is not None or len({*proofs.values()}) > 1:
            told[module] = kind
    return told


def is_named(key: str, module: str) -> bool:
    """Whether a key of `kinds` means a module: its name, the last parts of it, or an expression.

    Examples
    --------
    >>> is_named("fc", "layers.0.fc"), is_named("layers.[01].fc", "layers.0.fc")
    (True, True)
    """
    if module == key or module.endswith(f".{key}"):
        return True
    return expression(key, "kinds").fullmatch(module) is not None


def unadapted(
    wanted: Callable[[str], bool], weights: Mapping[str, Any], layers: Collection[str]
) -> str:
    """Say what a base has under a name that is none of its layers, and the way out.

    Parameters
    ----------
    wanted : callable
        Whether a module's or a tensor's name is meant.
    weights : mapping of str to array, or anything with ``shape``
    layers : collection of str
        The layers, as `layout` finds them.

    Returns
    -------
    str
        What follows a message, as after `nearest`; empty where the base has nothing of the name.

    Examples
    --------
    >>> import numpy as np
    >>> unadapted("fc.weight".__eq__, {"fc.weight": np.zeros((8, 4))}, ["fc"])
    ": fc.weight is a tensor: name its module, 'fc'"
    """
    own: dict[str, list[str]] = {}
    hit = None
    for tensor in weights:
        module, _, last = tensor.rpartition(".")
        own.setdefault(module, []).append(last)
        if wanted(tensor):
            if module in layers:
                return f": {tensor} is a tensor: name its module, {module!r}"
            hit = module
    hit = next((module for module in own if wanted(module)), hit)
    if hit is not None:
        return _stranger(hit, own[hit], weights)
    parts = (name.split(".") for name in layers)
    above = {".".join(p[:n]): ".".join(p[: n + 1]) for p in parts for n in range(1, len(p))}
    hit = next((module for module in above if wanted(module)), None)
    if hit is None:
        return ""
    within = [name.rpartition(".")[2] for name in layers if name.startswith(f"{hit}.")]
    named = ", ".join(map(repr, [*dict.fromkeys(within)][:_SHOWN]))
    return f": {hit} holds layers and is none: name those within, such as {named}"


def _stranger(module: str, own: list[str], weights: Mapping[str, Any]) -> str:
    """Say what a module with tensors of its own is, why no adapter goes on it, and what does."""
    shapes = {last: shape_of(weights, f"{module}.{last}" if module else last) for last in own}
    shown = ", ".join(f"{last} {shape}" for last, shape in [*shapes.items()][:_SHOWN])
    more = f" and {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
    ways = f"train it whole (modules_to_save=[{module.rpartition('.')[2]!r}]), or leave it out"
    sizes = {len(shape) for shape in shapes.values()}
    if 2 in sizes and all(map(_RECURRENT.fullmatch, own)):
        what, why = "a recurrent layer", "no adapter goes on one"
    elif max(sizes) < 2:
        what, why = "a norm or another layer without a matrix", "this method adapts none"
        ways = f"LNTuningConfig adapts norms; {ways}"
    else:
        what = "of no kind that adapters know"
        why = "they go on linear layers, convolutions and embeddings, whose array is called weight"
        if 3 in sizes:
            ways = f"name stacks of matrices in target_parameters, {ways}"
    return f": {module or 'the model itself'} is {what} ({shown}{more}), and {why}: {ways}"

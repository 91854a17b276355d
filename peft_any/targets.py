"""Where adapters go: the layers of a base, the ones a configuration targets, a file's places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from peft_any._typing import Params, Shape
from peft_any.arrow import refuse_alone
from peft_any.checks import alike
from peft_any.errors import PeftError, ShapeError, TargetError, nearest
from peft_any.extras import uncarried
from peft_any.hints import empty_hint, experts_hint, prefix_hint
from peft_any.layer import EXPERTS, Kind, Site
from peft_any.layout import layout, orientations, unadapted
from peft_any.method import Tuner
from peft_any.patterns import refuse_endless
from peft_any.replication import refuse_unrepeated
from peft_any.selection import Rules, aims, in_projection, select


def configured(config: Tuner, sites: Mapping[str, Site]) -> dict[str, Tuner]:
    """Resolve a configuration for each of its sites.

    The output half of a packed attention has the numbers of the attention, as in Hugging Face
    PEFT, whose patterns only know the latter. Its α is doubled: there, the attention adds the
    product to the output weight and so does that layer's own merge, in training as in merging,
    so that this is what an adapter's file means.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> sites = {"fc": Site("fc", 4, 4), "out": Site("out", 4, 2)}
    >>> [c.r for c in configured(LoraConfig(rank_pattern={"out": 2}), sites).values()]
    [8, 2]
    """
    out: dict[str, Tuner] = {}
    refuse_endless(config, sites)
    refuse_alone(config)
    config = config.among([*sites.values()])
    for name, site in sites.items():
        owner = _alias(site, sites)
        own = config.at(owner)
        alpha = getattr(own, "lora_alpha", None)
        if owner is not site and alpha is not None:
            doubled: dict[str, Any] = {"lora_alpha": 2 * alpha}
            own = replace(own, **doubled)
        out[name] = own
    return out


def _alias(site: Site, sites: Mapping[str, Any]) -> Site:
    owner = in_projection(site.name)
    whole = sites.get(owner) if owner != site.name else None
    packed = isinstance(whole, Site) and whole.kind == "MultiheadAttention"
    return replace(site, name=owner) if packed else site


def sites_of_params(
    config: Tuner,
    params: Mapping[str, Params],
    weights: Mapping[str, Any],
    kinds: Mapping[str, Kind | Site] | None = None,
) -> dict[str, Site]:
    """Decide what layer each set of a loaded adapter's parameters sits on.

    A layer is of the kind, orientation and groups for which the configuration asks for exactly
    these parameters. A square matrix leaves two: the bias tells, its own or its namesakes'
    (`layout`), then the other layers of the adapter, then ``config.fan_in_fan_out``, which
    Hugging Face PEFT writes for whichever layer came last.

    Parameters
    ----------
    config : Tuner
    params : mapping {module: {suffix: array}}
    weights : mapping of str to array, or anything with ``shape``
        The base.
    kinds : mapping, optional
        As for `layout`: settles what stays undecided.

    Returns
    -------
    dict of str to Site

    Raises
    ------
    TargetError
        Naming every module that the base lacks, or whose kind cannot be told.
    ShapeError
        Naming every parameter that is missing, extra or misshapen.
    """
    base = layout(weights, kinds, config)
    refuse_endless(config, base)
    refuse_alone(config)
    missing = [name for name in params if name not in base]
    if missing:
        hints = {n: unadapted(n.__eq__, weights, base) or nearest(n, base) for n in missing}
        lost = "\n".join(
            f"{name}: the base has no such layer{hint}" for name, hint in hints.items()
        )
        raise TargetError(lost + prefix_hint(missing, base) + experts_hint(missing, weights))
    sites, undecided, wrong = {}, [], []
    here = {name: base[name] for name in params}
    config = config.among([*here.values()])
    for name, p in params.items():
        fits = [s for s in orientations_of(base[name]) if not _misfit(config, p, s, here, False)]
        if not fits:
            wrong.append(_misfit(config, p, base[name], here))
        elif len(fits) > 1 and {s.kind for s in fits} in ({"Linear", "Conv1D"}, EXPERTS):
            undecided.append(fits)
        else:
            sites[name] = fits[0]
    if wrong:
        raise ShapeError("\n".join(wrong) + empty_hint(params))
    sites |= {fits[0].name: _turned(fits, sites) for fits in undecided if fits[0].kind in EXPERTS}
    undecided = [fits for fits in undecided if fits[0].kind not in EXPERTS]
    told = orientations(weights, [fits[0].name for fits in undecided], kinds)
    proven = {s.kind for s in sites.values() if s.kind in ("Linear", "Conv1D")}
    flag: Kind = "Conv1D" if getattr(config, "fan_in_fan_out", False) else "Linear"
    for fits in undecided:
        name = fits[0].name
        kind = told.get(name, flag if proven <= {flag} else None)
        if kind is None:
            wrong.append(name)
        sites[name] = next((s for s in fits if s.kind == kind), fits[0])
    if wrong:
        raise TargetError(
            f"{', '.join(wrong)}: square matrices that cannot be told to be Linear or Conv1D: "
            f"fan_in_fan_out says {flag}, but not all other layers are; pass kinds="
        )
    return {name: sites[name] for name in params}


def orientations_of(guess: Site) -> Iterator[Site]:
    """Give what a layer can be, the guess first: a matrix three things, a kernel its groups."""
    yield guess
    if guess.kind == "Norm":
        return
    if guess.kind in EXPERTS:
        (other,) = EXPERTS - {guess.kind}
        yield replace(guess, kind=other, n_in=guess.n_out, n_out=guess.n_in)
        return
    a, b = guess.stored_shape[:2]
    if guess.is_conv:
        for groups in range(2, guess.n_out + 1):
            if guess.n_out % groups == 0 and groups != guess.groups:
                yield replace(guess, n_in=b * groups, groups=groups)
    elif guess.kind != "MultiheadAttention":
        if guess.kind != "Linear":
            yield replace(guess, kind="Linear", n_in=b, n_out=a)
        for kind in ("Conv1D", "Embedding"):
            if guess.kind != kind:
                yield replace(guess, kind=kind, n_in=a, n_out=b)


def _turned(fits: list[Site], known: Mapping[str, Site]) -> Site:
    """Take square experts for what the others of the adapter are, or else for what `layout` says.

    Hugging Face PEFT asks the module (`is_transposed`), which is the same for all of a model.
    """
    proven = {site.kind for site in known.values() if site.kind in EXPERTS}
    return next((site for site in fits if proven == {site.kind}), fits[0])


def _misfit(
    config: Tuner, p: Params, site: Site, sites: Mapping[str, Site], hints: bool = True
) -> str:
    """Say why parameters cannot be a site's; empty where they can."""
    try:
        check_params(config.at(_alias(site, sites)), p, site, hints)
    except PeftError as error:
        return str(error)
    return ""


def _holds(shape: Shape, needed: Shape) -> bool:
    return len(shape) == len(needed) and all(a >= b for a, b in zip(shape, needed, strict=True))


def place(
    adapter: Any,
    weights: Mapping[str, Any],
    kinds: Mapping[str, Kind | Site] | None = None,
    *,
    strict: bool = True,
) -> dict[str, Site]:
    """Fit a loaded adapter to a base: every tensor has its place, every target its tensors.

    Parameters
    ----------
    adapter : Adapter
    weights, kinds
        As in `sites_of_params`.
    strict : bool
        Whether what is targeted, or to be saved whole, and has no tensors here is an error.

    Returns
    -------
    dict of str to Site
        By the adapter's module names, in its order.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        Listing everything that does not fit.
    """
    config = adapter.config
    refuse_unrepeated(config, weights)
    sites: dict[str, Site] = {}
    faults: list[PeftError] = []
    try:
        adapter.check_copies(weights)
    except PeftError as error:
        faults.append(error)
    try:
        if isinstance(config, Tuner):
            params = adapter.sites
            if config.ordered and not params:
                params = {name: {} for name in select(config, layout(weights, kinds, config))}
            sites = sites_of_params(config, params, weights, kinds)
    except PeftError as error:
        faults.append(error)
    if faults:
        raise type(faults[-1])("\n".join(map(str, faults))) from faults[-1]
    if not isinstance(config, Tuner):
        return {}
    shared = config.shared_shapes([*sites.values()]) if sites else {}
    wrong = [
        f"{name}: shape {tuple(adapter.shared[name].shape)} cannot fit: {config.where} needs "
        f"{shape} or larger"
        for name, shape in shared.items()
        if name in adapter.shared and not _holds(tuple(adapter.shared[name].shape), shape)
    ]
    wrong += [
        f"{name}: missing, of shape {shape}"
        for name, shape in shared.items()
        if name not in adapter.shared and name not in config.frozen
    ]
    extra = [name for name in adapter.shared if name not in shared]
    wrong += [f"{name}: unexpected{nearest(name, shared)}" for name in extra]
    if wrong:
        raise ShapeError("\n".join(wrong))
    lost = uncarried(config, adapter.extra, adapter.tokens, weights) if strict else []
    if strict and aims(config) and config.target_modules != "dummy-target-modules":
        every = layout(weights, kinds, config) | sites
        rules = Rules.of(config)
        lost += rules.unmatched_targets(every) if sites else []
        lost += [
            f"{name}: is targeted, and the adapter has no tensors for it"
            for name in rules.lacking(every, sites)
        ]
    if lost:
        raise TargetError("\n".join(lost))
    return sites


def check_params(config: Tuner, p: Mapping[str, Any], site: Site, hints: bool = True) -> None:
    """Check one site's parameters against the shapes the configuration demands.

    Without `hints` no names are suggested for extra ones, which takes long.

    Raises
    ------
    ShapeError
        Listing every missing, extra and misshapen array at once.
    """
    want = config.shapes(site)
    wrong = [
        f"{site.name}.{k}: shape {tuple(p[k].shape)} cannot fit: {config.where} needs {shape}"
        for k, shape in want.items()
        if k in p and not alike({k: tuple(p[k].shape)}, {k: shape})
    ]
    wrong += [f"{site.name}.{k}: missing, of shape {want[k]}" for k in want if k not in p]
    extra = [k for k in p if k not in want and k not in config.frozen]
    wrong += [f"{site.name}.{k}: unexpected{nearest(k, want) if hints else ''}" for k in extra]
    if wrong:
        raise ShapeError("\n".join(wrong))

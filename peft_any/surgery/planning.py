"""Planning a merge: adapters are fitted to the base, and whatever does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_any.adapter import Adapter
from peft_any.backend import dtype_name, to_numpy
from peft_any.completing import Placed, completed, filled, lacking, rederived, refuse_lacking
from peft_any.errors import ConfigError, PeftError, ShapeError, TargetError
from peft_any.io.checkpoint import Checkpoint
from peft_any.layer import Site
from peft_any.layout import OUTPUT, looks_like_embedding
from peft_any.method import Additive, Tuner
from peft_any.origin import other_base
from peft_any.selection import Rules, in_projection
from peft_any.surgery.fitting import Fitting
from peft_any.surgery.heads import replaced
from peft_any.surgery.mapping import mapped, with_preset
from peft_any.surgery.plan import Plan, Touched
from peft_any.surgery.sources import Given, View, given_adapters, misfit, pruned
from peft_any.targets import configured, place
from peft_any.traversal import known_parts

SCALES = ("scale", "scales", "weight_scale", "weight_scale_inv", "qzeros", "SCB", "absmax")
"""Companions of a quantised weight, without which its numbers mean nothing."""


def make_plan(
    base: Checkpoint,
    adapters: Any,
    fit: Fitting | None = None,
) -> Plan:
    """Fit adapters to a base and refuse whatever does not fit, all of it at once.

    Raises
    ------
    PeftError
        Listing every offender.
    """
    fit = fit or Fitting()
    given = given_adapters(adapters, strict=fit.strict)
    given = mapped(given, fit.rules, base, fit.kinds)
    view = View(base, given)
    given = [one.named(view, fit.kinds) for one in given]
    if not fit.strict:
        given = [pruned(one, view, fit.kinds) for one in given]
    placed, faults = [], []
    for one in given:
        try:
            placed.append(_refuse_shifts(fit_one(one, view, fit, alone=len(given) == 1)))
        except PeftError as error:
            faults.append((one, with_preset(one, view, error)))
    if faults:
        raise misfit(faults) from faults[0][1]
    plan = Plan(base, view, given, placed, _touched(view, given, placed))
    for one in given:
        notes = dict.fromkeys((*one.adapter.notes, *one.lost))
        plan.warnings.extend(f"{one.label}: {note}" for note in notes)
    for one, there in zip(given, placed, strict=True):
        plan.warnings.extend(_beyond(one, there, base.tied))
    _check_bases(plan)
    _check_grown(plan)
    _check_origins(plan, fit.any_base)
    return plan


def fit_one(given: Given, view: Mapping[str, Any], fit: Fitting, *, alone: bool = True) -> Placed:
    """Fit one adapter to a base.

    Parameters
    ----------
    given : Given
    view : View, or mapping of str to array
    fit : Fitting
    alone : bool
        Whether `fit.rederive` must have something to redo.

    Raises
    ------
    PeftError
        Listing everything that does not fit.
    """
    seen = _without_old_heads(given.adapter, view) if isinstance(view, View) else view
    sites = place(given.adapter, seen, fit.kinds, strict=fit.strict)
    config = given.adapter.config
    if not isinstance(config, Tuner):
        raise ConfigError(f"{config.where}: is no method that changes layers")

    def stored(name: str) -> str:
        return view.info(name).dtype if isinstance(view, View) else dtype_name(view[name])

    adapter = filled(given.adapter, sites).with_shared([*sites.values()], stored)
    placed = Placed(adapter, sites, configured(config, sites))
    file = isinstance(view, View)  # which keeps no order that could be vouched for
    parts = known_parts(view.base.config) if isinstance(view, View) else ()
    placed = completed(placed, view, parts, vouched=fit.rederive and not file)
    if fit.rederive and (alone or lacking(placed)):
        placed = rederived(placed, view)
    refuse_lacking(placed)
    return placed


def _without_old_heads(adapter: Adapter, view: View) -> Mapping[str, Any]:
    """See a base as a model with the adapter's new head has it."""
    if not any(name in view.heads for name in adapter.extra):
        return view
    old = {*replaced(adapter, view)}
    return {name: view.info(name) for name in view if name not in old}


def _refuse_shifts(placed: Placed) -> Placed:
    """Refuse to correct biases that the base does not have."""
    wrong = [
        f"{site.bias_name}: the base has no such bias, and the adapter corrects it: apply the "
        "adapter without merging"
        for name, site in placed.sites.items()
        if not site.bias and _shifts(placed, name)
    ]
    if wrong:
        raise TargetError("\n".join(wrong))
    return placed


def _shifts(placed: Placed, name: str) -> bool:
    config = placed.configs[name]
    if not isinstance(config, Additive):
        return False
    params = {**placed.adapter.shared, **placed.adapter.sites[name]}
    shift = config.bias_delta(params, placed.sites[name])
    return shift is not None and bool(to_numpy(shift).any())


def _touched(view: View, given: list[Given], placed: list[Placed]) -> dict[str, Touched]:
    sites: dict[str, Site] = {}
    copies: dict[str, list[int]] = {}
    rows: dict[str, list[int]] = {}
    for i, one in enumerate(placed):
        for name, site in one.sites.items():
            known = sites.setdefault(site.weight, site)
            if known != site:
                raise ShapeError(
                    f"{name}: {given[i].label} takes it for a {site.kind} and another adapter for "
                    f"a {known.kind}: pass kinds= to settle it"
                )
            if one.configs[name].changes_bias(site) and site.bias:
                sites[site.bias_name] = site
        for name in one.adapter.extra:
            copies.setdefault(name, []).append(i)
        for module in one.adapter.tokens:
            rows.setdefault(f"{module}.weight", []).append(i)
    names = {*sites, *copies, *rows}
    return {
        name: Touched(sites.get(name), tuple(copies.get(name, ())), tuple(rows.get(name, ())))
        for name in view
        if name in names
    }


def _check_bases(plan: Plan) -> None:
    """Refuse tensors whose numbers cannot be computed with."""
    faults = []
    for name, how in plan.touched.items():
        dtype = plan.view.info(name).dtype
        module = name.rpartition(".")[0]
        if how.site is None and not how.rows:
            if not dtype.startswith(("float", "bfloat")) and _weighted(plan, how.copies):
                faults.append(f"{name}: {dtype} values cannot be summed with weights")
            continue
        scales = [s for s in SCALES if f"{module}.{s}" in plan.base]
        if not dtype.startswith(("float", "bfloat")) or dtype.startswith("float4"):
            faults.append(f"{name}: {dtype} values cannot be merged into: the base is quantised")
        elif scales:
            faults.append(
                f"{name}: cannot be merged into: {module}.{scales[0]} says that it is quantised"
            )
    if faults:
        raise TargetError(
            "\n".join(faults) + "\nmerge into the base before it was quantised, and quantise that"
        )


def _check_origins(plan: Plan, any_base: bool) -> None:
    """Refuse a base that is not the one an adapter says it was made on."""
    faults = []
    for one, placed in zip(plan.given, plan.placed, strict=True):
        sites = [s for s in placed.sites.values() if s.weight not in plan.view.grown]
        found = other_base(one.adapter.metadata, sites, plan.view.sampled)
        if found is not None:
            faults.append(
                f"{one.label}: was made on another base: the layers it adapts had the fingerprint "
                f"{found[0]:.80} there, and have {found[1]} in {plan.base.source}"
            )
    if faults and not any_base:
        way = (
            "give the base that it was made on, or --any-base (any_base=True) to merge all the same"
        )
        raise TargetError("\n".join([*faults, way]))
    plan.warnings.extend(faults)


def _beyond(given: Given, placed: Placed, tied: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """Say which layers have tensors though the configuration does not target them."""
    config = placed.adapter.config
    if not isinstance(config, Tuner) or not config.target_modules:
        return
    rules = Rules.of(config)
    sites = placed.sites
    wanted = {name for name, site in sites.items() if rules.wants(name, site)}
    twins = [{*group} for group in tied if {sites[n].weight for n in wanted} & {*group}]
    beyond = [n for n in sites if not {n, in_projection(n)} & wanted]
    beyond = [n for n in beyond if not any(sites[n].weight in group for group in twins)]
    if beyond:
        yield (
            f"{given.label}: layers that the configuration does not target are merged as the file "
            f"has them, {beyond[0]} and {len(beyond) - 1} more: Hugging Face PEFT leaves them out"
        )


def _weighted(plan: Plan, owners: tuple[int, ...]) -> bool:
    return len(owners) != 1 or plan.given[owners[0]].weight != 1.0


def _check_grown(plan: Plan) -> None:
    """Refuse to resize the input embedding or the output head alone, and sums of new sizes."""
    faults = []
    for name, array in plan.view.grown.items():
        rows, before = len(array), len(plan.view.stored(name))
        if _weighted(plan, plan.touched[name].copies):
            faults.append(f"{name}: the change to {rows} rows cannot be summed with weights")
        if name in plan.view.heads:
            plan.added[name] = [*plan.base][-1]
            plan.warnings.append(f"{name}: is new: the base has no such head")
            continue
        faults += [
            f"{mate}: has {before} rows, as {name} had, which gets {rows}: the adapter must carry "
            "both, or no model can be loaded from the result"
            for mate in _mates(plan, name, before)
            if len(plan.view.grown.get(mate, ())) != rows
        ]
        plan.warnings.append(f"{name}: resized from {before} to {rows} rows, as the adapter has")
    if faults:
        raise TargetError("\n".join(faults))


def _mates(plan: Plan, name: str, rows: int) -> list[str]:
    """List the tables of the same vocabulary: tied ones, and the head of an input embedding."""

    def head(tensor: str) -> bool:
        return OUTPUT.fullmatch(tensor.rpartition(".")[0]) is not None

    mates = [mate for group in plan.base.tied for mate in group if name in group]
    for mate in plan.view:
        other = looks_like_embedding(mate.rpartition(".")[0]) and head(mate) != head(name)
        if other and plan.base.info(plan.view.aliases.get(mate, mate)).shape[0] == rows:
            mates.append(mate)
    return [mate for mate in dict.fromkeys(mates) if mate != name]

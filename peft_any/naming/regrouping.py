"""Adapters whose fused layers are split, or whose parts are fused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft_any._typing import Array, Params
from peft_any.errors import ConfigError, ShapeError, TargetError, UsageError
from peft_any.extras import within
from peft_any.method import Tuner
from peft_any.naming.fusing import Own, Pieces, fuse, own, parted, roles
from peft_any.naming.renaming import A, Numbers, modules, with_numbers
from peft_any.selection import saved_whole


def split(adapter: A, whole: str, parts: Sequence[str], sizes: Sequence[int], groups: int) -> A:
    """Split all modules of a name: `Adapter.split`."""
    before = _stems_of(adapter, [whole])
    _refuse_other_sizes(parts, sizes)
    plan = {
        f"{stem}{whole}": Pieces(tuple(f"{stem}{p}" for p in parts), tuple(sizes), groups)
        for stem in before
    }
    done: A = split_modules(adapter, plan)
    return done


def fused(
    adapter: A, whole: str, parts: Sequence[str], sizes: Sequence[int] | None, groups: int
) -> A:
    """Fuse all modules of these names: `Adapter.fused`."""
    plan = {}
    if sizes is not None:
        _refuse_other_sizes(parts, sizes)
    for stem in _stems_of(adapter, parts):
        names = tuple(f"{stem}{p}" for p in parts)
        lost = [name for name in names if name not in modules(adapter)]
        if sizes is None and lost:
            raise UsageError(f"{', '.join(lost)}: not adapted: say the sizes of all parts, sizes=")
        rows = [measured(adapter, name) for name in names] if sizes is None else sizes
        plan[f"{stem}{whole}"] = Pieces(names, tuple(rows), groups)
    done: A = fuse_modules(adapter, plan)
    return done


def _stems_of(adapter: Any, endings: Iterable[str]) -> list[str]:
    known, wanted = modules(adapter), list(endings)
    found = [*dict.fromkeys(stem for ending in wanted for stem in stems(known, ending))]
    if not found:
        raise TargetError(f"{', '.join(wanted)}: the adapter has no such module")
    return found


def _refuse_other_sizes(parts: Sequence[str], sizes: Sequence[int]) -> None:
    if len(sizes) != len(parts):
        raise UsageError(f"sizes={[*sizes]}: cannot be those of {len(parts)} parts")


def stems(names: Iterable[str], ending: str) -> list[str]:
    """List what stands before an ending of dotted parts, with its dot.

    Examples
    --------
    >>> stems(["h.0.qkv", "h.1.qkv", "h.1.xqkv", "qkv"], "qkv")
    ['h.0.', 'h.1.', '']
    """
    return [n[: -len(ending)] for n in names if n == ending or n.endswith(f".{ending}")]


def measured(adapter: Any, name: str) -> int:
    """Say how many outputs an adapted linear layer has, from its parameters.

    Raises
    ------
    UsageError
        If they do not tell.
    """
    one = own(adapter.config, name, adapter.sites[name])
    if not any(role.rows for role in roles(one).values()):
        raise UsageError(
            f"{name}: {one.config.peft_type} parameters do not tell how many outputs the layer "
            "has: say it, sizes= or PART:ROWS in a rule"
        )
    return one.site.n_out


def split_modules(adapter: Any, plan: Mapping[str, Pieces]) -> Any:
    """Copy an adapter with some fused modules split into their parts.

    Parameters
    ----------
    adapter : Adapter
    plan : mapping of str to Pieces
        By fused module.

    Raises
    ------
    ConfigError, ShapeError
        If the method cannot be split, or sizes do not fit.
    UsageError
        If a part is there already.
    """
    config, sites = _portable(adapter, plan)
    numbers: dict[str, Numbers] = {}
    out: dict[str, Params] = {}
    extra: Params = {}
    for name, params in sites.items():
        pieces = plan.get(name)
        if pieces is None:
            found = {name: params}
        else:
            one = own(config, name, params, sum(pieces.sizes))
            pieces.check(name, one.site.n_out)
            found = dict(zip(pieces.names, parted(one, pieces), strict=True))
        _refuse_taken(name, found, out)
        out |= found
        numbers |= dict.fromkeys(found, Numbers(config, name))
    for name, array in adapter.extra.items():
        module, _, leaf = name.rpartition(".")
        pieces = plan.get(module)
        arrays = {name: array}
        if pieces is not None:
            pieces.check(name, array.shape[0])
            names = (f"{part}.{leaf}" for part in pieces.names)
            arrays = dict(zip(names, pieces.cut(array), strict=True))
        _refuse_taken(name, arrays, extra)
        extra |= arrays
    return _regrouped(adapter, config, numbers, out, extra)


def fuse_modules(adapter: Any, plan: Mapping[str, Pieces]) -> Any:
    """Copy an adapter with parts fused: the inverse of `split_modules`.

    Parameters
    ----------
    adapter : Adapter
    plan : mapping of str to Pieces
        By fused module. Parts that the adapter does not adapt stay as they are in the base.
    """
    whole_of = {part: whole for whole, pieces in plan.items() for part in pieces.names}
    config, sites = _portable(adapter, whole_of)
    numbers: dict[str, Numbers] = {}
    out: dict[str, Params] = {}
    for name, params in sites.items():
        whole = whole_of.get(name)
        if whole is None or whole not in plan:
            _refuse_taken(name, {name: params}, out)
            out[name], numbers[name] = params, Numbers(config, name)
        elif whole not in numbers:
            pieces = plan[whole]
            parts: list[Own | None] = [
                own(config, part, sites[part], size) if part in sites else None
                for part, size in zip(pieces.names, pieces.sizes, strict=True)
            ]
            pieces.check(whole)
            _refuse_taken(name, {whole: params}, sites)
            resolved, out[whole] = fuse(whole, parts, pieces)
            numbers[whole] = Numbers.of(config, name, resolved)
    extra = _fused_copies(adapter.extra, whole_of, plan)
    return _regrouped(adapter, config, numbers, out, extra)


def _portable(adapter: Any, touched: Iterable[str]) -> tuple[Tuner, dict[str, Params]]:
    """Give configuration and parameters as a file has them: no part of the base is subtracted."""
    config = adapter.config
    if not isinstance(config, Tuner):
        raise ConfigError(f"{config.where}: {config.peft_type} adapts no layers to split or fuse")
    for name in touched:
        lost = config.lacks(adapter.sites[name]) if name in adapter.sites else None
        if lost is not None:
            raise ConfigError(
                f"{name}: cannot be split or fused without {lost}: convert the adapter where it "
                "was made (path_initial_model_for_weight_conversion)"
            )
    return config.portable(adapter.sites)


def _refuse_taken(name: str, new: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    taken = [each for each in new if each in known]
    if taken:
        raise UsageError(f"{name}: cannot become {', '.join(taken)}: the adapter has that already")


def _fused_copies(extra: Params, whole_of: Mapping[str, str], plan: Mapping[str, Pieces]) -> Params:
    out: Params = {}
    for name, array in extra.items():
        module, _, leaf = name.rpartition(".")
        whole = whole_of.get(module)
        if whole is None:
            out[name] = array
        elif f"{whole}.{leaf}" not in out:
            pieces = plan[whole]
            lost = [p for p in pieces.names if f"{p}.{leaf}" not in extra]
            if lost:
                raise ConfigError(
                    f"{name}: is a full copy, and cannot become rows of {whole}.{leaf}: there is "
                    f"none of {', '.join(lost)}"
                )
            parts: list[Array] = [extra[f"{p}.{leaf}"] for p in pieces.names]
            wrong = [p.shape[0] for p in parts] != [*pieces.sizes]
            if wrong:
                raise ShapeError(
                    f"{whole}.{leaf}: copies of {[tuple(p.shape) for p in parts]} cannot be its "
                    f"parts of {', '.join(map(str, pieces.sizes))} rows"
                )
            out[f"{whole}.{leaf}"] = pieces.join(parts)
    return out


def _regrouped(
    adapter: Any,
    config: Tuner,
    numbers: Mapping[str, Numbers],
    sites: dict[str, Params],
    extra: Params,
) -> Any:
    config = with_numbers(config, numbers)
    saved = saved_whole(config)
    new = [n for n in extra if n not in adapter.extra and n.endswith("weight")]
    lost = [n.rpartition(".")[0] for n in new if not within(n, saved)]
    if lost:
        config = replace(config, modules_to_save=[*(config.modules_to_save or []), *lost])
    return adapter.replace(config=config, sites=sites, extra=extra, spare={})

"""Rules that stack experts or take them apart, with the sizes that a base tells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft_any.errors import ShapeError, TargetError, nearest
from peft_any.io.checkpoint import Checkpoint
from peft_any.layer import Site
from peft_any.naming.fusing import Pieces, own
from peft_any.naming.nesting import named
from peft_any.naming.regrouping import stems
from peft_any.naming.rules import Regroup
from peft_any.naming.stacking import Stack, stacked, unstacked
from peft_any.naming.stacking import named as names_of

Moved = Mapping[str, tuple[str, ...]]


def take_apart(
    adapter: Any, rule: Regroup, rules: Iterable[Regroup], known: Mapping[str, Site]
) -> tuple[Any, Moved] | None:
    """Give the experts of stacks to the layers that the base has for them.

    Parameters
    ----------
    adapter : Adapter
    rule : Regroup
    rules : iterable of Regroup
        All rules of the kind, which tell together what a file's nameless parameters are of.
    known : mapping of str to Site
        The base's layers.

    Returns
    -------
    (Adapter, mapping) or None
        And where its modules went; None where the adapter has no such stack.

    Raises
    ------
    TargetError
        If the adapter has such a stack, and the base lacks layers for its experts.
    """
    if not getattr(adapter.config, "target_parameters", None):
        return None
    every = [one for other in rules for one in _apart(other, known)]
    new = names_of(adapter, every)
    if new:
        adapter = adapter.replace(sites=named(adapter.sites, new))
    mine = {one.whole: one for one in _apart(rule, known)}
    lost = [f"{s}{rule.whole}" for s in stems(adapter.sites, rule.whole)]
    lost = [name for name in lost if name not in mine]
    if lost:
        part = f"{lost[0].removesuffix(rule.whole)}{rule.parts[0].replace('{}', '0')}"
        raise TargetError(f"{lost[0]}: the base has no layer {part}{nearest(part, known)}")
    mine = {name: one for name, one in mine.items() if name in adapter.sites}
    if not mine and not new:
        return None
    moved: dict[str, tuple[str, ...]] = {old: (name,) for old, name in new.items()}
    for name, one in mine.items():
        old = next((o for o, n in new.items() if n == name), name)
        moved[old] = tuple(part for pieces in one.experts for part in pieces.names)
    return unstacked(adapter, [*mine.values()]) if mine else adapter, moved


def _apart(rule: Regroup, known: Mapping[str, Site]) -> list[Stack]:
    """Find the stacks that the base's layers would make."""
    pattern = _numbered(rule.parts[0])
    counts: dict[str, int] = {}
    for name in known:
        if hit := pattern.fullmatch(name):
            counts[hit[1]] = max(counts.get(hit[1], 0), int(hit[2]) + 1)
    found = []
    for stem, count in counts.items():
        experts = [_names(rule, stem, i) for i in range(count)]
        lost = [name for names in experts for name in names if name not in known]
        if lost:
            raise TargetError(f"{lost[0]}: the base has no such layer{nearest(lost[0], known)}")
        sizes = {tuple((known[n].n_in, known[n].n_out) for n in names) for names in experts}
        if len(sizes) > 1 or len({n_in for n_in, _ in next(iter(sizes))}) > 1:
            raise ShapeError(
                f"{stem}{rule.whole}: experts of sizes {sorted(sizes)} cannot be one tensor"
            )
        rows = tuple(size or n for size, (_, n) in zip(rule.sizes, sizes.pop(), strict=True))
        pieces = tuple(Pieces(names, rows, rule.groups or 1) for names in experts)
        for one in pieces:
            one.check(f"{stem}{rule.whole}")
        found.append(Stack(f"{stem}{rule.whole}", pieces, known[experts[0][0]].n_in))
    return found


def put_together(adapter: Any, rule: Regroup, base: Checkpoint | None) -> tuple[Any, Moved] | None:
    """Stack adapters of experts apart for the one tensor that the base has of them.

    Returns
    -------
    (Adapter, mapping) or None
        And where its modules went; None where the adapter has no such experts.

    Raises
    ------
    TargetError
        If the base has no such tensor, or fewer experts.
    """
    experts: dict[str, dict[str, tuple[int, int]]] = {}
    for i, part in enumerate(rule.parts):
        pattern = _numbered(part)
        for name in adapter.sites:
            if hit := pattern.fullmatch(name):
                experts.setdefault(hit[1], {})[name] = int(hit[2]), i
    if not experts:
        return None
    found = []
    for stem, names in experts.items():
        whole = f"{stem}{rule.whole}"
        shape = None if base is None or whole not in base else tuple(base.info(whole).shape)
        if base is not None and (shape is None or len(shape) != 3):
            raise TargetError(f"{whole}: the base has no such stack{nearest(whole, base)}")
        found.append(_together(adapter, rule, stem, names, shape))
    moved = {n: (one.whole,) for one in found for p in one.experts for n in p.names}
    return stacked(adapter, found), moved


def _together(
    adapter: Any,
    rule: Regroup,
    stem: str,
    names: Mapping[str, tuple[int, int]],
    shape: tuple[int, ...] | None,
) -> Stack:
    whole = f"{stem}{rule.whole}"
    sizes, n_in = [*rule.sizes], 0
    for name, (_, part) in names.items():
        if sizes[part] is None or not n_in:
            site = own(adapter.config, name, adapter.sites[name], sizes[part]).site
            sizes[part], n_in = site.n_out, site.n_in
    count = max(i for i, _ in names.values()) + 1
    rows = None
    if shape is not None:
        if count > shape[0]:
            raise TargetError(f"{whole}: has {shape[0]} experts, and the adapter one of {count}")
        count, rows = shape[0], shape[2] if shape[1] == n_in != shape[2] else shape[1]
    if sizes.count(None) == 1 and rows is not None:
        sizes[sizes.index(None)] = rows - sum(size or 0 for size in sizes)
    if None in sizes:
        lost = rule.parts[sizes.index(None)]
        raise ShapeError(f"{whole}: nothing tells how many outputs {lost} has: say it, PART:ROWS")
    groups = rule.groups or 1
    known = tuple(size or 0 for size in sizes)
    pieces = tuple(Pieces(_names(rule, stem, i), known, groups) for i in range(count))
    pieces[0].check(whole, rows)
    return Stack(whole, pieces, n_in)


def _numbered(part: str) -> re.Pattern[str]:
    before, after = (re.escape(text) for text in part.split("{}"))
    return re.compile(rf"((?:.*\.)?){before}(\d+){after}")


def _names(rule: Regroup, stem: str, expert: int) -> tuple[str, ...]:
    return tuple(f"{stem}{part.replace('{}', str(expert))}" for part in rule.parts)

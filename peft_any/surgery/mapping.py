"""`--map`: the adapters of a merge under the names, and in the layers, of the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft_any.errors import PeftError, ShapeError, TargetError, nearest
from peft_any.io.checkpoint import Checkpoint
from peft_any.layer import Site
from peft_any.layout import layout
from peft_any.method import Tuner
from peft_any.naming.fusing import Pieces
from peft_any.naming.heads import Heads
from peft_any.naming.regrouping import fuse_modules, measured, split_modules, stems
from peft_any.naming.renaming import modules
from peft_any.naming.rules import PRESETS, Regroup, Rename, Rule, read_rules
from peft_any.surgery.restacking import put_together, take_apart
from peft_any.surgery.sources import Given, Kinds


def mapped(
    given: Sequence[Given], rules: Sequence[Rule], base: Checkpoint | None, kinds: Kinds = None
) -> list[Given]:
    """Bring adapters to the base's module names by rules, in their order.

    Parameters
    ----------
    given : sequence of Given
    rules : sequence of Rule
    base : Checkpoint, optional
        Tells the sizes of fused layers' parts, where adapter and rules do not.
    kinds : mapping, optional
        As for `layout`.

    Raises
    ------
    TargetError
        Listing the rules that match no module of any adapter.
    PeftError
        If names collide, or a method cannot be split or fused.
    """
    used: set[str] = set()
    out = []
    for adapter in given:
        one = adapter
        known = {} if base is None else layout(base, kinds, adapter.adapter.config)
        for rule in rules:
            moved = (
                _rename(one, rule)
                if isinstance(rule, Rename)
                else _restack(one, rule, rules, known, base)
                if rule.stacks
                else _regroup(one, rule, known, None if base is None else base.config)
            )
            if moved is not None:
                one = moved
                used.add(rule.label)
        out.append(one)
    lost = [label for label in dict.fromkeys(rule.label for rule in rules) if label not in used]
    if lost:
        names = [name for one in given for name in modules(one.adapter)]
        raise TargetError(
            "\n".join(
                f"map {label!r}: matches no module of an adapter{nearest(label, names)}"
                for label in lost
            )
        )
    return out


def with_preset(one: Given, base: Iterable[str], error: PeftError) -> PeftError:
    """Add to an error the preset with which the base has all of an adapter's modules."""
    names = modules(one.adapter)
    known = {name.rpartition(".")[0] for name in base}
    if not isinstance(error, TargetError) or known.issuperset(names):
        return error
    for preset in PRESETS:
        rules = [rule for rule in read_rules(preset) if isinstance(rule, Rename)]
        renamed = [*names]
        for rule in rules:
            renamed = [*map(rule, renamed)]
        if len(rules) == len(PRESETS[preset]) and known.issuperset(renamed):
            return TargetError(
                f"{error}\nall of them are there with --map {preset} (names={preset!r})"
            )
    return error


def _rename(one: Given, rule: Rename) -> Given | None:
    hit = [name for name in modules(one.adapter) if rule.pattern.search(name)]
    if not hit:
        return None
    return _given(one, one.adapter.renamed(rule), {name: (rule(name),) for name in hit})


def _regroup(
    one: Given, rule: Regroup, known: Mapping[str, Site], config: Mapping[str, Any] | None
) -> Given | None:
    names = modules(one.adapter)
    endings = rule.parts if rule.fuses else (rule.whole,)
    found = dict.fromkeys(stem for ending in endings for stem in stems(names, ending))
    if not found or not isinstance(one.adapter.config, Tuner):
        return None
    if not rule.fuses:
        plan = {f"{stem}{rule.whole}": _split_pieces(rule, stem, known) for stem in found}
        moved = {whole: pieces.names for whole, pieces in plan.items()}
        return _given(one, split_modules(one.adapter, plan), moved)
    heads = Heads.of(config or {})
    plan = {f"{stem}{rule.whole}": _fused_pieces(one, rule, stem, known, heads) for stem in found}
    moved = {part: (whole,) for whole, pieces in plan.items() for part in pieces.names}
    return _given(one, fuse_modules(one.adapter, plan), moved)


def _restack(
    one: Given,
    rule: Regroup,
    rules: Sequence[Rule],
    known: Mapping[str, Site],
    base: Checkpoint | None,
) -> Given | None:
    if not isinstance(one.adapter.config, Tuner):
        return None
    if rule.fuses:
        done = put_together(one.adapter, rule, base)
    else:
        alike = [r for r in rules if isinstance(r, Regroup) and r.stacks and not r.fuses]
        done = take_apart(one.adapter, rule, alike, known)
    return None if done is None else _given(one, *done)


def _given(one: Given, adapter: Any, moved: Mapping[str, tuple[str, ...]]) -> Given:
    """Put the mapped adapter in the place of the given one, and note where its modules went."""
    before = one.moved or {name: (name,) for name in modules(one.adapter)}
    after = {
        first: tuple(new for name in names for new in moved.get(name, (name,)))
        for first, names in before.items()
    }
    return replace(one, adapter=adapter.replace(spare=one.adapter.spare), moved=after)


def _split_pieces(rule: Regroup, stem: str, known: Mapping[str, Site]) -> Pieces:
    names = tuple(f"{stem}{part}" for part in rule.parts)
    lost = [n for n, s in zip(names, rule.sizes, strict=True) if s is None and n not in known]
    if lost:
        raise TargetError(
            f"{', '.join(lost)}: the base has no such layer{nearest(lost[0], known)}; or say how "
            f"many outputs it has: {_example(rule)}"
        )
    sizes = tuple(s or known[n].n_out for n, s in zip(names, rule.sizes, strict=True))
    # The base is not fused: its configuration says nothing of how the fused rows were ordered.
    return Pieces(names, sizes, Heads().groups(rule))


def _fused_pieces(
    one: Given, rule: Regroup, stem: str, known: Mapping[str, Site], heads: Heads
) -> Pieces:
    whole, names = f"{stem}{rule.whole}", tuple(f"{stem}{part}" for part in rule.parts)
    sizes = [
        measured(one.adapter, name) if size is None and name in one.adapter.sites else size
        for name, size in zip(names, rule.sizes, strict=True)
    ]
    rows = known[whole].n_out if whole in known else None
    if sizes.count(None) == 1 and rows is not None:
        sizes[sizes.index(None)] = rows - sum(size or 0 for size in sizes)
    sizes = [size or told for size, told in zip(sizes, heads.rows(rule), strict=True)]
    if None in sizes:
        lost = [name for name, size in zip(names, sizes, strict=True) if size is None]
        raise ShapeError(
            f"{', '.join(lost)}: nothing tells how many outputs of {whole} they are: say it: "
            f"{_example(rule)}"
        )
    pieces = Pieces(names, tuple(size or 0 for size in sizes), heads.groups(rule))
    pieces.check(whole, rows)
    return pieces


def _example(rule: Regroup) -> str:
    parts = "+".join(f"{part}:ROWS" for part in rule.parts)
    return f"--map '{parts}={rule.whole}'" if rule.fuses else f"--map '{rule.whole}={parts}'"

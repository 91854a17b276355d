"""Tied tensors: one stored tensor that the model uses under several names."""

from __future__ import annotations

from collections.abc import Callable

from peft_any._typing import Array, Params
from peft_any.backend import to_numpy
from peft_any.errors import TargetError
from peft_any.layer import Site
from peft_any.layout import OUTPUT
from peft_any.receipt import Host
from peft_any.surgery.measure import equal_bytes
from peft_any.surgery.plan import Plan, Touched
from peft_any.tokens import token_indices


def settle_ties(plan: Plan, value: Callable[[str], Host]) -> None:
    """Decide for every touched group of tied names whether it stays one tensor.

    New rows of an embedding act on all its names, as in Hugging Face PEFT; full copies that are
    equal leave the names tied, and so does a LoRA of two that are one (`ensure_weight_tying`);
    anything else makes tensors of their own, which the configuration must say.

    Parameters
    ----------
    plan : Plan
        Its `touched`, `mirrored`, `added` and `untied` are changed.
    value : callable
        Computes the new value of a tensor that has full copies alone.

    Raises
    ------
    TargetError
        For ties that no configuration can undo.
    """
    for group in plan.base.tied:
        hit = [name for name in group if name in plan.touched]
        if not hit:
            continue
        stored = [name for name in group if name in plan.base]
        ways = [plan.touched[name] for name in hit]
        rows = all(_only_rows(plan, how) for how in ways)
        # rows of an output layer alone are its own in HF too
        heads = all(OUTPUT.fullmatch(name.removesuffix(".weight")) for name in hit)
        if group[-1].endswith(".bias"):  # the decoder's is the one that acts
            _share(plan, hit[-1:], stored)
        elif rows and not heads and _alike(plan, ways, hit):
            _share(plan, hit, stored)
            plan.warnings.append(f"{', '.join(group)}: are one tensor, and got the new rows as one")
        elif set(hit) == set(group) and (
            _alike(plan, ways, hit) or _same_copies(ways, group, value)
        ):
            _share(plan, hit, stored)
        else:
            _untie(plan, group, hit, stored)


def _same_copies(ways: list[Touched], group: tuple[str, ...], value: Callable[[str], Host]) -> bool:
    if any(how.site is not None or how.rows for how in ways):
        return False
    first = value(group[0])
    return all(equal_bytes(first, value(name)) for name in group[1:])


def _only_rows(plan: Plan, how: Touched) -> bool:
    """Whether a table gets new rows and nothing else."""
    parts = plan.parts(how.site) if how.site is not None else ()
    return not how.copies and all(
        plan.placed[i].adapter.config.peft_type == "TRAINABLE_TOKENS" for i in parts
    )


def _alike(plan: Plan, ways: list[Touched], names: list[str]) -> bool:
    """Whether each adapter changes all names alike: what it trained on them was one."""
    first = ways[0]
    if any((how.copies, how.rows) != (first.copies, first.rows) for how in ways):
        return False
    tables = [name.removesuffix(".weight") for name in names]
    whole = [plan.placed[i].adapter for i in first.copies]
    some = [plan.placed[i].adapter for i in first.rows]
    return (
        all(_equal(one.extra[names[0]], one.extra[name]) for one in whole for name in names)
        and all(len({(*token_indices(one.config, t),) for t in tables}) == 1 for one in some)
        and all(_equal(one.tokens[tables[0]], one.tokens[t]) for one in some for t in tables)
        and _one_method(plan, [how.site for how in ways])
    )


def _one_method(plan: Plan, sites: list[Site | None]) -> bool:
    """Whether each adapter's factors of two layers, if there are any, are the same."""
    there = [site for site in sites if site is not None]
    if not there or len(sites) == 1:
        return True
    if len(there) != len(sites) or len(sites) != 2 or len({(*plan.parts(s),) for s in there}) != 1:
        return False
    pairs = [[plan.placed[i].adapter.sites[s.name] for s in there] for i in plan.parts(there[0])]
    return all(_turned(p, q) or _turned(q, p) for p, q in pairs)


def _turned(head: Params, table: Params) -> bool:
    """Whether a linear layer's factors are an embedding's, turned; or its new rows are."""
    if head.keys() == table.keys() == {"trainable_tokens_delta"}:
        return all(_equal(head[k], table[k]) for k in head)
    names = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
    if head.keys() != names.keys() or table.keys() != {*names.values()}:
        return False
    return all(_equal(head[k], table[v].T) for k, v in names.items())


def _equal(one: Array, two: Array) -> bool:
    return equal_bytes(to_numpy(one), to_numpy(two))


def _share(plan: Plan, hit: list[str], stored: list[str]) -> None:
    """Give all stored names of a group the value of one of its names."""
    source = next((name for name in hit if name in stored), hit[0])
    for name in {*hit, *stored} - {source}:
        plan.touched.pop(name, None)
    plan.mirrored.pop(source, None)
    plan.mirrored.update((name, source) for name in stored if name != source)


def _untie(plan: Plan, group: tuple[str, ...], hit: list[str], stored: list[str]) -> None:
    names = ", ".join(group)
    if len(group) != 2:
        raise TargetError(
            f"{names}: are one tensor, and the adapter changes {', '.join(hit)} alone: they cannot "
            "be told apart in the merged checkpoint; keep the adapter beside the base"
        )
    for name in (name for name in group if name not in plan.base):
        plan.added[name] = stored[0]
        _part_bias(plan, name)
    plan.untied.extend(group)
    plan.warnings.append(
        f"{names}: were one tensor and are two now: tie_word_embeddings=false in config.json"
    )


def _part_bias(plan: Plan, head: str) -> None:
    """Store the bias of a masked model's head under its second name too.

    transformers ties ``….decoder.bias`` to ``….bias`` along with the weight, and reads it alone
    once they are parted.
    """
    module = head.removesuffix(".weight")
    outer, _, last = module.rpartition(".")
    first, second = f"{outer}.bias", f"{module}.bias"
    if last == "decoder" and first in plan.base and second not in plan.base:
        plan.added[second] = plan.mirrored[second] = first

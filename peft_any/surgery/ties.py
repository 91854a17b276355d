"""Tied tensors: one stored tensor that the model uses under several names."""

from __future__ import annotations

from collections.abc import Callable

from peft_any.errors import TargetError
from peft_any.receipt import Host
from peft_any.surgery.measure import equal_bytes
from peft_any.surgery.plan import Plan, Touched


def settle_ties(plan: Plan, value: Callable[[str], Host]) -> None:
    """Decide for every touched group of tied names whether it stays one tensor.

    New rows of an embedding act on all its names, as in Hugging Face PEFT; full copies that are
    equal leave the names tied; anything else makes tensors of their own, which the configuration
    must say.

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
        alone = all(how.site is None and not how.copies for how in ways)
        if alone and len({how.rows for how in ways}) == 1:
            _share(plan, hit, stored)
            plan.warnings.append(f"{', '.join(group)}: are one tensor, and got the new rows as one")
        elif set(hit) == set(group) and _same_copies(ways, group, value):
            _share(plan, hit, stored)
        else:
            _untie(plan, group, hit, stored)


def _same_copies(ways: list[Touched], group: tuple[str, ...], value: Callable[[str], Host]) -> bool:
    if any(how.site is not None or how.rows for how in ways):
        return False
    first = value(group[0])
    return all(equal_bytes(first, value(name)) for name in group[1:])


def _share(plan: Plan, hit: list[str], stored: list[str]) -> None:
    """Give all stored names of a group the value of one of its names."""
    source = next((name for name in hit if name in stored), hit[0])
    for name in {*hit, *stored} - {source}:
        plan.touched.pop(name, None)
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

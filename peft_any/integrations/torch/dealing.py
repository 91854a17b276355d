"""Which module carries what of an adapter."""

from __future__ import annotations

from torch import Tensor, nn

from peft_any.completing import Placed
from peft_any.errors import ConfigError
from peft_any.integrations.torch.slot import Share, refuse_replaced, slot_of, tensor
from peft_any.integrations.torch.tensors import Arrays, names_of
from peft_any.layout import OUTPUT
from peft_any.tokens import token_indices


def shares_of(root: nn.Module, name: str, placed: Placed) -> list[Share]:
    """Deal an adapter out to the modules that carry it."""
    adapter, config = placed.adapter, placed.adapter.config
    trained = adapter.trainable()
    loose = trained.get("", {})
    shared = Arrays(adapter.shared, loose)
    made: list[Share] = []
    at: dict[str, Share] = {}
    for key, site in placed.sites.items():
        owner = owner_of(root, key)
        share = Share(name, owner, placed.configs[key], site)
        like = tensor(root, site.weight)
        share.own = Arrays(adapter.sites[key], trained.get(key, {})).to(like.device)
        share.shared = shared
        made.append(share)
        at.setdefault(owner, share)

    owners = {share.site.name: share for share in made if share.site is not None}
    for (key, parameter), first in placed.ties.items():
        owners[key].own.repeat(parameter, owners[first].own)

    def of(full: str) -> Share:
        owner = owner_of(root, full.rpartition(".")[0])
        if owner not in at:
            at[owner] = Share(name, owner)
            made.append(at[owner])
        return at[owner]

    aliases = names_of(root)
    copies = dict(adapter.extra)
    for full, value in adapter.extra.items():
        if full not in loose:  # only saved along: it is of every module that shares the tensor
            copies = dict.fromkeys(aliases.get(id(tensor(root, full)), ()), value) | copies
    for full, value in copies.items():
        share = of(full)
        within = share.within(full)
        kept = share.copies.arrays() | {within: value}
        share.copies = Arrays(kept, [k for k in kept if share.outside(k) in loose])
    for table, rows in adapter.tokens.items():
        held = Arrays({"weight": rows}, ["weight"])
        whole = f"{table}.weight"
        others = () if OUTPUT.fullmatch(table) else aliases[id(tensor(root, whole))]
        own = {f"{other}.weight" for other in adapter.tokens}
        for full in (whole, *(twin for twin in others if twin not in own)):
            share = of(full)
            share.rows, within = held, share.within(full)
            share.indices[within] = token_indices(config, table)
    return made


def owner_of(root: nn.Module, name: str) -> str:
    """Name the module whose forward reads a layer's tensors: mostly the layer itself."""
    parent, _, last = name.rpartition(".")
    if not name:
        return name
    above = root.get_submodule(parent)
    inside = isinstance(above, nn.MultiheadAttention) or isinstance(getattr(above, last), Tensor)
    return parent if inside else name


def refuse_conflicts(root: nn.Module, shares: list[Share]) -> None:
    """Refuse a replaced forward, and a second full copy of one tensor, of which one would act."""
    for share in shares:
        refuse_replaced(root.get_submodule(share.owner), share.owner)
        slot = slot_of(root.get_submodule(share.owner))
        there = [] if slot is None else [s for s in slot.shares if isinstance(s, Share)]
        for other in there:
            both = [*(share.copies.arrays().keys() & other.copies.arrays().keys())]
            if both:
                raise ConfigError(
                    f"{share.outside(both[0])}: adapters {other.adapter!r} and {share.adapter!r} "
                    "each carry a full copy of it and cannot act together: detach one"
                )

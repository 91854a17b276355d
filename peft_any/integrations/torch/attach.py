"""Attaching adapters to a torch module, and taking them off or merging them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from peft_any import attention
from peft_any import placed as placing
from peft_any._typing import DTypeLike
from peft_any.adapter import Adapter
from peft_any.errors import ConfigError, TargetError, nearest
from peft_any.integrations.torch import prompting
from peft_any.integrations.torch.dealing import refuse_conflicts, shares_of
from peft_any.integrations.torch.handle import Attached
from peft_any.integrations.torch.slot import Slot, close_slot, open_slot, slot_of, tensor
from peft_any.integrations.torch.tensors import (
    COMPUTED,
    Arrays,
    modules,
    names_of,
    refused,
    sites,
    tensors,
)
from peft_any.layout import layout
from peft_any.method import Prompt
from peft_any.registry import Config
from peft_any.selection import refuse_named

RECORD = "_peft_any"
"""Attribute of a module with adapters that says which."""


@dataclass
class _Record:
    """What a module must know to become what it was.

    A frozen parameter is told by its module and name: loading a state may put another one there.
    """

    adapters: dict[str, Attached] = field(default_factory=dict)
    frozen: list[tuple[nn.Module, str]] = field(default_factory=list)

    def freeze(self, module: nn.Module) -> None:
        """Freeze all of a module's parameters, and answer for those within, too."""
        every = [
            (inner, key, parameter)
            for _, inner in modules(module)
            for key, parameter in inner.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self.frozen += [(inner, key) for inner, key, p in every if p.requires_grad]
        for _, _, parameter in every:
            parameter.requires_grad_(False)
        for _, record in _within(module):
            self.frozen += record.frozen
            record.frozen = []

    def thaw(self, module: nn.Module) -> None:
        """Give the gradients back, but where adapters of modules within are still on."""
        self._set(trained=True)
        for root, record in _within(module):
            below = {id(inner) for inner in root.modules()}
            record.frozen += [(m, key) for m, key in self.frozen if id(m) in below]
            self.frozen = [(m, key) for m, key in self.frozen if id(m) not in below]
            record._set(trained=False)  # noqa: SLF001 - its own class

    def _set(self, *, trained: bool) -> None:
        for inner, key in self.frozen:
            parameter = inner._parameters.get(key)  # noqa: SLF001 - get_parameter would raise
            if parameter is not None:
                parameter.requires_grad_(trained)


def _within(module: nn.Module) -> list[tuple[nn.Module, _Record]]:
    """Give the modules within that have adapters of their own, the outer ones first."""
    return [(m, vars(m)[RECORD]) for m in module.modules() if m is not module and RECORD in vars(m)]


def attach(
    module: nn.Module,
    adapter: Adapter | Config,
    name: str = "default",
    *,
    seed: int = 0,
    dtype: DTypeLike = "float32",
    rederive: bool = False,
) -> Attached:
    """Put an adapter on a torch module, in place; several act one upon another.

    The module's own parameters are frozen until all adapters are off again. Linear layers and
    embeddings apply the adapter by its structure; layers of any other class (convolutions, torch's
    attention, subclasses with a forward of their own) run on the merged weight.

    Parameters
    ----------
    module : nn.Module
        Any; transformers' models too.
    adapter : Adapter or Config
        A loaded adapter, checked against the module, or a configuration to start from.
    name : str
    seed, dtype
        Of a fresh adapter's initial values.
    rederive : bool
        Redo the decomposition of the base that an unconverted PiSSA or OLoRA file assumes.

    Returns
    -------
    Attached
        Its `parameters` go to an optimiser; `adapter` and `save` give what was learnt.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        If the name is taken, or the adapter does not fit; the module is then as before.

    Examples
    --------
    >>> import torch
    >>> from peft_any import LoraConfig
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> task = attach(net, LoraConfig(r=2, target_modules=["0", "2"]))
    >>> optimizer = torch.optim.AdamW(task.parameters(), lr=0.01)
    >>> net(torch.ones(3, 4)).sum().backward()
    >>> optimizer.step()
    >>> list(net.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    >>> sorted(detach_adapter(net).sites)
    ['0', '2']
    """
    record: _Record = vars(module).get(RECORD) or _Record()
    if name in record.adapters:
        raise ConfigError(f"adapter {name!r} is already there: detach it first, or rename")
    fresh = isinstance(adapter, Prompt)
    if isinstance(adapter, Prompt):
        adapter = prompting.sized(adapter, module)
    weights, kinds = tensors(module), sites(module)
    if not weights:
        raise TargetError(
            f"{type(module).__name__}: cannot be adapted: it holds no tensor under a name "
            "(quantised layers pack theirs away): attach before quantising, and merge"
        )
    held, config = ([*adapter.sites], None) if isinstance(adapter, Adapter) else ([], adapter)
    if unfit := refused(module):
        refuse_named(config, held, layout(weights, kinds), unfit)
    placed = placing.attached(
        name,
        adapter,
        weights,
        kinds,
        seed=seed,
        dtype=dtype,
        rederive=rederive,
        in_order=True,
    )
    attention.refuse({name: placed.adapter.config}, "attach()")
    if fresh and isinstance(placed.adapter.config, Prompt):
        placed = replace(placed, adapter=placed.adapter.with_copies(tensors(module), {}))
    made = shares_of(module, name, placed)
    refuse_conflicts(module, made)
    if isinstance(placed.adapter.config, Prompt):
        made.insert(0, prompting.open_prompt(module, name, placed))
    for share in made:
        if share.prompt is None:
            open_slot(module.get_submodule(share.owner)).shares.append(share)
    record.freeze(module)
    shared = made[0].shared if made else Arrays({})
    result = Attached(module, name, placed, shared, made)
    record.adapters[name] = result
    vars(module)[RECORD] = record
    return result


def attached(module: nn.Module) -> dict[str, Attached]:
    """Give the adapters on a module, in the order they act."""
    record: _Record | None = vars(module).get(RECORD)
    return {} if record is None else dict(record.adapters)


def detach_adapter(module: nn.Module, name: str = "default") -> Adapter:
    """Take an adapter off a module, which is then as it was, and give it.

    Raises
    ------
    ConfigError
        If the module has no adapter of that name.
    """
    there = attached(module)
    if name not in there:
        raise ConfigError(f"adapter {name!r} is not on this module{nearest(name, there)}")
    adapter = there[name].adapter
    record: _Record = vars(module)[RECORD]
    prompting.close_prompt(module, name)
    gone = {id(share) for share in there[name]._shares}  # noqa: SLF001 - its own class
    for inner in [*module.modules()]:  # by no names, which may have changed since
        slot = slot_of(inner)
        if slot is not None:
            slot.shares = nn.ModuleList(share for share in slot.shares if id(share) not in gone)
            close_slot(inner)
    del record.adapters[name]
    if not record.adapters:
        del vars(module)[RECORD]
        record.thaw(module)
    return adapter


def merge_into(module: nn.Module) -> nn.Module:
    """Merge all adapters that are on a module into its weights, in place, and take them off.

    Weights are computed in at least float32 and rounded once. A weight that another layer shares
    is set apart first, so that no other layer changes; where the module has a transformers'
    configuration, its ``tie_word_embeddings`` then becomes False.

    Returns
    -------
    nn.Module
        The same.

    Raises
    ------
    ConfigError
        If a method cannot be merged, an adapter is switched off, or one of a module around or
        within acts on the same layer; nothing has changed then.

    Examples
    --------
    >>> import torch
    >>> from peft_any import LoraConfig
    >>> net, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
    >>> _ = attach(net, LoraConfig(r=2, target_modules=[""], init_lora_weights=False))
    >>> adapted = net(x)
    >>> torch.allclose(merge_into(net)(x), adapted, atol=1e-6)
    True
    """
    merged: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for owner, slot in _slots(module).items():
            for name, value in slot.merged(module.get_submodule(owner)).items():
                merged[f"{owner}.{name}" if owner else name] = value
    held = names_of(module)
    aliases = {name: held.get(id(tensor(module, name)), []) for name in merged}
    if computed := [name for name, twins in aliases.items() if not twins]:
        raise ConfigError(f"{computed[0]}: cannot be merged: {COMPUTED}")
    for name in attached(module):
        detach_adapter(module, name)
    untied = False
    for name, value in merged.items():
        old = tensor(module, name)
        if all(t == name or _same(merged.get(t), value) for t in aliases[name]):
            with torch.no_grad():
                old.copy_(value)
        else:
            _set_apart(module, name, value)
            untied = True
    if untied and getattr(getattr(module, "config", None), "tie_word_embeddings", False):
        module.config.tie_word_embeddings = False
        for _, *others in names_of(module).values():  # which nothing ties when it is loaded again
            for name in others:
                _set_apart(module, name, tensor(module, name).detach().clone())
    return module


def _set_apart(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor of its own in the place of one that is shared."""
    path, _, last = name.rpartition(".")
    old = tensor(module, name)
    kept = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    setattr(module.get_submodule(path), last, kept)


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and not b.is_meta and torch.equal(a, b)


def _slots(module: nn.Module) -> dict[str, Slot]:
    """Give, by the name of its owner, what a merge of all adapters on a module takes up.

    Raises
    ------
    ConfigError
        If an adapter is switched off or a prompt, or one of another module acts there too.
    """
    own: dict[int, str] = {}
    for name, held in attached(module).items():
        if isinstance(held._placed.adapter.config, Prompt):  # noqa: SLF001 - its own class
            raise ConfigError(f"adapter {name!r}: a prompt is no weight and cannot be merged")
        if not all(share.on for share in held._shares):  # noqa: SLF001
            raise ConfigError(
                f"adapter {name!r}: is switched off and cannot be merged: merge outside of its "
                "disabled() block, or detach it first"
            )
        own |= {id(share): share.owner for share in held._shares}  # noqa: SLF001
    slots = {}
    for owner in dict.fromkeys(own.values()):
        slot = slot_of(module.get_submodule(owner))
        assert slot is not None  # noqa: S101 - its shares are in it
        if any(id(share) not in own for share in slot.shares):
            raise ConfigError(
                f"{owner or 'the module'}: cannot be merged: an adapter that was attached to a "
                "module around or within this one acts there too: merge or detach that first"
            )
        slots[owner] = slot
    return slots

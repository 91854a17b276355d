"""What of the difference of two checkpoints becomes factors, and what is copied whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft_any.backend import is_floating
from peft_any.errors import PeftError, ShapeError, TargetError, nearest
from peft_any.extras import fresh_copies
from peft_any.layer import Site
from peft_any.layout import layout, looks_like_embedding
from peft_any.methods.lora import LoraConfig
from peft_any.selection import in_projection, out_projection, select
from peft_any.surgery.couple import Couple, Sound
from peft_any.surgery.factoring import Names
from peft_any.surgery.planning import SCALES
from peft_any.surgery.sources import Kinds

NOTHING = "dummy-target-modules"
"""What Hugging Face PEFT calls the targets of a configuration without any."""


@dataclass(frozen=True)
class Division:
    """The tensors that differ, and where each goes.

    Attributes
    ----------
    couple : Couple
    config : LoraConfig
        With the targets, the modules saved whole and the biases; ranks are still to come.
    sites : dict of str to Site
        The layers that get factors.
    copies : tuple of str
        Tensors that are carried whole.
    same : int
        Tensors of the base that the model has not changed.
    left : tuple of str
        Sentences about what is left out (``strict=False``).
    notes : tuple of str
        What a reader should know.
    """

    couple: Couple
    config: LoraConfig
    sites: dict[str, Site]
    copies: tuple[str, ...]
    same: int
    left: tuple[str, ...]
    notes: tuple[str, ...]
    survey: Survey

    def saving(self, modules: Iterable[str]) -> Division:
        """Divide anew, with these layers among what is copied whole."""
        survey = replace(self.survey, whole=self.survey.whole | {*modules})
        return survey.divided()


@dataclass(frozen=True)
class Survey:
    """Two checkpoints compared: what differs, and how it is to be divided."""

    couple: Couple
    shapes: dict[str, Any]
    every: dict[str, Site]
    changed: Mapping[str, Sound]
    lost: tuple[str, ...]
    embeddings: bool
    strict: bool
    whole: frozenset[str] = frozenset()

    def divided(self) -> Division:
        """Sort what differs; `TargetError` where some of it has no place."""
        couple, changed, shapes = self.couple, self.changed, self.shapes
        sorter = _Sorter(couple, self.every, self.embeddings, self.whole)
        sorter.sort(changed)
        faults = _damaged(couple, changed, sorter.low)
        lost = (*self.lost, *sorter.faults)
        if faults or (lost and self.strict):
            raise TargetError("\n".join([*faults, *lost]))
        if not changed:
            raise TargetError(f"{couple.model.source}: does not differ from {couple.base.source}")
        config = _config(sorter, shapes)
        copies = tuple(fresh_copies(config, shapes, sorter.low)[0])
        weights = {site.weight for site in sorter.low.values()}
        if both := [name for name in copies if name in weights]:
            raise TargetError(f"{', '.join(both)}: cannot both get factors and be saved whole")
        same = sum(name in couple.base and name not in changed for name in shapes)
        notes = _notes(couple, changed)
        return Division(couple, config, sorter.low, copies, same, lost, notes, self)


@dataclass
class _Sorter:
    """The tensors of two checkpoints being sorted."""

    couple: Couple
    sites: dict[str, Site]
    embeddings: bool
    whole: frozenset[str]
    low: dict[str, Site] = field(default_factory=dict)
    modules: dict[str, None] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_bias = {site.bias_name: site for site in self.sites.values()}

    def sort(self, changed: Collection[str]) -> None:
        """Say of every changed tensor whether it becomes factors or lies in a saved module."""
        for site in self.sites.values():
            if site.weight in changed and self.takes_factors(site, changed):
                self.low[site.name] = site
        weights = {site.weight for site in self.low.values()}
        for name in changed:
            if name not in weights and not self._is_bias(name, changed):
                self._save_module(name)
        inner = [m for m in self.modules for o in self.modules if m != o and _inside(m, o)]
        for module in inner:
            self.modules.pop(module, None)
        for name, site in self.sites.items():
            halves = name, out_projection(name)  # Hugging Face PEFT adapts both or none
            if site.kind == "MultiheadAttention" and any(half in self.low for half in halves):
                self.low |= {half: self.sites[half] for half in halves if half in self.sites}
        self.low = {name: site for name, site in self.sites.items() if name in self.low}

    def _is_bias(self, name: str, changed: Collection[str]) -> bool:
        """Take note of a bias that is carried as one, not with its module."""
        site = self.by_bias.get(name)
        if site is None or site.kind == "MultiheadAttention":
            return False
        if site.name in self.low or site.weight not in changed:
            self.biases.append(name)
            return True
        return False

    def _save_module(self, name: str) -> None:
        module = name.rpartition(".")[0]
        if not module or any(_inside(low, module) for low in self.low):
            self.faults.append(
                f"{name}: differs, and cannot be carried: it belongs to no layer, and "
                f"{module or 'the model'} holds layers that get factors"
            )
        else:
            self.modules[module] = None

    def takes_factors(self, site: Site, changed: Collection[str]) -> bool:
        """Whether a changed layer gets factors."""
        base, model = self.couple.infos(site.weight)
        if site.name in self.whole or base is None or model is None or base.shape != model.shape:
            return False
        if not (is_floating(base.dtype) and is_floating(model.dtype)) or site.groups > 1:
            return False
        if site.is_conv and site.n_in == 1:  # of one input channel, or of as many groups
            return False
        whole = self.sites.get(in_projection(site.name), site)
        if whole.kind == "MultiheadAttention" and whole.bias_name in changed:
            return False  # its bias cannot be carried beside factors
        if any(site.weight in group for group in self.couple.groups):
            return False  # Hugging Face PEFT would merge both names' factors into the one tensor
        return self.embeddings or not looks_like_embedding(site.name)


def divide(
    couple: Couple,
    differing: Callable[[list[Names]], Mapping[str, Sound]],
    kinds: Kinds = None,
    *,
    embeddings: bool = False,
    strict: bool = True,
) -> Division:
    """Sort the tensors of two checkpoints, and refuse what does not fit, all of it at once.

    Parameters
    ----------
    couple : Couple
    differing : callable
        Compares groups of tensors, and gives those that differ.
    kinds : mapping, optional
        As for `PeftModel`.
    embeddings : bool
        Whether embeddings and output heads get factors too.
    strict : bool
        Whether tensors without a counterpart or a place are an error; if not, they are left out.

    Raises
    ------
    PeftError
        Listing every offender.
    """
    faults, lost = _misfits(couple)
    if faults:
        raise ShapeError("\n".join(faults))
    shapes: dict[str, Any] = {name: couple.infos(name)[0] for name in couple.shared}
    found = differing(couple.by_shard())
    changed = {name: found[name] for name in shapes if name in found}
    every = layout(shapes, kinds)
    return Survey(couple, shapes, every, changed, tuple(lost), embeddings, strict).divided()


def _misfits(couple: Couple) -> tuple[list[str], list[str]]:
    """Describe tensors of other shapes, and those that only one side has."""
    faults, lost = [], []
    for name in couple.names:
        base, model = couple.infos(name)
        if base is None or model is None:
            here, other = (
                (couple.base, couple.model) if model is None else (couple.model, couple.base)
            )
            lost.append(f"{name}: {here.source} has it, {other.source} not{nearest(name, other)}")
            continue
        one, two = tuple(base.shape), tuple(model.shape)
        table = looks_like_embedding(name.rpartition(".")[0])
        if one != two and not (table and len(one) == len(two) and one[1:] == two[1:]):
            faults.append(f"{name}: shape {two} cannot be compared with the base's {one}")
    return faults, lost


def _damaged(couple: Couple, changed: Mapping[str, Sound], low: Mapping[str, Site]) -> list[str]:
    """Describe changed tensors whose numbers cannot be computed with."""
    faults = []
    for name, sound in changed.items():
        module = name.rpartition(".")[0]
        for side, finite in zip((couple.base, couple.model), sound, strict=True):
            scales = [s for s in SCALES if f"{module}.{s}" in side] if module in low else []
            if scales:
                faults.append(f"{name}: cannot be compared: {module}.{scales[0]} quantises it")
            if not finite:
                faults.append(
                    f"{name}: cannot be compared: {side.source} has NaN or infinities there"
                )
    return [*dict.fromkeys(faults)]  # one scale may quantise both


def _notes(couple: Couple, changed: Iterable[str]) -> tuple[str, ...]:
    """Say where the model is stored in other dtypes than the base, or has more rows."""
    pairs: dict[tuple[str, str], list[str]] = {}
    notes = []
    for name in changed:
        base, model = couple.infos(name)
        if base is None or model is None:
            continue
        if base.dtype != model.dtype:
            pairs.setdefault((base.dtype, model.dtype), []).append(name)
        if base.shape != model.shape:
            notes.append(
                f"{name}: has {model.shape[0]} rows, in the base {base.shape[0]}; saved whole"
            )
    notes += [
        f"{len(names)} tensors are {one} in the base and {two} in the model: what rounding did is "
        f"part of their difference (the first is {names[0]})"
        for (one, two), names in pairs.items()
    ]
    return tuple(notes)


def _config(sorter: _Sorter, shapes: Mapping[str, Any]) -> LoraConfig:
    """Write down which modules are targeted, and which are saved whole."""
    low, everything = sorter.low, sorter.sites
    parents = dict.fromkeys(m for name in shapes for m in _ancestors(name))
    saved = shortened([*sorter.modules], parents, lambda name, end: name.endswith(end))
    owners = {sorter.by_bias[name].name for name in sorter.biases}
    config = LoraConfig(
        target_modules=NOTHING,
        modules_to_save=saved or None,
        bias="none" if not owners else "lora_only" if owners <= low.keys() else "all",
        fan_in_fan_out=any(site.kind == "Conv1D" for site in low.values()),
    )
    if not low:
        return config
    # the output half of a packed attention comes with the other one
    named = [n for n in low if n not in map(out_projection, low)]
    # Hugging Face PEFT matches modules that hold others too, and fails there
    short = shortened(named, parents, lambda name, end: name == end or name.endswith(f".{end}"))
    pattern = "|".join(map(re.escape, named))
    for targets in (short, named, pattern):
        chosen = replace(config, target_modules=targets)
        try:
            if select(chosen, everything) == [*low]:
                return chosen
        except PeftError:
            continue
    raise TargetError(
        f"{', '.join(named)}: cannot be told apart from the modules {saved} that are saved whole"
    )


def _ancestors(tensor: str) -> Iterable[str]:
    parts = tensor.split(".")[:-1]
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def shortened(
    names: Collection[str], every: Iterable[str], matches: Callable[[str, str], bool]
) -> list[str]:
    """Name modules by their last parts where those mean them all, and nothing else.

    Examples
    --------
    >>> ends = lambda name, end: name == end or name.endswith(f".{end}")
    >>> shortened(["a.q", "b.q", "a.k"], ["a.q", "b.q", "a.k", "b.k"], ends)
    ['a.k', 'q']
    """
    wanted, known = dict.fromkeys(names), [*every]
    ends: dict[str, bool] = {}
    for name in wanted:
        end = name.rpartition(".")[2]
        if end not in ends:
            ends[end] = all(other in wanted for other in known if matches(other, end))
    return sorted({end if ends[end := name.rpartition(".")[2]] else name for name in wanted})


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")

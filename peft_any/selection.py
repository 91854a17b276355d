"""Which of a checkpoint's layers a configuration targets: Hugging Face PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

from peft_any.errors import ConfigError, PeftError, TargetError, nearest
from peft_any.layer import EXPERTS, Site
from peft_any.layout import OUTPUT, unadapted
from peft_any.method import Tuner
from peft_any.patterns import expression, is_parameter
from peft_any.registry import Config

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that a task type saves whole without being told (Hugging Face PEFT)."""
Refused: TypeAlias = Mapping[str, tuple[Site, str]]
_EXPERT = re.compile(r"(?:.*\.)?experts\.\d+\.[\w.]+")
_LISTED = 12
"""How many candidates an error names."""


def saved_whole(config: Any) -> list[str]:
    """List the modules that an adapter carries as full copies: named, or implied by the task."""
    named = getattr(config, "modules_to_save", None) or []
    return [*named, *_HEADS.get(str(config.task_type), ())]


def select(
    config: Tuner, sites: Mapping[str, Site], weights: Mapping[str, Any] | None = None
) -> list[str]:
    """List the modules that a configuration targets, by Hugging Face PEFT's rules.

    A list of `target_modules` matches whole names or what follows a dot; a string is a regular
    expression for the whole name; ``"all-linear"`` is every `Linear` and `Conv1D` but the
    output embedding (lm_head, embed_out…). `exclude_modules` and `modules_to_save` are left
    out. `layers_to_transform` asks for layer indices, the first number after a name or after a
    `layers_pattern`, of all modules that the list does not name in full.

    `target_parameters` adds the tensors that it names in full or by their last parts.

    Parameters
    ----------
    config : Tuner
    sites : mapping of str to Site
        All layers of the base, as `layout` finds them.
    weights : mapping of str to array, optional
        The base: an error then tells what it has under a name that is no layer's.

    Returns
    -------
    list of str
        Module names in the order of `sites`. A targeted packed attention brings its
        ``out_proj`` with it.

    Raises
    ------
    ConfigError
        If no targets are given, a pattern is malformed, or a matched layer is of a kind that
        the method does not support.
    TargetError
        If a configured entry matches nothing: all such entries, with the nearest names.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> sites = {name: Site(name, 4, 4) for name in ("a.q", "a.k", "head")}
    >>> select(LoraConfig(target_modules=["q", "head"]), sites)
    ['a.q', 'head']
    """
    rules = Rules.of(config)
    if config.target_modules is None and (usual := _usual(config, sites)):
        return [usual]
    if config.target_modules is None and not aims(config):
        names = sorted({n.rpartition(".")[2] for n, s in sites.items() if s.kind in config.kinds})
        raise ConfigError(
            f"{config.where}: target_modules is not set: name the modules to adapt, such as "
            f"{', '.join(map(repr, names[:_LISTED]))}, or 'all-linear'"
        )
    lost = rules.unmatched(sites, weights or {})
    if lost:
        raise TargetError("\n".join(lost))
    chosen = [name for name, site in sites.items() if rules.wants(name, site)]
    if not chosen:
        raise TargetError(
            f"{config.where}: target_modules={config.target_modules!r} leaves no module: all "
            "are excluded, saved whole, or of other layers"
        )
    return _with_parts(config, chosen, sites)


def refuse_named(
    config: Any, held: Iterable[str], sites: Mapping[str, Site], refused: Refused
) -> None:
    """Refuse layers that are named and cannot be adapted.

    Parameters
    ----------
    config : Config, optional
        Of a fresh adapter: what it targets is named.
    held : iterable of str
        The layers that an adapter holds.
    sites : mapping of str to Site
    refused : mapping of str to (Site, str)
        Layers that cannot be adapted: what each passes for, and why.

    Raises
    ------
    TargetError
        Saying why of all of them.
    """
    named = [*held]
    if isinstance(config, Tuner) and refused:
        passing = {name: site for name, (site, _) in refused.items()}
        with suppress(PeftError):  # of the base alone it is said better
            named = select(config, {**sites, **passing})
    wrong = [f"{k}: cannot be adapted: {why}" for k, (_, why) in refused.items() if k in named]
    if wrong:
        raise TargetError("; ".join(wrong))


def aims(config: Config) -> bool:
    """Whether a configuration names targets: modules, or parameters."""
    return bool(getattr(config, "target_modules", None) or getattr(config, "target_parameters", ()))


def _usual(config: Tuner, sites: Mapping[str, Site]) -> str | None:
    """Find what a method adapts where it is told nothing."""
    there = (n for last in config.usual for n in sites if _ends(n, [last]))
    return next(there, None)


def _with_parts(config: Tuner, chosen: list[str], sites: Mapping[str, Site]) -> list[str]:
    """Refuse kinds that the method lacks, and add the output half of packed attentions."""
    wrong = [f"{n}: is a {sites[n].kind}" for n in chosen if sites[n].kind not in config.kinds]
    if wrong:
        raise ConfigError(
            "\n".join(wrong) + f"\n{config.peft_type} cannot adapt these: it supports "
            f"{', '.join(sorted(config.kinds))}; name them in exclude_modules"
        )
    wanted = dict.fromkeys(chosen)
    for name in chosen:
        part = out_projection(name)
        if sites[name].kind == "MultiheadAttention" and part in sites:
            wanted[part] = None
    return [name for name in sites if name in wanted]


def out_projection(attention: str) -> str:
    """Name the output half of a packed attention."""
    return f"{attention}.out_proj" if attention else "out_proj"


def in_projection(part: str) -> str:
    """Name the packed attention whose output half a module may be; else the module itself.

    Examples
    --------
    >>> in_projection("h.0.attn.out_proj"), in_projection("fc")
    ('h.0.attn', 'fc')
    """
    return part.removesuffix("out_proj").removesuffix(".")


@dataclass(frozen=True)
class Rules:
    """A configuration's target fields, ready to be asked about modules."""

    config: Tuner
    targets: list[str] | str
    exclude: list[str] | str
    saved: list[re.Pattern[str]]
    layers: list[int]
    patterns: list[re.Pattern[str]]
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, config: Tuner) -> Rules:
        """Read the fields; `ConfigError` where they are malformed or contradict one another."""

        def get(field: str) -> Any:
            return getattr(config, field, None)

        layers, patterns = get("layers_to_transform"), get("layers_pattern") or []
        targets, exclude = config.target_modules or [], get("exclude_modules") or []
        if patterns and layers is None:
            raise ConfigError(f"{config.where}: layers_pattern cannot act: set layers_to_transform")
        if isinstance(targets, str) and layers not in (None, []):
            raise ConfigError(
                f"{config.where}: layers_to_transform cannot go with target_modules={targets!r}: "
                "it filters a list of names; put the layers into the expression"
            )
        for field, value in (("target_modules", targets), ("exclude_modules", exclude)):
            if isinstance(value, str):
                expression(value, f"{config.where}: {field}")
        named = [patterns] if isinstance(patterns, str) else patterns
        first = [rf"(?:^|.*?\.){p}" for p in named] or [r".*?\.[^.]*"]
        return cls(
            config,
            targets,
            exclude,
            [expression(rf"(^|.*\.){m}($|\..*)", "modules_to_save") for m in saved_whole(config)],
            [layers] if isinstance(layers, int) else list(layers or []),
            [expression(rf"{p}\.(?P<idx>\d+)\.", "layers_pattern") for p in first],
            tuple(get("target_parameters") or ()),
        )

    def wants(self, name: str, site: Site) -> bool:
        """Whether a layer is targeted."""
        if site.kind in EXPERTS or is_parameter(site.weight, self.parameters):
            return True
        if self.excluded(name):
            return False
        if self.all_linear:
            return self.linear(name, site)
        if isinstance(self.targets, str):
            return expression(self.targets, "target_modules").fullmatch(name) is not None
        if name in self.targets:
            return True
        return _ends(name, self.targets) and (not self.layers or self.layer(name) in self.layers)

    @property
    def all_linear(self) -> bool:
        """Whether the target is the short form for every linear layer."""
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"

    def linear(self, name: str, site: Site) -> bool:
        """Whether a layer is among "all-linear"."""
        head = self.config.task_type == "SEQ_CLS" and name in ("score", "classifier")
        return site.kind in ("Linear", "Conv1D") and not (head or OUTPUT.fullmatch(name))

    def excluded(self, name: str) -> bool:
        """Whether a layer is excluded, or saved whole."""
        out = self.exclude
        if isinstance(out, str) and out:
            named = expression(out, "exclude_modules").fullmatch(name) is not None
        else:
            named = _ends(name, out)
        return named or any(m.match(name) for m in self.saved)

    def layer(self, name: str) -> int | None:
        """Read the index of the layer that a module belongs to."""
        found = next((m for p in self.patterns if (m := p.match(name))), None)
        return None if found is None else int(found["idx"])

    def lacking(self, every: Mapping[str, Site], held: Collection[str]) -> list[str]:
        """List the targeted layers that an adapter's file has nothing of.

        Experts that stand apart in a base are none of them where the adapter has not one: in
        memory they are one tensor (transformers 5), which names of modules never touch.
        """
        apart = any(map(_EXPERT.fullmatch, held))
        return [
            name
            for name, site in every.items()
            if name not in held
            and site.kind in self.config.kinds
            and self.wants(name, site)
            and (apart or not held or _EXPERT.fullmatch(name) is None)
        ]

    def unmatched(self, names: Iterable[str], weights: Mapping[str, Any]) -> list[str]:
        """Describe every configured entry that matches nothing, or no layer of the base."""
        known = list(names)
        lost = self.unmatched_targets(known, weights)
        if not isinstance(self.exclude, str):
            there = {entry for entry in self.exclude if unadapted(_named(entry), weights, known)}
            exclude = [entry for entry in self.exclude if entry not in there]
            lost += self._unmatched("exclude_modules", exclude, known)
        return lost

    def unmatched_targets(
        self, names: Iterable[str], weights: Mapping[str, Any] = MappingProxyType({})
    ) -> list[str]:
        """Describe every target and layer index that matches nothing."""
        known, where = list(names), self.config.where
        tensors = {*known, *(f"{name}.weight" for name in known)}
        strange = [p for p in self.parameters if not any(is_parameter(t, (p,)) for t in tensors)]
        if strange:
            return [
                f"{where}: target_parameters entry {p!r} matches no stack of matrices and no "
                f"weight{_near(p, known)}"
                for p in strange
            ]
        if isinstance(self.targets, str):
            named = expression(self.targets, where).fullmatch
            if self.all_linear or any(map(named, known)):
                return []
            hint = unadapted(lambda name: named(name) is not None, weights, known)
            return [f"{where}: target_modules={self.targets!r} matches no layer{hint}"]
        lost = self._unmatched("target_modules", self.targets, known, weights)
        ends = [n for n in known if self.layers and _ends(n, self.targets)]
        ends = [n for n in ends if n not in self.targets]  # what is named in full needs no layer
        there = {self.layer(n) for n in ends}
        gone = [i for i in self.layers if i not in there and ends and not lost]
        if gone:
            numbers = sorted(i for i in there if i is not None)
            lost.append(f"{where}: layers_to_transform {gone} match no layer: there are {numbers}")
        return lost

    def _unmatched(
        self,
        field: str,
        entries: list[str],
        known: list[str],
        weights: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[str]:
        lost = []
        for entry in entries:
            if not any(map(_named(entry), known)):
                hint = unadapted(_named(entry), weights, known) or _near(entry, known)
                lost.append(f"{self.config.where}: {field} entry {entry!r} matches no layer{hint}")
        return lost


def _ends(name: str, entries: Iterable[str]) -> bool:
    return any(name == e or name.endswith(f".{e}") for e in entries)


def _named(entry: str) -> Callable[[str], bool]:
    return partial(_ends, entries=[entry])


def _near(entry: str, names: Iterable[str]) -> str:
    def tails(name: str) -> Iterator[str]:
        parts = name.split(".")
        return (".".join(parts[-k:]) for k in range(1, min(len(parts), entry.count(".") + 2) + 1))

    return nearest(entry, dict.fromkeys(tail for name in names for tail in tails(name)))

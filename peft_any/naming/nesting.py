"""Adapted parameters (`target_parameters`), which a file tells apart by how deep they are nested.

Hugging Face PEFT wraps a module once for each of its parameters, the first one innermost, and
names none: what a file has at ``m.base_layer.lora_A`` is of the first of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

from peft_any._typing import Params
from peft_any.errors import PeftError, TargetError
from peft_any.layer import EXPERTS, Kind, Site
from peft_any.layout import layout
from peft_any.patterns import is_parameter
from peft_any.targets import check_params, orientations_of

_INNER = "base_layer"


def names(
    config: Any,
    sites: Mapping[str, Params],
    weights: Mapping[str, Any],
    kinds: Mapping[str, Kind | Site] | None = None,
) -> dict[str, str]:
    """Find the tensors of the base that a file's nameless parameters belong to.

    Parameters
    ----------
    config : Config
        Its `target_parameters`.
    sites : mapping {module: {suffix: array}}
        As a file has them.
    weights : mapping of str to array, or anything with ``shape``
        The base.
    kinds : mapping, optional
        As for `layout`.

    Returns
    -------
    dict of str to str
        The tensors by the names in `sites`, those of a module one after another, the innermost
        first; names that stay are left out.

    Raises
    ------
    TargetError
        Where parameters fit several tensors alike.
    """
    if not getattr(config, "target_parameters", None):
        return {}
    every = layout(weights, kinds, config)
    told: dict[str, str] = {}
    for module, levels in _levels(sites, every).items():
        options = [s for s in every.values() if s.kind in EXPERTS and _owner(s.name) == module]
        found = [*_assignments(config, [sites[level] for level in levels], options)]
        if len(found) > 1:
            fits = " or ".join(", ".join(n.rpartition(".")[2] for n in one) for one in found)
            raise TargetError(
                f"{module}: {', '.join(levels)} fit several parameters alike ({fits}), and the "
                "file does not say which is which: rename them, by Adapter.renamed or --map "
                f"'{levels[0]}={found[0][0]}'"
            )
        if found:
            told |= dict(zip(levels, found[0], strict=True))
    return told


def named(sites: Mapping[str, Params], new: Mapping[str, str]) -> dict[str, Params]:
    """Rename parameters; those of a module come together, in the order of `new`.

    Examples
    --------
    >>> list(named({"m": {}, "fc": {}, "m.base_layer": {}}, {"m.base_layer": "m.a", "m": "m.b"}))
    ['m.a', 'm.b', 'fc']
    """
    out: dict[str, Params] = {}
    for name in sites:
        together = [n for n in new if _plain(n) == _plain(name)] if name in new else [name]
        out |= {new.get(one, one): sites[one] for one in together}
    return out


def _levels(sites: Iterable[str], every: Mapping[str, Site]) -> dict[str, list[str]]:
    """Group the names of nested parameters by their module, the innermost first."""
    groups: dict[str, list[str]] = {}
    for name in sites:
        if name not in every:
            groups.setdefault(_plain(name), []).append(name)
    return {module: sorted(names, key=len, reverse=True) for module, names in groups.items()}


def _plain(name: str) -> str:
    while name.endswith(f".{_INNER}"):
        name = name.removesuffix(f".{_INNER}")
    return name


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _assignments(
    config: Any, levels: Sequence[Params], options: Sequence[Site]
) -> Iterator[tuple[str, ...]]:
    """Give every way to give each level a tensor of its own that it fits."""
    for chosen in permutations(options, len(levels)):
        if all(_fits(config, p, site) for p, site in zip(levels, chosen, strict=True)):
            yield tuple(site.name for site in chosen)


def _fits(config: Any, p: Params, site: Site) -> bool:
    for turned in orientations_of(site):
        try:
            check_params(config.at(turned), p, turned, hints=False)
        except PeftError:
            continue
        return True
    return False


def nested(config: Any, sites: Iterable[str]) -> dict[str, str]:
    """Name adapted parameters as a file does; in the order of `sites`, the first is innermost.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> config = LoraConfig(target_parameters=["experts.up", "experts.down"])
    >>> nested(config, ["m.experts.up", "m.experts.down", "m.gate"])
    {'m.experts.up': 'm.experts.base_layer', 'm.experts.down': 'm.experts'}
    """
    targets = tuple(getattr(config, "target_parameters", None) or ())
    groups: dict[str, list[str]] = {}
    for name in sites:
        if is_parameter(name, targets):
            groups.setdefault(_owner(name), []).append(name)
    return {
        name: ".".join([module, *[_INNER] * (len(names) - 1 - i)])
        for module, names in groups.items()
        for i, name in enumerate(names)
    }


def registered(names: Iterable[str], sites: Mapping[str, Site]) -> list[str]:
    """Order the parameters of a new adapter as transformers' modules register theirs.

    What goes up (gate_up_proj) comes before what goes down, which an alphabetical checkpoint
    does not tell.
    """

    def key(name: str) -> bool:
        return sites[name].kind in EXPERTS and "down" in name.rpartition(".")[2]

    return sorted(names, key=key)

"""Experts in one tensor against experts apart: an adapter of the one brought to the other, exactly.

Every expert of a stack has factors of its own, and its rows are those of its parts (w1 over w3 is
gate_up_proj). So a stack's adapter is one adapter for each expert, cut by rows, and the other way
round; parts without an adapter, and experts, get zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from peft_any._typing import Array, Params
from peft_any.backend import astype, compute_dtype, creation_device, namespace
from peft_any.errors import ConfigError, ShapeError
from peft_any.factors import expert_factors
from peft_any.layer import Site
from peft_any.method import Tuner
from peft_any.naming import nesting
from peft_any.naming.fusing import Own, Pieces, fuse, own
from peft_any.naming.renaming import Numbers, with_numbers
from peft_any.patterns import is_parameter

A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Stack:
    """A tensor of experts, and the layers that they are where they stand apart.

    Attributes
    ----------
    whole : str
        The tensor: ``model.layers.0.mlp.experts.gate_up_proj``.
    experts : tuple of Pieces
        For each expert, its layers, one below the other.
    n_in : int
        Inputs of an expert.
    """

    whole: str
    experts: tuple[Pieces, ...]
    n_in: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the tensor: (experts, n_out, n_in)."""
        return len(self.experts), sum(self.experts[0].sizes), self.n_in


def named(adapter: Any, stacks: Sequence[Stack]) -> dict[str, str]:
    """Tell which of the stacks a file's nameless parameters belong to (`nesting.names`)."""
    tensors = {one.whole: SimpleNamespace(shape=one.shape) for one in stacks}
    return nesting.names(adapter.config, adapter.sites, tensors)


def unstacked(adapter: Any, stacks: Sequence[Stack]) -> Any:
    """Copy an adapter with stacks of experts taken apart.

    Parameters
    ----------
    adapter : Adapter
        Its parameters named in full (`nesting.named`).
    stacks : sequence of Stack

    Raises
    ------
    ConfigError
        If an expert has parameters other than LoRA's factors.
    """
    config, by_name = adapter.config, {one.whole: one for one in stacks}
    sites: dict[str, Params] = {}
    numbers: dict[str, Numbers] = {}
    for name, p in adapter.sites.items():
        stack = by_name.get(name)
        if stack is None:
            sites[name], numbers[name] = p, Numbers(config, name)
            continue
        _refuse_others(config, name, p)
        count, rows, width = stack.shape
        b, a = expert_factors(p, Site(name, count * width, count * rows, "Experts", groups=count))
        for i, pieces in enumerate(stack.experts):
            for part, cut in zip(pieces.names, pieces.cut(b[i, ...]), strict=True):
                sites[part] = {A: a[i, ...], B: cut}
                numbers[part] = Numbers(config, name)
    return adapter.replace(
        config=_configured(config, numbers, [], [*by_name]), sites=sites, spare={}
    )


def stacked(adapter: Any, stacks: Sequence[Stack]) -> Any:
    """Copy an adapter with experts stacked: the inverse of `unstacked`.

    Raises
    ------
    ConfigError
        If an expert has parameters other than LoRA's factors, or the method cannot be fused.
    """
    config = adapter.config
    whole_of = {n: one for one in stacks for pieces in one.experts for n in pieces.names}
    sites: dict[str, Params] = {}
    numbers: dict[str, Numbers] = {}
    for name, p in adapter.sites.items():
        stack = whole_of.get(name)
        if stack is None:
            sites[name], numbers[name] = p, Numbers(config, name)
        elif stack.whole not in sites:
            resolved, sites[stack.whole] = _stack(adapter, stack)
            numbers[stack.whole] = Numbers.of(config, name, resolved)
    wholes = [one.whole for one in stacks if one.whole in sites]
    return adapter.replace(config=_configured(config, numbers, wholes, []), sites=sites, spare={})


def _stack(adapter: Any, stack: Stack) -> tuple[Any, Params]:
    """Make the parameters of a stack of those of its experts' layers."""
    config, known = adapter.config, adapter.sites
    made: list[tuple[Any, Params] | None] = []
    for pieces in stack.experts:
        parts: list[Own | None] = [None] * len(pieces.names)
        for i, (name, size) in enumerate(zip(pieces.names, pieces.sizes, strict=True)):
            if name in known:
                _refuse_others(config, name, known[name])
                parts[i] = own(config, name, known[name], size)
        made.append(fuse(stack.whole, parts, pieces) if any(parts) else None)
    given = [one for one in made if one is not None]
    first: Any = given[0][0]
    rank, like = max(own.r for own, _ in given), given[0][1]
    unit = replace(first, r=rank, lora_alpha=1.0).scaling
    alpha = first.scaling / unit
    count, rows, _ = stack.shape
    width = like[A].shape[1]
    xp, dtype = namespace(like[A]), compute_dtype(like[A], like[B])
    same = all(own.r == rank and own.scaling == first.scaling for own, _ in given)
    keep = same and len(given) == count
    a, b = [], []
    for one in made:
        if one is None:
            a.append(_zeros(like[A], (rank, width)))
            b.append(_zeros(like[B], (rows, rank)))
            continue
        resolved, p = one
        if tuple(p[A].shape)[1] != width:
            raise ShapeError(f"{stack.whole}: experts of {width} and {p[A].shape[1]} inputs differ")
        low, high = p[A], p[B]
        if not keep:
            high = astype(high, dtype) * (resolved.scaling / first.scaling)
            more = rank - resolved.r
            low = xp.concat([low, _zeros(low, (more, width))], axis=0)
            high = astype(xp.concat([high, _zeros(high, (rows, more))], axis=1), dtype)
        a.append(low)
        b.append(high if keep else astype(high, dtype))
    if not keep:
        b = [astype(one, dtype) for one in b]
    # Files hold the experts one below the other in A; in B they alternate.
    alternating = xp.permute_dims(xp.stack(b), (1, 2, 0))
    factors = {A: xp.concat(a, axis=0), B: xp.reshape(alternating, (rows, rank * count))}
    whole = round(alpha) * unit == first.scaling
    return replace(first, r=rank, lora_alpha=round(alpha) if whole else alpha), factors


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    return namespace(like).zeros(shape, dtype=like.dtype, device=creation_device(like))


def _configured(config: Any, numbers: dict[str, Numbers], new: list[str], gone: list[str]) -> Tuner:
    """Target exactly these sites: stacks as parameters, and all others as modules."""
    before = config.target_parameters or []
    kept = [
        entry
        for entry in before
        if not entry.endswith(".weight") and not any(is_parameter(n, (entry,)) for n in gone)
    ]
    stacks = [n for n in numbers if n in new or is_parameter(n, (*kept,))]
    changed: Any = with_numbers(config, numbers)
    modules = [n for n in changed.target_modules if n not in stacks]
    return replace(changed, target_modules=modules, target_parameters=[*kept, *new] or None)


def _refuse_others(config: Any, name: str, p: Params) -> None:
    others = [key for key in p if key not in (A, B)]
    if others or config.peft_type != "LORA":
        raise ConfigError(
            f"{name}: {', '.join(others) or config.peft_type} cannot be stacked or unstacked: only "
            "LoRA's factors stand apart for each expert; save the base in the adapter's layout"
        )

"""What an adapted torch module carries: its adapters, and the forward pass that applies them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_any import parts as several
from peft_any.backend import astype, compute_dtype, dtype_name, is_floating
from peft_any.dropout import Noise, branch, drops
from peft_any.errors import ConfigError
from peft_any.integrations.torch.noise import Drawn
from peft_any.integrations.torch.tensors import (
    CHILD,
    COMPUTED,
    CONVOLUTIONS,
    Arrays,
    is_transposed,
)
from peft_any.layer import Dense, Site
from peft_any.method import Additive, Prompt, Tuner
from peft_any.parts import Adapted, Part
from peft_any.patterns import expression
from peft_any.tokens import with_rows

Values = Mapping[str, Tensor]
"""Tensors by their names within a module: ``weight``, ``out_proj.weight``."""
_HOSTED = frozenset({"FOURIERFT", "WAVEFT", "TRAINABLE_TOKENS"})
"""Methods that place values by NumPy's integers, which torch's compiler would trace wrongly."""
torch.compiler.assume_constant_result(expression)


class Share(nn.Module):
    """What one adapter brings to a module.

    Parameters
    ----------
    adapter, owner : str
        The adapter's name, and the module's.
    config, site
        The method at a layer, which is the module or one inside it; None where the adapter only
        brings new values.

    Attributes
    ----------
    own, shared : Arrays
        The layer's parameters, and those of all layers.
    copies, rows : Arrays
        New values of whole tensors, and new rows of tables, by the tensors' names in the module.
    indices : dict of str to list of int
        Which rows.
    on : bool
        Whether it acts.
    prompt : Prompt, optional
        The method, where it makes virtual tokens of what is `shared`.
    routing : dict
        What calls are given beside their input.
    """

    def __init__(
        self, adapter: str, owner: str, config: Tuner | None = None, site: Site | None = None
    ) -> None:
        super().__init__()
        self.adapter, self.owner, self.config, self.site = adapter, owner, config, site
        self.on = True
        self.prompt: Prompt | None = None
        self.routing: dict[str, Any] = {}
        self.own, self.shared, self.copies, self.rows = (Arrays({}) for _ in range(4))
        self.indices: dict[str, list[int]] = {}

    def within(self, name: str) -> str:
        """Give a tensor's name within the module."""
        return name.removeprefix(f"{self.owner}.") if self.owner else name

    def outside(self, name: str) -> str:
        """Give a tensor's whole name."""
        return f"{self.owner}.{name}" if self.owner else name

    @property
    def params(self) -> dict[str, Tensor]:
        """The layer's parameters and the shared ones, as the method takes them."""
        return {**self.shared.arrays(), **self.own.arrays()}


class Slot(nn.Module):
    """The child of an adapted module that holds what adapters bring, in the order they act."""

    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.shares = nn.ModuleList()
        self.hook = hook

    @property
    def acting(self) -> list[Share]:
        """What is switched on."""
        return [share for share in self.shares if isinstance(share, Share) and share.on]

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        """Give the tensors of which adapters bring new values, in the base's dtypes."""
        values: dict[str, Tensor] = {}
        for share in self.acting:
            for name, copy in share.copies.arrays().items():
                values[name] = copy.to(tensor(module, name).dtype)
            for name, rows in share.rows.arrays().items():
                table = values.get(name, tensor(module, name))
                values[name] = with_rows(table, rows, share.indices[name])
        return values

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """Give all tensors that adapters change, as they change them, in the base's dtypes."""
        values = self.replaced(module)
        out = dict(values)
        for site in {share.site: None for share in self.acting if share.site}:
            here = [share for share in self.acting if share.site == site]
            parts = [Part(s.config, {**s.params, **s.routing}) for s in here if s.config]
            layer = several.rounded(parts, stored(module, values, here[0]), stacked=True)
            out[here[0].within(site.weight)] = layer.stored()
            if layer.bias is not None and any(part.config.changes_bias(site) for part in parts):
                out[here[0].within(site.bias_name)] = layer.bias
        return out

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's own forward does, adapted."""
        adapting = [share for share in self.acting if share.config is not None]
        if not adapting:
            return call(module, self.replaced(module), *args, **kwargs)
        noisy = module.training and any(drops(share.config) for share in adapting)
        noise = Drawn(()) if noisy else None
        if _is_plain(module):
            apart = any(s.config and s.config.peft_type in _HOSTED for s in adapting)
            apply = self._applied_apart if apart else self._applied
            return apply(adapting, module, noise, *args, **kwargs)
        if noise is None:
            return call(module, self.merged(module), *args, **kwargs)
        return self._branched(adapting, module, noise, *args, **kwargs)

    def _branched(
        self, adapting: list[Share], module: nn.Module, noise: Noise, *args: Any, **kwargs: Any
    ) -> Any:
        """Add, to what the base gives, what every change of its weight makes of thinned input."""
        for share in adapting:
            config: Any = share.config
            if not _branches(module, config, alone=len(adapting) == 1):
                raise ConfigError(
                    f"{share.adapter}: {config.peft_type} cannot drop inputs of a "
                    f"{type(module).__name__}, which it adapts through its weight: train with a "
                    "dropout of 0, or leave the layer out"
                )
        (x,), values = (*args, *kwargs.values()), self.replaced(module)
        given = [Part(s.config, {**s.params, **s.routing}) for s in adapting if s.config]
        parts, base = several.ready(given, stored(module, values, adapting[0]), stacked=True)
        y, layer = call(module, values, x), base
        for part in parts:
            changed = branch(part.config, part.params, layer, noise)
            if changed is not None:
                own, rate = changed
                thin = noise.thinned(astype(x, dtype_name(own.weight)), rate)
                y = y + call(module, {"weight": own.stored(), "bias": own.bias}, thin)
            layer = Dense.formed(Adapted(part, layer))
        return y.to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _applied_apart(self, *args: Any, **kwargs: Any) -> Any:
        return self._applied(*args, **kwargs)

    def _applied(
        self,
        adapting: list[Share],
        module: nn.Module,
        noise: Noise | None,
        input: Tensor,  # noqa: A002 - torch's name
    ) -> Tensor:
        """Apply a layer that is a product, or a lookup, and nothing else: no ΔW is formed."""
        held = Held(module, self.replaced(module), adapting)
        floating = is_floating(input)
        parts = [held.part(share, noise) for share in adapting]
        x = astype(input, held.name) if floating else input
        y: Any = several.forward(parts, x, held, stacked=True)
        kind = input.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if floating and autocast:  # which leaves lookups as they are
            return y.to(torch.get_autocast_dtype(kind))
        return y.to(input.dtype if floating else module.weight.dtype)


class Held:
    """A torch layer as methods see it (`layer.Layer`): widened only where they read its weight."""

    def __init__(self, module: nn.Module, values: Values, shares: list[Share]) -> None:
        self._module, self._values = module, values
        self._stored = stored(module, values, shares[0])
        self.site = self._stored.site
        arrays = [a for share in shares for a in share.params.values() if is_floating(a)]
        self.name = compute_dtype(self._stored.weight, *arrays)
        self._wide: Any = None

    def part(self, share: Share, noise: Noise | None) -> Part:
        """Make an adapter ready to act on this layer."""
        assert share.config is not None  # noqa: S101 - a share with a site has one
        wide = {k: astype(v, self.name) if is_floating(v) else v for k, v in share.params.items()}
        wide |= share.routing
        at = None if noise is None else noise.at(f"{share.adapter}/{self.site.name}")
        return Part(share.config, wide, noise=at)  # for one call: nothing is prepared

    @property
    def weight(self) -> Any:
        """The flat weight in the compute dtype, made once."""
        if self._wide is None:  # the lock of a cached_property is none of what torch compiles
            self._wide = astype(self._stored.weight, self.name)
        return self._wide

    @property
    def adapted(self) -> bool:
        """It is the lowest."""
        return False

    @property
    def original(self) -> Any:
        """The weight below all adapters, which this one is."""
        return self.weight

    @property
    def original_bias(self) -> Any:
        """The bias below all adapters, which this one is."""
        return self.bias

    @property
    def bias(self) -> Any:
        """The bias in the compute dtype, if there is one."""
        bias = self._stored.bias
        return None if bias is None else astype(bias, self.name)

    def __call__(self, x: Any) -> Any:
        """Run the module's own forward, in its own dtype."""
        if is_floating(x):
            x = x.to(self._stored.weight.dtype)
        return astype(call(self._module, self._values, x), self.name)


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer is a product, or a lookup, and nothing else."""
    usual = type(module) in (nn.Linear, nn.Embedding) or is_transposed(module)
    return usual and getattr(module, "max_norm", None) is None


def _branches(module: nn.Module, config: Any, *, alone: bool) -> bool:
    """Whether what an adapter adds to a module is a module of its kind, with another weight."""
    own = type(config).dropped is not Tuner.dropped
    adds = isinstance(config, Additive) or config.thins
    return type(module) in CONVOLUTIONS and bool(adds or (alone and not own))


def stored(module: nn.Module, values: Values, share: Share) -> Dense:
    """See the layer that an adapter acts on, with new values of its tensors, as a flat matrix."""
    site: Any = share.site

    def find(name: str) -> Any:
        within = share.within(name)
        return values[within] if within in values else tensor(module, within)

    return Dense.of(find(site.weight), find(site.bias_name) if site.bias else None, site)


def tensor(module: nn.Module, name: str) -> Tensor:
    """Look up a tensor of a module by its dotted name."""
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), last)
    return found


def call(module: nn.Module, values: Values, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module's class, with other tensors in the place of some."""
    target = _stand_in(module, values) if values else module
    return type(module).forward(target, *args, **kwargs)


def _stand_in(module: nn.Module, values: Values) -> nn.Module:
    """Make an object that shares all with a module but some tensors: nothing is written to it."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).pop("forward", None)
    here = {name: value for name, value in values.items() if "." not in name}
    for name in here:
        if isinstance(getattr(type(module), name, None), property):
            raise ConfigError(f"{type(module).__name__}.{name}: cannot be adapted: {COMPUTED}")
    kept = {k: p for k, p in module._parameters.items() if k not in here}  # noqa: SLF001
    vars(twin).update(here, _parameters=kept)
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        child, _, rest = name.partition(".")
        if rest:
            inner.setdefault(child, {})[rest] = value
    if inner:
        made = {k: _stand_in(module.get_submodule(k), v) for k, v in inner.items()}
        vars(twin)["_modules"] = {**module._modules, **made}  # noqa: SLF001
    return twin


def slot_of(module: nn.Module) -> Slot | None:
    """Give the adapters of a module, if it has any."""
    found = module._modules.get(CHILD)  # noqa: SLF001 - getattr raises for most modules
    return found if isinstance(found, Slot) else None


def refuse_replaced(module: nn.Module, name: str) -> None:
    """Refuse a module of which another library has changed the forward.

    Raises
    ------
    ConfigError
    """
    if slot_of(module) is None and "forward" in vars(module):
        raise ConfigError(
            f"{name or 'the module'}: cannot be adapted: its forward was replaced "
            f"({vars(module)['forward']!r:.80}): attach the adapter before, or undo that first"
        )


def open_slot(module: nn.Module) -> Slot:
    """Let a module carry adapters."""
    found = slot_of(module)
    if found is not None:
        return found
    # A hook, though it does nothing, keeps torch's fused layers from reading weights past forward.
    slot = Slot(module.register_forward_pre_hook(_do_nothing))
    module.add_module(CHILD, slot)
    module.forward = partial(_adapted, module)
    return slot


def close_slot(module: nn.Module) -> None:
    """Make a module that carries no adapter any more what it was."""
    slot = slot_of(module)
    if slot is not None and not len(slot.shares):
        slot.hook.remove()
        del module._modules[CHILD], module.forward  # noqa: SLF001 - as delattr would


def _adapted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    slot = slot_of(module)
    assert slot is not None  # noqa: S101 - this is its forward only while it has one
    return slot.run(module, *args, **kwargs)


def _do_nothing(*_: Any) -> None:
    pass

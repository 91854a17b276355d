"""The handle of an adapter on a torch module: its parameters, its files, and blocks of calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_any._typing import Params
from peft_any.adapter import Adapter
from peft_any.completing import Placed
from peft_any.integrations.torch.slot import Share
from peft_any.integrations.torch.tensors import Arrays
from peft_any.io._atomic import StrPath
from peft_any.routed import taken


@dataclass(frozen=True, eq=False)
class Attached:
    """An adapter on a torch module, with its name: what `attach` gives."""

    module: nn.Module
    name: str
    _placed: Placed
    _shared: Arrays
    _shares: list[Share]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give what is trained, by the names of `Adapter.trainable`."""
        seen: set[int] = set()
        for share in self._shares:
            where = "" if share.site is None else share.site.name
            groups = (share.own, where), (share.shared, ""), (share.copies, share.owner)
            for arrays, stem in (*groups, (share.rows, share.owner)):
                for name, array in arrays.arrays().items():
                    if isinstance(array, nn.Parameter) and id(array) not in seen:
                        seen.add(id(array))
                        yield f"{stem}.{name}" if stem else name, array

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give what is trained, for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def adapter(self) -> Adapter:
        """The adapter as it stands: copies of its arrays, where they are."""
        own = self._placed.adapter
        params: dict[str, Params] = {}
        copies: Params = {}
        rows: Params = {}
        for share in self._shares:
            if share.site is not None:
                params[share.site.name] = share.own.snapshot()
            copies |= {share.outside(k): v for k, v in share.copies.snapshot().items()}
            rows |= {share.outside(k): v for k, v in share.rows.snapshot().items()}
        return own.replace(
            sites={name: params[name] for name in own.sites},
            shared=self._shared.snapshot(),
            extra={name: copies[name] for name in own.extra},
            tokens={name: rows[f"{name}.weight"] for name in own.tokens},
        )

    def save(self, path: StrPath, *, overwrite: bool = False) -> None:
        """Write it as Hugging Face PEFT lays it out: see `Adapter.save`."""
        self.adapter.to("numpy").save(path, overwrite=overwrite)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let it not act within the block."""
        before = [share.on for share in self._shares]
        for share in self._shares:
            share.on = False
        try:
            yield
        finally:
            for share, old in zip(self._shares, before, strict=True):
                share.on = old

    @contextmanager
    def routed(self, **routing: Any) -> Iterator[None]:
        """Give calls within the block more than their input, as `PeftModel.routed` does.

        Raises
        ------
        ConfigError
            If the adapter does not take it.

        Examples
        --------
        >>> import torch
        >>> from peft_any import LoraConfig
        >>> from peft_any.integrations.torch import attach
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = LoraConfig(r=2, alora_invocation_tokens=[7], target_modules=["0"])
        >>> task = attach(net, config)
        >>> with task.routed(alora_offsets=[2, None]):
        ...     net(torch.ones(2, 5, 4)).shape
        torch.Size([2, 5, 3])
        """
        given = taken(routing, {self.name: self._placed})
        before = [share.routing for share in self._shares]
        for share in self._shares:
            takes = frozenset() if share.config is None else share.config.takes
            share.routing = {k: v for k, v in given.items() if k in takes}
        try:
            yield
        finally:
            for share, old in zip(self._shares, before, strict=True):
                share.routing = old

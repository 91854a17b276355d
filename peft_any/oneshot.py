"""Merging, unmerging and stacking in one call, without keeping a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_any._typing import Array, Weights
from peft_any.adapter import Adapter
from peft_any.arguments import checked
from peft_any.bank.rows import Bank
from peft_any.bank.store import AdapterStore
from peft_any.layer import Kind, Site
from peft_any.model import PeftModel


@checked
def merge(
    weights: Weights,
    adapter: Adapter,
    *,
    kinds: Mapping[str, Kind | Site] | None = None,
) -> dict[str, Array]:
    """Merge one adapter into a mapping of weights, and give the new mapping.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.ia3 import IA3Config
    >>> weights = {"fc.weight": np.ones((2, 3), dtype="float32")}
    >>> model = PeftModel(weights)
    >>> config = IA3Config(target_modules=["fc"], feedforward_modules=[])
    >>> merge(weights, model.add("task", config))["fc.weight"].shape
    (2, 3)
    """
    model = PeftModel(weights, kinds=kinds)
    model.add("default", adapter)
    return model.merge()


@checked
def unmerge(
    merged: Weights, adapter: Adapter, *, kinds: Mapping[str, Kind | Site] | None = None
) -> dict[str, Array]:
    """Compute the base weights from merged ones, without the base.

    Raises
    ------
    Irreversible
        If the method's merge cannot be undone, or the adapter replaced whole tensors.
    """
    model = PeftModel(merged, kinds=kinds)
    model.add("default", adapter)
    return model.unmerge(merged)


@checked
def stack(
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    weights: Weights,
    *,
    kinds: Mapping[str, Kind | Site] | None = None,
) -> Bank:
    """Put many adapters over one base, for batches of which each row has its own, or none.

    Parameters
    ----------
    adapters : sequence of Adapter, or mapping of str to Adapter
        Of any methods and ranks. Those of a sequence are named ``"0"``, ``"1"`` and so on; those
        of an `AdapterStore` are attached only as batches need them.
    weights, kinds
        The base, as for `PeftModel`.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        If an adapter does not fit the base, or acts within attention.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.ia3 import IA3Config
    >>> config = IA3Config(target_modules=["fc"], feedforward_modules=[])
    >>> two = [Adapter(config, {"fc": {"ia3_l": np.full((2, 1), c)}}) for c in (2.0, 3.0)]
    >>> bank = stack(two, {"fc.weight": np.ones((2, 1))})
    >>> bank.bind(np.asarray([1, -1, 0])).layers["fc"](np.ones((3, 1)))[:, 0]
    array([3., 1., 2.])
    """
    model: Any = PeftModel(weights, kinds=kinds)
    if isinstance(adapters, AdapterStore):
        return Bank(model, adapters)
    named = adapters if isinstance(adapters, Mapping) else dict(enumerate(adapters))
    for name, adapter in named.items():
        model.add(str(name), adapter)
    bank = Bank(model)
    bank.refuse(model.names, "stack()")
    return bank

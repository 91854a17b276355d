"""Merging and unmerging a mapping of weights in one call, without keeping a model."""

from __future__ import annotations

from collections.abc import Mapping

from peft_any._typing import Array
from peft_any.adapter import Adapter
from peft_any.layer import Kind, Site
from peft_any.model import PeftModel


def merge(
    weights: Mapping[str, Array],
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


def unmerge(
    merged: Mapping[str, Array], adapter: Adapter, *, kinds: Mapping[str, Kind | Site] | None = None
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

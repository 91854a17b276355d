"""Heads that adapters bring along and a base does not have: classifiers over a language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_any._typing import Array
from peft_any.adapter import Adapter
from peft_any.selection import saved_whole


def new_heads(adapter: Adapter, names: Iterable[str]) -> list[str]:
    """List the full copies of whole modules, at the top of the model, that a base lacks.

    Parameters
    ----------
    adapter : Adapter
    names : iterable of str
        The base's tensors.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> head = {"score.weight": np.ones((3, 8)), "model.norm.weight": np.ones(8)}
    >>> config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["norm"])
    >>> new_heads(Adapter(config, extra=head), ["model.fc.weight"])
    ['score.weight']
    """
    if not adapter.extra:
        return []
    tops, layers = _tops(names), _tops(adapter.sites)
    if layers and not layers & tops:  # then all names are others than the base's
        return []
    wanted = {*saved_whole(adapter.config)} - tops
    return [name for name in adapter.extra if name.partition(".")[0] in wanted]


def replaced(adapter: Adapter, names: Iterable[str]) -> list[str]:
    """List the tensors of a base that models with another head do not have: its own, and a pooler.

    Parameters
    ----------
    adapter : Adapter
        With a new head; its layers lie in the rest of the model.
    names : iterable of str

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> adapter = Adapter(LoraConfig(target_modules=["dense"]), {"bert.encoder.dense": {}})
    >>> names = ["bert.encoder.dense.weight", "bert.pooler.dense.weight", "cls.dense.weight"]
    >>> replaced(adapter, names)
    ['bert.pooler.dense.weight', 'cls.dense.weight']
    """
    held = [*adapter.sites, *adapter.extra, *adapter.tokens]
    tops = _tops(held)
    poolers = () if any(".pooler." in f".{name}." for name in held) else ("pooler",)
    return [
        name
        for name in names
        if name.partition(".")[0] not in tops or {*name.split(".")[:2]} & {*poolers}
    ]


def _tops(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def labelled(config: dict[str, Any], heads: Iterable[Array]) -> None:
    """Say in a model's configuration how many labels new heads tell apart, in place.

    Examples
    --------
    >>> import numpy as np
    >>> config = {"model_type": "llama"}
    >>> labelled(config, [np.ones((3, 8))])
    >>> config["id2label"]
    {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}
    """
    rows = [head.shape[0] for head in heads if head.ndim > 1]
    known = config.get("id2label")
    if rows and min(rows) != (len(known) if isinstance(known, dict) else 2):
        labels = {str(i): f"LABEL_{i}" for i in range(min(rows))}
        config["id2label"] = labels
        config["label2id"] = {label: int(i) for i, label in labels.items()}

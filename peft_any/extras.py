"""What an adapter carries beside its method: full copies of tensors, biases, rows of embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft_any._typing import Array, Params
from peft_any.backend import astype, dtype_name, is_floating, namespace
from peft_any.errors import ShapeError, TargetError, nearest
from peft_any.layer import Site
from peft_any.layout import shape_of
from peft_any.method import Prompt, Tuner
from peft_any.registry import Config, method_names
from peft_any.selection import saved_whole
from peft_any.tokens import INPUTS, check_rows, embedding, rows_of, token_faults, token_indices

_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")
"""What batch norms count beside their parameters."""


def refuse_faults(adapter: Any, where: str) -> None:
    """Refuse an adapter that no base can make right.

    Raises
    ------
    ShapeError, TargetError
        Listing everything that is wrong with its tensors.
    """
    config = adapter.config
    if isinstance(config, Prompt):
        want = config.shapes()
        bad = [f"{k}: missing, of shape {s}" for k, s in want.items() if k not in adapter.shared]
        bad += [
            f"{k}: shape {tuple(v.shape)} cannot fit: {config.where} needs {want.get(k)}"
            for k, v in adapter.shared.items()
            if tuple(v.shape) != want.get(k)
        ]
    else:
        bad = [
            f"{site}.{name}: {dtype_name(v)} values cannot be parameters: they are no floats"
            for site, p in adapter.sites.items()
            for name, v in p.items()
            if not (is_floating(v) or config.is_frozen(name)) and config.peft_type in method_names()
        ]
    bad += token_faults(config, adapter.tokens)
    if bad:
        raise ShapeError("\n".join(f"{where}: {line}" for line in bad))
    dummy = getattr(config, "target_modules", None) == "dummy-target-modules"
    if not (adapter.sites or adapter.shared or adapter.extra or adapter.tokens or dummy):
        raise TargetError(
            f"{where}: holds no adapter of {config.where}: Hugging Face PEFT writes such a file "
            "where save_pretrained is given the state_dict of a wrapped model (DDP, "
            "torch.compile): give it none, or that of the PeftModel itself"
        )


def trained(adapter: Any) -> dict[str, Params]:
    """Give what of an adapter is trained: nothing frozen, nor what repeats another site's."""
    config, sites = adapter.config, adapter.sites
    tied = config.ties(sites) if isinstance(config, Tuner) else {}
    loose = {k: a for k, a in adapter.shared.items() if not config.is_frozen(k)}
    loose |= {k: a for k, a in adapter.extra.items() if is_trained(config, k)}
    loose |= {f"{module}.trainable_tokens_delta": a for module, a in adapter.tokens.items()}
    own = {
        s: {k: a for k, a in p.items() if not (config.is_frozen(k) or (s, k) in tied)}
        for s, p in sites.items()
    }
    return {"": loose, **own} if loose else own


def is_trained(config: Config, tensor: str) -> bool:
    """Whether a copied tensor was trained, and not only saved along (as embeddings are)."""
    if tensor.endswith(_BUFFERS):
        return False
    bias = getattr(config, "bias", "none") != "none" and tensor.endswith("bias")
    return bias or within(tensor, saved_whole(config))


def within(tensor: str, modules: Iterable[str]) -> bool:
    """Whether a tensor lies in a module whose name ends so: HF looks for no dot before it.

    Examples
    --------
    >>> within("bert.classifier.dense.weight", ["classifier"]), within("fc.weight", ["head"])
    (True, False)
    """
    return any(_home(tensor, module) is not None for module in modules)


def uncarried(
    config: Config, extra: Params, tokens: Mapping[str, Array], weights: Iterable[str]
) -> list[str]:
    """Describe what the configuration says is carried whole, the base has, and the adapter lacks.

    Tied tables have their new rows in common, so that only all of them can be missed.
    """
    lost = []
    names = [*weights] if config.modules_to_save else []
    for entry in config.modules_to_save or ():
        held = {_home(name, entry) for name in extra}
        lost += [
            f"{module}: is in modules_to_save, and the adapter has no copy of it"
            for module in dict.fromkeys(_home(name, entry) for name in names)
            if module not in {None, *held}
        ]
    listed = getattr(config, "trainable_token_indices", None) or []
    asked = any(map(len, listed.values())) if isinstance(listed, Mapping) else bool(listed)
    if asked and not tokens:
        lost.append(f"{config.where}: trainable_token_indices: the adapter has no rows for them")
    return lost


def _home(tensor: str, entry: str) -> str | None:
    """Name the module that an entry means, of which a tensor is part; as `within` finds it."""
    parts = tensor.split(".")[:-1]
    heads = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return next((head for head in heads if head.endswith(entry)), None)


def fresh_copies(
    config: Config, weights: Mapping[str, Array], sites: Mapping[str, Site]
) -> tuple[Params, Params]:
    """Take from the base what a new adapter trains beside its method.

    Parameters
    ----------
    config : Config
        Its `modules_to_save`, `bias` and `trainable_token_indices`.
    weights : mapping of str to array
        The base.
    sites : mapping of str to Site
        The layers that the method adapts.

    Returns
    -------
    extra : dict {base tensor: array}
    tokens : dict {embedding module: rows (k, width)}

    Raises
    ------
    TargetError
        If an entry matches nothing in the base.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> config = LoraConfig(modules_to_save=["head"], trainable_token_indices={"wte": [2]})
    >>> weights = {"wte.weight": np.ones((3, 2)), "head.weight": np.zeros((2, 2))}
    >>> extra, tokens = fresh_copies(config, weights, {})
    >>> list(extra), tokens["wte"].shape
    (['head.weight'], (1, 2))
    """
    saved = saved_whole(config)
    chosen = [name for name in weights if saved and within(name, saved)]
    lost = [
        f"{config.where}: modules_to_save entry {entry!r} matches no module"
        f"{nearest(entry, _modules(weights))}"
        for entry in config.modules_to_save or []
        if not any(within(name, [entry]) for name in chosen)
    ]
    bias = getattr(config, "bias", "none")
    if bias == "all":
        chosen += [n for n in weights if (n == "bias" or n.endswith(".bias")) and n not in chosen]
    elif bias.endswith("_only"):
        names = [s.bias_name for s in sites.values() if s.kind != "MultiheadAttention"]
        chosen += [name for name in names if name in weights and name not in chosen]
    listed = getattr(config, "trainable_token_indices", None) or []
    entries = list(listed) if isinstance(listed, Mapping) else [None] if listed else []
    modules = []
    for entry in entries:
        found = embedding(entry, weights)
        if found is None:
            names = [n.removesuffix(".weight") for n in weights if n.endswith(".weight")]
            lost.append(
                f"{config.where}: trainable_token_indices: no embedding "
                f"{entry or INPUTS!r} is there{nearest(entry or '', names)}"
            )
        else:
            modules.append(found)
    if lost:
        raise TargetError("\n".join(lost))
    tokens = {m: rows_of(weights[f"{m}.weight"], token_indices(config, m), m) for m in modules}
    return {name: weights[name] for name in chosen}, tokens


def _modules(weights: Iterable[str]) -> list[str]:
    return [*dict.fromkeys(part for name in weights for part in name.split(".")[:-1])]


def check_copies(
    config: Config,
    extra: Mapping[str, Array],
    tokens: Mapping[str, Array],
    weights: Mapping[str, Any],
) -> None:
    """Check that every copy and row has its place in a base.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        Listing all that do not.
    """
    want = {name: tuple(a.shape) for name, a in extra.items()}
    lost = [n for n in (*want, *(f"{m}.weight" for m in tokens)) if n not in weights]
    if lost:
        raise TargetError(
            "\n".join(f"{n}: the base has no such tensor{nearest(n, weights)}" for n in lost)
        )
    wrong = [
        f"{name}: shape {shape} cannot replace the base's {shape_of(weights, name)}"
        for name, shape in want.items()
        if shape != shape_of(weights, name)
    ]
    for module, rows in tokens.items():
        table = shape_of(weights, f"{module}.weight")
        check_rows(token_indices(config, module), table[0], module)
        if tuple(rows.shape)[1:] != table[1:]:
            wrong.append(f"{module}: rows of shape {tuple(rows.shape)} cannot go into {table}")
    if wrong:
        raise ShapeError("\n".join(wrong))


def non_finite(tree: Mapping[str, Params]) -> list[str]:
    """Name the arrays of ``{site: {name: array}}`` that hold NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> non_finite({"fc": {"ia3_l": np.asarray([1.0, np.nan])}})
    ['fc.ia3_l']
    """
    bad = []
    for site, p in tree.items():
        for name, a in p.items():
            if is_floating(a):
                xp = namespace(a)
                if not bool(xp.all(xp.isfinite(astype(a, "float32")))):
                    bad.append(f"{site}.{name}" if site else name)
    return bad

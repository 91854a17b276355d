"""The names of an adapter file's tensors: what each one is, and the other way round."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from peft_any.arguments import shown
from peft_any.errors import TargetError, UsageError, nearest
from peft_any.io._former import PARTS
from peft_any.layout import looks_like_embedding
from peft_any.method import Prompt, Tuner
from peft_any.registry import Config, method_names
from peft_any.selection import saved_whole

PREFIX = "base_model.model."
TABLE = "prompt_embeddings"
Part: TypeAlias = Literal["site", "shared", "copy", "tokens", "spare"]

_TOKENS = "trainable_tokens_delta"
_OLD = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}
"""Suffixes of older files, and what they are called now."""
_TRAINING = {"lora_monteclora_sampler", "lora_velora_embed"}
"""Of variants of LoRA: what only Hugging Face PEFT's training of them uses."""
_LEAVES = ("weight", "bias")
_OUTER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Of torch.compile, of fully sharded data parallelism, and of activation checkpoints."""
_WRAPPERS = {"base_layer", "modules_to_save", "original_module", "token_adapter"}
_PATCHES = "patch_embeddings"
"""The input embedding of transformers' models of images, which holds a convolution."""


@dataclass(frozen=True)
class Place:
    """What a tensor of an adapter file is.

    Attributes
    ----------
    part : str
        ``site``: the parameter `name` of the method at `module`; ``shared``: an array of all
        sites, or a prompt's table; ``copy``: a whole new value of the base's tensor `name`;
        ``tokens``: rows of the embedding `module`; ``spare``, without effect: the value that a
        copy replaces, a second spelling of the copy itself, or what only training uses.
    module, name : str
    """

    part: Part
    module: str
    name: str = ""


def read_keys(config: Config, keys: Iterable[str]) -> tuple[dict[str, Place], list[str]]:
    """Tell what each tensor of an adapter file is.

    The prefix ``base_model.model.`` and the name of the adapter (``lora_A.default.weight``) may
    be there or not; wrappers (``base_layer``, ``modules_to_save``, ``_orig_mod``) fall away, and
    so does what stands before that prefix in all names.

    Parameters
    ----------
    config : Config
        Its `prefix` marks the parameters of sites.
    keys : iterable of str

    Returns
    -------
    places : dict of str to Place
    unknown : list of str
        Sentences about the keys that belong nowhere.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> places, unknown = read_keys(LoraConfig(), ["base_model.model.fc.lora_A.default.weight"])
    >>> list(places.values())
    [Place(part='site', module='fc', name='lora_A.weight')]
    """
    places: dict[str, Place] = {}
    unknown: dict[str, str] = {}
    rest = []
    suffixes: dict[str, tuple[str, list[str]]] = {}
    former = PARTS.get(config.peft_type, {})
    plain = _inner({key: unwrapped(key) for key in keys})
    places |= {key: Place("spare", "base_layer", plain.pop(key)) for key in _twins(plain)}
    for key, name in plain.items():
        parts = [former.get(part, part) for part in name.removeprefix(PREFIX).split(".")]
        at = [i for i, p in enumerate(parts) if config.prefix and p.startswith(config.prefix)]
        if at and parts[at[0]] in _TRAINING:
            places[key] = Place("spare", _module(parts[: at[0]]), parts[at[0]])
        elif at and not isinstance(config, Prompt) and not _shared(config, name):
            suffixes[key] = _layer(config, parts[: at[-1]]), parts[at[-1] :]
        else:
            rest.append(key)
    drop = _adapter_names(config, suffixes, unknown)
    for key, (module, parts) in suffixes.items():
        if key in unknown:
            continue
        name = ".".join(parts[:1] + parts[2:] if _given_name(config, parts) in drop else parts)
        places[key] = Place("site", module, _OLD.get(name, name))
    sites = {place.module for place in places.values()}
    for key in rest:
        place = _beside(config, plain[key], sites)
        if isinstance(place, Place):
            places[key] = place
        else:
            unknown[key] = f"{key}: belongs to nothing: {place}"
    _second_spellings(places)
    counts = Counter(place for place in places.values() if place.part != "spare")
    for key, place in [*places.items()]:
        if counts[place] > 1:
            twins = [k for k, p in places.items() if p == place and k != key]
            unknown[key] = f"{key}: is the same as {', '.join(twins)}"
    return {k: p for k, p in places.items() if k not in unknown}, [*unknown.values()]


def unwrapped(key: str) -> str:
    """Take out of a name what torch's wrappers of whole models, or of their parts, put into it.

    Examples
    --------
    >>> unwrapped("module.base_model.model._orig_mod.fc.lora_A.weight")
    'base_model.model.fc.lora_A.weight'
    """
    plain = ".".join(part for part in key.split(".") if part not in _OUTER)
    return plain.removeprefix("module.") if plain.startswith("module.base_model.") else plain


def _inner(names: Mapping[str, str]) -> dict[str, str]:
    """Take off what a trainer's own module puts before every name, as Lightning's ``model.``."""
    parted = (f".{name}".partition(f".{PREFIX}") for name in names.values())
    found = {before[1:] + "." for before, there, _ in parted if there}
    outer = found.pop() if len(found) == 1 else "."
    same = all(name.startswith(outer) for name in names.values())
    return {key: name.removeprefix(outer if same else "") for key, name in names.items()}


def _twins(names: Mapping[str, str]) -> list[str]:
    """List what HF writes a second time: torch's attention and its output, both targeted."""
    last = ".out_proj."
    parted = (name.partition(f".base_layer{last}") for name in names.values())
    packed = tuple(before + last for before, found, _ in parted if found)
    return [key for key, name in names.items() if packed and name.startswith(packed)]


def _module(parts: list[str]) -> str:
    return ".".join(p for p in parts if p != "base_layer")


def _layer(config: Config, parts: list[str]) -> str:
    """Name a module with parameters; one around parameters keeps what tells its depth."""
    path, depth = ".".join(parts), 0
    while getattr(config, "target_parameters", None) and path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return ".".join([_module(path.split(".")), *["base_layer"] * depth])


def _given_name(config: Config, parts: list[str]) -> str | None:
    """Read the adapter's name out of a suffix: it comes after the first part."""
    inner = getattr(config, "inner", "")
    if len(parts) == 1 or re.fullmatch(inner, ".".join(parts[1:])):
        return None
    return parts[1] if re.fullmatch(inner, ".".join(parts[2:])) else None


def _adapter_names(
    config: Config, suffixes: Mapping[str, tuple[str, list[str]]], unknown: dict[str, str]
) -> set[str]:
    """Find the adapter's name in the keys; several are an error of each such key."""
    names = {key: _given_name(config, parts) for key, (_, parts) in suffixes.items()}
    found = {name for name in names.values() if name is not None}
    if config.peft_type not in method_names():  # a user's own parameters may nest as deep
        return found if len(found) == 1 and None not in names.values() else set()
    if len(found) > 1:
        for key, name in names.items():
            if name is not None:
                unknown[key] = f"{key}: belongs to the adapter {name!r} of {sorted(found)}"
    return found


def _beside(config: Config, key: str, sites: Collection[str]) -> Place | str:
    """Tell what a tensor is that is no parameter of a site, or why it is nothing."""
    prompt = isinstance(config, Prompt)
    if isinstance(config, Prompt) and key in config.tables:
        return Place("shared", "", key)
    parts = key.removeprefix("base_model." if prompt else PREFIX).split(".")
    if not all(parts) or parts[-1] in _WRAPPERS or parts.count("modules_to_save") > 1:
        return "it is no name of a tensor"
    if _TOKENS in parts and getattr(config, "trainable_token_indices", None):
        at = parts.index(_TOKENS)
        module = _module(parts[: max(at - 1, 0)])
        if module and parts[at - 1] == "token_adapter" and len(parts) <= at + 2:
            return Place("tokens", module)
    alone = parts[0] if _shares(config) and len(parts) == 1 else ""
    if name := _shared(config, key) or alone:
        return Place("shared", "", name)
    return _copy(config, parts, sites)


def _shares(config: Config) -> bool:
    return isinstance(config, Tuner) and type(config).shared_shapes is not Tuner.shared_shapes


def _shared(config: Config, key: str) -> str:
    """Read the name of an array of all sites, perhaps with the adapter's; empty if it is none."""
    if not _shares(config) or not key.startswith("base_model.") or key.startswith(PREFIX):
        return ""
    name, *rest = key.split(".")[1:]
    if name in config.grouped:
        return ".".join([name, *(rest if len(rest) > 2 else rest[-1:])])
    named = len(rest) == 1 and rest[0] not in _LEAVES
    return name if name not in _WRAPPERS and (named or not rest) else ""


def _copy(config: Config, parts: list[str], sites: Collection[str]) -> Place | str:
    saved = _leave_out(parts, "modules_to_save")
    plain = [p for p in saved if p not in _WRAPPERS]
    name = ".".join(plain)
    module, _, leaf = name.rpartition(".")
    above = [".".join(plain[:i]) for i in range(1, len(plain))]
    # HF wraps an embedding's twin too where `ensure_weight_tying` took its name off the list
    wrapped = saved != parts or "original_module" in parts
    twin = wrapped and leaf in _LEAVES and looks_like_embedding(module)
    listed = twin or any(m.endswith(tuple(saved_whole(config))) for m in above)
    if listed and "original_module" in parts:
        return Place("spare", "original_module", name)
    if listed and saved != parts:
        return Place("copy", "modules_to_save", name)
    bias = getattr(config, "bias", "none")
    own = module in sites
    if saved == parts and (
        listed
        or (leaf == "bias" and (bias == "all" or (bias.endswith("_only") and own)))
        or (leaf in _LEAVES and (looks_like_embedding(module) or _PATCHES in parts[:-2]))
        or (leaf == "weight" and own and "base_layer" in parts)
    ):
        return Place("copy", "", name)
    options = [config.prefix, *saved_whole(config), TABLE]
    why = f"{config.peft_type} has no such tensor{nearest(leaf, options)}"
    if leaf == "bias":
        why += f", and bias={bias!r} saves none"
    return f"{why}, and modules_to_save does not name its module"


def _leave_out(parts: list[str], wrapper: str) -> list[str]:
    """Remove a wrapper and the adapter's name that may follow it (not the leaf)."""
    if wrapper not in parts:
        return parts
    at = parts.index(wrapper)
    named = len(parts) > at + 2
    return parts[:at] + parts[at + 1 + named :]


def _second_spellings(places: dict[str, Place]) -> None:
    """Take one of two spellings as spare: HF writes both of what lies in saved embeddings."""
    called = {place for key, place in places.items() if not key.endswith(tuple(_OLD))}
    for key, place in places.items():
        if key.endswith(tuple(_OLD)) and place in called:
            places[key] = Place("spare", place.module, place.name)
    plain = {place.name for place in places.values() if place == Place("copy", "", place.name)}
    for key, place in places.items():
        if place.part == "copy" and place.module:
            spare = place.name in plain
            places[key] = Place("spare" if spare else "copy", place.module * spare, place.name)


def write_key(
    config: Config, place: Place, sites: Collection[str], tokens: Collection[str] = ()
) -> str:
    """Name a tensor as Hugging Face PEFT does; the inverse of `read_keys`.

    Parameters
    ----------
    config : Config
    place : Place
        Of any part but ``spare``.
    sites, tokens : collections of str
        Modules with parameters, and embeddings with rows: what lies in them gets a
        ``base_layer`` into its name.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> write_key(LoraConfig(), Place("copy", "", "fc.bias"), ["fc"])
    'base_model.model.fc.base_layer.bias'
    """
    if isinstance(config, Prompt):
        return place.name if place.part == "shared" else f"base_model.{place.name}"
    if place.part == "shared":
        return f"base_model.{place.name}"
    if place.part == "site":
        return PREFIX + ".".join(p for p in (_nested(place.module, sites), place.name) if p)
    if place.part == "tokens":
        return f"{PREFIX}{_nested(place.module, sites)}.token_adapter.{_TOKENS}"
    module, _, leaf = place.name.rpartition(".")
    path = _nested(module, sites)
    if module in tokens:
        path += ".token_adapter.base_layer"
    elif module in sites:
        path += ".base_layer" if path else "base_layer"
    return PREFIX + (f"{path}.{leaf}" if path else leaf)


def _nested(module: str, sites: Collection[str]) -> str:
    """Put ``base_layer`` after every adapted module on the way to this one, where none is yet."""
    parts, out = module.split("."), []
    for i, part in enumerate(parts):
        out.append(part)
        apart = i + 1 < len(parts) and parts[i + 1] != "base_layer"
        if apart and ".".join(parts[: i + 1]) in sites:
            out.append("base_layer")
    return ".".join(out)


def refuse_others(adapter: Any) -> None:
    """Refuse an adapter of anything but a configuration and arrays by names.

    Raises
    ------
    UsageError
        Naming what is something else.
    """
    if not isinstance(adapter.config, Config):
        raise UsageError(
            f"Adapter: config={shown(adapter.config)} cannot be taken: give a method's "
            "configuration, such as LoraConfig()"
        )
    for part in ("sites", "shared", "extra", "tokens", "spare"):
        _refuse_others(getattr(adapter, part), f"Adapter: {part}")


def _refuse_others(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        kind = "an array" if where.endswith("]") else "a mapping"
        raise UsageError(f"{where}={shown(value)} cannot be taken: give {kind}")
    for key, held in value.items():
        if not isinstance(key, str):
            raise UsageError(f"{where}: {shown(key)} cannot be a name: give a string")
        if not hasattr(held, "shape"):
            _refuse_others(held, f"{where}[{key!r}]")


def refuse_unknown(where: str, unknown: list[str]) -> None:
    """Raise the sentences of `read_keys` as one `TargetError`."""
    if unknown:
        raise TargetError(
            f"{where}: {len(unknown)} tensors cannot be placed:\n" + "\n".join(unknown)
        )

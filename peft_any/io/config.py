"""`adapter_config.json`: read strictly onto a method's dataclass, and written back as it came."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from threading import Lock
from types import NoneType
from typing import Any, get_args, get_type_hints

import msgspec

from peft_any.arguments import checked
from peft_any.checks import OURS
from peft_any.errors import ConfigError, PeftError
from peft_any.fields import check_words
from peft_any.io._atomic import StrPath
from peft_any.io._fetching import fetched as fetched
from peft_any.io._finding import CONFIG_NAME as CONFIG_NAME
from peft_any.io._finding import TENSORS as TENSORS
from peft_any.io._finding import find_adapter as find_adapter
from peft_any.io._finding import opened as opened
from peft_any.io._former import renewed as renewed
from peft_any.io._json import parse_object, read_json
from peft_any.io._lost import lost_layers as lost_layers
from peft_any.registry import Config, method_for, method_names

_LEARNT: set[type[Config]] = set()
_LEARNING = Lock()
PEFT_VERSION = "0.21.2"
"""The release of Hugging Face PEFT whose semantics a written configuration follows."""

_CHANGED = {
    "corda": "the covariances of the layers' inputs, which the file does not hold",
    "lora_ga": "gradients, which the file does not hold",
    "pissa_niter": "a random decomposition, which cannot be repeated",
}
_UNCONVERTED = {
    init: f"the base it belongs to was changed by {by}; save it with Hugging Face PEFT's "
    "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
    for init, by in _CHANGED.items()
} | {
    "loftq": "it belongs to the base that LoftQ quantised; merge it with Hugging Face PEFT on that "
    "base, or say true in adapter_config.json and give that base dequantised: it is its plain LoRA"
}
"""Initial values of LoRA that leave another base, which a file lacks; and the way out."""


_IDLE = {
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "qalora_group_size",
    "runtime_config",
    "tokenizer_kwargs",
    "velora_config",
}
"""Fields of Hugging Face PEFT that act in training only, or with others that are refused."""


@checked
def config_from_json(source: StrPath) -> tuple[Config, dict[str, Any]]:
    """Read a configuration file, or the JSON text itself.

    Parameters
    ----------
    source : path, or str that begins with ``{``

    Returns
    -------
    config : Config
        Of the class that ``peft_type`` names.
    unknown : dict
        The file's other fields, which `config_to_dict` puts back.

    Raises
    ------
    ConfigError
        If a field has a wrong type, the method is unknown or missing, or a field that changes
        the maths and is not supported is set.
    FormatError
        If it is not JSON, not an object, or repeats a key.
    StorageError
        If the file cannot be read.

    Examples
    --------
    >>> config, unknown = config_from_json('{"peft_type": "LORA", "r": 4, "megatron_core": null}')
    >>> config.r, unknown
    (4, {'megatron_core': None})
    """
    if isinstance(source, str) and source.lstrip()[:1] == "{":
        return config_from_dict(parse_object(source, CONFIG_NAME), CONFIG_NAME)
    return config_from_dict(read_json(source), str(source))


def config_from_dict(
    raw: Mapping[str, Any], where: str = CONFIG_NAME
) -> tuple[Config, dict[str, Any]]:
    """Convert the contents of a configuration file; see `config_from_json`.

    Parameters
    ----------
    raw : mapping
        Plain JSON values.
    where : str
        What errors begin with.

    Examples
    --------
    >>> config_from_dict({"peft_type": "LORA", "r": "8"})
    Traceback (most recent call last):
        ...
    peft_any.errors.ConfigError: adapter_config.json: Expected `int`, got `str` - at `$.r`
    """
    raw = renewed(raw)
    name = raw.get("peft_type")
    if not isinstance(name, str):
        raise ConfigError(
            f"{where}: peft_type is {'missing' if name is None else f'{name!r}, not a name'}: it "
            f"says which method this is, one of {', '.join(method_names())}"
        )
    try:
        cls = method_for(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    _refuse(cls, raw, where)
    known, flags = {f.name: f for f in fields(cls)}, _flags(cls)
    given = {
        k: False if v is None and k in flags else v
        for k, v in raw.items()
        # a null mapping is an old way to write an empty one
        if k in known and not (v is None and known[k].default_factory is dict)
    }
    unknown = {k: v for k, v in raw.items() if k not in known and k != "peft_type"}
    try:
        _finite(given, "$")
        check_words(cls, given, where)
        config = _converted(given, cls)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, PeftError):
            raise type(error.__cause__)(f"{where}: {error.__cause__}") from None
        raise ConfigError(f"{where}: {error}") from None
    return config, unknown


def _converted(given: Mapping[str, Any], cls: type[Config]) -> Config:
    """Make a class's instance; for the first time alone, since msgspec then learns its fields.

    A thread that came meanwhile would find them half learnt, and crash the process.
    """
    if cls in _LEARNT:
        return msgspec.convert(given, cls)
    with _LEARNING:
        made = msgspec.convert(given, cls)
    _LEARNT.add(cls)
    return made


@cache
def _flags(cls: type[Config]) -> frozenset[str]:
    """Name the fields where null, which Hugging Face PEFT takes for false, stands for false."""
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(cls).items()}
    return frozenset(k for k, of in kinds.items() if bool in of and NoneType not in of)


def _refuse(cls: type[Config], raw: Mapping[str, Any], where: str) -> None:
    """Refuse fields that are set, change the maths, and are not supported: all at once."""
    said = [
        f"{where}: {field}={raw[field]!r} cannot be used: {why}"
        for field, why in cls.refused.items()
        if raw.get(field)
    ]
    if said:
        raise ConfigError("\n".join(said))


def unheard(unknown: Mapping[str, Any], where: str) -> list[str]:
    """Say which unknown fields are set: kept, and without effect here.

    Examples
    --------
    >>> unheard({"megatron_core": "megatron.core", "new_trick": True}, "a.json")
    ['a.json: the unknown field new_trick=True is kept and has no effect']
    """
    return [
        f"{where}: the unknown field {field}={value!r} is kept and has no effect"
        for field, value in unknown.items()
        if value and field not in _IDLE
    ]


def _finite(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError(f"Expected a finite number, got {value} - at `{path}`")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _finite(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _finite(item, f"{path}[{i}]")


def refuse_unconverted(config: Config, where: str) -> None:
    """Refuse a file of which the base, or frozen arrays, were made by what is not in it.

    Raises
    ------
    ConfigError
        For CorDA, LoRA-GA, LoftQ and randomised PiSSA adapters that were not converted, and for
        methods whose file lacks what its writer alone could tell (`Config.marks`).
    """
    for field, lack in config.marks.items():
        if getattr(config, field) != OURS:
            raise ConfigError(f"{where}: {config.peft_type} cannot be loaded: {lack}")
    # AdaLoRA has the field, too, and starts alike whatever it says.
    init = getattr(config, "init_lora_weights", None) if config.peft_type == "LORA" else None
    why = _UNCONVERTED.get("pissa_niter" if str(init).startswith("pissa_niter") else str(init))
    if why:
        raise ConfigError(f"{where}: init_lora_weights={init!r} cannot be loaded: {why}")


def config_to_dict(config: Config, raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Give the contents of a configuration file.

    Parameters
    ----------
    config : Config
    raw : mapping, optional
        What the configuration was loaded from: returned with the fields that have changed
        since, and no others, overwritten.

    Returns
    -------
    dict
        Plain JSON values. A fresh one has every field of the method, ``peft_type``,
        ``peft_version`` and ``inference_mode`` true.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> written = config_to_dict(LoraConfig(r=4, target_modules=["q"]))
    >>> written["peft_type"], written["r"], written["lora_alpha"], written["inference_mode"]
    ('LORA', 4, 8, True)
    >>> config_to_dict(LoraConfig(r=4), {"peft_type": "LORA", "r": 8, "extra": 1})
    {'peft_type': 'LORA', 'r': 4, 'extra': 1}
    """
    if raw is None:
        written = {
            f.name: _plain(getattr(config, f.name), f)
            for f in fields(config)
            if f.name not in config.unsaid or getattr(config, f.name) is not None
        }
        written["peft_version"] = config.peft_version or PEFT_VERSION
        return {**written, "peft_type": config.peft_type, "inference_mode": True}
    before, _ = config_from_dict({**raw, "peft_type": config.peft_type})
    changed = {
        f.name: _plain(getattr(config, f.name), f)
        for f in fields(config)
        if getattr(config, f.name) != getattr(before, f.name)
    }
    return {**raw, "peft_type": config.peft_type, **changed}


def _plain(value: Any, field: Field[Any]) -> Any:
    """Write a whole number as Hugging Face PEFT does: as one, where the default is one."""
    if isinstance(value, float) and type(field.default) is int and value.is_integer():
        return int(value)
    built = msgspec.to_builtins(sorted(value) if isinstance(value, set | frozenset) else value)
    if field.default is MISSING and isinstance(built, dict):
        return {
            k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in built.items()
        }
    return built


def config_to_json(config: Config, raw: Mapping[str, Any] | None = None) -> str:
    """Give the text of a configuration file, laid out as Hugging Face PEFT does.

    Raises
    ------
    ConfigError
        If a value cannot stand in JSON.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> print(config_to_json(LoraConfig(r=4), {"peft_type": "LORA"}))
    {
      "peft_type": "LORA",
      "r": 4
    }
    """
    try:
        return json.dumps(config_to_dict(config, raw), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.where}: cannot be written as JSON: {error}") from None

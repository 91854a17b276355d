"""Which methods there are: the common part of every configuration, and finding its class."""

from __future__ import annotations

import abc
import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Literal, TypeAlias, dataclass_transform, final

from peft_any._typing import Array, Params
from peft_any.errors import ConfigError, nearest
from peft_any.fields import check_rules, check_types, default_of
from peft_any.plugins import GROUP, Plugin, chosen, plugins

_known: dict[str, type[Config]] = {}
_NAMED = {"PromptEncoderConfig": "ptuning"}
"""Classes that are called otherwise than their method."""
TaskType: TypeAlias = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]
"""What a model is for, by Hugging Face PEFT's names."""
_RUN = "run it with Hugging Face PEFT"
_ABSENT = {
    "SHADOW": ("it runs a second model beside the base, and changes no weight of it", _RUN),
    "BONE": ("it is called MISS now", "start a MissConfig; files of it are read as that"),
}
"""Methods of Hugging Face PEFT that are not here: why, and the way out."""


def absent() -> dict[str, tuple[str, str]]:
    """Name Hugging Face PEFT's methods that are not here: why, and the way out.

    Examples
    --------
    >>> absent()["SHADOW"][1]
    'run it with Hugging Face PEFT'
    """
    return {name: said for name, said in _ABSENT.items() if name not in method_names()}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True, repr=False)
class Config(abc.ABC):
    """What every method's configuration holds: Hugging Face PEFT's common fields.

    Every subclass is made a frozen dataclass with keywords alone, and needs no decorator. It names
    its `peft_type`; its fields are exactly those of `adapter_config.json` under their own names,
    and their types say what values they take (`fields`). Its parameters' names begin with `prefix`:
    unless said, with the `peft_type` in lower case and an underscore.
    """

    peft_type: ClassVar[str]
    prefix: ClassVar[str] = ""
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of Hugging Face PEFT that change the maths and are not supported, and why."""
    marks: ClassVar[Mapping[str, str]] = {}
    """Fields that are "peft_any" in files which hold what Hugging Face PEFT's lack: what that is,
    and the way out."""
    begun: ClassVar[str] = ""
    """A field that is "peft_any" in files of adapters that were begun here, where there is one:
    Hugging Face PEFT, which would take their arrays for others, refuses the value."""
    unsaid: ClassVar[frozenset[str]] = frozenset()
    """Common fields that Hugging Face PEFT's class does not have: files say them only if set."""
    grouped: ClassVar[frozenset[str]] = frozenset()
    """Shared arrays of which there are several, told apart by what follows a dot."""
    ranked: ClassVar[bool] = True
    """Whether `r`, where there is one, is a rank."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Extensions of the array standard that `merge` or `forward` use."""

    task_type: TaskType | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    peft_version: str | None = None
    modules_to_save: list[str] | None = None

    def __init_subclass__(cls, *, peft_type: str = "", prefix: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True, repr=False)(cls)
        peft_type = peft_type or cls.__dict__.get("peft_type", "")
        prefix = prefix or cls.__dict__.get("prefix", cls.prefix) or f"{peft_type.lower()}_"
        if peft_type:
            module = f"peft_any.methods.{peft_type.lower()}"
            if cls.__module__ != module and peft_type in method_names():
                raise ConfigError(
                    f"{cls.__module__}.{cls.__qualname__}: the peft_type {peft_type!r} cannot be "
                    f"taken: {module} has it; choose another name"
                )
            other = _known.get(peft_type)
            if other is not None and other.__module__ != cls.__module__:
                raise ConfigError(
                    f"{cls.__module__}.{cls.__qualname__}: the peft_type {peft_type!r} cannot be "
                    f"taken: {other.__module__}.{other.__qualname__} has it; choose another name"
                )
            cls.peft_type, cls.prefix = peft_type, prefix
            _known[peft_type] = cls

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        said = [
            f"{f.name}={given[f.name]!r}" for f in fields(self) if given[f.name] != default_of(f)
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    @final
    def __post_init__(self) -> None:
        check_rules(type(self), vars(self))
        check_types(type(self), vars(self))
        self.check()

    def check(self) -> None:  # noqa: B027 - a hook: most methods have no more to check
        """Check what the types of the fields do not say, such as which go together.

        Raises
        ------
        ConfigError
        """

    def regularizer(self, sites: Iterable[Params]) -> Array | None:  # noqa: ARG002
        """What training adds to the loss, of the trained parameters of all sites; None: nothing."""
        return None

    @property
    def where(self) -> str:
        """The class's name, with which its errors begin."""
        return type(self).__name__

    @property
    def frozen(self) -> frozenset[str]:
        """Parameters that are kept beside the trained ones and never trained."""
        return frozenset()

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter is never trained: it is `frozen`, or one of a `grouped` name."""
        first = name.partition(".")[0]
        return name in self.frozen or first in self.frozen & self.grouped

    @property
    def takes(self) -> frozenset[str]:
        """What a call needs beside its input, among the parameters (`PeftModel.routed`)."""
        return frozenset()

    @property
    def refusal(self) -> str | None:
        """What a refused merge says: why, and the way out; None where a merge is possible."""
        return None


def method_names() -> list[str]:
    """List the `peft_type` of every method of the package, in alphabetical order.

    Examples
    --------
    >>> "LORA" in method_names()
    True
    """
    folder = Path(__file__).parent / "methods"
    return sorted(m.name.upper() for m in iter_modules([str(folder)]))


def method_for(peft_type: str) -> type[Config]:
    """Find the configuration class of a `peft_type`.

    It is one of ours, one that the program has defined, or one that an installed distribution
    registers under its `peft_type` as an entry point of the group ``peft_any.methods``.

    Raises
    ------
    ConfigError
        If there is none, with the nearest names; of Hugging Face PEFT's, why, and what to do; if
        what is registered cannot be loaded, or is registered twice, whose it is.

    Examples
    --------
    >>> method_for("LORA").__name__
    'LoraConfig'
    """
    if not isinstance(peft_type, str):
        raise ConfigError(f"peft_type {peft_type!r:.60} cannot be a method: give its name, 'LORA'")
    if peft_type in _known:
        return _known[peft_type]
    if peft_type in method_names():
        importlib.import_module(f"peft_any.methods.{peft_type.lower()}")
        return _known[peft_type]
    others = plugins()
    if peft_type in others:
        return _registered(peft_type, others)
    if peft_type in _ABSENT:
        why, instead = _ABSENT[peft_type]
        raise ConfigError(f"peft_type {peft_type!r} cannot be used: {why}: {instead}")
    known = sorted({*method_names(), *_known, *others})
    raise ConfigError(
        f"peft_type {peft_type!r} cannot be used: no such method"
        f"{nearest(peft_type.upper(), known)}; known: {', '.join(known)}"
    )


def registered_methods() -> tuple[dict[str, str], list[str]]:
    """List the methods of other distributions, each loaded, and why some cannot be used.

    Returns
    -------
    methods : dict of str to str
        The distribution of each `peft_type`, in alphabetical order.
    problems : list of str
        One sentence for each that is broken, or clashes with another.
    """
    owners, problems, others = {}, [], plugins()
    for peft_type in others:
        try:
            _registered(peft_type, others)
        except ConfigError as error:
            problems.append(str(error))
        else:
            owners[peft_type] = others[peft_type][0].owner
    return owners, problems


def _registered(peft_type: str, others: Mapping[str, list[Plugin]]) -> type[Config]:
    """Load another distribution's method, and check that it is one, of that name."""
    plugin = chosen(peft_type, others[peft_type], method_names())
    try:
        made = plugin.load()
    except ConfigError:
        _known.pop(peft_type, None)  # of a module that failed after the class was made
        raise
    if not (isinstance(made, type) and issubclass(made, Config)):
        raise plugin.error("which is no configuration class: derive it from Tuner or Prompt")
    if getattr(made, "peft_type", None) != peft_type:
        raise plugin.error(
            f"whose peft_type is {getattr(made, 'peft_type', None)!r}: in {GROUP} an entry has "
            "its method's peft_type for a name"
        )
    return _known.setdefault(peft_type, made)


def config_class(name: str) -> type[Config]:
    """Find a method of the package by its class's name.

    Raises
    ------
    AttributeError
        If no file of `peft_any.methods` is named as the class without ``Config``.

    Examples
    --------
    >>> config_class("LoraConfig").peft_type
    'LORA'
    """
    plain = _NAMED.get(name, name.removesuffix("Config").lower())
    for peft_type in method_names():
        if peft_type.lower().replace("_", "") == plain:
            found = method_for(peft_type)
            if found.__name__ == name:
                return found
    package = sys.modules["peft_any"]
    raise AttributeError(f"module 'peft_any' has no attribute {name!r}", name=name, obj=package)

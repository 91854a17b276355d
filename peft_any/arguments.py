"""Arguments of public functions, refused in a sentence where they are not of the declared types."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from peft_any.errors import UsageError

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 60
"""How much of a value an error shows."""
_PLAIN: dict[Any, tuple[Any, str]] = {
    NoneType: (NoneType, "None"),
    bool: ((bool, np.bool_), "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a string"),
    os.PathLike: (os.PathLike, "a path"),
    Mapping: (Mapping, "a mapping"),
    dict: (Mapping, "a mapping"),
}
"""What passes for a type, and what an error calls it."""
_NO_LISTS = str, bytes, Mapping
"""What could be gone through, too, where several things are meant."""


def checked(function: F) -> F:
    """Let a function refuse arguments that are none of the types its annotations say.

    Containers are looked into where that reads nothing: lists, tuples and dicts. What a value may
    be within its type, such as which words a method's name can be, the function says itself.

    Raises
    ------
    UsageError
        Of the function: naming the argument, its value and what it may be.

    Examples
    --------
    >>> @checked
    ... def cut(rank: int | None = None, *, names: dict[str, int] = {}) -> None: ...
    >>> cut(np.int64(3))
    >>> cut(2.5)
    Traceback (most recent call last):
    peft_any.errors.UsageError: cut: rank=2.5 cannot be taken: give an integer or None
    >>> cut(names={"a": "b"})
    Traceback (most recent call last):
    peft_any.errors.UsageError: cut: names['a']='b' cannot be taken: give an integer
    """

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        names, hints, defaults = _declared(function)
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            given = name in hints and value is not defaults.get(name, hints)
            if given and (why := misfit(name, value, hints[name])):
                where = function.__qualname__.removesuffix(".__init__")
                raise UsageError(f"{where}: {why}")
        return function(*args, **kwargs)

    return called  # type: ignore[return-value] # of the same signature


def misfit(name: str, value: Any, hint: Any) -> str | None:
    """Say what of a value is not of a type, and what it may be; None where all of it is.

    Examples
    --------
    >>> misfit("rank", 2.5, int | None)
    'rank=2.5 cannot be taken: give an integer or None'
    """
    for at, wrong, its in _misfits(value, hint):
        said = " or ".join(dict.fromkeys(_words(its)))
        return f"{name}{at}={shown(wrong)} cannot be taken: give {said}"
    return None


def methods_checked(*names: str) -> Callable[[type[C]], type[C]]:
    """Let methods of a class refuse arguments as `checked` functions do."""

    def decorated(cls: type[C]) -> type[C]:
        for name in names:
            own = vars(cls)[name]
            bound = isinstance(own, classmethod)
            setattr(cls, name, classmethod(checked(own.__func__)) if bound else checked(own))
        return cls

    return decorated


@cache
def _declared(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Give a function's positional parameters, all types, and the defaults."""
    parameters = signature(function).parameters
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    placed = [p.name for p in parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return placed, hints, {p.name: p.default for p in parameters.values()}


def _misfits(value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """Give what does not fit: the place within, the value there, and the type it should have."""
    fits = [option for option in _options(hint) if _test(option)(value)]
    if not fits:
        yield "", value, hint
    elif all(map(get_args, fits)):
        found = [[*_inside(value, option)] for option in fits]
        if all(found):
            yield from found[0]


def _inside(value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """Look into what is held by a container that itself fits."""
    args = get_args(hint)
    pairs: Iterable[tuple[Any, Any, Any]] = ()
    if get_origin(hint) is tuple and args[-1] is not ...:
        pairs = zip(range(len(args)), value, args, strict=True)
    elif type(value) is dict and len(args) == 2:
        pairs = ((key, one, args[1]) for key, one in value.items())
        yield from (
            (f" key {key!r}", *found[1:]) for key in value for found in _misfits(key, args[0])
        )
    elif type(value) in (list, tuple):
        pairs = ((i, one, args[0]) for i, one in enumerate(value))
    for key, one, its in pairs:
        yield from ((f"[{key!r}]{at}", *rest) for at, *rest in _misfits(one, its))


@cache
def _options(hint: Any) -> tuple[Any, ...]:
    """Take a union apart, and what is said of a type off it."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _options(get_args(hint)[0])
    if origin in (Union, UnionType):
        return tuple(one for part in get_args(hint) for one in _options(part))
    return (hint,)


@cache
def _test(hint: Any) -> Callable[[Any], bool]:
    """Make what tells whether a value is of a type, whatever it holds."""
    origin = get_origin(hint) or hint
    if origin is Any or not isinstance(origin, type):
        return lambda value: origin is not Literal or isinstance(value, str)
    if origin in _PLAIN:
        kinds, no = _PLAIN[origin][0], bool if origin in (int, float) else ()
        return lambda value: isinstance(value, kinds) and not isinstance(value, no)
    if getattr(origin, "_is_protocol", False):
        return lambda value: all(hasattr(value, name) for name in _offers(origin))
    if origin is tuple and (args := get_args(hint)) and args[-1] is not ...:
        return lambda value: isinstance(value, tuple) and len(value) == len(args)
    if issubclass(origin, Iterable) and not issubclass(origin, tuple):
        return lambda value: isinstance(value, origin) and not isinstance(value, _NO_LISTS)
    return lambda value: isinstance(value, origin)


def _offers(protocol: Any) -> tuple[str, ...]:
    """Name what a protocol asks for that tells its objects from others."""
    return ("shape", "dtype") if hasattr(protocol, "dtype") else ("__call__",)


def _words(hint: Any) -> Iterator[str]:
    """Call the options of a type, None last, or say what is said of it."""
    if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], str):
        yield get_args(hint)[1]
        return
    options = sorted(_options(hint), key=lambda option: option is NoneType)
    origins = [get_origin(option) or option for option in options]
    for option, origin in zip(options, origins, strict=True):
        if origin in _PLAIN:
            if not (origin is str and os.PathLike in origins):
                yield _PLAIN[origin][1]
        elif getattr(origin, "_is_protocol", False):
            yield "an array" if hasattr(origin, "dtype") else "a function"
        elif origin is Literal:
            yield " or ".join(map(repr, get_args(option)))
        elif origin is Callable:
            yield "a function"
        elif issubclass(origin, Iterable) and not hasattr(origin, "_fields"):
            yield "several in a list"
        else:
            yield f"a{'n' * (origin.__name__[0] in 'AEIOU')} {origin.__name__}"


def shown(value: Any) -> str:
    """Show the beginning of a value."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

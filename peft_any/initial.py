"""Shapes that say how their arrays start: zero, one, constant or random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from peft_any._typing import Params, Shape
from peft_any.errors import ConfigError
from peft_any.rng import Fresh


class Initial(tuple[int, ...]):  # noqa: SLOT001 - no tuple can name its attributes
    """A shape, with how a fresh array of it is drawn: ``draw(new, shape)``.

    Examples
    --------
    >>> shape = normal(3, 2, std=0.1)
    >>> shape, shape == (3, 2)
    ((3, 2), True)
    """

    draw: Callable[[Fresh, Shape], Any]

    def __new__(cls, shape: Shape, draw: Callable[[Fresh, Shape], Any]) -> Self:
        """Add the way to a shape."""
        made = super().__new__(cls, shape)
        made.draw = draw
        return made


def zeros(*shape: int) -> Initial:
    """Start at 0."""
    return Initial(shape, Fresh.zeros)


def ones(*shape: int) -> Initial:
    """Start at 1."""
    return Initial(shape, Fresh.ones)


def full(value: float, *shape: int) -> Initial:
    """Start at one value."""
    return Initial(shape, lambda new, shape: new.full(shape, value))


def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Initial:
    """Draw from N(mean, std²); start at the mean where `std` is 0."""
    if not std:
        return full(mean, *shape)
    if not mean:
        return Initial(shape, lambda new, shape: new.normal(shape, std))
    return Initial(shape, lambda new, shape: new.normal(shape, std) + mean)


def uniform(bound: float, *shape: int) -> Initial:
    """Draw from U(-bound, bound)."""
    return Initial(shape, lambda new, shape: new.uniform(shape, bound))


def kaiming(*shape: int) -> Initial:
    """Draw as torch draws the weights of its layers (`Fresh.kaiming`)."""
    return Initial(shape, Fresh.kaiming)


def drawn(shapes: Mapping[str, Shape], new: Fresh, where: str) -> Params:
    """Draw arrays by what their shapes say, in their order.

    Raises
    ------
    ConfigError
        If a shape does not say how it starts.
    """
    found: Params = {}
    for name, shape in shapes.items():
        if not isinstance(shape, Initial):
            raise ConfigError(
                f"{where}: {name} of shape {tuple(shape)} cannot be drawn: give `init`, or say in "
                "`shapes` how it starts (peft_any.initial)"
            )
        found[name] = shape.draw(new, shape)
    return found

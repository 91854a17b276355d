"""Methods that other distributions register: entry points of the group ``peft_any.methods``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_any.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "peft_any.methods"


@dataclass(frozen=True)
class Plugin:
    """One method that a distribution registers.

    Attributes
    ----------
    name : str
        Its `peft_type`.
    owner : str
        The distribution, with its version.
    entry : EntryPoint
    """

    name: str
    owner: str
    entry: EntryPoint

    def error(self, why: str) -> ConfigError:
        """Say that the method cannot be used, whose it is, and what to do."""
        return ConfigError(
            f"peft_type {self.name!r} cannot be used: {self.owner} registers it as "
            f"{self.entry.value}, {why}: update or uninstall {self.owner.partition(' ')[0]}"
        )

    def load(self) -> Any:
        """Import what is registered.

        Raises
        ------
        ConfigError
            If that fails in any way, naming the distribution.
        """
        try:
            return self.entry.load()
        except Exception as error:
            raise self.error(f"which fails with {type(error).__name__}: {error}") from error


def plugins() -> dict[str, list[Plugin]]:
    """Find the methods that installed distributions register, without importing any of them.

    Returns
    -------
    dict of str to list of Plugin
        By `peft_type`, in alphabetical order; more than one of a name are a clash.
    """
    from importlib.metadata import entry_points  # noqa: PLC0415 - slow to import, seldom asked

    found: dict[str, list[Plugin]] = {}
    for entry in entry_points(group=GROUP):
        owner = "an unknown distribution"
        if entry.dist is not None:
            owner = f"{entry.dist.name} {entry.dist.version}"
        same = found.setdefault(entry.name, [])
        if all((one.owner, one.entry.value) != (owner, entry.value) for one in same):
            same.append(Plugin(entry.name, owner, entry))
    return dict(sorted(found.items()))


def chosen(peft_type: str, claims: list[Plugin], taken: Collection[str]) -> Plugin:
    """Give the one distribution's method that has a name.

    Raises
    ------
    ConfigError
        If several claim it, or it is the package's own.
    """
    first = claims[0]
    if peft_type in taken:
        raise first.error("and it is a method of peft_any itself, which is what is used")
    if len(claims) > 1:
        owners = " and ".join(f"{one.owner} ({one.entry.value})" for one in claims)
        raise ConfigError(
            f"peft_type {peft_type!r} cannot be used: {owners} both register it: uninstall all "
            "but one"
        )
    return first

"""How adapters are fitted to a base: what every command that does so is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_any.backend import Backend, resolve
from peft_any.naming.rules import Names, Rule, read_rules
from peft_any.surgery.sources import Kinds


@dataclass(frozen=True)
class Fitting:
    """Options of fitting adapters to a base, as `merge_checkpoint` documents them.

    Attributes
    ----------
    strict, rederive : bool
    backend : Backend
    kinds : mapping, optional
    rules : tuple of Rule
        Of the adapters' names (`names`).
    any_base : bool
        Whether a base other than the one an adapter was made on is only warned of.
    """

    strict: bool = True
    rederive: bool = False
    backend: Backend = field(default_factory=lambda: resolve("numpy"))
    kinds: Kinds = None
    rules: tuple[Rule, ...] = ()
    any_base: bool = True

    @classmethod
    def read(
        cls,
        *,
        strict: bool,
        rederive: bool,
        backend: str | Backend,
        kinds: Kinds,
        names: Names,
        any_base: bool = True,
    ) -> Fitting:
        """Take the options as the public functions have them."""
        return cls(strict, rederive, resolve(backend), kinds, read_rules(names), any_base)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process with the backend's name."""
        return _again, ({**vars(self), "backend": str(self.backend)},)

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What a receipt says of it."""
        return {
            "strict": self.strict,
            "rederive": self.rederive,
            "backend": str(self.backend),
            "map": [*dict.fromkeys(rule.label for rule in self.rules)],
        }


def _again(fields: dict[str, Any]) -> Fitting:
    return Fitting(**{**fields, "backend": resolve(fields["backend"])})

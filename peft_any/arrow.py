"""A router's own file, without its experts: Arrow, as Hugging Face PEFT saves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_any.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ArrowRouter:
    """How a router chooses, and the names of its experts.

    Attributes
    ----------
    top_k : int
    router_temperature : float
    use_gks : bool
        Whether general knowledge is subtracted from the experts.
    task_adapter_names, gks_adapter_names : list of str, optional
        Directories of the experts and of general knowledge, beside the router's own.
    rng_seed : int, optional
        Of Hugging Face PEFT's iteration for the prototypes.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None


def alone(config: Any) -> str | None:
    """Say of a router's file why it cannot act, with the way out; None of any other."""
    if not getattr(config, "arrow_config", None):
        return None
    return (
        "an Arrow router cannot act alone: its experts are in directories of their own, beside it: "
        "peft_any.experts.load_arrow reads them all"
    )


def refuse_alone(config: Any) -> None:
    """Refuse a router's file where an adapter is to act.

    Raises
    ------
    ConfigError
    """
    if why := alone(config):
        raise ConfigError(f"{config.where}: {why}")

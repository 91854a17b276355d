"""The engine that a command is told to use."""

from __future__ import annotations

from typing import TypeAlias

from peft_any.errors import UsageError, nearest
from peft_any.surgery.engines import Engine, Local

EngineLike: TypeAlias = str | Engine


def engine_of(spec: EngineLike) -> Engine:
    """Read an engine.

    Parameters
    ----------
    spec : str or Engine
        ``"local"``; ``"dask"``: the active `distributed.Client`, or else workers on this machine;
        or a scheduler's address (``"tcp://host:8786"``) or file (``"….json"``).

    Raises
    ------
    UsageError
        If there is no such engine.
    BackendError
        If Dask is missing, or no scheduler answers.

    Examples
    --------
    >>> engine_of("local").name
    'local'
    """
    if isinstance(spec, Engine):
        return spec
    if spec == "local":
        return Local()
    if spec == "dask" or "://" in spec or spec.endswith(".json"):
        from peft_any.surgery.cluster import Dask  # noqa: PLC0415 - an extra

        return Dask(None if spec == "dask" else spec)
    raise UsageError(
        f"engine {spec!r}: is none{nearest(spec, ('local', 'dask'))}: choose local or dask, or "
        "give a scheduler's address"
    )

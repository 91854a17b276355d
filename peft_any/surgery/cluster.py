"""The Dask engine: pieces of a command as tasks of a `distributed` cluster."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock, get_ident
from typing import Any
from uuid import uuid4

from peft_any import __version__
from peft_any.errors import BackendError, StorageError
from peft_any.surgery.engines import Done, Engine, Item, Recipe, Result

_LEFT = 30.0
"""Seconds that pieces which are under way have to end, when the others are given up."""
_PATIENCE = "30s"
"""How long a scheduler has to answer, and the first worker to come."""

QUIET = {"dashboard_address": "127.0.0.1:0"}
"""A scheduler without a dashboard still serves a page or two, by default where another may be."""


class Dask(Engine):
    """One task for each piece; a lost worker's pieces are done again by another one.

    Parameters
    ----------
    scheduler : str, optional
        Its address, or its file. By default the active client's, or else that of as many worker
        processes on this machine as it has cores.

    Raises
    ------
    BackendError
        If `distributed` is not installed.
    """

    name = "dask"

    def __init__(self, scheduler: str | None = None) -> None:
        try:
            import distributed  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise BackendError(
                "engine 'dask': distributed is not installed: pip install 'peft_any[dask]'"
            ) from error
        self._distributed: Any = distributed
        self.scheduler = scheduler

    def run(
        self, recipe: Recipe[Item, Result], items: Iterable[Item], done: Done[Item, Result]
    ) -> None:
        """Send the pieces, and take their results as they come."""
        token = uuid4().hex
        with self._client() as client:
            futures = {}
            for i, item in enumerate(items):
                key = f"peft_any-{type(recipe).__name__.lower()}-{i}-{token}"
                future = client.submit(
                    _piece, token, __version__, recipe, item, key=key, pure=False, priority=-i
                )
                futures[future] = item
            try:
                for future in self._distributed.as_completed(list(futures), loop=client.loop):
                    done(futures[future], self._result(future, futures[future]))
                    future.release()
            except BaseException:
                client.cancel(list(futures), force=True)
                self._settle(client, token)
                raise
            finally:
                client.cancel(list(futures), force=True)
                client.run(_forget, token, on_error="ignore")

    @staticmethod
    def _settle(client: Any, token: str) -> None:
        """Wait for pieces that are under way, which nobody can stop: what they write goes next."""
        until = time.monotonic() + _LEFT
        while any(client.run(_at_work, token, on_error="ignore").values()):
            if time.monotonic() > until:
                return
            time.sleep(0.05)

    def _result(self, future: Any, item: Any) -> Any:
        try:
            return future.result()
        except self._distributed.KilledWorker as error:
            raise BackendError(
                f"{item}: cannot be computed on the cluster: the workers that began it were lost "
                f"({error}); their logs may tell why: often it is too little memory"
            ) from error
        except self._distributed.client.FutureCancelledError as error:
            raise BackendError(f"{item}: the cluster has given it up: {error}") from error

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Give a client with at least one worker."""
        with ExitStack() as stack:
            client = self._active()
            if client is None:
                client = stack.enter_context(self._connected(stack))
            try:
                client.wait_for_workers(1, timeout=_PATIENCE)
            except self._distributed.TimeoutError as error:
                raise BackendError(
                    f"engine dask: {self.scheduler or 'the scheduler'} has no workers"
                ) from error
            yield client

    def _active(self) -> Any:
        if self.scheduler is not None:
            return None
        try:
            return self._distributed.get_client(timeout=0)
        except ValueError:
            return None

    def _connected(self, stack: ExitStack) -> Any:
        if self.scheduler is None:
            stack.enter_context(patient())
            cluster = stack.enter_context(
                self._distributed.LocalCluster(
                    n_workers=os.cpu_count() or 1,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address=None,
                    scheduler_kwargs=QUIET,
                )
            )
            return self._distributed.Client(cluster, set_as_default=False)
        address = self.scheduler
        if address.endswith(".json"):
            address = _address(Path(address))
        try:
            return self._distributed.Client(address, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError, self._distributed.TimeoutError) as error:
            raise BackendError(
                f"engine dask: {self.scheduler}: no scheduler answers there: {error}"
            ) from error


def _address(path: Path) -> str:
    """Read a scheduler's file, of one that is starting too: Dask itself would wait for ever."""
    from dask.utils import parse_timedelta  # noqa: PLC0415 - an extra

    until = time.monotonic() + float(parse_timedelta(_PATIENCE))
    while True:
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            if time.monotonic() > until:
                raise StorageError(
                    f"engine dask: {path}: tells no scheduler's address ({error!r:.200}): a "
                    "scheduler writes it as it starts (dask scheduler --scheduler-file); check the "
                    "spelling"
                ) from error
        time.sleep(0.05)


def patient() -> Any:
    """Have a cluster on this machine keep a worker that dies again while it starts anew.

    Dask looks for it once, fifteen seconds after the first time, and gives its place up for good.
    """
    import dask  # noqa: PLC0415 - an extra

    return dask.config.set({"distributed.deploy.lost-worker-timeout": "52 weeks"})


_opened: dict[tuple[str, int], tuple[ExitStack, Callable[[Any], Any]]] = {}
"""On a worker: the recipes that are open, by the token of their run and the thread."""


_running: Counter[str] = Counter()
_counting = Lock()
"""On a worker: how many pieces of a run are under way."""


@contextmanager
def _counted(token: str) -> Iterator[None]:
    with _counting:
        _running[token] += 1
    try:
        yield
    finally:
        with _counting:
            _running[token] -= 1


def _at_work(token: str) -> bool:
    """Whether a worker is at a piece of a run."""
    return _running[token] > 0


def _piece(token: str, version: str, recipe: Recipe[Any, Any], item: Any) -> Any:
    """Do a piece on a worker, each of whose threads opens the recipe for its first one."""
    if version != __version__:
        raise BackendError(
            f"peft_any is {__version__} on a worker and {version} where the command was given: "
            "they must be the same"
        )
    key = token, get_ident()
    with _counted(token):
        if key not in _opened:
            stack = ExitStack()
            _opened[key] = stack, stack.enter_context(recipe.open())
        _, work = _opened[key]
        return work(item)


def _forget(token: str) -> None:
    """Close a recipe on a worker."""
    for key in [key for key in [*_opened] if key[0] == token]:
        stack, _ = _opened.pop(key)
        stack.close()
    _running.pop(token, None)

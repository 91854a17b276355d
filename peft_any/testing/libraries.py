"""Every array library on which a law must hold: how to make its arrays, and call functions."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from peft_any.backend import Backend, from_numpy, resolve
from peft_any.errors import UsageError, nearest
from peft_any.testing.closeness import assert_close

LIBRARIES = MappingProxyType(
    {
        "numpy": ("numpy", "numpy:readonly"),
        "strict": ("strict", "strict:device1", "strict:minimal"),
        "torch": ("torch", "torch:meta"),
        "jax": ("jax",),
        "dask": ("dask",),
        "cupy": ("cupy",),
    }
)
"""Rows by the library they need: read-only arrays, a second device, no extensions …"""
_MODULES = {"strict": "array_api_strict", "dask": "dask.array"}


def installed(library: str) -> bool:
    """Tell whether a library can be imported."""
    try:
        return importlib.util.find_spec(_MODULES.get(library, library)) is not None
    except ModuleNotFoundError:
        return False


def missing(row: str) -> str | None:
    """Say why a row cannot run here, if it cannot.

    Examples
    --------
    >>> missing("numpy:readonly")
    """
    library = row.partition(":")[0]
    if not installed(library):
        return f"{library} is not installed"
    if library == "cupy":
        import cupy  # noqa: PLC0415 - an extra

        if not cupy.cuda.is_available():
            return "cupy is installed, but there is no CUDA device"
    return None


def rows(*libraries: str) -> list[str]:
    """List the rows of some libraries, or of all.

    Raises
    ------
    UsageError
        Naming a library that is not known.

    Examples
    --------
    >>> rows("torch")
    ['torch', 'torch:meta']
    """
    for name in libraries:
        if name not in LIBRARIES:
            raise UsageError(
                f"library {name!r} cannot be tested: it is not known{nearest(name, LIBRARIES)}; "
                f"known: {', '.join(LIBRARIES)}"
            )
    return [row for name in libraries or LIBRARIES for row in LIBRARIES[name]]


def set_up(library: str) -> None:
    """Give JAX its dtypes of 64 bits; the other libraries have theirs."""
    if library == "jax":
        import jax  # noqa: PLC0415 - an extra

        config: Any = jax.config
        config.update("jax_enable_x64", True)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of JAX arrays."""
    import jax  # noqa: PLC0415 - an extra

    whole: Callable[..., Any] = jax.jit(f)
    return whole


@dataclass(frozen=True)
class Lib:
    """One row: how to make its arrays, call functions on them, and compare.

    Attributes
    ----------
    row : str
        One of `rows()`.
    backend : Backend
    """

    row: str
    backend: Backend

    @property
    def name(self) -> str:
        """The library's name in a backend's spec."""
        return self.backend.name

    @property
    def has_values(self) -> bool:
        """Whether arrays hold numbers (torch's meta device has shapes only)."""
        return self.row != "torch:meta"

    def lacks(self, needs: tuple[str, ...]) -> str | None:
        """Say which extension a computation needs that this row does not have."""
        if self.row == "strict:minimal" and needs:
            return f"needs the {needs} extension, which strict:minimal does not offer"
        return None

    def array(self, host: Any) -> Any:
        """Convert a host array, or a dict of them."""
        if isinstance(host, dict):
            return {k: self.array(v) for k, v in host.items()}
        if self.row == "numpy:readonly":
            host = np.array(host)
            host.flags.writeable = False
            return host
        return from_numpy(np.array(host), self.backend)

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        """Call `f` on arrays made of the arguments; jitted where the library can."""
        arrays = [self.array(a) if isinstance(a, np.ndarray | dict) else a for a in args]
        if self.name == "jax":
            return compiled(f)(*arrays)
        if self.name == "dask":
            import dask  # noqa: PLC0415 - an extra

            def refuse(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001 - a scheduler's
                raise AssertionError("a lazy computation was forced")

            with dask.config.set(scheduler=refuse):
                return f(*arrays)
        return f(*arrays)

    def check(self, got: Any, want: Any, *, rtol: float, where: str = "") -> None:
        """Compare with a host array: shape, dtype, library, device, then values."""
        assert_close(got, want, rtol=rtol, on=self.backend, where=where)


@contextlib.contextmanager
def library(row: str) -> Iterator[Lib]:
    """Give one row, with its library set up for the tests.

    Raises
    ------
    UsageError
        If it is not here (`missing` says why).

    Examples
    --------
    >>> with library("numpy") as lib:
    ...     lib.call(lambda x: x + x, np.ones(2))
    array([2., 2.])
    """
    if reason := missing(row):
        raise UsageError(f"{row}: cannot be tested here: {reason}")
    name, _, device = row.partition(":")
    with contextlib.ExitStack() as stack:
        set_up(name)
        if row == "strict:minimal":
            import array_api_strict  # noqa: PLC0415 - an extra

            flags = array_api_strict.ArrayAPIStrictFlags(
                boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
            )
            stack.enter_context(flags)
        spec = f"{name}:{device}" if device in ("device1", "meta") else name
        yield Lib(row, resolve(spec))

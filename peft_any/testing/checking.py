"""All laws, on all libraries that are installed, for a method that lives anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from unittest import SkipTest

from peft_any.errors import PeftError, UsageError
from peft_any.layer import Site
from peft_any.method import Tuner
from peft_any.testing import descent, laws
from peft_any.testing.case import Case, usual_sites
from peft_any.testing.gradients import ENGINES
from peft_any.testing.libraries import LIBRARIES, Lib, library, missing, rows

_WAYS: tuple[descent.Way, ...] = ("forward", "merge")


@dataclass(frozen=True)
class Checked:
    """What `check_method` found.

    Attributes
    ----------
    passed : tuple of str
        The laws that hold, each with its layer and library.
    skipped : tuple of str
        What could not be tried here, and why.
    """

    passed: tuple[str, ...]
    skipped: tuple[str, ...]


def check_method(
    config: Tuner,
    sites: Sequence[Site] | None = None,
    *,
    identity: str | None = None,
    reverts: float = 20.0,
    measured: Collection[str] = (),
    backends: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
) -> Checked:
    """Try every law of a method on every array library that is installed.

    A fresh adapter changes nothing; `forward` is the merged layer; unmerging gives the base back;
    nothing is written in place; every library gives NumPy's numbers, in its own dtype and on its
    own device, jitted and lazy too; one seed draws the same numbers everywhere; gradients are
    those of finite differences on every engine; files lose nothing. What is not installed is
    skipped, and said: install ``peft_any[strict,torch,jax,dask]`` to try it all.

    Parameters
    ----------
    config : Tuner
        The method with its numbers; its class may be defined anywhere.
    sites : sequence of Site, optional
        Layers to adapt; by default one or two of every kind that the method supports, and of
        these such as it accepts.
    identity : str, optional
        Why a fresh adapter changes the layer, if it does.
    reverts : float
        Bound of the error of unmerging, in units of the dtype's rounding; 0 for a method that
        cannot be unmerged.
    measured : collection of str
        Parameters whose initial values are computed from the base weight.
    backends : sequence of str
        Libraries to try, of `LIBRARIES`; by default all.
    seeds : sequence of int
        Seeds of the numbers on the host.

    Returns
    -------
    Checked

    Raises
    ------
    AssertionError
        Listing every law that does not hold, with the layer, the library and the culprit.
    ConfigError, ShapeError
        If the method does not accept a layer that was given, or any at all.
    UsageError
        If the configuration is none of a method that adapts layers.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> found = check_method(LoraConfig(r=2), [Site("fc", 5, 4)], backends=["numpy"])
    >>> found.passed[0]
    'fc: identity'
    """
    if not isinstance(config, Tuner):
        raise UsageError(f"{type(config).__name__}: cannot be checked: it is no Tuner")
    broken: list[str] = []
    passed: list[str] = []
    skipped: list[str] = []
    cases = [
        Case(site.name, config, site, identity, reverts)
        for site in _accepted(config, sites, skipped)
    ]
    for name, law in _laws(cases, measured, backends, seeds):
        try:
            law()
        except SkipTest as reason:
            skipped.append(f"{name}: {reason}")
        except AssertionError as error:
            broken.append(f"{name}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever a method raises breaks the law
            broken.append(f"{name}: {type(error).__name__}: {error}")
        else:
            passed.append(name)
    if broken:
        head = f"{config.where} breaks {len(broken)} of {len(broken) + len(passed)} laws"
        raise AssertionError("\n".join([f"{head}:", *broken]))
    return Checked(tuple(passed), tuple(dict.fromkeys(skipped)))


def _accepted(config: Tuner, sites: Sequence[Site] | None, skipped: list[str]) -> list[Site]:
    """Choose the layers: those given, which must fit, or such usual ones as do."""
    if sites is not None:
        for site in sites:
            config.at(site)
        return [*sites]
    found, last = [], None
    for site in usual_sites(config):
        try:
            config.at(site)
        except PeftError as error:
            skipped.append(f"{site.name}: not accepted: {error}")
            last = error
        else:
            found.append(site)
    if not found and last is not None:
        raise last
    return found


def _laws(
    cases: Sequence[Case], measured: Collection[str], backends: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """List the laws with their names; an input that has no values or row is skipped inside."""
    for case in cases:
        yield from ((f"{case.name}: {name}", law) for name, law in _on_the_host(case, seeds))
        for row in rows(*backends):
            yield f"{case.name}: libraries: {row}", _on(row, case, laws.libraries)
            yield f"{case.name}: seeds: {row}", _on(row, case, _seeds(measured))
        chosen = backends or [*LIBRARIES]
        for engine in ENGINES[1:]:
            if engine.partition(":")[0] in chosen:
                yield f"{case.name}: gradients: {engine}", _engine(case, engine)


def _on_the_host(case: Case, seeds: Sequence[int]) -> Iterator[tuple[str, Callable[[], None]]]:
    def each(law: Callable[[int, str], None]) -> Callable[[], None]:
        def run() -> None:
            for seed in seeds:
                for dtype in ("float32", "float64"):
                    law(seed, dtype)

        return run

    def merging(seed: int, dtype: str) -> None:
        for lead in ((), (4,), (2, 3)):
            for bias in (True, False):
                laws.merging(case, seed, lead, dtype, bias=bias)

    def differences() -> None:
        for way in _WAYS:
            descent.differences(case, way)

    yield "identity", each(lambda seed, dtype: laws.identity(case, seed, dtype))
    yield "parameters", lambda: laws.announced(case)
    yield "nothing in place", lambda: laws.untouched(case)
    yield "merging", each(merging)
    yield "unmerging", each(lambda seed, dtype: laws.unmerging(case, seed, dtype))
    yield "factors", lambda: laws.factors(case)
    yield "gradients", differences
    yield "files", lambda: laws.files(case)


def _seeds(measured: Collection[str]) -> Callable[[Case, Lib], None]:
    def law(case: Case, lib: Lib) -> None:
        if not lib.has_values:
            raise SkipTest(f"{lib.row} holds no numbers")
        laws.seeds(case, lib, measured)

    return law


def _on(row: str, case: Case, law: Callable[[Case, Lib], None]) -> Callable[[], None]:
    def run() -> None:
        if reason := missing(row):
            raise SkipTest(reason)
        with library(row) as lib:
            if reason := lib.lacks(case.resolved.needs):
                raise SkipTest(reason)
            law(case, lib)

    return run


def _engine(case: Case, engine: str) -> Callable[[], None]:
    def run() -> None:
        for way in _WAYS:
            descent.engines(case, engine, way)

    return run

"""All laws, on all libraries that are installed, for a method that lives anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from unittest import SkipTest

from peft_any.errors import PeftError, UsageError
from peft_any.layer import Site
from peft_any.method import Tuner
from peft_any.prompt import Attended, Prompt
from peft_any.registry import Config
from peft_any.routed import Routed
from peft_any.testing import applying, descent, laws, prompting, stepping, wholes
from peft_any.testing.case import Case, usual_sites
from peft_any.testing.gradients import ENGINES
from peft_any.testing.libraries import LIBRARIES, Lib, library, missing, rows
from peft_any.testing.prompting import PromptCase

Laws: TypeAlias = Iterator[tuple[str, Callable[[], None]]]
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
    config: Config,
    sites: Sequence[Site] | None = None,
    *,
    identity: str | None = None,
    reverts: float = 20.0,
    measured: Collection[str] = (),
    routing: Mapping[str, Any] | None = None,
    idle: Collection[str] = (),
    start: Mapping[str, Any] | None = None,
    backends: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
) -> Checked:
    """Try every law of a method on every array library that is installed.

    A fresh adapter changes nothing; `forward` is the merged layer; unmerging gives the base back;
    nothing is written in place; every library gives NumPy's numbers, in its own dtype and on its
    own device, jitted and lazy too; one seed draws the same numbers everywhere; gradients are
    those of finite differences on every engine; training drops what its noise says and nothing
    else, and settles parameters once for all; files lose nothing; a checkpoint on disk is merged as
    its weights are in memory. What is not installed is skipped, and said: install
    ``peft_any[strict,torch,jax,dask]`` to try it all.

    A `Routed` method, or one that is given `routing`, is applied instead of merged. Of a
    `Prompt`, virtual tokens must stand before the input, which they leave as it is and do not
    depend on, and what a file carries must act as what is trained.

    Parameters
    ----------
    config : Tuner or Prompt
        The method with its numbers; its class may be defined anywhere.
    sites : sequence of Site, optional
        Layers to adapt; by default one or two of every kind that the method supports, and of
        these such as it accepts. A prompt has none.
    identity : str, optional
        Why a fresh adapter changes the layer, if it does.
    reverts : float
        Bound of the error of unmerging, in units of the dtype's rounding; 0 for a method that
        cannot be unmerged.
    measured : collection of str
        Parameters whose initial values are computed from the base weight.
    routing : mapping, optional
        What a call needs beside its input, for an input whose first axis is 2.
    idle : collection of str
        Trained parameters on which the output does not depend, with the configuration's numbers.
    start : mapping, optional
        What a prompt's `init` needs beside its draws, by keyword.
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
        If the configuration is of a method without such laws, or is given what it has not.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> found = check_method(LoraConfig(r=2), [Site("fc", 5, 4)], backends=["numpy"])
    >>> found.passed[0]
    'fc: identity'
    """
    skipped: list[str] = []
    if isinstance(config, Prompt):
        if sites is not None or routing is not None:
            raise UsageError(f"{config.where}: a prompt adapts no layer: give no sites or routing")
        prompting.check_contract(config)
        every = _of_prompt(PromptCase("prompt", config, start or {}), backends, seeds)
    elif isinstance(config, Tuner):
        if start is not None:
            raise UsageError(f"{config.where}: start= is for prompts alone")
        cases = [
            Case(site.name, config, site, identity, reverts, {**(routing or {})}, (*idle,))
            for site in _accepted(config, sites, skipped)
        ]
        every = _laws(cases, measured, backends, seeds)
    elif isinstance(config, Attended):
        raise UsageError(
            f"{config.where}: cannot be checked: it acts within attention, and the laws are of "
            "layers and prompts; compare its function with the paper's formula, on the libraries "
            "that `peft_any.testing.rows` lists"
        )
    else:
        raise UsageError(f"{type(config).__name__}: cannot be checked: it is no Tuner or Prompt")
    return _tried(config, every, skipped)


def _tried(config: Config, every: Laws, skipped: list[str]) -> Checked:
    """Try laws one after the other, and list all that are broken at once."""
    broken: list[str] = []
    passed: list[str] = []
    for name, law in every:
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
) -> Laws:
    """List the laws with their names; an input that has no values or row is skipped inside."""

    def drawn(case: Case, lib: Lib) -> None:
        laws.seeds(case, lib, measured)

    for case in cases:
        ways = _WAYS if case.merges else _WAYS[:1]
        alike = laws.libraries if case.merges else applying.libraries
        named = _merged(case, seeds) if case.merges else _applied(case, seeds)
        yield from ((f"{case.name}: {name}", law) for name, law in named)
        for row in rows(*backends):
            needs = case.resolved.needs
            yield f"{case.name}: libraries: {row}", _on(row, needs, partial(alike, case))
            settled = partial(stepping.settling_on, case)
            yield f"{case.name}: settling: {row}", _on(row, needs, settled)
            yield f"{case.name}: seeds: {row}", _on(row, needs, partial(drawn, case), drawn=True)
        problems = [partial(descent.of_layer, case, way) for way in ways]
        yield from _descents(case.name, problems, backends)


def _merged(case: Case, seeds: Sequence[int]) -> Laws:
    def merging(seed: int, dtype: str) -> None:
        for lead in ((), (4,), (2, 3)):
            for bias in (True, False):
                laws.merging(case, seed, lead, dtype, bias=bias)

    yield "identity", _each(seeds, partial(laws.identity, case))
    yield "parameters", partial(laws.announced, case)
    yield "nothing in place", partial(laws.untouched, case)
    yield "merging", _each(seeds, merging)
    yield "unmerging", _each(seeds, partial(laws.unmerging, case))
    yield "factors", partial(laws.factors, case)
    yield "product", partial(wholes.product, case)
    yield "blocks", partial(wholes.blockwise, case)
    if case.site.n_out > 1:
        yield "rows apart", partial(wholes.rows_apart, case, 0, 1, case.site.n_out)
    yield from _stepped(case, seeds)
    yield "files", partial(laws.files, case)
    yield "a model", partial(wholes.bound, case)
    yield "on disk", partial(wholes.on_disk, case)


def _applied(case: Case, seeds: Sequence[int]) -> Laws:
    yield "identity", _each(seeds, partial(applying.identity, case))
    yield "parameters", partial(laws.announced, case)
    yield "nothing in place", partial(laws.untouched, case)
    yield "applying", _each(seeds, partial(applying.preparing, case))
    if isinstance(case.config, Routed):
        yield "a merge is refused", partial(applying.refusing, case)
    yield from _stepped(case, seeds)
    yield "files", partial(laws.files, case)


def _stepped(case: Case, seeds: Sequence[int]) -> Laws:
    yield "dropout", _each(seeds, partial(stepping.dropping, case))
    yield "settling", _each(seeds, partial(stepping.settling, case))


def _of_prompt(case: PromptCase, backends: Sequence[str], seeds: Sequence[int]) -> Laws:
    def in_front(seed: int, dtype: str) -> None:
        for lead in ((), (1,), (2,)):
            prompting.in_front(case, seed, lead, dtype)

    yield "prompt: parameters", partial(prompting.announced, case)
    yield "prompt: in front of the input", _each(seeds, in_front)
    yield "prompt: refusals", partial(prompting.refusing, case)
    yield "prompt: what files carry", _each(seeds, partial(prompting.portable, case))
    yield "prompt: nothing in place", partial(prompting.untouched, case)
    yield "prompt: files", partial(prompting.files, case)
    for row in rows(*backends):
        needs, law = case.config.needs, partial(prompting.libraries, case)
        yield f"prompt: libraries: {row}", _on(row, needs, law)
        drawn = partial(prompting.seeds, case)
        yield f"prompt: seeds: {row}", _on(row, needs, drawn, drawn=True)
    yield from _descents(case.name, [partial(prompting.of_prompt, case)], backends)


def _each(seeds: Sequence[int], law: Callable[[int, str], None]) -> Callable[[], None]:
    def run() -> None:
        for seed in seeds:
            for dtype in ("float32", "float64"):
                law(seed, dtype)

    return run


def _on(
    row: str, needs: tuple[str, ...], law: Callable[[Lib], None], *, drawn: bool = False
) -> Callable[[], None]:
    def run() -> None:
        if reason := missing(row):
            raise SkipTest(reason)
        with library(row) as lib:
            if reason := lib.lacks(needs):
                raise SkipTest(reason)
            if drawn and not lib.has_values:
                raise SkipTest(f"{lib.row} holds no numbers")
            law(lib)

    return run


def _descents(
    name: str, problems: Sequence[Callable[[], descent.Problem]], backends: Sequence[str]
) -> Laws:
    def differences() -> None:
        for problem in problems:
            descent.differences(problem())

    def on(engine: str) -> None:
        for problem in problems:
            descent.engines(problem(), engine)

    yield f"{name}: gradients", differences
    chosen = backends or [*LIBRARIES]
    for engine in ENGINES[1:]:
        if engine.partition(":")[0] in chosen:
            yield f"{name}: gradients: {engine}", partial(on, engine)

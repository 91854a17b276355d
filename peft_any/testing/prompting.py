"""The laws of a method that makes virtual tokens, each a function of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from peft_any.adapter import Adapter
from peft_any.backend import from_numpy, resolve
from peft_any.errors import ShapeError, UsageError
from peft_any.prompt import Prompt
from peft_any.prompts import table_of
from peft_any.rng import Fresh
from peft_any.testing.closeness import gap, rounding
from peft_any.testing.descent import Problem
from peft_any.testing.laws import NEW, TOLD, must, same, told
from peft_any.testing.libraries import Lib

_VOCABULARY, _TOKENS = 11, 4


@dataclass(frozen=True)
class PromptCase:
    """A configuration that makes virtual tokens, and what its `init` needs.

    Attributes
    ----------
    name : str
    config : Prompt
    start : mapping
        What `init` needs beside its draws, by keyword: a text's tokens, say.

    Examples
    --------
    >>> from peft_any.methods.prompt_tuning import PromptTuningConfig
    >>> case = PromptCase("p", PromptTuningConfig(num_virtual_tokens=2, token_dim=3))
    >>> [y.shape for y in case.outputs(case.params(), *case.inputs())]
    [(2, 6, 3)]
    """

    name: str
    config: Any
    start: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """What the laws' errors begin with."""
        config = self.config
        return f"{config.where} of {config.num_virtual_tokens} tokens, width {config.token_dim}"

    @property
    def embeds(self) -> bool:
        """Whether tokens stand before embedded input, not before keys and values."""
        return hasattr(self.config, "prepend")

    def new(self, lib: Any = None, seed: int = 0, dtype: str = "float32") -> Fresh:
        """Open the draws of fresh parameters, beside an embedding table."""
        to, rng = lib or resolve("numpy"), np.random.default_rng([seed, 4])
        table = rng.standard_normal((_VOCABULARY, self.config.size("token_dim"))).astype(dtype)
        return Fresh(seed, to, dtype=dtype, base=table_of(from_numpy(table, to)))

    def fresh(self, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
        """Draw initial parameters, on the host."""
        return self.config.init(self.new(seed=seed, dtype=dtype), **self.start)

    def params(self, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
        """Draw parameters as training leaves them: none at its initial value."""
        rng, frozen = np.random.default_rng([seed, 2]), self.config.frozen
        return {
            k: v if k in frozen else (v + 0.2 * rng.standard_normal(v.shape)).astype(dtype)
            for k, v in self.fresh(seed, dtype).items()
        }

    def inputs(
        self, lead: tuple[int, ...] = (2,), dtype: str = "float32", seed: int = 0
    ) -> list[np.ndarray[Any, Any]]:
        """Draw embedded tokens, or the keys and values of a layer."""
        rng, d = np.random.default_rng([seed, 3]), self.config.size("token_dim")
        if self.embeds:
            return [rng.standard_normal((*lead, _TOKENS, d)).astype(dtype)]
        heads = self.config.size("num_attention_heads")
        shape = (*lead, heads, _TOKENS, d // heads)
        return [rng.standard_normal(shape).astype(dtype) for _ in "kv"]

    @property
    def told(self) -> dict[str, Any]:
        """What `prepend` must be told: of several tasks, one."""
        several = (getattr(self.config, "num_tasks", None) or 1) > 1
        return {"task_ids": (0,)} if several else {}

    def outputs(self, p: Any, *x: Any) -> list[Any]:
        """Put the prompt before the inputs: of every submodule, or in every layer."""
        if self.embeds:
            submodules = range(self.config.submodules)
            return [self.config.prepend(p, *x, i, **self.told) for i in submodules]
        layers = range(self.config.size("num_layers"))
        return [y for i in layers for y in self.config.concat_to_kv(p, *x, i)]


def announced(case: PromptCase) -> None:
    """Check that fresh parameters become the tensors that `shapes` announces for a file."""
    config, p = case.config, case.fresh()
    said, found = config.shapes(), {k: v.shape for k, v in config.portable(p).items()}
    must(found == said, case, f"portable gives {found}, and shapes announces {said}")
    must(
        {*said} <= {*config.tables},
        case,
        f"shapes names {', '.join(said)}, and files know {', '.join(config.tables)}: set `tables`",
    )
    lost = {*config.frozen} - {*p}
    must(not lost, case, f"frozen names {', '.join(lost)}, which init does not give")


def in_front(case: PromptCase, seed: int, lead: tuple[int, ...], dtype: str) -> None:
    """Check that the tokens stand before the input, which is left as it is, whatever it is."""
    p, x, count = case.params(seed, dtype), case.inputs(lead, dtype, seed), _count(case)
    other = case.inputs(lead, dtype, seed + 1)
    each = len(x)
    for i, (y, z) in enumerate(zip(case.outputs(p, *x), case.outputs(p, *other), strict=True)):
        given, name = x[i % each], _named(case, i)
        shape = (*given.shape[:-2], count + _TOKENS, given.shape[-1])
        must(y.shape == shape, case, f"{name} gives the shape {y.shape}, not {shape}")
        must(y.dtype == given.dtype, case, f"{name} gives {y.dtype}, not the input's {given.dtype}")
        kept = same(y[..., count:, :], given)
        must(kept, case, f"{name} changes the input, or its place: it follows the virtual tokens")
        still = same(y[..., :count, :], z[..., :count, :])
        must(still, case, f"{name}'s virtual tokens depend on the input")
    if not case.embeds:
        _pairs(case, p, case.outputs(p, *case.inputs((), dtype)))


def _pairs(case: PromptCase, p: Any, longer: list[Any]) -> None:
    """Check `key_values`, whose pairs are what `concat_to_kv` puts in front."""
    pairs, count = case.config.key_values(p, batch=2), _count(case)
    layers = case.config.size("num_layers")
    must(len(pairs) == layers, case, f"key_values gives {len(pairs)} pairs, of {layers} layers")
    for i, given in enumerate(a for pair in pairs for a in pair):
        want = np.stack([longer[i][..., :count, :]] * 2)
        must(same(given, want), case, f"key_values and concat_to_kv disagree in layer {i // 2}")


def refusing(case: PromptCase) -> None:
    """Check that inputs of another width, and parts that are not there, are refused."""
    p, x = case.params(), case.inputs()
    wide = [np.concatenate([a, a], axis=-1) for a in x]
    last = case.config.submodules if case.embeds else case.config.size("num_layers")
    call = case.config.prepend if case.embeds else case.config.concat_to_kv
    for what, args in (("an input of another width", (*wide, 0)), (f"part {last}", (*x, last))):
        try:
            call(p, *args, **case.told)
        except ShapeError:
            continue
        must(False, case, f"{_named(case, 0)} takes {what}: raise a ShapeError (prompts.before)")


def portable(case: PromptCase, seed: int = 0, dtype: str = "float32") -> None:
    """Check that the file's table acts as what is trained, and is what training goes on from."""
    config, p, x = case.config, case.params(seed, dtype), case.inputs((2,), dtype, seed)
    table, eps = config.portable(p), 200 * rounding(dtype)
    again = config.portable(config.resumed(table))
    for name, value in table.items():
        must(gap(again[name], value) <= eps, case, f"resumed does not go on from a file's {name}")
    want = case.outputs(p, *x)
    for what, other in (("portable", table), ("resumed", config.resumed(table))):
        off = max(gap(y, z) for y, z in zip(case.outputs(other, *x), want, strict=True))
        why = f"what {what} gives acts otherwise than what is trained, by {off:.2g}"
        must(off <= eps, case, f"{why} of the largest output: a file would lose something")
    settled = config.settled(p)
    twice = config.settled(settled)
    moved = [k for k, v in settled.items() if gap(twice[k], v) > eps]
    must(not moved, case, f"settled moves {', '.join(moved)} when it is called again")


def untouched(case: PromptCase) -> None:
    """Check that nothing that a method is given is written to."""
    config = case.config
    calls: dict[str, Callable[[Any, Any], object]] = {
        "portable": lambda p, x: config.portable(p),  # noqa: ARG005 - one signature
        "resumed": lambda p, x: config.resumed(config.portable(p)),  # noqa: ARG005 - likewise
        "settled": lambda p, x: config.settled(p),  # noqa: ARG005 - likewise
        _named(case, 0): lambda p, x: case.outputs(p, *x),
    }
    for name, call in calls.items():
        p, x = case.params(), case.inputs()
        given = {"the input": x[0], **p}
        before, names = {k: np.array(v) for k, v in given.items()}, [*p]
        call(p, x)
        changed = [k for k, v in given.items() if v.tobytes() != before[k].tobytes()]
        must(not changed, case, f"{name} writes in place, to {', '.join(changed)}: {NEW}")
        must(names == [*p], case, f"{name} adds to or takes from the dict of parameters: {NEW}")


def libraries(case: PromptCase, lib: Lib, *, exact: bool = False) -> None:
    """Check that a library gives NumPy's numbers, in its own arrays, and leaves the input alone.

    Parameters
    ----------
    case : PromptCase
    lib : Lib
    exact : bool
        Whether a file's table is only copied, so that its numbers are the very same.
    """
    p, x, count = case.params(), case.inputs(), _count(case)
    table = case.config.portable(p)

    def made(p: Any, *x: Any) -> list[Any]:
        ys = case.outputs(p, *x)
        return ys + [y[..., count:, :] for y in ys]

    fails = f"{_named(case, 0)} fails on it: where it makes arrays, these need device= and dtype="
    for given in (p, table):
        rtol = 0.0 if exact and given.keys() == table.keys() else TOLD
        with told(case, f"{lib.row}: {fails}"):
            found = lib.call(made, given, *x)
        ys = case.outputs(given, *x)
        where = f"{case.where}: {lib.row}: {_named(case, 0)}"
        for i, want in enumerate(ys):
            lib.check(found[i], want, rtol=rtol, where=where)
            behind = f"{where}: the input behind it"
            lib.check(found[len(ys) + i], x[i % len(x)], rtol=0.0, where=behind)


def seeds(case: PromptCase, lib: Lib) -> None:
    """Check that one seed draws the same numbers everywhere."""
    with told(case, f"{lib.row}: init fails on it"):
        drawn = case.config.init(case.new(lib.backend, 7), **case.start)
    want = case.fresh(7)
    must(list(drawn) == list(want), case, f"{lib.row}: init gives {[*drawn]}, not {[*want]}")
    for name, value in want.items():
        lib.check(drawn[name], value, rtol=0.0, where=f"{case.where}: {lib.row}: initial {name}")


def of_prompt(case: PromptCase) -> Problem:
    """Pose the problem of gradients by the trained parameters."""
    p, x = case.params(dtype="float64"), case.inputs(dtype="float64")
    trained = {k: v for k, v in p.items() if k not in case.config.frozen}
    frozen = {k: v for k, v in p.items() if k in case.config.frozen}

    def outputs(trained: Any, frozen: Any, *x: Any) -> list[Any]:
        return case.outputs({**frozen, **trained}, *x)

    return Problem(case.where, _named(case, 0), outputs, trained, frozen, *x)


def files(case: PromptCase, folder: Path | None = None) -> None:
    """Check that an adapter's files hold it all, and come out as they went in."""
    if folder is None:
        with TemporaryDirectory() as made:
            files(case, Path(made))
        return
    config, p = case.config, case.config.portable(case.params())
    with told(case, "its files cannot be read back"):
        Adapter(config, {}, p).save(folder / "a")
        loaded = Adapter.load(folder / "a")
        loaded.save(folder / "b")
    must(type(loaded.config) is type(config), case, f"files give a {loaded.config.where}")
    lost = [k for k, v in p.items() if not same(loaded.shared.get(k), v)]
    must(not lost, case, f"its files lose {', '.join(lost)}: name them in `tables`")
    for field_ in ("num_virtual_tokens", "token_dim"):
        got, want = getattr(loaded.config, field_), getattr(config, field_)
        must(got == want, case, f"files say {field_}={got!r}, not {want!r}")
    for path in (folder / "a").iterdir():
        equal = path.read_bytes() == (folder / "b" / path.name).read_bytes()
        must(equal, case, f"{path.name} differs when it is read and written again")


def check_contract(config: Prompt) -> None:
    """Refuse a prompt without sizes, or that nothing puts before anything.

    Raises
    ------
    ConfigError, UsageError
        Naming what is missing.
    """
    sizes = ["num_virtual_tokens", "token_dim"]
    if not hasattr(config, "prepend"):
        if not (hasattr(config, "concat_to_kv") and hasattr(config, "key_values")):
            raise UsageError(
                f"{config.where}: cannot be checked: give it prepend(p, embeds, submodule), or "
                "concat_to_kv(p, k, v, layer) and key_values(p, batch)"
            )
        sizes += ["num_attention_heads", "num_layers"]
    for size in sizes:
        config.size(size)


def _count(case: PromptCase) -> int:
    return int(case.config.size("num_virtual_tokens"))


def _named(case: PromptCase, i: int) -> str:
    if case.embeds:
        return "prepend" if i == 0 else f"prepend, submodule {i}"
    return "concat_to_kv" if i < 2 else f"concat_to_kv, layer {i // 2}"

"""The laws of a method, each a function of a case that raises `AssertionError` with the culprit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from peft_any.adapter import Adapter
from peft_any.backend import dtype_name, resolve
from peft_any.checks import alike
from peft_any.dropout import Noise
from peft_any.errors import Irreversible
from peft_any.layer import EXPERTS, Dense
from peft_any.method import Additive
from peft_any.rng import Fresh
from peft_any.testing.case import Case
from peft_any.testing.closeness import gap, rounding
from peft_any.testing.libraries import Lib

TOLD = 5e-6
"""How far libraries may be apart in single precision, relative to the largest entry."""


class Placed(Protocol):
    """Whatever a law is about, with what its errors begin with."""

    @property
    def where(self) -> str:
        """The method, and the layer if there is one."""


def must(holds: object, case: Placed, why: str) -> None:
    """Raise an `AssertionError` that names the case, unless it holds."""
    if not holds:
        raise AssertionError(f"{case.where}: {why}")


@contextmanager
def told(case: Placed, what: str) -> Iterator[None]:
    """Say where an error arose that a method raises in the middle of a law."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{case.where}: {what}: {type(error).__name__}: {error}") from error


def identity(case: Case, seed: int = 0, dtype: str = "float32") -> None:
    """Check that a fresh adapter changes nothing, unless the case says why it does."""
    base = case.base(seed, dtype=dtype)
    p = case.fresh(base, seed, dtype)
    merged = case.resolved.merge(p, base)
    change = gap(merged.weight, base.weight)
    if case.identity is not None:
        if base.bias is not None:
            change = max(change, gap(merged.bias, base.bias))
        must(change > 1e-3, case, "a fresh adapter is the identity, though the case denies it")
        return
    must(
        change <= 50 * rounding(dtype),
        case,
        f"a fresh adapter changes the weight, by {change:.2g} of its largest entry: `init` must "
        "give what leaves the layer as it was, or the case say why not (identity=)",
    )
    if base.bias is not None:
        must(merged.bias is not None, case, _NO_BIAS)
        must(same(merged.bias, base.bias), case, "a fresh adapter changes the bias")


_NO_BIAS = "merge drops the bias: give base.replace(weight=…), which keeps it"


def untouched(case: Case, seed: int = 0) -> None:
    """Check that nothing that a method is given is written to."""
    config, merging = case.resolved, ("merge", "effect")
    calls: dict[str, Callable[[dict[str, Any], Any, Dense], object]] = {
        "init": lambda p, x, b: config.begin(  # noqa: ARG005 - one signature
            case.site, Fresh(0, resolve("numpy"), key=case.site.name, base=b)
        ),
        "merge": lambda p, x, b: config.merge(p, b),  # noqa: ARG005 - likewise
        "forward": config.forward,
        "prepare": lambda p, x, b: config.prepare(p, b),  # noqa: ARG005 - likewise
        "effect": lambda p, x, b: config.effect(p, b),  # noqa: ARG005 - likewise
        "settled": lambda p, x, b: config.settled(p),  # noqa: ARG005 - likewise
        "dropped": lambda p, x, b: config.dropped(p, x, b, Noise.of(seed)),
    }
    if case.reverts and case.merges:
        calls["unmerge"] = lambda p, x, b: config.unmerge(p, b)  # noqa: ARG005 - likewise
    for name, call in calls.items():
        if name in merging and not case.merges:
            continue
        base = case.base(seed)
        p, x = {**case.params(base, seed), **case.routing}, case.inputs(seed=seed)
        given = {"the input": x, "the base's weight": base.weight, **p}
        if base.bias is not None:
            given["the base's bias"] = base.bias
        before, names = {k: np.array(v) for k, v in given.items()}, [*p]
        call(p, x, base)
        changed = [k for k, v in given.items() if np.asarray(v).tobytes() != before[k].tobytes()]
        must(not changed, case, f"{name} writes in place, to {', '.join(changed)}: {NEW}")
        must(names == [*p], case, f"{name} adds to or takes from the dict of parameters: {NEW}")


NEW = "give new arrays (x = x + y, not x += y), for some libraries cannot write at all"


def merging(
    case: Case,
    seed: int = 0,
    lead: tuple[int, ...] = (2, 3),
    dtype: str = "float32",
    *,
    bias: bool = True,
) -> None:
    """Check that `forward` is the merged layer, prepared or not, with the bias or without."""
    config, eps = case.resolved, rounding(dtype)
    bias = (bias and case.site.kind != "Embedding") or config.changes_bias(case.site)
    base = case.base(seed, dtype=dtype, bias=bias)
    p, x = case.params(base, seed, dtype), case.inputs(lead, dtype, seed)
    merged = config.merge(p, base)
    must(
        merged.weight.shape == base.weight.shape and merged.weight.dtype == base.weight.dtype,
        case,
        f"merge gives a weight of {merged.weight.dtype} {merged.weight.shape}, not of "
        f"{base.weight.dtype} {base.weight.shape}",
    )
    must(merged.bias is not None or not bias, case, _NO_BIAS)
    want, y = merged(x), config.forward(p, x, base)
    must(y.shape == want.shape, case, f"forward gives the shape {y.shape}, not {want.shape}")
    off = gap(y, want)
    if off > 200 * eps:
        why = f"forward and merge disagree, by {off:.2g} of the largest output: one of them errs"
        if base.bias is not None and gap(y + base.bias, want) <= 200 * eps:
            why = "forward drops the bias: base(x) adds it, x @ base.weight.T does not"
        raise AssertionError(f"{case.where}: {why}")
    ready = config.prepare(p, base)
    off = max(
        gap(config.forward(ready, x, base), want) / 200,
        gap(config.merge(ready, base).weight, merged.weight) / 50,
    )
    must(off <= eps, case, "forward or merge give another result with what `prepare` gives")
    if base.bias is not None:
        moved = not same(merged.bias, base.bias)
        does, says = ("changes", "no") if moved else ("leaves", "yes")
        must(
            moved == config.changes_bias(case.site),
            case,
            f"merge {does} the bias, and changes_bias says {says}",
        )
    dw, _ = config.effect(p, base)
    off = gap(base.weight + dw, merged.weight)
    must(off <= 50 * eps, case, "effect is not what merge adds to the weight")


def unmerging(case: Case, seed: int = 0, dtype: str = "float32") -> None:
    """Check that unmerging gives the base back, or is refused where the case says so."""
    config, base = case.resolved, case.base(seed, dtype=dtype)
    p = case.params(base, seed, dtype)
    merged = config.merge(p, base)
    try:
        again = config.unmerge(p, merged)
    except Irreversible as error:
        must(
            not case.reverts,
            case,
            "unmerge is Irreversible: override it, or say that it cannot be done (reverts=0)",
        )
        must(case.site.name in str(error), case, f"Irreversible does not name the site: {error}")
        return
    must(case.reverts, case, "unmerge works, though the case says that it cannot (reverts=0)")
    size = max(1.0, gap(merged.weight, base.weight))
    bound, off = case.reverts * size * rounding(dtype), gap(again.weight, base.weight)
    must(
        off <= bound, case, f"unmerge misses the base, by {off:.2g} of its largest entry: the "
        f"case bounds it by {bound:.2g} (reverts={case.reverts:g})",
    )  # fmt: skip
    if base.bias is not None:
        must(gap(again.bias, base.bias) <= bound, case, "unmerge misses the base's bias")


def libraries(case: Case, lib: Lib) -> None:
    """Check that a library gives NumPy's numbers, in its own arrays, on their device.

    It is jitted on JAX, and nothing is computed on Dask before it is asked for.
    """
    config, base = case.resolved, case.base()
    p, x = case.params(base), case.inputs()

    def adapt(p: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        layer = Dense(weight, bias, case.site)
        merged = config.merge(p, layer)
        return config.forward(p, x, layer), merged.weight, merged.bias, merged.stored()

    made = "forward or merge fail on it: where they make arrays, these need device= and dtype="
    with told(case, f"{lib.row}: {made}"):
        y, weight, bias, stored = lib.call(adapt, p, x, base.weight, base.bias)
    merged, applied = config.merge(p, base), config.forward(p, x, base)
    for what, array in {"forward": applied, "merge": merged.weight}.items():
        kind, found = dtype_name(base.weight), dtype_name(array)
        must(
            found == kind, case, f"{what} gives {found} of {kind}: arrays that meet have one dtype"
        )
    where = f"{case.where}: {lib.row}"
    lib.check(y, applied, rtol=TOLD, where=f"{where}: forward")
    lib.check(weight, merged.weight, rtol=TOLD, where=f"{where}: the merged weight")
    lib.check(stored, merged.stored(), rtol=TOLD, where=f"{where}: the stored weight")
    must(tuple(stored.shape) == case.site.stored_shape, case, "the stored weight's shape is off")
    if base.bias is not None:
        lib.check(bias, merged.bias, rtol=TOLD, where=f"{where}: the merged bias")


def seeds(case: Case, lib: Lib, measured: Collection[str] = ()) -> None:
    """Check that one seed draws the same numbers everywhere.

    Parameters
    ----------
    case : Case
    lib : Lib
    measured : collection of str
        Parameters that are computed from the base weight, and may differ by rounding.
    """
    config, base, site = case.resolved, case.base(), case.site
    there = Dense(lib.array(base.weight), None, site)
    with told(case, f"{lib.row}: init fails on it"):
        drawn = config.begin(site, Fresh(7, lib.backend, key=site.name, base=there))
    here = Fresh(7, resolve("numpy"), key=site.name, base=base.replace(bias=None))
    want = config.begin(site, here)
    must(list(drawn) == list(want), case, f"{lib.row}: init gives {[*drawn]}, not {[*want]}")
    for name, value in want.items():
        rtol = 1e-6 if name in measured else 0.0
        lib.check(drawn[name], value, rtol=rtol, where=f"{case.where}: {lib.row}: initial {name}")


def announced(case: Case) -> None:
    """Check that `init` gives the parameters that `shapes` announces."""
    config = case.resolved
    p = config.begin(case.site, Fresh(0, resolve("numpy"), base=case.base()))
    said = config.shapes(case.site) | config.shared_shapes([case.site])
    found = {k: v.shape for k, v in p.items() if k in said or k not in config.frozen}
    must(alike(found, said), case, f"init gives {found}, and shapes announces {said}")


def factors(case: Case, seed: int = 0) -> None:
    """Check that the factors of an additive method multiply to its change of the weight."""
    config = case.resolved
    if not isinstance(config, Additive):
        return
    p = case.params(case.base(seed, dtype="float64"), seed, "float64")
    u, v = config.factors(p, case.site)
    delta = config.delta(p, case.site)
    must(
        delta.shape == (case.site.n_out, case.site.width) == (u.shape[0], v.shape[1]),
        case,
        f"delta is {delta.shape}, its factors {u.shape} and {v.shape}, the weight "
        f"{(case.site.n_out, case.site.width)}",
    )
    must(gap(u @ v, delta) <= 1e-14, case, "the factors do not multiply to delta")


def files(case: Case, folder: Path | None = None) -> None:
    """Check that an adapter's files hold it all, and come out as they went in.

    Raises
    ------
    AssertionError
        If the class is not found by its `peft_type`, a tensor or field is lost, or bytes differ.
    """
    if folder is None:
        with TemporaryDirectory() as made:
            files(case, Path(made))
        return
    base = case.base()
    p, config = case.params(base), case.config
    shared = {k: p.pop(k) for k in config.at(case.site).shared_shapes([case.site]) if k in p}
    config, sites = config.portable({case.site.name: p})
    with told(case, "its files cannot be read back"):
        Adapter(config, sites, shared).save(folder / "a")
        loaded = Adapter.load(folder / "a")
        loaded.save(folder / "b")
    must(type(loaded.config) is type(config), case, f"files give a {loaded.config.where}")
    module = case.site.name
    if case.site.kind in EXPERTS:  # PEFT's files say the parameter's module, not its own name
        module = module.rpartition(".")[0]
    found = loaded.sites.get(module, {})
    lost = [k for k, v in sites.get(case.site.name, {}).items() if not same(found.get(k), v)]
    lost += [k for k, v in shared.items() if not same(loaded.shared.get(k), v)]
    must(
        not lost or not getattr(config, "save_projection", True),
        case,
        f"its files lose {', '.join(lost)}: names of parameters begin with the prefix "
        f"({config.prefix!r}), perhaps followed by .weight or .bias",
    )
    for path in (folder / "a").iterdir():
        equal = path.read_bytes() == (folder / "b" / path.name).read_bytes()
        must(equal, case, f"{path.name} differs when it is read and written again")


def same(got: Any, want: Any) -> bool:
    """Whether two host arrays are equal, the first being there at all."""
    return got is not None and got.shape == want.shape and bool(np.all(np.asarray(got) == want))

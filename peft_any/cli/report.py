"""What the command line shows of receipts, inspections and methods."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from peft_any.cli.console import Table
from peft_any.errors import PeftError
from peft_any.layer import Site
from peft_any.method import Additive, Tuner
from peft_any.prompt import Attended
from peft_any.receipt import Change, Receipt
from peft_any.registry import Config, method_for
from peft_any.routed import Routed

if TYPE_CHECKING:
    from peft_any.algebra.record import Record
    from peft_any.surgery.inspection import Inspection

ROWS = 12
"""Tensors that a summary shows; the receipt has all."""
WIDTH = 4096
"""Of the layer whose parameters are counted."""
LIBRARIES = (
    "Every method runs on any library of the array standard: NumPy, CuPy, PyTorch, JAX, Dask and "
    "array-api-strict; `needs`: extensions of it."
)
_NUMBERS = {"parameters", "rank", "‖ΔW‖", "‖Δ‖/‖W‖", "kept", "error", "unmoved"}
_NUMBERS |= {"ranks", "‖ΔW‖ of the sum", "left out", "off", "off the sum"}
_NUMBERS |= {"CL error", "CD error", "trainable", "seconds", "‖Δ‖", "at best"}
_NUMBERS |= {"‖ΔA‖", "‖ΔB‖", "cosine", "‖ΔA−ΔB‖/‖ΔA‖", "writes alike", "reads alike"}
_NUMBERS |= {"‖Δ‖/‖A‖", "largest", "effective rank", "holds 99 %"}


def table(*head: str) -> Table:
    """Start a table; numbers stand to the right."""
    return Table(head, _NUMBERS)


def number(value: float | None, form: str = ".4f") -> str:
    """Write a number, or a dash where there is none.

    Examples
    --------
    >>> number(0.99999), number(None), number(0.125, ".1%")
    ('1.0000', '–', '12.5%')
    """
    return "–" if value is None or not isfinite(value) else format(value, form)


def summary(receipt: Receipt, place: str | None = None) -> list[str | Table]:
    """Show a receipt: the adapters, the totals, and the tensors that kept least.

    Parameters
    ----------
    receipt : Receipt
    place : str, optional
        What to call the output's path.
    """
    changes, worst = receipt.changes, receipt.worst
    lines = [
        f"{s.peft_type} {s.label}" + (f" × {s.weight:g}" if s.weight != 1 else "")
        for s in receipt.adapters
    ]
    audit = receipt.kind == "verify"
    lines.append(
        f"{len(changes)} tensors {'to change' if audit else 'merged'}, "
        f"{receipt.copied} {'as in the base' if audit else 'copied'}"
        + (f", peak {receipt.peak_memory / 1e9:.1f} GB" if receipt.peak_memory else "")
    )
    if worst is not None:
        lines.append(
            f"kept {number(receipt.kept)} (worst {number(worst.kept)} {worst.tensor}), "
            f"{number(receipt.unchanged, '.1%')} of the elements did not move"
        )
    if receipt.untied:
        lines.append(f"not tied any more: {', '.join(receipt.untied)}")
    if receipt.problems:
        lines.append(f"{len(receipt.problems)} problems")
    elif audit:
        lines.append("the merge is what it should be")
    elif receipt.out:
        lines.append(f"→ {place or receipt.out['path']}")
    else:
        lines.append("a dry run: nothing was written")
    found = sorted(changes, key=lambda c: 2.0 if c.kept is None else c.kept)
    more = [f"… and {len(changes) - ROWS} more, which kept more"] if len(changes) > ROWS else []
    shown: list[str | Table] = [figures(found[:ROWS])] if found else []
    return [*lines, *shown, *more]


def figures(changes: Sequence[Change]) -> Table:
    """Show what became of tensors."""
    made = table("tensor", "by", "dtype", "‖Δ‖/‖W‖", "kept", "error", "unmoved")
    for change in changes:
        made.add(
            change.tensor,
            ", ".join(change.by),
            change.dtype,
            number(change.relative, ".2e"),
            number(change.kept),
            number(change.error, ".1e"),
            number(change.unchanged, ".1%"),
        )
    return made


def report(found: Inspection) -> list[str | Table]:
    """Show an inspection: the method, every layer with its arrays, and what a base would keep."""
    lines = [f"{found.peft_type} {found.path}"]
    at = f" at {len(found.sites)} layers" if found.sites else ""
    lines.append(f"{found.parameters:,} parameters{at}")
    if found.ranks:
        ranks = (f"{rank} ({count}×)" for rank, count in found.ranks.items())
        lines[-1] += f", rank {', '.join(ranks)}"
    lines.append(", ".join(f"{key}={value!r}" for key, value in found.config.items()))
    spectra = any(site.spectrum for site in found.sites)
    more = ["effective rank", "holds 99 %"] if spectra else []
    made = table("layer", "parameters", "rank", "‖ΔW‖", *more, "arrays: shape, norm")
    for site in found.sites:
        arrays = (
            f"{name}: {_shape(shape)}, {number(site.norms.get(name), '.4g')}"
            for name, shape in site.shapes.items()
        )
        rank = "–" if site.rank is None else str(site.rank)
        norm, text = number(site.delta_norm, ".4g"), "; ".join(arrays)
        held = number(site.effective_rank, ".1f"), number(site.rank_for(0.99), "d")
        cells = f"{site.parameters:,}", rank, norm, *(held if spectra else ())
        made.add(site.name, *cells, text)
    loose = [
        f"{what} {name}: {_shape(shape)}"
        for what, group in (("new", found.copies), ("rows of", found.rows), ("", found.shared))
        for name, shape in group.items()
    ]
    shown: list[str | Table] = [*lines, *([made] if found.sites else [])]
    shown += [line.strip() for line in loose]
    if found.base:
        shown += ["", f"merged into {found.base['path']} as it is stored:"]
        shown.append(figures(found.changes))
    return shown


def combination(record: Record) -> list[str | Table]:
    """Show what `combine` or `resize` made: the adapters, the totals, the layers farthest off."""
    lines = [
        f"{s.peft_type} {s.label}" + (f" × {s.weight:g}" if s.weight != 1 else "")
        for s in record.adapters
    ]
    ranks = ", ".join(f"{rank} ({count}×)" for rank, count in record.ranks.items())
    made = f"{record.method}: {len(record.layers)} layers" + (f", rank {ranks}" if ranks else "")
    if record.copies:
        made += f", {len(record.copies)} full copies"
    lines.append(made)
    if record.error is not None:
        line = f"off by {number(record.error, '.1e')}"
        if record.discarded:
            line += f", {number(record.discarded, '.2%')} of ‖ΔW‖² left out"
        if record.off_sum is not None and record.off_sum > 2 * record.error:
            line += f"; {number(record.off_sum, '.1e')} from the exact weighted sum"
        lines.append(line)
    place = record.out.get("path")
    lines.append(f"→ {place}" if place else "a dry run: nothing was written")
    found = sorted(record.layers, key=lambda layer: -(layer.error or 0.0))
    table_of = table("layer", "ranks", "rank", "‖ΔW‖ of the sum", "left out", "off", "off the sum")
    for layer in found[:ROWS]:
        table_of.add(
            layer.layer,
            " + ".join(map(str, layer.ranks)) or "–",
            "–" if layer.rank is None else str(layer.rank),
            number(layer.norm, ".4g"),
            number(layer.discarded, ".2%"),
            number(layer.error, ".1e"),
            number(layer.off_sum, ".1e"),
        )
    more = [f"… and {len(found) - ROWS} more, less far off"] if len(found) > ROWS else []
    return [*lines, table_of, *more]


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "one number"


def described(peft_type: str) -> dict[str, Any]:
    """Describe a method, as its class declares itself."""
    cls = method_for(peft_type)
    layers = sorted(cls.kinds) if issubclass(cls, Tuner) else []
    needs: Any = cls.needs  # a property where it depends on the flags
    return {
        "peft_type": peft_type,
        "config": cls.__name__,
        "source": " ".join((sys.modules[cls.__module__].__doc__ or "").split()),
        "equation": (cls.__doc__ or "").partition("\n")[0],
        "layers": layers,
        "parameters": parameters(cls),
        "kind": mode(cls),
        "merges": merges(cls),
        "reversible": issubclass(cls, Tuner) and cls.unmerge is not Tuner.unmerge,
        "extensions": list(needs) if isinstance(needs, tuple) else ["linalg"],
        "files": "ours" if cls.marks or cls.begun else "as Hugging Face PEFT's",
    }


def merges(cls: type[Config]) -> bool:
    """Whether a method has a merge."""
    return issubclass(cls, Tuner) and not issubclass(cls, Routed)


def mode(cls: type[Config]) -> str:
    """Say in a word or two what a method does."""
    if issubclass(cls, Additive):
        return "adds to W"
    if issubclass(cls, Routed):
        return "adds to W·x"
    if issubclass(cls, Attended):
        return "adds to attention"
    return "maps W" if issubclass(cls, Tuner) else "tokens"


def parameters(cls: type[Config]) -> dict[str, int] | None:
    """Count what a method trains by default: for a layer 4096 wide, and once for all layers.

    None where its defaults adapt no such layer, or the number depends on a model
    or on the base's values.
    """
    # the one field without a default: it schedules training, and sizes nothing
    steps: dict[str, Any] = (
        {"total_step": 1} if any(f.name == "total_step" for f in fields(cls)) else {}
    )
    try:
        config: Any = cls(**steps)
        if not isinstance(config, Tuner):
            return None
        norm = "Norm" in config.kinds
        site = Site("layer", WIDTH, WIDTH, *(("Norm", (), WIDTH) if norm else ()))
        own = config.at(site).shapes(site)
        shared = config.shared_shapes([site])
    except (PeftError, TypeError):
        return None
    if any(size < 0 for k, s in own.items() for size in s if not config.is_frozen(k)):
        return None
    count = {
        "layer": sum(prod(s) for k, s in own.items() if not config.is_frozen(k)),
        "shared": sum(prod(s) for k, s in shared.items() if not config.is_frozen(k)),
    }
    return count if any(count.values()) else None


def trains(count: Mapping[str, int] | None) -> str:
    """Say what is trained of a layer 4096 wide.

    Examples
    --------
    >>> trains({"layer": 8192, "shared": 0}), trains({"layer": 64, "shared": 100}), trains(None)
    ('8,192', '64, shared 100', '–')
    """
    if count is None:
        return "–"
    shared = f", shared {count['shared']:,}" if count["shared"] else ""
    return f"{count['layer']:,}{shared}"


def listing(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the methods."""
    head = "method", "what it computes", "trains", "layers", "kind", "unmerges", "needs", "files"
    made = table(*head)
    for row in rows:
        layers, needs = ", ".join(row["layers"]), ", ".join(row["extensions"])
        undone = "–" if not layers else "yes" if row["reversible"] else "no"
        first = row["peft_type"], row["equation"], trains(row["parameters"])
        cells = *first, layers or "–", row["kind"], undone, needs or "–", row["files"]
        made.add(*cells)
    return made


def remarks(others: Mapping[str, str], problems: Sequence[str]) -> list[str | Table]:
    """Say whose the methods of other distributions are, and which of them cannot be used."""
    lines = [f"{name} is of {owner}" for name, owner in others.items()]
    return [*lines, *(f"warning: {line}" for line in problems), LIBRARIES]


def scores(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[float]]
) -> list[str | Table]:
    """Show what the demo's methods came to, and how they came to it."""
    from peft_any.demo.figure import spark_lines

    lines = spark_lines(curves)
    made = table("method", "CL error", "CD error", "trainable", "seconds", "CL error in training")
    for row in rows:
        off = number(row["cl_mae"]), number(row["cd_rel"], ".2%")
        cost = f"{row['trainable']:,}", number(row["seconds"], ".1f")
        made.add(row["method"], *off, *cost, lines.get(row["method"], ""))
    return [made]

"""Write a page for every method, from its docstring, its fields and its rows in `tests/cases.py`.

Sphinx calls `write_pages` before it reads the sources (see `conf.py`).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from inspect import cleandoc, get_annotations
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peft_any.cli.report import WIDTH, described, merges, mode, parameters, trains  # noqa: E402 - from this tree
from peft_any.fields import default_of  # noqa: E402
from peft_any.layer import MATRICES, Kind, Site  # noqa: E402
from peft_any.method import Tuner  # noqa: E402
from peft_any.prompt import Attended  # noqa: E402
from peft_any.registry import Config, method_for, method_names  # noqa: E402

RESULTS = ROOT / "build" / "junit.xml"
"""What the last complete run of the tests found (``--junitxml=build/junit.xml``), if there is."""
LIBRARIES = "numpy", "strict", "torch", "jax", "dask", "cupy"
METHODS = """What each method does, what it trains, and with which layers, extensions of the array
standard and files it works. [](../hf-parity.md) says what of Hugging Face PEFT's is read, merged
and converted, and [](../tutorials/choosing.md) what a method can change for its parameters. Rows
without a golden file are compared live, or have no like there: a method's own page says which."""
COMMON = {f.name for f in fields(Config)} | {"target_modules"}


Row: TypeAlias = Any
"""A row of the table: a `tests.cases.Case`, or a row for a prompt, which has no site."""

SHARED_NOTES = {
    "r": "the rank.",
    "lora_alpha": "α.",
    "alpha": "α.",
    "lora_dropout": "in training only.",
    "vera_dropout": "in training only.",
    "module_dropout": "in training only.",
    "fan_in_fan_out": "set for weights stored (n_in, n_out), as a `Conv1D` does.",
    "bias": "which of the base's biases the adapter holds too.",
    "exclude_modules": "modules left alone, as a list of suffixes or a regular expression.",
    "layers_to_transform": "only the layers with these indices.",
    "layers_pattern": "the name before a layer's index.",
    "trainable_token_indices": "rows of the embedding that the adapter replaces.",
}
"""What a field does wherever a method's docstring says nothing else."""


@dataclass(frozen=True)
class Doc:
    """A class docstring: paragraphs, and what it says of single fields."""

    text: str
    notes: dict[str, str]


def parse(cls: type[Config]) -> Doc:
    """Split a docstring of the house style: prose, then ``field, field: what they do`` items."""
    known = {f.name for f in fields(cls)}
    prose: list[str] = []
    notes: dict[str, str] = {}
    open_items: list[str] = []
    for line in apart(cleandoc(cls.__doc__ or "").splitlines(), known):
        names, colon, rest = line.partition(":")
        named = [n.strip() for n in names.split(",")]
        if colon and known.issuperset(named):
            open_items = named
            notes |= dict.fromkeys(named, rest.strip())
        elif open_items and line.startswith(" "):
            notes |= {n: f"{notes[n]} {line.strip()}" for n in open_items}
        else:
            open_items = []
            prose.append(line)
    return Doc(linked("\n".join(prose).strip()), {k: linked(v) for k, v in notes.items()})


def apart(lines: Iterable[str], known: Collection[str]) -> Iterator[str]:
    """Give items that share a line, ``field: what it does. field: …``, a line each."""
    inside = False
    for line in lines:
        start, inside = 0, inside and line.startswith(" ")
        for found in re.finditer(r"(?:^|(?<=\.) )((?:\w+, )*\w+):", line):
            first = found.start() == 0
            if (first or inside) and set(known).issuperset(found[1].split(", ")):
                if not first:
                    yield line[start : found.start()]
                start, inside = found.start(1), True
        yield line[start:]


def linked(text: str) -> str:
    """Turn bare addresses into links."""
    return re.sub(r"(https?://[^\s),]+[^\s),.])", r"<\1>", text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(value: object) -> str:
    """Set a value as code."""
    return f"`{value}`"


def kind(hint: Any) -> str:
    """Write a field's type as its file has it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(kind, get_args(hint)))
    if get_origin(hint) is Literal:
        return " | ".join(f'"{word}"' for word in get_args(hint))
    plain = isinstance(hint, type) and not get_args(hint)
    return (
        hint.__name__.removeprefix("NoneType") or "None"
        if plain
        else str(hint).replace("typing.", "")
    )


def default(field: Field[Any]) -> str:
    """Give a field's default as Python writes it."""
    return code(repr(default_of(field))).replace("'", '"')


def settings(config: Config) -> str:
    """Write a configuration with what differs from the defaults."""
    return code(repr(config)).replace("'", '"')


def layer(site: Site) -> str:
    """Describe a row's layer."""
    kernel = f", kernel {'×'.join(map(str, site.kernel))}" if site.kernel else ""
    groups = f", {site.groups} groups" if site.groups > 1 else ""
    bias = "" if site.bias else ", no bias"
    return f"{site.kind} {site.n_in} → {site.n_out}{kernel}{groups}{bias}"


def layers(kinds: frozenset[Kind]) -> str:
    """List the layer kinds of a method."""
    if not kinds:
        return "–"
    every = ["every matrix"] if kinds >= MATRICES else []
    return ", ".join([*every, *sorted(kinds - MATRICES if every else kinds)])


def shapes(row: Row) -> str:
    """List a row's parameters with their shapes."""
    if isinstance(row.config, Tuner):
        site, config = row.site, row.config.at(row.site)
        found = {**config.shared_shapes([site]), **config.shapes(site)}
    elif isinstance(row.config, Attended):
        within: Any = row.config
        found = within.shapes(row.width)
    else:
        found = row.config.shapes()
    said = ", ".join(f"`{name}` {shape}" for name, shape in found.items())
    return said.replace("-1", "…")  # what the base's values decide


def rows_of(peft_type: str) -> list[Row]:
    """Find a method's rows in the table."""
    from tests import cases  # noqa: PLC0415 - the tests' requirements are the docs' too

    every = [*cases.CASES, *cases.PROMPTS, *cases.ROUTED, *cases.ATTENDED]
    return [row for row in every if row.config.peft_type == peft_type]


def reverts(row: Row) -> str:
    """Say whether a row's merge can be undone, and how exactly."""
    bound = getattr(row, "reverts", None)
    if bound is None or not merges(type(row.config)):
        return "–"
    return f"to {bound:g} ulp" if bound else "no"


def method_page(peft_type: str) -> str:
    """Compose a method's page."""
    cls = method_for(peft_type)
    doc = parse(cls)
    title = (sys.modules[cls.__module__].__doc__ or peft_type).split("\n\n")
    name, _, rest = title[0].partition(":")
    source = " ".join([rest.strip(), *title[1:]]).strip()
    notes = SHARED_NOTES | doc.notes
    first, types = get_annotations(cls), get_type_hints(cls)
    every = [f for f in fields(cls) if f.name not in COMMON]
    own = sorted(every, key=lambda f: f.name not in first)  # then those that others have, too
    parts = [
        f"# {name.rstrip('.')}",
        linked(source[:1].upper() + source[1:]).replace("\n", " "),
        f"`peft_any.{cls.__name__}`, whose `peft_type` is `{peft_type}`.",
        doc.text,
        "## Fields",
        "Names and defaults are those of Hugging Face PEFT's `adapter_config.json`.",
        table(
            ("field", "type", "default", "what it does"),
            [
                (code(f.name), code(kind(types[f.name])), default(f), notes.get(f.name, ""))
                for f in own
            ],
        ),
    ]
    if issubclass(cls, Tuner):
        parts += ["## Layers", ", ".join(f"`{k}`" for k in sorted(cls.kinds)) + "."]
    if cls.refused:
        parts += [
            "## Refused",
            "These change the result and are not supported; a file that sets one is an error.",
            table(("field", "why"), [(code(k), v) for k, v in sorted(cls.refused.items())]),
        ]
    parts += [
        "## Tested with",
        "Each row of `tests/cases.py` runs through every law on every library.",
        table(
            ("row", "configuration", "layer", "parameters", "unmerges", "compared with PEFT"),
            [
                (
                    code(row.name),
                    settings(row.config),
                    layer(row.site) if hasattr(row, "site") else "–",
                    shapes(row),
                    reverts(row),
                    getattr(row, "hf", None) or "yes",
                )
                for row in rows_of(peft_type)
            ],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def results() -> dict[str, Counter[str]]:
    """Count the outcomes of the last run's tests by row and library: ``"lora torch"``."""
    counts: dict[str, Counter[str]] = {}
    if not RESULTS.is_file():
        return counts
    tree = ET.parse(RESULTS)  # noqa: S314 - our own test run wrote it
    for test in tree.iter("testcase"):
        _, bracket, inside = test.get("name", "").partition("[")
        if not bracket:
            continue
        outcome = next((c.tag for c in test if c.tag in ("failure", "error", "skipped")), "passed")
        ids = inside.removesuffix("]")
        for library in LIBRARIES:
            row = re.search(rf"(?:^|-){library}(?::\w+)?(?:-|$)", ids)
            if row:
                rest = (ids[: row.start()] + "-" + ids[row.end() :]).strip("-")
                counts.setdefault(f"{rest} {library}", Counter())[outcome] += 1
    return counts


def tally(rows: Sequence[Row], library: str, counts: Mapping[str, Counter[str]]) -> str:
    """Sum what ran of a method on a library."""
    found: Counter[str] = sum(
        (counts.get(f"{r.name} {library}", Counter()) for r in rows), Counter()
    )
    failed = found["failure"] + found["error"]
    if failed:
        return f"{failed} failed"
    return f"{found['passed']} passed" if found["passed"] else "not run"


def status_page() -> str:
    """Compose the overview: every method, what it supports and what ran where."""
    counts = results()
    declared, ran = [], []
    for peft_type in method_names():
        cls, rows = method_for(peft_type), rows_of(peft_type)
        page = f"[{cls.__name__}]({peft_type.lower()}.md)"
        kinds = cls.kinds if issubclass(cls, Tuner) else frozenset()
        undone = Counter(bool(getattr(r, "reverts", 0)) for r in rows)
        told = described(peft_type)
        declared.append(
            (
                page,
                linked(told["equation"]),
                layers(kinds),
                trains(parameters(cls)),
                mode(cls),
                f"{undone[True]} of {len(rows)} rows" if merges(cls) else "–",
                ", ".join(told["extensions"]) or "–",
                told["files"],
                sum(getattr(r, "hf", None) is None for r in rows),
                len(rows),
            )
        )
        ran.append((page, *(tally(rows, library, counts) for library in LIBRARIES)))
    wide = f"trains, by default, of a layer {WIDTH} wide"
    first = "method", "what it computes", "layers", wide, "kind", "merge can be undone"
    head = *first, "needs", "files", "golden files of PEFT's", "rows"
    parts = ["# Methods", METHODS, table(head, declared)]
    if counts:
        parts += [
            "## What ran",
            "Tests that took a row of the table and a library, in the last complete run.",
            table(("method", *LIBRARIES), ran),
        ]
    names = "\n".join(f"{name.lower()}" for name in method_names())
    return "\n\n".join([*parts, f"```{{toctree}}\n:hidden:\n\n{names}\n```"]) + "\n"


def write_pages(out: Path) -> None:
    """Write all pages, leaving alone those that are as they should be."""
    import parity_page  # noqa: PLC0415 - which uses this module

    out.mkdir(exist_ok=True)
    keep(out.parent / "hf-parity.md", parity_page.compose())
    pages = {"index": status_page()}
    pages |= {name.lower(): method_page(name) for name in method_names()}
    for stale in {p for p in out.glob("*.md") if p.stem not in pages}:
        stale.unlink()
    for name, text in pages.items():
        keep(out / f"{name}.md", text)


def keep(path: Path, text: str) -> None:
    """Write a page, unless it is as it should be."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pages(ROOT / "docs" / "methods")

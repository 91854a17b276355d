"""Compose docs/hf-parity.md: what is done with each method of Hugging Face PEFT, and what not."""

from __future__ import annotations

from collections import Counter

import generate

from peft_any.cli.report import merges
from peft_any.method import Additive, Tuner
from peft_any.prompt import Attended
from peft_any.registry import absent, method_for, method_names

YES = "yes"
INTRO = """# Parity with Hugging Face PEFT

Made of the methods' contracts, the table of rows (`tests/cases.py`) and the exceptions that the
tests read too (`tests/parity.py`). Differences in kind are on [](hugging-face.md).

## Methods

*Unmerged* counts the rows whose base is recovered from merged weights alone; a model always keeps
its base. *Converted* is `peft-any convert`. A method's page names the fields that are refused.

Where PEFT computes in single precision whatever the dtypes (LLaMA-Adapter's softmax, CPT's table
of shifts, FRoD's U, decompositions of PSOFT, AdaMSS and TinyLoRA), its results are that precise;
ours are as the arrays, and agree with PEFT's to that, or where its casts are taken out, to more."""
MARKED = """## Files of our own

Hugging Face PEFT's files of these lack what its writer alone could tell, and are refused with the
way out; ours hold it, say so, and PEFT refuses them ([](hugging-face.md)). They are compared with
the arrays that PEFT's layers hold. AdaMSS's files are read where the rows of its segments can be
found again without doubt."""
ABSENT = """## Methods that are not here

A file of one is refused with the reason and the way out."""
TABLES = """## Hugging Face PEFT's own tables

The single adapters of its tests of custom models, its pairs of active adapters, and its mixtures of
methods. Merged weights and the outputs of linear layers agree to 1e-5 in single precision. Single
adapters of LoRA, AdaLoRA, IA³, LoHa, LoKr, OFT, BOFT and VeRA stand in our tests case by case; for
those of other methods stand layers and options of our own."""
FIELDS = """## Fields

Every field of every configuration, and of every configuration within one (KaSA's, BD-LoRA's,
VeLoRA's, MonteCLoRA's, …), is set, one at a time, to each of its choices or off its default (where
a field acts alike in all methods, LoRA has every value, and the others take turns). What
PEFT then writes is read, written again byte for byte, merged and applied, and what is written here
PEFT reads and merges, to 1e-10 where it computes in double precision. Of these nothing is left to
compare."""
KINDS = {
    "Idle": "no effect, in PEFT either",
    "Kept": "no effect",
    "Never": "PEFT refuses it",
    "Read": "read, never started here",
    "Refused": "refused",
}
HEAD = "method", "read", "applied", "merged", "unmerged", "trained", "written", "converted to LoRA"


def line(peft_type: str) -> tuple[str, ...]:
    """Say what is done with a method of ours."""
    cls, rows = method_for(peft_type), generate.rows_of(peft_type)
    name = f"[{peft_type}](methods/{peft_type.lower()}.md)"
    if not issubclass(cls, Tuner):
        applied = "`attend`" if issubclass(cls, Attended) else "as virtual tokens"
        return name, YES, applied, "–", "–", YES, YES, "–"
    if not merges(cls):
        return name, YES, YES, "no: it depends on the input", "–", YES, YES, "–"
    undone = Counter(bool(row.reverts) for row in rows)
    back = f"{undone[True]} of {len(rows)} rows" if undone[True] else "the base is kept"
    converted = YES if issubclass(cls, Additive) else "given the base"
    if "Norm" in cls.kinds:
        converted += ", but for norms, which no LoRA adapts"
    own = "by us alone" if cls.marks else "what is begun here, by us alone" if cls.begun else YES
    return name, "ours" if cls.marks else YES, YES, YES, back, YES, own, converted


def compose() -> str:
    """Make the page."""
    from tests import fields, parity  # noqa: PLC0415 - the tests' requirements are the docs'

    refused = [
        (name, why, instead) for name, (why, instead) in sorted(absent().items()) if name != "BONE"
    ]
    marked = [(n, f"`{f}`", why) for n in method_names() for f, why in method_for(n).marks.items()]
    left = [(e.table, e.method, e.number, e.what, e.why) for e in parity.EXCEPTIONS]
    totals = [(table, number, parity.left(table)) for table, number in parity.TOTALS.items()]
    treated = [
        (f"`{key}`", kind, str(getattr(treatment, "why", "")))
        for key, treatment in fields.TREATED.items()
        if (kind := KINDS.get(type(treatment).__name__))
    ]
    treated.sort(key=lambda row: row[1:])
    parts = [
        INTRO,
        generate.table(HEAD, [line(name) for name in method_names()]),
        MARKED,
        generate.table(("method", "field that says so", "why, and the way out"), marked),
        ABSENT,
        generate.table(("method", "why", "instead"), refused),
        TABLES,
        generate.table(("table", "cases", "exceptions"), totals),
        FIELDS,
        generate.table(("field", "what", "why"), treated),
        "## Exceptions",
        generate.table(("table", "method", "cases", "which", "why"), left),
    ]
    return "\n\n".join(parts) + "\n"

"""How many cases Hugging Face PEFT's own tables have, and which are exceptions, with reasons.

The tests in `tests/hf` count and hold them; the page docs/hf-parity.md is made of them.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

CASES, ACTIVE, MIXED = "custom models", "several active", "mixed methods"
"""TEST_CASES, MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, and the pairs of its test_mixed.py."""

CUSTOM = Counter(
    ADALORA=4, ADAMSS=7, BEFT=5, BOFT=12, C3A=6, DEFT=9, DELORA=5, FOURIERFT=6, FROD=5, GLORA=6,
    GRALORA=8, HIRA=14, HRA=5, IA3=22, LILY=5, LN_TUNING=5, LOHA=20, LOKR=23, LORA=46, MISS=8,
    OFT=17, OSF=2, PEANUT=5, PSOFT=10, PVERA=6, RANDLORA=7, ROAD=6, SHIRA=5, SUPERTUNING=5,
    TINYLORA=8, TRAINABLE_TOKENS=1, UNILORA=6, VBLORA=6, VERA=6, WAVEFT=20,
)  # fmt: skip
"""Cases of a single adapter, which stand, one by one, in tests/hf/test_custom_cases.py."""
TOTALS = {CASES: CUSTOM.total(), ACTIVE: 66, MIXED: 34}


class Left(NamedTuple):
    """Cases that are not compared merge by merge.

    Attributes
    ----------
    table, method : str
    number : int
        How many cases.
    what, why : str
    """

    table: str
    method: str
    number: int
    what: str
    why: str


TWICE = "the table has them twice"
BATCH = "no matrix: it depends on the whole batch; outputs are compared"
EXCEPTIONS = [
    Left(CASES, "LORA", 4, "convolutions with groups",
         "PEFT cannot merge them either: the factors mix the channels of all groups"),
    Left(CASES, "LORA", 3, "BD-LoRA", "rows of tests/cases.py, compared live, stand for them"),
    Left(CASES, "LN_TUNING", 1, "with modules_to_save", "PEFT leaves its wrapper after merging"),
    Left(CASES, "OSF", 1, "target_svd_config", "PEFT reads no such field: the case is the other"),
    Left(CASES, "LILY", 5, "every case", BATCH),
    Left(CASES, "WAVEFT", 10, "half of the cases", TWICE),
    Left(ACTIVE, "LORA", 2, "new tokens in both", "PEFT activates one adapter's tokens alone"),
    Left(ACTIVE, "LORA", 1, "two parameters", "PEFT wants the same parameters for all adapters"),
    Left(ACTIVE, "LILY", 2, "every case", BATCH),
    Left(ACTIVE, "WAVEFT", 2, "half of the cases", TWICE),
]  # fmt: skip


def left(table: str, why: str | None = None) -> int:
    """Count the exceptions of a table, of one reason or of all."""
    return sum(e.number for e in EXCEPTIONS if e.table == table and why in (None, e.why))

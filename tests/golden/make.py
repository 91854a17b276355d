"""Record what Hugging Face PEFT makes of every row of the table.

Run in an environment with peft and transformers::

    python -m tests.golden.make            # write tests/golden/<row>.safetensors
    python -m tests.golden.make --check    # compare with what is committed

A file holds the base and merged tensors, the layer's input and output, and, byte for byte, the
adapter's two files (``adapter_config.json`` in the metadata).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.cases import ATTENDED, CASES, PROMPTS, ROUTED, AttendedCase, Case, PromptCase
from tests.golden.compare import TOLERANCE, WEIGHTS, differences
from tests.hf.reference import config_text, run, run_attended, run_prompt

HERE = Path(__file__).parent


def rows() -> Iterator[tuple[str, Case | PromptCase | AttendedCase, str]]:
    """Name every file to make: one for each row, and the first of each method in float64 too."""
    yield from ((case.name, case, "float32") for case in [*PROMPTS, *ATTENDED] if case.hf is None)
    methods = set()
    for case in [*CASES, *ROUTED]:
        if case.hf is not None:
            continue
        yield case.name, case, "float32"
        if case.config.peft_type not in methods:
            methods.add(case.config.peft_type)
            yield f"{case.name}@float64", case, "float64"


def record(
    case: Case | PromptCase | AttendedCase, dtype: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Let Hugging Face PEFT work on a row, and pack what it gives."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(case, PromptCase | AttendedCase):
            inside = isinstance(case, AttendedCase)
            tensors = (run_attended if inside else run_prompt)(case, Path(folder))
            data = (Path(folder) / WEIGHTS).read_bytes()
            tensors[WEIGHTS] = np.frombuffer(data, dtype="uint8")
            return tensors, {"adapter_config.json": config_text(Path(folder))}
        result = run(case, Path(folder), dtype)
        tensors = {f"base.{k}": v for k, v in result.base.items()}
        tensors |= {f"merged.{k}": v for k, v in result.merged.items()}
        if result.x is not None and result.y is not None:
            tensors |= {"x": result.x, "y": result.y}
        texts = {}
        for form, saved in (("", result.folder), ("raw/", result.raw)):
            if saved is not None:
                data = (saved / WEIGHTS).read_bytes()
                tensors[form + WEIGHTS] = np.frombuffer(data, dtype="uint8")
                texts[form + "adapter_config.json"] = config_text(saved)
    return tensors, texts


def tolerance(case: Case | PromptCase | AttendedCase, dtype: str) -> float:
    """Say what may differ from one processor to another.

    Singular vectors turn by what rounding moves the weight, over the gap to the next singular
    value (Wedin 1972): the factors of PiSSA, PSOFT and AdaMSS hold some, and OSF takes some out of
    the weight, of which torch's SVD is in float32.
    """
    if isinstance(case, AttendedCase):
        return 4 * TOLERANCE[dtype]  # of which each of attention's products takes a share
    if isinstance(case, PromptCase):
        return TOLERANCE[dtype]
    config: Any = case.config.at(case.site)
    if (
        config.peft_type == "TINYLORA"
    ):  # its projection's logarithms and sines are single precision's
        return TOLERANCE["float32"]
    if config.peft_type == "FROD":
        return float("inf")  # any rotation is a basis of one layer: rounding chooses; places count
    start = str(getattr(config, "init_lora_weights", ""))
    held = start.startswith("pissa") or config.peft_type in ("ADAMSS", "PSOFT")
    rank = config.r if held else getattr(config, "effective_rank", None)
    if rank is None:
        return TOLERANCE["float32" if case.single else dtype]
    values = np.linalg.svd(case.base(dtype=dtype).weight.astype("float64"), compute_uv=False)
    gap = np.min((values - np.append(values[1:], 0.0))[:rank])
    return float(4 * np.finfo("float32").eps * values[0] / gap)


def main() -> int:
    """Write, or compare; return the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("only", nargs="*", help="names of rows; all by default")
    options = parser.parse_args()
    wrong = 0
    for name, case, dtype in rows():
        if options.only and case.name not in options.only:
            continue
        try:
            tensors, texts = record(case, dtype)
        except Exception:  # noqa: BLE001 - one row that fails does not hide the others
            print(f"{name}: {traceback.format_exc(limit=-4)}")
            wrong += 1
            continue
        path = HERE / f"{name}.safetensors"
        if options.check:
            said = differences(path, tensors, texts, tolerance(case, dtype))
        else:
            path.write_bytes(safetensors.numpy.save(tensors, texts))
            said = [] if path.stat().st_size < 90_000 else ["larger than 90 kB"]
        for line in said:
            print(f"{name}: {line}")
        wrong += bool(said)
    if not options.only:
        wanted = {f"{name}.safetensors" for name, _, _ in rows()}
        for path in sorted(HERE.glob("*.safetensors")):
            if path.name not in wanted:
                print(f"{path.name}: no row of the table has this name")
                wrong += 1
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())

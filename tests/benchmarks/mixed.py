"""Mixed batches: 64 rows of 1 to 32 LoRA adapters, against HF PEFT's loop; and our two paths."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from peft_any import LoraConfig, PeftModel, move
from tests.benchmarks.timing import on_one_thread, over, process_time, ratio, timed

ROWS, RANK = 64, 8
COUNTS = (1, 4, 16, 32)
PATHS = ("stacked", "grouped")
TARGET = 3.0
"""How many times faster than HF PEFT with 16 adapters."""
SHAPES = ((64, 1), (64, 16), (256, 1), (768, 1), (2048, 1))
"""Sides of a square layer, and tokens of each row."""


def model_of(n: int, adapters: int, rank: int = RANK, library: str = "numpy") -> PeftModel:
    """Make a layer (n, n) with LoRA adapters that look trained."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((n, n)), "fc.bias": rng.standard_normal(n)}
    float32 = {k: (v / n**0.5).astype("float32") for k, v in weights.items()}
    model = PeftModel(move(float32, library))
    config = LoraConfig(r=rank, init_lora_weights=False, target_modules=["fc"])
    for i in range(adapters):
        model.add(f"a{i}", config, seed=i)
    return model


def measured() -> Iterator[dict[str, float]]:
    """Time a layer's mixed batch as Hugging Face PEFT calls it, as we do, and its base alone."""
    from tests.benchmarks.hugging_face import mixed_layer_of

    for n, tokens in SHAPES:
        for count in COUNTS:
            model = model_of(n, count, library="torch")
            names = [f"a{i % count}" for i in range(ROWS)]
            x = move(np.random.default_rng(1).standard_normal((ROWS, tokens, n)), "torch").float()
            ours, theirs = model.bind(rows=names).layers["fc"], mixed_layer_of(model, names)
            gap = np.abs(np.asarray(ours(x)) - np.asarray(theirs(x))).max()
            assert gap < 1e-4, f"{n}, {count}: calls differ by {gap:.1e}"
            calls: dict[str, Any] = {
                "hf": partial(theirs, x),
                "ours": partial(ours, x),
                "base": partial(ours.base, x),
            }
            found = timed(calls, seconds=1.0)
            own = [
                (a - b) / max(c - b, 1e-7)
                for a, c, b in zip(found["hf"], found["ours"], found["base"], strict=True)
            ]
            yield {
                "n": n,
                "tokens": tokens,
                "adapters": count,
                "whole": over(found, "hf", "ours"),
                "own": float(np.median(own)),
                "most": over(found, "hf", "base"),
            }


def against_hf() -> Iterator[str]:
    """Compare a mixed batch with Hugging Face PEFT's: a layer, and what adapters add to it."""
    yield (
        f"| {ROWS} rows, LoRA r{RANK}, on torch | adapters | HF PEFT ÷ ours | beside the base's "
        "own product | the most that could be |"
    )
    yield "|---|---|---|---|---|"
    if importlib.util.find_spec("peft") is None:
        return
    for one in measured():
        n, tokens, count, whole = (one[k] for k in ("n", "tokens", "adapters", "whole"))
        miss = " (missed)" if count == 16 and whole < TARGET else ""
        where = f"{n}×{n}, {tokens} a row"
        yield f"| {where} | {count} | {whole:.1f}{miss} | {one['own']:.1f} | {one['most']:.1f} |"


def bound_anew(layer: Any, path: str, x: Any) -> Any:
    """Call a layer that has gathered nothing yet."""
    return replace(layer, path=path)(x)


def paths() -> Iterator[str]:
    """Compare our two paths, called often and bound anew: what chooses between them."""
    yield (
        "| numbers gathered for each adapter | library | stacked ÷ grouped | the same, bound anew |"
    )
    yield "|---|---|---|---|"
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    sizes = product((64, 512, 2048), (8, 64), (8, 64, 256), (2, 8, 32))
    libraries = [name for name in ("numpy", "torch") if importlib.util.find_spec(name)]
    for (n, rank, rows, count), library in product(sizes, libraries):
        if count > rows or rows * n > 1 << 18:
            continue
        names = [f"a{i % count}" for i in range(rows)]
        mixed = model_of(n, count, rank, library).bind(rows=names).layers["fc"]
        x = move(np.ones((rows, 1, n), "float32"), library)
        pair = [replace(mixed, path=path) for path in PATHS]
        calls = [partial(one, x) for one in pair]
        anew = [partial(bound_anew, mixed, path, x) for path in PATHS]
        bits = (rank * 2 * n * rows // count - 1).bit_length()
        found.setdefault((1 << max(14, bits + bits % 2), library), []).append(
            (ratio(*calls, 8, process_time), ratio(*anew, 8, process_time))
        )
    for (bucket, library), pairs in sorted(found.items()):
        call, again = (
            float(np.exp(np.mean(np.log(column)))) for column in zip(*pairs, strict=True)
        )
        yield f"| up to {bucket:,} | {library} | {call:.2f} | {again:.2f} |"


def mixed_batches() -> Iterator[str]:
    """Both tables, from a process of one thread."""
    yield from on_one_thread("tests.benchmarks.mixed")


if __name__ == "__main__":
    if "--json" in sys.argv:
        for one in measured():
            print(json.dumps(one), flush=True)
    else:
        for table in (against_hf, paths):
            print(*table(), "", sep="\n", flush=True)

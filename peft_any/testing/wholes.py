"""Laws of a method within a model: merged on disk, by rows, as a product of factors, by blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from peft_any import parts as several
from peft_any.adapter import Adapter
from peft_any.backend import numpy_dtype
from peft_any.blocks import diagonal
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.layer import Dense
from peft_any.oneshot import merge
from peft_any.parts import Part
from peft_any.surgery.merge import merge_checkpoint
from peft_any.surgery.rounding import nearest, widened
from peft_any.testing.case import Case
from peft_any.testing.closeness import gap
from peft_any.testing.laws import must, same, told


def adapter_of(case: Case, base: Dense, seed: int = 1) -> Adapter:
    """Make an adapter of a case's site, as training leaves it, in double precision."""
    p = case.params(base, seed, "float64")
    names = case.resolved.shared_shapes([case.site])
    shared = {k: p.pop(k) for k in names if k in p}
    return Adapter(case.config, {case.site.name: p}, shared)


def tensors_of(base: Dense) -> dict[str, Any]:
    """Lay a layer out as a checkpoint."""
    tensors: dict[str, Any] = {base.site.weight: np.ascontiguousarray(base.stored())}
    if base.bias is not None:
        tensors[base.site.bias_name] = base.bias
    return tensors


def on_disk(case: Case, dtype: str = "float32", folder: Path | None = None) -> None:
    """Check that a checkpoint is merged on disk as its weights are in memory, rounded once."""
    if folder is None:
        with TemporaryDirectory() as made:
            on_disk(case, dtype, Path(made))
        return
    base, kinds = case.base(3), {case.site.name: case.site}
    weights = {k: v.astype(numpy_dtype(dtype)) for k, v in tensors_of(base).items()}
    adapter = adapter_of(case, case.base(3, dtype="float64"))
    file, out = folder / "base.safetensors", folder / "merged.safetensors"
    write_safetensors(file, weights, {"format": "pt"})
    with told(case, "a checkpoint cannot be merged with it"):
        receipt = merge_checkpoint(file, adapter, out, kinds=kinds)
        exact = merge({k: v.astype("float64") for k, v in weights.items()}, adapter, kinds=kinds)
    merged = read_safetensors(out)
    must(merged.keys() == weights.keys(), case, f"a merged checkpoint has {', '.join(merged)}")
    # float32 may part where double precision itself ends; bfloat16 has room to spare
    rtol = 0.0 if dtype == "bfloat16" else 2e-7
    for key, held in exact.items():
        value: Any = held
        close = np.allclose(widened(merged[key]), widened(nearest(value, dtype)), rtol, 0.0)
        must(close, case, f"{key} is merged on disk otherwise than in memory: is it `separable`?")
    moved = {key for key, value in exact.items() if np.any(value != widened(weights[key]))}
    missed = moved - {change.tensor for change in receipt.changes}
    must(not missed, case, f"the receipt of a merge does not name {', '.join(missed)}")


def rows_apart(case: Case, seed: int, start: int, stop: int) -> None:
    """Check that rows `start` to `stop` merge by themselves, if the method is `separable`."""
    config, site = case.resolved, case.site
    bias = config.changes_bias(site) or site.bias
    base = case.base(seed, dtype="float64", bias=bias)
    part, rows = Part(config, case.params(base, seed, "float64")), slice(start, stop)
    cut = several.cut(part, site, rows)
    if cut is None:
        plain = site.groups == 1 and site.kind not in {"Conv1D", "Embedding"}
        kept = config.frozen & part.params.keys()  # it needs the base that it began from
        must(kept or not (plain and config.separable), case, "its parameters cannot be cut by rows")
        return
    whole = config.merge(part.params, base)
    shift = None if base.bias is None else base.bias[rows]
    own = config.merge(
        cut.params, Dense(base.weight[rows], shift, replace(site, n_out=stop - start))
    )
    why = "it says that it is separable, and its rows depend on one another"
    must(np.allclose(own.weight, whole.weight[rows], 1e-12, 1e-14), case, why)
    if base.bias is not None:
        must(np.allclose(own.bias, whole.bias[rows], 1e-12, 1e-14), case, why)


def product(case: Case) -> None:
    """Check that the factors of `product`, if it gives any, are what merging adds."""
    config, base = case.resolved, case.base(dtype="float64")
    p = case.params(base, dtype="float64")
    pair = config.product(p, base)
    if pair is not None:
        off = gap(pair[0] @ pair[1], config.merge(p, base).weight - base.weight)
        must(off <= 1e-12, case, f"product is not what merge adds to the weight, by {off:.2g}")


def blockwise(case: Case) -> None:
    """Check that what `blockwise` gives, if anything, makes what merging makes of the weight."""
    config, base = case.resolved, case.base(dtype="float64")
    p = case.params(base, dtype="float64")
    if (found := config.blockwise(p, case.site)) is not None:
        blocks, gain = found
        k = base.weight.shape[1] // blocks.shape[-1]
        repeated = np.broadcast_to(blocks, (k, *blocks.shape[1:]))
        made = base.weight @ diagonal([*repeated])
        off = gap(made if gain is None else made * gain[:, None], config.merge(p, base).weight)
        must(off <= 1e-12, case, f"blockwise is not what merge makes of the weight, by {off:.2g}")


def bound(case: Case) -> None:
    """Check that a model with the adapter gives the layer that `merge` gives, applied or merged."""
    config, base = case.resolved, case.base(dtype="float64")
    adapter = adapter_of(case, base)
    p = {**adapter.shared, **adapter.sites[case.site.name]}
    with told(case, "a model cannot be given it"):
        merged = merge(tensors_of(base), adapter, kinds={case.site.name: case.site})
    want = tensors_of(config.merge(p, base))
    wrong = [k for k, v in want.items() if not (same(merged[k], v) or gap(merged[k], v) <= 1e-14)]
    must(not wrong, case, f"a model merges {', '.join(wrong)} otherwise than the method")

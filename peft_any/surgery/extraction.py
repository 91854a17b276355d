"""A LoRA out of two checkpoints, layer by layer, with a receipt of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft_any._typing import DTypeLike
from peft_any.adapter import Adapter
from peft_any.algebra.lowrank import Cut, Factors, pad
from peft_any.algebra.written import Update, lora_adapter
from peft_any.arguments import checked
from peft_any.backend import Backend, resolve
from peft_any.errors import UsageError, VerifyError
from peft_any.io._atomic import StrPath
from peft_any.io._urls import place_of
from peft_any.io.checkpoint import Checkpoint, output_directory
from peft_any.io.config import TENSORS
from peft_any.io.safetensors import SafetensorsFile
from peft_any.layer import Site
from peft_any.origin import made_on
from peft_any.receipt import Clock, peak_memory, versions
from peft_any.selection import in_projection
from peft_any.surgery.beside import described
from peft_any.surgery.choice import EngineLike, engine_of
from peft_any.surgery.couple import Couple, Sound
from peft_any.surgery.division import Division, divide
from peft_any.surgery.engines import Engine
from peft_any.surgery.extracted import Extraction, Layer
from peft_any.surgery.factoring import Comparing, Factored, Factoring, Names
from peft_any.surgery.job import Progress
from peft_any.surgery.measure import all_finite
from peft_any.surgery.merge import refuse_existing, storage_dtype
from peft_any.surgery.sources import Kinds

RECEIPT = "extract_receipt.json"


@checked
def extract(
    base: StrPath,
    model: StrPath,
    out: StrPath | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: DTypeLike = "float32",
    embeddings: bool = False,
    overwrite: bool = False,
    strict: bool = True,
    progress: Progress | None = None,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    seed: int = 0,
    engine: EngineLike = "local",
) -> Extraction:
    """Extract a LoRA from a model and the base that it was fine-tuned from.

    Every layer whose weight differs gets factors B·A of its difference Δ, with s = 1. They are
    the best of their rank, or proved to have at most 1.01 times the smallest residual
    (`algebra.rangefinder`). Norms, biases and embeddings that differ are carried whole. Layers
    are read, factored and dropped one at a time.

    Parameters
    ----------
    base, model : path
        Two checkpoints of one architecture, as `Checkpoint` reads them.
    out : path, optional
        The adapter's directory; the receipt goes there as ``extract_receipt.json``.
    rank : int, optional
        Of every layer's factors.
    energy : float, optional
        Instead, each layer gets the smallest rank that holds this share of ‖Δ‖², at most `rank`
        if both are given. A layer whose factors would be no smaller than itself is carried whole.
    dtype : str
        Of the factors: ``"float32"``, ``"bf16"`` …
    embeddings : bool
        Whether embeddings and output heads get factors too.
    overwrite, strict, progress, backend, kinds
        As for `merge_checkpoint`. With `strict` false, tensors that only one side has, and
        parameters that a LoRA's file cannot carry, are left out and recorded.
    seed : int
        Of the random directions.
    engine : str or Engine
        What compares the models and factors the layers; see `surgery.choice.engine_of`.

    Returns
    -------
    Extraction

    Raises
    ------
    PeftError
        Before anything is written: listing all tensors that do not match, are damaged or
        quantised, or cannot be carried. `VerifyError` if the factors overflow `dtype`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from peft_any import write_safetensors
    >>> w, change = np.eye(4, dtype="float32"), np.ones((4, 4), dtype="float32")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/base.safetensors", {"fc.weight": w})
    ...     write_safetensors(f"{folder}/tuned.safetensors", {"fc.weight": w + change})
    ...     found = extract(f"{folder}/base.safetensors", f"{folder}/tuned.safetensors", rank=1)
    >>> found.adapter.sites["fc"]["lora_A.weight"].shape, round(found.layers[0].delta_norm, 3)
    ((1, 4), 4.0)
    """
    clock = Clock()
    if rank is None and energy is None:
        raise UsageError("extract: nothing says how large the factors are: give rank= or energy=")
    cut, to, dtype = Cut(rank=rank, energy=energy), resolve(backend), storage_dtype(dtype)
    does = engine_of(engine)
    with Checkpoint(base) as one, Checkpoint(model) as two:
        if out is not None:
            refuse_existing(place_of(out), overwrite)
        couple = Couple(one, two)
        compared = partial(_compared, does, couple)
        division = divide(couple, compared, kinds, embeddings=embeddings, strict=strict)
        recipe = Factoring.of(division.couple, cut, backend=str(to), dtype=dtype, seed=seed)
        work = _Work(division, recipe, does, progress)
        clock.lap("compare")
        made: list[Extraction] = []

        def tell(folder: Path) -> None:
            found = replace(made.pop(), seconds=clock.lap("sync"), peak_memory=peak_memory())
            (folder / RECEIPT).write_text(found.to_json() + "\n", encoding="utf-8")
            made.append(found)

        writing: AbstractContextManager[Path | None] = nullcontext()
        if out is not None:
            inputs = [one.source, two.source]
            writing = output_directory(out, overwrite, inputs=inputs, last=tell)
        with writing as folder:
            adapter = work.run()
            one.refuse_changes()
            two.refuse_changes()
            origin = made_on(one, work.division.sites.values())
            adapter = adapter.replace(metadata={**adapter.metadata, **origin})
            done = Extraction(
                adapter,
                described(base, one),
                described(model, two),
                tuple(work.layers),
                {name: tuple(a.shape) for name, a in adapter.extra.items()},
                division.same,
                division.left,
                (*division.left, *division.notes, *work.notes),
                options={
                    "rank": rank, "energy": energy, "dtype": dtype, "embeddings": embeddings,
                    "strict": strict, "backend": str(to), "seed": seed,
                },
                versions=versions(),
            )  # fmt: skip
            if folder is not None:
                adapter.save(folder)
                with SafetensorsFile(folder / TENSORS) as written:
                    done = replace(done, out=described(out or "", written))
            made.append(replace(done, seconds=clock.lap("extract"), peak_memory=peak_memory()))
    return made[0]


def _compared(engine: Engine, couple: Couple, groups: list[Names]) -> dict[str, Sound]:
    """Have an engine say which tensors differ."""
    found: dict[str, Sound] = {}
    engine.run(Comparing.of(couple), groups, lambda _, differing: found.update(differing))
    return found


@dataclass
class _Work:
    """One extraction under way."""

    division: Division
    recipe: Factoring
    engine: Engine
    progress: Progress | None
    layers: list[Layer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Adapter:
        """Factor every layer, and put the adapter together."""
        pairs = self._pairs()
        whole = [name for name in pairs if self._no_smaller(name, pairs[name])]
        if whole:
            self.division = self.division.saving(whole)
            self.layers = [layer for layer in self.layers if layer.module not in whole]
            said = "their factors would be no smaller than they are"
            self.notes.append(f"{', '.join(whole)}: saved whole: {said}")
        sites = self.division.sites
        cut, dtype = self.recipe.cut, self.recipe.dtype
        pairs = _padded({name: pairs[name] for name in sites}, cut)
        adapter = lora_adapter([Update(sites[n], pairs[n]) for n in sites], dtype=dtype)
        params = adapter.sites
        bad = [name for name, p in params.items() if not all(map(all_finite, p.values()))]
        if bad:
            raise VerifyError(
                f"{', '.join(bad)}: the factors cannot be stored: they overflow {dtype}; give "
                "a dtype with a larger range (--dtype float32 or bfloat16)"
            )
        extra = {name: self.division.couple.tensors(name)[1] for name in self.division.copies}
        numbers = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        ranks: dict[str, Any] = {n: getattr(adapter.config, n) for n in numbers}
        return adapter.replace(config=replace(self.division.config, **ranks), extra=extra)

    def _pairs(self) -> dict[str, Factors]:
        sites = self.division.sites
        sizes = {n: self.division.survey.shapes[s.weight].nbytes for n, s in sites.items()}
        found: dict[str, Factored] = {}

        def done(site: Site, result: Factored) -> None:
            found[site.name] = result
            if self.progress is not None:
                self.progress(sum(sizes[name] for name in found), total, site.weight)

        total = sum(sizes.values())
        self.engine.run(self.recipe, sites.values(), done)
        self.layers = [found[name][1] for name in sites]
        return {name: found[name][0] for name in sites}

    def _no_smaller(self, name: str, pair: Factors) -> bool:
        """Whether an energy asks for so many factors that the layer itself is smaller."""
        (m, k), (_, n) = pair[0].shape, pair[1].shape
        sites = self.division.sites
        packed = any(
            sites[half].kind == "MultiheadAttention"
            for half in (name, in_projection(name))
            if half in sites
        )
        return self.recipe.cut.reads_values and not packed and k * (m + n) >= m * n


def _padded(pairs: Mapping[str, Factors], cut: Cut) -> dict[str, Factors]:
    """Bring factors to one rank, unless an energy has given each its own."""
    if cut.reads_values:
        return dict(pairs)
    return {name: pad(pair, cut.rank or 1) for name, pair in pairs.items()}

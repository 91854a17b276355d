"""The demo: a published network is fine-tuned, and takes an adapter that Hugging Face PEFT trained.

The network is `nn-medium` of NeuralFoil (Peter Sharpe, MIT licence,
https://github.com/peterdsharpe/NeuralFoil): the aerodynamics of an airfoil from its shape and the
flow. The adapter brings it nearer to the larger `nn-xlarge` on sections of small gliders. These are
real published weights; what the adapter learned from is the larger network, no wind tunnel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_any._typing import Array
from peft_any.adapter import Adapter
from peft_any.backend import Backend, from_numpy, move, resolve, to_numpy
from peft_any.demo.airfoil import BACK, FILES, averaged, errors, network, with_mirror_images
from peft_any.demo.figure import picture
from peft_any.demo.specialise import ABOUT, METHODS, STEPS, UNSEEN, specialise
from peft_any.errors import StorageError, VerifyError
from peft_any.io._atomic import StrPath
from peft_any.io.safetensors import read_safetensors
from peft_any.model import PeftModel
from peft_any.receipt import SCHEMA_VERSION, Host, Receipt
from peft_any.surgery.merge import merge_checkpoint
from peft_any.surgery.threads import one_blas_thread
from peft_any.surgery.verify import verify_checkpoint

ROUNDING = 1e-6
"""What weights may differ by, relative to the largest: eight units in float32's last place."""
SUMS = 1e-4
"""What outputs of the whole network may differ by, where sums are taken in another order."""


def run(out: Callable[[str], None] = print, backend: str | Backend = "auto") -> Receipt:
    """Attach, call, merge, compare, unmerge, save, reload, and merge on disk.

    Parameters
    ----------
    out : callable
        Gets each line.
    backend : str or Backend
        As for `resolve`.

    Returns
    -------
    Receipt
        Of the merge on disk.

    Raises
    ------
    VerifyError
        If a result is not what it must be.
    BackendError
        If the library is not there.

    Examples
    --------
    >>> lines = []
    >>> receipt = run(lines.append, "numpy")
    >>> receipt.copied, len(receipt.changes)
    (6, 4)
    """
    to = resolve(backend)
    base = move(read_safetensors(FILES / "nn-medium.safetensors"), to)
    adapter = Adapter.load(FILES / "adapter", to)
    model = PeftModel(base)
    model.add("glider", adapter)
    out(f"network    nn-medium of NeuralFoil: {len(base) // 2} layers, on {to.name}")
    wrote = adapter.config.peft_version
    out(f"adapter    {adapter.config.peft_type} at {len(adapter.sites)} layers, by PEFT {wrote}")
    out(f"           {model.parameters}")
    merged = model.merge()
    _call(model, merged, to, out)
    _compare(model, merged, out)
    _save(adapter, out)
    with tempfile.TemporaryDirectory() as folder:
        source = FILES / "nn-medium.safetensors", FILES / "adapter"
        receipt = merge_checkpoint(*source, Path(folder) / "merged", backend=to)
        verify_checkpoint(*source, FILES / "merged.safetensors", backend=to)
    out("audited    both merges, on disk and Hugging Face PEFT's: what the adapter asks for")
    return receipt


def train(
    backend: str | Backend = "auto",
    *,
    methods: Sequence[str] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    out: StrPath | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Specialise the network to a design space by several methods, and compare them.

    Parameters
    ----------
    backend : str or Backend
        As for `resolve`. For Dask, whose graphs cost a second for each of these small steps,
        NumPy trains.
    methods : sequence of str, optional
        Of "head", "bias", "lora", "dora", "oft" and "full"; all by default.
    steps, seed : int
        Training steps of each; the seed of flights, initial values and batches.
    out : path, optional
        Where adapters are kept, and ``demo.png`` if Matplotlib is there.
    tell : callable
        Gets the name of each method as it starts.

    Returns
    -------
    dict
        A document for JSON: ``rows``, one for each method; ``curves``, errors of CL while it was
        trained; ``merged_equals_adapted``; what was run.

    Raises
    ------
    UsageError
        If a method is not known, or there is no step.
    StorageError
        If `out` exists.
    VerifyError
        If a merged network answers otherwise than the adapted one.
    """
    to = resolve(backend)
    if to.name == "dask":
        to = resolve("numpy")
    chosen = list(METHODS if methods is None else methods)
    said, figure = [], None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if out is None else out)
        if out is not None:
            if folder.exists():
                raise StorageError(f"{folder}: is already there: name a new directory")
            folder.mkdir(parents=True)
        with one_blas_thread():  # the products are so small that more only wait for one another
            found = specialise(to, methods=chosen, steps=steps, seed=seed, folder=folder, tell=tell)
        counts = {row.method: row.trainable for row in found.rows}
        if out is not None:
            said.append(f"kept in {out}: the adapters")
            if found.curves and picture(found.curves, counts, folder / "demo.png"):
                figure = str(folder / "demo.png")
                said[-1] += " and demo.png"
        elif found.curves:
            said.append("--out DIRECTORY keeps the adapters and, where Matplotlib is, a figure")
    if found.merged_equals_adapted:
        said.append("adapters saved, read again and merged: the answers of the adapted networks")
    about = f"{ABOUT} {steps} steps on {to.name}, {UNSEEN} unseen flights."
    run = {"backend": to.name, "steps": steps, "seed": seed, "figure": figure}
    head = {"schema_version": SCHEMA_VERSION, "data": about, "said": said}
    return {**head, **found.to_dict(), **run}


def _call(
    model: PeftModel, merged: Mapping[str, Array], to: Backend, out: Callable[[str], None]
) -> None:
    """Call the network plain, with the adapter beside it, and merged."""
    flights = read_safetensors(FILES / "flights.safetensors")
    inputs = flights["inputs"]
    x = from_numpy(with_mirror_images(inputs), to)
    plain, beside, after = (
        to_numpy(network(weights, x)) for weights in (model.weights, model.bind().weights, merged)
    )
    before, now = (errors(averaged(y, BACK), flights["nn_xlarge"]) for y in (plain, beside))
    out(f"called     on {len(inputs)} flights; mean difference from the larger nn-xlarge:")
    out(f"           without the adapter lift {before[0]:.4f} and drag {before[1]:.1%}")
    out(f"           with the adapter    lift {now[0]:.4f} and drag {now[1]:.1%}")
    if not (now[0] < before[0] and now[1] < before[1]):
        raise VerifyError("the adapter must bring the network nearer to nn-xlarge, and does not")
    gap = _agree("the merged network", beside, after, SUMS)
    out(f"merged     the same outputs as with the adapter beside the network: to {gap:.1e}")


def _compare(model: PeftModel, merged: Mapping[str, Array], out: Callable[[str], None]) -> None:
    """Compare the merge with Hugging Face PEFT's, and take it back."""
    theirs = read_safetensors(FILES / "merged.safetensors")
    gap = max(_agree(name, to_numpy(merged[name]), w, ROUNDING) for name, w in theirs.items())
    out(f"compared   with Hugging Face PEFT's own merge: largest difference {gap:.1e}")
    back = model.unmerge(merged)
    gap = max(
        _agree(name, to_numpy(back[name]), to_numpy(w), ROUNDING)
        for name, w in model.weights.items()
    )
    out(f"unmerged   from the merged weights alone: the network again, to {gap:.1e}")


def _save(adapter: Adapter, out: Callable[[str], None]) -> None:
    """Save the adapter and read it again."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter"
        adapter.save(copy)
        Adapter.load(copy)
        for file in (FILES / "adapter").iterdir():
            if (copy / file.name).read_bytes() != file.read_bytes():
                raise VerifyError(f"{file.name}: saved again, it is not what it was")
    out("saved      and read again: byte for byte the files that Hugging Face PEFT wrote")


def _agree(what: str, ours: Host, theirs: Host, bound: float) -> float:
    """Give the largest difference, which must stay below a share of the largest value."""
    gap = float(np.max(np.abs(ours - theirs)))
    scale = float(np.max(np.abs(theirs)))
    if not gap <= bound * scale:
        raise VerifyError(
            f"{what}: differs by {gap:.2e} from what it must be, more than {bound:g} of {scale:.2g}"
        )
    return gap

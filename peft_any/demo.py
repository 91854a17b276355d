"""The demo: a published network takes an adapter that Hugging Face PEFT trained, on any library.

The network is `nn-medium` of NeuralFoil (Peter Sharpe, MIT licence,
https://github.com/peterdsharpe/NeuralFoil): the aerodynamics of an airfoil from its shape and the
flow. The adapter brings it nearer to the larger `nn-xlarge` on sections of small gliders. These are
real published weights; what the adapter learned from is the larger network, no wind tunnel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_any._typing import Array
from peft_any.adapter import Adapter
from peft_any.backend import Backend, from_numpy, move, namespace, resolve, to_numpy
from peft_any.errors import VerifyError
from peft_any.io.safetensors import read_safetensors
from peft_any.model import PeftModel
from peft_any.receipt import Host, Receipt
from peft_any.surgery import merge_checkpoint, verify_checkpoint

FILES = Path(__file__).parent / "_demo"
ROUNDING = 1e-6
"""What weights may differ by, relative to the largest: eight units in float32's last place."""
SUMS = 1e-4
"""What outputs of the whole network may differ by, where sums are taken in another order."""
LIFT, DRAG = 1, 2
"""Outputs: twice the lift coefficient, and half the drag coefficient's logarithm, shifted."""


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


def _call(
    model: PeftModel, merged: Mapping[str, Array], to: Backend, out: Callable[[str], None]
) -> None:
    """Call the network plain, with the adapter beside it, and merged."""
    flights = read_safetensors(FILES / "flights.safetensors")
    inputs = flights["inputs"]
    both = np.concatenate([inputs, inputs[:, flights["mirror_order"]] * flights["mirror_sign"]])
    x = from_numpy(both, to)
    with model.disabled():
        plain = _network(model.bind().layers, x)
    beside = _network(model.bind().layers, x)
    after = _network(PeftModel(merged).bind().layers, x)
    before, now = (_errors(y, flights["nn_xlarge"]) for y in (plain, beside))
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


def _network(layers: Mapping[str, Any], x: Array) -> Host:
    """Evaluate the network (…, 25) -> (…, 198): swish between the layers."""
    xp = namespace(x)
    names = sorted(layers, key=lambda name: int(name.partition(".")[2]))
    for name in names[:-1]:
        x = layers[name](x)
        x = x * (0.5 + 0.5 * xp.tanh(0.5 * x))
    return to_numpy(layers[names[-1]](x))


def _errors(y: Host, want: Host) -> tuple[float, float]:
    """Average over flights and mirror images, as NeuralFoil does; mean errors of lift and drag.

    Parameters
    ----------
    y : array (2·flights, 198)
        The mirror images last; lift has the other sign in them.
    want : array (flights, 3)
        Averaged lift, drag and moment, in the network's units.
    """
    upright, mirrored = np.split(y, 2)
    lift = (upright[:, LIFT] - mirrored[:, LIFT]) / 2
    drag = (upright[:, DRAG] + mirrored[:, DRAG]) / 2
    off = np.mean(np.abs(lift - want[:, 0])) / 2, np.mean(np.abs(drag - want[:, 1])) * 2
    return float(off[0]), float(off[1])


def _agree(what: str, ours: Host, theirs: Host, bound: float) -> float:
    """Give the largest difference, which must stay below a share of the largest value."""
    gap = float(np.max(np.abs(ours - theirs)))
    scale = float(np.max(np.abs(theirs)))
    if not gap <= bound * scale:
        raise VerifyError(
            f"{what}: differs by {gap:.2e} from what it must be, more than {bound:g} of {scale:.2g}"
        )
    return gap

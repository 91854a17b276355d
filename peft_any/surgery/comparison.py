"""How two checkpoints differ, tensor by tensor; and `diff`, for them as for adapters."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from peft_any.adapter import Adapter
from peft_any.algebra.difference import AdapterDifference, compare_adapters
from peft_any.algebra.terms import Base
from peft_any.arguments import checked
from peft_any.backend import Backend, is_floating
from peft_any.errors import StorageError, UsageError
from peft_any.io._atomic import StrPath
from peft_any.io._urls import is_url, path_of
from peft_any.io.checkpoint import Checkpoint
from peft_any.io.config import CONFIG_NAME, TENSORS
from peft_any.receipt import SCHEMA_VERSION, plain, to_json
from peft_any.surgery.beside import described
from peft_any.surgery.couple import Couple
from peft_any.surgery.job import Progress
from peft_any.surgery.measure import equal_bytes, measure
from peft_any.surgery.sources import Kinds

Side: TypeAlias = StrPath | Adapter


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs.

    Attributes
    ----------
    tensor : str
    state : str
        ``identical`` to the last bit; ``equal`` numbers in other dtypes or signs of zero;
        ``differs``; ``shape`` where the shapes differ; ``only a`` or ``only b``.
    dtype, shape : (a's, b's)
        None where a side does not have the tensor.
    norm, change : float or None
        ‖A‖ and ‖B − A‖.
    most : float or None
        The largest |B − A|.
    cosine : float or None
        ⟨A, B⟩/(‖A‖·‖B‖).
    """

    tensor: str
    state: str
    dtype: tuple[str | None, str | None]
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    norm: float | None = None
    change: float | None = None
    most: float | None = None
    cosine: float | None = None

    @property
    def relative(self) -> float | None:
        """‖B − A‖/‖A‖."""
        return self.change / self.norm if self.norm and self.change is not None else None


@dataclass(frozen=True)
class CheckpointDifference:
    """What `diff` finds of two checkpoints; `to_json` is what ``--json`` prints.

    Attributes
    ----------
    a, b : dict
        Path, fingerprint, number of tensors, bytes.
    tensors : tuple of TensorDifference
    """

    a: dict[str, Any]
    b: dict[str, Any]
    tensors: tuple[TensorDifference, ...]

    @property
    def states(self) -> dict[str, int]:
        """How many tensors are in each state."""
        return dict(Counter(one.state for one in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as in the JSON."""
        head = {"schema_version": SCHEMA_VERSION, "kind": "diff", "of": "checkpoints"}
        found: dict[str, Any] = plain(head | {"states": self.states} | asdict(self))
        for entry, one in zip(found["tensors"], self.tensors, strict=True):
            entry["relative"] = one.relative
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """Give one JSON document."""
        return to_json(self.to_dict(), indent)


@checked
def diff(
    a: Side,
    b: Side,
    base: Base = None,
    *,
    backend: str | Backend = "auto",
    kinds: Kinds = None,
    strict: bool = True,
    progress: Progress | None = None,
) -> AdapterDifference | CheckpointDifference:
    """Compare two adapters, or two checkpoints.

    Adapters are compared by what they add to each layer, ΔA and ΔB, whatever their methods:
    norms, the cosine between them, and the angles between the spaces that they write and read. It
    takes their factors alone; where a method has none, ΔA is formed. Checkpoints are compared
    tensor by tensor, in blocks of rows.

    Parameters
    ----------
    a, b : path or Adapter
    base : path or mapping of str to array, optional
        Of two adapters: needed where the change depends on it (DoRA, OFT …).
    backend, kinds, strict, progress
        As for `merge_checkpoint`; the first two are for adapters.

    Returns
    -------
    AdapterDifference or CheckpointDifference

    Raises
    ------
    UsageError
        If one is an adapter and the other is none, or a base is given for checkpoints.
    PeftError
        If they cannot be read, or do not fit each other.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> config = LoraConfig(r=1, lora_alpha=1, target_modules=["fc"])
    >>> def lora(x, y):
    ...     pair = {"lora_A.weight": np.asarray([[x, y]]), "lora_B.weight": np.ones((3, 1))}
    ...     return Adapter(config, {"fc": pair})
    >>> layer = diff(lora(3.0, 0.0), lora(3.0, 4.0)).layers[0]
    >>> round(layer.cosine, 6), round(layer.outputs[0], 6), round(layer.inputs[0], 6)
    (0.6, 1.0, 0.6)
    """
    of_adapters = [_is_adapter(side) for side in (a, b)]
    if all(of_adapters):
        options: dict[str, Any] = {"backend": backend, "kinds": kinds, "strict": strict}
        return compare_adapters(a, b, base, **options, progress=progress)
    if any(of_adapters):
        lone, other = (a, b) if of_adapters[0] else (b, a)
        assert not isinstance(other, Adapter)  # noqa: S101 - told above
        if not is_url(other) and not Path(other).exists():
            raise StorageError(f"{other}: there is no such adapter or model; check the spelling")
        raise UsageError(f"{lone}: is an adapter, and cannot be compared with a model: give two")
    if base is not None:
        raise UsageError("base: is for two adapters: models are compared as they are")
    assert not isinstance(a, Adapter)  # noqa: S101 - told above
    assert not isinstance(b, Adapter)  # noqa: S101 - likewise
    with Checkpoint(a) as one, Checkpoint(b) as two:
        couple = Couple(one, two)
        names = [*dict.fromkeys((*one, *two))]
        sizes = [max(info.nbytes for info in couple.infos(n) if info is not None) for n in names]
        done, found = 0, []
        for name, size in zip(names, sizes, strict=True):
            found.append(_tensor(couple, name))
            done += size
            if progress is not None:
                progress(done, sum(sizes), name)
        one.refuse_changes()
        two.refuse_changes()
        return CheckpointDifference(described(a, one), described(b, two), tuple(found))


def _is_adapter(side: Side) -> bool:
    if isinstance(side, Adapter):
        return True
    if is_url(side):
        from peft_any.io._remote import holds  # noqa: PLC0415 - URLs alone need it

        url = os.fspath(side)
        return url.endswith((CONFIG_NAME, TENSORS)) or holds(url, CONFIG_NAME)
    path = Path(path_of(side))
    return (path / CONFIG_NAME).is_file() or path.name in (CONFIG_NAME, TENSORS)


def _tensor(couple: Couple, name: str) -> TensorDifference:
    one, two = couple.infos(name)
    dtypes = (None if one is None else one.dtype, None if two is None else two.dtype)
    shapes = (None if one is None else tuple(one.shape), None if two is None else tuple(two.shape))
    if one is None or two is None:
        return TensorDifference(name, "only b" if one is None else "only a", dtypes, shapes)
    if shapes[0] != shapes[1]:
        return TensorDifference(name, "shape", dtypes, shapes)
    here, there = couple.tensors(name)
    if equal_bytes(here, there):
        return TensorDifference(name, "identical", dtypes, shapes)
    state = "equal" if couple.equal(name) else "differs"
    if not (is_floating(here) and is_floating(there)):
        return TensorDifference(name, state, dtypes, shapes)
    sums = measure(here, there, exact=there)
    # ⟨A, B⟩ = (‖A‖² + ‖B‖² − ‖B − A‖²)/2
    other2 = measure(there, there, delta=there).base2
    lengths = sqrt(sums.base2) * sqrt(other2)
    cosine = (sums.base2 + other2 - sums.delta2) / 2 / lengths if lengths else None
    most = max((float(np.max(np.abs(gap))) for _, gap in couple.gaps(name) if gap.size), default=0)
    return TensorDifference(
        name, state, dtypes, shapes, sqrt(sums.base2), sqrt(sums.delta2), most, cosine
    )

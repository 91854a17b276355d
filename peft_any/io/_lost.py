"""What Hugging Face PEFT's save leaves out of a file, and where else it wrote it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_any.errors import FormatError
from peft_any.io.safetensors import SafetensorsFile

_GATE = "base_model.internal_xlora_classifier.layers"


def lost_layers(
    config: Any, tensors: Path, keys: Collection[str]
) -> dict[str, npt.NDArray[np.generic]]:
    """Find the layers of X-LoRA's net that a file lacks.

    HF calls experts "0", "1" and so on, and leaves out of a file what has another adapter's name
    among the parts of its own (0.21; not 0.19): ``layers.0`` of the net, too. It stands, without
    its number, in the file of the expert "0", in a directory beside. HF draws such layers anew.

    Parameters
    ----------
    config : Config
        Of any method; others lose nothing.
    tensors : Path
        The file.
    keys : collection of str
        What it has.

    Raises
    ------
    FormatError
        If a layer is nowhere; if the file is that of an expert beside a gate, which lacks layers
        of the model, and has layers of the base.
    """
    if any(key.startswith("base_model.lora_model.") for key in keys):
        raise FormatError(
            f"{tensors}: an expert that was saved along with its X-LoRA gate cannot be loaded: "
            "Hugging Face PEFT leaves out its layers that have another expert's number: load it "
            "from its own directory, which adapters in the gate's configuration names"
        )
    found: dict[str, npt.NDArray[np.generic]] = {}
    lost: list[str] = []
    if config.peft_type != "XLORA":
        return found
    for name in config.layers:
        number, key = name.rpartition(".")[2], f"base_model.{name}"
        if f"{key}.weight" in keys:
            continue
        places = [folder / number / tensors.name for folder in tensors.parents[:2]]
        for path in filter(Path.is_file, places):
            with SafetensorsFile(path) as file:
                found |= {
                    f"{key}.{k}": file[f"{_GATE}.{k}"].copy()
                    for k in ("weight", "bias")
                    if f"{_GATE}.{k}" in file
                }
            if f"{key}.weight" in found:
                break
        else:
            lost.append(name)
    if lost:
        raise FormatError(
            f"{tensors}: {', '.join(lost)}: Hugging Face PEFT left these layers of the gate out, "
            f"and the directories of the experts beside, such as {tensors.parent / '0'}, lack them "
            "too: save the model with all its adapters (selected_adapters=None)"
        )
    return found

"""Weights in formats that are not read here: how to tell them, and the way out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

FOREIGN = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx",
    ".onnx_data", ".npz", ".npy", ".pkl", ".pickle", ".tflite", ".mlmodel", ".nemo", ".joblib",
)  # fmt: skip
"""Endings of weight files that are never opened."""

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of what torch's and Python's own ways to save make."""


def conversion(source: str | os.PathLike[str] = "IN", target: str = "OUT.safetensors") -> str:
    """Give the command that converts a pickle, for those who trust it."""
    places = (shlex.quote(os.fspath(path)) for path in (source, target))
    return (
        "convert it once, where torch is installed and you trust it:\n"
        '  python -c "import sys, torch; from safetensors.torch import save_file; '
        "save_file({k: v.clone().contiguous() for k, v in torch.load(sys.argv[1], "
        "map_location='cpu', weights_only=True).items()}, sys.argv[2], {'format': 'pt'})\" "
        f"{' '.join(places)}"
    )


CONVERT = conversion()


def way_out(weights: Sequence[Path]) -> str:
    """Say what to do with a directory whose only weights are these."""
    if not weights[0].name.endswith(PICKLES):
        return "use or make a safetensors version of it"
    known = [path for path in weights if path.name.startswith("pytorch_model")] or [*weights]
    if len(known) == 1:
        return conversion(known[0], str(known[0].with_name("model.safetensors")))
    return _DIVIDED + " ".join(shlex.quote(os.fspath(path)) for path in known)


_DIVIDED = """convert them once, where torch is installed and you trust them:
  python -c "
import json, pathlib, sys, torch; from safetensors.torch import save_file
files = {}
for path in map(pathlib.Path, sys.argv[1:]):
    new = path.with_name(path.stem.removeprefix('pytorch_') + '.safetensors')
    held = torch.load(path, map_location='cpu', weights_only=True)
    save_file({k: v.clone().contiguous() for k, v in held.items()}, new, {'format': 'pt'})
    files |= dict.fromkeys(held, new.name)
text = json.dumps({'metadata': {}, 'weight_map': files})
path.with_name('model.safetensors.index.json').write_text(text)
" """
"""The command that converts shards, but for their names."""


_PICKLE = f"a pickle, which is never loaded here; {CONVERT}"
_DISGUISES: dict[bytes, str] = {
    b"PK\x03\x04": f"a zip archive, as torch.save writes (or .npz); {CONVERT}",
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"GGUF": "a GGUF file; use the safetensors files it was made from",
    b"\x89HDF": "an HDF5 file; load it with its own library and save it as safetensors",
    b"\x93NUMPY": "a .npy file; load it with numpy and save it as safetensors",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file; run: git lfs pull",
    b"<": "a web page, not the file; download it again",
    b"{": "a JSON file; give the model's directory or its .safetensors file",
}


def disguise(head: bytes) -> str:
    """What a file that is no safetensors file looks like from its first bytes, and the way out."""
    for magic, what in _DISGUISES.items():
        if head.startswith(magic):
            return f"; it looks like {what}"
    return ""

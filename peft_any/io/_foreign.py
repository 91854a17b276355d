"""Weights in formats that are not read here: how to tell them, and the way out."""

from __future__ import annotations

FOREIGN = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx",
    ".onnx_data", ".npz", ".npy", ".pkl", ".pickle", ".tflite", ".mlmodel", ".nemo", ".joblib",
)  # fmt: skip
"""Endings of weight files that are never opened."""

CONVERT = (
    'convert it once, where torch is installed: python -c "import torch; from safetensors.torch '
    "import save_file; save_file({k: v.clone().contiguous() for k, v in torch.load('IN', "
    "map_location='cpu', weights_only=True).items()}, 'OUT.safetensors')\""
)
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

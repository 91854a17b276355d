"""What happens where there is a GPU, its part and CuPy's played by stand-ins."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from peft_any import _libraries
from peft_any.backend import Backend, move, resolve
from peft_any.errors import BackendError
from tests.test_backend import need


def test_auto_takes_a_gpu_only_where_it_is_cheap_to_know(monkeypatch):
    torch = need("torch")
    monkeypatch.delenv("PEFT_ANY_BACKEND", raising=False)
    monkeypatch.setattr(_libraries._Cupy, "available", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_libraries.TORCH, "device", lambda place: place, raising=False)
    assert resolve().device == "cuda"
    monkeypatch.delitem(sys.modules, "torch")
    assert resolve().name == "numpy"


def test_auto_prefers_cupy_and_survives_a_broken_one(monkeypatch):
    cupy = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert _libraries.CUPY.available
    cupy.cuda = None
    assert not _libraries.CUPY.available
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(_libraries, "find_spec", lambda name: None)
    assert not _libraries.CUPY.available


def test_cupy_opens_the_device_asked_for(monkeypatch):
    class Device:
        def __init__(self, index):
            self.id = index

    runtime = SimpleNamespace(getDeviceCount=lambda: 2)
    cuda = SimpleNamespace(is_available=lambda: True, runtime=runtime, Device=Device)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", SimpleNamespace())
    assert [resolve(s).device.id for s in ("cupy", "cupy:1", "cupy:cuda:1")] == [0, 1, 1]
    assert resolve("cupy", device=Device(1)).device.id == 1
    with pytest.raises(BackendError, match="'2': this machine has 2, numbered from 0"):
        resolve("cupy:2")


def test_cupys_arrays_are_made_read_and_moved_on_their_device(monkeypatch):
    entered = []

    class Device:
        id = 1

        def __enter__(self):
            entered.append(self.id)

        def __exit__(self, *error):
            entered.append(None)

    class ndarray(np.ndarray):  # noqa: N801 - CuPy's name
        device = "other"

        def get(self):
            return np.array(self)

    made = lambda host: np.array(host).view(ndarray)  # noqa: E731
    cupy = SimpleNamespace(ndarray=ndarray, asarray=made, array=made)
    space = SimpleNamespace(__name__="array_api_compat.cupy", float32=np.float32)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cupy_ = _libraries.CUPY
    x = cupy_.from_numpy(np.ones(2, dtype="float32"), space, Device())
    assert type(cupy_.to_numpy(cupy_.put(x, Device()))) is np.ndarray
    assert entered == [1, None] * 2
    assert cupy_.owns(x)
    assert not cupy_.is_on(x, Device())
    assert cupy_.on_gpu(Device())
    assert cupy_.astype(x, cupy_.dtype("bfloat16", space), space).dtype == ml_dtypes.bfloat16


def test_cupy_without_a_gpu_says_so():
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match="no CUDA device"):
        resolve("cupy")


def test_libraries_on_one_gpu_pass_arrays_by_dlpack(monkeypatch):
    torch = need("torch")
    copies = []

    class OnGpu:
        def __dlpack_device__(self):
            return (2, 0)

        def __array_namespace__(self):
            return SimpleNamespace(__name__="elsewhere", float32=np.float32)

    class Unwilling(OnGpu):
        def __array__(self, dtype=None, copy=None):
            return np.ones(2, dtype="float32")

        def __dlpack_device__(self):
            raise BufferError("sharded")

    cuda = SimpleNamespace(type="cuda")
    made = torch.ones(2)
    xp = SimpleNamespace(
        __name__="array_api_compat.torch",
        float32=torch.float32,
        from_dlpack=lambda x: x,
        asarray=lambda x, copy: copies.append(copy) or made,
    )
    target = Backend("torch", xp, cuda)
    monkeypatch.setattr("peft_any._libraries._Torch.put", lambda self, x, device: (x, device))
    assert move(OnGpu(), target) == (made, cuda)
    assert copies == [True]
    with pytest.raises((TypeError, AttributeError)):  # it went by way of the host
        move(Unwilling(), target)

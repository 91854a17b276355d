"""What `backend` must know of each array library: how to find it, and how data goes in and out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from peft_any._dtypes import dtype_name, is_native, numpy_dtype
from peft_any._imports import imported
from peft_any._typing import Namespace
from peft_any.errors import BackendError

Host = np.ndarray[Any, np.dtype[Any]]
_BITS = {1: "uint8", 2: "int16"}
"""As which bfloat16 and 8-bit floats pass where a library does not know them."""


class Library:
    """A library that does what the Array API standard says; the others state their departures."""

    name: ClassVar[str] = ""
    package: ClassVar[str] = ""
    space: ClassVar[str] = ""
    """The module that is its Array API namespace."""
    array: ClassVar[str] = "Array"
    """Its class of arrays."""
    extra: ClassVar[str] = ""
    """What pip installs to have it."""
    apart: ClassVar[bool] = False
    """Whether arrays on different devices refuse to meet, so that all must be on one."""
    narrow: ClassVar[Mapping[str, str]] = {}
    """Integers that it takes as narrower ones where the values fit."""

    @property
    def module(self) -> Any:
        """The imported package."""
        return imported(self.package)

    def namespace(self, x: Any = None) -> Namespace:
        """Give the Array API namespace."""
        return imported(self.space) if self.space else x.__array_namespace__()

    def owns(self, x: Any) -> bool:
        """Tell whether `x` is an array of this library."""
        module = sys.modules.get(self.package)
        return module is not None and isinstance(x, getattr(module, self.array, ()))

    def device(self, place: Any) -> Any:
        """Give the device called `place`, the default one for None; raise where it is absent."""
        if place not in (None, "cpu"):
            raise ValueError("the library computes on the CPU only")
        return "cpu"

    def creation_device(self, x: Any) -> Any:
        """Give the device on which to make what shall meet `x`."""
        return getattr(x, "device", None)

    def is_on(self, x: Any, device: Any) -> bool:
        """Tell whether `x` lives on `device`."""
        return device is None or bool(self.creation_device(x) == device)

    def put(self, x: Any, device: Any) -> Any:
        """Bring an array of this library to another of its devices."""
        return x.to_device(device)

    def to_numpy(self, x: Any) -> Host:
        """Bring an array to the host, copying only where the library must."""
        return np.asarray(x)

    def from_numpy(self, host: Host, xp: Namespace, device: Any) -> Any:
        """Make an array of a host array in native byte order, whose dtype the library has."""
        return xp.asarray(host, device=device)

    def on_gpu(self, device: Any) -> bool:
        """Tell whether a device is one of CUDA's."""
        return False

    def dtype(self, name: str, xp: Namespace) -> Any:
        """Find the library's dtype of that name; None if it has none."""
        if not hasattr(xp, name) and isinstance(getattr(xp, "float32", None), type | np.dtype):
            try:
                return numpy_dtype(name)
            except TypeError:
                return None
        return getattr(xp, name, None)

    def astype(self, x: Any, dtype: Any, xp: Namespace) -> Any:
        """Round to another dtype."""
        return xp.astype(x, dtype)


class _Numpy(Library):
    name, package, space, extra = "numpy", "numpy", "array_api_compat.numpy", "numpy"

    def owns(self, x: Any) -> bool:
        return isinstance(x, (np.ndarray, np.number, np.bool_))

    def creation_device(self, x: Any) -> str:
        return "cpu"

    def from_numpy(self, host: Host, xp: Namespace, device: Any) -> Host:
        return host

    def astype(self, x: Any, dtype: Any, xp: Namespace) -> Any:
        return x.astype(dtype)


class _Cupy(Library):
    name, package, space = "cupy", "cupy", "array_api_compat.cupy"
    array, extra = "ndarray", "peft_any[cupy-cuda12x]"
    apart = True

    @property
    def available(self) -> bool:
        """Whether CuPy would work; imports it only where a CUDA driver is installed."""
        if self.package not in sys.modules:
            driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
            try:
                if find_spec(self.package) is None:
                    return False
                ctypes.CDLL(driver)
            except (OSError, ValueError):
                return False
        try:
            return bool(self.module.cuda.is_available())
        except Exception:  # noqa: BLE001 - a broken CuPy must not keep anyone from using NumPy
            return False

    def device(self, place: Any) -> Any:
        cuda = self.module.cuda
        if not cuda.is_available():
            raise ValueError("there is no CUDA device (or no driver) on this machine")
        index = getattr(place, "id", None)
        if index is None:
            index = int(str(place or 0).removeprefix("cuda:"))
        count = cuda.runtime.getDeviceCount()
        if not 0 <= index < count:
            raise ValueError(f"this machine has {count}, numbered from 0")
        return cuda.Device(index)

    def put(self, x: Any, device: Any) -> Any:
        with device:
            return self.module.array(x)

    def on_gpu(self, device: Any) -> bool:
        return True

    def to_numpy(self, x: Any) -> Host:
        return x.get()

    def from_numpy(self, host: Host, xp: Namespace, device: Any) -> Any:
        with device:
            return self.module.asarray(host)

    def astype(self, x: Any, dtype: Any, xp: Namespace) -> Any:
        return x.astype(dtype)


class _Torch(Library):
    name, package, space = "torch", "torch", "array_api_compat.torch"
    array, extra = "Tensor", "peft_any[torch]"
    apart = True

    @property
    def cuda(self) -> bool:
        """Whether torch is already imported and finds a CUDA device."""
        return self.package in sys.modules and bool(self.module.cuda.is_available())

    def device(self, place: Any) -> Any:
        # allocating is the one test that every kind of device understands
        return self.module.empty(0, device=place or self.module.get_default_device()).device

    def put(self, x: Any, device: Any) -> Any:
        if x.is_meta and device.type != "meta":
            raise BackendError(
                f"torch: an array of shape {tuple(x.shape)} on the meta device cannot be moved to "
                f"{device}: it has no values"
            )
        return x.to(device)

    def to_numpy(self, x: Any) -> Host:
        if hasattr(x, "full_tensor"):  # a DTensor: gather the shards
            x = x.full_tensor()
        x = self.put(x.detach(), self.module.device("cpu")).resolve_conj().resolve_neg()
        dtype = numpy_dtype(dtype_name(x))
        if is_native(dtype):
            return x.numpy()
        bits: Host = x.view(getattr(self.module, _BITS[dtype.itemsize])).numpy()
        return bits.view(dtype)

    def from_numpy(self, host: Host, xp: Namespace, device: Any) -> Any:
        # torch would write through read-only memory, and has neither negative nor odd strides
        odd = any(s < 0 or s % host.itemsize for s in host.strides)
        if odd or not (host.flags.writeable and host.flags.aligned):
            host = np.array(host, order="C")
        if is_native(host.dtype):
            return self.module.from_numpy(host).to(device)
        bits = self.module.from_numpy(host.view(_BITS[host.itemsize]))
        return bits.view(self.dtype(host.dtype.name, xp)).to(device)

    def on_gpu(self, device: Any) -> bool:
        return bool(device.type == "cuda")


class _Jax(Library):
    name, package, space, extra = "jax", "jax", "jax.numpy", "peft_any[jax]"
    narrow: ClassVar[Mapping[str, str]] = {"int64": "int32", "uint64": "uint32"}

    @property
    def x64(self) -> bool:
        """Whether JAX has 64-bit dtypes."""
        return bool(self.module.config.jax_enable_x64)

    def traces(self, x: Any) -> bool:
        return isinstance(x, self.module.core.Tracer)

    def device(self, place: Any) -> Any:
        if not isinstance(place, str):
            return place
        platform, _, index = place.partition(":")
        return self.module.devices(platform)[int(index or 0)]

    def creation_device(self, x: Any) -> Any:
        if self.traces(x) or not x.committed:
            return None
        spread = self.module.sharding
        if isinstance(x.sharding, spread.NamedSharding):
            return spread.NamedSharding(x.sharding.mesh, spread.PartitionSpec())
        return x.device if len(x.devices()) == 1 else None

    def is_on(self, x: Any, device: Any) -> bool:
        if device is None or self.traces(x):
            return True
        if isinstance(device, self.module.sharding.Sharding):
            return bool(x.sharding == device)
        return bool(x.devices() == {device})

    def put(self, x: Any, device: Any) -> Any:
        return self.module.device_put(x, device)

    def on_gpu(self, device: Any) -> bool:
        platform = self.module.default_backend() if device is None else device
        return bool(getattr(platform, "platform", platform) == "gpu")

    def to_numpy(self, x: Any) -> Host:
        if self.traces(x):
            raise BackendError(
                f"jax: an array of shape {tuple(x.shape)} cannot leave a traced function (jit, "
                "grad, vmap): convert it outside"
            )
        if not x.is_fully_addressable:
            raise BackendError(
                f"jax: an array of shape {tuple(x.shape)} cannot be brought to this host: other "
                "processes hold parts of it; gather it first"
            )
        return np.asarray(x)

    def from_numpy(self, host: Host, xp: Namespace, device: Any) -> Any:
        name = host.dtype.name
        if not self.x64 and name in self.narrow:
            small = np.dtype(self.narrow[name])
            span = np.iinfo(small)
            if host.size and (host.min() < span.min or host.max() > span.max):
                raise BackendError(
                    f"jax: {name} values beyond {name[:-2]}32 cannot be kept: JAX's 64-bit dtypes "
                    "are off; call jax.config.update('jax_enable_x64', True) first"
                )
            host = host.astype(small)
        # a copy, always: JAX may keep the memory it is given and trusts it not to change
        return xp.array(host, device=device)

    def dtype(self, name: str, xp: Namespace) -> Any:
        if name in ("float64", "complex128", *self.narrow) and not self.x64:
            raise BackendError(
                f"jax: {name} cannot be had: JAX's 64-bit dtypes are off and it would round to "
                "32 bits; call jax.config.update('jax_enable_x64', True) first, or use 32 bits"
            )
        return getattr(xp, name, None)


class _Dask(Library):
    name, package, space = "dask", "dask.array", "array_api_compat.dask.array"
    extra = "peft_any[dask]"

    def creation_device(self, x: Any) -> str:
        return "cpu"

    def to_numpy(self, x: Any) -> Host:
        chunk = x.compute()
        return library_of(chunk).to_numpy(chunk)

    def from_numpy(self, host: Host, xp: Namespace, device: Any) -> Any:
        return self.module.from_array(host, name=False)  # name=False: do not hash the values

    def astype(self, x: Any, dtype: Any, xp: Namespace) -> Any:
        return x.astype(dtype)


class _Strict(Library):
    name, package, space = "strict", "array_api_strict", "array_api_strict"
    extra = "array-api-strict"
    apart = True

    def owns(self, x: Any) -> bool:  # the class of its arrays is not public
        kind = type(x)
        return hasattr(kind, "__array_namespace__") and kind.__module__.startswith(self.package)

    def device(self, place: Any) -> Any:
        if isinstance(place, self.module.Device):
            return place
        return self.module.Device("CPU_DEVICE" if place in (None, "cpu") else place)

    def to_numpy(self, x: Any) -> Host:
        return np.asarray(self.put(x, self.device(None)))


_NUMPY = _Numpy()
CUPY, TORCH = _Cupy(), _Torch()
UNKNOWN = Library()
"""Whatever else has `__array_namespace__`."""
LIBRARIES: dict[str, Library] = {
    lib.name: lib for lib in (_NUMPY, CUPY, TORCH, _Jax(), _Dask(), _Strict())
}
_of_type: dict[type, Library] = {}


def find_library(x: Any) -> Library | None:
    """Find the library of an array; None if `x` is none."""
    kind = type(x)
    known = _of_type.get(kind)
    if known is not None or kind.__module__ == "builtins":  # a dict, a number: asked of all leaves
        return known
    for library in LIBRARIES.values():
        if library.owns(x):
            return _of_type.setdefault(kind, library)
    return UNKNOWN if hasattr(kind, "__array_namespace__") else None


def library_of(x: Any) -> Library:
    """Find the library of an array; BackendError if `x` is none."""
    if (library := find_library(x)) is None:
        raise BackendError(f"{type(x).__name__}: is not an array of any library known here")
    return library

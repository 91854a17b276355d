"""Random numbers, drawn on the host: the same on every array library, and torch's own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from peft_any._fused import fma, round_odd_sum
from peft_any._typing import DTypeLike, Shape
from peft_any.backend import (
    Backend,
    asked,
    astype,
    dtype_by_name,
    from_numpy,
    is_floating,
    numpy_dtype,
)
from peft_any.errors import ConfigError, ShapeError

Host = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1 << 20
_WIDE_RANGE = 1 << 28
"""From this range on torch draws integers from 64 bits."""
_LONG_PERMUTATION = 0xFFFFFFFF // 20
"""From this length on torch permutes in another way."""
_VECTOR = 16
"""From this length on torch draws normal numbers in blocks of it."""


class TorchGenerator:
    """torch's CPU generator: what ``torch.Generator().manual_seed(seed)`` draws, bit for bit.

    The Mersenne Twister (Matsumoto & Nishimura 1998) with its original 32-bit seeding, and
    torch's own ways from its words to numbers (as of torch 2.13 on CPUs with fused
    multiply-add). Calls consume the stream as torch's do, so sequences of calls agree too.

    Parameters
    ----------
    seed : int
        Its lower 32 bits count.

    Examples
    --------
    >>> TorchGenerator(0).random((2,))
    array([0.4962566, 0.7682218], dtype=float32)
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        state: Any = np.random.RandomState(int(seed) & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state
        self._spare: float | None = None

    def _words(self, n: int) -> Host:
        return self._bits.random_raw(n)

    def _doubles(self, n: int) -> Host:
        """Numbers of [0, 1) with 53 bits, each of two words, the high one first."""
        return (self._long_words(n) & np.uint64((1 << 53) - 1)) * 2.0**-53

    def _long_words(self, n: int) -> Host:
        pairs = self._words(2 * n).reshape(n, 2)
        return (pairs[:, 0] << np.uint64(32)) | pairs[:, 1]

    def random(self, shape: Shape, dtype: str = "float32") -> Host:
        """Draw from U[0, 1): ``torch.rand``.

        Parameters
        ----------
        shape : tuple of int
        dtype : {"float32", "float64", "float16", "bfloat16"}
        """
        return self.uniform(shape, 0.0, 1.0, dtype)

    def uniform(self, shape: Shape, low: float, high: float, dtype: str = "float32") -> Host:
        """Draw from U[low, high): ``Tensor.uniform_``.

        Parameters
        ----------
        shape : tuple of int
        low, high : float
        dtype : {"float32", "float64", "float16", "bfloat16"}

        Raises
        ------
        ConfigError
            For another dtype.
        """
        if dtype not in ("float32", "float64", "float16", "bfloat16"):
            raise ConfigError(f"uniform: {dtype} cannot be drawn: choose a floating dtype of torch")
        kind = numpy_dtype(dtype)
        ends = np.asarray([low, high], dtype="float64" if dtype == "float64" else "float32")
        (a, b), (first, last) = ends, ends.astype(kind)
        out = np.empty(prod(shape), dtype=kind)
        for start in range(0, out.size, _BLOCK):
            part = out[start : start + _BLOCK]
            if dtype == "float64":
                x = fma(self._doubles(part.size), float(b - a), float(a))
            else:
                u = (self._words(part.size) & np.uint64(0xFFFFFF)) * 2.0**-24
                x = round_odd_sum(u * float(b - a), float(a)).astype(np.float32).astype(kind)
            # what rounds up to the excluded end becomes the other one
            part[:] = np.where(x >= last, first, x)
        return out.reshape(shape)

    def randint(self, n: int, size: Shape) -> Host:
        """Draw int64 from 0 … n-1: ``torch.randint(n, size)``.

        Raises
        ------
        ConfigError
            If `n` is not positive.
        """
        if n < 1:
            raise ConfigError(f"randint: no integer can be drawn from 0 … {n - 1}: n is at least 1")
        draw = self._long_words if n >= _WIDE_RANGE else self._words
        return (draw(prod(size)) % np.uint64(n)).astype(np.int64).reshape(size)

    def randperm(self, n: int, k: int | None = None) -> Host:
        """Permute 0 … n-1: ``torch.randperm(n)``, or its first `k` in memory of order `k`.

        Parameters
        ----------
        n : int
            Below 214,748,364; torch permutes longer ranges in another way.
        k : int, optional

        Returns
        -------
        array (n,) or (min(k, n),) of int64

        Raises
        ------
        ConfigError
            For a negative or too long range.
        """
        if not 0 <= n < _LONG_PERMUTATION:
            raise ConfigError(
                f"randperm: {n} numbers cannot be permuted as torch does: only below "
                f"{_LONG_PERMUTATION}; store the indices in the checkpoint instead"
            )
        k = n if k is None else min(k, n)
        steps = min(k, max(n - 1, 0))
        i = np.arange(steps, dtype=np.uint64)
        targets = (i + self._words(steps) % (np.uint64(n) - i)).tolist()
        moved: dict[int, int] = {}
        out = np.empty(k, dtype=np.int64)
        for at, to in enumerate(targets):
            out[at] = moved.get(to, to)
            moved[to] = moved.pop(at, at)
        if k > steps:
            out[steps] = moved.get(steps, steps)
        self._bits.random_raw(max(n - 1, 0) - steps, output=False)
        return out

    def normal(self, shape: Shape, dtype: str = "float32") -> Host:
        """Draw from N(0, 1): ``torch.randn``, contiguous.

        Exact below 16 elements. From 16 on torch takes single-precision logarithms and sines of
        its own, which differ between its builds: 86 % of the numbers are equal bit for bit, all
        to an absolute 1e-6 (7.2e-7 at most in 3e7 draws); float64 to 1e-14.

        Parameters
        ----------
        shape : tuple of int
        dtype : {"float32", "float64"}

        Raises
        ------
        ConfigError
            For another dtype.
        """
        if dtype not in ("float32", "float64"):
            raise ConfigError(f"normal: {dtype} cannot be drawn as torch does: float32 or float64")
        n = prod(shape)
        if n < _VECTOR:
            return np.asarray([self._one_normal() for _ in range(n)], dtype=dtype).reshape(shape)
        out = self.random((n,), dtype)
        whole = out[: n - n % 16].reshape(-1, 2, 8)
        whole[:] = _box_muller(whole)
        if n % 16:
            out[-16:] = _box_muller(self.random((1, 2, 8), dtype)).reshape(16)
        return out.reshape(shape)

    def _one_normal(self) -> float:
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return spare
        u, v = self._doubles(2).tolist()
        radius, angle = math.sqrt(-2.0 * math.log1p(-v)), 2.0 * math.pi * u
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(u: Host) -> Host:
    """Box & Muller (1958) on blocks (…, 2, 8): radii from the first row, angles from the second."""
    one = u.dtype.type(1)
    radius = np.sqrt(u.dtype.type(-2) * np.log(one - u[:, 0]))
    angle = u.dtype.type(2 * np.pi) * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


class Fresh:
    """Draws for initial values: one seed gives the same numbers on every library.

    Drawn in float64 on the host, from a stream of its own for every (seed, key), then rounded.

    Parameters
    ----------
    seed : int
        Not negative.
    backend : Backend
        Where the arrays are made.
    key : str
        Which stream: the site's name.
    dtype : str
        The arrays' dtype.
    base : Dense, optional
        The base layer, for initial values that read it.
    sites : tuple of Site
        All the sites, in the model's order, for what depends on it.
    bases : callable, optional
        Gives the base layer of each of them by its name.

    Attributes
    ----------
    shared : dict of arrays
        What all sites share, once it is known: `init_shared` comes before `init`.

    Raises
    ------
    ConfigError
        For a negative seed.
    BackendError
        If the library has no such dtype.

    Examples
    --------
    >>> from peft_any.backend import resolve
    >>> new = Fresh(0, resolve("numpy"), key="fc")
    >>> bool((new.at("other").normal((3,)) == new.normal((3,))).any())
    False
    """

    def __init__(
        self,
        seed: int,
        backend: Backend,
        *,
        key: str = "",
        dtype: DTypeLike = "float32",
        base: Any = None,
        sites: tuple[Any, ...] = (),
        bases: Callable[[str], Any] | None = None,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"seed {seed}: cannot be negative: use any integer from 0 on")
        dtype = asked(dtype)
        dtype_by_name(backend.xp, dtype)
        if not is_floating(dtype):
            raise ConfigError(f"dtype {dtype!r}: cannot hold parameters: they are floats")
        words = np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4").tolist()
        self.seed, self.backend, self.key, self.dtype, self.base = seed, backend, key, dtype, base
        self.sites, self.bases = sites, bases
        self.shared: dict[str, Any] = {}
        stream = np.random.SeedSequence(seed, spawn_key=words)
        self.host = np.random.Generator(np.random.PCG64(stream))

    def at(self, key: str) -> Fresh:
        """Give the draws of another site: all else is the same."""
        base = None if self.bases is None else self.bases(key)
        more: dict[str, Any] = {"dtype": self.dtype, "sites": self.sites, "bases": self.bases}
        new = Fresh(self.seed, self.backend, key=key, base=base, **more)
        new.shared = self.shared
        return new

    def base_for(self, name: str, why: str) -> Any:
        """Give a site's base layer, which `why` needs.

        Raises
        ------
        ConfigError
            If there is none.
        """
        if self.base is not None:
            return self.base
        if self.bases is None:
            raise ConfigError(f"{name}: {why} needs the base weight: pass weight= to layer()")
        return self.bases(name)

    def torch(self, seed: int) -> TorchGenerator:
        """Give torch's generator, for what a checkpoint leaves to be drawn again."""
        return TorchGenerator(seed)

    def array(self, host: Any) -> Any:
        """Make an array of host values: floating ones in `dtype`, integers in their own."""
        host = np.asarray(host)
        return from_numpy(astype(host, self.dtype) if is_floating(host) else host, self.backend)

    def zeros(self, shape: Shape) -> Any:
        """Make an array of zeros."""
        return self.full(shape, 0.0)

    def ones(self, shape: Shape) -> Any:
        """Make an array of ones."""
        return self.full(shape, 1.0)

    def full(self, shape: Shape, value: float) -> Any:
        """Make an array of one value."""
        return self.array(np.full(shape, float(value)))

    def normal(self, shape: Shape, std: float = 1.0) -> Any:
        """Draw from N(0, std²)."""
        return self.array(std * self.host.standard_normal(shape))

    def uniform(self, shape: Shape, bound: float) -> Any:
        """Draw from U(-bound, bound)."""
        return self.array(self.host.uniform(-bound, bound, shape))

    def kaiming(self, shape: Shape, a: float = 5**0.5) -> Any:
        """Draw from U(-c, c), c² = 6 / ((1 + a²)·fan_in), fan_in = ∏ shape[1:].

        He et al. 2015, https://arxiv.org/abs/1502.01852, with torch's default `a` for layers.

        Raises
        ------
        ShapeError
            If the shape has fewer than two axes or no inputs.
        """
        fan_in = prod(shape[1:])
        if len(shape) <= 1 or fan_in == 0:
            raise ShapeError(f"shape {shape}: cannot have a fan-in: it needs two axes and inputs")
        return self.uniform(shape, math.sqrt(6.0 / ((1.0 + a * a) * fan_in)))

"""The randomness of training: masks that are a function of a seed, a site and a shape.

Masks are drawn on the host, so that one seed gives one run on every library. Nothing is counted
or stored: a layer that is called twice with inputs of one shape drops the same places both
times, and running it again (as gradient checkpointing does) changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, TypeAlias

import numpy as np

from peft_any._typing import Array, Params, Shape
from peft_any.backend import astype, dtype_name, from_numpy_like, is_floating
from peft_any.errors import ConfigError
from peft_any.layer import Dense, linear
from peft_any.outputs import added

Seed: TypeAlias = int | Sequence[int]


@dataclass(frozen=True)
class Noise:
    """Draws of one training step at one site.

    Attributes
    ----------
    seed : tuple of int
        What must differ from step to step: ``(seed, step)``.
    key : str
        The adapter and the site.

    Examples
    --------
    >>> a, b = Noise.of((0, 1)).at("fc"), Noise.of((0, 1)).at("fc")
    >>> x = np.ones(1000)
    >>> bool((a.thinned(x, 0.25) == b.thinned(x, 0.25)).all())
    True
    >>> sorted({float(v) for v in a.thinned(x, 0.5)})
    [0.0, 2.0]
    """

    seed: tuple[int, ...]
    key: str = ""

    @classmethod
    def of(cls, seed: Seed) -> Noise:
        """Make the draws of a seed.

        Raises
        ------
        ConfigError
            If it is not a whole number from 0 on, or several.
        """
        given = seed if isinstance(seed, Sequence) else [seed]
        try:
            numbers = tuple(index(n) for n in given)
        except Exception as error:  # JAX raises an error of its own for a traced number
            raise ConfigError(
                f"rng={seed!r}: cannot seed draws on the host: give a whole number, or several; "
                "under a transformation such as jit make it a static argument"
            ) from error
        if not numbers or min(numbers) < 0:
            raise ConfigError(f"rng={seed!r}: cannot seed draws: give numbers from 0 on")
        return cls(numbers)

    def at(self, key: str) -> Noise:
        """Give the draws of a site, or of one purpose at it."""
        return replace(self, key=f"{self.key}/{key}")

    @property
    def host(self) -> np.random.Generator:
        """A generator at its start."""
        digest = hashlib.sha256(self.key.encode()).digest()
        words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=words))
        )

    def happens(self, rate: float) -> bool:
        """Toss one coin; never drawn for a rate of 0."""
        return rate > 0 and bool(self.host.random() < rate)

    def kept(self, shape: Shape, rate: float, like: Array, *, scaled: bool = True) -> Array:
        """Draw a mask: 0 with probability `rate`, else 1, or 1/(1 - rate) if `scaled`."""
        kept = self.host.random(shape) >= rate
        return self.array(kept / (1.0 - rate) if scaled else kept * 1.0, like)

    def array(self, host: Any, like: Array) -> Array:
        """Bring a mask to another array's library, device and dtype."""
        return from_numpy_like(astype(np.asarray(host), dtype_name(like)), like)

    def thinned(self, x: Array, rate: float) -> Array:
        """Drop numbers of `x` and scale up the rest; integers (tokens) stay, as in HF PEFT."""
        if rate <= 0 or not is_floating(x):
            return x
        return x * self.kept(tuple(x.shape), rate, x)

    def normal(self, shape: Shape, like: Array) -> Array:
        """Draw standard normal numbers."""
        return self.array(self.host.standard_normal(shape), like)

    def logistic(self, shape: Shape, like: Array) -> Array:
        """Draw standard logistic numbers."""
        return self.array(self.host.logistic(size=shape), like)

    def chosen_in(self, rows: int, n: int, rate: float, like: Array) -> Array:
        """Choose int(rate·n) of the n places of one row: a mask (rows, n, 1, 1), 1 where chosen."""
        host, mask = self.host, np.zeros((rows, n, 1, 1))
        row = host.integers(rows)
        mask[row] = (host.permutation(n) < int(rate * n)).reshape(n, 1, 1)
        return self.array(mask, like)

    def rows(self, n: int, rate: float, like: Array, *, scaled: bool) -> Array:
        """Draw a mask of rows (n,); `scaled` by what is left of them."""
        kept = (self.host.random(n) > rate) * 1.0
        return self.array(kept / kept.mean() if scaled and kept.any() else kept, like)


def dropped(config: Any, p: Params, x: Array, base: Any, noise: Noise) -> Array:
    """Apply an adapted layer with the dropout of its configuration, as Hugging Face PEFT does.

    The rate in the field that `Tuner.thins` names thins the input of the adapter, not of the
    base; ``module_dropout`` leaves the adapter out, and ``rank_dropout`` rows of ΔW, of LoHa and
    LoKr. Whatever does not add to the base's output is applied as it is (OFT's ``module_dropout``
    has no effect there either).

    Parameters
    ----------
    config : Tuner
    p, x, base
        As `Tuner.forward` takes them.
    noise : Noise
    """
    y: Array
    if not hasattr(config, "residual"):
        y = config.forward(p, x, base)
        return y
    site = base.site
    if _left_out(config, noise):
        y = base(x)
        return y
    thin = noise.at("input").thinned(x, _rate(config))
    change = config.residual(p, thin, site)
    if rate := getattr(config, "rank_dropout", 0.0):
        scaled = getattr(config, "rank_dropout_scale", True)
        change = change * noise.at("rank").rows(site.n_out, rate, change, scaled=scaled)
    gain = config.gain(p, base)
    if gain is not None:
        change = (gain - 1.0) * linear(thin, base.weight) + gain * change
    return added(base, x, change)


def branch(config: Any, p: Params, base: Dense, noise: Noise) -> tuple[Dense, float] | None:
    """Give what an adapter adds to a layer in training as a layer of its own, as `dropped` does.

    For layers that are adapted through their weight, such as convolutions.

    Returns
    -------
    Dense
        ΔW without the rows that are dropped, and Δb.
    float
        The rate at which its input is to be thinned.
    None
        Instead, where the adapter is left out.
    """
    if hasattr(config, "residual") and _left_out(config, noise):
        return None
    weight, bias = config.effect(p, base)
    if rate := getattr(config, "rank_dropout", 0.0):
        scaled = getattr(config, "rank_dropout_scale", True)
        mask = noise.at("rank").rows(base.site.n_out, rate, weight, scaled=scaled)
        weight = weight * mask[:, None]
    return Dense(weight, bias, base.site), _rate(config)


def _left_out(config: Any, noise: Noise) -> bool:
    rate = 0.0 if config.thins == "module_dropout" else getattr(config, "module_dropout", 0.0)
    return noise.at("module").happens(rate)


def _rate(config: Any) -> float:
    return getattr(config, config.thins) if config.thins else 0.0


def rates(config: Any) -> dict[str, float]:
    """Give the rates of a configuration by their fields: numbers that are named for dropout.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> rates(LoraConfig(lora_dropout=0.1))
    {'lora_dropout': 0.1}
    """
    found = ((name, rate) for name, rate in vars(config).items() if name.endswith("dropout"))
    return {name: rate for name, rate in found if rate is not None}


def drops(config: Any) -> bool:
    """Tell whether a configuration drops, or draws, anything in training.

    Examples
    --------
    >>> from peft_any.methods.lora import LoraConfig
    >>> drops(LoraConfig()), drops(LoraConfig(lora_dropout=0.1))
    (False, True)
    """
    return getattr(config, "draws", False) or any(rate > 0 for rate in rates(config).values())

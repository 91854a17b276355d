"""Hypothesis strategies: layers, bases, parameters, adapters, and files from strangers.

Shapes, kinds, names and flags are what Hypothesis draws, and what it shrinks. Numbers come from
NumPy's generators with a drawn seed: single entries of a matrix are of no use to anybody.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_any._typing import Shape
from peft_any.adapter import Adapter
from peft_any.errors import PeftError
from peft_any.layer import CONVOLUTIONS, EXPERTS, KINDS, Dense, Kind, Site
from peft_any.method import Tuner
from peft_any.model import PeftModel
from peft_any.registry import Config
from peft_any.testing.case import Case
from peft_any.testing.mutations import hostile_bytes as hostile_bytes
from peft_any.testing.mutations import hostile_files as hostile_files
from peft_any.testing.mutations import hostile_json as hostile_json
from peft_any.testing.mutations import hostile_safetensors as hostile_safetensors

_PATHS = [f"h.{i}.{end}" for i in (0, 1, 10) for end in ("fc", "attn.q", "attn.v")]
_NAMES = st.sampled_from(["fc", "encoder.fc", *_PATHS])
_SIDES = st.integers(1, 9)
_SEEDS = st.integers(0, 2**32 - 1)

dtypes: st.SearchStrategy[str] = st.sampled_from(["float32", "float64"])
"""The dtypes in which methods compute."""

leads: st.SearchStrategy[Shape] = st.lists(st.integers(1, 3), max_size=3).map(tuple)
"""Leading shapes of an input, before its last axis: none, or some short axes."""


@st.composite
def sites(
    draw: st.DrawFn,
    config: Tuner | None = None,
    *,
    kinds: Collection[Kind] | None = None,
    sizes: st.SearchStrategy[int] = _SIDES,
    names: st.SearchStrategy[str] = _NAMES,
) -> Site:
    """Draw a layer's name, kind and sizes.

    Parameters
    ----------
    config : Tuner, optional
        Only layers that this method accepts.
    kinds : collection of Kind, optional
        Only these; by default all that the method supports, or all that there are.
    sizes : strategy of int
        Numbers of inputs and outputs; of a method that wants divisors, multiples say.
    names : strategy of str
        Module paths.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(sites(kinds=["Linear"]), lambda site: site.n_in > 2)
    Site(name='fc', n_in=3, n_out=1, kind='Linear', kernel=(), groups=1, bias=False)
    """
    if kinds is None:
        kinds = KINDS if config is None else config.kinds
    kind = draw(st.sampled_from(sorted(kinds)))
    made = _of_kind(kind, sizes, names)
    return draw(made if config is None else made.filter(lambda site: _fits(config, site)))


@st.composite
def _of_kind(
    draw: st.DrawFn, kind: Kind, sizes: st.SearchStrategy[int], names: st.SearchStrategy[str]
) -> Site:
    name, n_in, n_out, groups = draw(names), draw(sizes), draw(sizes), 1
    bias = kind not in {"Embedding", *EXPERTS} and draw(st.booleans())
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(CONVOLUTIONS.get(kind, 0)))
    if kind == "MultiheadAttention":
        n_out = 3 * n_in
    elif kind == "Norm":
        n_out = groups = n_in
    elif kind in EXPERTS:
        groups = draw(st.integers(1, 3))
        n_in, n_out = groups * n_in, groups * n_out
    return Site(name, n_in, n_out, kind, kernel, groups, bias)


def _fits(config: Tuner, site: Site) -> bool:
    try:
        config.at(site).shapes(site)
    except PeftError:
        return False
    return True


@st.composite
def layouts(
    draw: st.DrawFn, /, config: Tuner | None = None, *, max_sites: int = 3, **options: Any
) -> list[Site]:
    """Draw one or more layers with different names, as one network has them.

    Parameters
    ----------
    config : Tuner, optional
        Only layers that this method accepts; experts are left out, whose tensors a
        configuration names apart (`target_parameters`).
    max_sites : int
    **options
        As for `sites`.

    Examples
    --------
    >>> from hypothesis import find
    >>> [site.name for site in find(layouts(), lambda layers: len(layers) > 1)]
    ['fc', 'encoder.fc']
    """
    kinds = options.pop("kinds", None)
    if kinds is None:
        kinds = (KINDS if config is None else config.kinds) - EXPERTS
    one = sites(config, kinds=kinds, **options)
    return draw(st.lists(one, min_size=1, max_size=max_sites, unique_by=lambda site: site.name))


def bases(site: Site, dtype: str = "float32") -> st.SearchStrategy[Dense]:
    """Draw a layer's weight, and its bias if it has one, on the host.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(bases(Site("fc", 3, 4)), lambda base: True).weight.shape
    (4, 3)
    """
    return _SEEDS.map(lambda seed: Case("", None, site).base(seed, dtype=dtype))


def checkpoints(
    layout: Sequence[Site], dtype: str = "float32"
) -> st.SearchStrategy[dict[str, np.ndarray[Any, Any]]]:
    """Draw the tensors of layers under their names and in their shapes in a checkpoint.

    Examples
    --------
    >>> from hypothesis import find
    >>> sorted(find(checkpoints([Site("fc", 3, 4)]), lambda weights: True))
    ['fc.bias', 'fc.weight']
    """

    def laid_out(seed: int) -> dict[str, np.ndarray[Any, Any]]:
        tensors = {}
        for i, site in enumerate(layout):
            base: Any = Case("", None, site).base(seed + i, dtype=dtype)
            tensors[site.weight] = np.ascontiguousarray(base.stored())
            if base.bias is not None:
                tensors[site.bias_name] = base.bias
        return tensors

    return _SEEDS.map(laid_out)


@st.composite
def params(
    draw: st.DrawFn,
    config: Tuner,
    site: Site,
    *,
    base: Dense | None = None,
    trained: bool = True,
    dtype: str = "float32",
) -> dict[str, np.ndarray[Any, Any]]:
    """Draw a method's parameters at a layer, shared ones included, on the host.

    Parameters
    ----------
    config : Tuner
    site : Site
        One that the method accepts.
    base : Dense, optional
        The layer, where initial values are computed from it; by default another one is drawn.
    trained : bool
        Whether they are as training leaves them, none at its initial value.
    dtype : str

    Examples
    --------
    >>> from hypothesis import find
    >>> from peft_any.methods.lora import LoraConfig
    >>> p = find(params(LoraConfig(r=2), Site("fc", 3, 4)), lambda p: True)
    >>> {name: array.shape for name, array in p.items()}
    {'lora_A.weight': (2, 3), 'lora_B.weight': (4, 2)}
    """
    seed, case = draw(_SEEDS), Case("", config, site)
    base = case.base(seed, dtype=dtype) if base is None else base
    return (case.params if trained else case.fresh)(base, seed, dtype)


@st.composite
def models(
    draw: st.DrawFn,
    config: Config,
    layout: Sequence[Site] | None = None,
    *,
    trained: bool = True,
    dtype: str = "float32",
) -> PeftModel:
    """Draw a base with an adapter of a configuration, called "default", on the host.

    Parameters
    ----------
    config : Config
        Of any method; one without `target_modules` adapts every layer.
    layout : sequence of Site, optional
        The base's layers; by default some that the method accepts are drawn.
    trained : bool
        Whether parameters are as training leaves them, none at its initial value.
    dtype : str
        Of the base and of the parameters.

    Examples
    --------
    >>> from hypothesis import find
    >>> from peft_any.methods.ia3 import IA3Config
    >>> found = find(models(IA3Config(feedforward_modules=[])), lambda model: True)
    >>> found.names, [*found.weights]
    (['default'], ['fc.weight'])
    """
    if layout is None:
        layout = draw(layouts(config if isinstance(config, Tuner) else None))
    if isinstance(config, Tuner) and config.target_modules is None:
        config = replace(config, target_modules=[site.name for site in layout])
    seed, weights = draw(_SEEDS), draw(checkpoints(layout, dtype))
    model = PeftModel(weights, kinds={site.name: site for site in layout})
    made = model.add("default", config, seed=seed, dtype=dtype)
    if trained:
        rng = np.random.default_rng(seed)
        moved = {
            site: {k: (v + 0.2 * rng.standard_normal(v.shape)).astype(dtype) for k, v in p.items()}
            for site, p in made.trainable().items()
        }
        model.update({"default": moved})
    return model


def adapters(
    config: Config,
    layout: Sequence[Site] | None = None,
    *,
    trained: bool = True,
    dtype: str = "float32",
) -> st.SearchStrategy[Adapter]:
    """Draw an adapter of a configuration, on one or more layers, on the host.

    Parameters
    ----------
    config, layout, trained, dtype
        As for `models`.

    Examples
    --------
    >>> from hypothesis import find
    >>> from peft_any.methods.lora import LoraConfig
    >>> sorted(find(adapters(LoraConfig(r=1)), lambda adapter: len(adapter.sites) > 1).sites)
    ['encoder.fc', 'fc']
    """
    return models(config, layout, trained=trained, dtype=dtype).map(lambda model: model["default"])

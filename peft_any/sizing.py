"""How large a layer is, told from an adapter's parameters alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from peft_any._typing import Shape
from peft_any.checks import alike
from peft_any.errors import PeftError
from peft_any.layer import CONVOLUTIONS, Kind, Site
from peft_any.method import Tuner


def site_of(
    config: Tuner, name: str, p: Mapping[str, Any], known: dict[Any, list[Site]]
) -> tuple[Tuner, Site] | None:
    """Find the one size of layer that parameters belong to, without the base: see `sites_of`.

    Returns
    -------
    (Tuner, Site) or None
        None where several sizes, or none, have parameters of these shapes.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> p = {"lora_A.weight": np.zeros((2, 5)), "lora_B.weight": np.zeros((3, 2))}
    >>> _, site = site_of(LoraConfig(r=2), "fc", p, {})
    >>> site.n_in, site.n_out
    (5, 3)
    """
    hits = sites_of(config, name, p, known)
    return hits[0] if len(hits) == 1 else None


def sites_of(
    config: Tuner, name: str, p: Mapping[str, Any], known: dict[Any, list[Site]]
) -> list[tuple[Tuner, Site]]:
    """Find all sizes of layer that parameters may belong to.

    Parameters
    ----------
    config : Tuner
    name : str
        The module's.
    p : mapping of str to array
    known : dict
        What earlier calls for this configuration found; empty at first.

    Returns
    -------
    list of (Tuner, Site)
        The configuration at the site, and the site, a `Linear` for what may be a `Conv1D`, or,
        unless its name says so, a convolution that the method flattens.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.ia3 import IA3Config
    >>> config = IA3Config(target_modules=["fc"], feedforward_modules=[])
    >>> found = sites_of(config, "fc", {"ia3_l": np.ones((3, 1))}, {})
    >>> [(site.n_in, site.n_out) for _, site in found]
    [(1, 3), (3, 3), (9, 3)]
    """
    shapes = {k: tuple(a.shape) for k, a in p.items()}
    conv = "conv" in name.rpartition(".")[2].lower()
    key = conv, tuple(sorted(shapes.items()))
    hits = []
    for site in known[key] if key in known else _sizes(name, shapes, conv):
        here = replace(site, name=name)
        try:
            own = config.at(here)
            want = own.shapes(here)
            if alike(
                {k: s for k, s in shapes.items() if k in want or k not in config.frozen}, want
            ):
                hits.append((own, here))
        except PeftError:
            continue
    known[key] = [site for _, site in hits]
    return hits


def _sizes(name: str, shapes: Mapping[str, Shape], conv: bool) -> Iterator[Site]:
    """Make layers of all sizes that parameters of these shapes may belong to."""
    kernel = max((shape[2:] for shape in shapes.values()), key=prod, default=())
    kind: Kind = next((k for k, n in CONVOLUTIONS.items() if n == len(kernel)), "Linear")
    if any("embedding" in suffix for suffix in shapes):
        kind = "Embedding"
    kinds: list[tuple[Kind, Shape]] = [(kind, kernel)]
    if kind == "Linear" and conv:
        kinds.append(("Conv2d", (1, 1)))
    if kernel[1:] == (1,):  # some methods' Conv1d has four axes too
        kinds.append(("Conv1d", kernel[:1]))
    sizes = {n for shape in shapes.values() for n in shape[:2] if n}
    sizes |= {m * n for m, n in product(sizes, sizes)}
    for n_in, n_out in product(sorted(sizes), sorted(sizes)):
        for kind, kernel in kinds:
            yield Site(name, n_in, n_out, kind, kernel)

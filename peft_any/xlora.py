"""X-LoRA: a gate over LoRA experts. Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from peft_any._typing import Array, Params, Shape
from peft_any.adapter import Adapter
from peft_any.backend import Backend, backend_of, dtype_name, namespace
from peft_any.errors import ConfigError, ShapeError, StorageError
from peft_any.experts import scale_of, stacked, suitable
from peft_any.factors import EMBEDDING
from peft_any.fields import Count
from peft_any.gates import scaled_experts
from peft_any.gates import xlora_scalings as xlora_scalings
from peft_any.io._atomic import StrPath
from peft_any.layer import Kind, Site
from peft_any.methods.lora import LoraConfig
from peft_any.methods.xlora import A, B, XLoraConfig
from peft_any.rng import Fresh
from peft_any.routed import Routed

_A, _B = "experts_A.weight", "experts_B.weight"


class ExpertsConfig(Routed, peft_type="EXPERTS", prefix="experts_"):
    """y = W·x + b + Σₑ pₑ·Bₑ·Aₑ·x, with the p of each token given to the call as `scalings`.

    `experts_A.weight` (E·r, n_in) holds the E = `n_experts` matrices Aₑ one below the other, and
    `experts_B.weight` (n_out, E·r) the scaled Bₑ side by side. `experts_of` makes them of adapters.

    order: the layers that `scalings` (rows, positions, layers, E) are for, in their order there.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    why: ClassVar[str] = "every call scales its experts"

    r: Count = 8
    n_experts: Count = 2
    order: list[str] | None = None

    @property
    def takes(self) -> frozenset[str]:
        """The experts' shares."""
        return frozenset({"scalings"})

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The experts' factors."""
        k = self.n_experts * self.r
        return {_A: (k, site.n_in), _B: (site.n_out, k)}

    def init(self, site: Site, new: Fresh) -> Params:
        """A uniform, B zero."""
        shapes = self.shapes(site)
        return {_A: new.kaiming(shapes[_A]), _B: new.zeros(shapes[_B])}

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Two products, with each token's scalings in between."""
        if "scalings" not in p:
            raise ConfigError(
                f"{site.name}: experts need their scalings: give model.routed(scalings=…), as "
                "xlora_scalings makes them"
            )
        scalings: Array = p["scalings"]
        if scalings.shape[-1] != self.n_experts:
            raise ShapeError(
                f"{site.name}: scalings of shape {tuple(scalings.shape)} cannot be those of "
                f"{self.n_experts} experts: give (rows, positions, {self.n_experts})"
            )
        return scaled_experts((p[_A], p[_B]), x, scalings, self.order or (), site)


def experts_of(experts: Sequence[Adapter], order: Sequence[str] | None = None) -> Adapter:
    """Put LoRA adapters side by side, for calls that scale each of them by token.

    Parameters
    ----------
    experts : sequence of Adapter
        LoRAs of one rank on the same linear layers.
    order : sequence of str, optional
        The layers in the model's own order, which is that of X-LoRA's scalings; by default in
        that of the first adapter.

    Returns
    -------
    Adapter
        To be applied by `PeftModel.add` and `PeftModel.routed`, as ``scalings``.

    Raises
    ------
    ConfigError, ShapeError
        If an adapter is no plain LoRA, or they differ in layers, ranks or shapes.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import LoraConfig, PeftModel
    >>> model = PeftModel({"fc.weight": np.zeros((3, 4), "float32")})
    >>> config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    >>> tasks = [model.add(name, config, seed=i) for i, name in enumerate("ab")]
    >>> _ = model.add("mixed", experts_of(tasks))
    >>> model.activate("mixed")
    >>> scalings = np.zeros((5, 6, 2), "float32")
    >>> y = model.routed(scalings=scalings).bind().layers["fc"](np.ones((5, 6, 4), "float32"))
    >>> bool(np.all(y == 0))
    True
    """
    r, sites = stacked(experts)
    made = {name: {_A: a, _B: b} for name, (a, b, _) in sites.items()}
    config = ExpertsConfig(
        r=r, n_experts=len(experts), target_modules=[*made], order=[*(order or made)]
    )
    return Adapter(config, made)


def load_xlora(
    path: StrPath,
    experts: Sequence[Adapter | StrPath] | None = None,
    *,
    order: Sequence[str] | None = None,
    backend: str | Backend = "numpy",
) -> Adapter:
    """Read a directory of Hugging Face PEFT's X-LoRA, with the experts that it names.

    Parameters
    ----------
    path : path
        The directory of the gate.
    experts : sequence of Adapter or path, optional
        By default the directories under the paths of the configuration's `adapters`, which
        are relative to where the program runs, as in PEFT.
    order : sequence of str, optional
        See `xlora_of`.
    backend : str or Backend
        Where the arrays go.

    Returns
    -------
    Adapter
        As `xlora_of` gives it; `Adapter.save` writes the gate, byte for byte as it was.

    Raises
    ------
    PeftError
        If a file is missing or malformed, or the experts are not such as `xlora_of` takes.
    """
    gate = Adapter.load(path, backend)
    config = gate.config
    if not isinstance(config, XLoraConfig):
        raise ConfigError(f"{path}: {config.peft_type} is no X-LoRA: give Adapter.load the path")
    given = config.experts if experts is None else experts
    lost = [one for one in given if not (isinstance(one, Adapter) or Path(one).exists())]
    if lost:
        raise StorageError(
            f"{path}: {len(lost)} of its experts are not here, {str(lost[0])!r} among them: give "
            "experts=, their directories or adapters in this order"
        )
    read = [one if isinstance(one, Adapter) else Adapter.load(one, backend) for one in given]
    return xlora_of(gate, read, order=order)


def xlora_of(
    gate: Adapter | XLoraConfig,
    experts: Sequence[Adapter],
    *,
    order: Sequence[str] | None = None,
    seed: int = 0,
) -> Adapter:
    """Put a gate over LoRA experts.

    Parameters
    ----------
    gate : Adapter or XLoraConfig
        A gate that `Adapter.load` read, or a configuration, of which one is drawn.
    experts : sequence of Adapter
        LoRAs of linear layers and embeddings, of any ranks; what one does not adapt it leaves
        alone.
    order : sequence of str, optional
        With `layerwise_scalings`, names in the order of the model's modules, such as
        ``[name for name, _ in model.named_modules()]``: a file does not say which share is
        whose. Names of other modules are passed over.
    seed : int
        Of a drawn gate.

    Returns
    -------
    Adapter
        To be applied by `PeftModel.add` and ``model.routed(hidden=…)``.

    Raises
    ------
    ConfigError, ShapeError
        If an adapter is no plain LoRA, they do not fit together, or `order` lacks a layer.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import LoraConfig, PeftModel
    >>> model = PeftModel({"fc.weight": np.zeros((3, 4), "float32")})
    >>> config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    >>> tasks = [model.add(name, config, seed=i) for i, name in enumerate("ab")]
    >>> gate = XLoraConfig(hidden_size=5, adapters={"0": "a", "1": "b"})
    >>> _ = model.add("mixed", xlora_of(gate, tasks))
    >>> model.activate("mixed")
    >>> hidden, x = np.ones((1, 6, 5), "float32"), np.ones((1, 6, 4), "float32")
    >>> model.routed(hidden=hidden).bind().layers["fc"](x).shape
    (1, 6, 3)
    """
    config = gate.config if isinstance(gate, Adapter) else gate
    if not isinstance(config, XLoraConfig):
        raise ConfigError(f"{config.where}: is no gate: give an XLoraConfig, or its adapter")
    if len(experts) != config.count or not experts:
        raise ConfigError(
            f"{config.where}: adapters names {config.count} experts, and {len(experts)} "
            "are given: give one for each, in the order of the gate's scalings"
        )
    sites, r = _padded(experts)
    listed = [name for name in order if name in sites] if order is not None else None
    if listed is not None and len({*listed}) < len(sites):
        lost = sorted(sites.keys() - {*listed})
        raise ConfigError(f"order: lacks {lost[0]} among {len(lost)} layers that experts adapt")
    config = replace(config, r=r, order=listed, target_modules=[*sites])
    if isinstance(gate, Adapter):
        return gate.replace(config=config, sites=sites)
    first = next(iter(sites.values()))[A]
    new = Fresh(seed, backend_of(first), dtype=dtype_name(first))
    named = [Site(name, p[A].shape[1], p[B].shape[0]) for name, p in sites.items()]
    return Adapter(config, sites, config.init_shared(named, new))


def experts_in(adapter: Adapter) -> list[Adapter]:
    """Take experts apart again, as after a training with `use_trainable_adapters`.

    Parameters
    ----------
    adapter : Adapter
        Of `xlora_of`, `load_xlora` or `experts_of`.

    Returns
    -------
    list of Adapter
        LoRAs with scale 1, to be saved where the gate's `adapters` say.

    Raises
    ------
    ConfigError
        If it holds no experts.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import LoraConfig
    >>> p = {"lora_A.weight": np.ones((2, 4)), "lora_B.weight": np.ones((3, 2))}
    >>> one = Adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["fc"]), {"fc": p})
    >>> first, second = experts_in(experts_of([one, one]))
    >>> first.config.lora_alpha, second.sites["fc"]["lora_B.weight"][0, 0].item()
    (2, 3.0)
    """
    config = adapter.config
    if isinstance(config, ExpertsConfig):
        names, r, count = (_A, _B), config.r, config.n_experts
    elif isinstance(config, XLoraConfig) and config.r is not None:
        names, r, count = (A, B), config.r, config.count
    else:
        raise ConfigError(f"{config.where}: holds no experts: give what load_xlora reads")
    plain = LoraConfig(r=r, lora_alpha=r, target_modules=[*adapter.sites])
    cuts = [slice(i * r, (i + 1) * r) for i in range(count)]
    return [
        Adapter(
            plain,
            {
                name: {"lora_A.weight": p[names[0]][cut, :], "lora_B.weight": p[names[1]][:, cut]}
                for name, p in adapter.sites.items()
            },
        )
        for cut in cuts
    ]


def _padded(experts: Sequence[Adapter]) -> tuple[dict[str, Params], int]:
    """Lay experts side by side, each with zeros up to the largest rank."""
    for i, one in enumerate(experts):
        suitable(f"experts[{i}]", one, tables=True)
    found = [{name: _pair(p) for name, p in one.sites.items()} for one in experts]
    r, out = max(a.shape[0] for pairs in found for a, _ in pairs.values()), {}
    for name in dict.fromkeys(name for pairs in found for name in pairs):
        here = [pairs[name] for pairs in found if name in pairs]
        sizes = {(a.shape[1], b.shape[0]) for a, b in here}
        if len(sizes) != 1:
            raise ShapeError(
                f"{name}: experts of {sorted(sizes)} inputs and outputs: give one base's"
            )
        ((n, m),) = sizes
        new = Fresh(0, backend_of(here[0][0]), dtype=dtype_name(here[0][0]))
        parts_a, parts_b = [], []
        for one, pairs in zip(experts, found, strict=True):
            rank = 0
            if name in pairs:
                a, b = pairs[name]
                rank = a.shape[0]
                parts_a.append(a)
                parts_b.append(scale_of(one, Site(name, n, m)) * b)
            if rank < r:
                parts_a.append(new.zeros((r - rank, n)))
                parts_b.append(new.zeros((m, r - rank)))
        xp = namespace(*parts_a)
        out[name] = {A: xp.concat(parts_a, axis=0), B: xp.concat(parts_b, axis=1)}
    return out, r


def _pair(p: Params) -> tuple[Array, Array]:
    a, b = EMBEDDING if EMBEDDING[0] in p else ("lora_A.weight", "lora_B.weight")
    return p[a], p[b]

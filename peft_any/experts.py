"""Routers over LoRA experts. Arrow: Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from peft_any._typing import Array, Params, Shape
from peft_any.adapter import Adapter
from peft_any.algebra import lowrank
from peft_any.backend import Backend, astype, dtype_name, namespace
from peft_any.checks import refuse
from peft_any.errors import ConfigError, ShapeError
from peft_any.extras import is_trained
from peft_any.factors import EMBEDDING
from peft_any.fields import Count, Positive
from peft_any.io._atomic import StrPath
from peft_any.layer import Kind, Site, linear
from peft_any.methods.lora import LoraConfig
from peft_any.mixtures import largest_shares
from peft_any.rng import Fresh
from peft_any.routed import Routed
from peft_any.starts import has_start

_A, _B, _ROUTER = "arrow_A.weight", "arrow_B.weight", "arrow_router.weight"
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "arrow_config",
)


class ArrowConfig(Routed, peft_type="ARROW", prefix="arrow_"):
    """y = W·x + b + Σₑ pₑ·Bₑ·Aₑ·x, with p the softmax of the `top_k` largest abs(vₑ·x)/T.

    `arrow_A.weight` (E·r, n_in) holds the E = `n_experts` matrices Aₑ one below the other,
    `arrow_B.weight` (n_out, E·r) the scaled Bₑ side by side, and `arrow_router.weight` (E, n_in)
    the vₑ: the leading right singular vectors of the Bₑ·Aₑ. `arrow_of` makes them of adapters.

    top_k: how many experts act on a token. router_temperature: T.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    why: ClassVar[str] = "every token chooses among its experts"

    r: Count = 8
    n_experts: Count = 3
    top_k: Count = 3
    router_temperature: Positive = 1.0

    def check(self) -> None:
        """No more experts are chosen than there are."""
        refuse(self, top_k=(self.top_k <= self.n_experts, f"at most n_experts={self.n_experts}"))

    @property
    def frozen(self) -> frozenset[str]:
        """The prototypes, which follow from the experts as they were."""
        return frozenset({_ROUTER})

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The experts' factors, and their prototypes."""
        k = self.n_experts * self.r
        return {
            _A: (k, site.n_in),
            _B: (site.n_out, k),
            _ROUTER: (self.n_experts, site.n_in),
        }

    def init(self, site: Site, new: Fresh) -> Params:
        """A uniform, B zero, prototypes of length about 1."""
        shapes = self.shapes(site)
        router = new.normal(shapes[_ROUTER]) * site.n_in**-0.5
        return {_A: new.kaiming(shapes[_A]), _B: new.zeros(shapes[_B]), _ROUTER: router}

    def residual(self, p: Params, x: Array, site: Site) -> Array:  # noqa: ARG002
        """Two products, with each token's shares in between."""
        xp = namespace(x, *p.values())
        scores = xp.abs(linear(x, p[_ROUTER])) / self.router_temperature
        shares = xp.expand_dims(largest_shares(scores, self.top_k), axis=-1)
        h = linear(x, p[_A])
        parts = xp.reshape(h, (*x.shape[:-1], self.n_experts, self.r)) * shares
        return linear(xp.reshape(parts, h.shape), p[_B])


def arrow_of(
    experts: Sequence[Adapter],
    *,
    general: Sequence[Adapter] = (),
    top_k: Count = 3,
    router_temperature: Positive = 1.0,
) -> Adapter:
    """Make a router of LoRA adapters, as Hugging Face PEFT's `create_arrow_model` does.

    The prototypes come from QR and small SVDs of the factors, where PEFT iterates fifteen times
    from a random vector: results agree where that has converged, and no seed matters.

    Parameters
    ----------
    experts : sequence of Adapter
        LoRAs of one rank on the same linear layers.
    general : sequence of Adapter
        LoRAs of general knowledge: the means of their A and of their B are subtracted from those
        of every expert (GenKnowSub), as `use_gks` does.
    top_k, router_temperature
        Of `ArrowConfig`.

    Returns
    -------
    Adapter
        To be applied by `PeftModel.add`; it cannot be merged.

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
    >>> tasks = [model.add(f"task {i}", config, seed=i) for i in range(3)]
    >>> _ = model.add("arrow", arrow_of(tasks, top_k=2))
    >>> model.activate("arrow")
    >>> model.bind().layers["fc"](np.ones((5, 4), "float32")).shape
    (5, 3)
    """
    r, found = stacked(experts, general)
    sites = {
        name: {_A: a, _B: b, _ROUTER: _prototypes(pairs)} for name, (a, b, pairs) in found.items()
    }
    config = ArrowConfig(
        r=r,
        n_experts=len(experts),
        top_k=top_k,
        router_temperature=router_temperature,
        target_modules=[*sites],
    )
    return Adapter(config, sites)


def load_arrow(
    path: StrPath, backend: str | Backend = "numpy", *, subtracted: bool | None = None
) -> Adapter:
    """Read a router that Hugging Face PEFT saved, with its experts, which lie beside it.

    Its `save_pretrained` writes a directory for each adapter of a model of `create_arrow_model`:
    ``arrow_router``, whose own factors have no effect, ``task_0`` and so on, and ``gks_0``….

    Parameters
    ----------
    path : path
        The model's directory, or the router's within it.
    backend : str or Backend
        Where the arrays go.
    subtracted : bool, optional
        Of a router with `use_gks`: whether the saved experts already lack general knowledge.
        PEFT subtracts it in place at a model's first call, so that only those who saved it know.

    Returns
    -------
    Adapter
        To be applied by `PeftModel.add`, as that of `arrow_of`.

    Raises
    ------
    ConfigError, StorageError
        If it is no router, or names no experts; if one is missing; if `subtracted` must be given.
    """
    folder = Path(path)
    if (folder / "arrow_router").is_dir():
        folder = folder / "arrow_router"
    config = Adapter.load(folder).config
    router = getattr(config, "arrow_config", None)
    if router is None or not router.task_adapter_names:
        raise ConfigError(
            f"{folder}: is no router of experts: arrow_config={router!r}: give the directory that "
            "a model of create_arrow_model was saved to"
        )
    if router.use_gks and subtracted is None:
        raise ConfigError(
            f"{folder}: use_gks=True: Hugging Face PEFT subtracts general knowledge from the "
            "experts at the first call: give subtracted=True if the model was called before it was "
            "saved, else subtracted=False"
        )
    general = [] if subtracted or not router.use_gks else router.gks_adapter_names or []
    return arrow_of(
        [Adapter.load(folder.parent / name, backend) for name in router.task_adapter_names],
        general=[Adapter.load(folder.parent / name, backend) for name in general],
        top_k=router.top_k,
        router_temperature=router.router_temperature,
    )


def suitable(label: str, adapter: Adapter, *, tables: bool = False) -> None:
    """Refuse what cannot be an expert: all but a plain LoRA of linear layers, or of embeddings too.

    Raises
    ------
    ConfigError
    """
    config = adapter.config
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{label}: {config.peft_type} cannot be an expert: give a LORA")
    odd = [name for name in _VARIANTS if getattr(config, name)]
    odd += ["init_lora_weights"] if has_start(config.init_lora_weights) else []
    # HF saves an adapted embedding's own table along
    copies = [n for n in adapter.extra if not tables or is_trained(config, n)]
    if odd or copies or adapter.tokens:
        what = ", ".join(odd) or "full copies or rows of tensors"
        raise ConfigError(f"{label}: cannot be an expert with {what}: give a plain LoRA")
    known = [{"lora_A.weight", "lora_B.weight"}, {*EMBEDDING}][: 1 + tables]
    for name, p in adapter.sites.items():
        if p.keys() not in known or any(len(array.shape) != 2 for array in p.values()):
            shapes = {key: tuple(array.shape) for key, array in p.items()}
            raise ConfigError(f"{label}: {name}: is no linear layer, which experts need: {shapes}")


def _check(label: str, adapter: Adapter, first: Adapter) -> None:
    suitable(label, adapter)
    if adapter.sites.keys() != first.sites.keys():
        apart = sorted(adapter.sites.keys() ^ first.sites.keys())
        raise ConfigError(
            f"{label}: adapts other layers than experts[0], {apart[0]} among {len(apart)}: "
            "give LoRAs on the same layers"
        )
    for name, p in adapter.sites.items():
        shapes = {key: tuple(array.shape) for key, array in p.items()}
        want = {key: tuple(array.shape) for key, array in first.sites[name].items()}
        if shapes != want:
            raise ShapeError(f"{label}: {name}: {shapes} cannot stand beside {want} of experts[0]")


def stacked(
    experts: Sequence[Adapter], general: Sequence[Adapter] = ()
) -> tuple[int, dict[str, tuple[Array, Array, list[tuple[Array, Array]]]]]:
    """Lay out experts side by side, less the mean of general ones.

    Returns
    -------
    int
        Their rank.
    dict of str to (array (E·r, n_in), array (n_out, E·r), list of (array, array))
        For each layer all A, all scaled B, and the pairs of A and B that they are made of.
    """
    if not experts:
        raise ConfigError("experts: none to choose from: give LoRA adapters")
    named = {f"experts[{i}]": one for i, one in enumerate(experts)}
    named |= {f"general[{i}]": one for i, one in enumerate(general)}
    for label, one in named.items():
        _check(label, one, experts[0])
    ranks = {name: p["lora_A.weight"].shape[0] for name, p in experts[0].sites.items()}
    if len({*ranks.values()}) != 1:
        raise ShapeError(f"experts: ranks differ between layers, {ranks}: give LoRAs of one rank")
    return next(iter(ranks.values())), {
        name: _side_by_side(name, experts, general) for name in experts[0].sites
    }


def _side_by_side(
    name: str, experts: Sequence[Adapter], general: Sequence[Adapter]
) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    pairs = [_pair(one.sites[name]) for one in experts]
    if general:
        others = [_pair(one.sites[name]) for one in general]
        a0, b0 = (sum(rest, start) / len(others) for start, *rest in zip(*others, strict=True))
        pairs = [(a - a0, b - b0) for a, b in pairs]
    site = Site(name, pairs[0][0].shape[1], pairs[0][1].shape[0])
    scales = [scale_of(one, site) for one in experts]
    xp = namespace(*(a for a, _ in pairs))
    wide = xp.concat([s * b for s, (_, b) in zip(scales, pairs, strict=True)], axis=1)
    return xp.concat([a for a, _ in pairs], axis=0), wide, pairs


def _prototypes(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """Find the leading right singular vectors of the B·A (E, n_in)."""
    leading = [lowrank.svd((b, a))[2][:1, :] for a, b in pairs]
    found = namespace(*leading).concat(leading, axis=0)
    return astype(found, dtype_name(pairs[0][0]))


def _pair(p: Mapping[str, Array]) -> tuple[Array, Array]:
    return p["lora_A.weight"], p["lora_B.weight"]


def scale_of(adapter: Adapter, site: Site) -> float:
    """Give the scale of an expert's product at a layer."""
    config = adapter.config
    assert isinstance(config, LoraConfig)  # noqa: S101 - `suitable` has seen to it
    return config.at(site).scaling

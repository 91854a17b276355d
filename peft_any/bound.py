"""What a model is when its parameters are fixed: adapted layers to call; counts to print."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

from peft_any import attention
from peft_any import parts as several
from peft_any._tree import leaves
from peft_any._typing import Array
from peft_any.backend import (
    astype,
    dtype_name,
    is_differentiated,
    is_floating,
    is_traced,
    is_trained,
    lasting,
)
from peft_any.errors import ConfigError, TargetError, nearest
from peft_any.layer import Dense, check_input
from peft_any.parts import Part
from peft_any.prompt import Attended


@dataclass(eq=False, repr=False)
class BoundLayer:
    """An adapted layer as a callable.

    Attributes
    ----------
    base : Dense
        The layer below all adapters.
    parts : sequence of Part
        The adapters that act on it.
    stacked : bool
        Whether they act one upon another rather than as a weighted sum.
    """

    base: Dense
    parts: Sequence[Part]
    stacked: bool

    def __post_init__(self) -> None:
        self._held = next((a for p in self.parts for a in p.params.values() if is_trained(a)), None)
        self._stored = dtype_name(self.base.weight)
        self._prepare()

    def _prepare(self) -> None:
        self._paused = self.trained and not is_differentiated(self._held)
        with lasting(self.base.weight):
            self._ready = several.ready(self.parts, self.base, stacked=self.stacked)
        self._wide = dtype_name(self._ready[1].weight)

    def __repr__(self) -> str:
        site, by = self.base.site, [part.config.peft_type for part in self.parts]
        return f"<BoundLayer {site.name} ({site.n_out}, {site.n_in}): {', '.join(by) or 'base'}>"

    @property
    def ready(self) -> tuple[list[Part], Dense]:
        """Adapters and base in the compute dtype, with what all calls have in common."""
        if self._paused and is_differentiated(self._held):
            self._prepare()  # what was made while no derivatives were recorded has none
        return self._ready

    @property
    def trained(self) -> bool:
        """Whether torch's autograd follows its parameters."""
        return self._held is not None

    @property
    def traced(self) -> bool:
        """Whether its arrays only stand for some, inside a transformation such as jit."""
        parts, base = self.ready
        held = [base.weight, [part.params for part in parts]]
        return any(is_traced(array) for _, array in leaves(held))

    def __call__(self, x: Array) -> Array:
        """Apply the layer to x (…, n_in), or to integer token numbers of an embedding.

        Returns
        -------
        array (…, n_out)
            In `x`'s dtype (the base's for integers), computed in at least float32.
        """
        if self.base.site.is_conv:
            raise ConfigError(
                f"{self.base.site.name}: a convolution cannot be called here: its stride and "
                "padding are not in the checkpoint; use merge() and your library's convolution"
            )
        check_input(x, self.base.site)
        (parts, base), wide, out = self.ready, self._wide, self._stored
        if is_floating(x) and (out := dtype_name(x)) != wide:
            x = astype(x, wide)
        y: Array = several.forward(parts, x, base, stacked=self.stacked)
        return y if out == wide else astype(y, out)


class BoundLike(Protocol):
    """A layer of a bound model, of one adapter or of a batch with many."""

    @property
    def traced(self) -> bool:
        """Whether its arrays only stand for some, inside a transformation such as jit."""

    @property
    def base(self) -> Dense:
        """The layer below the adapters."""

    def __call__(self, x: Array) -> Array:
        """Apply the layer."""


class Layers(Mapping[str, BoundLike]):
    """The layers of a bound model by module name, each made on first use."""

    def __init__(
        self,
        adapted: Collection[str],
        every: Callable[[], Mapping[str, Any]],
        make: Callable[[str], BoundLike],
    ) -> None:
        self._adapted, self._every, self._make = adapted, every, make
        self._made: dict[str, BoundLike] = {}

    def __getitem__(self, name: str) -> BoundLike:
        if name not in self._made:
            # a step asks for adapted layers alone; to find the others takes a look at all tensors
            if name not in self._adapted and name not in self._every():
                raise TargetError(f"{name}: no such layer{nearest(name, self._every())}")
            made = self._make(name)
            if made.traced:
                return made  # it must not outlive the transformation that traces it
            self._made[name] = made
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._adapted or name in self._every()

    def __repr__(self) -> str:
        return f"<Layers: {len(self)}, {len(self._adapted)} of them adapted>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._every())

    def __len__(self) -> int:
        return len(self._every())


@dataclass(frozen=True, eq=False)
class Bound:
    """A model with its parameters fixed.

    Attributes
    ----------
    layers : mapping of str to callable
        The layers, adapted where an active adapter says so: ``layers["fc"](x)``.
    params : mapping {adapter: {site: {name: array}}}
        The trained arrays: a prompt's table is ``params["task"][""]["prompt_embeddings"]``.
    weights : Weights
        All tensors under their checkpoint names, for code that takes a dict of arrays. An adapted
        weight is an array-like whose products apply the adapted layer; other uses take the merged
        array, which is refused where a training step drops inputs.
    attended : mapping of str to (config, weight)
        The active adapters that act within attention (`attend`).
    """

    layers: Layers
    params: Mapping[str, Any] = field(default_factory=dict, repr=False)
    weights: Mapping[str, Any] = field(default_factory=dict)
    attended: Mapping[str, tuple[Attended, float]] = field(default_factory=dict)

    def attend(self, module: str, q: Array) -> Array:
        """Compute what the active adapters add to the output of an attention module.

        Parameters
        ----------
        module : str
            ``"model.layers.3.self_attn"``.
        q : array (batch, heads, tokens, c)
            The queries as the attention takes them, turned by their positions.

        Returns
        -------
        array (batch, tokens, d)
            To add to the attention's output, behind `o_proj`; zeros where no adapter acts.

        Raises
        ------
        ShapeError
            If keys and values do not fit the heads.
        TargetError
            If the module has no projections of keys and values.

        Examples
        --------
        >>> import numpy as np
        >>> from peft_any import PeftModel
        >>> from peft_any.methods.adaption_prompt import AdaptionPromptConfig
        >>> at = "layers.0.self_attn"
        >>> model = PeftModel({f"{at}.{p}_proj.weight": np.eye(4) for p in "qkvo"})
        >>> _ = model.add("task", AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
        >>> p = {"adaption_prompt": np.ones((1, 2, 4)), "adaption_gate": np.full(1, 0.5)}
        >>> model.bind({"task": {at: p}}).attend(at, np.ones((1, 2, 1, 2)))
        array([[[0.5, 0.5, 0.5, 0.5]]])
        """
        return attention.gain(module, q, self.layers, self.attended, self.params)


class Parameters(dict[str, dict[str, dict[str, Any]]]):
    """Trainable arrays by adapter, site and name: a plain nested dict that prints its counts.

    Arrays that belong to no site (shared ones, a prompt's table, full copies) stand under the
    site ``""``.

    Examples
    --------
    >>> import numpy as np
    >>> p = Parameters({"a": {"fc": {"lora_A.weight": np.zeros((2, 5))}}}, base=90)
    >>> p.trainable, p.total, p.per_site
    (10, 100, {'a': {'fc': 10}})
    """

    def __init__(self, values: Mapping[str, dict[str, dict[str, Any]]], base: int = 0) -> None:
        super().__init__(values)
        self.base = base

    @property
    def per_site(self) -> dict[str, dict[str, int]]:
        """How many numbers are trained at each site of each adapter."""
        return {
            adapter: {site: sum(prod(a.shape) for a in p.values()) for site, p in sites.items()}
            for adapter, sites in self.items()
        }

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(n for sites in self.per_site.values() for n in sites.values())

    @property
    def total(self) -> int:
        """How many numbers there are, the base's included."""
        return self.base + self.trainable

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {share:.4f}"
        )

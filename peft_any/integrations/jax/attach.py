"""Attaching adapters to a pytree of a model, and taking them off or merging them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from peft_any._typing import DTypeLike
from peft_any.adapter import Adapter
from peft_any.dropout import Seed, drops
from peft_any.errors import ConfigError, TargetError
from peft_any.integrations.jax.trees import Kinds, Tree
from peft_any.io._atomic import StrPath
from peft_any.layout import layout
from peft_any.method import Tuner
from peft_any.model import PeftModel
from peft_any.registry import Config
from peft_any.selection import refuse_named

Params = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Trained arrays {adapter: {site: {name: array}}}: a pytree."""


@dataclass(frozen=True, eq=False)
class AttachedTree:
    """A tree with adapters beside it: what `attach_tree` gives. Nothing of it changes.

    Attributes
    ----------
    tree : pytree
        The very tree that was attached to.
    """

    tree: Any
    _read: Tree
    _model: PeftModel

    @property
    def params(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What is trained, {adapter: {site: {name: array}}}, as the adapters have it."""
        return dict(self._model.parameters)

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order they act."""
        return self._model.names

    def bind(
        self,
        params: Params | None = None,
        tree: Any = None,
        *,
        rng: Seed | None = None,
        **routing: Any,
    ) -> Any:
        """Make the adapted tree: of the same kind as the tree, called or read as it is.

        To be called within what is traced, on its parameters.

        Parameters
        ----------
        params : pytree, optional
            Stands in for `params`, in part or whole: what a gradient is taken of.
        tree : pytree, optional
            The tree with other arrays; as an argument of a jitted function, so that it is no
            constant of the compiled one.
        rng : int or sequence of int, optional
            Seeds the dropout of a training step, ``(seed, step)``.
        **routing
            What a method takes beside its input: ``task_ids`` of Poly.

        Returns
        -------
        pytree
            Linear layers, embeddings of Equinox and two-dimensional arrays of dicts hold an
            array-like whose products apply the adapted layer; all other adapted layers the merged
            weight.

        Raises
        ------
        ConfigError
            If `tree` has another structure, or a layer that takes the merged weight would drop
            inputs.
        """
        nodes = self._read.nodes if tree is None else self._read.nodes_of(tree)
        model = self._on(nodes)
        if rng is not None:
            self._refuse_dropout(model)
        bound = (model.routed(**routing) if routing else model).bind(params, rng=rng)
        return self._read.with_values({name: bound.weights[name] for name in model.touched}, nodes)

    def updated(self, params: Params) -> AttachedTree:
        """Copy with trained arrays in the place of the adapters' own."""
        model = self._on(self._read.nodes)
        model.update(params)
        return AttachedTree(self.tree, self._read, model)

    def settled(self, params: Params) -> dict[str, Any]:
        """Bring arrays that an optimiser has moved to where their methods keep them."""
        return self._model.settled(params)

    def without(self, name: str) -> AttachedTree:
        """Copy without one of the adapters."""
        model = self._on(self._read.nodes)
        model.remove(name)
        return AttachedTree(self.tree, self._read, model)

    def adapter(self, name: str | None = None) -> Adapter:
        """Give one of the adapters, by default the first."""
        return self._model[self.names[0] if name is None else name]

    def save(self, path: StrPath, name: str | None = None, *, overwrite: bool = False) -> None:
        """Write one of the adapters as Hugging Face PEFT lays it out: see `Adapter.save`."""
        self.adapter(name).to("numpy").save(path, overwrite=overwrite)

    def _on(self, nodes: list[Any]) -> PeftModel:
        """Copy the model, over the arrays of some nodes."""
        model = self._model.alone(None)
        model.weights = self._read.arrays(nodes)
        model.activate(model.names)
        return model

    def _refuse_dropout(self, model: PeftModel) -> None:
        sites = model.sites()
        for key in (
            key for name in model.names if drops(model[name].config) for key in model[name].sites
        ):
            if not self._read.places[sites[key].weight].lazy:
                raise ConfigError(
                    f"{key}: cannot drop inputs of a layer that is adapted through its weight: "
                    "train with a dropout of 0, or leave the layer out"
                )


def attach_tree(
    tree: Any,
    adapter: Adapter | Config,
    name: str = "default",
    *,
    kinds: Kinds | None = None,
    seed: int = 0,
    dtype: DTypeLike = "float32",
    rederive: bool = False,
) -> AttachedTree:
    """Put an adapter on a pytree of a model; several act one upon another.

    Layers are called by their paths: ``layers.0.fc`` for ``tree.layers[0].fc`` or
    ``tree["layers"][0]["fc"]``. Flax's kernels, embeddings and scales are ``weight`` to an adapter,
    in a checkpoint's layout, so that its files are those of the same model in torch.

    Parameters
    ----------
    tree : pytree, or AttachedTree
        Equinox or Flax NNX modules, nested dicts of arrays (Flax's parameters, or a checkpoint's
        tensors), or what `attach_tree` gave.
    adapter : Adapter or Config
        A loaded adapter, checked against the tree, or a configuration to start from.
    name : str
    kinds : mapping of str to Kind or Site, optional
        What arrays of dicts are, where their names and shapes do not tell: `layout`.
    seed, dtype
        Of a fresh adapter's initial values.
    rederive : bool
        Redo the decomposition of the base that an unconverted PiSSA or OLoRA file assumes.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        If the name is taken, the tree holds no array of floats, or the adapter does not fit.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from peft_any import LoraConfig
    >>> net = {"fc": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> task = attach_tree(net, LoraConfig(r=2, target_modules=["fc"]))
    >>> def loss(params, x):
    ...     fc = task.bind(params)["fc"]
    ...     return jnp.sum((x @ fc["kernel"] + fc["bias"]) ** 2)
    >>> slopes = jax.jit(jax.grad(loss))(task.params, jnp.ones((2, 4)))
    >>> jax.tree.map(jnp.shape, slopes)
    {'default': {'fc': {'lora_A.weight': (2, 4), 'lora_B.weight': (3, 2)}}}
    >>> detach_tree(task) is net
    True
    """
    if isinstance(tree, AttachedTree):
        before, read = tree, tree._read  # noqa: SLF001 - its own class
        model = before._on(read.nodes)  # noqa: SLF001
        tree = before.tree
    else:
        read = Tree(tree, kinds)
        if not read.places:
            raise TargetError(
                "tree: holds no array of floats, so that nothing of it can be adapted"
            )
        model = PeftModel(read.arrays(), kinds=read.kinds)
    held, fresh = ([*adapter.sites], None) if isinstance(adapter, Adapter) else ([], adapter)
    config = adapter.config if isinstance(adapter, Adapter) else adapter
    if read.refused:
        refuse_named(fresh, held, layout(read.arrays(), read.kinds, config), read.refused)
    added = model.add(name, adapter, seed=seed, dtype=dtype, rederive=rederive)
    if not isinstance(added.config, Tuner):
        raise ConfigError(
            f"{added.config.where}: adapts no layer, so that it cannot be attached to a tree: "
            "call its own functions"
        )
    model.activate(model.names)
    return AttachedTree(tree, read, model)


def detach_tree(attached: AttachedTree) -> Any:
    """Give the very tree that adapters were attached to."""
    return attached.tree


def merge_tree(attached: AttachedTree, params: Params | None = None, tree: Any = None) -> Any:
    """Merge all adapters into the tree: of the same kind, with arrays alone.

    Weights are computed in at least float32 and rounded once; they lie on the devices as the
    tree's do. Arrays that no adapter changes are the tree's own.

    Parameters
    ----------
    attached : AttachedTree
    params, tree
        As of `AttachedTree.bind`.

    Raises
    ------
    ConfigError
        If a method cannot be merged.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from peft_any import LoraConfig
    >>> net = {"fc": {"kernel": jnp.ones((4, 3))}}
    >>> task = attach_tree(net, LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
    >>> x = jnp.ones((2, 4))
    >>> bool(jnp.allclose(x @ merge_tree(task)["fc"]["kernel"], x @ task.bind()["fc"]["kernel"]))
    True
    """
    read = attached._read  # noqa: SLF001 - its own class
    nodes = read.nodes if tree is None else read.nodes_of(tree)
    model = attached._on(nodes)  # noqa: SLF001
    weights = model.bind(params).weights
    return read.with_values({name: jnp.asarray(weights[name]) for name in model.touched}, nodes)

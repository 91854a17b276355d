"""Adapters on pytrees of JAX as they are: Equinox modules, Flax NNX modules, nested dicts.

Nothing is written to: an adapted tree is made of the tree and the adapter's parameters, within
whatever JAX traces. Neither Equinox nor Flax is imported unless the tree is of them.
"""

from peft_any.integrations.jax.attach import AttachedTree as AttachedTree
from peft_any.integrations.jax.attach import attach_tree as attach_tree
from peft_any.integrations.jax.attach import detach_tree as detach_tree
from peft_any.integrations.jax.attach import merge_tree as merge_tree

__all__ = ["AttachedTree", "attach_tree", "detach_tree", "merge_tree"]

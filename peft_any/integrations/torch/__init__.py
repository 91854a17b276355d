"""Adapters on torch modules as they are: nothing is subclassed, wrapped or replaced.

An adapted layer gets a `forward` of its own and one child, ``peft_any``, with the adapters'
parameters; its class, its weights and its ``state_dict`` stay what they were.
"""

from peft_any.integrations.torch.attach import attach as attach
from peft_any.integrations.torch.attach import attached as attached
from peft_any.integrations.torch.attach import detach_adapter as detach_adapter
from peft_any.integrations.torch.attach import merge_into as merge_into
from peft_any.integrations.torch.handle import Attached as Attached

__all__ = ["Attached", "attach", "attached", "detach_adapter", "merge_into"]

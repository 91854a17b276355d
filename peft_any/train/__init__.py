"""Training on any array library: optimisers, schedules, batches, and a loop over them."""

from __future__ import annotations

from peft_any.train.allocator import RankAllocator as RankAllocator
from peft_any.train.batches import Batches as Batches
from peft_any.train.loop import Run as Run
from peft_any.train.loop import fit as fit
from peft_any.train.optimise import adamw as adamw
from peft_any.train.optimise import apply_updates as apply_updates
from peft_any.train.optimise import lion as lion
from peft_any.train.optimise import optimizer_for as optimizer_for
from peft_any.train.optimise import sgd as sgd
from peft_any.train.optimise import updated as updated
from peft_any.train.resume import load_state as load_state
from peft_any.train.resume import save_state as save_state
from peft_any.train.schedules import constant as constant
from peft_any.train.schedules import cosine as cosine
from peft_any.train.schedules import linear as linear
from peft_any.train.transforms import Optimizer as Optimizer
from peft_any.train.transforms import accumulate as accumulate
from peft_any.train.transforms import chain as chain
from peft_any.train.transforms import clip_by_global_norm as clip_by_global_norm
from peft_any.train.transforms import global_norm as global_norm
from peft_any.train.transforms import lora_plus as lora_plus
from peft_any.train.transforms import skip_not_finite as skip_not_finite

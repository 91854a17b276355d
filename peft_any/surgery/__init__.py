"""Checkpoints on disk: merge adapters into them, audit a merge, look into an adapter."""

from __future__ import annotations

from peft_any.surgery.comparison import CheckpointDifference as CheckpointDifference
from peft_any.surgery.comparison import diff as diff
from peft_any.surgery.extracted import Extraction as Extraction
from peft_any.surgery.extraction import extract as extract
from peft_any.surgery.inspection import Inspection as Inspection
from peft_any.surgery.inspection import inspect_adapter as inspect_adapter
from peft_any.surgery.merge import merge_checkpoint as merge_checkpoint
from peft_any.surgery.verify import verify_checkpoint as verify_checkpoint

"""What the file of a method is written with: what it may be, where it acts, and of which types."""

from __future__ import annotations

from peft_any._typing import Array, Params, Shape
from peft_any.dropout import Noise
from peft_any.layer import Dense, Kind, Layer, Site
from peft_any.method import Additive, Tuner
from peft_any.prefixes import Prefixed
from peft_any.prompt import Attended, Prompt
from peft_any.prompts import Prepended
from peft_any.rng import Fresh
from peft_any.routed import Routed

__all__ = [
    "Additive",
    "Array",
    "Attended",
    "Dense",
    "Fresh",
    "Kind",
    "Layer",
    "Noise",
    "Params",
    "Prefixed",
    "Prepended",
    "Prompt",
    "Routed",
    "Shape",
    "Site",
    "Tuner",
]

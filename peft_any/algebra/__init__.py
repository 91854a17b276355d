"""Adapters as matrices of low rank: combined, cut to a rank, compared, by their factors alone."""

from __future__ import annotations

from peft_any.algebra.combining import combine as combine
from peft_any.algebra.record import LayerRecord as LayerRecord
from peft_any.algebra.record import Record as Record
from peft_any.algebra.resizing import resize as resize

"""What training drops, drawn by torch's own generators, on the device and by its compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peft_any._typing import Shape
from peft_any.backend import is_floating
from peft_any.dropout import Noise


class Drawn(Noise):
    """Draws that follow ``torch.manual_seed``; each is made anew.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = Drawn(()).thinned(torch.ones(1000), 0.5)
    >>> sorted({*x.tolist()})
    [0.0, 2.0]
    """

    def happens(self, rate: float) -> bool:
        """Toss one coin; never drawn for a rate of 0."""
        return rate > 0 and bool(torch.rand(()) < rate)

    def kept(self, shape: Shape, rate: float, like: Tensor, *, scaled: bool = True) -> Tensor:
        """Draw a mask: 0 with probability `rate`, else 1, or 1/(1 - rate) if `scaled`."""
        ones = like.new_ones(shape)
        thin = functional.dropout(ones, rate)
        return thin if scaled else torch.minimum(thin, ones)

    def thinned(self, x: Tensor, rate: float) -> Tensor:
        """Drop numbers of `x` and scale up the rest; integers (tokens) stay, as in HF PEFT."""
        return functional.dropout(x, rate) if rate > 0 and is_floating(x) else x

    def normal(self, shape: Shape, like: Tensor) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    def logistic(self, shape: Shape, like: Tensor) -> Tensor:
        """Draw standard logistic numbers."""
        u = torch.rand(shape, dtype=like.dtype, device=like.device)
        return torch.logit(u, torch.finfo(like.dtype).tiny)

    def chosen_in(self, rows: int, n: int, rate: float, like: Tensor) -> Tensor:
        """Choose int(rate·n) of the n places of one row: a mask (rows, n, 1, 1), 1 where chosen."""
        place, device = torch.randperm(n, device=like.device), like.device
        row = torch.arange(rows, device=device) == torch.randint(rows, (1,), device=device)
        mask = row[:, None] & (place < int(rate * n))[None, :]
        return mask.to(like.dtype)[:, :, None, None]

    def rows(self, n: int, rate: float, like: Tensor, *, scaled: bool) -> Tensor:
        """Draw a mask of rows (n,); `scaled` by what is left of them."""
        mask = (torch.rand(n, device=like.device) > rate).to(like.dtype)
        none: Any = torch.zeros_like(mask)
        return torch.where(mask.mean() > 0, mask / mask.mean(), none) if scaled else mask

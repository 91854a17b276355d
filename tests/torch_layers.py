"""Torch modules of the table's rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_any.layer import Dense, Site


class Conv1D(nn.Module):
    """Transformers' linear layer with its weight transposed, by the name that it is known by."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def layer_of(base: Dense) -> nn.Module:
    """Make the torch layer that a row's base describes."""
    site = base.site
    weight = torch.tensor(base.stored())
    bias = None if base.bias is None else torch.tensor(base.bias)
    if site.kind == "Conv1D":
        return Conv1D(weight, bias)
    made = _empty(site, weight.dtype)
    with torch.no_grad():
        if site.kind == "MultiheadAttention":
            made.in_proj_weight.copy_(weight)
            made.in_proj_bias.copy_(bias)
        else:
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
    return made


class Affine(nn.Module):
    """What follows a normalisation."""

    def __init__(self, site: Site, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(site.n_out, dtype=dtype))
        bias = nn.Parameter(torch.zeros(site.n_out, dtype=dtype)) if site.bias else None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale, and shift."""
        return x * self.weight if self.bias is None else x * self.weight + self.bias


def _empty(site: Site, dtype: torch.dtype) -> Any:
    if site.kind == "Linear":
        return nn.Linear(site.n_in, site.n_out, bias=site.bias, dtype=dtype)
    if site.kind == "Embedding":
        return nn.Embedding(site.n_in, site.n_out, dtype=dtype)
    if site.kind == "Norm":
        return Affine(site, dtype)
    if site.kind == "MultiheadAttention":
        return nn.MultiheadAttention(site.n_in, 1, batch_first=True, dtype=dtype)
    shape: dict[str, Any] = {"groups": site.groups, "bias": site.bias, "dtype": dtype}
    made = getattr(nn, site.kind)
    return made(site.n_in, site.n_out, site.kernel, stride=2, padding=1, **shape)


class Net(nn.Module):
    """A module with one layer under a dotted name."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.path = name.split(".")
        node: nn.Module = self
        for part in self.path[:-1]:
            node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(self.path[-1], layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.get_submodule(".".join(self.path))
        return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def input_of(site: Site, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Draw what a row's layer takes."""
    new = torch.Generator().manual_seed(seed)
    if site.kind == "Embedding":
        return torch.randint(site.n_in, (2, 3), generator=new)
    if site.is_conv:
        size = (2, site.n_in, *(5 for _ in site.kernel))
        return torch.randn(size, generator=new, dtype=dtype)
    return torch.randn((2, 3, site.n_in), generator=new, dtype=dtype)

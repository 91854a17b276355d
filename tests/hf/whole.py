"""Whole models with an adapter of Hugging Face PEFT's, and how they are compared with ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import peft
import torch

from peft_any.adapter import Adapter
from tests.hf.models import base_of, quietly
from tests.hf.reference import host, load, state_of

RTOL = 1e-5


def their_config(method: str, fields: Mapping[str, Any]) -> Any:
    """Make Hugging Face PEFT's configuration of a method."""
    with quietly():
        return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**fields)


def adapted(name: str, method: str, fields: Mapping[str, Any], adapter: str = "default") -> Any:
    """Let Hugging Face PEFT adapt a model, with trained-looking numbers."""
    with quietly():
        theirs = peft.get_peft_model(base_of(name), their_config(method, fields), adapter).eval()
    fill(theirs, adapter, 1)
    return theirs


FROZEN = {
    "adamss_newB",
    "vera_A",
    "vera_B",
    "randlora_A",
    "randlora_B",
    "tinylora_P",
    "frod_V",
    "zeros",
}


def fill(model: Any, name: str, seed: int) -> None:
    """Give an adapter trained-looking values; frozen projections keep theirs."""
    torch.manual_seed(seed)
    with quietly():
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
    noise: dict[Any, torch.Tensor] = {}
    new, config = dict(state), model.peft_config[name]
    for key, value in state.items():
        if value.is_floating_point() and not FROZEN & {*key.split(".")}:
            at = value.data_ptr(), value.shape
            moved = noise.setdefault(at, 0.2 * torch.randn_like(value))
            unset = "tinylora_v" in key and config.init_weights is False  # what memory held
            start = 0 if unset else value
            new[key] = start + moved  # of tensors that layers share, alike
    load(model, new, name)


def saved_once(model: Any) -> dict[str, np.ndarray]:
    """Give a model's tensors as transformers saves them: of tied ones the first alone."""
    state = model.state_dict()
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    return {name: host(state[name]) for name in first.values()}


def merged(model: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    with quietly():
        state = state_of(model.merge_and_unload())
    return {name: state[name] for name in names}


def compare(got: Mapping[str, Any], want: Mapping[str, Any], rtol: float = RTOL) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        size = float(np.max(np.abs(value), initial=0.0))
        np.testing.assert_allclose(got[key], value, rtol=0, atol=rtol * size, err_msg=key)


def trained(adapter: Adapter, seed: int = 4) -> Adapter:
    """Move what is trained of an adapter of ours off its initial values."""
    rng = np.random.default_rng(seed)

    def moved(p: Mapping[str, Any]) -> dict[str, Any]:
        return {
            k: (v + 0.2 * rng.standard_normal(v.shape)).astype(v.dtype)
            if v.dtype.kind == "f" and not adapter.config.is_frozen(k)
            else v
            for k, v in p.items()
        }

    sites = {s: moved(p) for s, p in adapter.sites.items()}
    for (name, key), first in adapter.config.ties(sites).items():
        sites[name][key] = sites[first][key]
    return adapter.replace(sites=sites, shared=moved(adapter.shared))


def close(got: torch.Tensor, want: torch.Tensor, rtol: float = RTOL) -> None:
    """Compare outputs, relative to the largest."""
    torch.testing.assert_close(got, want, rtol=0, atol=rtol * float(want.abs().max()))

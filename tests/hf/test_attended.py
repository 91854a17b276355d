"""LLaMA-Adapter, live: each reads what the other writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from peft.tuners.adaption_prompt import layer as theirs_within  # noqa: E402

from peft_any import Adapter, PeftModel  # noqa: E402
from peft_any.mixtures import softmax  # noqa: E402
from tests.cases import ATTENDED, AttendedCase  # noqa: E402
from tests.hf import reference  # noqa: E402
from tests.test_golden import last_block  # noqa: E402

rows = pytest.mark.parametrize("case", ATTENDED, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
SINGLE = 1e-5
"""Hugging Face PEFT takes this softmax in float32, whatever the dtypes; libraries' exponentials
differ there by a unit in the last place, so that taking it so gives no equality either."""


def same(adapter: Adapter, arrays: dict[str, np.ndarray]) -> None:
    p, apply = last_block(adapter, arrays)
    size = np.max(np.abs(arrays["y"]))
    np.testing.assert_allclose(apply(p, arrays), arrays["y"], rtol=0, atol=SINGLE * size)


@rows
@dtypes
def test_what_hf_writes_we_read(case: AttendedCase, dtype: str, tmp_path: Path) -> None:
    arrays = reference.run_attended(case, tmp_path / "a", dtype)
    adapter = Adapter.load(tmp_path / "a")
    model = reference.attended_model(case)
    names = [name for name, _ in model.named_modules()]
    assert [*adapter.sites] == adapter.config.modules(names)
    same(adapter, arrays)


@rows
@dtypes
def test_what_we_write_hf_reads(case: AttendedCase, dtype: str, tmp_path: Path) -> None:
    plain = reference.attended_model(case, dtype)
    rng = np.random.default_rng(0)
    sites = {
        name: {
            key: rng.standard_normal(shape).astype(dtype)
            for key, shape in case.config.shapes(case.width).items()
        }
        for name in case.config.modules([name for name, _ in plain.named_modules()])
    }
    adapter = Adapter(case.config, sites)
    adapter.save(tmp_path / "a")
    with reference.quietly():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    same(adapter, reference.within_attention(theirs.base_model.model, case))


class Exact:
    """torch's softmax in the dtype that comes in."""

    @staticmethod
    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == torch.float32
        return torch.softmax(scores, dim)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    state = {k: v for k, v in model.state_dict().items() if "adaption_" not in k}
    return {k.replace("attn.model.", "attn."): v.numpy() for k, v in sorted(state.items())}


@rows
def test_a_model_gains_in_float64_what_hf_computes_with_a_softmax_of_that_dtype(
    case: AttendedCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theirs_within, "F", Exact)
    arrays = reference.run_attended(case, tmp_path / "a", "float64")
    model = PeftModel(tensors_of(reference.attended_model(case, "float64")))
    *_, last = model.add("a", Adapter.load(tmp_path / "a")).sites
    y = arrays["y0"] + model.bind().attend(last, arrays["q"])
    assert np.abs(y - arrays["y0"]).max() > 0.1
    np.testing.assert_allclose(y, arrays["y"], rtol=0, atol=1e-10 * np.abs(arrays["y"]).max())


def turned(x: np.ndarray) -> np.ndarray:
    """Turn pairs of channels by their positions: x (batch, heads, tokens, size)."""
    size = x.shape[-1]
    angles = np.arange(x.shape[2])[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
    cos, sin = (np.tile(f(angles), 2).astype(x.dtype) for f in (np.cos, np.sin))
    one, two = np.split(x, 2, -1)
    return x * cos + np.concatenate([-two, one], -1) * sin


def within(bound: Any, at: str, x: np.ndarray, case: AttendedCase) -> np.ndarray:
    """Llama's attention with what the adapter adds."""
    q, k, v = (
        bound.layers[f"{at}.{side}_proj"](x)
        .reshape(*x.shape[:2], -1, case.width // case.heads)
        .transpose(0, 2, 1, 3)
        for side in "qkv"
    )
    q, k = turned(q), turned(k)
    k, v = (np.repeat(a, case.heads // case.groups, axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    y = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    return bound.layers[f"{at}.o_proj"](y) + bound.attend(at, q)


def llama(bound: Any, ids: np.ndarray, case: AttendedCase) -> np.ndarray:
    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return bound.weights[f"{name}.weight"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    h = bound.layers["model.embed_tokens"](ids)
    for i in range(3):
        at = f"model.layers.{i}"
        h = h + within(bound, f"{at}.self_attn", norm(f"{at}.input_layernorm", h), case)
        x, mlp = norm(f"{at}.post_attention_layernorm", h), f"{at}.mlp"
        gate = bound.layers[f"{mlp}.gate_proj"](x)
        gate = gate / (1 + np.exp(-gate)) * bound.layers[f"{mlp}.up_proj"](x)
        h = h + bound.layers[f"{mlp}.down_proj"](gate)
    return bound.layers["lm_head"](norm("model.norm", h))


@pytest.mark.parametrize("case", ATTENDED[:2], ids=lambda case: case.name)
def test_a_model_in_numpy_gives_hfs_logits(case: AttendedCase, tmp_path: Path) -> None:
    reference.run_attended(case, tmp_path / "a")
    plain = reference.attended_model(case)
    model = PeftModel(tensors_of(plain))
    fresh = model.add("fresh", case.config)
    ids = np.arange(8).reshape(2, 4)
    model.add("a", Adapter.load(tmp_path / "a"))
    assert {n: {k: v.shape for k, v in p.items()} for n, p in model["a"].sites.items()} == {
        n: {k: v.shape for k, v in p.items()} for n, p in fresh.sites.items()
    }
    with reference.quietly(), torch.no_grad():
        before = plain(torch.from_numpy(ids)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
        after = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(after - before).max() > 0.1
    for name, want in (("fresh", before), ("a", after)):
        model.activate(name)
        got = llama(model.bind(), ids, case)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())

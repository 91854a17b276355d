"""Combined adapters against `add_weighted_adapter`, and as Hugging Face PEFT loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_any import combine, resize
from tests.hf import reference

BOUND = {"float32": 1e-5, "float64": 1e-10}
WEIGHTS = [0.7, -0.3, 1.1]
SEED = 11
dtypes = pytest.mark.parametrize("dtype", [*BOUND])


class Layers(nn.Module):
    """A layer of each kind, in the order of their names."""

    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()
        self.a_wte = nn.Embedding(11, 6)
        self.b_conv = nn.Conv2d(4, 5, (3, 2))
        self.c_one = nn.Conv2d(5, 4, (1, 1))
        self.d_fc = Conv1D(9, 7) if turned else nn.Linear(7, 9)
        self.e_fc = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a_wte(x)


def model_of(dtype: str, *, turned: bool = False) -> Layers:
    """Make a model with fixed weights."""
    torch.manual_seed(0)
    return Layers(turned=turned).to(getattr(torch, dtype)).eval()


def adapted(
    folder: Path, dtype: str, ranks: list[int], *, turned: bool = False, **fields: Any
) -> tuple[Any, list[Path]]:
    """Give a model several random LoRAs, and save each."""
    model: Any = None
    targets = ["d_fc"] if turned else ["a_wte", "b_conv", "c_one", "d_fc", "e_fc"]
    for i, r in enumerate(ranks):
        config = peft.LoraConfig(
            r=r,
            lora_alpha=3 * r + i,
            target_modules=targets,
            init_lora_weights=False,
            fan_in_fan_out=turned,
            **fields,
        )
        torch.manual_seed(20 + i)
        with reference.quietly():
            if model is None:
                model = peft.get_peft_model(model_of(dtype, turned=turned), config, "a0")
            else:
                model.add_adapter(f"a{i}", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    with reference.quietly():
        model.save_pretrained(folder)
    return model, [folder / f"a{i}" for i in range(len(ranks))]


def deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    """Let Hugging Face PEFT form ΔW of every layer that an adapter has."""
    found = {}
    for key, module in model.base_model.model.named_modules():
        if name in getattr(module, "scaling", {}):
            found[key] = reference.host(module.get_delta_weight(name))
    return found


def added(model: Any, count: int, method: str, seed: int | None = None, **options: Any) -> Any:
    """Call `add_weighted_adapter`; the seed is set when the new layers have drawn their values."""
    inject = model.base_model.inject_adapter

    def then_seed(*args: Any, **kwargs: Any) -> Any:
        done = inject(*args, **kwargs)
        if seed is not None:
            torch.manual_seed(seed)
        return done

    model.base_model.inject_adapter = then_seed
    names = [f"a{i}" for i in range(count)]
    with reference.quietly():
        model.add_weighted_adapter(names, WEIGHTS[:count], "sum", method, **options)
    return deltas(model, "sum")


def ours(
    paths: list[Path], out: Path, dtype: str, *, turned: bool = False, **options: Any
) -> tuple[dict[str, np.ndarray], Any]:
    """Combine by peft_any, and let Hugging Face PEFT load the result."""
    weights = dict(zip(paths, WEIGHTS, strict=False))
    _, record = combine(weights, out, **options)
    with reference.quietly():
        model = peft.PeftModel.from_pretrained(model_of(dtype, turned=turned), out)
    return deltas(model, "default"), record


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: str) -> None:
    """Compare layer by layer, relative to the largest entry."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        size = float(np.max(np.abs(value)))
        np.testing.assert_allclose(got[name] / size, value / size, rtol=0, atol=BOUND[dtype])


@dtypes
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("ties", {"density": 0.6}),
        ("ties", {"density": 0.3, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.5}),
        ("dare_linear", {"density": 0.6}),
        ("dare_ties", {"density": 0.7}),
        ("dare_ties", {"density": 0.7, "majority_sign_method": "frequency"}),
        ("svd", {}),
        ("svd", {"rank": 2}),
        ("ties_svd", {"density": 0.5}),
        ("ties_svd", {"density": 0.3, "majority_sign_method": "frequency", "rank": 3}),
        ("magnitude_prune_svd", {"density": 0.4}),
        ("dare_linear_svd", {"density": 0.6}),
        ("dare_ties_svd", {"density": 0.6, "rank": 3}),
    ],
)
@pytest.mark.parametrize("turned", [False, True], ids=["", "transposed"])
def test_every_combination_is_hugging_faces(
    method: str, options: dict[str, Any], turned: bool, dtype: str, tmp_path: Path
) -> None:
    model, paths = adapted(tmp_path, dtype, [2, 2, 2], turned=turned)
    theirs = {"svd_rank" if k == "rank" else k: v for k, v in options.items()}
    seed = SEED if method.startswith("dare") else None
    want = added(model, 3, method, seed, **theirs)
    mine = options | ({} if seed is None else {"seed": seed})
    out = tmp_path / "out"
    got, _ = ours(paths, out, dtype, turned=turned, method=method, **mine)
    compare(got, want, dtype)


@dtypes
def test_factors_of_patterns_are_summed_and_load(dtype: str, tmp_path: Path) -> None:
    """Hugging Face PEFT forms these sums too, but does not load its own file of them."""
    fields = {"rank_pattern": {"e_fc": 1}, "alpha_pattern": {"d_fc": 9}}
    model, paths = adapted(tmp_path, dtype, [2, 2], **fields)
    got, _ = ours(paths, tmp_path / "out", dtype, method="linear")
    compare(got, added(model, 2, "linear"), dtype)


@dtypes
@pytest.mark.parametrize("method", ["cat", "svd", "exact"])
def test_ranks_and_patterns_may_differ(method: str, dtype: str, tmp_path: Path) -> None:
    fields = {"rank_pattern": {"e_fc": 3, "b_conv": 1}, "alpha_pattern": {"d_fc": 9}}
    model, paths = adapted(tmp_path, dtype, [2, 4], **fields)
    got, record = ours(paths, tmp_path / "out", dtype, method=method)
    if method == "exact":
        parts = [deltas(model, f"a{i}") for i in range(2)]
        want = {k: sum(w * p[k] for w, p in zip(WEIGHTS, parts, strict=False)) for k in parts[0]}
    else:
        want = added(model, 2, method)
    compare(got, want, dtype)
    if method != "svd":
        assert record.error < 1e-6


@dtypes
def test_one_adapter_is_only_weighted(dtype: str, tmp_path: Path) -> None:
    model, paths = adapted(tmp_path, dtype, [2])
    got, record = ours(paths, tmp_path / "out", dtype, method="ties", density=0.5)
    # there the root of the weight is rounded to single precision
    compare(got, added(model, 1, "ties", density=0.5), "float32")
    assert "only weighted" in record.warnings[-1]


@dtypes
def test_the_scale_of_rslora_is_not_applied_again(dtype: str, tmp_path: Path) -> None:
    """Hugging Face PEFT's result of rsLoRAs has the factor √r too much, its own rsLoRA scale."""
    model, paths = adapted(tmp_path, dtype, [2, 3], use_rslora=True)
    theirs = added(model, 2, "cat")
    got, _ = ours(paths, tmp_path / "out", dtype, method="cat")
    compare(got, {k: v / 5**0.5 for k, v in theirs.items()}, dtype)


@dtypes
def test_clamping_is_hugging_faces_once_signs_are_fixed(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svd = torch.linalg.svd

    def signed(w: torch.Tensor, **kwargs: Any) -> Any:
        u, s, vt = svd(w, full_matrices=False)
        signs = torch.sign(u[u.abs().argmax(dim=0), torch.arange(u.shape[1])])
        return u * signs, s, vt * signs[:, None]

    model, paths = adapted(tmp_path, dtype, [2, 2])
    monkeypatch.setattr(torch.linalg, "svd", signed)
    want = added(model, 2, "svd", svd_clamp=0.9, svd_rank=2)
    monkeypatch.undo()
    got, record = ours(paths, tmp_path / "out", dtype, method="svd", svd_clamp=0.9, rank=2)
    compare(got, want, dtype)
    assert record.off_sum > 0.01


@dtypes
def test_gains_are_summed_as_hugging_faces(dtype: str, tmp_path: Path) -> None:
    model: Any = None
    for i in range(2):
        fields = {"target_modules": ["d_fc", "e_fc"], "feedforward_modules": ["e_fc"]}
        config = peft.IA3Config(**fields, init_ia3_weights=False)
        torch.manual_seed(i)
        with reference.quietly():
            if model is None:
                model = peft.get_peft_model(model_of(dtype), config, "a0")
            else:
                model.add_adapter(f"a{i}", config)
    with reference.quietly():
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
        model.base_model.add_weighted_adapter(["a0", "a1"], WEIGHTS[:2], "sum")
    weights = {tmp_path / f"a{i}": WEIGHTS[i] for i in range(2)}
    combine(weights, tmp_path / "out", method="linear")
    with reference.quietly():
        again = peft.PeftModel.from_pretrained(model_of(dtype), tmp_path / "out")
    for name in ("d_fc", "e_fc"):
        want = model.base_model.model.get_submodule(name).ia3_l["sum"]
        got = again.base_model.model.get_submodule(name).ia3_l["default"]
        torch.testing.assert_close(got, want, rtol=BOUND[dtype], atol=BOUND[dtype])


@dtypes
@pytest.mark.parametrize("method", ["LOHA", "LOKR", "VERA", "OFT", "BOFT", "IA3", "DORA"])
def test_any_method_loads_as_the_lora_that_the_record_describes(
    method: str, dtype: str, tmp_path: Path
) -> None:
    """The base plus the result's ΔW is what Hugging Face PEFT merges of the adapter itself."""
    fields: dict[str, Any] = {"target_modules": ["d_fc", "e_fc"]}
    configs = {
        "LOHA": lambda: peft.LoHaConfig(r=2, init_weights=False, **fields),
        "LOKR": lambda: peft.LoKrConfig(r=2, init_weights=False, **fields),
        "VERA": lambda: peft.VeraConfig(r=3, init_weights=False, **fields),
        "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=1, init_weights=False, **fields),
        "BOFT": lambda: peft.BOFTConfig(boft_block_size=1, init_weights=False, **fields),
        "IA3": lambda: peft.IA3Config(
            feedforward_modules=["d_fc", "e_fc"], init_ia3_weights=False, **fields
        ),
        "DORA": lambda: peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **fields),
    }
    torch.manual_seed(3)
    base = model_of(dtype)
    weights = reference.state_of(base)
    torch.manual_seed(4)
    with reference.quietly():
        model = peft.get_peft_model(base, configs[method]()).to(getattr(torch, dtype)).eval()
        model.save_pretrained(tmp_path / "a")
        merged = reference.state_of(model.merge_and_unload())
    _, record = combine([(tmp_path / "a", 0.5)], tmp_path / "out", base=weights, rank=99)
    with reference.quietly():
        again = peft.PeftModel.from_pretrained(model_of(dtype), tmp_path / "out")
    got = deltas(again, "default")
    for layer in record.layers:
        want = 0.5 * (merged[f"{layer.layer}.weight"] - weights[f"{layer.layer}.weight"])
        size = float(np.linalg.norm(want))
        bound = 20 * BOUND[dtype]
        assert np.linalg.norm(got[layer.layer] - want) <= bound * (size + 1)
        assert layer.norm == pytest.approx(size, rel=bound * (1 + 1 / max(size, 1e-30)))
        assert (layer.error or 0.0) <= 1e-6


@dtypes
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_resized_adapters_load_with_the_delta_of_the_record(
    rank: int, dtype: str, tmp_path: Path
) -> None:
    fields = {"use_rslora": True, "rank_pattern": {"e_fc": 2}, "alpha_pattern": {"d_fc": 9}}
    model, (path,) = adapted(tmp_path, dtype, [4], **fields)
    _, record = resize(path, tmp_path / "out", rank=rank)
    with reference.quietly():
        again = peft.PeftModel.from_pretrained(model_of(dtype), tmp_path / "out")
    got, want = deltas(again, "default"), deltas(model, "a0")
    assert again.peft_config["default"].r == rank
    for layer in record.layers:
        missed = np.linalg.norm(got[layer.layer] - want[layer.layer])
        size = np.linalg.norm(want[layer.layer])
        assert missed / size == pytest.approx(layer.error, rel=1e-4, abs=BOUND[dtype])
        assert layer.norm == pytest.approx(size, rel=BOUND[dtype])

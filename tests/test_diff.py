"""Two adapters, or two checkpoints, compared: against products and decompositions in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import cli, diff
from peft_any.adapter import Adapter
from peft_any.errors import TargetError, UsageError
from peft_any.io.safetensors import write_safetensors
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lora import LoraConfig
from peft_any.surgery.comparison import CheckpointDifference
from peft_any.testing import Lib

M, N = 14, 11


def lora(seed: int, r: int = 3, alpha: float = 5, **extra: np.ndarray) -> Adapter:
    rng = np.random.default_rng(seed)
    p = {
        "lora_A.weight": rng.standard_normal((r, N)).astype("f4"),
        "lora_B.weight": rng.standard_normal((M, r)).astype("f4"),
    }
    return Adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=["fc"]), {"fc": p}, extra=extra)


def delta(adapter: Adapter) -> np.ndarray:
    p, config = adapter.sites["fc"], adapter.config
    scale = config.scaling  # type: ignore[union-attr]
    return scale * p["lora_B.weight"].astype("f8") @ p["lora_A.weight"].astype("f8")


def angles(one: np.ndarray, two: np.ndarray, k: int, j: int) -> np.ndarray:
    u, v = np.linalg.svd(one)[0][:, :k], np.linalg.svd(two)[0][:, :j]
    return np.linalg.svd(u.T @ v, compute_uv=False)


@given(ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 2**31))
def test_factors_tell_what_the_products_do(ranks: tuple[int, int], seed: int) -> None:
    a, b = lora(seed, ranks[0]), lora(seed + 1, ranks[1], alpha=2)
    found: Any = diff(a, b)
    (layer,), x, y = found.layers, delta(a), delta(b)
    assert (layer.rank_a, layer.rank_b, layer.shape) == (*ranks, (M, N))
    assert layer.norm_a == pytest.approx(np.linalg.norm(x))
    assert layer.norm_b == pytest.approx(np.linalg.norm(y))
    cosine = np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert layer.cosine == pytest.approx(cosine, abs=1e-12)
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    assert layer.distance == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    np.testing.assert_allclose(layer.outputs, angles(x, y, *ranks), atol=1e-6)
    np.testing.assert_allclose(layer.inputs, angles(x.T, y.T, *ranks), atol=1e-6)
    assert layer.overlap[0] == pytest.approx(np.mean(np.square(layer.outputs)))


def test_an_adapter_is_like_itself_and_its_multiple() -> None:
    a = lora(0)
    same: Any = diff(a, a)
    assert (same.config, same.layers[0].distance) == ({}, pytest.approx(0, abs=1e-7))
    assert same.layers[0].overlap == pytest.approx((1.0, 1.0))
    minus = a.replace(config=LoraConfig(r=3, lora_alpha=-10, target_modules=["fc"]))
    twice: Any = diff(a, minus)
    assert twice.config == {"lora_alpha": (5, -10)}
    assert twice.layers[0].cosine == pytest.approx(-1.0)
    assert twice.layers[0].distance == pytest.approx(3.0)


def test_layers_and_copies_of_one_side() -> None:
    a, b = lora(0, norm=np.ones(4)), lora(1, norm=np.full(4, 2.0), head=np.ones(2))
    b = b.replace(sites={**b.sites, "other": b.sites["fc"]})
    found: Any = diff(a, b)
    alone = found.layers[1]
    assert (alone.layer, alone.norm_a, alone.cosine, alone.distance) == ("other", 0.0, None, None)
    assert (alone.rank_a, alone.rank_b, alone.outputs) == (0, 3, ())
    assert found.copies == {"norm": 1.0, "head": None}
    assert found.to_dict()["of"] == "adapters"


def test_methods_without_small_factors() -> None:
    rng = np.random.default_rng(0)
    config = LoHaConfig(r=4, target_modules=["fc"])
    shapes = {"hada_w1_a": (M, 4), "hada_w1_b": (4, N), "hada_w2_a": (M, 4), "hada_w2_b": (4, N)}
    p = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x = config.scaling * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    a = lora(0)
    found: Any = diff(a, Adapter(config, {"fc": p}))
    y = delta(a)
    cosine = np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert found.layers[0].cosine == pytest.approx(cosine, abs=1e-12)
    assert found.layers[0].distance == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y))
    assert (found.layers[0].rank_a, found.layers[0].overlap) == (None, (None, None))
    assert found.config["peft_type"] == ("LORA", "LOHA")


def test_methods_that_need_the_base() -> None:
    config = IA3Config(target_modules=["fc"], feedforward_modules=[])
    a = Adapter(config, {"fc": {"ia3_l": np.full((M, 1), 2.0)}})
    with pytest.raises(TargetError, match="give base="):
        diff(a, a)
    w = np.random.default_rng(0).standard_normal((M, N))
    found: Any = diff(a, a, {"fc.weight": w})
    assert found.layers[0].norm_a == pytest.approx(np.linalg.norm(w))
    assert found.layers[0].cosine == pytest.approx(1.0)


def test_on_every_library(lib: Lib) -> None:
    if not lib.has_values or lib.row == "strict:minimal":
        pytest.skip("shapes alone, or no decompositions, have no angles")
    a, b = lora(0), lora(1)
    want: Any = diff(a, b, backend="numpy")
    found: Any = diff(a, b, backend=lib.backend)
    assert found.layers[0].cosine == pytest.approx(want.layers[0].cosine, rel=1e-9)
    assert found.layers[0].inputs == pytest.approx(want.layers[0].inputs, rel=1e-9)


def models(folder: Path) -> tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((50, 40)).astype("f4")
    a = {"w": w, "same": w, "cast": w.astype("f2").astype("f4"), "gone": w, "shape": w, "n": w[:1]}
    a["n"] = np.arange(4)
    b = a | {"w": w + 0.1 * rng.standard_normal(w.shape).astype("f4"), "shape": w.T, "new": w}
    b |= {"cast": w.astype("f2"), "n": np.arange(4) + 1}
    del b["gone"]
    paths = folder / "a.safetensors", folder / "b.safetensors"
    for path, tensors in zip(paths, (a, b), strict=True):
        write_safetensors(path, tensors)
    return *paths, a, b


def test_checkpoints(tmp_path: Path) -> None:
    one, two, a, b = models(tmp_path)
    found = diff(one, two)
    assert isinstance(found, CheckpointDifference)
    states = {x.tensor: x.state for x in found.tensors}
    assert states == {
        "w": "differs", "same": "identical", "cast": "equal", "gone": "only a",
        "new": "only b", "shape": "shape", "n": "differs",
    }  # fmt: skip
    assert found.states["differs"] == 2
    by_name = {x.tensor: x for x in found.tensors}
    x, y = a["w"].astype("f8"), b["w"].astype("f8")
    w = by_name["w"]
    assert w.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert w.most == pytest.approx(np.max(np.abs(y - x)), rel=1e-6)
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    assert w.cosine == pytest.approx(np.vdot(x, y) / lengths)
    assert by_name["cast"].dtype == ("float32", "float16")
    assert by_name["cast"].relative == 0.0
    assert by_name["n"].relative is None
    assert by_name["shape"].shape == ((50, 40), (40, 50))
    written = {x["tensor"]: x["relative"] for x in found.to_dict()["tensors"]}
    assert written["w"] == w.relative


def test_halves_are_compared_in_double_precision(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    v = w.copy()
    v[0, 0] *= 2
    for name, tensor in (("a", w), ("b", v)):
        write_safetensors(tmp_path / f"{name}.safetensors", {"w": tensor})
    found: Any = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.tensors[0].change == pytest.approx(abs(float(w[0, 0])), rel=1e-12)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one, two, *_ = models(tmp_path)
    with pytest.raises(UsageError, match="is an adapter, and cannot be compared with a model"):
        diff(lora(0), one)
    with pytest.raises(UsageError, match="is for two adapters"):
        diff(one, two, one)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two, *_ = models(tmp_path)
    assert cli.run(["diff", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "2 differ, 1 equal, 1 only a, 1 identical" in out
    lora(0).save(tmp_path / "x")
    lora(1).save(tmp_path / "y")
    assert cli.run(["diff", str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    assert "cosine of the changes" in capsys.readouterr().out

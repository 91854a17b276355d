"""Adapters of another rank: the best approximation down, the same numbers up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from peft_any import resize
from peft_any.adapter import Adapter
from peft_any.errors import ConfigError, UsageError
from peft_any.layer import Site
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.oneshot import merge
from tests.test_combine import delta, lora


def spectrum(adapter: Adapter) -> np.ndarray:
    """Find the singular values of ΔW by a dense decomposition."""
    values: np.ndarray = np.linalg.svd(delta(adapter), compute_uv=False)
    return values


def test_down_is_the_best_approximation() -> None:
    given = lora(1, 5)
    s = spectrum(given)
    made, record = resize(given, rank=2)
    layer = record.layers[0]
    missed = np.linalg.norm(delta(made) - delta(given))
    assert missed == pytest.approx(np.linalg.norm(s[2:]), rel=1e-6)
    assert (layer.ranks, layer.rank, record.kind) == ((5,), 2, "resize")
    assert layer.discarded == pytest.approx(np.sum(s[2:5] ** 2) / np.sum(s**2), rel=1e-6)
    assert layer.error == pytest.approx(layer.discarded**0.5, rel=1e-6)


@pytest.mark.parametrize("selector", ["energy", "sv_fro", "sv_cumulative", "sv_ratio"])
def test_selectors_choose_as_they_say(selector: str) -> None:
    given = lora(1, 6)
    s = spectrum(given)[:6]
    for target in (0.3, 0.6, 0.9):
        wanted = {
            "energy": int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), target)) + 1,
            "sv_fro": int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), target**2)) + 1,
            "sv_cumulative": int(np.searchsorted(np.cumsum(s) / np.sum(s), target)) + 1,
            "sv_ratio": int(np.sum(s > s[0] * target)),
        }[selector]
        value = 1 / target if selector == "sv_ratio" else target
        options: Any = {selector: value}
        assert resize(given, **options)[1].layers[0].rank == wanted
        assert resize(given, **options, rank=2)[1].layers[0].rank == min(2, wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rs", [False, True], ids=["", "rslora"])
def test_up_keeps_every_number(dtype: str, rs: bool) -> None:
    given = lora(1, 3, use_rslora=rs, lora_alpha=7)
    kind = getattr(ml_dtypes, dtype, dtype)
    p = {k: v.astype(kind) for k, v in given.sites["fc"].items()}
    given = given.replace(sites={"fc": p})
    made, record = resize(given, rank=32)
    got = made.sites["fc"]
    for name, array in p.items():
        axis = 0 if name == "lora_A.weight" else 1
        assert got[name].shape[axis] == 32
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(np.take(got[name], range(3), axis), array)
        assert not np.any(np.take(got[name], range(3, 32), axis))
    shown: Any = made.config
    assert (shown.r, shown.use_rslora) == (32, False)
    np.testing.assert_allclose(delta(made), delta(given), rtol=1e-14)
    assert record.layers[0].error == pytest.approx(0.0, abs=1e-15)


def test_layers_get_one_rank_and_keep_their_scale() -> None:
    """Some are cut and some padded; one rank for all is what servers want."""
    wide, narrow = lora(1, 6), lora(2, 2)
    config = LoraConfig(
        r=6,
        lora_alpha=12,
        rank_pattern={"b.fc": 2},
        alpha_pattern={"b.fc": 5},
        target_modules=["fc"],
    )
    given = Adapter(config, {"a.fc": wide.sites["fc"], "b.fc": narrow.sites["fc"]})
    made, record = resize(given, rank=4)
    shown: Any = made.config
    assert (shown.r, shown.rank_pattern) == (4, {})
    assert [layer.rank for layer in record.layers] == [4, 4]
    for name in given.sites:
        site = Site(name, 8, 10)
        before, after = (
            a.config.at(site).delta({k: v.astype("f8") for k, v in a.sites[name].items()}, site)  # type: ignore[attr-defined]
            for a in (given, made)
        )
        s = np.linalg.svd(before, compute_uv=False)
        assert np.linalg.norm(after - before) <= np.linalg.norm(s[4:]) * (1 + 1e-6) + 1e-14


def test_dora_keeps_its_magnitudes() -> None:
    given = lora(1, 4, use_dora=True)
    magnitude = np.arange(10, dtype="float32")
    p = {**given.sites["fc"], "lora_magnitude_vector": magnitude}
    given = given.replace(sites={"fc": p})
    made, record = resize(given, rank=2)
    assert made.config.use_dora  # type: ignore[attr-defined]
    np.testing.assert_array_equal(made.sites["fc"]["lora_magnitude_vector"], magnitude)
    assert made.sites["fc"]["lora_B.weight"].shape == (10, 2)
    assert "magnitudes are kept" in record.warnings[0]


def test_other_methods_become_loras() -> None:
    rng = np.random.default_rng(0)
    p = {
        "lora_A": rng.standard_normal((3, 8)),
        "lora_B": rng.standard_normal((10, 3)),
        "lora_E": rng.standard_normal((3, 1)),
    }
    given = Adapter(AdaLoraConfig(init_r=3, total_step=9, target_modules=["fc"]), {"fc": p})
    made, record = resize(given, rank=5)
    want = given.config.at(Site("fc", 8, 10)).delta(p, Site("fc", 8, 10))  # type: ignore[attr-defined]
    np.testing.assert_allclose(delta(made), want, rtol=1e-12, atol=1e-12)
    assert (made.config.peft_type, record.layers[0].rank) == ("LORA", 5)
    gain = {"ia3_l": rng.standard_normal((10, 1))}
    gains = Adapter(IA3Config(target_modules=["fc"], feedforward_modules=[]), {"fc": gain})
    weights = {"fc.weight": rng.standard_normal((10, 8)), "fc.bias": rng.standard_normal(10)}
    made, _ = resize(gains, rank=8, base=weights)
    for name, value in merge(weights, gains).items():
        np.testing.assert_allclose(merge(weights, made)[name], value, atol=1e-12)


def test_copies_stay(tmp_path: Path) -> None:
    given = lora(1, 4, modules_to_save=["head"])
    given = given.replace(extra={"head.weight": np.ones((2, 2), "float32")})
    given.save(tmp_path / "a")
    resize(tmp_path / "a", tmp_path / "out", rank=2)
    again = Adapter.load(tmp_path / "out")
    np.testing.assert_array_equal(again.extra["head.weight"], np.ones((2, 2)))
    written = json.loads((tmp_path / "out" / "resize_receipt.json").read_text())
    assert (written["kind"], written["options"]) == ("resize", {"rank": 2})
    assert written["out"]["rank"] == 2


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no rank is given"):
        resize(lora(1), tmp_path / "out")
    with pytest.raises(UsageError, match="energy= and sv_ratio="):
        resize(lora(1), tmp_path / "out", energy=0.9, sv_ratio=3)
    unconverted = lora(1)
    pissa = replace(unconverted.config, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="lacks the product"):
        resize(unconverted.replace(config=pissa), tmp_path / "out", rank=2)
    assert not list(tmp_path.iterdir())

"""AdaMSS's clusters are those that Hugging Face PEFT's decomposition and scikit-learn find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from peft.tuners.adamss.utils import slice_pca  # noqa: E402
from torch import nn  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.clusters import grouped  # noqa: E402
from peft_any.errors import ConfigError  # noqa: E402
from peft_any.methods.adamss import AdamssConfig  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from tests.hf.models import quietly  # noqa: E402
from tests.hf.reference import STANDS_IN, held, host, state_of  # noqa: E402
from tests.hf.whole import compare, fill  # noqa: E402

SIZES: list[tuple[int, int, dict[str, Any]]] = [
    (64, 96, {"r": 20}),
    (200, 60, {"r": 32, "num_subspaces": 8, "subspace_rank": 3}),
    (48, 160, {"r": 100, "num_subspaces": 4, "random_seed": 7}),
    (150, 150, {"r": 40, "subspace_rank": 9, "use_dynamic_rank": True, "svd_threshold": 0.2}),
]


@pytest.mark.parametrize(("n_in", "n_out", "fields"), SIZES)
def test_a_fresh_adapter_is_hfs_up_to_signs(n_in: int, n_out: int, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(n_in, n_out))
    ours = PeftModel(state_of(plain)).add("a", AdamssConfig(target_modules=["0"], **fields))
    with quietly():
        theirs = peft.get_peft_model(plain, peft.AdamssConfig(target_modules=["0"], **fields))
    leaf, p = theirs.base_model.model[0], ours.sites["0"]
    np.testing.assert_array_equal(p["adamss_rows"], held(leaf, "ADAMSS")["adamss_rows"])
    across = host(leaf.adamss_newB["default"])
    signs = np.sign(np.sum(across * p["adamss_newB"], axis=1))
    np.testing.assert_allclose(p["adamss_newB"] * signs[:, None], across, rtol=0, atol=2e-4)
    w = torch.cat([leaf.weight, leaf.bias[:, None]], dim=1).detach()
    _, u = slice_pca(w[None, None], fields["r"], "cpu", random_seed=fields.get("random_seed", 0))
    order, b = leaf.scatter_index["default"], leaf.adamss_B["default"]
    segments = np.split(host(u[0, 0, order]), np.cumsum([len(part) for part in b])[:-1])
    for i, (a, rows) in enumerate(zip(leaf.adamss_A["default"], segments, strict=True)):
        own = p[f"adamss_A.{i}"] * signs
        np.testing.assert_allclose(own @ own.T, np.eye(len(own)), rtol=0, atol=1e-5)
        ours_hold, theirs_hold = (np.linalg.norm(rows @ side.T) for side in (own, host(a)))
        assert own.shape == a.shape
        assert ours_hold >= (1 - 1e-5) * theirs_hold  # PEFT approximates them, by a random sketch
        assert p[f"adamss_B.{i}"].shape == b[i].shape


def written(folder: Path, n_in: int, n_out: int, fields: dict[str, Any], dtype: str) -> Any:
    """Let Hugging Face PEFT write an adapter with trained-looking values, of two layers."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(n_in, n_out), nn.Linear(n_out, n_in, bias=False))
    plain.to(getattr(torch, dtype))
    weights = state_of(plain)
    with quietly():
        theirs = peft.get_peft_model(plain, peft.AdamssConfig(target_modules=["0", "1"], **fields))
    fill(theirs, "default", 1)
    with quietly():
        theirs.save_pretrained(folder)
    return weights, theirs


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n_in", "n_out", "fields"), SIZES[:3])
def test_the_rows_of_hfs_file_are_found_again(
    n_in: int, n_out: int, fields: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    weights, theirs = written(tmp_path / "a", n_in, n_out, fields | {"r": 20}, dtype)
    ours = PeftModel(weights)
    adapter = ours.add("a", Adapter.load(tmp_path / "a"))
    adapter.save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        if path.suffix != ".md":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert adapter.config.is_frozen("adamss_found_rows")
    for name, p in adapter.sites.items():
        want = held(theirs.base_model.model[int(name)], "ADAMSS")["adamss_rows"]
        np.testing.assert_array_equal(p["adamss_found_rows"], want)
    with quietly():
        want = state_of(theirs.merge_and_unload())
    compare(ours.merge(), want, 1e-5 if dtype == "float32" else 1e-10)


def test_rows_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    fields = {"r": 20, "num_subspaces": 4}
    weights, _ = written(tmp_path / "a", 60, 90, fields, "float32")
    other = {name: v[::-1] * v for name, v in weights.items()}
    rounded, _ = written(tmp_path / "b", 60, 90, fields, "bfloat16")
    for base, folder in ((other, "a"), (rounded, "b")):
        with pytest.raises(ConfigError, match=r"0: .* those of this base: .*merge_and_unload"):
            PeftModel(base).add("a", Adapter.load(tmp_path / folder))
    found = Adapter.load(tmp_path / "a")
    sites = {s: dict(p) for s, p in found.sites.items()}
    moved = np.concatenate([sites["0"]["adamss_B.0"], sites["0"]["adamss_B.1"][:1]])
    sites["0"] |= {"adamss_B.0": moved, "adamss_B.1": sites["0"]["adamss_B.1"][1:]}
    with pytest.raises(ConfigError, match=r"0: .*segments have other sizes"):
        PeftModel(weights).add("a", found.replace(sites=sites))
    weights, _ = written(tmp_path / "c", 20, 12, {"num_subspaces": 4}, "float32")
    with pytest.raises(ConfigError, match=r"0: .*rounding alone decides"):
        PeftModel(weights).add("a", Adapter.load(tmp_path / "c"))


@pytest.mark.skipif(STANDS_IN, reason="scikit-learn is not installed: ours stands in for it")
@pytest.mark.parametrize("seed", range(20))
def test_groups_are_scikit_learns(seed: int) -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    n, d, k = (int(rng.integers(*bounds)) for bounds in ((12, 400), (1, 20), (1, 12)))
    points = rng.standard_normal((n, d)).astype("float32")
    settings = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
    want = KMeans(n_clusters=k, **settings).fit_predict(points)
    np.testing.assert_array_equal(grouped(points, k), want)

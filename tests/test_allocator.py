"""AdaLoRA's allocator: its schedule, its scores, its masks, the file it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any.adapter import Adapter
from peft_any.backend import from_numpy, resolve, to_numpy
from peft_any.errors import ConfigError
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.model import PeftModel
from peft_any.train.allocator import RankAllocator, _scores

NAMES = ("lora_A", "lora_E", "lora_B")
SITES = {"fc1": (6, 5), "deep.fc2": (5, 4), "deep.fc3": (4, 3)}
CONFIG = AdaLoraConfig(
    init_r=4,
    target_r=2,
    tinit=4,
    tfinal=6,
    deltaT=3,
    beta1=0.7,
    beta2=0.9,
    total_step=40,
    target_modules=["fc1", "fc2", "fc3"],
)


def values(seed: int, r: int = 4) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    shapes = {name: ((r, n), (r, 1), (m, r)) for name, (n, m) in SITES.items()}
    return {
        name: {k: rng.normal(size=s) for k, s in zip(NAMES, own, strict=True)}
        for name, own in shapes.items()
    }


def test_the_budget_falls_with_a_cube() -> None:
    allocator = RankAllocator(CONFIG)
    budgets = [allocator.budget(step, 3) for step in range(42)]
    assert [b for b, _ in budgets[:5]] == [12] * 5
    assert budgets[9] == (int(6 * (25 / 30) ** 3 + 6), True)
    assert budgets[10][1] is False
    assert [b for b, _ in budgets[34:]] == [6] * 8
    assert all(now for _, now in budgets[35:])
    falling = [b for b, _ in budgets]
    assert falling == sorted(falling, reverse=True)


def run(seed: int = 0, steps: int = 40, library: str = "numpy") -> tuple[Any, Any, Any]:
    allocator, backend = RankAllocator(CONFIG), resolve(library)

    def bring(tree: Any) -> Any:
        return {s: {k: from_numpy(a, backend) for k, a in p.items()} for s, p in tree.items()}

    params = bring(values(seed))
    state = allocator.init(params)
    for step in range(1, steps + 1):
        noise = bring(values(1000 + step))
        params = {s: {k: a + 0.05 * noise[s][k] for k, a in p.items()} for s, p in params.items()}
        params, state = allocator.update(bring(values(2000 + step)), state, params, step)
    return allocator, params, state


def test_scores_are_their_formulas() -> None:
    steps = 5  # no mask before
    _, _, state = run(steps=steps)
    p = values(0)["fc1"]
    smooth = {k: np.zeros_like(a) for k, a in p.items()}
    unsure = {k: np.zeros_like(a) for k, a in p.items()}
    for step in range(1, steps + 1):
        for k in NAMES:
            p[k] = p[k] + 0.05 * values(1000 + step)["fc1"][k]
            now = np.abs(p[k] * values(2000 + step)["fc1"][k])
            smooth[k] = 0.7 * smooth[k] + 0.3 * now
            unsure[k] = 0.9 * unsure[k] + 0.1 * np.abs(now - smooth[k])
    for k in NAMES:
        np.testing.assert_allclose(state["importance"]["fc1"][k], smooth[k], rtol=1e-13)
        np.testing.assert_allclose(state["uncertainty"]["fc1"][k], unsure[k], rtol=1e-13)
    score = {k: smooth[k] * unsure[k] for k in NAMES}
    want = score["lora_E"][:, 0] + score["lora_A"].mean(1) + score["lora_B"].mean(0)
    np.testing.assert_allclose(
        _scores(state["importance"], state["uncertainty"])["fc1"], want, rtol=1e-13
    )


def test_the_budget_is_shared_among_all_sites() -> None:
    _, params, state = run()
    kept = {site: sum(mask) for site, mask in state["mask"].items()}
    assert sum(kept.values()) == 2 * len(SITES)
    assert len({*kept.values()}) > 1
    for site, mask in state["mask"].items():
        zero = params[site]["lora_E"][:, 0] == 0
        np.testing.assert_array_equal(zero, np.logical_not(mask))


def test_the_last_mask_stays() -> None:
    _, _, early = run(steps=34)
    _, params, late = run(steps=40)
    assert early["mask"] == late["mask"]
    assert not any(a.any() for p in late["importance"].values() for a in p.values())
    for site, mask in late["mask"].items():
        assert not params[site]["lora_E"][np.logical_not(mask)].any()


@pytest.mark.parametrize("library", ["strict", "torch", "jax"])
def test_every_library_allocates_the_same(library: str) -> None:
    pytest.importorskip({"strict": "array_api_strict"}.get(library, library))
    if library == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    _, want, state = run()
    _, got, other = run(library=library)
    assert other["mask"] == state["mask"]
    for site, p in want.items():
        for k, a in p.items():
            np.testing.assert_allclose(to_numpy(got[site][k]), a, rtol=1e-12)


def test_no_budget_to_share_masks_nothing() -> None:
    config = AdaLoraConfig(init_r=2, target_r=2, total_step=5)
    allocator, params = RankAllocator(config), values(0, r=2)
    state = allocator.init(params)
    for step in range(1, 6):
        params, state = allocator.update(values(step, r=2), state, params, step)
    assert state["mask"] == {site: [True, True] for site in SITES}


def test_the_file_is_pruned(tmp_path: Path) -> None:
    weights = {f"{s}.weight": np.ones((m, n)) for s, (n, m) in SITES.items()}
    model = PeftModel(weights)
    model.add("task", CONFIG, dtype="float64")
    allocator, params, state = run()
    model.update({"task": params})
    merged = model.merge()
    model.exchange("task", allocator.pruned(model["task"], state))
    for key, value in model.merge().items():
        np.testing.assert_allclose(value, merged[key], rtol=1e-12)
    model["task"].save(tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == {f"{s}.lora_E": mask for s, mask in state["mask"].items()}
    again = PeftModel(weights)
    adapter = again.add("task", Adapter.load(tmp_path / "a"))
    for site, mask in state["mask"].items():
        assert adapter.sites[site]["lora_E"].shape == (sum(mask), 1)
    for key, value in again.merge().items():
        np.testing.assert_allclose(value, merged[key], rtol=1e-12)


def test_before_any_mask_nothing_is_pruned() -> None:
    allocator = RankAllocator(CONFIG)
    adapter = Adapter(CONFIG, values(0))
    assert allocator.pruned(adapter, allocator.init(values(0))) is adapter


def test_what_cannot_be_allocated() -> None:
    allocator = RankAllocator(CONFIG)
    with pytest.raises(ConfigError, match="nothing to allocate"):
        allocator.init({"fc": {"lora_A.weight": np.ones((2, 2))}})
    with pytest.raises(ConfigError, match="3 triplets cannot be allocated: init_r=4"):
        allocator.init(values(0, r=3))
    params = values(0)
    state = allocator.init(params)
    bad = {s: {k: a * np.nan for k, a in p.items()} for s, p in params.items()}
    _, state = allocator.update(bad, state, params, 1)
    with pytest.raises(ConfigError, match="not finite cannot be ranked"):
        allocator.update(params, state, params, 6)

"""The method that acts within attention: its laws, gradients and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_any import Adapter, ConfigError, PeftModel, ShapeError, merge_checkpoint
from peft_any.backend import namespace, resolve
from peft_any.io.safetensors import write_safetensors
from peft_any.layer import linear
from peft_any.methods.adaption_prompt import AdaptionPromptConfig
from peft_any.rng import Fresh
from peft_any.testing import Lib
from peft_any.testing.gradients import ENGINES, difference, finite_differences, gradients, like

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)


def drawn() -> tuple[dict[str, Any], list[np.ndarray]]:
    """Draw prompts of a block with 4 heads in 2 groups, its queries and projections."""
    rng = np.random.default_rng(0)
    p = {k: rng.standard_normal(s) for k, s in CONFIG.shapes(8).items()}
    return p, [rng.standard_normal(s) for s in ((2, 4, 5, 2), (4, 8), (4, 8))]


def term(p: Any, q: Any, k: Any, v: Any) -> Any:
    return CONFIG.attend(p, q, lambda x: linear(x, k), lambda x: linear(x, v))


def loss(p: Any, *rest: Any) -> Any:
    y = term(p, *rest)
    n = np.arange(np.prod(y.shape, dtype=int))
    return namespace(y).sum(y * y * like(np.cos(1.0 + n).reshape(y.shape), y))


def test_a_fresh_prompt_adds_nothing_and_is_the_same_everywhere(lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    want = CONFIG.init(Fresh(3, resolve("numpy"), dtype="float64"), 8)
    _, rest = drawn()
    assert not term(want, *rest).any()
    assert {k: v.shape for k, v in want.items()} == CONFIG.shapes(8)
    for name, value in CONFIG.init(Fresh(3, lib.backend, dtype="float64"), 8).items():
        lib.check(value, want[name], rtol=0.0)


def test_every_library_gives_numpys_numbers(lib: Lib) -> None:
    p, rest = drawn()
    lib.check(lib.call(term, p, *rest), term(p, *rest), rtol=1e-14)


def test_gradients_are_finite_differences() -> None:
    p, rest = drawn()
    _, got = gradients("numpy", loss, p, *rest)
    assert difference(got, finite_differences(loss, p, *rest)) < 1e-8


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(engine: str) -> None:
    p, rest = drawn()
    _, want = gradients("numpy", loss, p, *rest)
    _, got = gradients(engine, loss, p, *rest)
    assert difference(got, want) < 1e-12


def test_the_last_blocks_are_chosen() -> None:
    names = [f"h.{i}.{part}" for i in range(11) for part in ("attn", "mlp")]
    assert CONFIG.modules(names) == ["h.9.attn", "h.10.attn"]
    with pytest.raises(ConfigError, match=r"adapter_layers=2 .* of 0 attention"):
        CONFIG.modules(["h.0.mlp"])


def test_what_it_is_not_is_refused(tmp_path) -> None:
    p, (q, k, v) = drawn()
    weights = {"h.0.attn.k.weight": k.astype("float32")}
    adapter = Adapter(CONFIG, {"h.0.attn": p})
    for given in (CONFIG, adapter):
        with pytest.raises(ConfigError, match=r"ADAPTION_PROMPT cannot be merged.*config\.attend"):
            PeftModel(weights).add("a", given)
    adapter.save(tmp_path / "a")
    write_safetensors(tmp_path / "base.safetensors", weights)
    with pytest.raises(ConfigError, match=r"a: ADAPTION_PROMPT cannot be merged.*config\.attend"):
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out")
    with pytest.raises(ShapeError, match="cannot serve 4 heads of 2 channels"):
        term(p, q, k[:3], v[:3])
    with pytest.raises(ConfigError, match="adapter_len=0"):
        AdaptionPromptConfig(adapter_len=0)
    with pytest.raises(ConfigError, match="adapter_len=None"):
        AdaptionPromptConfig().shapes(8)

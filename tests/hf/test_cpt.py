"""CPT's bounds, training and loss are Hugging Face PEFT's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch

from peft_any import Adapter, ConfigError, PeftModel
from peft_any.backend import namespace, to_numpy
from peft_any.methods.cpt import CPTConfig
from peft_any.train import adamw, fit
from tests.cases import PROMPTS
from tests.hf import reference

CASES = [case for case in PROMPTS if isinstance(case.config, CPTConfig)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training(case: Any, dtype: str, tmp_path: Path) -> None:
    config = case.config
    with reference.quietly():
        hf = peft.get_peft_model(reference.prompt_model(config), reference.config_of(config))
    hf = hf.to(getattr(torch, dtype))
    table = reference.host(hf.word_embeddings.weight)
    model = PeftModel({"wte.weight": table})
    adapter = model.add("task", config, dtype=dtype)
    turn = np.random.default_rng(2).normal(size=(config.token_dim,) * 2).astype(dtype)
    encoder = hf.prompt_encoder["default"]
    rule = torch.optim.AdamW(encoder.delta_embedding.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(6):
        made = hf.get_prompt(batch_size=1)[0]
        (torch.sin(made @ torch.tensor(turn)) ** 2).mean().backward()
        rule.step()
        rule.zero_grad()
    want = reference.host(hf.get_prompt(batch_size=1)[0])

    def loss(bound: Any, batch: Any) -> Any:
        made = adapter.config.portable(bound.params["task"][""])["prompt_embeddings"]
        xp = namespace(made)
        return xp.mean(xp.sin(made @ batch) ** 2)

    fit(model, loss, [turn], steps=6, optimizer=adamw(0.1, weight_decay=0.01))
    model["task"].save(tmp_path / "a")
    got = Adapter.load(tmp_path / "a").shared["prompt_embeddings"]
    assert np.abs(got - table[config.cpt_token_ids]).max() > 1e-3
    # HF's bounds are in single precision
    np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("typed", [False, True])
def test_loss(case: Any, typed: bool) -> None:
    config, rng = case.config, np.random.default_rng(1)
    own = config.cpt_tokens_type_mask
    logits = rng.normal(size=(2, len(own) + 5, 20))
    labels = rng.integers(0, 20, (2, 5))
    labels[0, 2] = -100
    types = np.asarray([[0, 1, 2, 4, 4], [4, 8, 8, 4, 4]]) if typed else np.full((2, 5), 4)
    whole = np.concatenate(
        [np.tile(own, (2, 1)), np.where(types > 0, types + max(own), types)], axis=1
    )
    every = np.concatenate([np.tile(config.cpt_token_ids, (2, 1)), labels], axis=1)
    every[~((whole > 0) & (whole % 4 == 0))] = -100
    theirs = peft.tuners.CPTEmbedding.calculate_loss(
        SimpleNamespace(logits=torch.tensor(logits)),
        torch.tensor(every),
        torch.tensor(whole),
        reference.config_of(config),
    )
    if max(own) % 4:
        with pytest.raises(ConfigError, match="let its largest number"):
            config.loss(logits, labels)
        return
    got = config.loss(logits, labels, types if typed else None)
    np.testing.assert_allclose(got, float(theirs.loss), rtol=1e-7)

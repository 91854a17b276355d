"""Prompts and prefixes of Hugging Face PEFT on transformers' models, attached: the same outputs."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
import transformers  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.errors import ConfigError  # noqa: E402
from peft_any.integrations.torch import attach, detach_adapter, merge_into  # noqa: E402
from peft_any.methods.cpt import CPTConfig  # noqa: E402
from peft_any.methods.lora import LoraConfig  # noqa: E402
from peft_any.methods.p_tuning import PromptEncoderConfig  # noqa: E402
from peft_any.methods.prefix_tuning import PrefixTuningConfig  # noqa: E402
from peft_any.methods.prompt_tuning import PromptTuningConfig  # noqa: E402
from tests.hf import models  # noqa: E402
from tests.hf.models import quietly  # noqa: E402
from tests.hf.whole import close, their_config  # noqa: E402

pytestmark = pytest.mark.hf

CAUSAL = {"task_type": "CAUSAL_LM"}
TASKS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "features": "FEATURE_EXTRACTION",
}
METHODS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {},
    "P_TUNING": {"encoder_hidden_size": 8},
    "PREFIX_TUNING": {},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 3, "num_ranks": 2},
    "CPT": {
        "cpt_token_ids": [3, 1, 4, 1, 5],
        "cpt_mask": [1] * 5,
        "cpt_tokens_type_mask": [1, 2, 2, 3, 4],
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.9,
    },
    "CARTRIDGE": {"num_frozen_tokens": 1},
}
ROWS = [
    (model, method)
    for model, task in TASKS.items()
    for method in METHODS
    if task == "CAUSAL_LM" or (task != "FEATURE_EXTRACTION" and method not in ("CPT", "CARTRIDGE"))
]
rows = pytest.mark.parametrize(("model", "method"), ROWS)


def base_of(model: str) -> Any:
    """Make a model that can start a translation."""
    if model == "bart":
        torch.manual_seed(3)
        sides = ("encoder", "decoder")
        sizes = {f"{side}_{size}": 1 for side in sides for size in ("layers", "attention_heads")}
        config = transformers.BartConfig(vocab_size=40, d_model=16, **sizes)
        return transformers.BartForConditionalGeneration(config).eval()
    made = models.base_of("bert" if model == "features" else model)
    if model == "features":
        return made.bert
    if model == "t5":  # of the width of heads that Hugging Face PEFT expects
        torch.manual_seed(3)
        sizes = {**made.config.to_dict(), "d_kv": 8}
        made = type(made)(type(made.config)(**sizes)).eval()
        made.config.decoder_start_token_id = made.generation_config.decoder_start_token_id = 0
    return made


def theirs_of(model: str, method: str, folder: Path) -> Any:
    """Make Hugging Face PEFT's model with an adapter of random numbers, and save it."""
    fields: dict[str, Any] = {"task_type": TASKS[model], "num_virtual_tokens": 5, **METHODS[method]}
    if method == "CPT":
        del fields["num_virtual_tokens"]
    torch.manual_seed(5)
    with quietly():
        made = peft.get_peft_model(base_of(model), their_config(method, fields)).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and ("prompt_encoder" in name or "classifier" in name):
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        made.save_pretrained(folder)
    return made


def given_of(model: str, method: str) -> dict[str, Any]:
    """Give a batch with padding, and labels."""
    new = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (2, 7), generator=new)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    if model == "bert":
        given["labels"] = torch.tensor([0, 1])
        given["token_type_ids"] = (ids > 20).long()
    if TASKS[model] == "SEQ_2_SEQ_LM":
        given["labels"] = ids[:, :4].clone()
        given["labels"][1, 2] = -100
        if method == "PREFIX_TUNING":
            given["decoder_attention_mask"] = torch.ones(2, 4, dtype=torch.long)
    if method == "MULTITASK_PROMPT_TUNING":
        given["task_ids"] = torch.tensor([2, 0])
    return given


def run(model: Any, given: dict[str, Any]) -> Any:
    with torch.no_grad(), quietly():
        return model(**given)


@rows
def test_outputs_and_losses_are_hfs(model: str, method: str, tmp_path: Path) -> None:
    theirs, given = theirs_of(model, method, tmp_path / "a"), given_of(model, method)
    want = run(theirs, given)
    ours = base_of(model)
    plain = {k: v for k, v in given.items() if k != "task_ids"}
    before, keys = run(ours, plain).logits, [*ours.state_dict()]
    trace = {name: {*vars(m)} for name, m in ours.named_modules()}
    held = attach(ours, Adapter.load(tmp_path / "a"))
    got = run(ours, given)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    assert [*ours.state_dict()] == keys
    with held.disabled():
        assert torch.equal(run(ours, plain).logits, before)
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge_into(ours)
    detach_adapter(ours)
    assert {name: {*vars(m)} for name, m in ours.named_modules()} == trace
    assert torch.equal(run(ours, plain).logits, before)
    assert got.logits.shape != before.shape or not torch.equal(got.logits, before)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_features_are_hfs_which_leaves_out_types_of_tokens(method: str, tmp_path: Path) -> None:
    theirs, given = theirs_of("features", method, tmp_path / "a"), given_of("bert", method)
    del given["labels"]
    ours = base_of("features")
    attach(ours, Adapter.load(tmp_path / "a"))
    want, got = (run(m, given).last_hidden_state for m in (theirs, ours))
    close(got, want)


def test_a_call_says_its_tasks(tmp_path: Path) -> None:
    theirs, given = (
        theirs_of("gpt2", "MULTITASK_PROMPT_TUNING", tmp_path / "a"),
        given_of("gpt2", ""),
    )
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        run(theirs, given)
    ours = base_of("gpt2")
    attach(ours, Adapter.load(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"cannot choose among 3 tasks: give it task_ids"):
        run(ours, given)
    with pytest.raises(ConfigError, match=r"cannot choose among 3 tasks: give it task_ids"):
        ours.generate(input_ids=given["input_ids"], max_new_tokens=1, pad_token_id=0)


DECODERS = [(m, k) for m, k in ROWS if TASKS[m] == "CAUSAL_LM"] + [r for r in ROWS if r[0] == "t5"]


@pytest.mark.parametrize(("model", "method"), DECODERS)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "anew"])
def test_generation_is_hfs(model: str, method: str, cached: bool, tmp_path: Path) -> None:
    theirs, given = theirs_of(model, method, tmp_path / "a"), given_of(model, method)
    given = {k: v[:, -4:] for k, v in given.items() if k in ("input_ids", "attention_mask")}
    if method == "MULTITASK_PROMPT_TUNING":
        given["task_ids"] = torch.tensor([2, 2])
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ours = base_of(model)
    attach(ours, Adapter.load(tmp_path / "a"))
    with torch.no_grad(), quietly():
        want = theirs.generate(**given, **how)
        got = ours.generate(**given, **how, use_cache=cached)
    assert got.tolist() == want.tolist()


def test_generation_by_an_encoder_and_back(tmp_path: Path) -> None:
    theirs_of("t5", "PROMPT_TUNING", tmp_path / "a")
    ours, ids = base_of("t5"), torch.tensor([[3, 4, 5]])
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}

    def logits(**given: Any) -> torch.Tensor:
        with quietly():
            out = ours.generate(**given, **how, return_dict_in_generate=True)
        return torch.stack(out.logits)

    plain = logits(input_ids=ids)
    held = attach(ours, Adapter.load(tmp_path / "a"))
    prompted = logits(inputs=ids)
    assert not torch.allclose(prompted, plain)
    embedded = ours.get_input_embeddings()(ids)
    torch.testing.assert_close(logits(inputs_embeds=embedded), prompted)
    with held.disabled():
        assert torch.equal(logits(input_ids=ids), plain)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: logits(inputs=ids), range(8)):
            torch.testing.assert_close(found, prompted)
    encoded = ours.get_encoder()(ids)
    with pytest.raises(ConfigError, match="without the prompt"):
        ours(encoder_outputs=encoded, decoder_input_ids=ids)
    detach_adapter(ours)
    assert torch.equal(logits(input_ids=ids), plain)


FRESH = [
    ("llama", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    ("llama", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    ("gpt2", PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)),
    ("gpt2", PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=4)),
    ("bert", PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    ("t5", PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
    ("gpt2", CPTConfig(cpt_token_ids=[3, 1, 4], cpt_tokens_type_mask=[1, 2, 4], **CAUSAL)),
]


@pytest.mark.parametrize(("model", "config"), FRESH)
def test_a_fresh_one_is_trained_and_opens_in_peft(model: str, config: Any, tmp_path: Path) -> None:
    ours, given = base_of(model), given_of(model, config.peft_type)
    held = attach(ours, config)
    frozen = {k: v.clone() for k, v in ours.state_dict().items()}
    optimizer = torch.optim.AdamW(held.parameters(), lr=0.03)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = ours(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[k], v) for k, v in ours.state_dict().items())
    assert all(p.grad is not None for p in held.parameters())
    named = config.task_type is not None
    held.save(tmp_path / "a")
    want = run(ours, given)
    if named:
        with quietly():
            theirs = peft.PeftModel.from_pretrained(base_of(model), tmp_path / "a").eval()
        close(run(theirs, given).logits, want.logits)
    again = base_of(model)
    attach(again, Adapter.load(tmp_path / "a"))
    close(run(again, given).logits, want.logits)


def test_a_prompt_beside_a_lora() -> None:
    ours, given = base_of("llama"), given_of("llama", "PROMPT_TUNING")
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    attach(ours, lora, "lora")
    alone = run(ours, given).logits
    attach(ours, prompt, "prompt")
    both = run(ours, given).logits
    with pytest.raises(ConfigError, match="takes a prompt already"):
        attach(ours, prompt, "again")
    detach_adapter(ours, "lora")
    assert not torch.equal(run(ours, given).logits, both)
    attach(ours, lora, "lora")
    assert torch.equal(run(ours, given).logits, both)
    twin = copy.deepcopy(ours)
    assert torch.equal(run(twin, given).logits, both)
    detach_adapter(twin, "prompt")
    assert torch.equal(run(twin, given).logits, alone)
    assert torch.equal(run(ours, given).logits, both)


def test_what_cannot_be_taken() -> None:
    ours = base_of("llama")
    wide = PromptTuningConfig(num_virtual_tokens=3, token_dim=8, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="embeddings of width 16"):
        attach(ours, wide)
    attach(ours, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ConfigError, match="attention_mask cannot be lengthened"):
        ours(ids, attention_mask=torch.ones(1, 1, 2, 2))
    with pytest.raises(ConfigError, match="neither input_ids nor inputs_embeds"):
        ours()
    detach_adapter(ours)
    held = attach(ours, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="no input was given"):
        ours()
    assert held.adapter.config.num_attention_heads == 2  # the keys', of the queries' four
    detach_adapter(ours)
    ours.forward = ours.forward
    with pytest.raises(ConfigError, match="forward was replaced"):
        attach(ours, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))

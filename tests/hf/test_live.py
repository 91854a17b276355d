"""Law 6, live: what Hugging Face PEFT writes we read, and what we write it reads."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.autodiff import value_and_grad  # noqa: E402
from peft_any.backend import namespace  # noqa: E402
from peft_any.errors import ConfigError  # noqa: E402
from peft_any.io.config import CONFIG_NAME  # noqa: E402
from peft_any.layer import Dense  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from tests.cases import CASES, PROMPTS, Case, PromptCase  # noqa: E402
from tests.hf import reference  # noqa: E402

ROUNDING = {"float32": 1e-5, "float64": 1e-10}
SINGLE = 1e-7
"""Where Hugging Face PEFT itself computes in single precision: the norm bound of OFT's `coft`."""
LIVE = [
    case
    for case in CASES
    if case.hf is None or getattr(case.config, "boft_n_butterfly_factor", 1) > 1
]
"""Rows that run here: with `reference.BlockDiagonal` also butterfly factors above 1."""
READ = [case for case in LIVE if not (case.config.marks or case.config.begun)]
"""Those of which Hugging Face PEFT reads our files."""
rows = pytest.mark.parametrize("case", LIVE, ids=lambda case: case.name)
written = pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def tolerance(case: Case, dtype: str) -> float:
    if case.single:
        return ROUNDING["float32"]
    return max(ROUNDING[dtype], SINGLE if getattr(case.config, "coft", False) else 0.0)


def compare(got: Mapping[str, Any], want: Mapping[str, Any], rtol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        size = float(np.max(np.abs(value)))
        np.testing.assert_allclose(got[key], value, rtol=0, atol=rtol * size, err_msg=key)


@rows
@dtypes
def test_what_hf_writes_we_read(case: Case, dtype: str, tmp_path: Path) -> None:
    mica = getattr(case.config, "init_lora_weights", None) == "mica"
    if dtype == "float64" and (mica or reference.takes_from_base(case, case.base())):
        pytest.skip("HF decomposes no float64 weights")
    result = reference.run(case, tmp_path, dtype, seed=5)
    for folder, rederive in ((result.folder, False), (result.raw, True)):
        if folder is None:
            continue
        if rederive and "niter" in str(case.config.init_lora_weights):
            with pytest.raises(ConfigError, match="weight_conversion"):
                Adapter.load(folder)
            continue
        model = PeftModel(result.base)
        model.add("a", Adapter.load(folder), rederive=rederive)
        compare(model.merge(), result.merged, tolerance(case, dtype))
        if result.x is not None and result.y is not None:
            y = model.bind().layers[case.site.name](result.x)
            compare({"y": y}, {"y": result.y}, tolerance(case, dtype))


def ours(case: Case, base: dict[str, np.ndarray], dtype: str) -> tuple[PeftModel, Adapter]:
    """Make an adapter without Hugging Face PEFT, with trained-looking values."""
    model = PeftModel(base, kinds={case.site.name: case.site})
    config = replace(case.config, target_modules=reference.targets_of(case))
    adapter = model.add("fresh", config, seed=5, dtype=dtype)
    rng = np.random.default_rng([5, 4])
    own = case.params(case.base(5, dtype=dtype), 5, dtype)
    shapes = reference.shapes_of(case)

    def noisy(p: dict[str, Any]) -> dict[str, Any]:
        return {k: (v + 0.2 * rng.standard_normal(v.shape)).astype(dtype) for k, v in p.items()}

    sites = {
        name: {k: own[k] for k in p} if name == case.site.name else noisy(p)
        for name, p in adapter.sites.items()
    }
    assert shapes.keys() <= sites[case.site.name].keys()
    shared = {k: own[k] for k in adapter.shared}
    return model, adapter.replace(sites=sites, shared=shared)


def loaded(case: Case, folder: Path, dtype: str, name: str) -> tuple[Any, set[str]]:
    """Let Hugging Face PEFT load an adapter, and collect what it warns of."""
    plain = reference.model_of(case.base(5, dtype=dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(plain, folder, adapter_name=name)
    return model, {str(w.message) for w in caught}


@cache
def own_warnings(case_name: str) -> frozenset[str]:
    """What Hugging Face PEFT warns of when it loads its own file of a row."""
    case = next(case for case in CASES if case.name == case_name)
    with tempfile.TemporaryDirectory() as folder:
        saved = reference.run(case, Path(folder), seed=5).folder
        return frozenset(loaded(case, saved, "float32", "default")[1]) if saved else frozenset()


@written
@dtypes
@pytest.mark.parametrize("name", ["default", "other"])
def test_what_we_write_hf_reads_without_a_warning(
    case: Case, dtype: str, name: str, tmp_path: Path
) -> None:
    """No warning, that is, but those of its own file of the same row."""
    if dtype == "float64" and getattr(case.config, "init_lora_weights", None) == "mica":
        pytest.skip("HF decomposes no float64 weights")
    plain = reference.model_of(case.base(5, dtype=dtype))
    model, adapter = ours(case, reference.state_of(plain), dtype)
    model.add("a", adapter)
    model.activate("a")
    adapter.save(tmp_path / "a")
    theirs, said = loaded(case, tmp_path / "a", dtype, name)
    assert said <= own_warnings(case.name)
    with reference.quietly():
        merged = reference.state_of(theirs.merge_and_unload())
    compare(model.merge(), merged, tolerance(case, dtype))


HELD = [case for case in LIVE if case.config.peft_type in reference.LACKING]
MARKED = {case.config.peft_type: case for case in HELD}
marked = pytest.mark.parametrize("case", [*MARKED.values()], ids=[*MARKED])


@marked
def test_hf_refuses_our_file_where_it_would_take_arrays_of_its_own(
    case: Case, tmp_path: Path
) -> None:
    """It ignores the arrays that its files lack: signs and clusters would be its own."""
    plain = reference.model_of(case.base(5))
    _, adapter = ours(case, reference.state_of(plain), "float32")
    adapter.save(tmp_path / "a")
    field = reference.LACKING[case.config.peft_type]
    with pytest.raises(ValueError, match=f"{field}.*peft_any"):
        loaded(case, tmp_path / "a", "float32", "default")
    path = tmp_path / "a" / CONFIG_NAME
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {field: getattr(case.config, field)}))
    _, warned = loaded(case, tmp_path / "a", "float32", "default")
    assert not warned  # nor does it say anything if the mark is taken away


@pytest.mark.parametrize("case", [MARKED["PSOFT"]], ids=["PSOFT"])
def test_hfs_file_is_refused_where_it_lacks_what_its_writer_told(
    case: Case, tmp_path: Path
) -> None:
    theirs = reference.attach(case, case.base(5), reference.model_of(case.base(5)))
    with reference.quietly():
        theirs.save_pretrained(tmp_path / "a")
    ((_, why),) = case.config.marks.items()
    with pytest.raises(ConfigError, match=re.escape(why)):
        Adapter.load(tmp_path / "a")


@pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)
def test_gradients_beside_frozen_arrays_are_hfs(case: Case, tmp_path: Path) -> None:
    base, state, model = reference.adapted(case, "float64", 5)
    reference.load(model, reference.trained(model, case, base, "float64"))
    base = Dense(state[case.site.weight], state.get(case.site.bias_name), case.site)
    with reference.quietly():
        model.save_pretrained(tmp_path / "a")
    reference.complete(tmp_path / "a", model)
    adapter = Adapter.load(tmp_path / "a")
    config, p = case.config.at(case.site), adapter.sites[case.site.name]
    x, start = reference.inputs(case, "float64"), f"{reference.PREFIX}{case.site.name}."
    model.base_model.model.get_submodule(case.site.name)(torch.tensor(x)).square().sum().backward()
    theirs = {
        name.replace(".default", "").removeprefix(start): reference.host(weight.grad)
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }

    def loss(trained: dict[str, Any]) -> Any:
        y = config.forward(config.prepare({**p, **trained}, base), x, base)
        return namespace(y).sum(y * y)

    trained = {name: a for name, a in p.items() if name not in config.frozen}
    _, ours = value_and_grad(loss)(trained)
    for name in [name for name, a in trained.items() if not a.size]:  # a rotation of one direction
        assert ours.pop(name).shape == theirs.pop(name).shape
    compare(ours, theirs, 1e-10)


def test_few_rows_make_hf_warn_of_its_own_files() -> None:
    """A row that warns is one that Hugging Face PEFT cannot write without a warning either."""
    noisy = {case.name: own_warnings(case.name) for case in READ}
    said = [(name, text) for name, texts in noisy.items() for text in texts]
    reasons = (
        "Invalid `",  # OFT's sizes that do not divide, adjusted alike
        "rank_pattern keys did not match",  # AdaLoRA's masks, taken for LoRA's patterns
        "alpha_pattern keys did not match",  # of parameters, to which it applies them
        "`r` is not used in AdaLora",  # the row sets it
        "NOT be performed when r is odd",  # HRA's start; the row's rank is
        "Unsupported layer type",  # norms, which it asks for their features
        "Specified to not",  # save or load projections: the row asks for that
        "save_precomputed_indices=False",  # likewise Super-Tuning's places
    )
    assert not [(name, text) for name, text in said if not any(r in text for r in reasons)]


@pytest.mark.parametrize(
    "case", [case for case in PROMPTS if case.hf is None], ids=lambda case: case.name
)
@pytest.mark.parametrize("name", ["default", "other"])
def test_prompts_we_write_hf_reads_without_a_warning(
    case: PromptCase, name: str, tmp_path: Path
) -> None:
    config: Any = case.config
    rng = np.random.default_rng(6)
    shared = {k: rng.standard_normal(s).astype("float32") for k, s in config.shapes().items()}
    Adapter(config, shared=shared).save(tmp_path / "a")
    with reference.quietly():
        plain = reference.prompt_model(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # between HF's two
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name=name).eval()
    made = reference.virtual_tokens(theirs)
    again = Adapter.load(tmp_path / "a")
    if "prompt" in made:
        want = again.shared["prompt_embeddings"]
        if hasattr(config, "num_tasks"):
            want = config.prompts(again.shared, [config.num_tasks - 1, 0])
            np.testing.assert_allclose(made["prompt"], want, rtol=1e-5, atol=1e-6)
            return
        np.testing.assert_array_equal(made["prompt"], np.broadcast_to(want, made["prompt"].shape))
        return
    for i, (key, value) in enumerate(config.key_values(again.shared, 2)):
        np.testing.assert_array_equal(made[f"key.{i}"], key)
        np.testing.assert_array_equal(made[f"value.{i}"], value)

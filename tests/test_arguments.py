"""Arguments that are nothing that a public function takes: an error of ours says so."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peft_any
from peft_any import Adapter, LoraConfig, PeftError, PeftModel, Site
from peft_any.errors import BackendError, ConfigError, ShapeError, UsageError

WRONG: tuple[Any, ...] = (
    None, -1, 3, 2.5, float("nan"), True, "", "nonsense", b"x", [], {}, (), object(), ["a"],
    [[1]], {"a": 1}, {1: 2}, {"W": [[1.0]]}, Path("nowhere"), np.zeros(2, "float32"), np.float16,
)  # fmt: skip
CONFIG = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
WEIGHTS = {
    "fc.weight": np.linspace(-1, 1, 30, dtype="float32").reshape(6, 5),
    "fc.bias": np.zeros(6, "float32"),
    "layers.0.q.weight": np.eye(4, dtype="float32"),
    "layers.1.q.weight": np.eye(4, dtype="float32"),
}
ADAPTER = PeftModel(WEIGHTS).add("one", CONFIG)
OTHER = PeftModel(WEIGHTS).add("two", CONFIG, seed=1)
MERGED = peft_any.merge(WEIGHTS, ADAPTER)
BATCH = np.ones((3, 5), "float32"), np.ones((3, 6), "float32")


def loss(params: Any) -> Any:
    return params["x"] @ params["x"]


def error(bound: Any, batch: Any) -> Any:
    return ((bound.layers["fc"](batch[0]) - batch[1]) ** 2).mean()


def train(data: Any, held_out: Any = None) -> Any:
    return peft_any.fit(model(), error, data, steps=1, held_out=held_out, progress=False)


def model() -> PeftModel:
    made = PeftModel(WEIGHTS)
    made.add("one", CONFIG)
    return made


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, the same as a model, two adapters and a merged one."""
    path = tmp_path_factory.mktemp("arguments")
    peft_any.write_safetensors(path / "base.safetensors", WEIGHTS)
    peft_any.write_safetensors(path / "merged.safetensors", MERGED)
    (path / "model").mkdir()
    peft_any.write_safetensors(path / "model" / "model.safetensors", WEIGHTS)
    (path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    ADAPTER.save(path / "one")
    OTHER.save(path / "two")
    return path


def calls(at: Path, out: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public function with arguments that are fine."""
    base, whole, one, two = (
        at / name for name in ("base.safetensors", "merged.safetensors", "one", "two")
    )
    layers = [[0, 2], [1, 2]]
    weights = {"weights": WEIGHTS}
    given: dict[str, dict[str, Any]] = {
        "Adapter": {"config": CONFIG, "sites": ADAPTER.sites},
        "AdapterStore": {"directory": at, "max_bytes": 10**6},
        "PeftModel": weights,
        "Site": {"name": "fc", "n_in": 5, "n_out": 6},
        "combine": {"adapters": [ADAPTER, OTHER]},
        "config_from_json": {"source": one / "adapter_config.json"},
        "convert": {"adapter": ADAPTER},
        "custom_vjp": {"forward": lambda x: (x, x), "backward": lambda _, g: (g,)},
        "detach": {"x": np.ones(2)},
        "diff": {"a": one, "b": two},
        "extract": {"base": base, "model": whole, "rank": 2},
        "fit": {"model": model(), "loss": error, "data": [BATCH], "steps": 1, "progress": False},
        "grad": {"f": loss},
        "inspect_adapter": {"adapter": one, "base": base},
        "merge": {**weights, "adapter": ADAPTER},
        "merge_checkpoint": {"base": base, "adapter": one, "out": out},
        "method_for": {"peft_type": "LORA"},
        "move": {"tree": {"x": np.ones(3)}, "backend": "numpy"},
        "pad_to_rank": {"adapter": ADAPTER, "r": 4},
        "read_safetensors": {"path": base},
        "remat": {"f": loss},
        "replicate_checkpoint": {"base": at / "model", "layer_replication": layers, "out": out},
        "replicate_layers": {**weights, "layer_replication": layers},
        "resize": {"adapter": ADAPTER, "rank": 1},
        "resolve": {"spec": "numpy"},
        "stack": {**weights, "adapters": [ADAPTER, OTHER]},
        "unmerge": {"merged": MERGED, "adapter": ADAPTER},
        "value_and_grad": {"f": loss},
        "verify_checkpoint": {"base": base, "adapter": one, "merged": whole},
        "vjp": {"f": loss, "params": {"x": np.ones(3)}},
        "without_merging": {"f": loss},
        "write_safetensors": {"path": out, "tensors": WEIGHTS},
    }
    found = {name: (getattr(peft_any, name), args) for name, args in given.items()}
    found["PeftModel.add"] = PeftModel(WEIGHTS).add, {"name": "new", "adapter": CONFIG}
    found["PeftModel.remove"] = model().remove, {"name": "one"}
    found["PeftModel.activate"] = model().activate, {"names": "one"}
    found["PeftModel.update"] = model().update, {"params": {}}
    found["PeftModel.exchange"] = model().exchange, {"name": "one", "adapter": OTHER}
    found["PeftModel.unmerge"] = model().unmerge, {"merged": MERGED}
    found["PeftModel.alone"] = model().alone, {"name": "one"}
    found["Adapter.load"] = Adapter.load, {"path": one}
    found["Adapter.save"] = ADAPTER.save, {"path": out}
    found["Adapter.to"] = ADAPTER.to, {"backend": "numpy"}
    found["Adapter.renamed"] = ADAPTER.renamed, {"rename": str.upper}
    found["Adapter.check"] = ADAPTER.check, {"weights": WEIGHTS}
    return found


ABSTRACT = {"Additive", "Prompt", "Tuner"}
MADE = {"Backend", "Dense", "backend"}
"""What the package makes and hands out, and a `with` whose argument is `resolve`'s."""
OWN = {("fit", "loss"), ("fit", "data"), ("fit", "held_out"), ("vjp", "params")}
"""What the caller's own functions are called with, or are."""
NAMES = [*calls(Path(), Path())]


def test_every_public_function_is_tried() -> None:
    errors = {n for n in peft_any.__all__ if n in dir(peft_any.errors)}
    assert {*peft_any.__all__} - errors - ABSTRACT - MADE == {n for n in NAMES if "." not in n}


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_given_is_taken_or_refused_in_a_sentence(
    name: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where outputs called "nonsense" go
    function, args = calls(here, tmp_path / "fine")[name]
    function(**args)
    parameters = inspect.signature(function).parameters.values()
    for key in (p.name for p in parameters if p.kind is not p.VAR_POSITIONAL):
        if (name, key) in OWN:
            continue
        for i, wrong in enumerate(WRONG):
            if callable(wrong) and key in ("progress", "rename", "f", "forward", "backward"):
                continue  # it is called then
            function, args = calls(here, tmp_path / f"{key}{i}")[name]
            with suppress(PeftError):
                function(**{**args, key: wrong})


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: PeftModel({"W": [[1.0]]}), UsageError, r"weights\['W'\]=.* give an array"),
        (lambda: PeftModel([1]), UsageError, r"weights=\[1\] .* give a mapping of names"),
        (lambda: PeftModel(WEIGHTS, kinds=3), UsageError, "kinds=3 .*: give a mapping or None"),
        (lambda: peft_any.resize(ADAPTER, rank=2.5), UsageError, "rank=2.5 .* give an integer"),
        (lambda: peft_any.combine([ADAPTER], out=3), UsageError, "out=3 .*: give a path or None"),
        (lambda: peft_any.merge(WEIGHTS, "one"), UsageError, "adapter='one' .*: give an Adapter"),
        (lambda: peft_any.grad(3), UsageError, "grad: f=3 cannot be taken: give a function"),
        (lambda: peft_any.method_for(None), ConfigError, "peft_type None .* give its name, 'LORA'"),
        (lambda: Adapter(None), UsageError, "config=None .* give a method's configuration"),
        (lambda: Adapter(CONFIG, {"fc": {"a": 1}}), UsageError, r"sites\['fc'\]\['a'\]=1 .* array"),
        (lambda: train(None), ConfigError, "a NoneType is no list of batches: give a list, or"),
        (lambda: train({"a": 1}), ConfigError, "a dict is no list .* or batch_size= to cut arrays"),
        (lambda: train([]), ConfigError, "data: there is no batch in it"),
        (lambda: train([BATCH], 3), ConfigError, "held_out: a int is no list of .* a list$"),
        (lambda: Site("fc", 2.5, 3), ShapeError, "sizes .*2.5.* give whole numbers"),
        (lambda: model().add("new", CONFIG, dtype=3), BackendError, "3: has no dtype"),
    ],
)  # fmt: skip
def test_the_error_says_what_is_taken(call: Callable[[], Any], kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def dtypes() -> list[Any]:
    import ml_dtypes
    import torch

    half = ["float16", "half", "FP16", np.float16, np.dtype("float16"), torch.float16]
    return [*half, "bf16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), torch.bfloat16]


def test_a_dtype_is_a_name_or_whatever_a_library_has_for_it(here: Path, tmp_path: Path) -> None:
    from peft_any.backend import dtype_name

    for i, dtype in enumerate(dtypes()):
        want = "float16" if i < 6 else "bfloat16"
        out = tmp_path / f"{i}.safetensors"
        peft_any.merge_checkpoint(here / "base.safetensors", ADAPTER, out, dtype=dtype)
        assert dtype_name(peft_any.read_safetensors(out)["fc.weight"]) == want
        made = PeftModel(WEIGHTS).add("new", CONFIG, dtype=dtype)
        for adapter in (made, peft_any.resize(ADAPTER, rank=1, dtype=dtype)[0]):
            assert {dtype_name(a) for a in adapter.sites["fc"].values()} == {want}
    with pytest.raises(UsageError, match=r"dtype 'int8'.*float8_e4m3fn \(fp8\)"):
        peft_any.merge_checkpoint(
            here / "base.safetensors", here / "one", dry_run=True, dtype=np.int8
        )

"""Several active adapters, of one method and of several: Hugging Face PEFT's own tables.

The pairs of its ``tests/test_custom_models.py`` (MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES) and of its
``tests/test_mixed.py``, in our own words; `tests.parity` names the exceptions.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.registry import method_names  # noqa: E402
from tests import parity  # noqa: E402
from tests.hf.models import base_of, quietly  # noqa: E402
from tests.hf.reference import complete, host, state_of  # noqa: E402
from tests.hf.test_custom_cases import Net  # noqa: E402
from tests.hf.whole import compare, fill, merged, saved_once, their_config  # noqa: E402

FIRST, SECOND = ["lin0"], ["lin1"]
TWICE: list[tuple[str, dict[str, Any]]] = [
    ("LORA", {}),
    ("BEFT", {}),
    ("ADALORA", {"total_step": 1, "inference_mode": True}),
    ("FOURIERFT", {"n_frequency": 10}),
    ("GRALORA", {}),
    ("GLORA", {}),
    ("SHIRA", {"r": 1}),
    ("SUPERTUNING", {"sparsity": 0.5, "r": 2}),
    ("HRA", {}),
    ("DEFT", {"decomposition_method": "qr"}),
    ("MISS", {"r": 2}),
    ("VBLORA", {"vector_length": 2, "init_vector_bank_bound": 0.1}),
    ("BOFT", {"boft_block_size": 2}),
    ("WAVEFT", {"n_frequency": 8}),
    ("ROAD", {"group_size": 2}),
    ("DELORA", {}),
    ("LILY", {"r": 2, "stride_A": 1, "num_B": 2}),
    ("PEANUT", {"r": 2, "depth": 1, "act_fn": "relu"}),
    ("HIRA", {}),
    ("TINYLORA", {}),
    ("LOHA", {}),
    ("LOKR", {}),
    ("OFT", {"oft_block_size": 2}),
]
"""Each on one layer twice, and on two layers."""
ALONE: list[tuple[str, dict[str, Any]]] = [
    ("VERA", {}),
    ("FROD", {}),
    ("PVERA", {}),
    ("RANDLORA", {}),
    ("UNILORA", {"theta_d_length": 101}),
]
"""Each on one layer twice."""


def fed(targets: list[str]) -> dict[str, Any]:
    return {"target_modules": targets, "feedforward_modules": targets}


Pair = tuple[str, str, dict[str, Any], dict[str, Any]]
PAIRS: list[Pair] = [
    *((m, "mlp", {**f, "target_modules": FIRST}, {**f, "target_modules": t})
      for m, f in TWICE for t in (FIRST, SECOND)),
    *((m, "mlp", {**f, "target_modules": FIRST}, {**f, "target_modules": FIRST})
      for m, f in ALONE),
    *(("IA3", "mlp", fed(FIRST), fed(t)) for t in (FIRST, SECOND)),
    *(("ROAD", "mlp", {"variant": "road_1", "group_size": 2, "target_modules": FIRST},
       {"variant": v, "group_size": 2, "target_modules": SECOND}) for v in ("road_2", "road_4")),
    *(("PSOFT", "mlp", {"r": r, "psoft_alpha": r, "target_modules": FIRST},
       {"r": r, "psoft_alpha": r, "target_modules": t}) for r, t in ((4, FIRST), (2, SECOND))),
    *(("ADAMSS", "mlp", {"r": 8, "num_subspaces": 2, "target_modules": FIRST},
       {"r": r, "num_subspaces": 2, "target_modules": t}) for r, t in ((8, FIRST), (2, SECOND))),
    ("C3A", "mlp", {"block_size": 2, "target_modules": FIRST},
     {"block_size": 2, "target_modules": SECOND}),
    ("LORA", "mlp", *2 * ({"target_modules": [], "target_parameters": ["lin0.weight"]},)),
]  # fmt: skip
PAIRS = [pair for pair in PAIRS if pair[0] in method_names()]


def base_net(model: str) -> Any:
    """Make a toy model with weights of trained size."""
    plain = Net(model).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return plain


def pair_label(pair: Pair) -> str:
    method, _, first, second = pair
    same = first["target_modules"] == second["target_modules"]
    said = [v for k, v in second.items() if k in ("variant", "target_parameters")]
    return "-".join([method.lower(), "same" if same else "different", *map(str, said)])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # SHiRA, within torch
@pytest.mark.parametrize("pair", PAIRS, ids=pair_label)
def test_two_active_adapters_are_hfs(pair: Pair, tmp_path: Path) -> None:
    method, model, first, second = pair
    plain = base_net(model)
    weights = state_of(plain)
    with quietly():
        theirs = peft.get_peft_model(plain, their_config(method, first), "first")
        theirs.add_adapter("second", their_config(method, second))
        theirs.eval()
    fill(theirs, "first", 1)
    fill(theirs, "second", 2)
    with quietly():
        theirs.base_model.set_adapter(["first", "second"])
        theirs.save_pretrained(tmp_path)
    for name in ("first", "second"):
        complete(tmp_path / name, theirs, name)
    ours = active(weights, tmp_path)
    called(theirs, ours, sorted({*first["target_modules"], *second["target_modules"]}))
    if method != "LILY":
        compare(ours.merge(), merged(theirs, weights))


def active(weights: dict[str, Any], folder: Path) -> PeftModel:
    """Make our model of all the adapters in a folder, in the order of their names."""
    ours = PeftModel(weights)
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    for name in names:
        ours.add(name, Adapter.load(folder / name))
    ours.activate(names)
    return ours


def called(theirs: Any, ours: PeftModel, names: list[str]) -> None:
    """Compare the outputs of linear layers."""
    rng, layers = np.random.default_rng(0), ours.bind().layers
    for name in names:
        x = rng.standard_normal((3, ours.sites()[name].n_in)).astype("float32")
        with torch.no_grad(), quietly():
            y = host(theirs.base_model.model.get_submodule(name)(torch.tensor(x)))
        compare({name: layers[name](x)}, {name: y})


KINDS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "ADALORA": {"init_r": 4, "total_step": 1},
}
"""The methods of its mixed models."""
Stack = tuple[tuple[str, list[str]], ...]
MIXES: list[Stack] = [
    *(((a, t), (b, t)) for t in (FIRST, SECOND) for a, b in itertools.combinations(KINDS, 2)),
    *(((a, t), (b, u)) for t, u in ((FIRST, SECOND), (SECOND, FIRST))
      for a, b in itertools.combinations(KINDS, 2)),
    *(((a, t), (a, t)) for t in (FIRST, SECOND) for a in KINDS),
    (("LORA", FIRST + SECOND), ("LOHA", FIRST), ("ADALORA", SECOND), ("LOKR", FIRST + SECOND)),
]  # fmt: skip
DECODER: Stack = tuple((method, ["q_proj", "v_proj"]) for method in KINDS)


def mix_label(stack: Stack) -> str:
    return "-".join(f"{method.lower()}:{'+'.join(targets)}" for method, targets in stack)


@pytest.mark.parametrize("stack", [*MIXES, DECODER], ids=mix_label)
def test_adapters_of_several_methods_are_hfs_mixed_model(stack: Stack, tmp_path: Path) -> None:
    def base() -> Any:
        return base_of("llama") if stack is DECODER else base_net("mlp")

    names = [f"a{i}" for i in range(len(stack))]
    for seed, (name, (method, targets)) in enumerate(zip(names, stack, strict=True)):
        with quietly():
            config = their_config(method, {**KINDS[method], "target_modules": targets})
            one = peft.get_peft_model(base(), config, name)
        fill(one, name, seed)
        with quietly():
            one.save_pretrained(tmp_path)
    plain = base()
    weights = saved_once(plain)
    with quietly():
        theirs = peft.PeftMixedModel.from_pretrained(plain, tmp_path / names[0], names[0])
        for name in names[1:]:
            theirs.load_adapter(tmp_path / name, name)
        theirs.set_adapter(names)
        theirs.eval()
    ours = active(weights, tmp_path)
    called(theirs, ours, sorted(s for a in names for s in ours[a].sites))
    compare(ours.merge(), merged(theirs, weights))


def test_every_case_of_hfs_tables_is_here_or_an_exception() -> None:
    merges = len(PAIRS) - sum(pair[0] == "LILY" for pair in PAIRS)
    aside = parity.left(parity.ACTIVE)
    assert merges + aside == parity.TOTALS[parity.ACTIVE]
    assert len(MIXES) + 1 == parity.TOTALS[parity.MIXED]
    print(f"\n{merges} pairs of one method and {len(MIXES) + 1} mixtures compared, {aside} not")

"""Methods that are applied and never merged, live: each reads what the other writes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft_any import Adapter, PeftModel  # noqa: E402
from peft_any.methods.lily import LilyConfig  # noqa: E402
from tests.cases import ROUTED, RoutedCase  # noqa: E402
from tests.hf import reference  # noqa: E402
from tests.hf.test_live import ROUNDING, compare  # noqa: E402

rows = pytest.mark.parametrize("case", ROUTED, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@rows
@dtypes
def test_what_hf_writes_we_read(case: RoutedCase, dtype: str, tmp_path: Path) -> None:
    result = reference.run(case, tmp_path, dtype, seed=5)
    model = PeftModel(result.base)
    model.add("a", Adapter.load(result.folder))
    y = model.routed(**case.routing).bind().layers[case.site.name](result.x)
    compare({"y": y}, {"y": result.y}, ROUNDING[dtype])


@rows
@dtypes
@pytest.mark.parametrize("name", ["default", "other"])
def test_what_we_write_hf_reads_without_a_warning(
    case: RoutedCase, dtype: str, name: str, tmp_path: Path, recwarn: Any
) -> None:
    base = case.base(5, dtype=dtype)
    plain = reference.model_of(base)
    model = PeftModel(reference.state_of(plain))
    config = replace(case.config, target_modules=[case.site.name])
    own = case.params(base, 5, dtype)
    model.add("a", Adapter(config, {case.site.name: own}))
    model["a"].save(tmp_path / "a")
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name=name)
    assert not recwarn.list
    x = reference.inputs(case, dtype)
    leaf = theirs.base_model.model.get_submodule(case.site.name)
    with torch.no_grad():
        want = reference.host(leaf(torch.tensor(x), **reference.routing_of(case)))
    y = model.routed(**case.routing).bind().layers[case.site.name](x)
    compare({"y": y}, {"y": want}, ROUNDING[dtype])


def test_lily_shares_as_hf_does(tmp_path: Path) -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(4, 5), "v": nn.Linear(4, 5), "o": nn.Linear(5, 4)})

    model = nn.ModuleDict({"h": nn.ModuleList([block() for _ in range(11)])})
    base = reference.state_of(model)
    fields: dict[str, Any] = {"r": 2, "stride_A": 4, "init_weights": False}
    config = peft.LilyConfig(**fields, target_modules=["q", "o"])
    with reference.quietly():
        theirs = peft.get_peft_model(model, config)
        theirs.save_pretrained(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.num_parameters == theirs.get_nb_trainable_parameters()[0]
    ties = adapter.config.ties(adapter.sites)
    for one, other in itertools.permutations(adapter.sites, 2):
        for key, value in adapter.sites[one].items():
            if value.shape != adapter.sites[other][key].shape:
                continue
            same = np.array_equal(value, adapter.sites[other][key])
            assert same == (ties.get((one, key), one) == ties.get((other, key), other))
    ours = PeftModel(base)
    made = ours.add("a", LilyConfig(**fields, target_modules=["q", "o"]))
    assert made.num_parameters == adapter.num_parameters
    assert made.config.ties(made.sites) == ties

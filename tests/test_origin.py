"""An adapter knows the base it was made on, and is not merged into another one unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import combine, extract, merge_checkpoint
from peft_any.adapter import Adapter
from peft_any.backend import astype
from peft_any.errors import TargetError
from peft_any.io.safetensors import read_metadata, read_safetensors, write_safetensors
from peft_any.layer import Site
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.model import PeftModel
from peft_any.origin import KEY, layers_fingerprint, made_on, other_base, sampled

MODULES = ["a.q_proj", "a.v_proj", "b.q_proj"]


def weights(seed: int = 0, dtype: str = "float32", rows: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {f"{m}.weight": rng.standard_normal((rows, 4)).astype("float32") for m in MODULES}
    return {name: astype(array, dtype) for name, array in made.items()}


def make(folder: Path, base: dict[str, Any], **options: Any) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    PeftModel(base).add("x", config, seed=1).save(folder / "adapter")
    return folder / "adapter"


def stored(folder: Path, base: dict[str, np.ndarray]) -> Path:
    write_safetensors(folder / "base.safetensors", base, overwrite=True)
    return folder / "base.safetensors"


class TestMerge:
    def test_its_own_base(self, tmp_path: Path) -> None:
        adapter = make(tmp_path, weights())
        made = merge_checkpoint(stored(tmp_path, weights()), adapter, tmp_path / "out")
        assert made.warnings == ()

    def test_another_base(self, tmp_path: Path) -> None:
        adapter = make(tmp_path, weights())
        base = stored(tmp_path, weights(seed=7))
        known = json.loads(read_metadata(adapter / "adapter_model.safetensors")[KEY])["fingerprint"]
        with pytest.raises(TargetError, match="made on another base") as caught:
            merge_checkpoint(base, adapter, tmp_path / "out")
        assert known in str(caught.value)
        assert str(caught.value).count("sampled-sha256:") == 2
        assert "--any-base" in str(caught.value)
        assert not (tmp_path / "out").exists()
        made = merge_checkpoint(base, adapter, tmp_path / "out", any_base=True)
        assert any(known in line for line in made.warnings)

    @pytest.mark.parametrize("there", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("here", ["float16", "bfloat16", "float32"])
    def test_the_same_base_in_another_dtype(self, tmp_path: Path, here: str, there: str) -> None:
        base = weights(dtype=here)
        adapter = make(tmp_path, {name: astype(a, there) for name, a in base.items()})
        made = merge_checkpoint(stored(tmp_path, base), adapter, dry_run=True)
        assert made.warnings == ()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_the_same_base_rounded_afterwards(self, tmp_path: Path, dtype: str) -> None:
        base = weights()
        adapter = make(tmp_path, base)
        rounded = stored(tmp_path, {name: astype(a, dtype) for name, a in base.items()})
        assert merge_checkpoint(rounded, adapter, dry_run=True).warnings == ()

    def test_other_layers_may_differ(self, tmp_path: Path) -> None:
        base = weights()
        adapter = make(tmp_path, base)
        base["a.v_proj.weight"] = base["a.v_proj.weight"] + 1
        assert merge_checkpoint(stored(tmp_path, base), adapter, dry_run=True).warnings == ()
        base["b.q_proj.weight"] = base["b.q_proj.weight"] + 1
        with pytest.raises(TargetError, match="another base"):
            merge_checkpoint(stored(tmp_path, base), adapter, dry_run=True)

    @pytest.mark.parametrize(
        "value",
        ["", "{", "[]", "{}", '{"layers": 2}', '{"layers": 9, "fingerprint": "x"}', "[" * 9999],
    )
    def test_metadata_that_say_nothing(self, tmp_path: Path, value: str) -> None:
        adapter = make(tmp_path, weights())
        file = adapter / "adapter_model.safetensors"
        write_safetensors(file, read_safetensors(file), {KEY: value}, overwrite=True)
        base = stored(tmp_path, weights(seed=7))
        assert merge_checkpoint(base, adapter, dry_run=True).warnings == ()


class TestStamp:
    def test_it_stays_with_the_adapter(self, tmp_path: Path) -> None:
        base = weights()
        model = PeftModel(base)
        first = model.add("x", LoraConfig(r=2, target_modules=["q_proj"]))
        assert first.metadata["format"] == "pt"
        first.save(tmp_path / "a")
        again = Adapter.load(tmp_path / "a")
        again.save(tmp_path / "b")
        assert read_metadata(tmp_path / "b" / "adapter_model.safetensors") == first.metadata
        assert PeftModel(weights(seed=7)).add("y", again).metadata == first.metadata

    def test_an_extracted_adapter_knows_its_base(self, tmp_path: Path) -> None:
        base, tuned = weights(), weights(seed=7)
        write_safetensors(tmp_path / "tuned.safetensors", tuned)
        given = stored(tmp_path, base), tmp_path / "tuned.safetensors", tmp_path / "a"
        found = extract(*given, rank=1)
        assert read_metadata(tmp_path / "a" / "adapter_model.safetensors") == found.adapter.metadata
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", dry_run=True)
        with pytest.raises(TargetError, match="made on another base"):
            merge_checkpoint(tmp_path / "tuned.safetensors", tmp_path / "a", dry_run=True)

    def test_combined_adapters_know_theirs(self, tmp_path: Path) -> None:
        one = make(tmp_path, weights())
        made, _ = combine([one, (one, 0.5)], tmp_path / "sum")
        assert KEY in made.metadata
        merge_checkpoint(stored(tmp_path, weights()), tmp_path / "sum", dry_run=True)
        with pytest.raises(TargetError, match="made on another base"):
            merge_checkpoint(stored(tmp_path, weights(seed=7)), tmp_path / "sum", dry_run=True)

    def test_an_adapter_without_layers_has_none(self) -> None:
        assert made_on(weights(), []) == {}

    def test_libraries_agree(self, lib: Any) -> None:
        base = {**weights(), "big.q_proj.weight": np.arange(20_000.0).reshape(100, 200)}
        sites = [Site(n.removesuffix(".weight"), a.shape[1], a.shape[0]) for n, a in base.items()]
        made = made_on(lib.array(base), sites)
        if lib.name == "dask" or not lib.has_values:
            assert made == {}
        else:
            assert made == made_on(base, sites)
            assert other_base(made, sites, lambda name: sampled(base[name])) is None

    def test_nothing_is_kept_of_a_trace(self) -> None:
        jax = pytest.importorskip("jax")

        def traced(x: Any) -> Any:
            model = PeftModel({"fc.weight": x})
            config = IA3Config(target_modules=["fc"], feedforward_modules=[])
            assert KEY not in model.add("x", config).metadata
            return x

        jax.jit(traced)(np.ones((3, 2), "float32"))


class TestFingerprint:
    def test_any_sampled_change_is_seen(self) -> None:
        a = np.zeros(100_000, "float32")
        before = layers_fingerprint([a])
        for i in (0, 1023, 99_999, 98_976):
            b = a.copy()
            b[i] = 1
            assert layers_fingerprint([b]) != before
        assert layers_fingerprint([a.reshape(100, 1000)]) != before
        assert layers_fingerprint([a.astype("float64")]) != before

    def test_values_that_overflow_another_dtype(self) -> None:
        a = np.full((2, 2), 1e30, "float32")
        assert layers_fingerprint([a], "float16") != layers_fingerprint([a])

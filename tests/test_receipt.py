"""The receipt's numbers, the audit of anybody's merge, and what inspecting finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import peft_any
from peft_any import Adapter, PeftModel, inspect_adapter, verify_checkpoint, write_safetensors
from peft_any.errors import ShapeError, TargetError, VerifyError
from peft_any.method import Additive
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.receipt import Change, Receipt, peak_memory, plain, too_little, versions
from peft_any.surgery.measure import Moments, all_finite, equal_bytes, measure
from tests.cases import CASES
from tests.models import BF16, adapter, llama, random_adapter, sharded, single

QV = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
arrays = hnp.arrays(np.float64, st.tuples(st.integers(0, 7), st.integers(1, 9)),
                    elements=st.floats(-8, 8, width=32))  # fmt: skip


class TestMeasure:
    @given(arrays, st.sampled_from([BF16, np.dtype("f2"), np.dtype("f4")]), st.integers(0, 99))
    def test_the_numbers_are_their_definitions(
        self, host: np.ndarray, dtype: np.dtype, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        w = host.astype(dtype)
        delta = rng.standard_normal(host.shape) * 0.01
        exact = w.astype("f8") + delta
        after = exact.astype(dtype)
        got = measure(w, after, delta=delta)
        moved = after.astype("f8") - w.astype("f8")
        assert got.size == host.size
        assert got.same == int(np.sum(moved == 0))
        assert got.base2 == pytest.approx(float(np.sum(w.astype("f8") ** 2)))
        assert got.delta2 == pytest.approx(float(np.sum(delta**2)))
        assert got.dot == pytest.approx(float(np.sum(moved * delta)), abs=1e-12)
        assert got.miss2 == pytest.approx(float(np.sum((moved - delta) ** 2)), abs=1e-12)
        other = measure(w, after, exact=exact)
        assert other.delta2 == pytest.approx(got.delta2, rel=1e-6, abs=1e-12)

    def test_blocks_give_the_same_as_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(0)
        w = rng.standard_normal((50, 7)).astype("f4")
        delta = rng.standard_normal((7, 50)).T
        after = (w + delta).astype("f4")
        whole = measure(w, after, delta=delta)
        monkeypatch.setattr("peft_any.surgery.measure._BLOCK", 16)
        assert vars(measure(w, after, delta=delta)) == pytest.approx(vars(whole))

    def test_rows_that_come_and_go(self) -> None:
        small, large = np.ones((2, 3)), np.full((4, 3), 2.0)
        assert measure(small, large, exact=large).delta2 == 6 + 6 * 4
        assert measure(large, small, exact=small).delta2 == 6
        assert measure(large, small, exact=small).kept == 1

    def test_scalars_and_nothing(self) -> None:
        one = np.asarray(3.0)
        assert measure(one, one, exact=one).unchanged == 1
        nothing = measure(np.ones((0, 2)), np.ones((0, 2)), delta=np.ones((0, 2)))
        assert (nothing.kept, nothing.error, nothing.unchanged) == (None, None, 1.0)
        assert (Moments() + Moments(size=2)).size == 2

    @pytest.mark.parametrize("shape", [(3,), (2, 2), (3, 1)])
    def test_shapes_must_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match="compared"):
            measure(np.ones((3, 2)), np.ones((3, 2)), delta=np.ones(shape))
        with pytest.raises(ShapeError, match="compared"):
            measure(np.ones((3, 2)), np.ones((3, 2)))

    def test_finite_and_equal(self) -> None:
        assert all_finite(np.ones((2, 3), BF16))
        assert not all_finite(np.asarray(np.inf))
        assert not equal_bytes(np.zeros(2), np.zeros(2, "f4"))
        assert not equal_bytes(np.zeros(2), np.zeros(3))
        assert equal_bytes(np.full(3, np.nan), np.full(3, np.nan))


def change(kept: float | None = 1.0, **other: Any) -> Change:
    fields: dict[str, Any] = {
        "tensor": "fc.weight", "by": ("LORA",), "dtype": "bfloat16", "shape": (2, 2),
        "base_dtype": "bfloat16", "base_shape": (2, 2), "base_norm": 2.0, "delta_norm": 1.0,
        "kept": kept, "error": 0.1, "unchanged": 0.5,
    }  # fmt: skip
    return Change(**(fields | other))


class TestReceipt:
    def receipt(self, *changes: Change, **other: Any) -> Receipt:
        return Receipt("merge", {}, (), (), (), changes, 0, **other)

    def test_totals_weigh_by_size(self) -> None:
        made = self.receipt(
            change(0.5, delta_norm=3.0),
            change(1.0, tensor="b", shape=(2, 6), unchanged=0.0),
            change(None, delta_norm=0.0, unchanged=1.0),
        )
        assert made.kept == pytest.approx(0.55)
        assert made.unchanged == pytest.approx((2 + 0 + 4) / 20)
        assert made.worst is not None
        assert made.worst.kept == 0.5
        assert change(base_norm=0.0).relative is None

    def test_nothing_touched(self) -> None:
        made = self.receipt()
        assert (made.kept, made.worst, made.unchanged) == (None, None, None)
        made.check(1.0)

    def test_the_worst_are_listed_first_and_a_few(self) -> None:
        changes = [change(0.1 * i, tensor=f"t{i}") for i in range(9)]
        lines = too_little(tuple(changes), 0.65)
        assert lines[0].startswith("t0: kept 0.0000")
        assert len(lines) == 6
        assert lines[-1] == "and 2 more tensors"
        assert too_little(tuple(changes), None) == []

    def test_problems_are_errors_with_the_receipt(self) -> None:
        made = self.receipt(change(0.5), problems=("a: is extra",))
        with pytest.raises(VerifyError, match=r"(?s)a: is extra.*fc.weight") as error:
            made.check(0.9)
        assert error.value.receipt is made
        assert made.to_dict()["ok"] is False

    def test_json_is_strict(self) -> None:
        assert plain({1: {2, 3}, "x": (float("inf"), Path("a"))}) == {
            "1": ["2", "3"], "x": [None, "a"]
        }  # fmt: skip
        document = json.loads(self.receipt(change()).to_json())
        assert document["schema_version"] == 2
        assert document["changes"][0]["relative"] == 0.5

    def test_versions_and_memory(self) -> None:
        assert versions()["peft_any"] == peft_any.__version__
        assert (peak_memory() or 1e7) > 1e6


Alter = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None]
NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def put(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Alter:
    return lambda w: {**w, name: value(w[name])}


def aside(delta: np.ndarray) -> np.ndarray:
    """Draw something as large as a change and orthogonal to it."""
    other = np.random.default_rng(0).standard_normal(delta.shape)
    other -= delta * np.vdot(other, delta) / np.vdot(delta, delta)
    return (other * np.linalg.norm(delta) / np.linalg.norm(other)).astype("f4")


def bumped(w: Any) -> Any:
    out = w.copy()
    out[2, 3] += 0.01
    return out


class TestVerify:
    """The audit of a merge that somebody made."""

    def audit(self, tmp_path: Path, alter: Alter, dtype: Any = "float32", **options: Any) -> Any:
        weights = llama(dtype)
        base = sharded(tmp_path / "base", weights)
        made = random_adapter(weights, QV)
        merged = peft_any.merge(weights, made)
        write_safetensors(tmp_path / "m.safetensors", alter(merged) or merged)
        return verify_checkpoint(base, made, tmp_path / "m.safetensors", check=False, **options)

    def test_a_good_one(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int, str]] = []
        receipt = self.audit(tmp_path, dict, progress=lambda *a: calls.append(a))
        assert receipt.problems == ()
        assert receipt.kept == pytest.approx(1, abs=1e-5)
        assert receipt.copied == len(llama()) - 4
        assert calls[-1][0] == calls[-1][1]

    @pytest.mark.parametrize(
        ("alter", "words"),
        [
            (put(NORM, lambda w: w * 1.01), "norm.weight: is changed, and no adapter"),
            (put(NORM, lambda w: w.astype("f2")), "float32 → float16"),
            (put(NORM, lambda w: w[:4]), "norm.weight: has shape"),
            (put(NORM, lambda w: (w * 0).astype("i4")), "float32 → int32"),
            (put(Q, lambda w: w[:4]), "should have"),
            (put(Q, lambda w: w * np.nan), "NaN"),
            (put(Q, lambda w: llama("float32")[Q]), "kept 0.0000"),
            (put(Q, lambda w: 3 * w - 2 * llama("float32")[Q]), "3.000 times"),
            (put(Q, lambda w: w + aside(w - llama("float32")[Q])), "something else"),
            (put(Q, bumped), "the element at [2, 3] is off by 0.01"),
            (lambda w: {k: v for k, v in w.items() if k != NORM}, "is missing"),
            (lambda w: {**w, "new.weight": w[NORM]}, "new.weight: is extra"),
        ],
    )
    def test_bad_ones(self, alter: Alter, words: str, tmp_path: Path) -> None:
        receipt = self.audit(tmp_path, alter)
        assert any(words in problem for problem in receipt.problems)
        assert len(receipt.problems) == 1

    @pytest.mark.parametrize("coarse", [np.float32, np.float16, BF16])
    @pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
    def test_merges_of_others_are_no_tampering(
        self, coarse: Any, stored: Any, tmp_path: Path
    ) -> None:
        """As other libraries make them: Δ rounded first, then the sum, weights of all sizes."""
        rng = np.random.default_rng(0)
        weights = {Q: rng.standard_normal((64, 64)) * np.exp(3 * rng.standard_normal((64, 64)))}
        weights = {Q: weights[Q].astype("f4").astype(coarse)}
        base = single(tmp_path / "base", weights)
        made = random_adapter(weights, LoraConfig(r=16, target_modules=["q_proj"]))
        p = made.sites[Q.removesuffix(".weight")]
        change = (p["lora_B.weight"] @ p["lora_A.weight"] / 2).astype(coarse)
        both = (weights[Q].astype("f4") + change.astype("f4")).astype(coarse)
        write_safetensors(tmp_path / "m.safetensors", {Q: both.astype(stored)})
        merged = tmp_path / "m.safetensors"
        found = verify_checkpoint(base, made, merged, check=False, min_kept=0.5)
        assert found.problems == ()

    def test_wider_copies_with_the_same_values_are_warned_of(self, tmp_path: Path) -> None:
        receipt = self.audit(
            tmp_path, lambda w: {k: v.astype("f4") for k, v in w.items()}, dtype=BF16
        )
        assert receipt.problems == ()
        assert sum("with the same values" in w for w in receipt.warnings) == receipt.copied
        assert sum("in the base bfloat16" in w for w in receipt.warnings) == 4

    def test_a_change_where_there_should_be_none(self, tmp_path: Path) -> None:
        weights = llama("float32")
        base = single(tmp_path / "b", weights)
        fresh = PeftModel(weights).add("a", QV)
        other = single(tmp_path / "m", {**weights, Q: weights[Q] + 1})
        with pytest.raises(VerifyError, match="change is zero"):
            verify_checkpoint(base, fresh, other)

    def test_the_margin_is_an_option(self, tmp_path: Path) -> None:
        half = put(Q, lambda w: (w + llama("float32")[Q]) / 2)
        assert self.audit(tmp_path / "1", half).problems
        assert not self.audit(tmp_path / "2", half, min_kept=0.4).problems

    def test_tied_tensors_may_be_stored_twice(self, tmp_path: Path) -> None:
        weights = llama(head=False)
        base = single(tmp_path / "b", weights, tie_word_embeddings=True)
        tuned = adapter(tmp_path / "a", weights, QV)
        merged = peft_any.merge(weights, Adapter.load(tuned))
        twice = {**merged, "lm_head.weight": merged["model.embed_tokens.weight"]}
        other = single(tmp_path / "m", twice, tie_word_embeddings=True)
        receipt = verify_checkpoint(base, tuned, other)
        assert any("lm_head.weight: is stored although" in w for w in receipt.warnings)
        head_only = {k: v for k, v in twice.items() if "embed_tokens" not in k}
        shutil.rmtree(other)
        single(other, head_only, tie_word_embeddings=True)
        found = verify_checkpoint(base, tuned, other, check=False)
        assert not any("missing" in problem for problem in found.problems)


class TestInspect:
    def test_without_a_base(self, tmp_path: Path) -> None:
        weights = llama("float32")
        path = adapter(tmp_path / "a", weights, QV)
        found = inspect_adapter(path)
        loaded = Adapter.load(path)
        assert (found.peft_type, found.parameters) == ("LORA", loaded.num_parameters)
        assert found.ranks == {2: 4}
        merged = peft_any.merge(weights, loaded)
        for site in found.sites:
            name = f"{site.name}.weight"
            norm = float(np.linalg.norm(merged[name] - weights[name]))
            assert site.delta_norm == pytest.approx(norm, rel=1e-4)
        assert json.loads(found.to_json()) == found.to_dict()
        assert found.to_dict()["config"]["target_modules"] == ["q_proj", "v_proj"]

    def test_ranks_of_patterns(self, tmp_path: Path) -> None:
        config = LoraConfig(r=2, rank_pattern={"v_proj": 1}, target_modules=["q_proj", "v_proj"])
        assert inspect_adapter(random_adapter(llama(), config)).ranks == {1: 2, 2: 2}

    def test_with_a_base_it_predicts_the_merge(self, tmp_path: Path) -> None:
        base = sharded(tmp_path / "b", llama())
        path = adapter(tmp_path / "a", llama(), QV, scale=0.01)
        calls: list[Any] = []
        found = inspect_adapter(path, base, progress=lambda *a: calls.append(a))
        receipt = peft_any.merge_checkpoint(base, path, tmp_path / "out")
        assert {c.tensor: c for c in found.changes} == {c.tensor: c for c in receipt.changes}
        assert found.to_dict()["changes"][0]["relative"] == found.changes[0].relative
        assert calls[-1][0] == calls[-1][1] == 4
        with pytest.raises(TargetError):
            inspect_adapter(path, single(tmp_path / "c", {"x.weight": np.ones((2, 2), "f4")}))

    def test_prompts(self, tmp_path: Path) -> None:
        config = PromptTuningConfig(num_virtual_tokens=2, token_dim=8, num_layers=1)
        made = PeftModel(llama()).add("p", config)
        found = inspect_adapter(made, sharded(tmp_path / "b", llama()))
        assert found.sites == ()
        assert found.changes == ()
        assert found.shared == {"prompt_embeddings": (2, 8)}

    def test_full_copies_and_rows(self, tmp_path: Path) -> None:
        weights = llama("float32")
        config = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"],
            trainable_token_indices={"embed_tokens": [3]},
        )  # fmt: skip
        made = random_adapter(weights, config).replace(
            extra={"lm_head.weight": weights["lm_head.weight"] * 2},
            tokens={"model.embed_tokens": np.ones((1, 8), "float32")},
        )
        found = inspect_adapter(made, single(tmp_path / "b", weights))
        assert found.copies == {"lm_head.weight": (11, 8)}
        assert found.rows == {"model.embed_tokens": (1, 8)}
        how = {c.tensor: c.by for c in found.changes}
        assert how["lm_head.weight"] == ("copy",)
        assert how["model.embed_tokens.weight"] == ("rows",)

    def test_methods_whose_change_needs_the_base(self) -> None:
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        found = inspect_adapter(random_adapter(llama(), config))
        assert found.ranks == {}
        assert found.sites[0].delta_norm is None
        loha = inspect_adapter(random_adapter(llama(), LoHaConfig(r=2, target_modules=["q_proj"])))
        assert loha.sites[0].delta_norm is not None

    @pytest.mark.parametrize(
        "case",
        [
            c
            for c in CASES
            if isinstance(c.config, Additive) and c.site.kind in ("Linear", "Conv2d")
        ],
        ids=lambda c: c.name,
    )
    def test_norms_found_without_a_base_are_right(self, case: Any) -> None:
        weights = {"fc.weight": np.ones(case.site.stored_shape, "float32")}
        kinds = {"fc": peft_any.Site("fc", case.site.n_in, case.site.n_out, case.site.kind,
                                     case.site.kernel, case.site.groups, bias=False)}  # fmt: skip
        config = case.config.__class__(**{**vars(case.config), "target_modules": ["fc"]})
        try:
            model = PeftModel(weights, kinds=kinds)
            made = model.add("a", config)
        except peft_any.PeftError as error:
            pytest.skip(f"the row does not stand alone: {error}")
        found = inspect_adapter(made).sites[0].delta_norm
        if found is not None:
            own = model.bind().layers["fc"].parts[0]
            delta = own.config.delta(own.params, kinds["fc"])
            assert found == pytest.approx(float(np.linalg.norm(delta)), rel=1e-5)

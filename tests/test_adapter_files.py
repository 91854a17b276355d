"""Law 6, files: what Hugging Face PEFT writes is read whole and written back byte for byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any.adapter import Adapter
from peft_any.backend import resolve
from peft_any.errors import (
    ConfigError,
    FormatError,
    PeftError,
    ShapeError,
    StorageError,
    TargetError,
    UsageError,
)
from peft_any.io.config import config_from_dict, config_from_json, config_to_dict, config_to_json
from peft_any.io.keys import Place, read_keys, write_key
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.layer import Dense, Site
from peft_any.method import Prompt, Tuner
from peft_any.methods.adamss import AdamssConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.model import PeftModel
from peft_any.prompt import Attended
from peft_any.registry import method_for, method_names

FILES = Path(__file__).parent / "golden" / "files"
NAMES = sorted(p.name for p in FILES.iterdir() if p.is_dir())
PARTS = ("adapter_config.json", "adapter_model.safetensors")
BASES = {"lora-gpt": "gpt", "lora-many": "deep", "prefix": "gpt", "prompt": "gpt"}
BASES |= {"prefix-projected": "gpt", "lora-classifier": "classifier"}
BASES |= {"prompt-classifier": "classifier"}
BASES |= dict.fromkeys(("cartridge", "cpt", "multitask", "p-tuning"), "gpt")
KINDS = {"out_proj": "Linear"}  # square, in a net of both orientations


def base_of(name: str) -> dict[str, Any]:
    shapes = json.loads((FILES / f"{BASES.get(name, 'net')}.json").read_text())
    return {k: SimpleNamespace(shape=tuple(v)) for k, v in shapes.items()}


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(v).astype("float32") for k, v in shapes.items()}


def arrays_of_lora(n_in: int, n_out: int, r: int) -> dict[str, dict[str, np.ndarray]]:
    """Draw a LoRA of one layer."""
    return {"fc": arrays({"lora_A.weight": (r, n_in), "lora_B.weight": (n_out, r)})}


@pytest.mark.parametrize("name", NAMES)
def test_loading_and_saving_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    Adapter.load(FILES / name).save(tmp_path / "a")
    for part in PARTS:
        assert (tmp_path / "a" / part).read_bytes() == (FILES / name / part).read_bytes()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("adaption-prompt", "xlora")])
def test_every_tensor_has_a_place_on_the_base(name: str) -> None:
    adapter = Adapter.load(FILES / name)
    base = base_of(name)
    sites = adapter.check(base, KINDS if BASES.get(name, "net") == "net" else None)
    assert adapter.notes == ()
    assert bool(adapter.spare) == (name in ("embeddings-saved", "lora-monteclora", "lora-velora"))
    assert list(sites) == list(adapter.sites)
    assert all(site.weight in base and site.name == n for n, site in sites.items())
    assert adapter.num_parameters == sum(sum(c.values()) for c in adapter.counts.values()) > 0
    adapter.check_finite()


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "strict", "dask"])
def test_saving_from_any_library_gives_the_same_bytes(library: str, tmp_path: Path) -> None:
    pytest.importorskip({"strict": "array_api_strict"}.get(library, library))
    Adapter.load(FILES / "lora-saved", backend=library).save(tmp_path / "a")
    for part in PARTS:
        assert (tmp_path / "a" / part).read_bytes() == (FILES / "lora-saved" / part).read_bytes()


def test_kinds_are_told_from_the_parameters() -> None:
    sites = Adapter.load(FILES / "lora-kinds").check(base_of("lora-kinds"))
    kinds = {name.removeprefix("layers.0."): site.kind for name, site in sites.items()}
    assert kinds | {"emb": "Embedding", "conv1": "Conv1d", "conv3": "Conv3d"} == kinds
    assert (kinds["attn.q"], kinds["c1d"], kinds["conv2"]) == ("Linear", "Conv1D", "Conv2d")
    sites = Adapter.load(FILES / "lora-attention").check(base_of("lora-attention"), KINDS)
    assert sites["layers.1.attn.mha"].kind == "MultiheadAttention"
    assert sites["layers.1.attn.mha.out_proj"].kind == "Linear"


def test_square_matrices_are_as_their_namesakes() -> None:
    sites = Adapter.load(FILES / "lora-gpt").check(base_of("lora-gpt"))
    assert {site.kind for site in sites.values()} == {"Conv1D"}
    assert sites["transformer.h.0.attn.c_proj"].stored_shape == (8, 8)


def test_a_square_matrix_among_both_orientations_asks_for_kinds() -> None:
    base = {"a.weight": np.zeros((4, 6)), "a.bias": np.zeros(6), "b.weight": np.zeros((6, 4))}
    base |= {"b.bias": np.zeros(6), "c.weight": np.zeros((4, 4)), "c.bias": np.zeros(4)}
    pair = {"lora_A.weight": np.zeros((1, 4)), "lora_B.weight": np.zeros((4, 1))}
    adapter = Adapter(LoraConfig(r=1, target_modules=["c"]), {"c": pair})
    with pytest.raises(TargetError, match=r"c: square matrices .* pass kinds="):
        adapter.check(base)


def test_copies_biases_and_tokens_are_sorted_by_base_names() -> None:
    assert set(Adapter.load(FILES / "lora-saved").extra) == {
        *(f"layers.{i}.norm.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")),
        "score.weight",
        "score.bias",
    }
    assert set(Adapter.load(FILES / "lora-bias-own").extra) == {
        f"layers.{i}.{m}.bias" for i in (0, 1) for m in ("attn.q", "c1d")
    }
    assert "layers.0.attn.mha.out_proj.bias" in Adapter.load(FILES / "lora-attention-bias").extra
    tokens = Adapter.load(FILES / "lora-tokens-named").tokens
    assert {k: v.shape for k, v in tokens.items()} == {"embed_tokens": (2, 8), "emb": (1, 8)}
    assert set(Adapter.load(FILES / "embeddings-tokens").extra) == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    assert set(Adapter.load(FILES / "vera").shared) == {"vera_A", "vera_B"}
    assert set(Adapter.load(FILES / "prompt-classifier").extra) == {"score.weight"}


def test_a_replacement_is_the_copy_or_the_rows_in_the_base_dtype() -> None:
    adapter = Adapter.load(FILES / "lora-tokens-named")
    table = np.zeros((16, 8), "float16")
    new = adapter.replacement("embed_tokens.weight", table)
    assert new.dtype == np.float16
    rows = adapter.tokens["embed_tokens"].astype("float16")
    np.testing.assert_array_equal(new[[0, 2]], rows)
    assert not new[1].any()
    assert not new[3:].any()
    assert not table.any()
    assert adapter.replacement("lm_head.weight", table) is None
    assert adapter.replaced(["emb.weight", "other"]) == ["emb.weight"]
    saved = Adapter.load(FILES / "lora-saved")
    with pytest.raises(ShapeError, match=r"score.weight: shape \(3, 8\) cannot replace"):
        saved.replacement("score.weight", np.zeros((4, 8)))


def test_shared_projections_left_out_of_the_file_are_drawn_again() -> None:
    adapter = Adapter.load(FILES / "vera-seeded")
    sites = adapter.check(base_of("vera-seeded"))
    assert not adapter.shared
    assert Adapter.load(FILES / "prompt").with_shared([], str).shared
    drawn = adapter.with_shared([*sites.values()], lambda _: "float32").shared
    assert {k: v.shape for k, v in drawn.items()} == {"vera_A": (4, 8), "vera_B": (12, 4)}
    other = Adapter.load(FILES / "vera")
    for key, value in other.shared.items():  # the same seed and largest sizes
        np.testing.assert_array_equal(drawn[key], value)


def write(folder: Path, tensors: dict[str, Any], config: Any = None, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    raw = {"peft_type": "LORA", "r": 2, "target_modules": ["fc"], **fields}
    text = json.dumps(raw) if config is None else config
    (folder / PARTS[0]).write_text(text)
    write_safetensors(folder / PARTS[1], tensors, {"format": "pt"}, overwrite=True)
    return folder


PAIR = {"lora_A.weight": (2, 4), "lora_B.weight": (3, 2)}
BASE = arrays({"fc.weight": (3, 4), "fc.bias": (3,), "head.weight": (5, 3)})


def under(prefix: str, infix: str = "") -> dict[str, np.ndarray]:
    """Name a pair of factors: after a prefix, with an adapter's name in the keys."""
    shapes = {prefix + k.replace(".weight", f"{infix}.weight"): v for k, v in PAIR.items()}
    return arrays(shapes)


@pytest.mark.parametrize(
    "prefix", ["base_model.model.fc.", "fc.", "_forward_module.model.base_model.model.fc."]
)
@pytest.mark.parametrize("infix", ["", ".default", ".my-task"])
def test_prefix_and_adapter_name_may_be_there_or_not(
    prefix: str, infix: str, tmp_path: Path
) -> None:
    adapter = Adapter.load(write(tmp_path / "in", under(prefix, infix)))
    assert {k: [*p] for k, p in adapter.sites.items()} == {"fc": [*PAIR]}
    adapter.check(BASE)
    adapter.save(tmp_path / "out")
    assert {*read_safetensors(tmp_path / "out" / PARTS[1])} == {*under("base_model.model.fc.")}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.base_model.model.fc.",
        "base_model.model._orig_mod.fc.",
        "_orig_mod.module.base_model.model._fsdp_wrapped_module.fc._checkpoint_wrapped_module.",
    ],
)
def test_names_of_wrapped_models_are_the_models_own(prefix: str, tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path / "in", under(prefix, ".default")))
    assert [*adapter.sites] == ["fc"]
    adapter.check(BASE)
    both = under(prefix) | under("base_model.model.fc.")
    refused(TargetError, "is the same as base_model.model.fc", write(tmp_path / "both", both))


def test_an_attentions_output_that_is_targeted_too_is_there_twice(tmp_path: Path) -> None:
    inner = "base_model.model.mha.base_layer.out_proj."
    tensors = under(inner) | under(inner.replace("base_layer.", ""))
    tensors["base_model.model.mha.out_proj.base_layer.bias"] = np.ones(3, "float32")
    adapter = Adapter.load(write(tmp_path / "a", tensors))
    assert ([*adapter.sites], len(adapter.spare)) == (["mha.out_proj"], 3)


def test_empty_tensors_say_where_they_come_from(tmp_path: Path) -> None:
    empty = {k: np.zeros(0, "float32") for k in under("base_model.model.fc.")}
    with pytest.raises(ShapeError, match=r"(?s)shape \(0,\) cannot fit.*DeepSpeed ZeRO-3 saves"):
        Adapter.load(write(tmp_path / "a", empty)).check(BASE)
    flat = {"U_low": (3, 0), "S_low": (0,), "V_low": (0, 4)}
    nothing = arrays({f"base_model.model.fc.osf_svd_params.{k}": s for k, s in flat.items()})
    osf = Adapter.load(write(tmp_path / "b", nothing, peft_type="OSF", effective_rank=3))
    with pytest.raises(ShapeError, match=r"effective_rank=3 keeps all 3 directions.*nothing$"):
        osf.check({"fc.weight": np.zeros((3, 4), "float32")})


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_dora_magnitudes_of_every_age_are_read(suffix: str, tmp_path: Path) -> None:
    tensors = under("base_model.model.fc.") | arrays(
        {f"base_model.model.fc.lora_magnitude_vector{suffix}": (3,)}
    )
    adapter = Adapter.load(write(tmp_path / "in", tensors, use_dora=True))
    assert [*adapter.sites["fc"]] == [*PAIR, "lora_magnitude_vector"]
    adapter.check(BASE)


@pytest.mark.parametrize("infix", ["", "modules_to_save.", "modules_to_save.default."])
def test_copies_of_every_age_are_read(infix: str, tmp_path: Path) -> None:
    tensors = under("fc.") | arrays({f"base_model.model.head.{infix}weight": (5, 3)})
    adapter = Adapter.load(write(tmp_path / "in", tensors, modules_to_save=["head"]))
    assert [*adapter.extra] == ["head.weight"]
    adapter.save(tmp_path / "out")
    assert "base_model.model.head.weight" in read_safetensors(tmp_path / "out" / PARTS[1])


def test_shared_arrays_may_carry_the_adapter_name() -> None:
    config = method_for("VERA")(r=2)
    keys = ["base_model.vera_A.default", "base_model.vera_B", "fc.vera_lambda_d.default"]
    places, unknown = read_keys(config, keys)
    assert not unknown
    assert [places[k] for k in keys] == [
        Place("shared", "", "vera_A"),
        Place("shared", "", "vera_B"),
        Place("site", "fc", "vera_lambda_d"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_writing_a_key_is_the_inverse_of_reading_it(name: str) -> None:
    config, _ = config_from_json(FILES / name / PARTS[0])
    keys = [*read_safetensors(FILES / name / PARTS[1])]
    places, unknown = read_keys(config, keys)
    assert not unknown
    sites = {p.module for p in places.values() if p.part == "site"}
    tokens = {p.module for p in places.values() if p.part == "tokens"}
    for key, place in places.items():
        assert place.part == "spare" or write_key(config, place, sites, tokens) == key


WORDS = "base_model model fc lora_A vera_lambda_d weight bias default base_layer modules_to_save"
WORDS += " token_adapter trainable_tokens_delta original_module vera_A head embed_tokens"
KEYS = st.lists(st.sampled_from([*WORDS.split(), ""]), min_size=1, max_size=6).map(".".join)


@given(st.sets(KEYS, max_size=5), st.sampled_from(["LORA", "VERA", "IA3", "PROMPT_TUNING"]))
def test_what_any_key_is_read_as_is_written_so(keys: set[str], method: str) -> None:
    more = {"trainable_token_indices": [0], "bias": "all"} if method == "LORA" else {}
    config = method_for(method)(modules_to_save=["head"], **more)
    places, unknown = read_keys(config, keys)
    assert len(places) + len(unknown) == len(keys)
    known = {place for place in places.values() if place.part != "spare"}
    sites = {p.module for p in known if p.part == "site"}
    tokens = {p.module for p in known if p.part == "tokens"}
    written = {write_key(config, place, sites, tokens) for place in known}
    again, unknown = read_keys(config, written)
    assert not unknown
    assert {*again.values()} == known


def test_a_users_own_method_has_the_same_files(tmp_path: Path) -> None:
    class ShiftConfig(Tuner, peft_type="TEST_SHIFT", prefix="shift_"):
        size: float = 1.0

        def shapes(self, site):
            return {"shift_net.0.weight": (site.n_out, 1), "shift_net.2.weight": (1,)}

        def init(self, site, new):
            return {k: new.zeros(s) for k, s in self.shapes(site).items()}

        def merge(self, p, base):
            return base.replace(weight=base.weight + self.size * p["shift_net.0.weight"])

    p = arrays({"shift_net.0.weight": (3, 1), "shift_net.2.weight": (1,)})
    Adapter(ShiftConfig(target_modules=["fc"], size=2.0), {"fc": p}).save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert isinstance(again.config, ShiftConfig)
    assert again.config.size == 2.0
    np.testing.assert_array_equal(again.sites["fc"]["shift_net.0.weight"], p["shift_net.0.weight"])
    assert [*again.check(BASE)] == ["fc"]


def test_a_fresh_adapter_is_written_in_full(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4.0, target_modules="all-linear", modules_to_save=["head"])
    sites = {"fc": arrays(PAIR)}
    Adapter(config, sites).with_copies(BASE, {}).save(tmp_path / "a")
    raw = json.loads((tmp_path / "a" / PARTS[0]).read_text())
    assert raw["target_modules"] == ["fc"]  # as HF does, which only knows the names then
    assert (raw["peft_type"], raw["lora_alpha"], raw["inference_mode"]) == ("LORA", 4, True)
    assert "e" not in raw["peft_version"]
    assert {f.name for f in dataclasses.fields(config)} <= raw.keys()
    assert "base_model.model.head.weight" in read_safetensors(tmp_path / "a" / PARTS[1])


def test_sets_of_targets_are_written_in_order() -> None:
    config = LoraConfig(target_modules={"v", "q"})  # type: ignore[arg-type] - as HF allows
    assert config_to_dict(config)["target_modules"] == ["q", "v"]


def test_changes_alone_are_written_over_the_file_that_was_read(tmp_path: Path) -> None:
    adapter = Adapter.load(FILES / "lora")
    changed = dataclasses.replace(adapter.config, lora_alpha=7, revision="main")
    adapter.replace(config=changed).save(tmp_path / "a")
    before, after = (
        json.loads((d / PARTS[0]).read_text()) for d in (FILES / "lora", tmp_path / "a")
    )
    assert {k for k in after if after[k] != before[k]} == {"lora_alpha", "revision"}


def test_unknown_fields_survive(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", under("fc."), from_the_future={"x": [1, None, 2.5]})
    Adapter.load(folder).save(tmp_path / "out")
    (note,) = Adapter.load(folder).notes
    assert "the unknown field from_the_future={'x': [1, None, 2.5]} is kept" in note
    raw = json.loads((tmp_path / "out" / PARTS[0]).read_text())
    assert raw["from_the_future"] == {"x": [1, None, 2.5]}
    assert config_from_json(folder / PARTS[0])[1] == {"from_the_future": {"x": [1, None, 2.5]}}


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("velora_config", ["lora_velora_embed"]),
        ("monteclora_config", [f"lora_monteclora_sampler.{k}" for k in ("std_prior", "weights")]),
    ],
)
def test_what_only_training_uses_is_carried_along(
    field: str, names: list[str], tmp_path: Path
) -> None:
    lora = Adapter(LoraConfig(r=2, target_modules=["fc"]), arrays_of_lora(4, 3, 2))
    lora.save(tmp_path / "plain")
    tensors = read_safetensors(tmp_path / "plain" / PARTS[1])
    more = {f"base_model.model.fc.{name}": np.ones(3, "float32") for name in names}
    config = json.loads((tmp_path / "plain" / PARTS[0]).read_text())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / PARTS[0]).write_text(
        json.dumps({**config, field: {"num_groups": 2}}, indent=2, sort_keys=True)
    )
    write_safetensors(tmp_path / "a" / PARTS[1], {**tensors, **more}, {"format": "pt"})
    found = Adapter.load(tmp_path / "a")
    assert found.spare.keys() == more.keys()
    for key, want in lora.sites["fc"].items():
        np.testing.assert_array_equal(found.sites["fc"][key], want)
    found.save(tmp_path / "b")
    for part in PARTS:
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()


def test_a_saved_pissa_is_a_plain_lora(tmp_path: Path) -> None:
    weight = arrays({"w": (6, 5)})["w"]
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["layer"])
    layer = config.layer(5, 6, weight=weight)
    Adapter(config, {"layer": layer.params}).save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert (again.config.r, again.config.init_lora_weights) == (4, True)
    again.check({"layer.weight": weight})


def test_module_names_can_be_changed() -> None:
    adapter = Adapter.load(FILES / "lora-gpt")
    bare = {k.removeprefix("transformer."): v for k, v in base_of("lora-gpt").items()}
    with pytest.raises(TargetError, match=r"without the prefix 'transformer\.'.*renamed"):
        adapter.check(bare)
    assert adapter.renamed(lambda n: n.removeprefix("transformer.")).check(bare)
    saved = Adapter.load(FILES / "lora-saved").renamed(lambda n: f"net.{n}")
    assert "net.score.weight" in saved.extra
    assert saved.check({f"net.{k}": v for k, v in base_of("lora-saved").items()})
    with pytest.raises(UsageError, match="same name"):
        adapter.renamed(lambda _: "x")


def test_an_adapter_moves_between_libraries() -> None:
    pytest.importorskip("array_api_strict")
    moved = Adapter.load(FILES / "lora-tokens").to("strict")
    for tree in (*moved.sites.values(), moved.tokens):
        assert {resolve("auto", a).name for a in tree.values()} == {"strict"}


# Bad input


def refused(error: type[PeftError], words: str, path: Path, **options: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        Adapter.load(path, **options)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "a JSON object is needed"),
        ('{"peft_type": "LORA", "r": 1, "r": 2}', "keys cannot repeat: .'r'."),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN cannot stand in JSON"),
        ('{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity cannot stand in JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_configuration_that_is_no_json_is_refused(text: str, words: str, tmp_path: Path) -> None:
    refused(FormatError, words, write(tmp_path / "a", under("fc."), text))


@pytest.mark.parametrize("field", ["use_dora", "fan_in_fan_out", "lora_bias"])
def test_null_for_a_flag_is_false(field: str) -> None:
    config, _ = config_from_dict({"peft_type": "LORA", field: None})
    assert getattr(config, field) is False


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": None}, "peft_type is missing.*LORA"),
        ({"peft_type": 3}, "peft_type is 3, not a name"),
        ({"peft_type": "LORRA"}, "'LORRA' cannot be used: no such method .nearest: 'LORA'"),
        ({"peft_type": "lora"}, "'lora' cannot be used: no such method .nearest: 'LORA'"),
        ({"r": "8"}, r"Expected `int`, got `str` - at `\$.r`"),
        ({"r": 2.5}, r"Expected `int`, got `float` - at `\$.r`"),
        ({"r": True}, r"Expected `int`, got `bool` - at `\$.r`"),
        ({"r": None}, r"Expected `int`, got `null` - at `\$.r`"),
        ({"r": 0}, "r=0 cannot be a rank"),
        ({"lora_alpha": 1e999}, "Infinity cannot stand in JSON"),
        ({"rank_pattern": {"q": "a"}}, r"Expected `int`, got `str` - at `\$.rank_pattern"),
        ({"target_modules": [1]}, r"Expected `str`, got `int` - at `\$.target_modules\[0\]`"),
        (
            {"use_qalora": True, "qalora_group_size": 4},
            "use_qalora=.* cannot be used: QALoRA needs .*: run it there",
        ),
        ({"alora_invocation_tokens": [-1]}, r"alora_invocation_tokens=\[-1\] cannot be found"),
        (
            {"arrow_config": {"top_k": "1"}},
            r"Expected `int`, got `str` - at `\$.arrow_config.top_k`",
        ),
        (
            {"alora_invocation_tokens": [1], "use_dora": True},
            "alora_invocation_tokens cannot go with use_dora",
        ),
        (
            {"alora_invocation_tokens": [1], "init_lora_weights": "olora"},
            "alora_invocation_tokens cannot go with init_lora_weights",
        ),
        ({"init_lora_weights": "corda"}, "'corda' cannot be loaded: .*covariances"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' cannot be loaded: .*gradients"),
        ({"init_lora_weights": "loftq"}, "'loftq' cannot be loaded: .*quantised.*say true"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' cannot be loaded: .*random"),
        ({"init_lora_weights": "nonsense"}, "init_lora_weights='nonsense' is not known"),
    ],
)
def test_a_configuration_with_wrong_values_is_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    error = FormatError if "JSON" in words else ConfigError
    refused(error, words, write(tmp_path / "a", under("fc."), **fields))


@pytest.mark.parametrize("init", ["eva", "mica", "gaussian", "orthogonal", "pissa", "olora", False])
def test_inits_that_leave_a_plain_lora_are_loaded(init: Any, tmp_path: Path) -> None:
    Adapter.load(write(tmp_path / "a", under("fc."), init_lora_weights=init)).check(BASE)


def test_fields_that_are_refused_may_stand_there_unset(tmp_path: Path) -> None:
    Adapter.load(write(tmp_path / "a", under("fc."), use_bdlora=None, layer_replication=[]))
    config, _ = config_from_dict({"peft_type": "LORA", "rank_pattern": None})
    assert config.rank_pattern == {}


def test_all_refused_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)target_parameters=.*AdaLoRA.*use_dora=True"):
        config_from_dict({"peft_type": "ADALORA", "use_dora": True, "target_parameters": ["w"]})


def test_not_a_number_is_refused_in_a_dict_too() -> None:
    raw = {"peft_type": "LORA", "alpha_pattern": {"q": float("nan")}}
    with pytest.raises(ConfigError, match=r"finite number, got nan - at `\$.alpha_pattern.q`"):
        config_from_dict(raw)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        config_to_json(LoraConfig(alpha_pattern={"q": float("inf")}))


def test_a_missing_configuration_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc."))
    (folder / PARTS[0]).unlink()
    refused(ConfigError, "has no adapter_config.json", folder)
    assert Adapter.load(folder, config=LoraConfig(r=2)).sites.keys() == {"fc"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "it holds a model; give an adapter"),
        ("adapters.safetensors", "as mlx-lm saves it"),
        ("pytorch_lora_weights.safetensors", "as diffusers saves it"),
    ],
)
def test_what_is_no_adapter_of_pefts_is_told(name: str, words: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / name, {"a.lora_down.weight": np.ones((2, 3), "float32")})
    refused(PeftError, words, tmp_path)
    refused(ConfigError, "a LoRA of kohya's tools", tmp_path / name)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(ConfigError, "GGUF file", tmp_path / "model.gguf")


def test_mlx_has_a_configuration_of_the_same_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc."), fine_tune_type="lora")
    (folder / PARTS[1]).rename(folder / "adapters.safetensors")
    refused(FormatError, "as mlx-lm saves it", folder)


def test_a_snapshot_of_the_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    write(tmp_path / "snapshots" / "abc", under("fc."))
    refused(ConfigError, r"\['snapshots/abc'\]", tmp_path)


def test_adapters_in_sub_directories_are_named(tmp_path: Path) -> None:
    write(tmp_path / "other", under("fc."))
    refused(ConfigError, r"holds the adapters \['other'\]", tmp_path)
    Adapter.load(tmp_path / "other")


def test_tensors_alone_need_a_configuration(tmp_path: Path) -> None:
    bare = tmp_path / "x.safetensors"
    write_safetensors(bare, under("fc."))
    refused(ConfigError, "config= in Python", bare)
    assert Adapter.load(bare, config=LoraConfig(r=2)).raw is None
    for part in PARTS:  # either file stands for its directory
        assert Adapter.load(write(tmp_path / "a", under("fc.")) / part).config.r == 2


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.pth", "x.pkl", "x.ckpt"])
def test_a_pickle_is_never_loaded(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc."))
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(FormatError, "(?s)a pickle is never loaded.*python -c", folder / name)
    (folder / PARTS[1]).unlink()
    with pytest.raises(FormatError, match="pickle"):
        Adapter.load(folder)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    refused(StorageError, "no such adapter", tmp_path / "missing")
    folder = write(tmp_path / "a", under("fc."))
    (folder / PARTS[1]).rename(folder / "adapter_modle.safetensors")
    refused(StorageError, "nearest: 'adapter_modle.safetensors'", folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, 300])
def test_truncated_tensors_are_refused(keep: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc."))
    data = (folder / PARTS[1]).read_bytes()
    (folder / PARTS[1]).write_bytes(data[: min(keep, len(data) - 1)])
    with pytest.raises(FormatError, match=str(folder / PARTS[1])):
        Adapter.load(folder)


def test_tensors_of_nothing_are_listed_all_at_once(tmp_path: Path) -> None:
    strange = arrays({"fc.hada_w1_a": (2, 2), "head.weight": (2,), "fc.bias": (3,), "loss": (1,)})
    folder = write(tmp_path / "a", under("fc.") | strange)
    words = r"(?s)4 tensors cannot be placed.*fc.bias.*fc.hada_w1_a.*head.weight.*loss"
    refused(TargetError, words, folder)
    adapter = Adapter.load(folder, strict=False)
    assert adapter.spare.keys() == strange.keys()
    assert len(adapter.notes) == 4
    assert adapter.check(BASE)


def test_shared_arrays_without_sites_are_refused(tmp_path: Path) -> None:
    tensors = arrays({"base_model.vera_A": (2, 4)})
    folder = write(tmp_path / "a", tensors, peft_type="VERA", target_modules=None)
    with pytest.raises(ShapeError, match="vera_A: unexpected"):
        Adapter.load(folder).check(BASE)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc.", ".one") | under("fc.", ".two"))
    refused(TargetError, "belongs to the adapter 'one' of .'one', 'two'.", folder)


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc.") | under("base_model.model.fc."))
    refused(TargetError, "is the same as base_model.model.fc.lora_A.weight", folder)


def test_a_file_without_an_adapter_is_refused(tmp_path: Path) -> None:
    refused(TargetError, "holds no adapter .*give it none", write(tmp_path / "a", {}))


def test_integers_are_no_parameters(tmp_path: Path) -> None:
    tensors = {k: v.astype("int32") for k, v in under("fc.").items()}
    refused(ShapeError, "int32 values cannot be parameters", write(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fc.lora_A.weight": (2, 5)}, ShapeError, r"fc.lora_A.weight: shape \(2, 5\) cannot fit"),
        ({"fc.lora_A.weight": (3, 4)}, ShapeError, r"needs \(2, 4\)"),
        ({"fc.lora_B.weight": None}, ShapeError, "fc.lora_B.weight: missing"),
        ({"fc.lora_C.weight": (2, 2)}, ShapeError, "fc.lora_C.weight: unexpected .nearest"),
        ({"fcc.lora_A.weight": (2, 4)}, TargetError, "fcc: the base has no such layer .*'fc'"),
        ({"lora_A.weight": (2, 4)}, TargetError, "the base has no such layer"),
    ],
)
def test_parameters_that_do_not_fit_the_base_are_listed(
    change: dict[str, Any], error: type[PeftError], words: str, tmp_path: Path
) -> None:
    shapes = {f"fc.{k}": v for k, v in PAIR.items()} | change
    tensors = arrays({k: v for k, v in shapes.items() if v is not None})
    with pytest.raises(error, match=words):
        Adapter.load(write(tmp_path / "a", tensors)).check(BASE)


def test_targets_without_tensors_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc."), target_modules=["fc", "head"])
    with pytest.raises(TargetError, match="head: is targeted, and the adapter has no tensors"):
        Adapter.load(folder).check(BASE)
    folder = write(tmp_path / "a", under("fc."), target_modules=["fc", "haed"])
    with pytest.raises(TargetError, match=r"entry 'haed' matches no layer .nearest: 'head'"):
        Adapter.load(folder).check(BASE)
    assert [*Adapter.load(folder).check(BASE, strict=False)] == ["fc"]
    folder = write(tmp_path / "a", under("fc."), target_modules="fc|head")
    with pytest.raises(TargetError, match="head: is targeted, and the adapter has no tensors"):
        Adapter.load(folder).check(BASE)


def test_copies_and_rows_that_the_file_lacks_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", under("fc."), modules_to_save=["head", "score"])
    with pytest.raises(TargetError, match=r"^head: is in modules_to_save, and the adapter"):
        Adapter.load(folder).check(BASE)
    assert [*Adapter.load(folder).check(BASE, strict=False)] == ["fc"]
    for rows in ({"emb": [0]}, [0]):
        folder = write(tmp_path / "a", under("fc."), trainable_token_indices=rows)
        with pytest.raises(TargetError, match="token_indices: the adapter has no rows for them"):
            Adapter.load(folder).check(BASE)
    folder = write(tmp_path / "a", under("fc."), trainable_token_indices={"emb": []})
    assert [*Adapter.load(folder).check(BASE)] == ["fc"]


def test_copies_that_do_not_fit_the_base_are_listed(tmp_path: Path) -> None:
    tensors = under("fc.") | arrays({"head.weight": (6, 3)})
    folder = write(tmp_path / "a", tensors, modules_to_save=["head"])
    with pytest.raises(ShapeError, match=r"head.weight: shape \(6, 3\) cannot replace"):
        Adapter.load(folder).check(BASE)
    tensors = under("fc.") | arrays({"heads.weight": (6, 3)})
    folder = write(tmp_path / "a", tensors, modules_to_save=["heads"])
    with pytest.raises(TargetError, match=r"heads.weight: the base has no such tensor .nearest"):
        Adapter.load(folder).check(BASE)


@pytest.mark.parametrize(
    ("indices", "rows", "words"),
    [
        ([1, 2, 3], 2, r"lists 3 rows"),
        ([1, 9], 2, r"trainable_token_indices \[9\] cannot be rows"),
        ([1, 1], 2, "each may be named once"),
        ([-1], 1, r"trainable_token_indices \[-1\] cannot"),
        ({"other": [1]}, 1, "lists 0 rows"),
    ],
)
def test_token_rows_must_fit(indices: Any, rows: int, words: str, tmp_path: Path) -> None:
    tensors = under("fc.") | arrays({"wte.token_adapter.trainable_tokens_delta": (rows, 3)})
    folder = write(tmp_path / "a", tensors, trainable_token_indices=indices)
    with pytest.raises(PeftError, match=words):
        Adapter.load(folder).check(BASE | arrays({"wte.weight": (5, 3)}))


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    tensors = under("fc.") | arrays({"wte.token_adapter.trainable_tokens_delta": (1, 3)})
    folder = write(tmp_path / "a", tensors, trainable_token_indices=[1])
    with pytest.raises(ShapeError, match=r"rows of shape \(1, 3\) cannot go into \(5, 4\)"):
        Adapter.load(folder).check(BASE | arrays({"wte.weight": (5, 4)}))


def test_a_prompt_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(FILES / "prompt", folder)
    raw = json.loads((folder / PARTS[0]).read_text())
    (folder / PARTS[0]).write_text(json.dumps(raw | {"num_virtual_tokens": 4}))
    refused(ShapeError, r"shape \(3, 8\) cannot fit", folder)


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    tensors = under("fc.")
    tensors["fc.lora_A.weight"][0, 0] = np.nan
    with pytest.raises(FormatError, match=r"fc.lora_A.weight: NaN or infinite"):
        Adapter.load(write(tmp_path / "a", tensors)).check_finite()


def test_an_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    adapter = Adapter.load(FILES / "ia3")
    adapter.save(tmp_path / "a")
    with pytest.raises(StorageError, match="exists"):
        adapter.save(tmp_path / "a")
    adapter.save(tmp_path / "a", overwrite=True)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    bad = Adapter(IA3Config(target_modules=["fc"]), {"fc": {"ia3_l": np.zeros(3, "complex256")}})
    with pytest.raises(PeftError):
        bad.save(tmp_path / "a")
    with pytest.raises(ConfigError):
        Adapter(LoraConfig(lora_alpha=float("nan"))).save(tmp_path / "b")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("name", "shape"), [("adamss_B.0", (1, 2)), ("adamss_A.0", (1, 4))])
def test_segments_that_are_not_all_outputs_are_refused(name: str, shape: tuple[int, ...]) -> None:
    adapter = Adapter.load(FILES / "adamss")
    site, p = next(iter(adapter.sites.items()))
    assert p[name].shape != shape
    here = Site(site, p["adamss_newB"].shape[1] - 1, len(p["adamss_rows"]))
    base = Dense(np.zeros((here.n_out, here.n_in), "float32"), None, here)
    with pytest.raises(
        ShapeError, match=rf"{site}: segments of .* cannot make {here.n_out} outputs"
    ):
        adapter.config.at(here).effect({**p, name: np.zeros(shape, "float32")}, base)


def test_every_method_has_a_file() -> None:
    seen = {config_from_json(FILES / name / PARTS[0])[0].peft_type for name in NAMES}
    assert {*method_names()} <= seen
    for name in NAMES:
        config = Adapter.load(FILES / name).config
        assert config_to_dict(config)["peft_type"] == config.peft_type
        assert isinstance(config, Attended | Prompt | Tuner)


BIASED = [name for name in method_names() if hasattr(method_for(name), "bias")]


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_that_no_method_has_is_refused(name: str) -> None:
    raw = {"peft_type": name, "bias": "some"} | ({"total_step": 9} if name == "ADALORA" else {})
    with pytest.raises(ConfigError, match=r"bias='some' must be \"none\", \"all\" or \"\w+_only\""):
        config_from_dict(raw)


def test_rows_of_segments_are_found_again_or_refused() -> None:
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((60, 40)), "fc.bias": rng.standard_normal(60)}
    few = {name: a[:30] for name, a in weights.items()}

    def begun(base: dict[str, Any], r: int) -> tuple[Adapter, Any]:
        config = AdamssConfig(r=r, num_subspaces=3, target_modules=["fc"])
        adapter = PeftModel(base).add("a", config)
        p = dict(adapter.sites["fc"])
        rows = p.pop("adamss_rows")
        return adapter.replace(sites={"fc": p}), rows

    bare, rows = begun(weights, 12)
    found = PeftModel(weights).add("a", bare)
    np.testing.assert_array_equal(found.sites["fc"]["adamss_found_rows"], rows)
    p = bare.sites["fc"]
    less = {**p, "adamss_B.0": p["adamss_B.0"][1:]}
    for base, adapter, why in (
        (weights, bare.replace(sites={"fc": less}), "its segments have other sizes"),
        (few, begun(few, 60)[0], "rounding alone decides"),
        (
            {name: a[::-1] * a for name, a in weights.items()},
            bare,
            "its directions are not, to single precision, those of this base",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^fc: the rows of .* told: {why}"):
            PeftModel(base).add("a", adapter)

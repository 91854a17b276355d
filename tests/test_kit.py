"""The kit for method authors: it passes sound methods, and says what is wrong with others."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pytest_peft_any
from peft_any.backend import astype, backend_of, creation_device, detach, namespace, resolve
from peft_any.custom import custom_vjp
from peft_any.errors import ConfigError, UsageError
from peft_any.layer import Site
from peft_any.method import Additive, Tuner
from peft_any.methods.adaption_prompt import AdaptionPromptConfig
from peft_any.methods.lily import LilyConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.miss import MissConfig
from peft_any.methods.poly import PolyConfig
from peft_any.methods.prefix_tuning import PrefixTuningConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.prompt import Prompt
from peft_any.prompts import before, spread
from peft_any.registry import _known, method_names
from peft_any.routed import Routed
from peft_any.testing import LIBRARIES, assert_close, check_method, missing, rows
from tests.foreign import METHOD, ROOT, install, run, run_tests

FC = [Site("fc", 6, 5)]
HOST = {"backends": ["numpy"], "seeds": [0]}


@pytest.fixture(autouse=True)
def _forget():
    """Forget the methods that a test defines."""
    before = set(_known)
    yield
    for name in {*_known} - before - {*method_names()}:
        del _known[name]


def scaling(peft_type: str, **functions: Any) -> Any:
    """Make a method that scales rows, W′ = diag(1 + v)·W, with some functions replaced."""

    class Scale(Tuner, peft_type=peft_type, prefix="scale_"):
        def shapes(self, site):
            return {"scale_v": (site.n_out,)}

        def init(self, site, new):
            return {"scale_v": new.zeros((site.n_out,))}

        def merge(self, p, base):
            return base.replace(weight=base.weight * (1.0 + p["scale_v"])[:, None])

        def forward(self, p, x, base):
            y = base(x) if base.bias is None else base(x) - base.bias
            y = y * (1.0 + p["scale_v"])
            return y if base.bias is None else y + base.bias

        def unmerge(self, p, merged):
            return merged.replace(weight=merged.weight / (1.0 + p["scale_v"])[:, None])

    for name, f in functions.items():
        setattr(Scale, name, f)
    return Scale()


def complaint(config: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        check_method(config, FC, **(HOST | options))
    return str(raised.value)


def laws_of(said: str) -> set[str]:
    """Name the laws that a complaint lists."""
    lines = [line for line in said.splitlines() if line.startswith("fc: ")]
    return {line.split(": ")[1] for line in lines}


def test_sound_methods_pass_everywhere() -> None:
    found = check_method(scaling("SOUND"), FC, reverts=200)
    assert "fc: libraries: numpy:readonly" in found.passed
    assert all(f"fc: libraries: {row}" in found.passed for row in rows() if not missing(row))
    assert not any("cupy" in line for line in found.passed) or not missing("cupy")


def test_our_own_methods_pass_on_the_usual_layers() -> None:
    found = check_method(LoraConfig(r=3), **HOST)
    layers = {name.partition(":")[0] for name in found.passed}
    assert {"fc", "a.odd", "wte", "conv2"} <= layers
    found = check_method(MissConfig(r=9), **HOST)
    assert not found.skipped


def test_a_forward_that_is_not_the_merged_layer_is_caught() -> None:
    def forward(self, p, x, base):
        return base(x) * (1.0 + 2.0 * p["scale_v"])

    said = complaint(scaling("DISAGREES", forward=forward))
    assert laws_of(said) == {"merging"}
    assert "forward and merge disagree, by " in said
    assert "Scale at fc (Linear 6 → 5)" in said


def test_writing_in_place_is_caught() -> None:
    def merge(self, p, base):
        weight = base.weight
        weight *= (1.0 + p["scale_v"])[:, None]
        return base.replace(weight=weight)

    said = complaint(scaling("INPLACE", merge=merge))
    assert "merge writes in place, to the base's weight: give new arrays" in said
    assert "libraries: numpy:readonly" in said
    assert "nothing in place" in laws_of(said)


@pytest.mark.parametrize("row", ["strict", "torch"])
def test_ignoring_the_device_is_caught(row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)

    def merge(self, p, base):
        w = base.weight
        xp = namespace(w)
        scale = xp.eye(w.shape[0], dtype=w.dtype) * (1.0 + p["scale_v"])[:, None]
        return base.replace(weight=scale @ w)

    said = complaint(scaling("DEVICELESS", merge=merge), backends=[row], reverts=200)
    other = {"strict": "strict:device1", "torch": "torch:meta"}[row]
    assert f"fc: libraries: {other}: " in said
    assert "device=" in said
    assert f"fc: libraries: {row}: " not in said
    assert laws_of(said) == {"libraries"}


def test_initial_values_on_another_device_are_caught() -> None:
    row = "strict"  # torch's second device holds no numbers to draw
    if reason := missing(row):
        pytest.skip(reason)

    def init(self, site, new):
        here = resolve(row)
        return {"scale_v": here.xp.zeros((site.n_out,), dtype=here.xp.float32)}

    class Away:
        def __get__(self, config, owner):
            return lambda site, new: (
                init(config, site, new)
                if new.backend.name == row
                else {"scale_v": new.zeros((site.n_out,))}
            )

    said = complaint(scaling("AWAY", init=Away()), backends=[row], reverts=200)
    assert "initial scale_v: the array is on the device" in said
    assert laws_of(said) == {"seeds"}


def test_a_wrong_gradient_is_caught() -> None:
    twice = custom_vjp(lambda v: (2.0 * v, ()), lambda _, g: (3.0 * g,))

    def merge(self, p, base):
        return base.replace(weight=base.weight * (1.0 + twice(p["scale_v"]))[:, None])

    def forward(self, p, x, base):
        return self.merge(p, base)(x)

    def unmerge(self, p, merged):
        return merged.replace(weight=merged.weight / (1.0 + 2.0 * p["scale_v"])[:, None])

    wrong = scaling("STEEP", merge=merge, forward=forward, unmerge=unmerge)
    said = complaint(wrong, reverts=500)
    assert "breaks 1 of" in said
    assert laws_of(said) == {"gradients"}
    assert "forward has a wrong gradient by scale_v" in said


def test_what_is_detached_counts_as_constant() -> None:
    def merge(self, p, base):
        v = p["scale_v"]
        return base.replace(weight=base.weight * (1.0 + v * detach(v))[:, None])

    def forward(self, p, x, base):
        return self.merge(p, base)(x)

    def unmerge(self, p, merged):
        return merged.replace(weight=merged.weight / (1.0 + p["scale_v"] ** 2)[:, None])

    made = scaling("DETACHED", merge=merge, forward=forward, unmerge=unmerge)
    check_method(made, FC, reverts=200, **HOST)


@pytest.mark.parametrize("known", [True, False])
def test_a_parameter_without_a_gradient_is_caught(*, known: bool) -> None:
    def forward(self, p, x, base):
        from peft_any.backend import detach as constant  # a name that no module holds

        v = detach(p["scale_v"]) if known else constant(p["scale_v"])
        return base.replace(weight=base.weight * (1.0 + v)[:, None])(x)

    still = scaling(f"STILL_{known}".upper(), forward=forward)
    said = complaint(still, reverts=200)
    assert laws_of(said) == {"gradients"}
    how = "no" if known else "a wrong"
    assert f"forward has {how} gradient by scale_v" in said
    if known:
        check_method(still, FC, reverts=200, idle=["scale_v"], **HOST)


def test_another_dtype_is_caught() -> None:
    def forward(self, p, x, base):
        return astype(self.merge(p, base)(x), "float64")

    said = complaint(scaling("WIDE", forward=forward), reverts=200)
    assert "forward gives float64 of float32" in said


def test_dropping_the_bias_is_caught() -> None:
    def forward(self, p, x, base):
        return x @ (base.weight * (1.0 + p["scale_v"])[:, None]).T

    said = complaint(scaling("FLAT", forward=forward), reverts=200)
    assert laws_of(said) == {"merging"}
    assert "forward drops the bias" in said

    def merge(self, p, base):
        weight = base.weight * (1.0 + p["scale_v"])[:, None]
        return type(base)(weight, None, base.site)

    assert "merge drops the bias" in complaint(scaling("FLATTER", merge=merge), reverts=200)


def test_other_faults_are_named() -> None:
    said = complaint(scaling("RESTLESS", init=lambda self, site, new: {"scale_v": new.ones((5,))}))
    assert "a fresh adapter changes the weight" in said
    said = complaint(scaling("MISFIT", shapes=lambda self, site: {"scale_v": (1,)}))
    assert "shapes announces {'scale_v': (1,)}" in said
    said = complaint(scaling("NAMELESS", unmerge=Tuner.unmerge))
    assert "say that it cannot be done (reverts=0)" in said
    assert "reverts=0" in complaint(scaling("ABLE"), reverts=0)
    said = complaint(scaling("RAISES", merge=lambda self, p, base: p["none"]))
    assert "KeyError" in said
    said = complaint(scaling("BOUND", changes_bias=lambda self, site: True), reverts=200)
    assert "changes_bias says yes" in said


def test_false_claims_of_rows_and_products_are_caught() -> None:
    def merge(self, p, base):  # a reflection: every row needs all others
        w, v = base.weight, p["scale_v"][:, None]
        return base.replace(weight=w - v @ (v.T @ w))

    def forward(self, p, x, base):
        return self.merge(p, base)(x)

    whole = {"merge": merge, "forward": forward, "unmerge": Tuner.unmerge}
    said = complaint(scaling("MIXING", separable=property(lambda self: True), **whole), reverts=0)
    assert {"rows apart"} == laws_of(said)
    assert "it says that it is separable, and its rows depend on one another" in said

    def product(self, p, base):
        v = p["scale_v"][:, None]
        return v, v.T @ base.weight  # the sign is wrong

    said = complaint(scaling("TURNED", product=product, **whole), reverts=0)
    assert {"product"} == laws_of(said)
    assert "product is not what merge adds to the weight, by" in said

    def blockwise(self, p, site):
        return np.eye(site.n_in)[None, ...], p["scale_v"]  # and 1 is missing

    said = complaint(scaling("SCALED", blockwise=blockwise))
    assert {"blocks"} == laws_of(said)
    assert "blockwise is not what merge makes of the weight, by" in said


def dropping(peft_type: str, dropped: Any) -> Any:
    """Make a LoRA with a dropout of its own."""

    class Wet(LoraConfig, peft_type=peft_type, prefix="lora_"):
        pass

    Wet.dropped = dropped
    return Wet(r=2)


def test_a_wrong_dropout_is_caught() -> None:
    def base_too(self, p, x, base, noise):
        return self.forward(p, noise.at("input").thinned(x, self.lora_dropout), base)

    def none(self, p, x, base, noise):
        return self.forward(p, x, base)

    def unscaled(self, p, x, base, noise):
        mask = noise.at("input").kept(x.shape, self.lora_dropout, x, scaled=False)
        return base(x) + self.residual(p, x * mask, base.site)

    for name, fault in {"BASE_TOO": base_too, "NONE": none, "UNSCALED": unscaled}.items():
        said = complaint(dropping(name, fault))
        assert "dropped does not thin the adapter's input alone, by lora_dropout=0.5" in said
        assert laws_of(said) == {"dropout"}

    def moody(self, p, x, base, noise):
        kept = np.random.default_rng().random(x.shape) >= self.lora_dropout
        return base(x) + self.residual(p, (x * kept).astype(x.dtype), base.site)

    said = complaint(dropping("MOODY", moody))
    assert "dropped gives another result each time, with lora_dropout=0.5" in said

    def always(self, p, x, base, noise):
        return base(x) + self.residual(p, noise.at("input").thinned(x, 0.5), base.site)

    assert "dropped is not forward, though every rate is 0" in complaint(dropping("ALWAYS", always))

    def double(self, p, x, base, noise):
        thin = noise.at("input").thinned(x, self.lora_dropout)
        return (base(x) + self.residual(p, thin, base.site)).astype("float64")

    assert "dropped gives float64 (2, 3, 5) with" in complaint(dropping("DOUBLE", double))

    def writing(self, p, x, base, noise):
        p["seen"] = x
        return self.forward(p, x, base)

    assert "dropped adds to or takes from the dict" in complaint(dropping("WRITING", writing))


def test_parameters_that_do_not_settle_are_caught() -> None:
    faults: dict[str, Any] = {
        "settled moves what it has settled, by 0.1": lambda v: 0.9 * v,
        "settled gives scale_v as float64 (5,), not float32": lambda v: v.astype("float64"),
        "settled gives scale_v as float32 (5, 1), not": lambda v: v[:, None],
        "settled gives no numbers for scale_v": lambda v: v / np.abs(v).max(),
    }
    for i, (words, f) in enumerate(faults.items()):

        def settled(self, p, f=f):
            with np.errstate(all="ignore"):
                return {k: f(v) for k, v in p.items()}

        said = complaint(scaling(f"RESTLESS{i}", settled=settled), reverts=200)
        assert words in said
        assert "settling" in laws_of(said)
    said = complaint(scaling("LOSING", settled=lambda self, p: {}), reverts=200)
    assert "settled gives [], not ['scale_v']" in said

    class Cold(LoraConfig, peft_type="COLD", prefix="lora_"):
        frozen = frozenset({"lora_B.weight"})

        def settled(self, p):
            return {k: v.clip(-0.1, 0.1) for k, v in p.items()}

    said = complaint(Cold(r=2, init_lora_weights=False))
    assert "settled moves lora_B.weight, which is frozen" in said


@pytest.mark.parametrize("row", ["strict", "torch"])
def test_settling_on_the_host_is_caught(row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)

    def settled(self, p):
        return {k: np.clip(np.asarray(v), -0.1, 0.1) for k, v in p.items()}

    said = complaint(scaling("HOSTED", settled=settled), backends=[row], reverts=200)
    assert f"fc: settling: {row}" in said
    assert laws_of(said) == {"settling"}


def test_names_of_parameters_that_files_lose_are_caught() -> None:
    class LostConfig(Additive, peft_type="LOST", prefix="lost_"):
        def shapes(self, site):
            return {"d": (site.n_out, site.width)}

        def init(self, site, new):
            return {"d": new.zeros((site.n_out, site.width))}

        def delta(self, p, site):
            return p["d"]

    said = complaint(LostConfig())
    assert "LOST has no such tensor" in said
    assert "breaks 1 of" in said


def test_an_additive_method_says_its_change() -> None:
    with pytest.raises(ConfigError, match="SilentConfig: says nothing of ΔW"):

        class SilentConfig(Additive, peft_type="SILENT", prefix="silent_"):
            pass


def prompting(peft_type: str, **functions: Any) -> Any:
    """Make a method that trains P = T ⊙ (1 + v) + b, of which a file holds P alone."""

    class Tokens(Prompt, peft_type=peft_type, prefix="prompt_"):
        def shapes(self):
            return {"prompt_embeddings": (self.size("num_virtual_tokens"), self.size("token_dim"))}

        def init(self, new):
            ((t, d),) = self.shapes().values()
            return {"table": new.normal((t, d)), "v": new.zeros((d,)), "b": new.zeros((d,))}

        def portable(self, p):
            if "prompt_embeddings" in p:
                return p
            return {"prompt_embeddings": p["table"] * (1.0 + p["v"]) + p["b"]}

        def prepend(self, p, embeds, submodule=0):
            return before(self, self.portable(p)["prompt_embeddings"], embeds, submodule)

    for name, f in functions.items():
        setattr(Tokens, name, f)
    return Tokens(num_virtual_tokens=3, token_dim=4)


def broken(config: Any, **options: Any) -> dict[str, str]:
    """Check a prompt, and give what the kit says of each law that it breaks."""
    with pytest.raises(AssertionError) as raised:
        check_method(config, **({"backends": ["numpy"], "seeds": [0]} | options))
    found = [line.split(": ", 2) for line in str(raised.value).split("\nprompt: ")[1:]]
    return {line[0]: ": ".join(line[1:]) for line in found}


def test_sound_prompts_pass_everywhere() -> None:
    found = check_method(prompting("SOUND_PROMPT"))
    assert all(f"prompt: libraries: {row}" in found.passed for row in rows() if not missing(row))
    sizes = {"num_virtual_tokens": 2, "token_dim": 6, "num_attention_heads": 2, "num_layers": 3}
    found = check_method(PrefixTuningConfig(**sizes), **HOST)
    assert "prompt: in front of the input" in found.passed
    text = {"prompt_tuning_init_text": "a", "tokenizer_name_or_path": "x"}
    config = PromptTuningConfig(
        num_virtual_tokens=2, token_dim=3, prompt_tuning_init="TEXT", **text
    )
    assert check_method(config, start={"tokens": [4]}, **HOST).passed


def test_a_prompt_whose_file_acts_otherwise_is_caught() -> None:
    def prepend(self, p, embeds, submodule=0):
        rows = self.portable(p)["prompt_embeddings"]
        return before(self, rows if "v" not in p else rows + p["v"], embeds, submodule)

    said = broken(prompting("UNLIKE", prepend=prepend))
    assert said.keys() == {"what files carry"}
    assert "what portable gives acts otherwise than what is trained" in said["what files carry"]


def test_a_prompt_whose_file_drops_a_bias_is_caught() -> None:
    def portable(self, p):
        return p if "prompt_embeddings" in p else {"prompt_embeddings": p["table"] * (1.0 + p["v"])}

    def prepend(self, p, embeds, submodule=0):
        rows = portable(self, p)["prompt_embeddings"]
        return before(self, rows + p["b"] if "b" in p else rows, embeds, submodule)

    said = broken(prompting("UNBIASED", portable=portable, prepend=prepend))
    assert said.keys() == {"what files carry"}
    assert "a file would lose something" in said["what files carry"]


def test_a_prompt_that_writes_in_place_is_caught() -> None:
    def portable(self, p):
        if "prompt_embeddings" in p:
            return p
        table = p["table"]
        table *= 1.0 + p["v"]
        return {"prompt_embeddings": table + p["b"]}

    said = broken(prompting("WRITES", portable=portable))
    assert "portable writes in place, to table: give new arrays" in said["nothing in place"]
    assert "read-only" in said["libraries"]


@pytest.mark.parametrize("row", ["strict", "torch"])
def test_a_prompt_that_ignores_the_device_is_caught(row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)

    def portable(self, p):
        if "prompt_embeddings" in p:
            return p
        xp, table = namespace(p["table"]), p["table"]
        whole = xp.zeros(table.shape, dtype=table.dtype) + table * (1.0 + p["v"]) + p["b"]
        return {"prompt_embeddings": whole}

    with pytest.raises(AssertionError) as raised:
        check_method(prompting("HOMELESS", portable=portable), backends=[row], seeds=[0])
    other = {"strict": "strict:device1", "torch": "torch:meta"}[row]
    lines = [line for line in str(raised.value).splitlines() if line.startswith("prompt: ")]
    assert all(line.startswith(f"prompt: libraries: {other}: ") for line in lines)
    assert "device=" in lines[0]


def test_a_prompt_with_a_wrong_gradient_is_caught() -> None:
    twice = custom_vjp(lambda v: (2.0 * v, ()), lambda _, g: (3.0 * g,))

    def portable(self, p):
        if "prompt_embeddings" in p:
            return p
        return {"prompt_embeddings": p["table"] * (1.0 + twice(p["v"])) + p["b"]}

    said = broken(prompting("ASKEW", portable=portable))
    assert said.keys() == {"gradients"}
    assert "prepend has a wrong gradient by v: " in said["gradients"]


def test_other_faults_of_prompts_are_named() -> None:
    def acts(change: Any) -> Any:
        def prepend(self, p, embeds, submodule=0):
            return change(before(self, self.portable(p)["prompt_embeddings"], embeds, submodule))

        return {"prepend": prepend}

    law = "in front of the input"
    said = broken(prompting("SCALES", **acts(lambda y: 1.5 * y)))
    assert said[law].endswith(
        "prepend changes the input, or its place: it follows the virtual tokens"
    )
    said = broken(prompting("SHORT", **acts(lambda y: y[..., 1:, :])))
    assert "prepend gives the shape (6, 4), not (7, 4)" in said[law]
    said = broken(prompting("WIDE", **acts(lambda y: y.astype("float64"))))
    assert "prepend gives float64, not the input's float32" in said[law]

    def listens(self, p, embeds, submodule=0):
        rows = self.portable(p)["prompt_embeddings"]
        mean = namespace(embeds).mean(embeds, axis=-2, keepdims=True)
        return before(self, rows + mean, embeds, submodule)

    said = broken(prompting("LISTENS", prepend=listens))
    assert "prepend's virtual tokens depend on the input" in said[law]

    def unchecked(self, p, embeds, submodule=0):
        rows = self.portable(p)["prompt_embeddings"]
        return namespace(embeds).concat([spread(rows, embeds.shape[:-2]), embeds], axis=-2)

    said = broken(prompting("UNCHECKED", prepend=unchecked))
    assert "raise a ShapeError" in said["refusals"] or "ValueError" in said["refusals"]

    class Named:
        def __get__(self, config, owner):
            return lambda: {"tokens": (3, 4)}

    said = broken(prompting("NAMED", shapes=Named()))
    assert (
        "portable gives {'prompt_embeddings': (3, 4)}, and shapes announces" in said["parameters"]
    )


def test_methods_that_depend_on_the_input_are_applied() -> None:
    found = check_method(LilyConfig(r=2), FC, **HOST)
    assert {"fc: a merge is refused", "fc: applying"} <= {*found.passed}
    found = check_method(PolyConfig(r=2, n_tasks=2), FC, routing={"task_ids": [1, 0]}, **HOST)
    assert "fc: a merge is refused" not in found.passed

    class SquaredConfig(Routed, peft_type="SQUARED", prefix="squared_"):
        why = "it squares the input"

        def shapes(self, site):
            return {"squared_v": (site.n_out, site.n_in)}

        def init(self, site, new):
            return {"squared_v": new.zeros((site.n_out, site.n_in))}

        def residual(self, p, x, site):
            return (x * x) @ p["squared_v"].T

    check_method(SquaredConfig(), FC, **HOST)

    def flat(self, p, x, base):
        return x @ base.weight.T + self.residual(p, x, base.site)

    SquaredConfig.forward = flat  # type: ignore[method-assign]
    assert "forward drops the bias" in complaint(SquaredConfig())
    SquaredConfig.forward = lambda self, p, x, base: base(x)  # type: ignore[method-assign]
    assert "whatever the parameters" in complaint(SquaredConfig())
    SquaredConfig.forward = Routed.forward  # type: ignore[method-assign]
    SquaredConfig.merge = lambda self, p, base: base  # type: ignore[method-assign]
    assert "merge gives a weight, and no weight holds what it adds" in complaint(SquaredConfig())


def test_what_cannot_be_checked_is_refused() -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=2, token_dim=3)
    for config, options, why in [
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1), {}, "it acts within attention"),
        (prompt, {"sites": FC}, "a prompt adapts no layer"),
        (prompt, {"routing": {"task_ids": [0]}}, "a prompt adapts no layer"),
        (LoraConfig(), {"start": {"tokens": [0]}}, "start= is for prompts"),
        (prompting("MUTE", prepend=property()), {}, "give it prepend"),
        (object(), {}, "it is no Tuner or Prompt"),
    ]:
        with pytest.raises(UsageError, match=why):
            check_method(config, **options)
    with pytest.raises(ConfigError, match="token_dim=None"):
        check_method(PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="num_layers=None"):
        check_method(PrefixTuningConfig(num_virtual_tokens=2, token_dim=4, num_attention_heads=2))
    with pytest.raises(ConfigError, match="cannot adapt a Norm layer"):
        check_method(LoraConfig(), [Site("n", 3, 3, "Norm")])
    with pytest.raises(UsageError, match="library 'numpi' cannot be tested"):
        check_method(LoraConfig(r=1), FC, backends=["numpi"])


PROJECT = {
    "conftest.py": 'pytest_plugins = ["pytest_peft_any"]\n',
    "test_rows.py": """
import numpy as np
import pytest

from peft_any import method_for
from peft_any.testing import Case, check_method, laws

CASE = Case("rows", method_for("ROWS")(), reverts=200)


def test_all_laws():
    check_method(CASE.config, [CASE.site], reverts=200, backends=["numpy"], seeds=[0])


def test_numbers(lib, xp):
    assert lib.backend.xp is xp
    laws.libraries(CASE, lib)
""",
}


def test_another_project_uses_the_kit(tmp_path: Path) -> None:
    found = run_tests(install(tmp_path / "site"), PROJECT, "--backend", "numpy")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "3 passed" in found.stdout  # all laws, and the numbers on both rows of NumPy
    assert "deselected" in found.stdout


def test_another_project_sees_a_planted_fault(tmp_path: Path) -> None:
    fault = (
        METHOD
        + """
    def forward(self, p, x, base):
        return base(x) * (1.0 + 2.0 * p["rows_v"])
"""
    )
    found = run_tests(install(tmp_path / "site", fault), PROJECT, "--backend", "numpy")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "breaks 1 of" in found.stdout
    assert "forward and merge disagree, by" in found.stdout


def test_the_plugin_is_there_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pytest11" not in named.get("entry-points", {})
    site, files = install(tmp_path / "site"), {"test_one.py": "def test_xp(xp): ...\n"}
    found = run_tests(site, files, "--backend", "numpy")
    assert found.returncode == 4
    assert "unrecognized arguments: --backend" in found.stderr
    found = run_tests(site, files, "-p", "pytest_peft_any", "--backend", "numpy")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 passed" in found.stdout


def test_a_library_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    site = install(tmp_path / "site")
    hidden = """
pytest_plugins = ["pytest_peft_any"]
import pytest_peft_any
pytest_peft_any.MODULES["torch"] = "torch_that_is_not_here"
"""
    files = {"conftest.py": hidden, "test_one.py": "def test_xp(xp): ...\n"}
    for name, why in {
        "torch": "--backend torch: torch is not installed here",
        "numpi": "invalid choice: 'numpi'",
    }.items():
        found = run_tests(site, files, "--backend", name)
        assert found.returncode == 4, found.stdout + found.stderr
        assert why in found.stderr


def test_the_plugin_names_the_rows_of_the_kit() -> None:
    assert rows() == pytest_peft_any.ROWS
    assert [*LIBRARIES] == pytest_peft_any.LIBRARIES


def test_the_plugin_leaves_the_package_to_coverage(tmp_path: Path) -> None:
    code = "import sys, pytest_peft_any; sys.exit('peft_any' in sys.modules)"
    assert run(tmp_path, "-c", code).returncode == 0


def test_closeness_compares_the_kind_before_the_values(lib, xp) -> None:
    assert lib.backend.xp is xp
    host = np.asarray([1.0, 2.0])
    x = lib.array(host)
    assert_close(x, lib.array(host))
    for wrong, why in [
        (lib.array(host[:1]), r"the shape is \(1,\), not \(2,\)"),
        (lib.array(host.astype("float32")), "the dtype is float32, not float64"),
        ([1.0, 2.0], "there is a list, not an array"),
    ]:
        with pytest.raises(AssertionError, match=f"y: {why}"):
            assert_close(wrong, x, where="y")
    if lib.name != "numpy":
        with pytest.raises(AssertionError, match="the array is one of"):
            assert_close(x, host)
    if lib.row in ("strict:device1", "torch:meta"):
        with pytest.raises(AssertionError, match="on the device"):
            assert_close(x, host, on=resolve(lib.name))
    if lib.has_values:
        assert creation_device(x) == backend_of(x).device
        with pytest.raises(AssertionError, match="the values differ by more than 1e-14 of 2"):
            assert_close(lib.array(host + 1e-9), x, rtol=1e-14)

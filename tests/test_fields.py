"""What the types of configuration fields say: rules of values, and groups that methods share."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, field, fields
from typing import Annotated, Any, Literal

import pytest

from peft_any.contract import Additive
from peft_any.errors import ConfigError
from peft_any.fields import Biases, Count, Excludes, Inside, Positive, Rate, Rule, Share, within
from peft_any.io.config import config_from_dict
from peft_any.methods.glora import GloraConfig
from peft_any.methods.vera import VeraConfig
from peft_any.methods.xlora import XLoraConfig
from peft_any.registry import _known, method_for, method_names


class Ruled(Additive, Biases, Excludes, peft_type="TEST_RULED"):
    """Says a rule of each kind."""

    few: Annotated[int, within(2, 4)] = 2
    even: Annotated[Count, Rule(lambda value: value % 2 == 0, "even")] = 2
    some: Count | None = None
    way: Literal["up", "down"] | None = "up"
    start: bool | Literal["odd"] = True
    part: Share | Literal["half"] = 0.0
    rate: Rate = 0.0
    share: Share = 0.0
    inside: Inside = 0.5
    size: Positive = 1.0
    flag: bool = False
    names: list[str] | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        if self.few == self.even == 4:
            raise ConfigError("few and even are both 4")

    def shapes(self, site: Any) -> Any:
        return {"test_ruled_d": (site.n_out, site.width)}

    def init(self, site: Any, new: Any) -> Any:
        return {k: new.zeros(shape) for k, shape in self.shapes(site).items()}

    def delta(self, p: Any, site: Any) -> Any:
        return p["test_ruled_d"]


del _known["TEST_RULED"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"few": 1}, "few=1 must be from 2 to 4"),
        ({"few": 5}, "few=5 must be from 2 to 4"),
        ({"even": 0}, "even=0 must be at least 1"),
        ({"even": "2"}, "even='2' must be at least 1"),
        ({"even": 3}, "even=3 must be even"),
        ({"some": 0}, "some=0 must be at least 1 or null"),
        ({"way": "left"}, 'way=\'left\' must be "up", "down" or null'),
        ({"start": None}, 'start=None must be true, false or "odd"'),
        ({"part": 2}, r'part=2 must be in \[0, 1\] or "half"'),
        ({"part": "all"}, r'part=\'all\' must be in \[0, 1\] or "half"'),
        ({"rate": 1.0}, r"rate=1.0 must be in \[0, 1\)"),
        ({"share": 1.1}, r"share=1.1 must be in \[0, 1\]"),
        ({"inside": 0.0}, r"inside=0.0 must be in \(0, 1\)"),
        ({"size": 0.0}, "size=0.0 must be above 0"),
        ({"size": float("nan")}, "size=nan must be above 0"),
        ({"size": float("inf")}, "size=inf must be a finite number"),
        ({"few": 2.5}, "few=2.5 cannot be taken: give an integer"),
        ({"flag": "yes"}, "flag='yes' cannot be taken: give True or False"),
        ({"names": ["a", 1]}, r"names\[1\]=1 cannot be taken: give a string"),
        ({"names": {1}}, r"names\[0\]=1 cannot be taken: give a string"),
        ({"sizes": "a"}, "sizes='a' cannot be taken: give a mapping"),
        ({"sizes": {"a": "b"}}, r"sizes\['a'\]='b' cannot be taken: give an integer"),
        ({"task_type": "CLASSIFY"}, "task_type='CLASSIFY' must be \"SEQ_CLS\", .* or null"),
        ({"bias": "lora"}, 'bias=\'lora\' must be "none", "all" or "test_only"'),
        ({"few": 4, "even": 4}, "both 4"),
    ],
)
def test_a_fields_type_says_what_it_takes(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Ruled(**given)


def test_what_rules_allow_is_taken() -> None:
    config = Ruled(
        few=4, even=6, some=3, way=None, start="odd", share=1, bias="test_only", names=("a",)
    )
    assert (
        Ruled(few=4) != config == Ruled(**{f.name: getattr(config, f.name) for f in fields(config)})
    )
    with pytest.raises(FrozenInstanceError):
        config.few = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Ruled(4)  # type: ignore[misc]


def test_a_files_words_and_types_are_refused_by_name() -> None:
    for given, text in (
        ({"config_C": "constant"}, r'^a\.json: GloraConfig: config_C=.* must be "lora", "vector"'),
        ({"task_type": "LM"}, r"^a\.json: GloraConfig: task_type='LM' must be \"SEQ_CLS\", "),
        ({"config_C": 3}, r"^a\.json: .*\$\.config_C"),
        ({"r": "8"}, r"^a\.json: Expected `int`, got `str` - at `\$\.r`"),
        ({"r": 0}, r"^a\.json: GloraConfig: r=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            config_from_dict({"peft_type": "GLORA", **given}, "a.json")


def test_groups_of_fields_are_only_where_they_are_asked_for() -> None:
    names = {f.name for f in fields(VeraConfig)}
    assert names >= {"bias", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
    assert "exclude_modules" not in names
    assert not names & {f.name for f in fields(GloraConfig)} & {"layers_pattern", "fan_in_fan_out"}
    with pytest.raises(TypeError, match="exclude_modules"):
        VeraConfig(exclude_modules=["a"])  # type: ignore[call-arg]
    assert XLoraConfig().prefix == "xlora_"
    assert method_for("VERA").prefix == "vera_lambda_"
    assert all(method_for(name).prefix for name in method_names())


def test_every_fields_unknown_words_and_types_are_refused() -> None:
    """From Python as from files, of all methods: what Hugging Face PEFT refuses, and more."""
    for name in method_names():
        cls = method_for(name)
        for one in fields(cls):
            for value in (object(), float("nan"), [[None]]):
                with pytest.raises(ConfigError, match=f"^{cls.__name__}: {one.name}"):
                    cls(**{one.name: value})
    for name, word in (
        ("ADALORA", "init_lora_weights"),
        ("LORA", "init_lora_weights"),
        ("MULTITASK_PROMPT_TUNING", "prompt_tuning_init"),
    ):
        with pytest.raises(ConfigError, match=f"{word}='up'"):
            config_from_dict({"peft_type": name, "total_step": 9, word: "up"})
    with pytest.raises(ConfigError, match="init_logits_std=-1"):
        config_from_dict({"peft_type": "VBLORA", "init_logits_std": -1})

"""Every method of Hugging Face PEFT is here, or refused by its name with the way out."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

import peft
import pytest

from peft_any import ConfigError, config_from_json
from peft_any.io.config import _IDLE
from peft_any.registry import method_for, method_names

THEIRS = sorted(kind.value for kind in peft.PeftType)


def test_no_method_is_called_otherwise() -> None:
    assert set(method_names()) <= set(THEIRS)


@pytest.mark.parametrize("name", [name for name in THEIRS if name not in method_names()])
def test_what_is_not_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used: .+: .*Hugging Face PEFT"):
        config_from_json(json.dumps({"peft_type": name}))


def defaults(cls: type) -> dict[str, Any]:
    """Give the default of every field."""
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(cls)
    }


@pytest.mark.parametrize("name", method_names())
def test_fields_and_defaults_are_theirs(name: str) -> None:
    own = method_for(name)
    ours, theirs = defaults(own), defaults(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)])
    theirs.pop("peft_type")
    ours = {k: v for k, v in ours.items() if k not in own.unsaid}
    assert ours == {k: v for k, v in theirs.items() if k in ours}
    idle = set(theirs) - set(ours) - set(own.refused) - _IDLE
    assert not idle or name == "ADALORA"  # which inherits LoRA's variants there, and has none

"""Every field of every configuration of Hugging Face PEFT, at every value a user may set.

What is set and what must follow stands in ``tests/fields.py``. Without a treatment there a setting
is compared live: what PEFT writes we read, merge and apply, and what we write it merges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from peft.tuners.waveft.wavelet import wavelist  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PretrainedConfig, PreTrainedTokenizerFast  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.errors import ConfigError  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from peft_any.io.config import config_from_dict  # noqa: E402
from peft_any.io.safetensors import read_safetensors  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.prompt import Attended, Prompt  # noqa: E402
from peft_any.registry import absent, method_for, method_names  # noqa: E402
from tests import fields as said  # noqa: E402
from tests.cases import ATTENDED, CASES, PROMPTS, ROUTED, SINGLE  # noqa: E402
from tests.hf import reference  # noqa: E402
from tests.hf.models import quietly  # noqa: E402
from tests.hf.reference import host, state_of  # noqa: E402
from tests.hf.whole import compare, fill, their_config, trained  # noqa: E402

FILES = "adapter_config.json", "adapter_model.safetensors"
UNMERGED = "LILY", "POLY"
OPEN = {"act_fn": [*ACT2FN], "wavelet_family": wavelist()}
"""Fields whose choices another table of Hugging Face's holds."""


class Setting(NamedTuple):
    """A field of a method's configuration, and a value of it that is not the default."""

    method: str
    field: str
    value: Any


def their_class(method: str) -> Any:
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]


def choices(hint: Any) -> list[Any]:
    """List the values that a type names."""
    if hint is bool:
        return [True, False]
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    if hasattr(hint, "__members__"):
        return [member.value for member in hint]
    inner = [] if get_origin(hint) in (list, dict, tuple) else get_args(hint)
    return [value for kind in inner for value in choices(kind)]


def default(field: Any) -> Any:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(made, "value", made)


def settings(*, every_turn: bool = False) -> Iterator[Setting]:
    """Name every value that is tried; a field without any has one that is missing."""
    for method in method_names():
        cls = their_class(method)
        hints = get_type_hints(cls)
        for field in fields(cls):
            if field.name == "peft_type":
                continue
            usual = said.BASE.get(method, {}).get(field.name, default(field))
            every = choices(hints[field.name]) or OPEN.get(field.name, [])
            told = [v for v in every if v != usual]
            more = said.looked_up(said.VALUES, method, field.name) or []
            told += [own for v in more if (own := own_name(method, v)) not in (usual, *told)]
            if field.name in said.SHARED and method != "LORA" and told and not every_turn:
                told = [told[sum(method.encode()) % len(told)]]
            told += [] if every or told else [MISSING]
            yield from (Setting(method, field.name, value) for value in told)
            if (inner := nested(hints[field.name])) and method == "LORA":
                yield from within(field.name, inner)


def nested(hint: Any) -> Any:
    """Give the configuration that a field holds, if it holds one."""
    return next((k for k in (hint, *get_args(hint)) if is_dataclass(k)), None)


def within(outer: str, cls: Any) -> Iterator[Setting]:
    """Name every value that is tried within a field that holds a configuration."""
    hints = get_type_hints(cls)
    for field in (f for f in fields(cls) if f.init):
        name = f"{outer}.{field.name}"
        usual = said.NESTED.get(outer, {}).get(field.name, default(field))
        told = [v for v in choices(hints[field.name]) if v != usual]
        told += said.VALUES.get(name, [] if told else [MISSING])
        yield from (Setting("LORA", name, value) for value in told)


def own_name(method: str, value: Any) -> Any:
    """Give ``bias="only"`` the name that a method has for it."""
    return f"{method_for(method).prefix}only" if value == "only" else value


def label(setting: Setting) -> str:
    return f"{setting.method.lower()}-{setting.field}={setting.value}"


def treated(*kinds: type, keep: Callable[[str], bool] = bool) -> Any:
    """Parametrise a test over the settings of certain treatments, and methods."""
    known = [s for s in settings() if s.value is not MISSING and keep(s.method)]
    chosen = [s for s in known if type(treatment(s)) in kinds]
    return pytest.mark.parametrize("setting", chosen, ids=label)


def treatment(setting: Setting) -> said.Treatment | None:
    return said.APART.get(setting.method) or said.looked_up(said.TREATED, *setting)


def of_layers(method: str) -> bool:
    return not issubclass(method_for(method), Prompt | Attended)


class Net(nn.Module):
    """Layers of several kinds, in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.body = nn.Module()
        self.body.embed_tokens = nn.Embedding(11, 8)
        self.body.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.score, self.qa_outputs = nn.Linear(8, 6), nn.Linear(8, 2)

    def prepare_inputs_for_generation(self) -> None:
        """What a model of a language has."""

    _prepare_encoder_decoder_kwargs_for_generation = prepare_inputs_for_generation

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed_tokens

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.body.embed_tokens(input_ids)
        for layer in self.body.layers:
            x = layer(x)
        return self.score(x) + self.conv(x.reshape(-1, 4, 4, 3)).mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)
        self.c1d = Conv1D(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.c1d(self.fc2(torch.tanh(self.fc1(self.ln(x)))))


IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def net(dtype: str) -> Any:
    torch.manual_seed(3)
    made = Net().to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def outputs(model: Any, method: str = "") -> np.ndarray:
    """Run a model; Hugging Face PEFT's Poly is told tasks."""
    with quietly(), torch.no_grad():
        if method == "POLY":
            return host(model.base_model(IDS, task_ids=torch.tensor(TASKS)))
        return host(model(input_ids=IDS))


TASKS = [1, 0]


def our_outputs(adapter: Adapter, dtype: str) -> np.ndarray:
    """Attach an adapter of ours to the net, and run it."""
    model = net(dtype)
    task = attach(model, adapter)
    if adapter.config.peft_type == "POLY":
        with task.routed(task_ids=TASKS):
            return outputs(model)
    return outputs(model)


def with_base(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete fields with the method's usual ones."""
    usual = {"target_modules": ["fc1", "fc2"]} if of_layers(method) else said.PROMPT
    return {**usual, **said.BASE[method], **given}


def companions(method: str, field: str) -> dict[str, Any]:
    outer, _, inner = field.partition(".")
    found = said.looked_up(said.WITH, method, outer) or {}
    return {**found, outer: said.NESTED.get(outer, {})} if inner else found


def complete(setting: Setting) -> dict[str, Any]:
    """Complete a setting with what goes with it."""
    method, field, value = setting
    too, beside = said.looked_up(said.TOO, *setting) or {}, companions(method, field)
    outer, _, inner = field.partition(".")
    if inner:
        value = {**beside[outer], inner: value}
    return with_base(method, {**beside, **too, outer: value})


def their_value(method: str, field: str, value: Any) -> Any:
    """Make the object of a nested configuration."""
    inner = nested(get_type_hints(their_class(method))[field])
    return inner(**value) if inner and isinstance(value, dict) else value


@cache
def adapted(method: str, text: str) -> tuple[Any, np.ndarray, dict[str, bytes]]:
    """Let Hugging Face PEFT adapt the net, and save: its model, outputs and files."""
    given = {k: their_value(method, k, v) for k, v in json.loads(text).items()}
    plain = net(DTYPE)
    torch.manual_seed(7)
    with quietly():
        theirs = peft.get_peft_model(plain, their_config(method, given)).eval()
    fill(theirs, "default", 1)
    with TemporaryDirectory() as folder, quietly():
        theirs.save_pretrained(folder)
        saved = {name: (Path(folder) / name).read_bytes() for name in FILES}
    return theirs, outputs(theirs, method), saved


def written(files: Mapping[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def baseline(setting: Setting) -> tuple[Any, np.ndarray, dict[str, bytes]]:
    method, field, _ = setting
    return adapted(method, json.dumps(with_base(method, companions(method, field))))


def same_tensors(one: Path, two: Path) -> bool:
    a, b = (read_safetensors(folder / FILES[1]) for folder in (one, two))
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


LIVE = said.Alike, said.Called, said.Idle, said.Read, type(None)
DTYPE = "float64"


def tolerance(setting: Setting) -> float:
    single = setting.method in SINGLE or setting.field.startswith("kasa_config")
    coft = setting.field in ("coft", "eps")  # a bound that is computed in single precision
    return 1e-5 if single else 1e-7 if coft else 1e-10


def test_every_field_has_a_value() -> None:
    missing = [s for s in settings() if s.value is MISSING and s.method not in said.APART]
    assert not [f"{s.method}.{s.field}" for s in missing]


@treated(*LIVE, keep=of_layers)
def test_a_setting_is_theirs(setting: Setting, tmp_path: Path) -> None:
    method, usual = setting.method, baseline(setting)
    given = complete(setting)
    theirs, y, files = adapted.__wrapped__(method, json.dumps(given))
    rtol = tolerance(setting)
    source = written(files, tmp_path / "theirs")

    adapter = Adapter.load(source)
    adapter.save(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == files[name] for name in FILES)
    compare({"y": our_outputs(adapter.to("torch"), DTYPE)}, {"y": y}, rtol)

    alike = same_tensors(source, written(usual[2], tmp_path / "usual"))
    alike = alike and np.array_equal(y, usual[1])
    expected = isinstance(treatment(setting), said.Idle | said.Alike)
    assert alike == expected, "it acts" if expected else "it changes nothing: is it Idle?"

    config, _ = config_from_dict({"peft_type": method, **given})
    if isinstance(expect := treatment(setting), said.Read):
        with pytest.raises(ConfigError, match=expect.why):
            PeftModel(state_of(net(DTYPE))).add("a", config)
        return
    mine = trained(PeftModel(state_of(net(DTYPE))).add("a", config, dtype=DTYPE))
    mine.save(tmp_path / "ours")
    with quietly():
        back = peft.PeftModel.from_pretrained(net(DTYPE), tmp_path / "ours").eval()
    compare({"y": our_outputs(mine.to("torch"), DTYPE)}, {"y": outputs(back, method)}, rtol)
    if method in UNMERGED or isinstance(treatment(setting), said.Called):
        return
    for theirs_, ours in ((theirs, adapter), (back, mine)):
        model = PeftModel(state_of(net(DTYPE)))
        model.add("a", ours)
        with quietly():
            want = state_of(theirs_.merge_and_unload())
        compare(model.merge(), {k: want[k] for k in model.weights}, rtol)


@cache
def tokenizer() -> str:
    """Save a tokenizer of a few words."""
    words = {word: i for i, word in enumerate(("[UNK]", "classify", "sort", "this"))}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    folder = mkdtemp()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    return folder


@cache
def source() -> str:
    """Save what two source tasks learnt."""
    rng = np.random.default_rng(0)
    sizes = {"prompt_embeddings": (3, 8), "prefix_task_cols": (2, 3, 1)}
    sizes["prefix_task_rows"] = 2, 1, 8
    path = Path(mkdtemp()) / "source.safetensors"
    save_file({k: rng.standard_normal(s).astype("float32") for k, s in sizes.items()}, path)
    return str(path)


@cache
def prompted(method: str, text: str) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """Let Hugging Face PEFT make a prompt: its tokens, and its files."""
    given = json.loads(text)
    given = {k: {said.TOKENIZER: tokenizer, said.SOURCE: source}.get(str(v), lambda v=v: v)()
             for k, v in given.items()}  # fmt: skip
    torch.manual_seed(7)
    config = their_config(method, given)
    with quietly():
        base = reference.prompt_model(SimpleNamespace(**given))
        theirs = peft.get_peft_model(base, config).eval()
    torch.manual_seed(4)
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    with TemporaryDirectory() as folder, quietly():
        theirs.save_pretrained(folder)
        saved = {name: (Path(folder) / name).read_bytes() for name in FILES}
    return reference.virtual_tokens(theirs), saved


def our_tokens(adapter: Adapter) -> dict[str, np.ndarray]:
    """Give a prompt, or the keys and values of a prefix, for 2 inputs."""
    config, p = adapter.config, dict(adapter.shared)
    if hasattr(config, "key_values"):
        pairs = [*enumerate(config.key_values(p, 2))]
        keys = {f"key.{i}": k for i, (k, _) in pairs}
        return keys | {f"value.{i}": v for i, (_, v) in pairs}
    tasks = {"task_ids": [config.num_tasks - 1, 0]} if hasattr(config, "num_tasks") else {}
    none = np.zeros((2, 0, config.token_dim), dtype="float32")
    parts = [config.prepend(p, none, i, **tasks) for i in range(config.submodules)]
    return {"prompt": np.concatenate(parts, axis=1)}


@treated(*LIVE, keep=lambda method: method in said.PROMPTS)
def test_a_prompts_setting_is_theirs(setting: Setting, tmp_path: Path) -> None:
    method, field, _ = setting
    given = complete(setting)
    usual = prompted(method, json.dumps(with_base(method, companions(method, field))))
    tokens, files = prompted.__wrapped__(method, json.dumps(given))
    source = written(files, tmp_path / "theirs")
    adapter = Adapter.load(source)
    adapter.save(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == files[name] for name in FILES)
    compare(our_tokens(adapter), tokens, 1e-6)
    alike = same_tensors(source, written(usual[1], tmp_path / "usual"))
    alike = alike and str(tokens) == str(usual[0])
    expected = isinstance(treatment(setting), said.Idle | said.Alike)
    assert alike == expected, "it acts" if expected else "it changes nothing: is it Idle?"

    rng = np.random.default_rng(6)
    config: Any = adapter.config
    drawn = {k: rng.standard_normal(s).astype("float32") for k, s in config.shapes().items()}
    mine = Adapter(config, shared=drawn)
    mine.save(tmp_path / "ours")
    with quietly():
        base = reference.prompt_model(config)
        back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    compare(our_tokens(mine), reference.virtual_tokens(back), 1e-6)


def edited(setting: Setting, folder: Path) -> Path:
    """Write a file of the method's usual configuration, but for one field."""
    path = written(of_method(setting.method), folder) / FILES[0]
    config = json.loads(path.read_text()) | {setting.field: setting.value}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


@cache
def of_method(method: str) -> dict[str, bytes]:
    """Give Hugging Face PEFT's files of a method's usual configuration."""
    if of_layers(method):
        return adapted(method, json.dumps(with_base(method, {})))[2]
    if method in said.PROMPTS:
        return prompted(method, json.dumps(with_base(method, {})))[1]
    with TemporaryDirectory() as folder:
        reference.run_attended(ATTENDED[0], Path(folder))
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


@treated(said.Kept)
def test_what_is_kept_is_read_alike(setting: Setting, tmp_path: Path) -> None:
    usual = Adapter.load(written(of_method(setting.method), tmp_path / "usual"))
    adapter = Adapter.load(edited(setting, tmp_path / "edited"))
    adapter.save(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "edited" / name).read_bytes()
    known = {f.name for f in fields(adapter.config)} & {setting.field}
    assert replace(usual.config, **dict.fromkeys(known, setting.value)) == adapter.config


@treated(said.Refused)
def test_what_is_refused_is_named(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=setting.field):
        Adapter.load(edited(setting, tmp_path / "edited"))


@treated(said.Never)
def test_what_never_is_peft_refuses(setting: Setting) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=treatment(setting).why):
        adapted.__wrapped__(setting.method, json.dumps(complete(setting)))


def test_what_is_compared_elsewhere_is() -> None:
    every = [*said.TREATED.values(), *said.APART.values()]
    for where in {t.test for t in every if isinstance(t, said.Elsewhere)}:
        file, _, name = where.partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), where


def test_nothing_is_said_of_what_is_not_there() -> None:
    """Every treatment, value and companion is of a field, or value, that there is."""
    there = {key for setting in settings(every_turn=True) for key in said.keys_of(*setting)}
    tables = said.TREATED, said.VALUES, said.WITH, said.TOO
    assert {key for table in tables for key in table} <= there


LEFT = {name for name in peft.PEFT_TYPE_TO_CONFIG_MAPPING if name.value not in method_names()}


def test_every_other_method_is_refused_by_name() -> None:
    assert {name.value for name in LEFT} <= {*absent()}


def test_pveras_samples_are_around_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = with_base("PVERA", {"sample_at_inference": True})
    theirs, drawn, files = adapted("PVERA", json.dumps(given))
    got = our_outputs(Adapter.load(written(files, tmp_path / "a"), backend="torch"), DTYPE)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    mean = outputs(theirs)
    compare({"y": got}, {"y": mean}, 1e-10)
    assert np.abs(drawn - mean).max() > 0.01


def has_row(setting: Setting) -> bool:
    """Whether a row of the table sets a field so: to one of its choices, or off its default."""
    method, field, value = setting
    if "." in field:
        return False  # none of a configuration within another; they are compared live
    named = value in (choices(get_type_hints(their_class(method))[field]) or OPEN.get(field, []))
    usual = default(next(f for f in fields(their_class(method)) if f.name == field))
    told = [
        getattr(case.config, field, usual)
        for case in [*CASES, *ROUTED, *PROMPTS]
        if case.config.peft_type == method
    ]
    return value in told if named else any(v != usual for v in told)


def test_every_setting_that_acts_has_a_row() -> None:
    named = [s for s in settings() if s.field not in said.SHARED]
    acting = [s for s in named if said.looked_up(said.TREATED, *s) is None]
    lacking = [s for s in acting if not has_row(s)]
    assert not [label(s) for s in lacking if not said.looked_up(said.ROWLESS, *s)]
    assert {*said.ROWLESS} <= {key for s in lacking for key in said.keys_of(*s)}

"""Rows of the table as Hugging Face PEFT sees them: torch modules, its configs, its results."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import peft.tuners.boft.layer as hf_boft
import safetensors.numpy
import torch
import transformers
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.tuners.frod import FrodLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_any.checks import OURS, alike
from peft_any.clusters import grouped
from peft_any.io.config import CONFIG_NAME, TENSORS
from peft_any.layer import EXPERTS, Dense, Site
from peft_any.registry import Config
from tests.cases import AttendedCase, Case, PromptCase, RoutedCase
from tests.hf.models import make, quietly

PREFIX = "base_model.model."
DECOMPOSED_NARROW = {"PSOFT"}
"""Methods of which Hugging Face PEFT decomposes no float64 weights: it is cast afterwards."""
OURS_ALONE = {"peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"}


class BlockDiagonal:
    """What Hugging Face PEFT's CUDA kernel does; without one it takes no butterfly factor but 1."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        """Put blocks (factors, blocks, b, b) on the diagonals of (factors, n, n)."""
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


hf_boft._FBD_CUDA = BlockDiagonal


class Groups:
    """What scikit-learn's ``KMeans`` does for Hugging Face PEFT, which asks for nothing else of it.

    Where scikit-learn is installed, `tests/hf/test_adamss.py` holds the two equal.
    """

    def __init__(self, n_clusters: int, init: str, n_init: int, max_iter: int, random_state: int):
        assert (init, n_init) == ("random", 1)
        self.given = n_clusters, max_iter, random_state

    def fit_predict(self, points: np.ndarray) -> np.ndarray:
        """Give each point's group."""
        groups: np.ndarray = grouped(points, *self.given)
        return groups


STANDS_IN = find_spec("sklearn") is None
if STANDS_IN:
    for name, more in (("sklearn", {}), ("sklearn.cluster", {"KMeans": Groups})):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(more, __spec__=ModuleSpec(name, None))


class Stack(nn.Module):
    """A stack of experts, each applied to its part of the input."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.at = site.name.rpartition(".")[2]
        self.is_transposed = site.kind == "TransposedExperts"
        self.register_parameter(self.at, nn.Parameter(torch.empty(site.stored_shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = getattr(self, self.at)
        parts = x.reshape(*x.shape[:-1], len(w), -1)
        return torch.einsum(
            f"...ei,{'eio' if self.is_transposed else 'eoi'}->...eo", parts, w
        ).flatten(-2)


def module_of(site: Site) -> str:
    """Name the module that holds a layer's weight: a stack of experts is a parameter of another."""
    return site.name.rpartition(".")[0] if site.kind in EXPERTS else site.name


def layer_module(site: Site) -> Any:
    """Make the torch module that a site describes."""
    n, m, bias = site.n_in, site.n_out, site.bias
    if site.is_conv:
        return getattr(nn, site.kind)(n, m, site.kernel, groups=site.groups, bias=bias)
    assert bias or site.kind != "Conv1D", "transformers' Conv1D always has a bias"
    make: dict[str, Callable[[], nn.Module]] = {
        "Linear": lambda: nn.Linear(n, m, bias=bias),
        "Norm": lambda: nn.LayerNorm(n, bias=bias),
        "Conv1D": lambda: Conv1D(m, n),
        "Embedding": lambda: nn.Embedding(n, m),
        "MultiheadAttention": lambda: nn.MultiheadAttention(n, 1, bias=bias),
        "Experts": lambda: Stack(site),
        "TransposedExperts": lambda: Stack(site),
    }
    return make[site.kind]()


def module_at(name: str, leaf: nn.Module) -> nn.Module:
    """Put a module under a dotted name."""
    for part in reversed(name.split(".")):
        root = nn.Module()
        root.add_module(part, leaf)
        leaf = root
    return leaf


def model_of(base: Dense) -> nn.Module:
    """Make a model that has nothing but the site's layer, with the base's numbers."""
    torch.manual_seed(0)
    site = base.site
    leaf = layer_module(site)
    model = module_at(module_of(site), leaf).to(getattr(torch, str(base.weight.dtype)))
    numbers = {site.weight: torch.tensor(np.ascontiguousarray(base.stored()))}
    if base.bias is not None:
        numbers[site.bias_name] = torch.tensor(base.bias)
    lost = model.load_state_dict(numbers, strict=False)
    assert not lost.unexpected_keys
    return model.eval()


def config_of(config: Config, **changes: Any) -> Any:
    """Make Hugging Face PEFT's configuration: only what differs from our default is passed."""
    changed = {
        f.name: asdict(value) if is_dataclass(value) else value
        for f in fields(config)
        if f.name not in OURS_ALONE and (value := getattr(config, f.name)) != _default(f)
    }
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(config.peft_type)]
    return cls(**{**copy.deepcopy(changed), **changes})


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def host(tensor: torch.Tensor) -> np.ndarray:
    """Copy to NumPy, which has no bfloat16 of its own."""
    tensor = tensor.detach()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Give a model's tensors as NumPy arrays."""
    return {k: host(v) for k, v in model.state_dict().items()}


@dataclass
class Result:
    """What Hugging Face PEFT made of a row.

    Attributes
    ----------
    folder : Path
        Where it saved the adapter, in the form that needs no second look at the base.
    raw : Path or None
        Where it saved the adapter as trained, if that changes the base.
    base, merged : dict
        State dicts without and with the adapter.
    x, y : array or None
        The layer's input and output; None where it cannot be called alone.
    """

    folder: Path | None
    raw: Path | None
    base: dict[str, np.ndarray]
    merged: dict[str, np.ndarray] = field(default_factory=dict)
    x: np.ndarray | None = None
    y: np.ndarray | None = None


def file_keys(case: Case, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name parameters as a file does."""
    own, saved = shapes_of(case), getattr(case.config, "save_projection", True)
    config: Any = case.config.at(case.site)
    shared = config.shared_shapes([case.site])
    if not saved:
        shared = {k: shape for k, shape in shared.items() if not config.is_frozen(k)}
    copies = {
        f"{PREFIX}{module_of(case.site)}.{k}": np.asarray(params[k])
        for k in (case.config.copied if saved else ())
    }
    return copies | {
        (f"{PREFIX}{module_of(case.site)}.{k}" if k in own else f"base_model.{k}"): np.asarray(v)
        for k, v in params.items()
        if k in own or k in shared
    }


def targets_of(case: Case) -> list[str] | str:
    """Say how a row's layer is named: IA³ wants feed-forward names among those of a list."""
    if getattr(case.config, "target_parameters", None):
        return []
    named: list[str] | str = case.config.target_modules or [case.site.name]
    return case.site.name if getattr(case.config, "feedforward_modules", None) else named


def trained(model: Any, case: Case, base: Dense, dtype: str) -> dict[str, torch.Tensor]:
    """Make trained-looking values for an adapter, in agreement with our names and shapes."""
    with quietly():
        state = get_peft_model_state_dict(model)
    rng = np.random.default_rng([0, 4])

    def noisy(v: torch.Tensor) -> torch.Tensor:
        return v + torch.tensor(0.2 * rng.standard_normal(tuple(v.shape)), dtype=v.dtype)

    if takes_from_base(case, base) or case.config.peft_type in LACKING:
        leaf = model.base_model.model.get_submodule(case.site.name)
        lack = held(leaf, case.config.peft_type)
        state |= {f"{PREFIX}{case.site.name}.{k}": torch.tensor(v) for k, v in lack.items()}
        shapes = {f"{PREFIX}{case.site.name}.{k}": s for k, s in shapes_of(case).items()}
        frozen = tuple(case.config.frozen)  # which `shapes` need not name
        found = {k: tuple(v.shape) for k, v in state.items()}
        found = {k: s for k, s in found.items() if k in shapes or not k.endswith(frozen)}
        assert alike(found, shapes)
        fixed = {k for k in state if k.endswith(tuple(case.config.frozen))}
        lost = {f"{PREFIX}{case.site.name}.{k}" for k in lack}
        return {k: v if k in fixed else noisy(v) for k, v in state.items() if k not in lost}
    ours = file_keys(case, case.params(base, dtype=dtype))
    other = {k: v for k, v in state.items() if ".out_proj." in k}
    theirs = {k: tuple(v.shape) for k, v in state.items() if k not in other}
    pruned = bool(getattr(case.config, "rank_pattern", None)) and "ADALORA" in case.config.peft_type
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    if not pruned:
        assert {k: v.shape for k, v in ours.items()} == theirs
    # FRoD's V is any of many, and HF keeps the U of the one that it has computed
    ours |= {k: host(v) for k, v in state.items() if k.startswith("base_model.frod_V.")}
    for key in ours:
        if case.config.is_frozen(key.removeprefix("base_model.")):
            np.testing.assert_array_equal(ours[key], host(state[key]), err_msg=key)
    values = {k: noisy(v) for k, v in other.items()}
    return {k: torch.tensor(v) for k, v in ours.items()} | values


LACKING = {"ADAMSS": "init_weights", "PSOFT": "ab_svd_init"}
"""Methods whose files lack what the layer holds, and the field that says so in ours."""


def held(leaf: Any, peft_type: str, name: str = "default") -> dict[str, np.ndarray]:
    """Give what Hugging Face PEFT's layer holds and its files lack, by our names."""
    if peft_type == "PSOFT":
        a, b = leaf._get_psoft_ab_cache_buffers(name)
        return {"psoft_A": host(a), "psoft_B": host(b)}
    if peft_type == "ADAMSS":
        return {"adamss_rows": np.argsort(host(leaf.scatter_index[name])).astype("int32")}
    return {}


def complete(folder: Path, model: Any, name: str = "default") -> None:
    """Add to a saved adapter what Hugging Face PEFT's files of its method lack, marked as ours."""
    field = LACKING.get(model.peft_config[name].peft_type.value)
    if field is None:
        return
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    for module, leaf in model.base_model.model.named_modules():
        if (
            isinstance(leaf, model.base_model.tuner_layer_cls)
            and name in leaf._get_available_adapters()
        ):
            more = held(leaf, model.peft_config[name].peft_type.value, name).items()
            tensors |= {f"{PREFIX}{module}.{k}": np.ascontiguousarray(a) for k, a in more}
    safetensors.numpy.save_file(tensors, folder / TENSORS, {"format": "pt"})
    said = json.loads((folder / CONFIG_NAME).read_text()) | {field: OURS}
    (folder / CONFIG_NAME).write_text(json.dumps(said, indent=2, sort_keys=True))


def takes_from_base(case: Case, base: Dense) -> bool:
    """Whether a row's initial values are taken out of the base."""
    kasa = getattr(case.config, "kasa_config", None)
    return kasa is None and "start_A" in case.fresh(base)


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a row's parameters."""
    config: Any = case.config.at(case.site)
    return dict(config.shapes(case.site))


def attach(case: Case, base: Dense, model: nn.Module) -> Any:
    """Give a model a fresh adapter of the row's configuration."""
    config = case.config
    given: dict[str, Any] = {"target_modules": targets_of(case)}
    if getattr(config, "feedforward_modules", ()) is None:
        given["feedforward_modules"] = []  # null asks for a guess by the model's type
    with quietly():
        return peft.get_peft_model(model, config_of(config, **given)).eval()


def adapted(case: Case, dtype: str, seed: int) -> tuple[Dense, dict[str, np.ndarray], Any]:
    """Give a row's base, its state dict, and a model of it with a fresh adapter."""
    narrow = case.config.peft_type in DECOMPOSED_NARROW
    base = case.base(seed, dtype="float32" if narrow else dtype)
    plain = model_of(base)
    state = {k: v.astype(dtype) for k, v in state_of(plain).items()}
    model = attach(case, base, plain)
    return base, state, model.to(getattr(torch, dtype)) if narrow else model


def run(case: Case, folder: Path, dtype: str = "float32", seed: int = 0) -> Result:
    """Let Hugging Face PEFT attach, fill, save, apply and merge a row's adapter."""
    base, state, model = adapted(case, dtype, seed)
    result = Result(folder / "adapter", None, state)
    starts = takes_from_base(case, base)
    if starts:
        with quietly():
            model.save_pretrained(folder / "start")
    load(model, trained(model, case, base, dtype))
    with quietly():
        if starts:
            result.raw = folder / "raw"
            model.save_pretrained(result.raw)
            if getattr(case.config, "use_dora", False):
                result.folder = None  # its conversion loses the magnitudes
            else:
                converted = copy.deepcopy(model)
                initial = str(folder / "start")
                converted.save_pretrained(
                    result.folder, path_initial_model_for_weight_conversion=initial
                )
        else:
            model.save_pretrained(result.folder)
            complete(result.folder, model)
    if not case.site.is_conv and case.site.kind != "MultiheadAttention":
        result.x = inputs(case, dtype)
        leaf = model.base_model.model.get_submodule(module_of(case.site))
        with quietly(), torch.no_grad():
            result.y = host(leaf(torch.tensor(result.x), **routing_of(case)))
        if case.site.kind == "Norm":  # what is adapted comes after the normalisation
            x = torch.tensor(result.x)
            result.x = host(nn.functional.layer_norm(x, x.shape[-1:]))
    if isinstance(case, RoutedCase):
        return result
    with quietly():
        result.merged = state_of(model.merge_and_unload())
    return result


def load(model: Any, state: dict[str, torch.Tensor], name: str = "default") -> None:
    """Set every tensor of a model's adapter."""
    with quietly():
        lost = set_peft_model_state_dict(model, state, adapter_name=name)
        now = get_peft_model_state_dict(model, adapter_name=name)
    assert not lost.unexpected_keys, lost.unexpected_keys
    assert now.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(now[key], value, rtol=0, atol=0)


def paired(model: Any) -> None:
    """Give FRoD's layers the U of the V that was loaded: HF keeps that of the V it computed."""
    for module in model.modules():
        if isinstance(module, FrodLayer):
            weight = module.get_base_layer().weight
            weight = weight.T if module.fan_in_fan_out else weight
            for name in list(module.frod_U.keys()):
                u, _ = module._calculate_frod_u_and_lambda(module.frod_V[name], weight)
                module.frod_U[name] = u.to(module.frod_U[name].dtype)


def inputs(case: Case, dtype: str) -> np.ndarray:
    """Draw the input of a row's layer."""
    rng = np.random.default_rng([0, 3])
    if case.site.kind == "Embedding":
        return rng.integers(0, case.site.n_in, (2, 3))
    lead = (2, 3) if isinstance(case, RoutedCase) else (3,)
    return rng.standard_normal((*lead, case.site.n_in)).astype(dtype)


def routing_of(case: Case) -> dict[str, torch.Tensor]:
    """Give what a call of a row's layer needs beside its input."""
    given = case.routing if isinstance(case, RoutedCase) else {}
    return {name: torch.tensor(value) for name, value in given.items()}


def prompt_model(config: Any) -> Any:
    """Make a small transformer with the sizes that a prompt's configuration names."""
    d, heads, layers = config.token_dim, config.num_attention_heads or 1, config.num_layers or 1
    torch.manual_seed(0)
    if config.task_type == "SEQ_2_SEQ_LM":
        sizes = {"d_model": d, "d_kv": d // heads, "d_ff": d, "num_heads": heads}
        return make("t5", vocab_size=20, num_layers=layers, **sizes)
    sizes = {"n_embd": d, "n_head": heads, "n_layer": layers, "n_positions": 1024}
    return make("gpt2", vocab_size=20, **sizes)


def run_prompt(case: PromptCase, folder: Path) -> dict[str, np.ndarray]:
    """Let Hugging Face PEFT make, save and lay out the virtual tokens of a row, for 2 inputs."""
    task = case.config.task_type or "CAUSAL_LM"
    with quietly():
        config = config_of(case.config, task_type=task)
        model = peft.get_peft_model(prompt_model(case.config), config).eval()
        torch.manual_seed(4)
        for parameter in model.prompt_encoder.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return virtual_tokens(model)


def virtual_tokens(model: Any) -> dict[str, np.ndarray]:
    """Give a model's prompt, or the keys and values of its prefix, for 2 inputs."""
    several = hasattr(model.active_peft_config, "num_tasks")
    last = model.active_peft_config.num_tasks - 1 if several else 0
    with quietly(), torch.no_grad():
        made = model.get_prompt(batch_size=2, task_ids=torch.tensor([last, 0]) if several else None)
    if isinstance(made, torch.Tensor):
        return {"prompt": host(made)}
    layers = getattr(made, "self_attention_cache", made).layers
    keys = {f"key.{i}": host(layer.keys) for i, layer in enumerate(layers)}
    return keys | {f"value.{i}": host(layer.values) for i, layer in enumerate(layers)}


def config_text(folder: Path) -> str:
    """Read a saved configuration, and see that it names no path of this machine."""
    text = (folder / "adapter_config.json").read_text()
    assert not Path(json.loads(text)["base_model_name_or_path"] or "").is_absolute()
    return text


def attended_model(case: AttendedCase, dtype: str = "float32") -> Any:
    """Make a small transformer of a row's architecture, its adapter's numbers not yet set."""
    sizes = {"vocab_size": 20, "initializer_range": 0.4}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        case.model,
        hidden_size=case.width,
        num_attention_heads=case.heads,
        num_hidden_layers=3,
        **({} if case.model == "gpt2" else {"num_key_value_heads": case.groups}),
        **({} if case.model == "gpt2" else {"intermediate_size": 8}),
        **sizes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(getattr(torch, dtype)).eval()


def run_attended(case: AttendedCase, folder: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Let Hugging Face PEFT make, fill and save a row's prompts, and apply the last block's."""
    with quietly():
        config = config_of(case.config, task_type="CAUSAL_LM")
        model = peft.get_peft_model(attended_model(case, dtype), config)
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.data.add_(torch.randn_like(parameter))
        model.save_pretrained(folder)
    return within_attention(model.base_model.model, case)


def within_attention(model: Any, case: AttendedCase) -> dict[str, np.ndarray]:
    """Give what the last block's attention reads and gives, and its projections."""
    (name,) = [n for n, _ in model.named_modules() if n.endswith(("2.self_attn", "2.attn"))]
    adapted, seen = model.get_submodule(name), {}

    def watch(key: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            seen.update({key: out[0], "args": args, "kwargs": kwargs})

        return hook

    adapted.model.register_forward_hook(watch("y0"), with_kwargs=True)
    adapted.register_forward_hook(watch("y"), with_kwargs=True)
    queries = TRANSFORMERS_MODEL_CONFIG[case.model].compute_query_states
    given = torch.arange(8).reshape(2, 4)
    with quietly(), torch.no_grad():
        model(given)
        if case.model == "gpt2":
            x = seen["args"][0] if seen["args"] else seen["kwargs"]["hidden_states"]
            q = queries(adapted.model, hidden_states=x)
            _, k, v = adapted.model.c_attn.weight.T.chunk(3)
            _, kb, vb = adapted.model.c_attn.bias.chunk(3)
            found = {"k": k, "v": v, "k_bias": kb, "v_bias": vb}
        else:
            q = queries(adapted.model, **seen["kwargs"])
            found = {n: getattr(adapted.model, f"{n}_proj").weight for n in "kvo"}
    found |= {"q": q, "y0": seen["y0"], "y": seen["y"]}
    return {key: host(value.contiguous()) for key, value in found.items()}

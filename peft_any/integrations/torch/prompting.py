"""Virtual tokens on transformers' models: prompts before the embedded input, prefixes in the cache.

What grows with them (masks, labels, positions) grows as Hugging Face PEFT has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from peft_any.completing import Placed
from peft_any.errors import ConfigError
from peft_any.integrations.torch.slot import Share, slot_of
from peft_any.integrations.torch.tensors import PROMPT, Arrays
from peft_any.method import Prompt
from peft_any.prompts import extend_mask

Given = dict[str, Any]
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""A prompt's sizes by their names in transformers' configurations."""
_CACHED = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""Methods that put keys and values into the cache; the others put rows before the input."""
_UNTYPED = frozenset({"CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"})
"""Tasks in which Hugging Face PEFT leaves out the types of tokens."""
_ENCODING: ContextVar[frozenset[int]] = ContextVar("_ENCODING", default=frozenset())
"""The modules whose generation has put the rows there already: of this thread alone."""


def sized(config: Prompt, module: nn.Module) -> Prompt:
    """Fill in the sizes that a configuration leaves to the model.

    Raises
    ------
    ConfigError
        If the module is none of transformers' that takes embedded input.
    """
    model = _configuration(module, config)
    found: dict[str, Any] = {}
    for field, names in _SIZES.items():
        known = [n for name in names if isinstance(n := getattr(model, name, None), int)]
        if getattr(config, field) is None and known:
            found[field] = known[0]
    made = replace(config, **found)
    if config.peft_type in _CACHED and {"token_dim", "num_attention_heads"} <= found.keys():
        heads = getattr(model, "num_key_value_heads", None) or found["num_attention_heads"]
        told = getattr(model, "head_dim", None) or getattr(model, "d_kv", None)
        width = told or found["token_dim"] // found["num_attention_heads"]
        made = replace(made, token_dim=width * heads, num_attention_heads=heads)
    return made


def _configuration(module: nn.Module, config: Prompt) -> Any:
    model = getattr(module, "config", None)
    if model is None or not hasattr(module, "get_input_embeddings"):
        raise ConfigError(
            f"{config.where}: a {type(module).__name__} cannot take a prompt: it is none of "
            "transformers' models; call the method's own functions (prepend, key_values)"
        )
    return model.get_text_config() if hasattr(model, "get_text_config") else model


def open_prompt(module: nn.Module, name: str, placed: Placed) -> Share:
    """Let a module take a prompt.

    Raises
    ------
    ConfigError
        If it takes one already, has a forward of another kind, or the prompt does not fit it.
    """
    config: Any = placed.adapter.config
    _configuration(module, config)
    if PROMPT in module._modules:  # noqa: SLF001 - getattr raises for most modules
        raise ConfigError(f"adapter {name!r}: the module takes a prompt already: detach it first")
    if slot_of(module) is not None or "forward" in vars(module):
        raise ConfigError(f"adapter {name!r}: the module's forward was replaced: undo that first")
    table = placed.adapter.shared
    if config.peft_type not in _CACHED:
        width = module.get_input_embeddings().weight.shape[1]
        if width != config.token_dim:
            raise ConfigError(
                f"adapter {name!r}: a prompt of token_dim={config.token_dim} cannot stand before "
                f"embeddings of width {width}"
            )
    share = Share(name, "")
    share.prompt = config
    share.shared = Arrays(table, placed.adapter.trainable().get("", {}))
    holder = nn.Module()
    holder.share = share
    module.add_module(PROMPT, holder)
    forward: Any = partial(_prompted, module)
    forward.__signature__ = _announced(_signature(module), config)
    module.forward = forward
    if _encodes(module, config):
        module.generate = partial(_generated, module)
    return share


def close_prompt(module: nn.Module, name: str) -> None:
    """Make a module that takes a prompt of this name what it was."""
    holder = module._modules.get(PROMPT)  # noqa: SLF001 - getattr raises for most modules
    if holder is not None and holder.share.adapter == name:
        del module._modules[PROMPT], module.forward  # noqa: SLF001 - as delattr would
        vars(module).pop("generate", None)


def _encodes(module: nn.Module, config: Prompt) -> bool:
    """Whether rows stand before an encoder, which generation calls past the model's forward."""
    two = bool(getattr(module.config, "is_encoder_decoder", False))
    return two and config.peft_type not in _CACHED and hasattr(module, "generate")


def _signature(module: nn.Module) -> inspect.Signature:
    """Say what the forward of a module's class takes: generation looks."""
    full = inspect.signature(type(module).forward)
    plain = [p.replace(annotation=p.empty) for p in [*full.parameters.values()][1:]]
    return inspect.Signature(plain)


def _announced(signature: inspect.Signature, config: Prompt) -> inspect.Signature:
    """Add what a call can tell the method beside what the model takes."""
    more = {"MULTITASK_PROMPT_TUNING": "task_ids", "CPT": "input_type_mask"}.get(config.peft_type)
    if more is None:
        return signature
    known = [*signature.parameters.values()]
    extra = inspect.Parameter(more, inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(known) - (known[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*known[:at], extra, *known[at:]])


def _prompted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of the module's class, with virtual tokens."""
    share: Any = module.get_submodule(PROMPT).share
    config = share.prompt
    if not share.on or id(module) in _ENCODING.get():
        return type(module).forward(module, *args, **kwargs)
    more = {k: kwargs.pop(k) for k in ("task_ids", "input_type_mask") if k in kwargs}
    bound = _signature(module).bind_partial(*args, **kwargs)
    given: Given = dict(bound.arguments)
    for key, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(key, {})
    call = _Call(module, config, share.params, more.get("task_ids"))
    if config.peft_type in _CACHED:
        if module.training and any(
            getattr(m, "gradient_checkpointing", 0) for m in module.modules()
        ):
            raise ConfigError(
                f"adapter {share.adapter!r}: {config.peft_type} cannot train with gradient "
                "checkpointing, under which a model keeps no cache to hold it: call "
                "gradient_checkpointing_disable(), or take a method that puts rows before the input"
            )
        out = type(module).forward(module, **call.prefixed(given))
        if given.get("use_cache") is False and hasattr(out, "past_key_values"):
            out.past_key_values = None  # a loop would take it for one that holds what came before
        return out
    labels = given.pop("labels", None) if config.peft_type == "CPT" else None
    out = type(module).forward(module, **call.preceded(given))
    if labels is not None:
        out.loss = config.loss(out.logits, labels, more.get("input_type_mask"))
    return out


def _generated(module: nn.Module, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Generate from the encoder's lengthened input, as Hugging Face PEFT does."""
    share: Any = module.get_submodule(PROMPT).share
    generate: Any = type(module).generate
    if not share.on:
        return generate(module, inputs, *args, **kwargs)
    tasks = kwargs.pop("task_ids", None)
    given = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
    call = _Call(module, share.prompt, share.params, tasks)
    given = call.lengthened(given)
    before = _ENCODING.set(_ENCODING.get() | {id(module)})
    try:
        return generate(module, None, *args, **given)
    finally:
        _ENCODING.reset(before)


class _Call:
    """One call of a model that takes virtual tokens."""

    def __init__(
        self, module: nn.Module, config: Any, params: Mapping[str, Tensor], tasks: Any
    ) -> None:
        self.module, self.config, self.params = module, config, dict(params)
        self.count = config.size("num_virtual_tokens")
        self.two = bool(getattr(module.config, "is_encoder_decoder", False))
        self.tasks = {} if tasks is None else {"task_ids": tasks}

    def prefixed(self, given: Given) -> Given:
        """Put keys and values before those of every layer, once for each cache."""
        mask = "decoder_attention_mask" if self.two else "attention_mask"
        given = self._typed(self._masked(given, mask), 0)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.count
        if given.get("cache_position") is not None and _empty(given.get("past_key_values")):
            given["cache_position"] = given["cache_position"] + self.count
        if _empty(given.get("past_key_values")):
            given["past_key_values"] = self._cache(_batch(given))
        return given

    def _cache(self, batch: int) -> Any:
        made = import_module("transformers")
        dtype = next(p.dtype for p in self.module.parameters() if p.is_floating_point())
        pairs = self.config.key_values(self.params, batch)
        cache = made.DynamicCache([(k.to(dtype), v.to(dtype)) for k, v in pairs])
        if not self.two:
            return cache
        return made.EncoderDecoderCache(cache, made.DynamicCache())

    def preceded(self, given: Given) -> Given:
        """Put rows before the embedded input; later calls on its cache only see it in the mask."""
        if self.two and given.get("encoder_outputs") is not None:
            raise ConfigError(
                f"{self.config.where}: encoder_outputs cannot be taken: they may have been made "
                "without the prompt; give input_ids or inputs_embeds, or call model.generate"
            )
        first = self.two or _empty(given.get("past_key_values"))
        given = self.lengthened(given) if first else self._masked(given, "attention_mask")
        for name in ("position_ids", "cache_position"):  # counted anew, the prompt's included
            if given.get(name) is not None:
                given[name] = None
        if given.get("cache_position", 0) is None:
            del given["cache_position"]
        given = self._typed(given, self.count if first else 0)
        if not first:
            return given
        return self._decoded(given) if self.two else self._labelled(given)

    def lengthened(self, given: Given) -> Given:
        """Put rows before the input and its mask."""
        given = self._masked(given, "attention_mask")
        embeds = self._embedded(given, "input_ids", "inputs_embeds")
        given["inputs_embeds"] = self.config.prepend(self.params, embeds, **self.tasks)
        return given

    def _typed(self, given: Given, more: int) -> Given:
        """Lengthen the types of tokens where there are some: 0 stands for the virtual ones."""
        types = given.get("token_type_ids")
        if types is None:
            return given
        untyped = self.config.task_type in _UNTYPED
        return {**given, "token_type_ids": None if untyped else extend_mask(types, more, 0)}

    def _labelled(self, given: Given) -> Given:
        """Lengthen labels of tokens; those of whole inputs stay."""
        labels = given.get("labels")
        whole = self.config.task_type in ("SEQ_CLS", "QUESTION_ANS")
        if labels is not None and labels.ndim == 2 and not whole:
            given["labels"] = extend_mask(labels, self.count, -100)
        return given

    def _decoded(self, given: Given) -> Given:
        """Put a multitask prompt before the decoder's input too."""
        if self.config.peft_type != "MULTITASK_PROMPT_TUNING" or self.config.submodules < 2:
            return given
        labels = given.get("labels")
        known = [given.get(f"decoder_{k}") for k in ("input_ids", "inputs_embeds")]
        if labels is not None and all(x is None for x in known):
            given["decoder_input_ids"] = self._shifted(labels)
        embeds = self._embedded(given, "decoder_input_ids", "decoder_inputs_embeds")
        given["decoder_inputs_embeds"] = self.config.prepend(
            self.params, embeds, submodule=1, **self.tasks
        )
        if labels is not None:
            given["labels"] = extend_mask(labels, self.count, -100)
        return self._masked(given, "decoder_attention_mask")

    def _shifted(self, labels: Tensor) -> Tensor:
        """Give the decoder's input that labels stand for: each one place later."""
        start, pad = (
            getattr(self.module.config, f"{name}_token_id", None)
            for name in ("decoder_start", "pad")
        )
        if start is None or pad is None:
            raise ConfigError(
                f"{self.config.where}: labels alone do not tell the decoder's input: give "
                "decoder_input_ids, or set the model's decoder_start_token_id and pad_token_id"
            )
        later = labels.roll(1, dims=-1)
        later[..., 0] = start
        return later.masked_fill(later == -100, pad)

    def _embedded(self, given: Given, ids: str, embeds: str) -> Tensor:
        """Embed tokens, and take their numbers away."""
        found: Tensor | None = given.get(embeds)
        numbers = given.pop(ids, None)
        if found is None:
            if numbers is None:
                raise ConfigError(f"{self.config.where}: neither {ids} nor {embeds} was given")
            found = self.module.get_input_embeddings()(numbers)
        assert found is not None  # noqa: S101 - it was just made
        return found

    def _masked(self, given: Given, name: str) -> Given:
        mask = given.get(name)
        if mask is None:
            return given
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ConfigError(
                f"{self.config.where}: {name} cannot be lengthened: give one of two axes (batch, "
                "tokens), and generate with the default cache"
            )
        return {**given, name: extend_mask(mask, self.count)}


def _empty(cache: Any) -> bool:
    return cache is None or int(cache.get_seq_length()) == 0


def _batch(given: Given) -> int:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if given.get(name) is not None:
            return int(given[name].shape[0])
    raise ConfigError("a prefix: no input was given, so that its batch is not known")

"""Parameter-efficient fine-tuning adapters for every array library.

Names are loaded when they are first used, so that ``import peft_any`` costs little more than
``import numpy``. A method's configuration class is found by its name (``peft_any.LoraConfig``
is ``peft_any.methods.lora.LoraConfig``).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Bound at once: loaded later, the module of the same name would stand in its place.
from peft_any.backend import backend as backend

if TYPE_CHECKING:
    from peft_any._jaxpr import without_merging as without_merging
    from peft_any.adapter import Adapter as Adapter
    from peft_any.algebra.combining import combine as combine
    from peft_any.algebra.converting import convert as convert
    from peft_any.algebra.resizing import resize as resize
    from peft_any.autodiff import grad as grad
    from peft_any.autodiff import value_and_grad as value_and_grad
    from peft_any.autodiff import vjp as vjp
    from peft_any.backend import Backend as Backend
    from peft_any.backend import detach as detach
    from peft_any.backend import move as move
    from peft_any.backend import resolve as resolve
    from peft_any.bank.padding import pad_to_rank as pad_to_rank
    from peft_any.bank.store import AdapterStore as AdapterStore
    from peft_any.custom import custom_vjp as custom_vjp
    from peft_any.custom import remat as remat
    from peft_any.errors import BackendError as BackendError
    from peft_any.errors import ConfigError as ConfigError
    from peft_any.errors import FormatError as FormatError
    from peft_any.errors import GradientError as GradientError
    from peft_any.errors import Irreversible as Irreversible
    from peft_any.errors import PeftError as PeftError
    from peft_any.errors import ShapeError as ShapeError
    from peft_any.errors import StorageError as StorageError
    from peft_any.errors import TargetError as TargetError
    from peft_any.errors import VerifyError as VerifyError
    from peft_any.io.config import config_from_json as config_from_json
    from peft_any.io.safetensors import read_safetensors as read_safetensors
    from peft_any.io.safetensors import write_safetensors as write_safetensors
    from peft_any.layer import Dense as Dense
    from peft_any.layer import Site as Site
    from peft_any.method import Additive as Additive
    from peft_any.method import Prompt as Prompt
    from peft_any.method import Tuner as Tuner
    from peft_any.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from peft_any.methods.adamss import AdamssConfig as AdamssConfig
    from peft_any.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from peft_any.methods.beft import BeftConfig as BeftConfig
    from peft_any.methods.boft import BOFTConfig as BOFTConfig
    from peft_any.methods.c3a import C3AConfig as C3AConfig
    from peft_any.methods.cartridge import CartridgeConfig as CartridgeConfig
    from peft_any.methods.cpt import CPTConfig as CPTConfig
    from peft_any.methods.deft import DeftConfig as DeftConfig
    from peft_any.methods.delora import DeloraConfig as DeloraConfig
    from peft_any.methods.fourierft import FourierFTConfig as FourierFTConfig
    from peft_any.methods.frod import FrodConfig as FrodConfig
    from peft_any.methods.glora import GloraConfig as GloraConfig
    from peft_any.methods.gralora import GraloraConfig as GraloraConfig
    from peft_any.methods.hira import HiraConfig as HiraConfig
    from peft_any.methods.hra import HRAConfig as HRAConfig
    from peft_any.methods.ia3 import IA3Config as IA3Config
    from peft_any.methods.lily import LilyConfig as LilyConfig
    from peft_any.methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from peft_any.methods.loha import LoHaConfig as LoHaConfig
    from peft_any.methods.lokr import LoKrConfig as LoKrConfig
    from peft_any.methods.lora import LoraConfig as LoraConfig
    from peft_any.methods.miss import MissConfig as MissConfig
    from peft_any.methods.multitask_prompt_tuning import (
        MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
    )
    from peft_any.methods.oft import OFTConfig as OFTConfig
    from peft_any.methods.osf import OSFConfig as OSFConfig
    from peft_any.methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from peft_any.methods.peanut import PeanutConfig as PeanutConfig
    from peft_any.methods.poly import PolyConfig as PolyConfig
    from peft_any.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from peft_any.methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from peft_any.methods.psoft import PsoftConfig as PsoftConfig
    from peft_any.methods.pvera import PveraConfig as PveraConfig
    from peft_any.methods.randlora import RandLoraConfig as RandLoraConfig
    from peft_any.methods.road import RoadConfig as RoadConfig
    from peft_any.methods.shira import ShiraConfig as ShiraConfig
    from peft_any.methods.supertuning import SupertuningConfig as SupertuningConfig
    from peft_any.methods.tinylora import TinyLoraConfig as TinyLoraConfig
    from peft_any.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from peft_any.methods.unilora import UniLoraConfig as UniLoraConfig
    from peft_any.methods.vblora import VBLoRAConfig as VBLoRAConfig
    from peft_any.methods.vera import VeraConfig as VeraConfig
    from peft_any.methods.waveft import WaveFTConfig as WaveFTConfig
    from peft_any.methods.xlora import XLoraConfig as XLoraConfig
    from peft_any.model import PeftModel as PeftModel
    from peft_any.oneshot import merge as merge
    from peft_any.oneshot import stack as stack
    from peft_any.oneshot import unmerge as unmerge
    from peft_any.registry import method_for as method_for
    from peft_any.replication import replicate_layers as replicate_layers
    from peft_any.surgery.comparison import diff as diff
    from peft_any.surgery.extraction import extract as extract
    from peft_any.surgery.inspection import inspect_adapter as inspect_adapter
    from peft_any.surgery.merge import merge_checkpoint as merge_checkpoint
    from peft_any.surgery.repeating import replicate_checkpoint as replicate_checkpoint
    from peft_any.surgery.verify import verify_checkpoint as verify_checkpoint
    from peft_any.train import fit as fit

__version__ = "0.1.0"

_HOMES = {
    "_jaxpr": "without_merging",
    "adapter": "Adapter",
    "algebra.combining": "combine",
    "algebra.converting": "convert",
    "algebra.resizing": "resize",
    "autodiff": "grad value_and_grad vjp",
    "backend": "Backend backend detach move resolve",
    "bank.padding": "pad_to_rank",
    "bank.store": "AdapterStore",
    "custom": "custom_vjp remat",
    "errors": "BackendError ConfigError FormatError GradientError Irreversible PeftError "
    "ShapeError StorageError TargetError VerifyError",
    "io.config": "config_from_json",
    "io.safetensors": "read_safetensors write_safetensors",
    "layer": "Dense Site",
    "method": "Additive Prompt Tuner",
    "model": "PeftModel",
    "oneshot": "merge stack unmerge",
    "registry": "method_for",
    "replication": "replicate_layers",
    "train": "fit",
    "surgery.comparison": "diff",
    "surgery.extraction": "extract",
    "surgery.inspection": "inspect_adapter",
    "surgery.merge": "merge_checkpoint",
    "surgery.repeating": "replicate_checkpoint",
    "surgery.verify": "verify_checkpoint",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)  # noqa: PLE0605 - computed, so that a name is written once


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"peft_any.{_HOME[name]}"), name)
    elif name.endswith("Config"):
        from peft_any.registry import config_class  # noqa: PLC0415 - loads a method on demand

        value = config_class(name)
    else:
        package = sys.modules[__name__]
        raise AttributeError(f"module 'peft_any' has no attribute {name!r}", name=name, obj=package)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from peft_any.registry import method_for, method_names  # noqa: PLC0415 - loads every method

    return sorted({*globals(), *__all__, *(method_for(name).__name__ for name in method_names())})

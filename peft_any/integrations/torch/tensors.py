"""A module's tensors and layers by name, as a checkpoint has them; arrays kept in a module."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from peft_any.backend import dtype_name
from peft_any.errors import TargetError
from peft_any.layer import CONVOLUTIONS as KINDS
from peft_any.layer import Kind, Site

CHILD = "peft_any"
"""Name of the child that holds adapters, in every adapted module."""
PROMPT = "peft_any_prompt"
"""Name of the child that holds a prompt, in the module that takes it."""
CONVOLUTIONS: dict[type[nn.Module], Kind] = dict(
    zip((nn.Conv1d, nn.Conv2d, nn.Conv3d), KINDS, strict=True)
)
"""torch's classes of convolutions."""
_UNKNOWN = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear),
    *(nn.RNNBase, nn.RNNCellBase),
)
"""Its classes that have matrices or kernels, but not as layers that adapters know."""
COMPUTED = (
    "its weight is computed from others (a parametrisation, such as weight_norm): remove that "
    "first (torch.nn.utils.parametrize.remove_parametrizations, "
    "torch.nn.utils.remove_weight_norm), or leave the layer out"
)


def modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give every module by its first name, as Hugging Face PEFT does, but no adapters."""
    for name, module in root.named_modules():
        if not {CHILD, PROMPT} & {*name.split(".")}:
            yield name, module


def tensors(root: nn.Module) -> dict[str, Tensor]:
    """Give a module's tensors under their checkpoint names; tied ones under each of theirs."""
    found: dict[str, Tensor] = {}
    for name, module in modules(root):
        stem = f"{name}." if name else ""
        kept = module._buffers.items()  # noqa: SLF001 - the only list of them by module
        here: dict[str, Tensor] = {
            **dict(module.named_parameters(recurse=False, remove_duplicate=False))
        }
        for key, array in here.items():
            if is_lazy(array):
                raise TargetError(
                    f"{stem}{key}: cannot be read: the layer is lazy and has no sizes yet: call "
                    "the module on an input first"
                )
        here |= {
            key: buffer
            for key, buffer in kept
            if buffer is not None and key not in module._non_persistent_buffers_set  # noqa: SLF001
        }
        found |= {stem + key: tensor.detach() for key, tensor in here.items()}
    return found


def names_of(root: nn.Module) -> dict[int, list[str]]:
    """Give the names of every tensor, by its identity: a tied one has several."""
    found: dict[int, list[str]] = {}
    for name, module in modules(root):
        own = {**module._parameters, **module._buffers}  # noqa: SLF001 - named_… drop doubles
        for key, array in own.items():
            if array is not None:
                found.setdefault(id(array), []).append(f"{name}.{key}" if name else key)
    return found


def sites(root: nn.Module) -> dict[str, Site]:
    """Give the layers whose class tells what they are, by module name."""
    found = ((name, _site(name, module)) for name, module in modules(root))
    return {name: site for name, site in found if site is not None}


def refused(root: nn.Module) -> dict[str, tuple[Site, str]]:
    """Give the layers that cannot be adapted: what each passes for, and why."""
    found = {}
    for name, module in modules(root):
        if isinstance(module, _UNKNOWN):
            passes = Site(name, 1, 1, "Conv1d", (1,))
            why = (
                f"it is of the class {type(module).__name__}, which no adapter knows: train it "
                f"whole (modules_to_save=[{name.rpartition('.')[2]!r}]), or leave it out"
            )
            found[name] = passes, why
        elif (site := _described(name, module)) is not None and not _holds_weight(module):
            found[name] = site, COMPUTED
        elif site is not None and not (kept := _weight(module)).is_floating_point():
            why = (
                f"its weight is of {dtype_name(kept)}, as quantised ones are: load the model "
                "unquantised, or leave the layer out"
            )
            found[name] = site, why
    return found


def _holds_weight(module: nn.Module) -> bool:
    name = _weight_name(module)
    return name in module._parameters or name in module._buffers  # noqa: SLF001 - both are public state


def _weight_name(module: nn.Module) -> str:
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def _weight(module: nn.Module) -> Tensor:
    found: Tensor = getattr(module, _weight_name(module))
    return found


def _site(name: str, module: nn.Module) -> Site | None:
    return _described(name, module) if _holds_weight(module) else None


def _described(name: str, module: nn.Module) -> Site | None:
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Site(name, module.in_features, module.out_features, bias=bias)
    if isinstance(module, nn.Embedding):
        return Site(name, module.num_embeddings, module.embedding_dim, "Embedding", bias=False)
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        d, bias = module.embed_dim, module.in_proj_bias is not None
        return Site(name, d, 3 * d, "MultiheadAttention", bias=bias)
    kind = next((k for cls, k in CONVOLUTIONS.items() if isinstance(module, cls)), None)
    if kind is not None:
        sizes, kernel = (module.in_channels, module.out_channels), tuple(module.kernel_size)
        return Site(name, *sizes, kind, kernel, module.groups, bias)
    if is_transposed(module):
        n_in, n_out = module.weight.shape
        return Site(name, n_in, n_out, "Conv1D", bias=bias)
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: told by its name, so that none is imported."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


class Arrays(nn.Module):
    """Arrays by dotted names, as parameters and buffers that no ``state_dict`` shows.

    Parameters
    ----------
    arrays : mapping of str to Tensor
    trained : collection of str
        Which are parameters; the others are buffers, which move with the module but are fixed.
    """

    def __init__(self, arrays: Mapping[str, Tensor], trained: Collection[str] = ()) -> None:
        super().__init__()
        self.names = tuple(arrays)
        for name, array in arrays.items():
            *path, last = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:  # noqa: SLF001 - hasattr would find methods too
                    node.add_module(part, Arrays({}))
                node = node.get_submodule(part)
            if name in trained:
                node.register_parameter(last, nn.Parameter(array.detach().clone()))
            else:
                node.register_buffer(last, array.detach().clone(), persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        *path, last = name.split(".")
        found: Tensor = getattr(self.get_submodule(".".join(path)), last)
        return found

    def repeat(self, name: str, other: Arrays) -> None:
        """Hold another's parameter of the same name itself, in the place of the own array."""
        *path, last = name.split(".")
        node = self.get_submodule(".".join(path))
        delattr(node, last)
        node.register_parameter(last, other.get_submodule(".".join(path)).get_parameter(last))

    def arrays(self) -> dict[str, Tensor]:
        """Give the arrays themselves, by name."""
        return {name: self[name] for name in self.names}

    def snapshot(self) -> dict[str, Tensor]:
        """Give copies that no training changes any more."""
        return {name: array.detach().clone() for name, array in self.arrays().items()}

    def _save_to_state_dict(self, *_: object) -> None:
        """Stay out of checkpoints of the base."""

    def _load_from_state_dict(self, *_: object) -> None:
        """Miss nothing in checkpoints of the base."""

"""An adapter: a configuration, the parameters of its sites, and what else its file carries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Self

from peft_any._typing import Array, Params
from peft_any.arguments import methods_checked
from peft_any.backend import Backend, astype, backend_of, dtype_name, from_numpy, move, resolve
from peft_any.errors import FormatError
from peft_any.extras import (
    check_copies,
    fresh_copies,
    non_finite,
    refuse_faults,
    trained,
)
from peft_any.io import config as files
from peft_any.io._atomic import StrPath, output_directory
from peft_any.io._json import read_json
from peft_any.io.keys import Place, read_keys, refuse_others, refuse_unknown, write_key
from peft_any.io.safetensors import write_safetensors
from peft_any.layer import Kind, Site
from peft_any.method import Prompt, Tuner
from peft_any.naming import nesting, regrouping, renaming
from peft_any.projections import held
from peft_any.registry import Config
from peft_any.rng import Fresh
from peft_any.selection import out_projection
from peft_any.targets import place
from peft_any.tokens import token_indices, with_rows


@methods_checked("load", "save", "renamed", "split", "fused", "check")
@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """What an adapter directory holds.

    Attributes
    ----------
    config : Config
    sites : dict {module: {suffix: array}}
        The method's parameters under the checkpoint's own suffixes.
    shared : dict of str to array
        What all sites share (VeRA's projections), or what a prompt trains.
    extra : dict of str to array
        New values of whole base tensors, by the base's names: `modules_to_save`, biases,
        embeddings.
    tokens : dict of str to array (k, width)
        New rows of embeddings, by module; `config.trainable_token_indices` says which.
    metadata : dict of str to str
        The tensor file's.
    raw : dict, optional
        The configuration file as it was read: what `save` starts from.
    spare : dict of str to array
        Tensors of the file without effect, by key: carried along.
    notes : tuple of str
        What a reader should know: fields without effect, what was let pass with `strict` false.
    """

    config: Config
    sites: Mapping[str, Params] = field(default_factory=dict)
    shared: Params = field(default_factory=dict)
    extra: Params = field(default_factory=dict)
    tokens: Params = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    raw: Mapping[str, Any] | None = None
    spare: Params = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_others(self)

    def __repr__(self) -> str:
        where = f"{self.num_parameters:,} parameters at {len(self.sites)} layers"
        return f"<Adapter {self.config.peft_type}: {where}>"

    @classmethod
    def load(
        cls,
        path: StrPath,
        backend: str | Backend = "numpy",
        config: Config | None = None,
        *,
        strict: bool = True,
        mapped: bool = False,
    ) -> Self:
        """Read an adapter directory of Hugging Face PEFT's, or its tensor file.

        Parameters
        ----------
        path : path
            A directory with ``adapter_config.json``, or a safetensors file; or a URL of one.
        backend : str or Backend
            Where the arrays go.
        config : Config, optional
            In place of the file's; needed where there is none.
        strict : bool
            Whether a tensor that belongs nowhere is an error, or carried in `spare`, with a note.
        mapped : bool
            Whether NumPy's arrays are views of the file: it must not be shortened then.

        Raises
        ------
        ConfigError, FormatError, StorageError
            If a file is missing, malformed, a pickle, or of an unsupported method.
        ShapeError, TargetError
            Listing the tensors that cannot be an adapter's.
        """
        to, raw, notes = resolve(backend), None, []
        with files.fetched(path) as here:
            tensors, found = files.find_adapter(here, configured=config is not None)
            if config is None:
                raw = files.renewed(read_json(found))
                config, more = files.config_from_dict(raw, str(found))
                notes = files.unheard(more, found.name)
            files.refuse_unconverted(config, str(found))
            with files.opened(tensors) as file:
                host = {key: file[key] if mapped else file[key].copy() for key in file}
            host |= files.lost_layers(config, tensors, host)
            arrays = {key: from_numpy(array, to) for key, array in host.items()}
            places, unknown = read_keys(config, arrays)
            refuse_unknown(str(tensors), unknown if strict else [])
            adapter = cls._sorted(config, arrays, places)
            refuse_faults(adapter, str(tensors))
            return adapter.replace(metadata=dict(file.metadata), raw=raw, notes=(*notes, *unknown))

    @classmethod
    def _sorted(
        cls, config: Config, arrays: Mapping[str, Array], places: Mapping[str, Place]
    ) -> Self:
        sites: dict[str, Params] = {}
        parts: dict[str, Params] = {"shared": {}, "copy": {}, "tokens": {}, "spare": {}}
        for key, array in arrays.items():
            to = places.get(key, Place("spare", ""))
            if to.part == "site":
                sites.setdefault(to.module, {})[to.name] = array
            else:
                name = key if to.part == "spare" else to.module or to.name
                parts[to.part][name] = array
        shared, extra, tokens, spare = parts.values()
        return cls(config, sites, shared, extra, tokens, spare=spare)

    def save(self, path: StrPath, *, overwrite: bool = False) -> None:
        """Write an adapter directory as Hugging Face PEFT lays it out, whole or not at all.

        A loaded adapter comes out byte for byte as it was, but for what was changed.

        Parameters
        ----------
        path : path
        overwrite : bool
            Whether an existing directory may be replaced.

        Raises
        ------
        ConfigError, StorageError
            If the configuration cannot be written, or the directory exists or cannot be.

        Examples
        --------
        >>> import numpy as np, tempfile
        >>> from peft_any.methods.ia3 import IA3Config
        >>> config = IA3Config(target_modules=["fc"], feedforward_modules=[])
        >>> adapter = Adapter(config, {"fc": {"ia3_l": np.ones((3, 1), "float32")}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter.save(f"{folder}/a")
        ...     Adapter.load(f"{folder}/a").num_parameters
        3
        """
        config, sites = self.config, self.sites
        if isinstance(config, Tuner):
            config, sites = config.portable(sites)
            unnamed = config.target_modules in (None, "all-linear") and self.raw is None
            if unnamed and "target_modules" not in config.unsaid:
                names = [n for n in sites if n not in map(out_projection, sites)]
                config = replace(config, target_modules=sorted(names))
        text = files.config_to_json(config, self.raw)
        tensors = self._named(config, sites)
        with output_directory(path, overwrite) as folder:
            (folder / files.CONFIG_NAME).write_text(text, encoding="utf-8")
            write_safetensors(folder / files.TENSORS, tensors, self.metadata)

    def _named(self, config: Config, sites: Mapping[str, Params]) -> Params:
        """Give every tensor its key in the file."""

        def key(part: Any, module: str, name: str = "") -> str:
            place = Place(part, filed.get(module, module), name)
            return write_key(config, place, sites, self.tokens)

        filed = nesting.nested(config, sites)
        whole = getattr(config, "save_projection", True)
        saved = {n: a for n, a in self.shared.items() if whole or not config.is_frozen(n)}
        shared = config.portable(saved) if isinstance(config, Prompt) else saved
        again = {n: a for n, a in shared.items() if n in getattr(config, "copied", ())}
        out = {key("site", s, n): a for s, p in sites.items() for n, a in (again | p).items()}
        out |= {key("shared", "", name): a for name, a in shared.items()}
        out |= {key("copy", "", name): a for name, a in self.extra.items()}
        out |= {key("tokens", module): a for module, a in self.tokens.items()}
        return self.spare | out

    def replace(self, **changes: Any) -> Self:
        """Copy with other fields."""
        return replace(self, **changes)

    def to(self, backend: str | Backend) -> Self:
        """Copy with all arrays on another library or device."""
        names = ("sites", "shared", "extra", "tokens", "spare")
        return self.replace(**{n: move(getattr(self, n), backend) for n in names})

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Copy with other module names, for a base that calls them otherwise.

        `rename` gets module names, of sites, of copied tensors' modules and of embeddings.
        `target_modules` becomes the list of the new names.

        Examples
        --------
        >>> from peft_any.methods.ia3 import IA3Config
        >>> adapter = Adapter(IA3Config(), {"transformer.h.0.fc": {}})
        >>> list(adapter.renamed(lambda name: name.removeprefix("transformer.")).sites)
        ['h.0.fc']
        """
        return renaming.renamed(self, rename)

    def split(
        self, whole: str, parts: Sequence[str], sizes: Sequence[int], *, groups: int = 1
    ) -> Self:
        """Copy with fused layers split into their parts: exact, for methods that act by rows.

        Parameters
        ----------
        whole, parts : str and sequence of str
            Ends of the modules' names: ``"qkv_proj"`` and ``("q_proj", "k_proj", "v_proj")``.
        sizes, groups : sequence of int, and int
            Outputs of each part, and into how many groups, each with its share, they are ordered.

        Raises
        ------
        PeftError
            If the method cannot be split, or names or sizes do not fit.

        Examples
        --------
        >>> from peft_any.methods.lora import LoraConfig
        >>> import numpy as np
        >>> p = {"lora_A.weight": np.ones((2, 4)), "lora_B.weight": np.ones((8, 2))}
        >>> adapter = Adapter(LoraConfig(r=2), {"h.0.qkv": p})
        >>> list(adapter.split("qkv", ("q", "k", "v"), (4, 2, 2)).sites)
        ['h.0.q', 'h.0.k', 'h.0.v']
        """
        return regrouping.split(self, whole, parts, sizes, groups)

    def fused(
        self,
        whole: str,
        parts: Sequence[str],
        sizes: Sequence[int] | None = None,
        *,
        groups: int = 1,
    ) -> Self:
        """Copy with parts fused, the inverse of `split`; parts without an adapter need `sizes`."""
        return regrouping.fused(self, whole, parts, sizes, groups)

    def trainable(self) -> dict[str, Params]:
        """Give the trained arrays by site and name; what belongs to no site stands under ``""``."""
        return trained(self)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(n for counts in self.counts.values() for n in counts.values())

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many numbers are trained, by site and name."""
        return {s: {k: prod(a.shape) for k, a in p.items()} for s, p in self.trainable().items()}

    def replaced(self, weights: Collection[str]) -> list[str]:
        """Name the base tensors that this adapter carries new values or rows of."""
        names = [*self.extra, *(f"{module}.weight" for module in self.tokens)]
        return [name for name in dict.fromkeys(names) if name in weights]

    def replacement(self, tensor: str, base: Array) -> Array | None:
        """Give the new value of a base tensor, in its dtype, if the adapter carries one.

        Raises
        ------
        ShapeError
            If it does not have the base's shape.
        """
        module = tensor.removesuffix(".weight")
        new, rows = self.extra.get(tensor), self.tokens.get(module)
        if new is None and rows is None:
            return None
        check_copies(
            self.config,
            {} if new is None else {tensor: new},
            {} if rows is None else {module: rows},
            {tensor: base},
        )
        new = base if new is None else astype(new, dtype_name(base))
        return new if rows is None else with_rows(new, rows, token_indices(self.config, module))

    def with_copies(self, weights: Mapping[str, Array], sites: Mapping[str, Site]) -> Self:
        """Add what a fresh adapter trains beside its method (`extras.fresh_copies`)."""
        extra, tokens = fresh_copies(self.config, weights, sites)
        return self.replace(extra=extra, tokens=tokens)

    def with_shared(self, sites: Sequence[Site], base: Callable[[str], str]) -> Self:
        """Draw again the shared arrays that the file left out; `base` gives its tensors' dtypes."""
        config = self.config
        if not isinstance(config, Tuner) or not self.sites:
            return self
        if all(name in self.shared for name in config.shared_shapes(sites)):
            return self
        like = backend_of(next(iter(next(iter(self.sites.values())).values())))
        drawn = held(config.init_shared(sites, Fresh(0, like)), base(sites[0].weight))
        return self.replace(shared={**drawn, **self.shared})

    def check_copies(self, weights: Mapping[str, Any]) -> None:
        """Check that the full copies and rows fit a base (`extras.check_copies`)."""
        check_copies(self.config, self.extra, self.tokens, weights)

    def check(
        self,
        weights: Mapping[str, Any],
        kinds: Mapping[str, Kind | Site] | None = None,
        *,
        strict: bool = True,
    ) -> dict[str, Site]:
        """Fit the adapter to a base, and give its sites: `targets.place`."""
        return place(self, weights, kinds, strict=strict)

    def check_finite(self, where: StrPath = "") -> None:
        """Refuse NaN and infinities, where `where` names the adapter, such as its directory.

        Raises
        ------
        FormatError
            Naming every array that has some.
        """
        bad = non_finite({**self.sites, "": {**self.shared, **self.extra, **self.tokens}})
        if bad:
            names = ": ".join(filter(None, (str(where), ", ".join(bad))))
            raise FormatError(f"{names}: NaN or infinite values cannot adapt anything")

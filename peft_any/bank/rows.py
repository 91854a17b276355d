"""A bank of adapters over one base, and the batches whose rows take one each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import index
from threading import Lock
from typing import Any, TypeAlias

import numpy as np

from peft_any import attention
from peft_any._typing import Array
from peft_any.adapter import Adapter
from peft_any.arguments import methods_checked, shown
from peft_any.backend import astype, dtype_name, from_numpy_like, is_array
from peft_any.bank.data import DataLayer, StackedLayer
from peft_any.bank.mixed import MixedLayer
from peft_any.bound import Layers
from peft_any.errors import ConfigError, ShapeError, nearest
from peft_any.layout import layout
from peft_any.prompt import Prompt

BASE = "__base__"
"""Hugging Face PEFT's name for a row without an adapter; None says the same."""
Rows: TypeAlias = Sequence[str | int | None] | Array


class State:
    """A model that no longer changes, and its layers with some adapters, made on first use."""

    def __init__(self, model: Any, names: Sequence[str | None]) -> None:
        self.model, self.names = model, names
        self._alone = [model.alone(name) for name in names]
        self.adapted = {key: site for one in self._alone for key, site in one.sites().items()}
        self._stacks: dict[str, StackedLayer] = {}

    def every(self) -> dict[str, Any]:
        """All layers of the base."""
        return {**layout(self.model.weights, self.model.kinds), **self.adapted}

    def layers(self, key: str) -> list[Any]:
        """One layer, with each of the adapters alone."""
        site = self.adapted[key] if key in self.adapted else self.every()[key]
        return [one.bound_layer(site) for one in self._alone]

    def stack(self, key: str) -> StackedLayer:
        """One layer with all adapters stacked, kept for all batches."""
        if key not in self._stacks:
            made = StackedLayer(self.layers(key))
            if made.traced:
                return made
            self._stacks[key] = made
        return self._stacks[key]


@methods_checked("swap")
class Bank:
    """Adapters over one base that batches mix and that are exchanged while others read.

    `peft_any.stack` makes one. Each method takes the bank's state as a whole: it sees a `swap`
    from another thread entirely or not at all.

    Parameters
    ----------
    model : PeftModel
        As it is now: later changes of it are not the bank's.
    source : mapping of str to Adapter, optional
        Adapters that are attached as batches need them, as an `AdapterStore` has them.
    """

    def __init__(self, model: Any, source: Mapping[str, Adapter] | None = None) -> None:
        self._lock, self._source = Lock(), source
        if BASE in model or (source is not None and BASE in source):
            raise ConfigError(f"adapter {BASE!r}: the name means a row without one: rename it")
        self._model = model.alone(None)
        self._whole: State | None = None

    @property
    def names(self) -> list[str]:
        """The adapters' names; without a store their places are the numbers that rows may have."""
        held = self._model.names
        return [*held, *(name for name in self._source or () if name not in held)]

    @property
    def model(self) -> Any:
        """The model in its present state, which is another object after every swap."""
        return self._model

    def bind(self, rows: Rows) -> BoundRows:
        """Give the layers for batches whose rows have these adapters.

        Parameters
        ----------
        rows : sequence of str, int or None, or integer array (rows,)
            The adapter of each row, by name or number. None, ``"__base__"`` or a negative number
            for none. An array may be an argument of a function that ``jax.jit`` or
            ``torch.compile`` traces: other numbers in it are no other trace.

        Raises
        ------
        ConfigError, ShapeError
            If an adapter is not here, or acts within attention, or `rows` is no list of rows.
        """
        checked = self._checked(rows)
        if isinstance(checked, list):
            self.refuse(checked, "bind(rows=…)")
        elif self._whole is None:
            self.refuse(self._model.names, "bind(rows=…)")
        return BoundRows(self, checked)

    def refuse(self, names: Iterable[str | None], how: str) -> None:
        """Refuse adapters that no batch can mix: they act within attention, or make tokens.

        Raises
        ------
        ConfigError
        """
        held: Any = self._model
        among: dict[str, Any] = {
            name: held if name in held else self._source for name in names if name
        }
        _refuse({name: of[name].config for name, of in among.items()}, how)

    def swap(self, name: str, new: Adapter | Mapping[str, Mapping[str, Array]]) -> None:
        """Put another adapter, or other arrays {site: {name: array}}, in an adapter's place.

        It is checked first, and other threads see either the old or the new one, whole. As in
        `PeftModel.add` and `update` that is its shape, not its values: `Adapter.check_finite`
        refuses NaN and infinities, and an `AdapterStore` what has some.

        Raises
        ------
        ConfigError, ShapeError, TargetError
            If there is no such adapter, or the new one does not fit; nothing is changed then.
        """
        with self._lock:
            model = self._with(self._model, [name] if self._holds(name) else [])
            if isinstance(new, Adapter):
                _refuse({name: new.config}, "swap()")
                model.exchange(name, new)
            else:
                model.update({name: new})
            self._model = model

    def state(self, model: Any, rows: Any) -> tuple[State, Layers]:
        """Make the layers of one state of the model for rows that were checked."""
        if isinstance(rows, list):
            names = [*dict.fromkeys(rows)]
            which = [names.index(name) for name in rows]
            some = State(self._with(model, [name for name in names if name]), names)
            return some, Layers(
                some.adapted, some.every, lambda key: MixedLayer(some.layers(key), which)
            )
        whole = self._whole
        if whole is None or whole.model is not model:
            whole = self._whole = State(model, [None, *model.names])
        kept = whole
        return kept, Layers(kept.adapted, kept.every, lambda key: DataLayer(kept.stack(key), rows))

    def _with(self, model: Any, names: Sequence[str]) -> Any:
        """Copy a model, with the adapters that only the source holds."""
        model = model.alone(None)
        for name in names:
            if name not in model and self._source is not None:
                model.add(name, self._source[name])
        return model.alone(None)

    def _checked(self, rows: Any) -> Any:
        """Give names for a list of rows, or an array in the base's library."""
        if is_array(rows):
            return self._numbers(rows)
        unordered = isinstance(rows, str | bytes | Mapping | AbstractSet)
        if unordered or not isinstance(rows, Iterable) or not rows:
            raise ConfigError(
                f"rows={shown(rows)}: give a list with one name, or None, for each row"
            )
        wrong: list[Any] = []
        out: list[str | None] = []
        for row in rows:
            if row is None or row == BASE:
                out.append(None)
            elif isinstance(row, str):
                out.append(row)
                wrong += [] if self._holds(row) else [row]
            else:
                out.append(self._numbered(row))
        if wrong:
            missing = [*dict.fromkeys(wrong)]
            raise ConfigError(
                f"rows: adapters {missing} are not here{nearest(missing[0], self.names)}"
            )
        return out

    def _holds(self, name: str) -> bool:
        return name in self._model or (self._source is not None and name in self._source)

    def _numbered(self, row: Any) -> str | None:
        """Give the name of an adapter's number, None for a negative one."""
        if isinstance(row, bool) or not hasattr(row, "__index__"):
            raise ConfigError(
                f"rows: {row!r} names no adapter: give a name, a number or None for each row"
            )
        number = index(row)
        if number < 0:
            return None
        self._refuse_numbers()
        names: list[str] = self._model.names
        if number >= len(names):
            raise ConfigError(f"rows: number {number}: there are {len(names)} adapters")
        return names[number]

    def _refuse_numbers(self) -> None:
        if self._source is not None:
            raise ConfigError(
                "rows: numbers need all adapters at once, and this bank takes them from a store, "
                "where one that comes or goes would number them anew: give names, or stack those "
                "that you need, stack({name: store[name], …}, weights)"
            )

    def _numbers(self, rows: Array) -> Array:
        if rows.ndim != 1 or not dtype_name(rows).startswith(("int", "uint")):
            raise ShapeError(
                f"rows: an array {tuple(rows.shape)} of {dtype_name(rows)} cannot number "
                "adapters: give one integer for each row"
            )
        self._refuse_numbers()
        if isinstance(rows, np.ndarray):
            count = len(self._model.names)
            if rows.size and int(rows.max()) >= count:
                raise ConfigError(f"rows: number {int(rows.max())}: there are {count} adapters")
            like = next(iter(self._model.weights.values()))
            rows = from_numpy_like(rows.astype("int32"), like)
        elif dtype_name(rows) not in ("int32", "int64"):  # others cannot count all adapters
            rows = astype(rows, "int32")
        return rows


def _refuse(configs: Mapping[str, Any], how: str) -> None:
    attention.refuse(configs, how)
    for name, config in configs.items():
        if isinstance(config, Prompt):
            raise ConfigError(
                f"adapter {name!r}: {how}: {config.peft_type} makes virtual tokens and adapts no "
                "layer, so that no row can take it: prepend them to the row's input, and give the "
                "row None"
            )


class BoundRows:
    """A bank with the rows of a batch: layers whose input has an adapter of its own in each row.

    It has no `weights` as `Bound` has: no single weight stands for a batch of several adapters.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import LoraConfig, PeftModel
    >>> model = PeftModel({"fc.weight": np.ones((3, 4), dtype="float32")})
    >>> _ = model.add("fr", LoraConfig(r=2, target_modules=["fc"]))
    >>> bound = model.bind(rows=["fr", None])
    >>> bound.layers["fc"](np.ones((2, 4), dtype="float32")).shape
    (2, 3)
    """

    def __init__(self, bank: Bank, rows: Any) -> None:
        self._bank, self._rows = bank, rows
        self._seen: tuple[Any, State, Layers] | None = None

    @property
    def _now(self) -> tuple[Any, State, Layers]:
        model, seen = self._bank.model, self._seen
        if seen is None or seen[0] is not model:
            seen = self._seen = (model, *self._bank.state(model, self._rows))
        return seen

    @property
    def layers(self) -> Layers:
        """The layers as they are now: whoever keeps this mapping sees no later `swap`.

        A forward pass that takes it once computes with one state of every adapter.
        """
        return self._now[2]

    @property
    def params(self) -> dict[str, Any]:
        """The trained arrays {adapter: {site: {name: array}}} of the rows' adapters."""
        state = self._now[1]
        return {name: state.model[name].trainable() for name in state.names if name}

    def swap(self, name: str, new: Adapter | Mapping[str, Mapping[str, Array]]) -> None:
        """Put another adapter in an adapter's place: `Bank.swap`."""
        self._bank.swap(name, new)

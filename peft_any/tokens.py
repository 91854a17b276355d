"""Rows of embeddings that an adapter trains: which they are, and putting them into a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from peft_any._typing import Array
from peft_any.backend import astype, dtype_name, from_numpy_like, namespace
from peft_any.errors import ConfigError
from peft_any.registry import Config

_PIECES = 256
"""Up to so many new rows a table is put together of pieces."""
INPUTS = ("embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in")
"""Input embeddings of transformers' usual models, the likeliest first."""


def token_indices(config: Config, module: str) -> list[int]:
    """Say which rows of an embedding are trained, in the order of the stored rows."""
    listed = getattr(config, "trainable_token_indices", None) or []
    if isinstance(listed, Mapping):
        found = [v for k, v in listed.items() if module == k or module.endswith(f".{k}")]
        return list(found[0]) if found else []
    return list(listed)


def token_faults(config: Config, tokens: Mapping[str, Array]) -> list[str]:
    """Describe the embeddings whose stored rows the configuration does not list."""
    faults = []
    for module, rows in tokens.items():
        asked = len(token_indices(config, module))
        if rows.ndim != 2 or rows.shape[0] != asked:
            faults.append(
                f"{module}.trainable_tokens_delta: shape {tuple(rows.shape)} cannot fit: "
                f"trainable_token_indices lists {asked} rows"
            )
    return faults


def input_table(weights: Collection[str]) -> str | None:
    """Name the tensor of the input embedding, if one has a usual name."""
    module = embedding(None, weights)
    return None if module is None else f"{module}.weight"


def embedding(entry: str | None, weights: Collection[str]) -> str | None:
    """Name the module of an embedding by its last parts, or the input embedding."""
    for last in INPUTS if entry is None else (entry,):
        for name in weights:
            module = name.removesuffix(".weight")
            if module != name and (module == last or module.endswith(f".{last}")):
                return module
    return None


def rows_of(table: Array, indices: list[int], module: str) -> Array:
    """Take rows of an embedding's table, each of which must be there and named once."""
    check_rows(indices, table.shape[0], module)
    return namespace(table).take(table, from_numpy_like(indices, table), axis=0)


def check_rows(
    indices: list[int], rows: int, module: str, field: str = "trainable_token_indices"
) -> None:
    """Refuse indices that are no rows of a table, or named twice.

    Raises
    ------
    ConfigError
    """
    bad = [i for i in indices if not 0 <= i < rows]
    if bad or len(set(indices)) != len(indices):
        raise ConfigError(
            f"{module}: {field} {bad or indices} cannot be rows of it: it has "
            f"{rows}, each may be named once"
        )


def row_numbers(indices: list[int], n: int) -> npt.NDArray[np.int64]:
    """Say for each of `n` tokens which of the new rows is its own, from 1 on; 0: none.

    Examples
    --------
    >>> row_numbers([2, 0], 4).tolist()
    [2, 0, 1, 0]
    """
    numbers = np.zeros(n, dtype=np.int64)
    numbers[indices] = np.arange(1, len(indices) + 1)
    return numbers


def with_rows(table: Array, rows: Array, indices: list[int], *, axis: int = 0) -> Array:
    """Put new rows, or slices along another axis, into a table, as a new array.

    Examples
    --------
    >>> import numpy as np
    >>> with_rows(np.zeros((3, 2)), np.ones((1, 2)), [1])
    array([[0., 0.],
           [1., 1.],
           [0., 0.]])
    """
    xp, n, rows = namespace(table, rows), table.shape[axis], astype(rows, dtype_name(table))
    if len(indices) > _PIECES:
        order = list(range(n))
        for i, row in enumerate(indices):
            order[row] = n + i
        both = xp.concat([table, rows], axis=axis)
        return xp.take(both, from_numpy_like(order, table), axis=axis)
    # few rows: the pieces between them are copied once
    before, end, pieces = (slice(None),) * (axis % table.ndim), 0, []
    for row, i in sorted({row % n: i for i, row in enumerate(indices)}.items()):
        pieces += [table[(*before, slice(end, row), ...)], rows[(*before, slice(i, i + 1), ...)]]
        end = row + 1
    return xp.concat([*pieces, table[(*before, slice(end, n), ...)]], axis=axis)

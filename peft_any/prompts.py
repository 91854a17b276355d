"""What methods that make virtual tokens share: initial rows, and masks that cover them."""

from __future__ import annotations

from collections.abc import Sequence

from peft_any._typing import Array, Shape
from peft_any.backend import (
    astype,
    creation_device,
    dtype_name,
    from_numpy_like,
    is_floating,
    namespace,
    resolve,
    to_numpy,
)
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Dense, Site
from peft_any.prompt import Prompt
from peft_any.rng import Fresh


def extend_mask(mask: Array, count: int, value: int = 1) -> Array:
    """Lengthen a mask, or labels, by virtual tokens in front.

    Parameters
    ----------
    mask : array (..., tokens)
        An attention mask, or labels.
    count : int
        How many virtual tokens there are.
    value : int
        What stands for them: 1 in a mask; in labels the number that the loss ignores (-100).

    Returns
    -------
    array (..., count + tokens)
        In the mask's dtype.

    Examples
    --------
    >>> import numpy as np
    >>> extend_mask(np.asarray([[0, 1]]), 3)
    array([[1, 1, 1, 0, 1]])
    """
    xp = namespace(mask)
    fill = bool(value) if dtype_name(mask) == "bool" else value
    shape, device = (*mask.shape[:-1], count), creation_device(mask)
    virtual = xp.full(shape, fill, dtype=mask.dtype, device=device)
    longer: Array = xp.concat([virtual, mask], axis=-1)
    return longer


def prepend(rows: Array, x: Array) -> Array:
    """Put rows before others along the last but one axis.

    Parameters
    ----------
    rows : array (..., T, d)
        Repeated along the leading axes that `x` has more.
    x : array (..., tokens, d), floating

    Returns
    -------
    array (..., T + tokens, d)
        In `x`'s dtype.

    Examples
    --------
    >>> import numpy as np
    >>> prepend(np.zeros((2, 3)), np.ones((5, 4, 3))).shape
    (5, 6, 3)
    """
    xp, rows = namespace(rows, x), astype(rows, dtype_name(x))
    rows = spread(rows, tuple(x.shape[: x.ndim - rows.ndim]))
    longer: Array = xp.concat([rows, x], axis=-2)
    return longer


def before(config: Prompt, rows: Array, embeds: Array, submodule: int) -> Array:
    """Put a submodule's virtual tokens before its embedded input.

    Parameters
    ----------
    config : Prompt
    rows : array (..., n·T, d)
        The virtual tokens of all submodules.
    embeds : array (..., tokens, d), floating
    submodule : int
        Whose input it is: 0, or 1 for the decoder's of an encoder-decoder.

    Returns
    -------
    array (..., T + tokens, d)
        In `embeds`'s dtype.

    Raises
    ------
    ShapeError
        If the widths differ, `embeds` are token numbers, or there is no such submodule.
    """
    count, d = config.size("num_virtual_tokens"), rows.shape[-1]
    if embeds.ndim < 2 or embeds.shape[-1] != d or not is_floating(embeds):
        raise ShapeError(
            f"{config.where}: {dtype_name(embeds)} of shape {tuple(embeds.shape)} cannot follow "
            f"a prompt: embed the tokens first, as (..., tokens, {d})"
        )
    if not 0 <= submodule < config.submodules:
        raise ShapeError(
            f"{config.where}: submodule {submodule} cannot have a prompt: there are "
            f"{config.submodules}; set num_transformer_submodules"
        )
    return prepend(rows[..., submodule * count : (submodule + 1) * count, :], embeds)


def spread(a: Array, lead: Shape) -> Array:
    """Repeat an array along new leading axes."""
    repeated: Array = namespace(a).broadcast_to(a, (*lead, *a.shape))
    return repeated


def fresh(seed: int, backend: str, dtype: str, weight: Array | None = None) -> Fresh:
    """Open the draws of a prompt that stands alone, perhaps beside an embedding table (V, d)."""
    if weight is None:
        return Fresh(seed, resolve(backend), dtype=dtype)
    vocabulary, d = weight.shape
    base = Dense.of(weight, None, Site("embeddings", vocabulary, d, "Embedding", bias=False))
    return Fresh(seed, resolve(backend, weight), dtype=dtype, base=base)


def table_rows(columns: Array, count: int, tokens: Sequence[int] | None, new: Fresh) -> Array:
    """Take rows of an embedding table as initial virtual tokens.

    Parameters
    ----------
    columns : array (d, vocabulary)
        The table's flat weight, as in `Dense`.
    count : int
    tokens : sequence of int, optional
        Which rows, repeated or cut to `count`; by default drawn with equal chances.
    new : Fresh

    Returns
    -------
    array (count, d)

    Raises
    ------
    ConfigError
        If there are no tokens, or some that the table does not have.

    Examples
    --------
    >>> import numpy as np
    >>> new = fresh(0, "numpy", "float32")
    >>> table_rows(np.asarray([[5.0, 6.0, 7.0]]), 3, [2, 0], new)
    array([[7.],
           [5.],
           [7.]], dtype=float32)
    """
    vocabulary = columns.shape[1]
    chosen = new.host.integers(0, vocabulary, count)
    if tokens is not None:
        strange = [t for t in tokens if not 0 <= t < vocabulary]
        if strange or not tokens:
            raise ConfigError(
                f"tokens {strange[:5]}: cannot start a prompt: give at least one number, each from "
                f"0 to {vocabulary - 1}"
            )
        chosen[:] = [tokens[i % len(tokens)] for i in range(count)]
    xp = namespace(columns)
    rows = xp.take(columns, from_numpy_like(chosen, columns), axis=1)
    drawn: Array = new.array(to_numpy(xp.matrix_transpose(rows)))
    return drawn

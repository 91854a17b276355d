"""The engine of merges: exact values, whatever the way and the threads, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import peft_any
from peft_any import merge_checkpoint, read_safetensors, verify_checkpoint
from peft_any.backend import numpy_dtype
from peft_any.errors import FormatError, ShapeError, StorageError, UsageError, VerifyError
from peft_any.io._threads import Behind, meanwhile
from peft_any.io._writer import PlacedWriter
from peft_any.io.checkpoint import Checkpoint
from peft_any.io.safetensors import SafetensorsFile, write_safetensors
from peft_any.method import Tuner
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lokr import LoKrConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.vera import VeraConfig
from peft_any.surgery import forked as forks
from peft_any.surgery import sums as summing
from peft_any.surgery.added import Added
from peft_any.surgery.forked import forked, may_fork
from peft_any.surgery.measure import measure
from peft_any.surgery.passes import SWITCH, chosen, passes, rounded
from peft_any.surgery.rounding import nearest, odd, widened
from peft_any.surgery.threads import in_order, one_blas_thread, thread_count
from peft_any.testing import wholes
from tests.cases import CASES, Case
from tests.models import BF16, random_adapter, sharded, single

SMALL = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")
separable = [c for c in CASES if c.config.separable and c.site.groups == 1]
separable = [c for c in separable if c.site.kind not in ("Conv1D", "Embedding")]


def every_value(name: str) -> np.ndarray:
    """List all finite values of a small dtype, in order."""
    dtype = numpy_dtype(name)
    bits = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        wide = bits.view(dtype).astype("float64")
    return np.unique(wide[np.isfinite(wide)])


def truth(exact: np.ndarray, name: str) -> np.ndarray:
    """Round to nearest, ties to even, by search among all values of a dtype."""
    values = every_value(name)
    right = np.clip(np.searchsorted(values, exact), 1, len(values) - 1)
    low, high = values[right - 1], values[right]
    down, up = exact - low, high - exact
    even = low.astype(numpy_dtype(name)).view(f"u{numpy_dtype(name).itemsize}") % 2 == 0
    return np.where((down < up) | ((down == up) & even), low, high)


class TestRounding:
    """From double precision, once."""

    @pytest.mark.parametrize("name", SMALL)
    def test_every_value_tie_and_neighbour(self, name: str) -> None:
        values = every_value(name)
        ties = (values[1:] + values[:-1]) / 2
        apart = np.abs(ties) * 2.0**-50
        for exact in (values, ties, ties + apart, ties - apart):
            np.testing.assert_array_equal(widened(nearest(exact, name)), truth(exact, name))

    def test_libraries_round_twice_where_this_does_not(self) -> None:
        exact = np.asarray([1 + 2.0**-8 + 2.0**-40])
        assert exact.astype(BF16)[0] == 1
        assert nearest(exact, "bfloat16")[0] > 1

    def test_out_of_range_and_not_a_number(self) -> None:
        exact = np.asarray([1e39, -np.inf, np.nan, 1e300])
        got = widened(nearest(exact, "bfloat16"))
        np.testing.assert_array_equal(got, [np.inf, -np.inf, np.nan, np.inf])
        assert np.isnan(widened(nearest(exact, "float8_e4m3fn"))).all()
        assert nearest(np.ones(2, "float32"), "float16").dtype == np.float16
        assert odd(np.asarray([2.0**-1074]))[0] > 0

    @given(st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), max_size=9))
    def test_any_numbers(self, given_: list[float]) -> None:
        exact = np.asarray([x for x in given_ if abs(x) < 6e4])
        for name in ("bfloat16", "float16"):
            np.testing.assert_array_equal(widened(nearest(exact, name)), truth(exact, name))


def layer(
    rows: int, width: int, rank: int, ratio: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a bfloat16 weight and factors of a change that is `ratio` of its size."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, width)) * 0.02).astype(BF16)
    u = rng.standard_normal((rows, rank)).astype("float32").astype("float64")
    v = rng.standard_normal((rank, width)).astype("float32").astype("float64")
    return w, u * (0.02 * ratio / rank**0.5), v


@pytest.fixture(scope="class", params=passes())
def each_pass(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, request.param)
        yield request.param


@pytest.mark.usefixtures("each_pass")
class TestSums:
    """Single precision gives what double gives, by whichever pass."""

    @given(
        sizes=st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 24)),
        ratio=st.sampled_from([1e-4, 1e-3, 5e-3, 0.05, 0.3]),
        gains=st.sampled_from([None, 1.0, 1e-3, 0.3]),
        seed=st.integers(0, 2**32),
    )
    def test_values_are_those_of_double_precision(
        self, sizes: tuple[int, int, int], ratio: float, gains: float | None, seed: int
    ) -> None:
        w, u, v = layer(*sizes, ratio, seed)
        gain = gains and gains * np.random.default_rng(seed).uniform(-1.5, 1.5, sizes[0])
        sums = Added.of(u, v, w)
        if sums is None:
            return
        got, moments = sums.rounded(w, 0, gain)
        exact = (w.astype("float64") + u @ v) * (1 if gain is None else gain[:, None])
        np.testing.assert_array_equal(widened(got), truth(exact, "bfloat16"))
        want = measure(w, got, exact=exact)
        assert (moments.same, moments.size) == (want.same, want.size)

    @pytest.mark.parametrize("spread", [None, 0.0, 0.01, 0.2])
    @pytest.mark.parametrize("ratio", [1e-4, 1e-3, 5e-3, 0.02])
    def test_statistics_are_those_of_double_precision(
        self, ratio: float, spread: float | None
    ) -> None:
        w, u, v = layer(256, 2048, 16, ratio)
        gain = None if spread is None else np.linspace(1 - spread, 1 + spread, 256)
        sums = Added.of(u, v, w)
        assert sums is not None
        got, moments = sums.rounded(w, 0, gain)
        exact = (w.astype("float64") + u @ v) * (1 if gain is None else gain[:, None])
        want = measure(w, got, exact=exact)
        assert vars(moments) == pytest.approx(vars(want), rel=1e-5)

    @pytest.mark.parametrize("scaled", [False, True])
    def test_many_sums_near_ties(self, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A million random sums, by blocks; some were on the wrong side in single precision."""
        w, u, v = layer(512, 2048, 16, 0.05)
        gain = np.linspace(0.4, 2.1, 512) if scaled else np.ones(512)
        exact = (w.astype("float64") + u @ v) * gain[:, None]
        want = nearest(exact, "bfloat16")
        sums = Added.of(u, v, w)
        assert sums is not None

        def by_blocks(step: int) -> Any:
            blocks = [slice(i, i + step) for i in range(0, 512, step)]
            some = [sums.rounded(w[b], b.start, gain[b] if scaled else None)[0] for b in blocks]
            return np.concatenate(some).view("u2")

        np.testing.assert_array_equal(by_blocks(100), want.view("u2"))
        naive = w.astype("float32") + (u @ v).astype("float32")
        naive *= gain[:, None].astype("float32")
        assert np.count_nonzero(naive.astype(BF16) != want)
        monkeypatch.setattr(summing, "_INNER", 4096)
        np.testing.assert_array_equal(by_blocks(37), want.view("u2"))

    def test_the_next_tie_below_a_power_of_two(self) -> None:
        """It is half as far as the one above."""
        w = np.asarray([[1.0]]).astype(BF16)
        for bound in (2.0**-10, 2.0**-9, 2.0**-8):
            sums = Added(
                np.asarray([[-1.0]]), np.asarray([[2.0**-9 * 1.5]]), np.float32([2 * bound])
            )
            exact = np.asarray([[1 - 2.0**-9 * 1.5]])
            got, _ = sums.rounded(w, 0)
            np.testing.assert_array_equal(widened(got), truth(exact, "bfloat16"))

    def test_exact_ties_go_to_even(self) -> None:
        w = np.asarray([[1.0, 1.0078125, -1.0]]).astype(BF16)
        u, v = np.asarray([[2.0**-8]]), np.asarray([[1.0, 1.0, -1.0]])
        sums = Added(u, v, np.asarray([1e-9], "float32"))
        np.testing.assert_array_equal(widened(sums.rounded(w, 0)[0]), [[1.0, 1.015625, -1.0]])

    def test_double_precision_is_taken_where_many_would_be_doubtful(self) -> None:
        w, u, v = layer(64, 64, 16, 0.01)
        assert Added.of(u, v, w) is not None
        assert Added.of(1e3 * u, v, w) is None
        assert Added.of(u, v, np.zeros_like(w)) is None
        assert Added.of(u * 1e30, v, w) is None
        assert Added.of(0 * u, v, w) is not None


class TestPasses:
    """The compiled pass and NumPy's are one."""

    @given(
        sizes=st.tuples(st.integers(1, 21), st.integers(1, 200), st.integers(0, 20)),
        scaled=st.booleans(),
        seed=st.integers(0, 2**32),
        odd_ones=st.lists(st.sampled_from([0.0, -0.0, np.inf, np.nan, 1e-40, 1e4]), max_size=3),
    )
    def test_bits_and_statistics_agree(
        self, sizes: tuple[int, int, int], scaled: bool, seed: int, odd_ones: list[float]
    ) -> None:
        rows, width, rank = sizes
        rng = np.random.default_rng(seed)
        w, u, v = (
            layer(*sizes, 0.05, seed) if rank else (layer(rows, width, 1, 0)[0], *empty(sizes))
        )
        bound = Added.of(u, v, w)
        assume(bound is not None)
        sums = Added(np.asfortranarray(u), v, bound.bound)
        w.reshape(-1)[rng.integers(0, w.size, len(odd_ones))] = odd_ones
        gain = rng.uniform(-1.5, 1.5, rows) if scaled else None
        found = []
        for name in passes():
            with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
                patch.setenv(SWITCH, name)
                found.append(sums.rounded(w, 0, gain))
        (values, moments), *others = found
        for got, measured in others:
            assert measured.finite == moments.finite
            if moments.finite:
                np.testing.assert_array_equal(got.view("u2"), values.view("u2"))
                assert (measured.same, measured.size) == (moments.same, moments.size)
                # Sums of some size, each rounded to single precision in some order.
                size = moments.base2 + moments.delta2
                loss = 2.0**-22 * (size * (moments.miss2 + moments.delta2)) ** 0.5
                loss += w.size * 2.0**-149  # and squares that single precision has no number for
                assert vars(measured) == pytest.approx(vars(moments), rel=1e-5, abs=loss)

    @given(
        st.lists(st.floats(width=64), min_size=1, max_size=70),
        st.sampled_from([None, 0.0, 1e-9, 0.7]),
        st.integers(0, 2**32),
    )
    def test_double_precision_is_rounded_and_measured_at_once(
        self, sums: list[float], share: float | None, seed: int
    ) -> None:
        exact = np.asarray(sums)
        w = (np.random.default_rng(seed).standard_normal(len(sums))).astype(BF16)
        delta = None if share is None else share * np.arange(len(sums), dtype="float64")
        want = nearest(exact, "bfloat16")
        with np.errstate(all="ignore"):
            measured = measure(w, want, delta=delta, exact=None if share is not None else exact)
        for name in passes():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(SWITCH, name)
                made = rounded(w, exact, delta)
            if name in ("numpy", "plain"):
                assert made is None
                continue
            assert made is not None
            number = ~np.isnan(exact)
            np.testing.assert_array_equal(made[0].view("u2")[number], want.view("u2")[number])
            assert np.isnan(made[0][~number].astype("f4")).all()
            assert made[1].finite == measured.finite
            if measured.finite:
                assert vars(made[1]) == pytest.approx(vars(measured), rel=1e-12)

    def test_part_of_a_layer(self) -> None:
        w, u, v = layer(50, 70, 3, 0.05)
        sums = Added.of(u, v, w)
        assert sums is not None
        whole, _ = sums.rounded(w, 0)
        part, _ = sums.rounded(w[17:40], 17)
        np.testing.assert_array_equal(part.view("u2"), whole[17:40].view("u2"))

    def test_an_unknown_pass_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCH, "nunpy")
        with pytest.raises(UsageError, match=r"nearest: 'numpy'.*unset it"):
            chosen()

    @pytest.mark.skipif(
        all(shutil.which(cc) is None for cc in ("cc", "gcc", "clang")), reason="no C compiler here"
    )
    def test_where_there_is_a_compiler_there_is_a_compiled_pass(self) -> None:
        assert len(passes()) > 1, "install the package again: pip install -e ."

    @pytest.mark.skipif(len(passes()) == 1, reason="this installation has no compiled pass")
    def test_the_compiled_pass_checks_what_it_is_given(self) -> None:
        w, u, v = layer(3, 40, 2, 0.05)
        sums = Added(u, v, np.full(3, 1e-7, "float32"))
        name, compiled = passes()[-1], chosen()[1]
        assert compiled is not None
        fine = (
            w.view("u2"), np.empty((3, 40), "u2"), sums.singles[0], sums.panels, sums.u,
            sums.columns, sums.bound,
        )  # fmt: skip
        assert len(compiled.add(name, *fine, None, None)) == 5
        for i in range(len(fine)):
            short = (*fine[:i], fine[i][:-1], *fine[i + 1 :])
            with pytest.raises(ValueError, match="do not belong together"):
                compiled.add(name, *short, None, None)
        with pytest.raises(ValueError, match="do not belong together"):
            compiled.add(name, *fine, np.ones(2, "f4"), np.ones(3))
        with pytest.raises(ValueError, match="no such pass"):
            compiled.add("none", *fine, None, None)
        fine[1].flags.writeable = False
        with pytest.raises((ValueError, BufferError)):
            compiled.add(name, *fine, None, None)


def empty(sizes: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Give factors of rank 0."""
    return np.zeros((sizes[0], 0)), np.zeros((0, sizes[1]))


@pytest.mark.parametrize("case", separable, ids=lambda case: case.name)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_rows_merge_by_themselves(case: Case, seed: int, data: Any) -> None:
    start = data.draw(st.integers(0, case.site.n_out - 1))
    wholes.rows_apart(case, seed, start, data.draw(st.integers(start + 1, case.site.n_out)))


METHODS: dict[str, Tuner] = {
    "lora": LoraConfig(r=4, target_modules=["fc"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["fc"]),
    "bias": LoraConfig(r=4, lora_bias=True, target_modules=["fc"]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules=["fc"]),
    "oft": OFTConfig(oft_block_size=8, target_modules=["fc"]),
    "boft": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["fc"]),
    "ia3": IA3Config(target_modules=["fc"], feedforward_modules=[]),
    "loha": LoHaConfig(r=3, target_modules=["fc"]),
    "lokr": LoKrConfig(r=3, target_modules=["fc"]),
    "vera": VeraConfig(r=4, target_modules=["fc"]),
}


def model(dtype: Any, rows: int = 48, width: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "fc.weight": (rng.standard_normal((rows, width)) * 0.1).astype(dtype),
        "fc.bias": rng.standard_normal(rows).astype(dtype),
        "other.weight": rng.standard_normal((5, 7)).astype(dtype),
    }


FORMATS = "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"
QUICK = 2100
"""Rows with which single precision does most of the work; it measures to 1e-5."""


@pytest.mark.parametrize(
    ("name", "stored", "rows"),
    [(name, stored, 48) for name in METHODS for stored in FORMATS]
    + [(name, "bfloat16", QUICK) for name in ("lora", "dora", "bias", "oft", "boft")],
)
def test_merged_weights_are_double_precisions_rounded_once(
    name: str, stored: str, rows: int, tmp_path: Path
) -> None:
    weights, near = model(numpy_dtype(stored), rows), 1e-5 if rows == QUICK else 1e-9
    base = single(tmp_path / "base", weights)
    made = random_adapter({k: widened(v, "float32") for k, v in weights.items()}, METHODS[name])
    receipt = merge_checkpoint(base, made, tmp_path / "out")
    wide = {k: widened(v) for k, v in weights.items()}
    want = peft_any.merge(wide, made)
    with Checkpoint(tmp_path / "out") as got:
        for key, value in want.items():
            np.testing.assert_array_equal(widened(got[key]), truth(value, stored), err_msg=key)
    for change in receipt.changes:
        delta = want[change.tensor] - wide[change.tensor]
        moved = truth(want[change.tensor], stored) - wide[change.tensor]
        size = float(np.linalg.norm(delta))
        assert change.delta_norm == pytest.approx(size, rel=near)
        assert change.base_norm == pytest.approx(np.linalg.norm(wide[change.tensor]), rel=1e-5)
        assert change.kept == pytest.approx(
            float(np.sum(moved * delta)) / size**2, rel=max(near, 1e-6)
        )
        assert change.error == pytest.approx(
            float(np.linalg.norm(moved - delta)) / size, rel=max(near, 1e-6)
        )
        assert change.unchanged == np.mean(moved == 0)
    audit = verify_checkpoint(base, made, tmp_path / "out")
    for one, two in zip(audit.changes, receipt.changes, strict=True):
        assert one.kept == pytest.approx(two.kept, rel=max(near, 1e-6))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 50 MB in two shards, with an adapter of every kind of work."""
    rng = np.random.default_rng(1)
    weights = {
        f"layers.{i}.{part}.weight": (rng.standard_normal((2048, 1024), dtype="f4") * 0.02).astype(
            BF16
        )
        for i in range(6)
        for part in ("q", "up")
    }
    folder = tmp_path_factory.mktemp("large")
    base = sharded(folder / "base", weights)
    config = LoraConfig(r=8, target_modules=["q"])
    random_adapter(weights, config, scale=0.01).save(folder / "lora")
    return base, folder / "lora"


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


class TestThreads:
    """One, several, or processes: the same bits."""

    def test_neither_files_nor_receipts_depend_on_them(
        self, large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = merge_checkpoint(*large, tmp_path / "one", threads=1)
        monkeypatch.setattr("peft_any.surgery.threads.may_fork", lambda: False)
        three = merge_checkpoint(*large, tmp_path / "three", threads=3)
        assert shards(tmp_path / "one") == shards(tmp_path / "three")
        assert one.changes == three.changes

    def test_results_come_in_order_and_errors_in_their_turn(self) -> None:
        def fail() -> int:
            raise ValueError("no")

        tasks: list[Callable[[], int]] = [lambda i=i: i for i in range(50)]
        assert [*in_order(tasks, 3)] == [*range(50)]
        results = in_order([*tasks[:9], fail, *tasks], 3)
        assert [next(results) for _ in range(9)] == [*range(9)]
        with pytest.raises(ValueError, match="no"):
            next(results)

    def test_how_many(self) -> None:
        assert thread_count(None) >= 1
        assert thread_count(5) == 5
        with pytest.raises(UsageError, match="threads=0"):
            thread_count(0)

    def test_openblas_gets_its_threads_back(self) -> None:
        from peft_any.surgery.threads import _openblas

        found = _openblas()
        if found is None:
            pytest.skip("NumPy came without an OpenBLAS of its own")
        before = found[0]()
        with one_blas_thread():
            assert found[0]() == 1
        assert found[0]() == before


class TestBeside:
    """Work on a thread."""

    def test_errors_are_raised_where_the_result_is_waited_for(self) -> None:
        with meanwhile(lambda: 1 // 0) as result, pytest.raises(ZeroDivisionError):
            result()

    def test_work_is_done_in_order_and_told_of_when_none_is_left(self) -> None:
        found: list[str] = []
        with Behind(lambda: found.append("rest")) as behind:
            for name in "abc":
                behind.add(lambda name=name: found.append(name))
        assert [name for name in found if name != "rest"] == [*"abc"]
        assert found[-1] == "rest"

    def test_after_an_exception_the_work_is_done_all_the_same(self) -> None:
        found: list[int] = []
        with pytest.raises(KeyError), Behind() as behind:  # noqa: PT012
            behind.add(lambda: time.sleep(0.05))
            behind.add(lambda: found.append(1))
            raise KeyError
        assert found == [1]

    def test_an_error_ends_the_work_and_is_raised_at_the_end(self) -> None:
        found: list[int] = []
        with pytest.raises(ZeroDivisionError), Behind() as behind:  # noqa: PT012
            behind.add(lambda: 1 // 0)
            with suppress(ZeroDivisionError):  # unless it is known already
                behind.add(lambda: found.append(1))
        assert found == []


@linux
@pytest.mark.alone
class TestForked:
    """Processes in place of threads."""

    def test_results_come_in_order_and_errors_in_their_turn(self) -> None:
        def fail() -> int:
            raise VerifyError("too little")

        tasks: list[Callable[[], int]] = [lambda i=i: i * i for i in range(300)]
        assert [*forked(tasks, 3)] == [i * i for i in range(300)]
        assert [*forked([], 2)] == []
        many = [lambda i=i: i for i in range(10_000)]
        assert [*forked(many, 2, files=[1] * 10_000)] == [*range(10_000)]
        results = forked([*tasks[:9], fail, *tasks], 2)
        assert [next(results) for _ in range(9)] == [i * i for i in range(9)]
        with pytest.raises(VerifyError, match="too little"):
            next(results)

    def test_processes_have_files_of_their_own_while_there_are_enough(self) -> None:
        def work() -> int:
            time.sleep(0.01)
            return os.getpid()

        heard: dict[int, int] = {}
        pids = [*forked([work] * 34, 2, (), [12, 0, 12, 10], heard.__setitem__)]
        assert heard == dict(enumerate(pids))
        assert len({*pids[:12]}) == len({*pids[12:18]}) == 1
        assert pids[0] != pids[12]
        assert len({*pids[24:]}) == 2

    def test_a_file_that_is_cut_has_one_process_at_a_time(self) -> None:
        pipe, cuts = os.pipe(), forks._cuts([10, 10, 10], 2)
        os.write(pipe[1], b"0")
        try:
            shared = np.asarray([0, *cuts[:-1], *cuts[1:]])
            one, two = forks._Turns(pipe, shared), forks._Turns(pipe, shared)
            both = [(one.take(), two.take()) for _ in range(5)]
            alone = [one.take() for _ in range(20)]
        finally:
            for handle in pipe:
                os.close(handle)
        assert both == [(i, 15 + i) for i in range(5)]
        assert alone == [*range(5, 15), *range(29, 19, -1)]
        assert one.at is None

    def test_files_and_receipts_are_those_of_one_thread(
        self, large: tuple[Path, Path], tmp_path: Path
    ) -> None:
        assert may_fork()
        one = merge_checkpoint(*large, tmp_path / "one", threads=1)
        two = merge_checkpoint(*large, tmp_path / "two", threads=2)
        assert shards(tmp_path / "one") == shards(tmp_path / "two")
        assert one.changes == two.changes

    def test_errors_that_cannot_be_sent_are_told(self) -> None:
        def fail() -> None:
            error = ValueError("1 2")
            error.why = lambda: 0  # type: ignore[attr-defined]
            raise error

        with pytest.raises(RuntimeError, match="ValueError: 1 2"):
            [*forked([fail], 1)]

    def test_large_results(self) -> None:
        (one,) = forked([lambda: "x" * 10**6], 1)
        assert len(one) == 10**6

    def test_a_killed_process_is_told(self) -> None:
        with pytest.raises(MemoryError, match="killed"):
            [*forked([lambda: os.kill(os.getpid(), 9)], 2)]

    def test_a_process_that_ends_before_its_work_is_told(self) -> None:
        with pytest.raises(MemoryError, match="killed"):
            [*forked([lambda: os._exit(0)] * 2, 2)]

    def test_how_processes_end_may_be_unknown(self) -> None:
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            assert [*forked([lambda i=i: i for i in range(9)], 2)] == [*range(9)]
            with pytest.raises(MemoryError, match="killed"):
                [*forked([lambda: os.kill(os.getpid(), 9)] * 2, 2)]
        finally:
            signal.signal(signal.SIGCHLD, before)

    def test_only_processes_that_were_not_waited_for_are_killed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The number of one that was is free for others."""
        waited, killed, wait, kill = set(), set(), os.waitpid, os.kill

        def waiting(pid: int, options: int) -> tuple[int, int]:
            waited.add(pid)
            return wait(pid, options)

        def killing(pid: int, number: int) -> None:
            assert pid not in waited
            killed.add(pid)
            kill(pid, number)

        monkeypatch.setattr(os, "waitpid", waiting)
        monkeypatch.setattr(os, "kill", killing)
        tasks: list[Callable[[], Any]] = [os.getpid, lambda: time.sleep(0.3)]
        assert len([*forked(tasks, 2)]) == 2
        assert len(waited) == 2

    def test_where_no_process_can_be_begun_nothing_is_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused() -> int:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        before = [*Path("/proc/self/fd").iterdir()]
        with monkeypatch.context() as patch:
            patch.setattr(forks, "_fork", refused)
            with pytest.raises(BlockingIOError):
                [*forked([os.getpid], 2)]
        assert len([*Path("/proc/self/fd").iterdir()]) == len(before)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {*forks._SIGNALS}

    def test_signals_wait_until_all_processes_are_begun(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin, parent = forks._fork, os.getpid()

        def interrupted() -> int:
            pid = begin()
            os.kill(os.getpid(), signal.SIGINT)
            return pid

        monkeypatch.setattr(forks, "_fork", interrupted)
        # what a shell puts into the background ignores the signal
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                [*forked([os.getpid] * 9, 2)]
        finally:
            signal.signal(signal.SIGINT, before)
        assert os.getpid() == parent
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    def test_nobody_is_left_when_the_iterator_is_closed(self) -> None:
        tasks = [os.getpid] * 40
        results = forked(tasks, 2)
        pids = {next(results) for _ in range(20)}
        results.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    def test_locks_are_not_inherited(self, tmp_path: Path) -> None:
        handle = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="Bad file"):
                [*forked([lambda: os.fstat(handle).st_ino], 1)]
            assert [*forked([lambda: os.fstat(handle).st_ino], 1, [handle])]
        finally:
            os.close(handle)

    def test_not_beside_libraries_with_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in forks._OTHERS:
            monkeypatch.delitem(sys.modules, name, raising=False)
        assert may_fork()
        monkeypatch.setitem(sys.modules, "jax", sys)
        assert not may_fork()


class TestPlacedWriter:
    """A file written anywhere."""

    specs = (("a", "float32", (2, 2)), ("b", "int8", (3,)), ("c", "int8", (0,)))

    def test_any_order(self, tmp_path: Path) -> None:
        with PlacedWriter(tmp_path / "x", self.specs, {"format": "pt"}) as out:
            out.put("b", 1, b"yz")
            out.put("a", 8, np.ones(2, "float32"))
            out.put("b", 0, memoryview(b"x"))
            out.put("a", 0, np.zeros((1, 2), "float32"))
            out.flush()
            for name, size in (("a", 16), ("b", 3)):
                out.count(name, size)
        back = read_safetensors(tmp_path / "x")
        np.testing.assert_array_equal(back["a"], [[0, 0], [1, 1]])
        assert back["b"].tobytes() == b"xyz"

    def test_it_is_what_the_library_writes(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "in", {"x": np.arange(70.0), "y": np.ones(3, "int8")})
        with SafetensorsFile(tmp_path / "in") as source:
            specs = [(n, source.info(n).dtype, source.info(n).shape) for n in source]
            with PlacedWriter(tmp_path / "out", specs) as out:
                out.copy("x", source, "x", 80, 560)
                out.copy("x", source, "x", 0, 80)
                out.copy("y", source, "y", 0, 3)
                out.count("x", 560)
                out.count("y", 3)
        assert (tmp_path / "in").read_bytes() == (tmp_path / "out").read_bytes()

    def test_incomplete_too_long_and_closed(self, tmp_path: Path) -> None:
        with (
            pytest.raises(UsageError, match="'a' was not written"),
            PlacedWriter(tmp_path / "x", self.specs),
        ):
            pass
        with (
            pytest.raises(ShapeError, match="16 announced"),
            PlacedWriter(tmp_path / "x", self.specs) as out,
        ):
            out.put("a", 8, np.ones(3, "float32"))
        assert [*tmp_path.iterdir()] == []
        with PlacedWriter(tmp_path / "x", [("c", "int8", (0,))]) as out:
            pass
        with pytest.raises(UsageError, match="closed"):
            out.put("c", 0, b"")

    @pytest.mark.skipif(not hasattr(os, "fstatvfs"), reason="the system does not tell its space")
    def test_a_file_too_large_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="no space"):
            PlacedWriter(tmp_path / "x", [("a", "int8", (1 << 60,))])
        assert [*tmp_path.iterdir()] == []


def test_damaged_bases_are_refused_on_the_quick_way_too(tmp_path: Path) -> None:
    w, _, _ = layer(512, 256, 2, 0.01)
    made = random_adapter({"fc.weight": w}, LoraConfig(r=2, target_modules=["fc"]))
    for bad in (np.nan, np.inf):
        w[5, 7] = bad
        base = single(tmp_path / str(bad), {"fc.weight": w})
        with pytest.raises(FormatError, match="NaN or infinite"):
            merge_checkpoint(base, made, dry_run=True, any_base=True)
    w[5, 7] = np.float32(3.3e38)
    base = single(tmp_path / "edge", {"fc.weight": w})
    p = made.sites["fc"]
    p["lora_B.weight"][5] = 1e4
    p["lora_A.weight"][:, 7] = 1e33
    with pytest.raises(VerifyError, match="overflow bfloat16"):
        merge_checkpoint(base, made, dry_run=True, any_base=True)


@pytest.mark.parametrize("size", [1e-12, 1e-18, 1e-24])
def test_faint_weights_are_measured_as_others_are(size: float, tmp_path: Path) -> None:
    """Their squares have no place in single precision."""
    w, _, _ = layer(512, 256, 2, 0.01)
    w = (w.astype("f4") * np.float32(size)).astype(BF16)
    made = random_adapter({"fc.weight": w}, LoraConfig(r=2, target_modules=["fc"]))
    made.sites["fc"]["lora_B.weight"] *= np.float32(size * 1e-2)
    (change,) = merge_checkpoint(
        single(tmp_path / "base", {"fc.weight": w}), made, dry_run=True
    ).changes
    exact = peft_any.merge({"fc.weight": widened(w)}, made)["fc.weight"]
    want = measure(w, nearest(exact, "bfloat16"), exact=exact)
    assert (change.kept, change.error) == pytest.approx((want.kept, want.error), rel=1e-4)
    assert change.base_norm == pytest.approx(want.base2**0.5, rel=1e-5)


MEASURED = """
import json, sys, threading, time
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(l.split()[1]) for l in file if l.startswith("Anonymous:")) * 1024
import numpy, peft_any.model, peft_any.surgery.merge
before, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
import peft_any.surgery.threads as threads
threads.may_fork = lambda: False
peft_any.merge_checkpoint(*sys.argv[1:], threads=2)
print(json.dumps([before, peak]))
"""


@linux
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """One tensor of 128 MB is merged in anonymous memory of far less than it."""
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((256, 4096), dtype="f4") * 0.02).astype(BF16)
    w = np.tile(block, (64, 1))
    base = single(tmp_path / "base", {"fc.weight": w})
    made = random_adapter({"fc.weight": w}, LoraConfig(r=16, target_modules=["fc"]), scale=0.01)
    made.save(tmp_path / "lora")
    command = [sys.executable, "-c", MEASURED, base, tmp_path / "lora", tmp_path / "out"]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    before, peak = json.loads(run.stdout)
    assert 0 < peak - before < 100 << 20

"""Blocks that turn the inputs, in single precision: what double precision gives, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_any import merge, merge_checkpoint, read_safetensors
from peft_any.errors import FormatError
from peft_any.method import Tuner
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.oft import OFTConfig
from peft_any.surgery import patches
from peft_any.surgery.measure import Moments, measure
from peft_any.surgery.passes import SWITCH, chosen, passes
from peft_any.surgery.rounding import nearest, widened
from peft_any.surgery.turned import Turned
from tests.models import BF16, random_adapter, single
from tests.test_engine import each_pass as each_pass

SIZES = st.sampled_from(
    [(b, n) for b in (1, 2, 4, 8, 12, 16, 24, 32, 64, 96) for n in (96, 192, 384) if n % b == 0]
)


def draw(rows: int, n: int, b: int, angle: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a bfloat16 weight, and blocks that are nearly rotations."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, n)) * 0.02).astype(BF16)
    x = rng.standard_normal((n // b, b, b)) * angle
    return w, np.eye(b) + x - np.swapaxes(x, 1, 2) + x @ x / 2


def by_blocks(w: np.ndarray, turn: np.ndarray, dtype: Any = np.longdouble) -> np.ndarray:
    """Form W·diag(t) in more than double precision."""
    (rows, n), b = w.shape, turn.shape[-1]
    wide = widened(w).astype(dtype).reshape(rows, n // b, b, 1)
    blocks = np.broadcast_to(turn, (n // b, b, b)).astype(dtype)
    return np.sum(wide * blocks, axis=2).reshape(rows, n)


def loss(m: Moments) -> float:
    """Say how far sums of some size may be off that were formed in single precision."""
    return 2.0**-22 * ((m.base2 + m.delta2) * (m.miss2 + m.delta2)) ** 0.5 + m.size * 2.0**-149


@pytest.mark.usefixtures("each_pass")
class TestValues:
    """By whichever pass."""

    @given(
        size=SIZES,
        rows=st.integers(1, 41),
        angle=st.sampled_from([0.0, 1e-4, 1e-3, 0.01]),
        gains=st.sampled_from([None, 1.0, 1e-3]),
        seed=st.integers(0, 2**32),
    )
    def test_they_are_those_of_double_precision(
        self, size: tuple[int, int], rows: int, angle: float, gains: float | None, seed: int
    ) -> None:
        w, turn = draw(rows, size[1], size[0], angle, seed)
        gain = gains and gains * np.random.default_rng(seed).uniform(-1.5, 1.5, rows)
        sums = Turned.of(turn, size[1], w)
        assume(sums is not None)
        got, moments = sums.rounded(w, 0, gain)
        exact = by_blocks(w, turn) * (1 if gain is None else gain[:, None])
        double = exact.astype("float64")
        np.testing.assert_array_equal(got.view("u2"), nearest(double, "bfloat16").view("u2"))
        want = measure(w, got, exact=double)
        assert (moments.same, moments.size) == (want.same, want.size)
        assert vars(moments) == pytest.approx(vars(want), rel=1e-5, abs=loss(want))

    @given(
        size=SIZES,
        weights=st.lists(st.integers(-255, 255), min_size=1, max_size=24),
        entries=st.lists(
            st.sampled_from(
                [0, 1, -1, 2.0**-8, -(2.0**-9), 3 * 2.0**-9, 2.0**-9 + 2.0**-31, 2.0**-8 - 2.0**-40]
            ),
            min_size=1,
            max_size=24,
        ),
        gain=st.sampled_from([None, 1.0, -0.5, 1 + 2.0**-8, 1 - 2.0**-9, 1 + 2.0**-35]),
        seed=st.integers(0, 2**32),
    )
    def test_ties_and_what_lies_beside_them(
        self,
        size: tuple[int, int],
        weights: list[int],
        entries: list[float],
        gain: float | None,
        seed: int,
    ) -> None:
        """Few bits each, so that double precision has their sums without any error."""
        (b, n), rng = size, np.random.default_rng(seed)
        w = rng.choice(np.asarray(weights, "f4"), (9, n)).astype(BF16)
        some = rng.random((n // b, b, b)) < 3 / b
        turn = np.where(some, rng.choice(np.asarray(entries, "f8"), some.shape), 0.0)
        sums = Turned(turn - np.eye(b))
        gains = None if gain is None else np.full(9, gain)
        exact = by_blocks(w, turn) * (1 if gain is None else gain)
        assume(gain != 1 + 2.0**-35 or np.array_equal(exact, exact.astype("float64")))
        want = nearest(exact.astype("float64"), "bfloat16")
        np.testing.assert_array_equal(widened(sums.rounded(w, 0, gains)[0]), widened(want))

    @pytest.mark.parametrize("gained", [False, True])
    @pytest.mark.parametrize("b", [4, 24, 32])
    def test_many_of_which_single_precision_has_some_wrong(self, gained: bool, b: int) -> None:
        w, turn = draw(512, 1152, b, 0.01, 5)
        gain = np.linspace(0.4, 2.1, 512) if gained else np.ones(512)
        want = nearest(by_blocks(w, turn, "f8") * gain[:, None], "bfloat16").view("u2")
        sums = Turned.of(turn, 1152, w)
        assert sums is not None

        def rows_at_once(step: int) -> Any:
            starts = range(0, 512, step)
            parts = [slice(i, i + step) for i in starts]
            some = [sums.rounded(w[s], s.start, gain[s] if gained else None)[0] for s in parts]
            return np.concatenate(some).view("u2")

        for step in (512, 100, 37):
            np.testing.assert_array_equal(rows_at_once(step), want)
        naive = by_blocks(w, turn.astype("f4"), "f4") * gain[:, None].astype("f4")
        assert np.count_nonzero(naive.astype(BF16).view("u2") != want)

    def test_one_block_for_all(self) -> None:
        w, turn = draw(20, 128, 32, 0.01, 0)
        one = Turned.of(turn[:1], 128, w)
        all_ = Turned.of(np.repeat(turn[:1], 4, axis=0), 128, w)
        assert one is not None
        assert all_ is not None
        assert one.rounded(w, 0)[0].tobytes() == all_.rounded(w, 0)[0].tobytes()


@given(
    size=SIZES,
    rows=st.integers(1, 21),
    gained=st.booleans(),
    seed=st.integers(0, 2**32),
    odd_ones=st.lists(
        st.sampled_from([0.0, -0.0, np.inf, np.nan, 1e-40, 1e-30, 1e4, 3e38]), max_size=3
    ),
)
def test_all_passes_give_the_same_bits(
    size: tuple[int, int], rows: int, gained: bool, seed: int, odd_ones: list[float]
) -> None:
    w, turn = draw(rows, size[1], size[0], 0.003, seed)
    sums = Turned.of(turn, size[1], w)
    assume(sums is not None)
    rng, found = np.random.default_rng(seed), []
    w.reshape(-1)[rng.integers(0, w.size, len(odd_ones))] = odd_ones
    gain = rng.uniform(-1.5, 1.5, rows) if gained else None
    for name in passes():
        with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
            patch.setenv(SWITCH, name)
            found.append(sums.rounded(w, 0, gain))
    (values, moments), *others = found
    for got, measured in others:
        assert measured.finite == moments.finite
        if moments.finite:
            assert got.tobytes() == values.tobytes()
            assert measured.same == moments.same
            assert vars(measured) == pytest.approx(vars(moments), rel=1e-5, abs=loss(moments))


def test_double_precision_is_taken_where_it_is_quicker() -> None:
    w, turn = draw(16, 512, 32, 1e-3, 0)
    assert Turned.of(turn, 512, w) is not None
    assert Turned.of(np.eye(32)[None], 512, w) is not None
    assert Turned.of(np.eye(512)[None], 512, w) is not None
    wide = np.zeros((16, 544), BF16)
    assert Turned.of(turn[:, :17, :17], 544, wide) is None, "17 by 17 is filled up to 544"
    assert Turned.of(np.eye(544)[None], 544, np.ones_like(wide)) is None, "the pass knows 512"
    assert Turned.of(np.eye(4)[None], 36, w[:, :36]) is None, "36 columns are no panels"
    assert Turned.of(turn * 1e7, 512, w) is None
    assert Turned.of(turn * np.nan, 512, w) is None
    assert Turned.of(turn, 512, np.zeros_like(w)) is None
    assert Turned.of(turn, 512, np.full_like(w, 1e30)) is None
    assert Turned.of(draw(1, 512, 256, 0.3, 0)[1], 512, w) is None, "many would be doubtful"


@pytest.mark.skipif(len(passes()) == 1, reason="this installation has no compiled pass")
def test_the_compiled_pass_checks_what_it_is_given() -> None:
    w, turn = draw(3, 128, 16, 1e-3, 0)
    sums = Turned.of(turn, 128, w)
    assert sums is not None
    name, compiled = passes()[-1], chosen()[1]
    assert compiled is not None
    fine = [w.view("u2"), np.empty((3, 128), "u2"), *sums.given(slice(3))]
    assert len(compiled.add(name, *fine, None, None)) == 5
    for i, array in enumerate(fine):
        for wrong in (None, *([] if array is None else [array[:-1], array[:0]])):
            if wrong is not array:
                with pytest.raises((ValueError, BufferError)):
                    compiled.add(
                        name, *(wrong if j == i else a for j, a in enumerate(fine)), None, None
                    )
    with pytest.raises(ValueError, match="do not belong together"):
        compiled.add(name, *fine, np.ones(2, "f4"), np.ones(2))


CONFIGS: dict[str, Tuner] = {
    "oft": OFTConfig(oft_block_size=16, target_modules=["fc"]),
    "shared": OFTConfig(oft_block_size=8, block_share=True, target_modules=["fc"]),
    "boft": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["fc"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merges_take_the_quick_way_and_fall_back_by_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((4200, 256), dtype="f4") * 0.02).astype(BF16)
    adapter = random_adapter({"fc.weight": w}, CONFIGS[name], scale=1e-2)
    base = single(tmp_path / "base", {"fc.weight": w})
    quick = merge_checkpoint(base, adapter, tmp_path / "quick", threads=1)
    again = merge_checkpoint(base, adapter, tmp_path / "again", threads=2)
    asked: list[int] = []

    def refused(*_: Any) -> None:
        asked.append(1)

    monkeypatch.setattr(patches.Start, "turned", refused)
    slow = merge_checkpoint(base, adapter, tmp_path / "slow", threads=1)
    assert asked
    files = [next((tmp_path / n).glob("*.safetensors")) for n in ("quick", "again", "slow")]
    assert len({file.read_bytes() for file in files}) == 1
    assert quick.changes == again.changes
    assert quick.changes != slow.changes, "single precision measures otherwise in the last digits"
    for one, two in zip(quick.changes, slow.changes, strict=True):
        assert one.unchanged == two.unchanged
        assert (one.kept, one.error) == pytest.approx((two.kept, two.error), rel=1e-6)


@pytest.mark.parametrize("small", [0.0, 1e-40, 2.0**-130])
def test_gains_that_single_precision_cannot_hold(small: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((512, 256)) * 1e5).astype(BF16)
    config = BOFTConfig(boft_block_size=4, target_modules=["fc"])
    adapter = random_adapter({"fc.weight": w}, config, scale=1e-2)
    p = adapter.sites["fc"]
    p["boft_s"] = np.full((512, 1), small)
    base = single(tmp_path / "base", {"fc.weight": w})
    merge_checkpoint(base, adapter, tmp_path / "out", threads=1)
    want = nearest(merge({"fc.weight": widened(w)}, adapter)["fc.weight"], "bfloat16")
    got = read_safetensors(next((tmp_path / "out").glob("*.safetensors")))["fc.weight"]
    np.testing.assert_array_equal(widened(got), widened(want))
    assert np.any(want) == (small > 0)


def test_damaged_bases_are_refused_on_the_quick_way_too(tmp_path: Path) -> None:
    w = np.full((512, 256), 0.01, BF16)
    adapter = random_adapter({"fc.weight": w}, CONFIGS["oft"])
    w[5, 7] = np.nan
    base = single(tmp_path / "base", {"fc.weight": w})
    with pytest.raises(FormatError, match="NaN or infinite"):
        merge_checkpoint(base, adapter, dry_run=True, any_base=True)

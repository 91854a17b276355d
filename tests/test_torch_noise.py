"""Draws by torch's generators: the distributions of those on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peft_any.dropout import Noise  # noqa: E402
from peft_any.integrations.torch.noise import Drawn  # noqa: E402

LIKE = torch.ones(1, dtype=torch.float64)
MANY = 4000
DRAWS: dict[str, Any] = {
    "kept": lambda n: n.kept((MANY,), 0.3, LIKE),
    "kept unscaled": lambda n: n.kept((MANY,), 0.3, LIKE, scaled=False),
    "thinned": lambda n: n.thinned(torch.ones(MANY, dtype=torch.float64), 0.3),
    "normal": lambda n: n.normal((MANY,), LIKE),
    "logistic": lambda n: n.logistic((MANY,), LIKE),
    "rows": lambda n: n.rows(MANY, 0.3, LIKE, scaled=False),
}


@pytest.mark.parametrize("name", DRAWS)
def test_distributions(name: str) -> None:
    """By the distance of Kolmogorov and Smirnov, which two samples exceed once in a million."""
    torch.manual_seed(0)
    ours, host = (DRAWS[name](n) for n in (Drawn(()), Noise.of(0)))
    assert ours.dtype == host.dtype == torch.float64
    both = np.sort(torch.cat([ours, host]).numpy())
    shares = [np.searchsorted(np.sort(d.numpy()), both, side="right") / MANY for d in (ours, host)]
    assert np.abs(shares[0] - shares[1]).max() < 2.7 * (2 / MANY) ** 0.5


def test_blocks_of_one_factor() -> None:
    torch.manual_seed(0)
    masks = torch.stack([Drawn(()).chosen_in(3, 8, 0.5, LIKE) for _ in range(MANY)])
    assert masks.shape == (MANY, 3, 8, 1, 1)
    assert (masks.sum((1, 2)) == 4).all()
    assert ((masks.amax(2) > 0).sum(1) == 1).all()  # all of them in one factor
    assert (masks.mean(0) - 0.5 / 3).abs().max() < 6 * (0.14 / MANY) ** 0.5


def test_coins_rates_and_integers() -> None:
    torch.manual_seed(0)
    coins = [Drawn(()).happens(0.25) for _ in range(MANY)]
    assert abs(np.mean(coins) - 0.25) < 6 * (0.19 / MANY) ** 0.5
    before = torch.get_rng_state()
    assert not Drawn(()).happens(0.0)
    assert torch.equal(torch.get_rng_state(), before)
    tokens = torch.arange(3)
    assert Drawn(()).thinned(tokens, 0.5) is tokens
    assert not Drawn(()).thinned(LIKE, 1.0).any()
    scaled = Drawn(()).rows(MANY, 0.3, LIKE, scaled=True)
    assert abs(scaled.mean() - 1) < 1e-9
    assert abs((scaled > 0).double().mean() - 0.7) < 6 * (0.21 / MANY) ** 0.5
    none = Drawn(()).rows(4, 1.0, LIKE, scaled=True)
    assert torch.equal(none, torch.zeros(4, dtype=torch.float64))

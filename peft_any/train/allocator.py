"""AdaLoRA's allocator of ranks: it shares a budget of triplets among all sites while they train.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512, step by step as Hugging Face PEFT does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from peft_any._tree import fused, tree_map
from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.backend import from_numpy_like, namespace, to_numpy
from peft_any.errors import ConfigError
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.train.transforms import not_finite

Sites: TypeAlias = Mapping[str, Params]
State: TypeAlias = dict[str, Any]
NAMES = ("lora_A", "lora_E", "lora_B")


@dataclass(frozen=True)
class RankAllocator:
    """The allocator of one AdaLoRA adapter: pure functions of a state.

    After every step of the optimiser, `update` takes the new parameters and the gradients that
    led to them. Until ``total_step - tfinal`` it smooths the importance of every number,
    |p·∂L/∂p|, by ``beta1``, and its uncertainty by ``beta2``; a triplet's score is the product
    of both at its E, plus the means of the products over its row of A and its column of B.
    Every ``deltaT`` steps the E of the lowest scores of all sites together become 0, so many as
    the budget of the cubic schedule leaves out; at ``total_step - tfinal`` the last mask is set.

    Attributes
    ----------
    config : AdaLoraConfig

    Examples
    --------
    >>> config = AdaLoraConfig(init_r=4, target_r=2, tinit=10, tfinal=10, total_step=100)
    >>> allocator = RankAllocator(config)
    >>> [allocator.budget(step, sites=3)[0] for step in (0, 10, 30, 50, 70, 90, 100)]
    [12, 12, 8, 6, 6, 6, 6]
    """

    config: AdaLoraConfig

    def init(self, sites: Sites) -> State:
        """Start for the parameters of all sites, {site: {name: array}}.

        Raises
        ------
        ConfigError
            If no site has triplets, or some are pruned already.
        """
        own = triplets(sites)
        for site, p in own.items():
            if p["lora_E"].shape[0] != self.config.init_r:
                raise ConfigError(
                    f"{site}: {p['lora_E'].shape[0]} triplets cannot be allocated: init_r="
                    f"{self.config.init_r}; a pruned adapter trains without the allocator"
                )
        return {"importance": _zeros(own), "uncertainty": _zeros(own), "mask": None}

    def budget(self, step: int, sites: int) -> tuple[int, bool]:
        """Give the triplets that all sites together may keep at a step, and whether to mask now."""
        c = self.config
        first, last, total = c.init_r * sites, c.target_r * sites, c.total_step or 0
        if step <= c.tinit:
            return first, False
        if step > total - c.tfinal:
            return last, True
        left = 1 - (step - c.tinit) / (total - c.tfinal - c.tinit)
        return int((first - last) * left**3 + last), step % c.deltaT == 0

    def update(
        self, grads: Sites, state: State, params: Sites, step: int
    ) -> tuple[dict[str, Params], State]:
        """Score all triplets, and mask those above the budget.

        Parameters
        ----------
        grads, params : {site: {name: array}}
            The gradients of the loss (`AdaLoraConfig.regularizer` included), and the parameters
            after the optimiser's step.
        state : dict
        step : int
            Hugging Face PEFT's ``global_step``; the last mask is set at ``total_step - tfinal``.

        Returns
        -------
        params : {site: {name: array}}
            With the masked entries of E at 0.
        state : dict
        """
        c, own = self.config, triplets(params)
        end = (c.total_step or 0) - c.tfinal
        if step > end:
            return self.masked(params, state["mask"]), state
        if step < end:
            state = self._scored(grads, state, own)
        budget, now = self.budget(step, len(own))
        if now or step == end:
            state = {**state, "mask": self._mask(state, own, budget)}
            params = self.masked(params, state["mask"])
        if step == end:
            state = {**state, "importance": _zeros(own), "uncertainty": _zeros(own)}
        return {site: dict(p) for site, p in params.items()}, state

    def masked(self, params: Sites, mask: Mapping[str, Any] | None) -> dict[str, Params]:
        """Set the E of the triplets that a mask leaves out to 0."""
        out = {site: dict(p) for site, p in params.items()}
        for site, kept in (mask or {}).items():
            e = out[site]["lora_E"]
            host = np.asarray(kept, dtype=bool)[:, None]
            xp = namespace(e)
            out[site]["lora_E"] = xp.where(from_numpy_like(host, e), e, xp.zeros_like(e))
        return out

    def pruned(self, adapter: Adapter, state: State) -> Adapter:
        """Give an adapter its `rank_pattern`, and only the triplets kept: as a saved file has it.

        Without any mask (no budget was shared out yet) the adapter stays as it is.
        """
        if not state["mask"]:
            return adapter
        pattern = {f"{s}.lora_E": [bool(k) for k in kept] for s, kept in state["mask"].items()}
        config = replace(self.config, rank_pattern=pattern)
        _, sites = config.portable(adapter.sites)
        return adapter.replace(config=config, sites=sites)

    def _scored(self, grads: Sites, state: State, own: Sites) -> State:
        betas = self.config.beta1, self.config.beta2
        slopes = {site: {name: grads[site][name] for name in NAMES} for site in own}
        found = _smoothed(own, slopes, state["importance"], state["uncertainty"], betas)
        return {**state, "importance": found[0], "uncertainty": found[1]}

    def _mask(self, state: State, own: Sites, budget: int) -> dict[str, list[bool]]:
        found = _scores(state["importance"], state["uncertainty"])
        scores = {site: np.asarray(to_numpy(found[site])) for site in own}
        every = np.concatenate([*scores.values()])
        drop = every.size - budget
        if faults := not_finite(scores):
            raise ConfigError(f"{faults[0]}: scores that are not finite cannot be ranked")
        if drop <= 0:
            return {site: [True] * s.size for site, s in scores.items()}
        threshold = np.partition(every, drop - 1)[drop - 1]
        return {site: [bool(k) for k in s > threshold] for site, s in scores.items()}


@fused
def _smoothed(
    own: Sites, grads: Sites, importance: Sites, uncertainty: Sites, betas: tuple[float, float]
) -> tuple[Sites, Sites]:
    first, second = betas
    now = tree_map(lambda p, g: namespace(p, g).abs(p * g), own, grads)
    smooth = tree_map(lambda i, n: first * i + (1 - first) * n, importance, now)
    return smooth, tree_map(
        lambda u, n, i: second * u + (1 - second) * namespace(n).abs(n - i),
        uncertainty,
        now,
        smooth,
    )


@fused
def _scores(importance: Sites, uncertainty: Sites) -> dict[str, Array]:
    found = {}
    for site, i in importance.items():
        a, e, b = (i[name] * uncertainty[site][name] for name in NAMES)
        xp = namespace(a, e, b)
        found[site] = e[:, 0] + (xp.mean(a, axis=1) + xp.mean(b, axis=0))
    return found


def triplets(sites: Sites) -> dict[str, Params]:
    """Take the sites that have triplets, and of them A, E and B.

    Raises
    ------
    ConfigError
        If there are none.
    """
    own = {s: {k: p[k] for k in NAMES} for s, p in sites.items() if "lora_E" in p}
    if not own:
        raise ConfigError("params: no site has lora_A, lora_E and lora_B: nothing to allocate")
    return own


def _zeros(sites: Sites) -> dict[str, dict[str, Array]]:
    return {s: {k: namespace(a).zeros_like(a) for k, a in p.items()} for s, p in sites.items()}

"""Poly and MHR: a mixture of LoRAs for each task. Ponti et al. 2022, https://arxiv.org/abs/2202.13914."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

from peft_any.activations import sigmoid
from peft_any.backend import from_numpy_like, is_array, namespace
from peft_any.checks import check_divides
from peft_any.contract import Additive, Array, Kind, Layer, Noise, Params, Shape, Site
from peft_any.errors import ConfigError, ShapeError
from peft_any.fields import Count, Excludes
from peft_any.initial import uniform, zeros
from peft_any.layer import linear
from peft_any.outputs import added


class PolyConfig(Additive, Excludes, peft_type="POLY"):
    """ΔW(t) = B(t)·A(t)/r for task t, of mixtures of k = `n_skills` factors in each of q splits.

    Split i of the inputs has Σₛ wₛ·Aᵢₛ of `poly_lora_A` (q, k, n_in/q, r), that of the outputs
    Σₛ wₛ·Bᵢₛ of `poly_lora_B` (q, k, r, n_out/q), with w = σ(z)/Σσ(z) and z the place (t, i) of
    `poly_router.module_logits` (T, q·k), T = `n_tasks`. In training a relaxed Bernoulli draw for
    each row stands for σ(z). A call gets its tasks by `PeftModel.routed`: `task_ids`, a number or
    one for each row; of one task alone it need not. One task's ΔW can be merged: `of_task`.

    n_splits: q; above 1 it is multi-head routing (MHR; Caccia et al. 2022,
        https://arxiv.org/abs/2211.03831). init_weights: true (B = 0), false (B random).
    """

    draws: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    inner: ClassVar[str] = "(module_logits)?"

    r: Count = 8
    poly_type: Literal["poly"] = "poly"
    n_tasks: Count = 1
    n_skills: Count = 4
    n_splits: Count = 1
    init_weights: bool = True

    @property
    def takes(self) -> frozenset[str]:
        """The tasks."""
        return frozenset({"task_ids"})

    def per_site(self, site: Site) -> Self:
        """Check that the splits fit."""
        check_divides("n_splits", self.n_splits, site)
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """Factors by split and skill, B zero, and the router, near 0."""
        q, k, n, m = self.n_splits, self.n_skills, site.n_in, site.n_out
        blank = zeros if self.init_weights else partial(uniform, self.r**-0.5)
        return {
            "poly_lora_A": uniform((n // q) ** -0.5, q, k, n // q, self.r),
            "poly_lora_B": blank(q, k, self.r, m // q),
            "poly_router.module_logits": uniform(1e-3, self.n_tasks, q * k),
        }

    def of_task(self, sites: Mapping[str, Params], task: int) -> tuple[Self, dict[str, Params]]:
        """Give configuration and parameters for one task alone, which can be merged."""
        if not 0 <= task < self.n_tasks:
            raise ConfigError(f"{self.where}: task {task} is not there: n_tasks={self.n_tasks}")
        z = "poly_router.module_logits"
        return replace(self, n_tasks=1), {
            name: {**p, z: p[z][task : task + 1, :]} for name, p in sites.items()
        }

    def _chosen(self, p: Params) -> Array:
        """The tasks' logits (rows, q·k)."""
        logits, ids = p["poly_router.module_logits"], p.get("task_ids", 0)
        if "task_ids" not in p and self.n_tasks > 1:
            raise ConfigError(
                f"{self.where}: n_tasks={self.n_tasks} tasks cannot act at once: choose with "
                "model.routed(task_ids=…), or take one by of_task"
            )
        if not is_array(ids):
            listed: list[int] = [*ids] if isinstance(ids, list | tuple) else [ids]
            if not listed or not 0 <= min(listed) <= max(listed) < self.n_tasks:
                raise ConfigError(f"{self.where}: task_ids={ids!r}: n_tasks={self.n_tasks}")
            ids = from_numpy_like(listed, logits)
        xp = namespace(logits)
        return xp.take(logits, xp.reshape(ids, (-1,)), axis=0)

    def _mixed(self, shares: Any, p: Params, site: Site) -> tuple[Array, Array]:
        """A (rows, n_in, r) and B/r (rows, r, n_out) of shares σ (rows, q·k)."""
        a, b = p["poly_lora_A"], p["poly_lora_B"]
        xp, (q, k, n, r), m = namespace(shares, a, b), a.shape, b.shape[3]
        shares = xp.reshape(shares, (-1, q, k))
        w = xp.permute_dims(shares / (xp.sum(shares, axis=-1, keepdims=True) + 1e-12), (1, 0, 2))
        a = xp.reshape(w @ xp.reshape(a, (q, k, n * r)), (q, -1, n, r))
        b = xp.reshape((w / r) @ xp.reshape(b, (q, k, r * m)), (q, -1, r, m))
        a = xp.reshape(xp.permute_dims(a, (1, 0, 2, 3)), (-1, site.n_in, r))
        return a, xp.reshape(xp.permute_dims(b, (1, 2, 0, 3)), (-1, r, site.n_out))

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Bᵀ/r and Aᵀ of one task."""
        a, b = self._mixed(sigmoid(self._chosen(p)), p, site)
        if a.shape[0] != 1:
            raise ConfigError(f"{site.name}: {a.shape[0]} tasks have no ΔW in common: choose one")
        return b[0, :, :].T, a[0, :, :].T

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """(x·A(t))·B(t)/r, with each row's task."""
        return self._applied(sigmoid(self._chosen(p)), p, x, site)

    def _applied(self, shares: Array, p: Params, x: Array, site: Site) -> Array:
        a, b = self._mixed(shares, p, site)
        if a.shape[0] == 1:
            return linear(linear(x, a[0, :, :].T), b[0, :, :].T)
        if x.ndim < 2 or a.shape[0] != x.shape[0]:
            raise ShapeError(f"{site.name}: {a.shape[0]} tasks for input of shape {x.shape}")
        xp = namespace(x, a)
        y = xp.reshape(x, (x.shape[0], -1, site.n_in)) @ a @ b
        return xp.reshape(y, (*x.shape[:-1], site.n_out))

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x) + residual(x)."""
        return added(base, x, self.residual(p, x, base.site))

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Draw the shares: σ(z + log(u/(1 − u))), u uniform (Maddison et al. 2017)."""
        z = self._chosen(p)
        rows = x.shape[0] if x.ndim > 1 and z.shape[0] == 1 else z.shape[0]
        shares = sigmoid(z + noise.at("router").logistic((rows, z.shape[1]), z))
        return added(base, x, self._applied(shares, p, x, base.site))

"""The new values of touched tensors, one at a time, and what rounding left of the change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peft_any import parts as several
from peft_any.backend import Backend, astype, compute_dtype, from_numpy, is_floating, move, to_numpy
from peft_any.errors import BackendError, FormatError, VerifyError
from peft_any.layer import Dense, Site
from peft_any.method import Additive
from peft_any.parts import Part
from peft_any.receipt import Change, Host
from peft_any.surgery.measure import all_finite, change_of, measure
from peft_any.surgery.plan import Plan

_WIDEST = ("float32", "float64", "bfloat16")
_WIDER = "give a dtype with a larger range (--dtype float32 or bfloat16)"


@dataclass
class Surgeon:
    """Computes the touched tensors of a plan.

    Parameters
    ----------
    plan : Plan
    backend : Backend
        Where layers are merged; files, rounding and statistics are NumPy's.
    dtype : str or None
        Of the results, where it is not to be the base's.
    """

    plan: Plan
    backend: Backend
    dtype: str | None = None
    _last: dict[str, tuple[Host, Change]] = field(default_factory=dict)

    def dtype_of(self, tensor: str) -> str:
        """Say in what dtype a touched tensor is stored."""
        stored = self.plan.view.info(tensor).dtype
        return self.dtype if self.dtype and is_floating(stored) else stored

    def value(self, tensor: str) -> tuple[Host, Change]:
        """Compute a touched tensor, rounded once, with what became of the change.

        Raises
        ------
        FormatError
            If the base has NaN or infinities there.
        VerifyError
            If the result has some: it does not fit the dtype.
        """
        if tensor in self._last:
            return self._last.pop(tensor)
        site = self.plan.touched[tensor].site
        if site is None:
            return self._copied(tensor)
        made = self._site(site)
        result = made.pop(tensor)
        self._last = made
        return result

    def audited(self, tensor: str, realised: Host) -> tuple[Change, Change]:
        """Measure somebody else's value of a tensor, and what is best in its dtype, alike."""
        site, delta = self.plan.touched[tensor].site, None
        base = self._finite(tensor)
        if site is None:
            exact = self._replaced(tensor)
        else:
            merged, deltas = self._merged(site)
            exact, delta = merged[tensor], deltas.get(tensor)
        with np.errstate(over="ignore"):
            best = astype(exact, realised.dtype.name)
        theirs, ours = (
            self._change(tensor, base, a, exact=exact, delta=delta) for a in (realised, best)
        )
        return theirs, ours

    def _copied(self, tensor: str) -> tuple[Host, Change]:
        base = self._finite(tensor)
        exact = self._replaced(tensor)
        realised = self._rounded(exact, tensor)
        return realised, self._change(tensor, base, realised, exact=exact)

    def _site(self, site: Site) -> dict[str, tuple[Host, Change]]:
        merged, deltas = self._merged(site)
        out = {}
        for tensor in [*merged]:
            exact = merged.pop(tensor)
            realised = self._rounded(exact, tensor)
            base = self.plan.view.stored(tensor)
            delta = deltas.pop(tensor, None)
            change = self._change(tensor, base, realised, exact=exact, delta=delta)
            out[tensor] = realised, change
        return out

    def _change(
        self,
        tensor: str,
        base: Host,
        realised: Host,
        *,
        exact: Host,
        delta: Host | None = None,
    ) -> Change:
        moments = measure(base, realised, exact=None if delta is not None else exact, delta=delta)
        return change_of(tensor, self.plan.by(tensor), base, realised, moments)

    def _finite(self, tensor: str) -> Host:
        base = self.plan.view.stored(tensor)
        if is_floating(base) and not all_finite(base):
            where = self.plan.view.aliases.get(tensor, tensor)
            raise FormatError(
                f"{where}: cannot be merged into: the base has NaN or infinite values there; "
                "get an undamaged copy of it"
            )
        return base

    def _rounded(self, exact: Host, tensor: str) -> Host:
        name = self.dtype_of(tensor)
        with np.errstate(over="ignore"):
            realised: Host = astype(exact, name)
        if is_floating(name) and not all_finite(realised):
            raise VerifyError(
                f"{tensor}: the merged values cannot be stored: they overflow {name}; "
                + ("the adapter's effect is too large" if name in _WIDEST else _WIDER)
            )
        return realised

    def _replaced(self, tensor: str) -> Host:
        """Give a tensor as full copies and new rows leave it, before any rounding."""
        plan, how = self.plan, self.plan.touched.get(tensor)
        base = plan.view[tensor]
        owners = () if how is None else (*how.copies, *how.rows)
        if not owners:
            return base
        arrays = [plan.placed[i].adapter for i in owners]
        if not is_floating(base):
            whole: Host = arrays[0].extra[tensor]
            return whole
        given = [a for o in arrays for n, a in o.extra.items() if n == tensor]
        weights = [plan.given[i].weight for i in dict.fromkeys(owners)]
        plain = weights == [1.0]
        name = compute_dtype(base, *given) if plain else "float64"
        wide = astype(base, name)
        total: Host = wide
        for i, weight in zip(dict.fromkeys(owners), weights, strict=True):
            new: Any = plan.placed[i].adapter.replacement(tensor, wide)
            total = new if plain else total + weight * (new - wide)
        return total

    def _merged(self, site: Site) -> tuple[dict[str, Host], dict[str, Host]]:
        """Merge a site: its tensors before rounding, and Δ where it is known better than W′ − W."""
        plan = self.plan
        names = [site.weight, site.bias_name] if site.bias else [site.weight]
        for name in names:
            self._finite(name)
        tensors = [self._replaced(name) for name in names]
        layer = Dense.of(tensors[0], tensors[1] if site.bias else None, site)
        layer, parts = self._widened(layer, [self._part(i, site) for i in plan.parts(site)])
        merged, dw, db = several.realise(parts, layer)
        out = {site.weight: to_numpy(merged.stored())}
        deltas = {site.weight: to_numpy(merged.replace(weight=dw).stored())}
        if site.bias_name in plan.touched and merged.bias is not None and db is not None:
            out[site.bias_name], deltas[site.bias_name] = to_numpy(merged.bias), to_numpy(db)
        for name in out:
            if plan.touched[name].copies or plan.touched[name].rows:
                del deltas[name]
        return out, deltas

    def _part(self, index: int, site: Site) -> Part:
        placed = self.plan.placed[index]
        params = {**placed.adapter.shared, **placed.adapter.sites[site.name]}
        return Part(placed.configs[site.name], params, self.plan.given[index].weight)

    def _widened(self, layer: Dense, parts: list[Part]) -> tuple[Dense, list[Part]]:
        """Bring a layer and its adapters to the backend, in the dtype to compute in.

        A float32 base is merged in float64 where Δ only comes out as W′ − W: in float32 that
        difference has lost what the receipt is about.
        """
        floats = [a for part in parts for a in part.params.values() if is_floating(a)]
        name = compute_dtype(layer.weight, *floats)
        if name == "float32" and layer.weight.dtype.name == "float32":
            exact = [replace(p, params=_cast(p.params, name)) for p in parts]
            if not all(_adds(part, layer) for part in exact) and self._has_doubles():
                name = "float64"
        parts = [replace(p, params=move(_cast(p.params, name), self.backend)) for p in parts]

        def there(array: Any) -> Any:
            return None if array is None else from_numpy(astype(array, name), self.backend)

        return Dense(there(layer.weight), there(layer.bias), layer.site), parts

    def _has_doubles(self) -> bool:
        try:
            return is_double(self.backend)
        except BackendError:
            return False


def is_double(backend: Backend) -> bool:
    """Whether a backend computes in float64 where it is asked to."""
    return str(from_numpy(np.zeros(1), backend).dtype).endswith("float64")


def _cast(params: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: astype(a, name) if is_floating(a) else a for k, a in params.items()}


def _adds(part: Part, layer: Dense) -> bool:
    """Whether a method's Δ does not come out of a difference."""
    config = part.config
    return isinstance(config, Additive) and config.gain(part.params, layer) is None

"""The new values of touched tensors: which way each is computed, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from peft_any import parts as several
from peft_any.backend import Backend, astype, compute_dtype, from_numpy, is_floating, move, to_numpy
from peft_any.errors import BackendError
from peft_any.extras import check_copies
from peft_any.layer import EXPERTS, Dense, Site
from peft_any.parts import Part
from peft_any.receipt import Change, Host
from peft_any.surgery.measure import Moments, Strays, change_of
from peft_any.surgery.patches import (
    Copied,
    Cut,
    Experts,
    Merged,
    Patch,
    Product,
    Turned,
    Whole,
)
from peft_any.surgery.plan import Plan
from peft_any.surgery.rounding import nearest
from peft_any.surgery.start import Start
from peft_any.surgery.structure import cast, is_product, is_turned, product, scales
from peft_any.tokens import token_indices


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

    def dtype_of(self, tensor: str) -> str:
        """Say in what dtype a touched tensor is stored."""
        stored = self.plan.view.info(tensor).dtype
        return self.dtype if self.dtype and is_floating(stored) else stored

    def patch(self, tensor: str) -> Patch:
        """Choose how a touched tensor is computed: by blocks of rows, where its method allows."""
        how, start = self.plan.touched[tensor], self.start(tensor)
        site = how.site
        if site is None:
            return Copied(start)
        parts = [self._part(i, site) for i in self.plan.parts(site)]
        if self.backend.name == "numpy":
            if site.kind in EXPERTS:
                return Experts(start, site, parts)
            if tensor == site.weight and is_product(parts, site):
                return Product(start, partial(product, parts, site))
            if all(several.cut(part, site, slice(0, 1)) is not None for part in parts):
                cut = Cut(start, site, parts, self._layer(site))
                quick = start.plain and tensor == site.weight and is_turned(parts)
                return Turned(cut) if quick else cut
        return Whole(start, partial(self._merged, site))

    def start(self, tensor: str) -> Start:
        """Describe a tensor before any method acts on it.

        Raises
        ------
        ShapeError, ConfigError
            If copies or rows have no place in it.
        """
        plan, how = self.plan, self.plan.touched.get(tensor)
        info, base = plan.view.info(tensor), plan.view.stored(tensor)
        name = plan.view.aliases.get(tensor, tensor)
        owners = () if how is None else dict.fromkeys((*how.copies, *how.rows))
        replaced = []
        for i in owners:
            adapter, module = plan.placed[i].adapter, tensor.removesuffix(".weight")
            copy, values = adapter.extra.get(tensor), adapter.tokens.get(module)
            copies = {} if copy is None else {tensor: copy}
            rows = {} if values is None else {module: values}
            check_copies(adapter.config, copies, rows, {tensor: plan.view[tensor]})
            some = None
            if values is not None:
                index = np.asarray(token_indices(adapter.config, module), np.int64)
                some = index % max(info.shape[0], 1), to_numpy(values)
            host = None if copy is None else to_numpy(copy)
            replaced.append((plan.given[i].weight, host, some))
        dtype = self.dtype_of(tensor)
        return Start(name, tensor, base, tuple(info.shape), dtype, tuple(replaced))

    def value(self, tensor: str) -> tuple[Host, Change]:
        """Compute a whole touched tensor, rounded once, with what became of the change.

        Raises
        ------
        FormatError
            If the base has NaN or infinities there.
        VerifyError
            If the result has some: it does not fit the dtype.
        """
        patch = self.patch(tensor)
        made = [patch.made(rows) for rows in patch.blocks]
        values = made[0][0] if len(made) == 1 else np.concatenate([block for block, _ in made])
        return values, self.change(tensor, values.dtype.name, (moments for _, moments in made))

    def audited(self, tensor: str, realised: Host) -> tuple[Change, Change, Strays]:
        """Measure somebody else's value of a tensor, and what is best in its dtype, alike."""
        patch, name, found = self.patch(tensor), realised.dtype.name, []
        strays = Strays()
        for rows in patch.blocks:
            exact, delta = patch.exact(rows)
            theirs = realised[rows] if realised.ndim else realised
            pair = (theirs, nearest(exact, name))
            strays += Strays.of(exact, theirs)
            found.append([patch.moments(exact, delta, one, rows) for one in pair])
        both = zip(*found, strict=True)
        theirs_, ours = (self.change(tensor, name, moments) for moments in both)
        return theirs_, ours, strays

    def change(self, tensor: str, dtype: str, moments: Iterable[Moments]) -> Change:
        """Put what became of a tensor's blocks together, in their order."""
        total = sum(moments, Moments())
        shape = tuple(self.plan.view.info(tensor).shape)
        base = self.plan.view.stored(tensor)
        by = self.plan.by(tensor)
        return change_of(tensor, by, base, total, dtype=dtype, shape=shape)

    def _layer(self, site: Site) -> tuple[Start, ...]:
        names = [site.weight, site.bias_name] if site.bias else [site.weight]
        return tuple(map(self.start, names))

    def _merged(self, site: Site) -> Merged:
        """Merge a site as a whole."""
        plan, starts = self.plan, self._layer(site)
        tensors = [start.rows(0, start.shape[0]) for start in starts]
        layer = Dense.of(tensors[0], tensors[1] if site.bias else None, site)
        layer, parts = self._widened(layer, [self._part(i, site) for i in plan.parts(site)])
        merged, dw, db = several.realise(parts, layer)
        delta = merged.replace(weight=dw)
        out = {site.weight: (to_numpy(merged.stored()), to_numpy(delta.stored()))}
        if site.bias_name in plan.touched and merged.bias is not None and db is not None:
            out[site.bias_name] = to_numpy(merged.bias), to_numpy(db)
        return {
            start.name: (out[start.name][0], None if start.replaced else out[start.name][1])
            for start in starts
            if start.name in out
        }

    def _part(self, index: int, site: Site) -> Part:
        placed = self.plan.placed[index]
        params = {**placed.adapter.shared, **placed.adapter.sites[site.name]}
        return Part(placed.configs[site.name], params, self.plan.given[index].weight)

    def _widened(self, layer: Dense, parts: list[Part]) -> tuple[Dense, list[Part]]:
        """Bring a layer and its adapters to the backend, in the dtype to compute in.

        NumPy computes in float64. On other libraries a float32 base does where Δ only comes out
        as W′ − W: in float32 that difference has lost what the receipt is about.
        """
        name = "float64" if self.backend.name == "numpy" else self._dtype(layer, parts)
        parts = [replace(p, params=move(cast(p.params, name), self.backend)) for p in parts]

        def there(array: Any) -> Any:
            return None if array is None else from_numpy(astype(array, name), self.backend)

        return Dense(there(layer.weight), there(layer.bias), layer.site), parts

    def _dtype(self, layer: Dense, parts: list[Part]) -> str:
        floats = [a for part in parts for a in part.params.values() if is_floating(a)]
        stored = self.plan.view.info(layer.site.weight).dtype
        name = compute_dtype(stored, *floats)
        if name == "float32" and stored == "float32":
            exact = [replace(p, params=cast(p.params, name)) for p in parts]
            if any(scales(part, layer.site) for part in exact) and self._has_doubles():
                return "float64"
        return name

    def _has_doubles(self) -> bool:
        try:
            return is_double(self.backend)
        except BackendError:
            return False


def is_double(backend: Backend) -> bool:
    """Whether a backend computes in float64 where it is asked to."""
    return str(from_numpy(np.zeros(1), backend).dtype).endswith("float64")

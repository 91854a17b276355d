"""GLoRA: generalised LoRA. Chavan et al. 2023, https://arxiv.org/abs/2306.07967."""

from typing import ClassVar, Literal

from peft_any.backend import namespace
from peft_any.contract import Array, Dense, Kind, Params, Shape, Site, Tuner
from peft_any.fields import Biases, Count
from peft_any.initial import kaiming, normal, uniform, zeros


class GloraConfig(Tuner, Biases, peft_type="GLORA"):
    """W′ = W + W ⊙ A + B, b′ = b + b ⊙ D + E + W·C; without a base's bias C, D and E fall away.

    Each of the five is, as a field says,

    "lora": Xd·Xu, with Xd (n_out, r), Xu (r, n_in); of C, (n_in, r) and (r, 1);
    "vector": X (n_out, 1); of C (n_in, 1), of D and E (n_out,);
    "constant": X (1,), one number;
    "none": zero, which a file holds in full size as `zeros`, as Hugging Face PEFT does.

    config_A_B, config_C, config_D_E: the forms of A and B, of C, of D and E.
    init_weights: true (all zero: Xd or X) or false (random).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    frozen: ClassVar[frozenset[str]] = frozenset(f"glora_{path}.zeros" for path in "ABCDE")
    inner: ClassVar[str] = "Xd|Xu|X|zeros"

    r: Count = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815 - HF's names
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    init_weights: bool = True

    def _form(self, path: str, site: Site) -> str:
        fields = {"A": self.config_A_B, "B": self.config_A_B, "C": self.config_C}
        return fields.get(path, self.config_D_E) if site.bias or path in "AB" else "none"

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The parts of the five paths: Xu uniform, all else zero."""
        shapes: dict[str, Shape] = {}
        n, m, r = site.n_in, site.n_out, self.r
        whole: dict[str, Shape] = {"A": (m, n), "B": (m, n), "C": (n, 1), "D": (m,), "E": (m,)}
        for path, full in whole.items():
            form, key = self._form(path, site), f"glora_{path}"
            if form == "lora":
                shapes |= {f"{key}.Xd": self._start(full[0], r), f"{key}.Xu": kaiming(r, full[1])}
            elif form == "none":
                shapes[f"{key}.zeros"] = zeros(*full)
            else:
                column = (full[0], 1) if len(full) == 2 else full
                shapes[f"{key}.X"] = self._start(*(column if form == "vector" else (1,)))
        return shapes

    def _start(self, *shape: int) -> Shape:
        if self.init_weights:
            return zeros(*shape)
        return normal(1, std=0.02) if shape == (1,) else uniform(shape[-1] ** -0.5, *shape)

    def changes_bias(self, site: Site) -> bool:
        """Where there is one, unless C, D and E are none."""
        return site.bias and (self.config_C != "none" or self.config_D_E != "none")

    def _path(self, p: Params, path: str, site: Site) -> Array | float:
        form, key = self._form(path, site), f"glora_{path}"
        if form == "lora":
            return p[f"{key}.Xd"] @ p[f"{key}.Xu"]
        return 0.0 if form == "none" else p[f"{key}.X"]

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + W ⊙ A + B, and the bias."""
        w, site, bias = base.original, base.site, base.bias
        a, b, c, d, e = (self._path(p, path, site) for path in "ABCDE")
        first = base.original_bias
        if bias is not None and first is not None and self.changes_bias(site):
            bias = bias + first * d + e + self._seen(w, c)
        return base.replace(weight=base.weight + w * a + b, bias=bias)

    @staticmethod
    def _seen(w: Array, c: Array | float) -> Array | float:
        """W·C (n_out,)."""
        if isinstance(c, float):
            return 0.0
        return namespace(w).reshape(w @ c, (w.shape[0],))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """(W′ − B)/(1 + A), (b′ − E − W·C)/(1 + D): NaN or infinite where a divisor is 0."""
        site, bias = merged.site, merged.bias
        a, b, c, d, e = (self._path(p, path, site) for path in "ABCDE")
        w = (merged.weight - b) / (1.0 + a)
        if bias is not None and self.changes_bias(site):
            bias = (bias - e - self._seen(w, c)) / (1.0 + d)
        return merged.replace(weight=w, bias=bias)

"""X-LoRA: a gate over LoRA experts. Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from peft_any.checks import refuse
from peft_any.contract import Array, Kind, Params, Routed, Shape, Site
from peft_any.errors import ConfigError
from peft_any.fields import Count, Positive, within
from peft_any.gates import gated, passing, scaled_experts
from peft_any.initial import kaiming, uniform, zeros

A, B = "xlora_A.weight", "xlora_B.weight"
GATE = "internal_xlora_classifier"


class XLoraConfig(Routed, peft_type="XLORA"):
    """y = W·x + b + g·Σₑ pₑ·Bₑ·Aₑ·x, with p (…, E) of each token from a net on the base's output.

    The net, `internal_xlora_classifier.layers.<i>.weight` and ``.bias``, `xlora_depth` layers and
    ReLU between them, reads the base's last hidden states (…, `hidden_size`), which a call gets by
    `PeftModel.routed`: `hidden`, or `scalings`, the g·p themselves. `xlora_A.weight` (E·r, n_in)
    holds the Aₑ of all experts one below the other, `xlora_B.weight` (n_out, E·r) the scaled Bₑ
    side by side. A file has the net alone, and the experts' paths: `load_xlora` reads all.

    hidden_size: null is 4096. adapters: paths by name; numbers say the order.
    global_scaling_weight: g. scaling_pass_value: for p in the pass that gives `hidden`: `passing`.
    enable_softmax, softmax_temperature: p = softmax(net/T). top_k_lora: the largest p alone.
    enable_softmax_topk: softmax after that. layerwise_scalings: p for each layer, in `order`.
    xlora_size: the net's width. use_trainable_adapters: experts are trained, too.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D", "Embedding"})
    why: ClassVar[str] = "every token has shares of its own of the experts"
    grouped: ClassVar[frozenset[str]] = frozenset({GATE})
    unsaid: ClassVar[frozenset[str]] = frozenset(
        {"modules_to_save", "target_modules", "r", "order"}
    )

    hidden_size: Count | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: Annotated[int, within(1, 1000)] = 1
    xlora_size: Count = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: Positive = 1.0
    top_k_lora: Count | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    r: int | None = None
    order: list[str] | None = None

    def check(self) -> None:
        """No more experts are chosen than there are."""
        fits = (self.top_k_lora or 0) <= self.count
        refuse(self, top_k_lora=(fits, f"at most the {self.count} adapters"))

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.adapters or ())

    @property
    def experts(self) -> list[str]:
        """The experts' paths, in the order of their shares."""
        named = self.adapters or {}
        numbers = [str(i) for i in range(len(named))]  # a file has them in the order of strings
        return [named[name] for name in (numbers if named.keys() == {*numbers} else named)]

    @property
    def takes(self) -> frozenset[str]:
        """The base's last hidden states, or the experts' shares."""
        return frozenset({"hidden", "scalings"})

    @property
    def frozen(self) -> frozenset[str]:
        """The experts, unless `use_trainable_adapters`."""
        return frozenset() if self.use_trainable_adapters else frozenset({A, B})

    def among(self, sites: Sequence[Site]) -> Self:
        """Refuse a gate without experts."""
        if self.r is None:
            raise ConfigError(
                f"{self.where}: a gate cannot act without its {self.count} experts, which "
                "have files of their own: peft_any.xlora.load_xlora reads them all"
            )
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The experts' factors: A uniform, B zero."""
        k = self.count * (self.r or 0)
        return {A: kaiming(k, site.n_in), B: zeros(site.n_out, k)}

    @property
    def layers(self) -> list[str]:
        """The names of the net's layers: ReLU, and dropout if there is any, take numbers too."""
        step = 3 if self.xlora_dropout_p > 0 else 2
        return [f"{GATE}.layers.{step * i}" for i in range(self.xlora_depth)]

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """The net, as of torch's linear layers."""
        last = self.count * (len(sites) if self.layerwise_scalings else 1)
        width = 4096 if self.hidden_size is None else self.hidden_size  # as HF takes it to be
        sizes = [width, *[self.xlora_size] * (self.xlora_depth - 1), last]
        pairs = [*zip(self.layers, sizes, sizes[1:], strict=False)]
        biases: dict[str, Shape] = {f"{k}.bias": uniform(n**-0.5, m) for k, n, m in pairs}
        return biases | {f"{k}.weight": uniform(n**-0.5, m, n) for k, n, m in pairs}

    def scalings(self, p: Mapping[str, Array], hidden: Array) -> Array:
        """Give g·p (…, E) of the net among `p`; with `layerwise_scalings` (…, layers, E)."""
        return gated(self, self.layers, p, hidden)

    def passing(self, p: Mapping[str, Array], lead: Sequence[int]) -> Array:
        """Give the `scalings` (*lead, E) of the pass that gives `hidden`; p is the net."""
        return passing(self, p, lead)

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Two products, with each token's shares in between."""
        given = p.get("scalings")
        if given is None:
            given = gated(self, self.layers, p, p.get("hidden"), site.name)
        return scaled_experts((p[A], p[B]), x, given, self.order or [], site)

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """The gate alone: experts keep their own files."""
        return replace(self, r=None, order=None, target_modules=None), {}

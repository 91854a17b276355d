"""LoRA's variants: initial values, products taken out of the base, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft_any._typing import Array, Params, Shape
from peft_any.backend import astype, compute_dtype, namespace, to_numpy
from peft_any.errors import ConfigError, nearest
from peft_any.layer import EXPERTS, Kind, Site
from peft_any.rng import Fresh

FOREIGN = {
    "corda": "it needs the covariance of the layer's inputs",
    "eva": "it needs the layer's inputs",
    "loftq": "it needs a quantiser",
    "lora_ga": "it needs gradients",
}
"""Inits that cannot be computed from the base alone, and why."""


VARIANTS = {
    "use_qalora": "QALoRA needs its quantised base, layers of GPTQ, and Hugging Face PEFT neither "
    "merges nor converts it: run it there, on that base"
}
"""Fields of a LoRA file that change the maths and are not supported, and what they do."""


EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
"""Parameters of an embedding."""


MISFITS: dict[str, frozenset[Kind]] = {
    "lora_bias": frozenset({"Embedding", "MultiheadAttention", *EXPERTS}),
    "use_dora": frozenset({"MultiheadAttention", *EXPERTS}),
    "lora_dropout": EXPERTS,
}
"""Layer kinds that a flag of LoRA cannot adapt."""


FROZEN = (
    frozenset({"start_A", "start_B"}),
    frozenset({"start_A", "start_B", "lora_B.weight", "lora_embedding_B"}),
)
"""Parameters of LoRA that are never trained: of any, and of MiCA."""


GROUPS = (
    "cannot adapt a convolution of several groups: its factors mix all input channels; name it "
    "in exclude_modules"
)


def check_site(config: Any, site: Site) -> None:
    """Refuse a layer that LoRA, or one of its flags, cannot adapt.

    Raises
    ------
    ConfigError
    """
    if site.groups > 1 and site.kind not in EXPERTS:
        raise ConfigError(f"{site.name}: LORA {GROUPS}")
    for flag, kinds in MISFITS.items():
        if getattr(config, flag) and site.kind in kinds:
            raise ConfigError(f"{site.name}: {flag} cannot adapt a {site.kind} layer")


def has_start(init: bool | str | None) -> bool:
    """Whether an `init_lora_weights` takes an initial product out of the base.

    Examples
    --------
    >>> has_start("pissa_niter_16"), has_start("gaussian")
    (True, False)
    """
    how = str(init)
    return how in ("pissa", "olora") or (how[:12] == "pissa_niter_" and how[12:].isdigit())


def missing(init: bool | str | None, p: Params) -> str | None:
    """Say that parameters lack the product taken out of the base, if they do."""
    if not has_start(init) or "start_A" in p or EMBEDDING[0] in p:
        return None
    return f"the product that init_lora_weights={init!r} took out of the base"


def check(config: Any) -> None:
    """Refuse a LoRA configuration that contradicts itself, or an init that does not exist.

    Raises
    ------
    ConfigError
    """
    if config.r < 1:
        raise ConfigError(f"{config.where}: r={config.r} cannot be a rank: give at least 1")
    if config.use_dora and config.lora_bias:
        raise ConfigError(f"{config.where}: lora_bias cannot go with use_dora")
    init = config.init_lora_weights
    known = ("gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", *FOREIGN)
    if isinstance(init, str) and init not in known and not has_start(init):
        raise ConfigError(
            f"{config.where}: init_lora_weights={init!r} is not known{nearest(init, known)}: "
            f"true, false, {', '.join(known)}"
        )


def starting_pair(how: str, site: Site, r: int, scale: float, new: Fresh) -> tuple[Array, Array]:
    """Make the factors a (r, n_in) and b (n_out, r) that an `init_lora_weights` names.

    Decompositions run on the host, so that every library starts from the same numbers.

    Raises
    ------
    ConfigError
        If the init needs data or a quantiser, no base is at hand, or the layer does not fit.
    """
    if how in FOREIGN:
        raise ConfigError(
            f"{site.name}: init_lora_weights={how!r} cannot be computed here: {FOREIGN[how]}; "
            "make the adapter where that is at hand, and load it"
        )
    if site.kind not in ("Linear", "Conv1D") or r > min(site.n_in, site.n_out):
        raise ConfigError(
            f"{site.name}: init_lora_weights={how!r} cannot start a {site.kind} of {site.n_in} "
            f"inputs and {site.n_out} outputs at r={r}: it needs a linear layer of that rank"
        )
    draw, half = new.host.standard_normal, r // 2
    if how == "orthogonal":
        if r % 2:
            raise ConfigError(f"{site.name}: 'orthogonal' cannot halve r={r}: give an even rank")
        a, b = annihilating_factors(draw((r, r)), draw((site.n_in, half)), draw((site.n_out, half)))
    else:
        w = host_weight(new, site, f"init_lora_weights={how!r}")
        sketch = draw((site.n_in, min(r + 8, *w.shape))).astype(w.dtype)
        a, b = starting_factors(how, w, r, scale, sketch)
    return new.array(a), new.array(b)


def initial_factors(
    init: bool | str | None, shapes: Mapping[str, Shape], site: Site, scale: float, new: Fresh
) -> Params:
    """Draw A and B, the first two of `shapes`, as an `init_lora_weights` says."""
    (a, of_a), (b, of_b) = list(shapes.items())[:2]
    if init == "mica":
        return {a: new.zeros(of_a), b: new.array(_minor_vectors(site, of_a[0], new))}
    if site.kind == "Embedding":  # HF gives embeddings these values whatever the init's name
        return {a: new.zeros(of_a) if init else new.normal(of_a), b: new.normal(of_b)}
    if init == "gaussian":
        return {a: new.normal(of_a, 1 / of_a[0]), b: new.zeros(of_b)}
    if not isinstance(init, str):
        return {a: new.kaiming(of_a), b: new.zeros(of_b) if init else new.kaiming(of_b)}
    first, second = starting_pair(init, site, of_a[0], scale, new)
    kept = {"start_A": first, "start_B": second} if has_start(init) else {}
    return {a: first, b: second, **kept}


def host_weight(new: Fresh, site: Site, why: str) -> Any:
    """Take the base's weight, which `why` needs, to the host, in no half precision."""
    base = new.base_for(site.name, why).weight
    return to_numpy(astype(base, compute_dtype(base)))


def _minor_vectors(site: Site, r: int, new: Fresh) -> Array:
    """The left singular vectors (n_out, r) of the base's r smallest singular values."""
    if site.kind not in ("Linear", "Conv1D", "Embedding") or r > min(site.n_in, site.n_out):
        raise ConfigError(
            f"{site.name}: init_lora_weights='mica' cannot start a {site.kind} of {site.n_in} "
            f"inputs and {site.n_out} outputs at r={r}: it needs a linear layer or an embedding "
            "of that rank"
        )
    w = host_weight(new, site, "init_lora_weights='mica'")
    return namespace(w).linalg.svd(w, full_matrices=False)[0][:, -r:]  # type: ignore[no-any-return]


def less_start(a: Array, b: Array, p: Params) -> tuple[Array, Array]:
    """Append the product taken out of the base, so that b·a is what is left of it.

    Raises
    ------
    ConfigError
        If the parameters do not hold that product, as in an unconverted file.
    """
    if "start_A" not in p:
        raise ConfigError(
            "init_lora_weights: this adapter cannot be applied without the product that was taken "
            "out of the base: add it with rederive=True, or convert the file where it was made"
        )
    xp = namespace(a, b)
    return xp.concat([a, p["start_A"]], axis=0), xp.concat([b, -p["start_B"]], axis=1)


def folded(config: Any, sites: Mapping[str, Params]) -> tuple[Any, dict[str, Params]]:
    """Give a LoRA of twice the rank and the same scaling, with nothing taken out of the base.

    What was read from a file that tells no start stays as it is.
    """
    if not has_start(config.init_lora_weights) or not any("start_A" in p for p in sites.values()):
        return config, dict(sites)
    grow = 2**0.5 if config.use_rslora else 2.0
    wide = replace(
        config,
        r=2 * config.r,
        lora_alpha=grow * config.lora_alpha,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: grow * v for k, v in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return wide, {name: _fold_start(p) for name, p in sites.items()}


def _fold_start(p: Params) -> Params:
    """Fold a₀ and b₀ into the factors; an embedding's, without any, get zeros."""
    names = EMBEDDING if EMBEDDING[0] in p else ("lora_A.weight", "lora_B.weight")
    a, b = (p[name] for name in names)
    if names == EMBEDDING:
        none = namespace(a, b).zeros_like
        p = {**p, "start_A": none(a), "start_B": none(b)}
    kept = {k: v for k, v in p.items() if not k.startswith("start_")}
    return {**kept, **dict(zip(names, less_start(a, b, p), strict=True))}


def starting_factors(
    how: str, w: Array, r: int, scale: float, sketch: Array | None = None
) -> tuple[Array, Array]:
    """Factor the leading part of a matrix as ``scale · b @ a``, for a LoRA to start from.

    Parameters
    ----------
    how : {"olora", "pissa", "pissa_niter_k"}
        The first r columns and rows of the QR factors (whose product is not scaled), or the
        leading singular triplets, found with k power iterations on `sketch`.
    w : array (m, n)
    r : int
        Rank, at most min(m, n).
    scale : float
        What the product will be multiplied with.
    sketch : array (n, k), optional
        As in `leading_svd`.

    Returns
    -------
    a (r, n), b (m, r)

    Examples
    --------
    >>> import numpy as np
    >>> a, b = starting_factors("pissa", np.diag(np.asarray([4.0, 1.0])), 1, 2.0)
    >>> np.allclose(2.0 * b @ a, [[4, 0], [0, 0]])
    True
    """
    xp = namespace(w)
    if how == "olora":
        q, upper = xp.linalg.qr(w)
        return upper[:r, :], q[:, :r]
    if how == "pissa":
        u, s, vt = leading_svd(w, r)
    else:
        u, s, vt = leading_svd(w, r, sketch, sweeps=int(how.rsplit("_", 1)[1]))
    root = xp.sqrt(s / scale)
    return root[:, None] * vt, u * root


def annihilating_factors(q: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Make a (r, n) and b (m, r) with b·a = 0, neither zero.

    Parameters
    ----------
    q : array (r, r), r even
        Its QR factor's even and odd rows span the two orthogonal halves.
    x : array (n, r/2)
    y : array (m, r/2)

    Examples
    --------
    >>> import numpy as np
    >>> draw = np.random.default_rng(0).standard_normal
    >>> a, b = annihilating_factors(draw((4, 4)), draw((6, 2)), draw((5, 2)))
    >>> bool(np.max(np.abs(b @ a)) < 1e-15)
    True
    """
    xp = namespace(q, x, y)
    basis = xp.linalg.qr(q)[0]
    return xp.matrix_transpose(x @ basis[1::2, :]) / 10, y @ basis[0::2, :] / 10


def leading_svd(
    w: Array, r: int, sketch: Array | None = None, sweeps: int = 0
) -> tuple[Array, ...]:
    """Find the leading singular triplets of a matrix.

    Parameters
    ----------
    w : array (m, n)
    r : int
        How many triplets.
    sketch : array (n, k), k ≥ r, optional
        Random directions: the triplets are then those of the randomised range finder with
        `sweeps` power iterations (Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061,
        algorithm 4.4) instead of the full decomposition's.

    Returns
    -------
    u (m, r), s (r,), vt (r, n)
        Signs are those of the library.

    Examples
    --------
    >>> import numpy as np
    >>> leading_svd(np.diag(np.asarray([3.0, 2.0, 1.0])), 2)[1]
    array([3., 2.])
    """
    xp = namespace(w, sketch)
    q = None
    if sketch is not None:
        q = xp.linalg.qr(w @ sketch)[0]
        for _ in range(sweeps):
            q = xp.linalg.qr(xp.matrix_transpose(w) @ q)[0]
            q = xp.linalg.qr(w @ q)[0]
    core = w if q is None else xp.matrix_transpose(q) @ w
    u, s, vt = xp.linalg.svd(core, full_matrices=False)
    u = u[:, :r]
    return (u if q is None else q @ u), s[:r], vt[:r, :]


def seeded_svd(w: Any, r: int, sweeps: int, seed: int, new: Fresh) -> tuple[Any, ...]:
    """Find a matrix's leading singular triplets as ``torch.svd_lowrank`` does, on the host.

    Parameters
    ----------
    w : host array (m, n)
    r, sweeps : int
        How many triplets, and how many power iterations.
    seed : int
        Of torch's generator, which draws the sketch.
    new : Fresh

    Returns
    -------
    u (m, r), s (r,), vt (r, n)
        torch's up to signs and rounding.
    """
    flip = namespace(w).matrix_transpose
    wide = w.shape[0] < w.shape[1]
    tall = flip(w) if wide else w
    sketch = new.torch(seed).normal((tall.shape[1], r)).astype(w.dtype)
    u, s, vt = leading_svd(tall, r, sketch, sweeps)
    return (flip(vt), s, flip(u)) if wide else (u, s, vt)

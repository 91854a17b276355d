"""What differentiation must know of each array library: its own engine, constants, scatter-add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

from peft_any._arrays import creation_device, is_traced, namespace
from peft_any._jaxpr import tried
from peft_any._libraries import LIBRARIES, library_of
from peft_any.errors import BackendError

Pull: TypeAlias = Callable[[Sequence[Any]], list[Any]]
"""From the cotangents of the outputs to those of the inputs."""
Run: TypeAlias = Callable[[list[Any]], tuple[list[Any], Any]]
"""From input arrays to output arrays, and whatever else there is to hand on."""

_nested: ContextVar[bool] = ContextVar("peft_any_torch_nested", default=False)


def detach(x: Any) -> Any:
    """Give the same values as a constant: no gradient passes through it.

    Parameters
    ----------
    x : array of any library

    Returns
    -------
    array
        `x` itself where the library records nothing.

    Examples
    --------
    >>> import numpy as np
    >>> detach(np.ones(2))
    array([1., 1.])
    """
    name = library_of(x).name
    if name == "jax":
        return LIBRARIES["jax"].module.lax.stop_gradient(x)
    if name == "torch" and not x.requires_grad:
        forward = LIBRARIES["torch"].module.autograd.forward_ad
        return x if forward.unpack_dual(x).tangent is None else x.detach()
    return x.detach() if hasattr(x, "detach") else x


def is_differentiated(x: Any) -> bool:
    """Whether a derivative may be asked for that passes through an array.

    Examples
    --------
    >>> import numpy as np
    >>> is_differentiated(np.ones(2))
    False
    """
    if hasattr(x, "node"):  # a tape's
        return x.node is not None
    if getattr(x, "requires_grad", False):
        return bool(LIBRARIES["torch"].module.is_grad_enabled())
    return is_traced(x)


def is_trained(x: Any) -> bool:
    """Whether torch's autograd follows an array, even while ``no_grad`` lets it record nothing.

    What is made of such an array must not be kept: it would be a constant for ever, and stay what
    it was when an optimizer writes to the array.

    Examples
    --------
    >>> import numpy as np
    >>> is_trained(np.ones(2))
    False
    """
    return bool(getattr(x, "requires_grad", False))


def lasting(x: Any) -> AbstractContextManager[Any]:
    """Give a context in which arrays are made that may be kept, from x among others.

    What torch makes in ``inference_mode`` can take no part in a derivative afterwards.

    Examples
    --------
    >>> x = np.ones(2)
    >>> with lasting(x):
    ...     x + 1
    array([2., 2.])
    """
    if library_of(x).name == "torch":
        torch = LIBRARIES["torch"].module
        if torch.is_inference_mode_enabled():
            return torch.inference_mode(mode=False)
    return nullcontext()


def in_memory(*arrays: Any) -> bool:
    """Whether arrays are NumPy's, or torch's on the processor, of one dtype, and none is traced.

    What is made of such arrays can be written part by part.

    Examples
    --------
    >>> in_memory(np.ones(1), np.ones(2)), in_memory(np.ones(1), np.ones(1, "float32"))
    (True, False)
    """
    if any(map(is_differentiated, arrays)) or len({a.dtype for a in arrays}) > 1:
        return False
    if library_of(arrays[0]).name != "torch":
        return all(type(a) is np.ndarray for a in arrays)
    torch = LIBRARIES["torch"].module
    own = torch.Tensor, torch.nn.Parameter
    return all(
        type(a) in own and a.device.type == "cpu" and a.layout is torch.strided for a in arrays
    )


class Engine:
    """A library's own differentiation."""

    def vjp(self, run: Run, leaves: list[Any], *, keep: bool) -> tuple[list[Any], Any, Pull]:
        """Run a function and give its outputs, its extras, and the way back.

        With `keep` the way back can be gone more than once.
        """
        raise NotImplementedError

    def custom(
        self, forward: Callable[..., Any], backward: Callable[..., Any], arrays: list[Any]
    ) -> Any:
        """Call `forward(*arrays) -> (out, saved)`, whose derivative is `backward(saved, g)`."""
        raise NotImplementedError

    def remat(self, f: Callable[..., Any], arrays: list[Any]) -> Any:
        """Call `f(*arrays)`, keeping nothing of it but what it was given."""
        raise NotImplementedError

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Make one operation of a function of nests of arrays and numbers, if the library can."""
        return f


class _Jax(Engine):
    @property
    def jax(self) -> Any:
        return LIBRARIES["jax"].module

    def vjp(
        self,
        run: Run,
        leaves: list[Any],
        *,
        keep: bool,  # noqa: ARG002 - JAX always keeps
    ) -> tuple[list[Any], Any, Pull]:
        jax = self.jax
        extra: list[Any] = []

        def pure(arrays: list[Any]) -> tuple[list[Any], list[Any]]:
            # what is no array (strings, configurations) goes around the transformation
            outputs, aux = run(arrays)
            parts, tree = jax.tree_util.tree_flatten(aux)
            extra[:] = [tree, [None if isinstance(p, jax.Array) else p for p in parts]]
            return outputs, [p for p in parts if isinstance(p, jax.Array)]

        outputs, pull, seen = tried(lambda f: jax.vjp(f, leaves, has_aux=True), pure)
        tree, parts = extra
        arrays = iter(seen)
        parts = [next(arrays) if p is None else p for p in parts]

        def back(gs: Sequence[Any]) -> list[Any]:
            # JAX's cotangents are the conjugates of torch's
            (found,) = pull([_conj(g) for g in gs])
            return [_conj(g) for g in found]

        return outputs, tree.unflatten(parts), back

    def custom(
        self, forward: Callable[..., Any], backward: Callable[..., Any], arrays: list[Any]
    ) -> Any:
        call = self.jax.custom_vjp(lambda *a: forward(*a)[0])

        def pull(kept: Any, g: Any) -> tuple[Any, ...]:
            saved, inputs = kept
            g = tuple(_conj(i) for i in g) if isinstance(g, tuple) else _conj(g)
            found = zip(backward(saved, g), inputs, strict=True)
            return tuple(
                None if h is None else _conj(h).reshape(x.shape).astype(x.dtype) for h, x in found
            )

        def push(*a: Any) -> tuple[Any, Any]:
            out, saved = forward(*a)
            return out, (saved, a)

        call.defvjp(push, pull)
        return call(*arrays)

    def remat(self, f: Callable[..., Any], arrays: list[Any]) -> Any:
        return self.jax.checkpoint(f)(*arrays)

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        ways = [self.jax.jit(f)]

        def call(*args: Any) -> Any:
            if ways:
                try:
                    return ways[0](*args)
                except (TypeError, IndexError, BackendError):
                    ways.clear()  # it asks for values, or is given what is no array
            return f(*args)

        return call


class _Torch(Engine):
    @property
    def torch(self) -> Any:
        return LIBRARIES["torch"].module

    def vjp(self, run: Run, leaves: list[Any], *, keep: bool) -> tuple[list[Any], Any, Pull]:
        torch, nested = self.torch, _nested.get()
        with torch.enable_grad():
            # within another's forward the way back is itself recorded
            inputs = [
                x.view_as(x) if nested and x.requires_grad else x.detach().requires_grad_()
                for x in leaves
            ]
            token = _nested.set(True)
            try:
                outputs, aux = run(inputs)
            finally:
                _nested.reset(token)
        differ = [i for i, y in enumerate(outputs) if y.requires_grad]

        def back(gs: Sequence[Any]) -> list[Any]:
            if not differ:
                return [torch.zeros_like(x) for x in leaves]
            found = torch.autograd.grad(
                [outputs[i] for i in differ],
                inputs,
                [gs[i] for i in differ],
                allow_unused=True,
                create_graph=nested,
                retain_graph=nested or keep,
            )
            pairs = zip(found, leaves, strict=True)
            return [torch.zeros_like(x) if g is None else g for g, x in pairs]

        given = outputs if nested else [y.detach() for y in outputs]
        return given, aux, back

    def custom(
        self, forward: Callable[..., Any], backward: Callable[..., Any], arrays: list[Any]
    ) -> Any:
        torch = self.torch

        class Function(torch.autograd.Function):  # type: ignore[misc,name-defined]
            @staticmethod
            def forward(ctx: Any, *a: Any) -> Any:
                out, ctx.saved = forward(*(x.detach() for x in a))
                ctx.set_materialize_grads(True)
                return out

            @staticmethod
            def backward(ctx: Any, *gs: Any) -> Any:
                return tuple(backward(ctx.saved, gs if len(gs) > 1 else gs[0]))

        return Function.apply(*arrays)

    def remat(self, f: Callable[..., Any], arrays: list[Any]) -> Any:
        from torch.utils.checkpoint import checkpoint  # noqa: PLC0415 - only with torch

        return checkpoint(f, *arrays, use_reentrant=False)


ENGINES: dict[str, Engine] = {"jax": _Jax(), "torch": _Torch()}
"""Libraries that differentiate themselves."""


def _conj(g: Any) -> Any:
    return g.conj() if "complex" in str(getattr(g, "dtype", "")) else g


def can_scatter(x: Any) -> bool:
    """Tell whether `scatter` takes arrays of integers in its key."""
    return library_of(x).name in ("numpy", "cupy", "torch", "jax")


def scatter(g: Any, key: Any, shape: tuple[int, ...], onto: Any = None) -> Any:
    """Add `g` to zeros of a shape, or to a copy of an array, at a key, repeated places too.

    Places in an array are counted from its start.

    Examples
    --------
    >>> import numpy as np
    >>> scatter(np.ones(2), np.asarray([1, 1]), (3,))
    array([0., 2., 0.])
    """
    xp, name = namespace(g), library_of(g).name
    if onto is None:
        zeros = xp.zeros(shape, dtype=g.dtype, device=creation_device(g))
    else:
        zeros = onto if name in ("torch", "jax") else onto.copy()
    if name == "jax":
        return zeros.at[key].add(g)
    parts = key if isinstance(key, tuple) else (key,)
    if onto is None and all(k is None or isinstance(k, int | slice | type(...)) for k in parts):
        zeros[key] = g
    elif name == "torch":
        zeros = _torch_add(zeros, parts, g, held=onto is not None)
    else:
        module = np if name == "numpy" else LIBRARIES["cupy"].module
        module.add.at(zeros, key, g)
    return zeros


def _torch_add(zeros: Any, key: tuple[Any, ...], g: Any, *, held: bool) -> Any:
    torch, size = LIBRARIES["torch"].module, zeros.numel()
    if zeros.ndim == len(key) == 1 and not isinstance(key[0], slice):
        places = key[0] if held else torch.remainder(key[0], size)
    else:
        places = torch.arange(size, device=zeros.device).reshape(zeros.shape)[key]
    flat, places, g = zeros.reshape(-1), places.reshape(-1), g.reshape(-1)
    try:  # half as many passes as index_add, which copies twice
        out = (flat.clone() if held else flat).index_add_(0, places, g)
    except RuntimeError:  # under vmap
        out = flat.index_add(0, places, g)
    return out.reshape(zeros.shape)


def own(g: Any) -> Any:
    """Copy an array that is a repeating or read-only view, so that its owner may write to it."""
    if isinstance(g, np.generic):  # NumPy's results without axes are scalars
        return np.asarray(g)
    if isinstance(g, np.ndarray) and (0 in g.strides or not g.flags.writeable):
        return g.copy()
    return g

"""Random numbers of dropout, drop path and other layers, computed from the samples' seeds.

PyTorch's random functions share one generator, so the numbers of a sample depend on the other samples in the
micro-batch. `SampleRandomness` computes them from the seed s of the sample that a row belongs to, the index c of the
random call within its pass p (one encoder or objective), and the element's position i_1, ..., i_k in its sample:

    draw(... draw(draw(draw(s ^ hash(p, c), 0), i_1), i_2) ..., i_k)

A sample therefore gets the same random numbers for any number of ranks and micro-batches, in padded and in packed texts,
in both passes of gradient caching, and when activation checkpointing recomputes a block. `randomness_watch` finds the
modules that use a generator instead.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmpretrain.batch import Samples
from mmpretrain.models.rows import Rows
from mmpretrain.seeds import hash64, torch_draw, torch_draws, unit_interval


@dataclass
class _Pass:
    """Samples of one encoder or objective pass, and the number of random calls made so far."""

    key: int
    seeds: Tensor
    """Seeds of the samples, int64 [b]."""
    owners: Tensor | None = None
    """Index of the text that owns each token, int64 [R, l]; None unless texts are packed into rows."""
    positions: Tensor | None = None
    """Index of each token in its text, int64 [R, l]; None unless texts are packed into rows."""
    num_calls: int = 0


class SampleRandomness(TorchFunctionMode):
    """Torch function mode in which PyTorch's random functions use the seeds of the samples given to `of`.

    Args:
        strict: raise an error for a tensor whose rows are not the samples. If False, PyTorch's generator is used for it.
    """

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self._passes: dict[tuple[object, ...], _Pass] = {}
        self._current: list[_Pass] = []

    @contextmanager
    def of(self, samples: Samples, *key: object) -> Iterator[None]:
        """Use the seeds of `samples` inside the block. Packed texts are supported.

        Args:
            samples: samples of the pass.
            key: name of the pass. A pass entered again continues its count of random calls.
        """
        if key not in self._passes:
            self._passes[key] = _Pass(hash64(*map(str, key)), samples.seeds)
            if samples.packing is not None and samples.lengths is not None:
                rows = Rows(samples.lengths, samples.packing.row_length, samples.packing)
                self._passes[key].owners, self._passes[key].positions = rows.owners().clamp(min=0), rows.positions
        self._current.append(self._passes[key])
        try:
            yield
        finally:
            self._current.pop()

    def again(self) -> "SampleRandomness":
        """Return a copy of this mode that will draw the same numbers from here on."""
        other = SampleRandomness(self.strict)
        other._current = [replace(each) for each in self._current]
        return other

    def __enter__(self) -> "SampleRandomness":
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, or compute its random numbers by sample if it is one of the supported random functions."""
        if func in _BY_SAMPLE and self._current:
            return self._draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    @torch.compiler.disable  # a graph break: the call index must not be compiled in as a constant
    def _draw(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        handler = _BY_SAMPLE[func]
        try:
            inspect.signature(handler).bind(self, *args, **kwargs)
        except TypeError:  # an unsupported call signature; `RandomnessWatch` reports the module
            return func(*args, **kwargs)
        drawn = handler(self, *args, **kwargs)
        return func(*args, **kwargs) if drawn is NotImplemented else drawn

    def bits(self, shape: Sequence[int], per_draw: int = 1) -> Tensor | None:
        """Return random bits for a tensor of `shape`.

        Returns: int64 [*shape], or [*shape[:-1], ceil(n / per_draw)] if each draw serves `per_draw` of the n elements
            of the last dimension. None if the rows are not the samples and `strict` is False.
        Raises: ValueError if the rows are not the samples and `strict` is True.
        """
        current = self._current[-1]
        salt = hash64(current.key, current.num_calls)
        current.num_calls += 1
        seeds = torch_draws(current.seeds, 1, salt)[:, 0]
        if (
            current.owners is not None
            and current.positions is not None
            and tuple(shape[:2]) == tuple(current.owners.shape)
        ):
            seeds, inner = torch_draw(seeds[current.owners], current.positions), shape[2:]
        elif shape and shape[0] and shape[0] % len(seeds) == 0:
            inner = shape[1:]
            if shape[0] > len(seeds):  # several consecutive rows for each sample, such as the windows of an image
                seeds = torch_draws(seeds, shape[0] // len(seeds)).flatten()
        elif self.strict:
            raise ValueError(
                f"a random layer draws for a tensor of shape {list(shape)}, whose rows are not the {len(seeds)} samples of "
                "the micro-batch; expected [samples, ...]: draw before samples are flattened, or leave that layer out"
            )
        else:
            return None
        for size in inner[:-1]:
            seeds = torch_draws(seeds, size)
        return torch_draws(seeds, -(-inner[-1] // per_draw)) if inner else seeds

    def uniform(self, shape: Sequence[int]) -> Tensor | None:
        """Return uniform random numbers in [0, 1), float64 of `shape`; None under the same condition as `bits`."""
        bits = self.bits(shape)
        return None if bits is None else unit_interval(bits)

    def dropped(self, x: Tensor, p: float) -> Tensor | None:
        """Apply dropout to x [...]: zero elements with probability `p` and scale the others by 1 / (1 - p).

        `p` is rounded to a multiple of 2^-16. Returns None under the same condition as `bits`.
        """
        # Each draw serves four elements with sixteen bits each, since the draws dominate the cost of dropout.
        bits = self.bits(x.shape, per_draw=4)
        if bits is None:
            return None
        is_per_row = bits.shape == x.shape and x.shape[-1] > 1
        sixteen = bits.contiguous().view(torch.int16)
        sixteen = sixteen[..., ::4] if is_per_row else sixteen[..., : x.shape[-1]]
        kept = sixteen >= round(p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(0.0 if p == 1 else 1 / (1 - p))


_active: list[SampleRandomness] = []


def checkpoint_contexts(
    inner: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None = None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed block's forward pass and recomputation, which draw the same numbers.

    Use it as `context_fn` of `torch.utils.checkpoint.checkpoint`; `inner` is a further `context_fn` to combine with.
    """
    first, second = (nullcontext(), nullcontext()) if inner is None else inner()
    return first, (_within(_active[-1].again(), second) if _active else second)


@contextmanager
def _within(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


# ---------------------------------------------------------------- random functions computed by sample


# The parameters have the names of PyTorch's functions, since callers may pass them by keyword.


def _dropout(
    mode: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or not 0 < p <= 1:
        return NotImplemented
    dropped = mode.dropped(input, p)
    if dropped is None:
        return NotImplemented
    return input.copy_(dropped) if inplace else dropped


def _torch_dropout(mode: SampleRandomness, input: Tensor, p: float, train: bool) -> Any:
    return _dropout(mode, input, p, train)


def _channel_dropout(
    mode: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Drop whole channels of an input [b, c, ...]."""
    ones = input.new_ones(input.shape[:2] + (1,) * (input.ndim - 2))
    noise = _dropout(mode, ones, p, training)
    if noise is NotImplemented:
        return noise
    return input.mul_(noise) if inplace else input * noise


def _attention(
    mode: SampleRandomness,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute `F.scaled_dot_product_attention` with dropout explicitly, following its documentation."""
    if dropout_p == 0:
        return NotImplemented
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(sees_nothing, 0).softmax(-1).masked_fill(sees_nothing, 0)
    dropped = mode.dropped(weights, dropout_p)
    return NotImplemented if dropped is None else dropped.to(value.dtype) @ value


# PyTorch's own code, but with `has_torch_function` always False: the mode then sees the functions that it calls.
_seen_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _multi_head_attention(mode: SampleRandomness, *args: Any, **kwargs: Any) -> Any:
    """Run the function behind `nn.MultiheadAttention` with the mode active inside it."""
    TorchFunctionMode.__enter__(mode)  # PyTorch deactivates a mode while it handles a function
    try:
        return _seen_attention(*args, **kwargs)
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def _bernoulli_(mode: SampleRandomness, input: Tensor, p: Any = 0.5, *, generator: Any = None) -> Any:
    u = mode.uniform(input.shape) if generator is None else None
    return NotImplemented if u is None else input.copy_(u < p)


def _bernoulli(
    mode: SampleRandomness, input: Tensor, p: float | None = None, *, generator: Any = None, out: Any = None
) -> Any:
    u = mode.uniform(input.shape) if generator is None and out is None else None
    return NotImplemented if u is None else (u < (input if p is None else p)).to(input.dtype)


def _normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.erfinv(2 * (u + 2.0**-54) - 1) * (std * math.sqrt(2)) + mean


def _scaled(u: Tensor, low: float = 0.0, high: float = 1.0, **ends: float) -> Tensor:
    low, high = ends.get("from", low), ends.get("to", high)  # `from` is a keyword of Python and cannot be a parameter
    return u * (high - low) + low


def _fill_(
    transform: Callable[..., Tensor],
    mode: SampleRandomness,
    input: Tensor,
    *args: Any,
    generator: Any = None,
    **kwargs: Any,
) -> Any:
    u = mode.uniform(input.shape) if generator is None else None
    return NotImplemented if u is None else input.copy_(transform(u, *args, **kwargs))


def _like(
    transform: Callable[..., Tensor],
    mode: SampleRandomness,
    input: Tensor,
    *,
    requires_grad: bool = False,
    **kwargs: Any,
) -> Any:
    u = mode.uniform(input.shape)
    if u is None:
        return NotImplemented
    return torch.empty_like(input, **kwargs).copy_(transform(u)).requires_grad_(requires_grad)


def _new(
    transform: Callable[..., Tensor], mode: SampleRandomness, *size: Any, requires_grad: bool = False, **kwargs: Any
) -> Any:
    shape = kwargs.pop("size", size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size)
    u = None if kwargs.get("generator") or kwargs.get("out") is not None else mode.uniform(shape)
    if u is None:
        return NotImplemented
    return torch.empty(*shape, **kwargs).copy_(transform(u)).requires_grad_(requires_grad)


_BY_SAMPLE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    F.dropout1d: _channel_dropout,
    F.dropout2d: _channel_dropout,
    F.dropout3d: _channel_dropout,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: partial(_fill_, _scaled),
    Tensor.normal_: partial(_fill_, _normal),
    torch.rand_like: partial(_like, _scaled),
    torch.randn_like: partial(_like, _normal),
    torch.rand: partial(_new, _scaled),
    torch.randn: partial(_new, _normal),
}

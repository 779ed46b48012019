"""Hash for sample seeds, permutations and masks, with the same bits in Python, NumPy and torch.

It is splitmix64 (Steele, Lea, Flood 2014): output i of the generator with seed `s` is ``mix(s + (i + 1) * GOLDEN)``.
The generator is counter-based, so that any output can be computed without the previous ones. It is implemented here, so
that orders and masks do not change with library versions.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 31)


def draw(seed: int, counter: int) -> int:
    """Return output `counter` of the generator with seed `seed`, in [0, 2^64)."""
    return _mix((seed + (counter + 1) * GOLDEN) & _MASK)


def uniform(seed: int, counter: int) -> float:
    """Return output `counter` of the generator with seed `seed` as a float in [0, 1)."""
    return (draw(seed, counter) >> 11) * 2.0**-53


def hash64(*parts: int | str) -> int:
    """Return a 64-bit hash of integers and strings, in [0, 2^64)."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = draw(state, part & _MASK)
    return state


def draws(seeds: np.ndarray | np.uint64, counters: np.ndarray | int) -> np.ndarray:
    """Compute `draw` over arrays: uint64 seeds and integer counters, broadcast together; returns uint64."""
    with np.errstate(over="ignore"):
        x = np.asarray(seeds, np.uint64) + (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
        return x ^ (x >> np.uint64(31))


def permutation(seed: int, n: int) -> np.ndarray:
    """Return the permutation of range(n) determined by `seed`, int64 [n]."""
    return np.argsort(draws(np.uint64(seed), np.arange(n)), kind="stable")


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right logically; torch's own shift is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def torch_draw(seeds: Tensor, counters: Tensor) -> Tensor:
    """Compute `draw` over tensors: int64 seeds and counters, broadcast together; returns int64 with the bits of `draws`."""
    x = seeds + (counters + 1) * _signed(GOLDEN)
    x = x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MULTIPLIERS[0]))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MULTIPLIERS[1]))
    return x.bitwise_xor_(_shift_right(x, 31))


def torch_draws(seeds: Tensor, n: int, salt: int = 0) -> Tensor:
    """Return outputs 0 to n - 1 of the generators with seeds `seeds ^ salt`: int64 [...] -> int64 [..., n]."""
    return torch_draw((seeds ^ _signed(salt))[..., None], torch.arange(n, device=seeds.device))


def unit_interval(bits: Tensor) -> Tensor:
    """Convert 64 random bits, int64, to float64 in [0, 1)."""
    return _shift_right(bits, 11).double() * 2.0**-53


def torch_uniform(seeds: Tensor, n: int, salt: int = 0) -> Tensor:
    """Return `torch_draws` as float64 in [0, 1): int64 [...] -> float64 [..., n]."""
    return unit_interval(torch_draws(seeds, n, salt))


@contextmanager
def torch_seed(*parts: int | str) -> Iterator[None]:
    """Seed torch's generators from `parts` inside the block, and restore their state after it."""
    # The default of fork_rng, all devices, would create a context on every GPU of the machine in each process.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash64(*parts) >> 1)
        yield

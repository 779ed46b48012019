"""The one hash: sample seeds, permutations and masks, with the same bits in Python, NumPy and torch.

splitmix64 (Steele, Lea, Flood 2014): the i-th output of the generator seeded with `s` is
``mix(s + (i + 1) * GOLDEN)``. It is counter-based, so any draw can be had without the ones before it,
and it is ours, so that no library version changes an order or a mask.
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
    """Output number `counter` of the generator `seed`, in [0, 2^64)."""
    return _mix((seed + (counter + 1) * GOLDEN) & _MASK)


def uniform(seed: int, counter: int) -> float:
    """Output number `counter` of the generator `seed` as a float in [0, 1)."""
    return (draw(seed, counter) >> 11) * 2.0**-53


def hash64(*parts: int | str) -> int:
    """One 64-bit hash of integers and strings, in [0, 2^64)."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = draw(state, part & _MASK)
    return state


def draws(seeds: np.ndarray | np.uint64, counters: np.ndarray | int) -> np.ndarray:
    """`draw` over arrays: seeds uint64 and counters integer, broadcast together -> uint64."""
    with np.errstate(over="ignore"):
        x = np.asarray(seeds, np.uint64) + (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
        return x ^ (x >> np.uint64(31))


def permutation(seed: int, n: int) -> np.ndarray:
    """The permutation of range(n) that `seed` names, int64 [n]."""
    return np.argsort(draws(np.uint64(seed), np.arange(n)), kind="stable")


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch only shifts arithmetically."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def torch_draw(seeds: Tensor, counters: Tensor) -> Tensor:
    """`draw` over tensors: seeds and counters int64, broadcast together -> int64, the bits of `draws`."""
    x = seeds + (counters + 1) * _signed(GOLDEN)
    x = x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MULTIPLIERS[0]))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MULTIPLIERS[1]))
    return x.bitwise_xor_(_shift_right(x, 31))


def torch_draws(seeds: Tensor, n: int, salt: int = 0) -> Tensor:
    """Outputs 0 .. n-1 of the generators `seeds ^ salt`: int64 [...] -> int64 [..., n]."""
    return torch_draw((seeds ^ _signed(salt))[..., None], torch.arange(n, device=seeds.device))


def unit_interval(bits: Tensor) -> Tensor:
    """64 random bits, int64 -> float64 in [0, 1)."""
    return _shift_right(bits, 11).double() * 2.0**-53


def torch_uniform(seeds: Tensor, n: int, salt: int = 0) -> Tensor:
    """`torch_draws` as float64 in [0, 1): int64 [...] -> float64 [..., n]."""
    return unit_interval(torch_draws(seeds, n, salt))


@contextmanager
def torch_seed(*parts: int | str) -> Iterator[None]:
    """Torch's generators seeded from `parts` inside the block, and as they were after it."""
    # All devices, fork_rng's default, would open a context on every GPU of the machine in each of its processes.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash64(*parts) >> 1)
        yield

"""The one hash, against splitmix64 in plain Python and its published outputs."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmpretrain.seeds import draw, draws, hash64, permutation, torch_draws, torch_seed, torch_uniform, uniform

SEEDS = [0, 1, 1234567, 2**63 - 1, 2**63, 2**64 - 1]


def splitmix64(seed: int, num: int) -> list[int]:
    """The stateful generator as its authors print it (https://prng.di.unimi.it/splitmix64.c)."""
    outputs = []
    for _ in range(num):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def signed(values: list[int]) -> list[int]:
    return [value - 2**64 if value >= 2**63 else value for value in values]


def test_draw_has_the_published_outputs() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [draw(1234567, i) for i in range(5)] == published


@pytest.mark.parametrize("seed", SEEDS)
def test_python_numpy_and_torch_draw_the_same_bits(seed: int) -> None:
    expected = splitmix64(seed, 100)
    assert [draw(seed, i) for i in range(100)] == expected
    assert draws(np.uint64(seed), np.arange(100)).tolist() == expected
    assert torch_draws(torch.tensor(signed([seed])), 100)[0].tolist() == signed(expected)


def test_draws_broadcasts_seeds_and_counters() -> None:
    seeds = np.array(SEEDS, dtype=np.uint64)
    assert draws(seeds, 3).tolist() == [splitmix64(seed, 4)[3] for seed in SEEDS]
    assert draws(seeds[:, None], np.arange(4)).tolist() == [splitmix64(seed, 4) for seed in SEEDS]


def test_a_counter_may_be_as_large_as_any_position() -> None:
    position = 10**15
    assert int(draws(np.uint64(5), np.array([position]))[0]) == draw(5, position)
    assert draw(5, position) == splitmix64((5 + position * 0x9E3779B97F4A7C15) % 2**64, 1)[0]


def test_torch_draws_do_not_depend_on_how_many_are_drawn_or_who_stands_beside() -> None:
    seeds = torch.tensor(signed(SEEDS))
    many = torch_draws(seeds, 50, salt=2**64 - 3)
    assert torch.equal(many[:, :7], torch_draws(seeds, 7, salt=2**64 - 3))
    assert torch.equal(many[2:3], torch_draws(seeds[2:3], 50, salt=2**64 - 3))
    assert many[1].tolist() == signed(splitmix64(SEEDS[1] ^ (2**64 - 3), 50))


def test_uniform_keeps_53_bits_and_stays_below_one() -> None:
    expected = [output / 2**64 for output in splitmix64(9, 1000)]
    values = [uniform(9, i) for i in range(1000)]
    assert values == pytest.approx(expected, abs=2**-53)
    assert torch_uniform(torch.tensor([9]), 1000)[0].tolist() == values
    assert len(set(values)) == 1000 and min(values) >= 0 and max(values) < 1
    assert abs(np.mean(values) - 0.5) < 4 / np.sqrt(12 * 1000)
    # the largest output of the generator must not round up to 1: this seed's first output is 2^64 - 1
    seed = inverse_of_first_output(2**64 - 1)
    assert draw(seed, 0) == 2**64 - 1
    assert uniform(seed, 0) == float(torch_uniform(torch.tensor(signed([seed])), 1)) == 1 - 2**-53


def inverse_of_first_output(output: int) -> int:
    """The seed whose first output is `output`: splitmix64 is a bijection."""

    def unshift(x: int, bits: int) -> int:
        y = x
        for _ in range(64 // bits + 1):
            y = x ^ (y >> bits)
        return y

    x = unshift(output, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (unshift(x, 30) - 0x9E3779B97F4A7C15) % 2**64


def test_hash64_is_the_chain_of_draws() -> None:
    name = int.from_bytes(hashlib.blake2b(b"pairs", digest_size=8).digest(), "little")
    state = draw(draw(draw(0, 7), name), 2**64 - 1)
    assert hash64(7, "pairs", -1) == state


def test_hash64_tells_order_grouping_and_type_apart() -> None:
    parts: list[tuple[int | str, ...]] = [(1, 2), (2, 1), (12,), (1, 2, 0), ("1", 2), ("12",), ("1", "2"), ()]
    assert len({hash64(*p) for p in parts}) == len(parts)


def test_hash64_is_the_same_in_every_process() -> None:
    """Python's own hash of a string is not."""
    code = "from mmpretrain.seeds import hash64; print(hash64(3, 'caption', 5), hash('caption'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, pythons = result.stdout.split()
    assert int(ours) == hash64(3, "caption", 5) and int(pythons) != hash("caption")


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_sorts_the_draws(n: int) -> None:
    outputs = splitmix64(77, n)
    assert permutation(77, n).tolist() == sorted(range(n), key=outputs.__getitem__)


def test_permutations_are_uniform() -> None:
    """All 24 permutations of four are about equally frequent."""
    num = 4800
    _, counts = np.unique([permutation(seed, 4) for seed in range(num)], axis=0, return_counts=True)
    assert len(counts) == 24
    chi_square = ((counts - num / 24) ** 2 / (num / 24)).sum()
    assert chi_square < 49.7  # the 0.999 quantile at 23 degrees of freedom


def test_torch_seed_seeds_its_block_and_restores_what_was() -> None:
    torch.manual_seed(5)
    expected_outside = torch.rand(3)
    torch.manual_seed(5)
    with torch_seed(0, "model"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected_outside)
    with torch_seed(0, "model"):
        assert torch.equal(torch.rand(3), inside)
    with torch_seed(0, "objective"):
        assert not torch.equal(torch.rand(3), inside)


def test_torch_seed_restores_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), torch_seed(1):
        torch.rand(1)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits() -> None:
    seeds = torch.tensor(signed(SEEDS))
    assert torch.equal(torch_draws(seeds.cuda(), 200, salt=11).cpu(), torch_draws(seeds, 200, salt=11))
    assert torch.equal(torch_uniform(seeds.cuda(), 200, salt=11).cpu(), torch_uniform(seeds, 200, salt=11))

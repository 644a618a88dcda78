import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_core import noise

MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python integers, from the paper's description."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ((MASK,) * 4, (MASK,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_reference_meets_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: list[int]
) -> None:
    assert philox(counter, key) == words


def test_bits_are_philox() -> None:
    assert noise.bits([0], 4).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    keys = [1, MASK, 2**63, 2**64 - 1, noise.key(7, "eps", 3)]
    for counter in (0, 1, MASK):
        words = noise.bits(keys, 11, counter)
        for row, key in zip(words.tolist(), keys, strict=True):
            blocks = [philox((block, counter, 0, 0), (key & MASK, key >> 32)) for block in range(3)]
            assert row == [word for block in blocks for word in block][:11]


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:32]


def test_the_same_numbers_for_ever() -> None:
    """Golden: written down from the first implementation, which made one counter at a time. Runs depend on them."""
    keys = [*(noise.key(3, "golden", i) for i in range(37)), 0, 2**63, 2**64 - 1]
    assert sha256(noise.bits(keys, 101, counter=5)) == "85de542e75532f2e6ec42584890838de"
    assert sha256(noise.bits(keys[:1], 70_001, counter=MASK)) == "6bc481801a067ffb6053127fd2089a82"
    assert sha256(noise.normal(keys, (1, 8, 8), counter=99)) == "1bda699ef39666e151d669be877dff0f"
    assert sha256(noise.normal(keys, (3, 28, 28))) == "eb34ede8175a216974dd14819453e48d"
    assert sha256(noise.normal(keys, (3, 5), counter=1)) == "6386495bac8a0c1078d26c8c2afc6716"
    assert sha256(noise.normal(keys[:1], (70_001,))) == "04f4adb2105720a47390bf10fed6c2c4"
    assert sha256(noise.uniform(keys, 10, counter=3)) == "45a7a18b9bf9bb11bc44930825b34993"
    assert sha256(noise.integers(keys, 10, 1, 1000, counter=4)) == "47fe0a921e0d137998e66b6e336677e4"


@pytest.mark.parametrize("blocks_at_a_time", [1, 3, 7, 2**14])
def test_parts_and_counters_made_together_change_nothing(
    monkeypatch: pytest.MonkeyPatch, blocks_at_a_time: int
) -> None:
    keys = [noise.key(0, "parts", i) for i in range(5)]
    counters = [0, 7, 2, MASK]
    for shape in [(1, 4, 4), (3, 3), (2,), ()]:
        alone = torch.stack([noise.normal(keys, shape, counter) for counter in counters])
        with monkeypatch.context() as patch:
            patch.setattr(noise, "_CPU_BLOCKS", blocks_at_a_time)
            together = noise.normals(keys, shape, counters)
        assert together.is_contiguous()
        assert torch.equal(together, alone)


@pytest.mark.parametrize("blocks_at_a_time", [1, 40, 2**14])
def test_draws_are_normal_of_each_counter(monkeypatch: pytest.MonkeyPatch, blocks_at_a_time: int) -> None:
    keys = [noise.key(0, "draws", i) for i in range(3)]
    monkeypatch.setattr(noise, "_CPU_BLOCKS", blocks_at_a_time)
    draws = noise.Draws(keys, (1, 4, 4), 10)
    for counter in [*range(10), 3, 3, 8, 0]:
        assert torch.equal(draws[counter], noise.normal(keys, (1, 4, 4), counter))
    assert len(list(draws)) == 10  # the old protocol: indices from 0 to an IndexError
    for counter in (-1, 10):
        with pytest.raises(IndexError, match=f"0..9, not {counter}"):
            draws[counter]


def test_no_keys_or_no_numbers_make_empty_tensors() -> None:
    assert noise.normal([], (2, 3)).shape == (0, 2, 3)
    assert noise.normals([1], (0, 3), [0, 1]).shape == (2, 1, 0, 3)
    assert noise.normals([1], (3,), []).shape == (0, 1, 3)
    assert noise.bits([1], 0).shape == (1, 0)


def test_rows_stand_alone_and_start_the_same_at_any_length() -> None:
    alone = noise.normal([5], (2, 3), counter=4)
    assert torch.equal(noise.normal([9, 5, 8], (2, 3), counter=4)[1:2], alone)
    assert torch.equal(noise.bits([5], 100)[:, :7], noise.bits([5], 7))


def test_counters_and_keys_give_other_numbers() -> None:
    draws = torch.stack([noise.normal([key], (50,), counter)[0] for key in (1, 2) for counter in (0, 1)])
    correlation = torch.corrcoef(torch.cat((draws, draws.roll(1, dims=1))))
    assert (correlation - torch.eye(8)).abs().max() < 0.5  # 50 values each: a standard error of 0.14


def test_normals_are_normal() -> None:
    keys = [noise.key(0, "test", i) for i in range(200)]
    x = noise.normal(keys, (1, 31, 33))
    assert x.dtype == torch.float32
    assert x.shape == (200, 1, 31, 33)
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    # Box and Muller's pairs share a radius: neighbours must be uncorrelated all the same.
    pairs = x.flatten(1)[:, :1022].reshape(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 / len(pairs) ** 0.5


def test_uniforms_and_integers() -> None:
    u = noise.uniform(range(100), 1000)
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    values = noise.integers(range(100), 1000, -2, 7)
    assert (values.min(), values.max()) == (-2, 7)
    assert stats.chisquare((values + 2).flatten().bincount().numpy()).pvalue > 1e-3


def test_keys_never_meet() -> None:
    purposes = ["eps", "timestep", "flip", "sample", "init", "order"]
    keys = {noise.key(s, p, i, j) for s in range(10) for p in purposes for i in range(50) for j in range(20)}
    keys |= {noise.key(s, p, i) for s in range(10) for p in purposes for i in range(1000)}
    assert len(keys) == 10 * 6 * 1000 * 2
    assert all(0 <= key < 2**64 for key in keys)
    assert noise.key(1, "a", 23) != noise.key(1, "a", 2, 3)
    assert noise.key(-1, "a") != noise.key(1, "a")


def test_a_purpose_is_no_index() -> None:
    """Their text would be the same: "1/a/2"."""
    for purpose in ("a/2", "a/-2", "2/a", "7"):
        with pytest.raises(ValueError, match=f"number between slashes: '{purpose}'"):
            noise.key(1, purpose)
    assert noise.key(1, "init/down.0.conv1") != noise.key(1, "init", 0)


def test_seeds_are_integers() -> None:
    for seed in (0.5, 1.0, "1", None, True):
        with pytest.raises(ValueError, match=f"a seed must be an integer, not {seed!r}"):
            noise.key(seed, "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an index must be an integer, not 2\.5"):
        noise.key(1, "a", 2.5)  # type: ignore[arg-type]
    assert noise.key(np.int64(3), "a", np.uint8(4)) == noise.key(3, "a", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("counter", [-1, 2**32])
def test_counter_out_of_range(counter: int) -> None:
    with pytest.raises(ValueError, match="counter"):
        noise.bits([1], 4, counter)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_key_out_of_range(key: int) -> None:
    with pytest.raises(ValueError, match="keys must be in"):
        noise.normal([1, key], (4,))

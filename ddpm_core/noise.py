"""Randomness keyed by what it is for, never by rank, process or wall time.

Every random number of a run is a pure function of a key, (seed, purpose, index...), so that any worker can
make it, again, at any time. The generator is counter-based: Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), written in integer tensor operations, vectorised over keys and counters; one call
makes the noise of a whole batch, each image from a key of its own, and of several steps of a sampler.

Normals are computed in float64 and rounded once to float32, so that a difference in the last bit of a library's
log or cos reaches the result about once in 2^29 numbers, and then as one unit in its last place.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddpm_core.checks import checked_integer

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Blocks of four words made at a time. On a CPU a tensor of so many stays in a core's cache, and the calls cost little
# beside the arithmetic; on a GPU the count of kernels is what costs, and this bounds the memory.
_CPU_BLOCKS, _GPU_BLOCKS = 2**14, 2**20


def key(seed: int, purpose: str, *index: int) -> int:
    """The 64-bit key of one stream: a hash of (seed, purpose, index...).

    `purpose` names what the numbers are for ("eps", "timestep", "flip", ...), so that streams never meet but by
    chance (of 2^-64 for any two). ValueError for a seed or index that is no integer, and for a purpose with a number
    between its slashes, which an index could not be told from.
    """
    if any(part.removeprefix("-").isdigit() for part in purpose.split("/")):
        raise ValueError(f"a purpose must not have a number between slashes: {purpose!r}; give it as an index")
    text = "/".join(
        [str(checked_integer(seed, "a seed")), purpose, *(str(checked_integer(i, "an index")) for i in index)]
    )
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(keys: Sequence[int], n: int, counter: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Random 32-bit words, int64 tensor [len(keys), n] in [0, 2^32).

    Row i depends on (keys[i], counter) alone; its first words do not depend on n. `counter` tells apart the
    draws of one key (a sampler's step, say). ValueError for keys outside 0..2^64-1, counters outside 0..2^32-1.
    """
    blocks = -(-n // 4)
    out = torch.empty(len(keys), blocks, 4, dtype=torch.int64, device=device)
    for rows, columns, words in _philox(keys, [counter], blocks, device):
        torch.stack(words, dim=-1, out=out[rows, columns])
    return out.flatten(1)[:, :n]


def normal(keys: Sequence[int], shape: Sequence[int], counter: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard normals, float32 [len(keys), *shape], by Box and Muller's transform of `bits`."""
    return normals(keys, shape, [counter], device)[0]


def normals(
    keys: Sequence[int], shape: Sequence[int], counters: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """`normal` for each of several counters, at less cost: float32 [len(counters), len(keys), *shape].

    Beside the result (and a copy of it, where an image's size is no multiple of 4) it needs little memory.
    """
    n = math.prod(shape)
    blocks = -(-n // 4)
    out = torch.empty(len(counters) * len(keys), blocks, 4, dtype=torch.float32, device=device)
    for rows, columns, words in _philox(keys, counters, blocks, device):
        # Each block gives two pairs: the radius from one word, the angle from the next.
        for first in (0, 2):
            radius = _open_unit(words[first]).log_().mul_(-2.0).sqrt_()
            angle = _open_unit(words[first + 1]).mul_(2.0 * math.pi)
            out[rows, columns, first] = angle.cos().mul_(radius)
            out[rows, columns, first + 1] = angle.sin_().mul_(radius)
    return out.flatten(1)[:, :n].reshape(len(counters), len(keys), *shape).contiguous()


class Draws:
    """`normal` for a loop over counters: draws[counter] equals normal(keys, shape, counter, device).

    A counter that is asked for is made together with those after it, as many as cost little more than one, and they
    are kept until another group is made: ask in rising order.
    """

    def __init__(
        self, keys: Sequence[int], shape: Sequence[int], count: int, device: torch.device | str = "cpu"
    ) -> None:
        """Counters 0..count-1 can be asked for; nothing is made yet."""
        self._keys, self._shape, self._count, self._device = keys, shape, count, device
        blocks = max(1, len(keys) * -(-math.prod(shape) // 4))
        self._at_once = max(1, _blocks_at_a_time(device) // blocks)
        self._first = 0
        self._group: Sequence[Tensor] = ()

    def __getitem__(self, counter: int) -> Tensor:
        """Float32 [len(keys), *shape], not to be changed in place. IndexError for a counter outside 0..count-1."""
        if not 0 <= counter < self._count:
            raise IndexError(f"counter must be in 0..{self._count - 1}, not {counter}")
        if not 0 <= counter - self._first < len(self._group):
            self._first = counter
            group = range(counter, min(counter + self._at_once, self._count))
            self._group = normals(self._keys, self._shape, group, self._device).unbind()
        return self._group[counter - self._first]


def uniform(keys: Sequence[int], n: int, counter: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Uniforms in (0, 1), float64 [len(keys), n]."""
    return _open_unit(bits(keys, n, counter, device))


def integers(
    keys: Sequence[int], n: int, low: int, high: int, counter: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Integers in low..high (both included), int64 [len(keys), n].

    By multiply and shift: the bias is below (high - low + 1) / 2^32.
    """
    if not 0 < high - low + 1 <= 2**31:
        raise ValueError(f"the range {low}..{high} is empty or wider than 2^31")
    return ((bits(keys, n, counter, device) * (high - low + 1)) >> 32) + low


def _open_unit(words: Tensor) -> Tensor:
    """(words + 1/2) / 2^32, in (0, 1), exact in float64."""
    return words.double().add_(0.5).mul_(2.0**-32)


def _blocks_at_a_time(device: torch.device | str) -> int:
    return _CPU_BLOCKS if torch.device(device).type == "cpu" else _GPU_BLOCKS


def _philox(
    keys: Sequence[int], counters: Sequence[int], blocks: int, device: torch.device | str
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Blocks 0..blocks-1 of four words for every (counter, key), a part of the table at a time.

    Yields (rows, columns, [x0, x1, x2, x3]): a row is a (counter, key), counters outermost, a column a block; the
    words of the part's blocks are int64 [rows, columns] each.
    """
    if any(not 0 <= counter <= _MASK32 for counter in counters):
        raise ValueError(f"counter must be in 0..2^32-1, not {', '.join(map(str, counters))}")
    if any(k >> 64 for k in keys):
        raise ValueError("keys must be in 0..2^64-1: make them with noise.key")
    # int64 holds a key's 64 bits as a signed number.
    key_column = torch.tensor([k - (k >> 63 << 64) for k in keys], dtype=torch.int64, device=device)
    key_column = key_column.repeat(len(counters)).unsqueeze(1)
    counter_column = torch.tensor(counters, dtype=torch.int64, device=device).repeat_interleave(len(keys)).unsqueeze(1)
    most = _blocks_at_a_time(device)
    for columns in _parts(blocks, most):
        block = torch.arange(columns.start, columns.stop, device=device).unsqueeze(0)
        for rows in _parts(len(key_column), most // block.numel()):
            yield rows, columns, _philox_rounds(block, counter_column[rows], key_column[rows])


def _philox_rounds(block: Tensor, counter: Tensor, key: Tensor) -> list[Tensor]:
    """Philox of (block, counter, 0, 0): block [1, B], counter [R, 1], key [R, 1]; four times [R, B].

    All start with the shape that they depend on, so that the first two rounds are nearly free.
    """
    x0, x1 = block, counter
    x2 = x3 = torch.zeros_like(block[:, :1])
    rounds = torch.arange(_ROUNDS, device=block.device).reshape(-1, 1, 1)
    for k0, k1 in zip(key + _WEYL[0] * rounds, (key >> 32) + _WEYL[1] * rounds, strict=True):
        # int64 products wrap modulo 2^64; masking after the shift gives the unsigned high word all the same. x1, x3,
        # k0 and k1 are low words: their high halves go with the mask.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = ((product1 >> 32) ^ (x1 ^ k0)).bitwise_and_(_MASK32)
        x2 = ((product0 >> 32) ^ (x3 ^ k1)).bitwise_and_(_MASK32)
        x1, x3 = product1, product0
    return [x0, x1 & _MASK32, x2, x3 & _MASK32]


def _parts(length: int, most: int) -> Iterator[slice]:
    """0..length-1 in slices of at most `most`, of nearly equal lengths."""
    parts = -(-length // most)
    return (slice(length * i // parts, length * (i + 1) // parts) for i in range(parts))

"""Randomness keyed by what it is for, never by rank, process or wall time.

Every random number of a run is a pure function of a key, (seed, purpose, index...), so that any worker can
make it, again, at any time. The generator is counter-based: Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), written in integer tensor operations, vectorised over keys; one call makes the
noise of a whole batch, each image from a key of its own.

Normals are computed in float64 and rounded once to float32, so that a difference in the last bit of a library's
log or cos does not reach the result.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def key(seed: int, purpose: str, *index: int) -> int:
    """The 64-bit key of one stream: a hash of (seed, purpose, index...).

    `purpose` names what the numbers are for ("eps", "timestep", "flip", ...), so that streams never meet.
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(keys: Sequence[int], n: int, counter: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Random 32-bit words, int64 tensor [len(keys), n] in [0, 2^32).

    Row i depends on (keys[i], counter) alone; its first words do not depend on n. `counter` tells apart the
    draws of one key (a sampler's step, say).
    """
    if not 0 <= counter <= _MASK32:
        raise ValueError(f"counter must be in 0..2^32-1, not {counter}")
    blocks = -(-n // 4)
    key_pairs = torch.tensor([[k & _MASK32, k >> 32] for k in keys], dtype=torch.int64, device=device)
    k0, k1 = key_pairs.reshape(-1, 2).unsqueeze(-1).unbind(1)  # [N, 1] each
    x0 = torch.arange(blocks, dtype=torch.int64, device=device).expand(len(keys), blocks)
    x1 = torch.full_like(x0, counter)
    x2 = torch.zeros_like(x0)
    x3 = torch.zeros_like(x0)
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64; masking after the shift gives the unsigned high word all the same.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = ((product1 >> 32) & _MASK32) ^ x1 ^ k0
        x2 = ((product0 >> 32) & _MASK32) ^ x3 ^ k1
        x1, x3 = product1 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack((x0, x1, x2, x3), dim=-1).reshape(len(keys), 4 * blocks)[:, :n]


def normal(keys: Sequence[int], shape: Sequence[int], counter: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard normals, float32 [len(keys), *shape], by Box and Muller's transform of `bits`."""
    n = math.prod(shape)
    pairs = bits(keys, 2 * (-(-n // 2)), counter, device).double().add_(0.5).mul_(2.0**-32)
    radius = pairs[:, 0::2].log().mul_(-2.0).sqrt_()
    angle = pairs[:, 1::2] * (2.0 * math.pi)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).reshape(len(keys), -1)
    return values[:, :n].float().reshape(len(keys), *shape)


def uniform(keys: Sequence[int], n: int, counter: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Uniforms in (0, 1), float64 [len(keys), n]."""
    return bits(keys, n, counter, device).double().add_(0.5).mul_(2.0**-32)


def integers(
    keys: Sequence[int], n: int, low: int, high: int, counter: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Integers in low..high (both included), int64 [len(keys), n].

    By multiply and shift: the bias is below (high - low + 1) / 2^32.
    """
    if not 0 < high - low + 1 <= 2**31:
        raise ValueError(f"the range {low}..{high} is empty or wider than 2^31")
    return ((bits(keys, n, counter, device) * (high - low + 1)) >> 32) + low

"""The order in which training sees the images: a pure function, numpy only.

Training reads an endless stream of positions. Position p lies in epoch p // N. Within an epoch the shards are
permuted, then the samples are permuted inside windows of consecutive (permuted) shards, so that reads stay local.
Both permutations are keyed by (seed, dataset digest, epoch); nothing depends on who reads, or on what was read
before: any position is found at once.

Memory grows with the number of shards alone. That rules out a materialised permutation of a window, so a window's
samples go through a keyed bijection that is evaluated where it is asked: the generalised Feistel network of Black
and Rogaway ("Ciphers with arbitrary finite domains", 2002) on Z_a x Z_b with a * b just above the window's size,
cycle-walking over the few values beyond it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_Words = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_INDEX_BITS = 24
_EPOCHS_KEPT = 4


@dataclass(frozen=True)
class _Epoch:
    """What is worked out once an epoch: O(shards)."""

    shards: Ints  # [S] shard at each place of the epoch's order
    starts: Ints  # [S + 1] samples before each place
    windows: Ints  # [ceil(S / window) + 1] samples before each window, and all of them


class Order:
    """Order of one split's samples. `digest` is the dataset's: other data, another order."""

    def __init__(self, shard_sizes: Sequence[int] | Ints, window: int, seed: int, digest: str) -> None:
        """Samples of each shard [S], each at least 1; the window in shards. ValueError for what cannot be."""
        sizes = np.array(shard_sizes, dtype=np.int64)
        sizes.setflags(write=False)
        if not sizes.size or sizes.min() < 1:
            raise ValueError("an order needs at least one shard, and in each at least one sample")
        if sizes.size >= 2**_INDEX_BITS:
            raise ValueError(f"{sizes.size} shards are too many, the limit is 2^{_INDEX_BITS} - 1")
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, not {window}")
        self.shard_sizes: Ints = sizes
        self.window, self.seed, self.digest = window, seed, digest
        self.n = int(sizes.sum())
        """Samples an epoch."""
        # The tables of the last few epochs. A pure function's memory: it never changes what `locate` returns.
        self._recent: tuple[tuple[int, _Epoch], ...] = ()

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Where the samples at absolute stream positions lie: (shard, row), int64 of the shape of `positions`.

        O(shards) the first time that an epoch is met, O(log shards) a position after that. A call has a price of its
        own: of a few thousand positions at once, each takes a tenth of what it does in a batch of 64.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError("a position is negative")
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.n)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards[here], rows[here] = self._locate_in(epoch, offsets[here])
        return shards, rows

    def _locate_in(self, epoch: int, offsets: Ints) -> tuple[Ints, Ints]:
        table = self._table(epoch)
        windows = np.searchsorted(table.windows, offsets, side="right") - 1
        begins, ends = table.windows[windows], table.windows[windows + 1]
        distinct, inverse = np.unique(windows, return_inverse=True)
        keys = np.array([self._key(f"{epoch}/window/{w}") for w in distinct.tolist()], dtype=np.uint64)[inverse]
        shuffled = begins + _permute(offsets - begins, ends - begins, keys)
        places = np.searchsorted(table.starts, shuffled, side="right") - 1
        return table.shards[places], shuffled - table.starts[places]

    def _table(self, epoch: int) -> _Epoch:
        for known, table in self._recent:
            if known == epoch:
                return table
        key = np.uint64(self._key(f"{epoch}/shards"))
        index = np.arange(len(self.shard_sizes), dtype=np.uint64)
        # Sorting random words that carry their index shuffles the indices; no two words are equal, so the result
        # does not depend on the sort.
        low = np.uint64(2**_INDEX_BITS - 1)
        words = np.sort((_mix(index * _GOLDEN + key) & ~low) | index)
        shards = (words & low).astype(np.int64)
        starts = np.zeros(len(shards) + 1, dtype=np.int64)
        np.cumsum(self.shard_sizes[shards], out=starts[1:])
        # Window w takes the places [w * window, (w + 1) * window) of the epoch's order; the last may be smaller.
        table = _Epoch(shards, starts, np.append(starts[: -1 : self.window], starts[-1]))
        # One assignment of a new tuple: readers in other threads see the old one or the new one.
        self._recent = ((epoch, table), *self._recent[: _EPOCHS_KEPT - 1])
        return table

    def _key(self, what: str) -> int:
        text = f"order/{self.seed}/{self.digest}/{what}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def slot_positions(step: int, slot: int, slots: int, global_batch: int) -> Ints:
    """Positions of slot `slot` of step `step`, int64 [global_batch / slots]; steps and slots count from 0."""
    if global_batch % slots:
        raise ValueError(f"a global batch of {global_batch} does not divide into {slots} slots")
    if not 0 <= slot < slots:
        raise ValueError(f"slot must be in 0..{slots - 1}, not {slot}")
    images = global_batch // slots
    first = (step * slots + slot) * images
    return np.arange(first, first + images, dtype=np.int64)


def owned_slots(rank: int, workers: int, slots: int) -> range:
    """The slots that a rank computes, consecutive; none for ranks beyond the largest divisor of `slots`."""
    sharing = owners(workers, slots)
    share = slots // sharing
    return range(rank * share, (rank + 1) * share) if rank < sharing else range(0)


def owners(workers: int, slots: int) -> int:
    """How many of so many workers have slots: the largest number that divides them."""
    return max(n for n in range(1, min(workers, slots) + 1) if slots % n == 0)


def _permute(values: Ints, sizes: Ints, keys: _Words) -> Ints:
    """Image of each value under the keyed permutation of 0..size-1; all arguments [n]."""
    left = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)  # a, about sqrt(size)
    limit = sizes.astype(np.uint64)
    right = (limit + left - np.uint64(1)) // left  # b, so that size <= a * b < size + a
    result = _feistel(values.astype(np.uint64), left, right, keys)
    # Cycle-walking: following the cycle until it is back inside keeps this a bijection of 0..size-1.
    while (outside := np.flatnonzero(result >= limit)).size:
        result[outside] = _feistel(result[outside], left[outside], right[outside], keys[outside])
    return result.astype(np.int64)


def _feistel(values: _Words, left: _Words, right: _Words, keys: _Words) -> _Words:
    """A keyed bijection of Z_left x Z_right, written as 0..left*right-1."""
    x, y = values % left, values // left
    for turn in range(_ROUNDS):
        keys = _mix(keys + _GOLDEN)
        if turn % 2:
            y = (y + (_mix(x ^ keys) >> np.uint64(11)) % right) % right
        else:
            x = (x + (_mix(y ^ keys) >> np.uint64(11)) % left) % left
    return y * left + x


def _mix(x: _Words) -> _Words:
    """The finaliser of splitmix64: a bijection of 64-bit words in which every bit moves every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

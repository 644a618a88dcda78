"""The order is a permutation within each epoch, found anywhere at once, whoever reads it."""

import hashlib
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.order import Order, owned_slots, slot_positions

SHARDS = [(1,), (2,), (3,), (7,), (1, 1), (5, 1), (3, 3, 3, 1), (10,) * 10 + (4,), (1000, 427), (64,) * 33]


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    shards, rows = order.locate(np.arange(epoch * order.n, (epoch + 1) * order.n))
    assert shards.dtype == rows.dtype == np.int64
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


@pytest.mark.parametrize("sizes", SHARDS)
@pytest.mark.parametrize("window", [1, 2, 4, 1000])
def test_every_epoch_is_a_permutation(sizes: tuple[int, ...], window: int) -> None:
    every = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    for seed, epoch in itertools.product((0, 1, 2**40), (0, 1, 5, 10**9)):
        assert sorted(epoch_of(Order(sizes, window, seed, "digest"), epoch)) == every


def test_batches_straddle_epochs_and_seek_equals_iterate() -> None:
    sizes = (10, 3, 8, 8, 1)
    order = Order(sizes, 2, 3, "d")
    walked = [place for epoch in range(5) for place in epoch_of(order, epoch)]
    # Positions asked for in batches of 7, which straddle epochs of 30, and one by one from a fresh object.
    for first in range(0, 140, 7):
        shards, rows = order.locate(np.arange(first, first + 7))
        assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == walked[first : first + 7]
    for position in (149, 0, 31, 60, 29, 30, 120):
        shard, row = Order(sizes, 2, 3, "d").locate(np.array([position]))
        assert (shard[0], row[0]) == walked[position]


def test_any_shape_and_order_of_positions() -> None:
    order = Order((9, 4, 6), 2, 0, "d")
    flat = order.locate(np.arange(60))
    picked = np.random.default_rng(0).permutation(60)
    for whole, part in zip(flat, order.locate(picked.reshape(5, 12)), strict=True):
        assert part.shape == (5, 12)
        assert (whole[picked] == part.ravel()).all()
    assert order.locate(np.array([], dtype=np.int64))[0].shape == (0,)


def test_epochs_seeds_and_data_have_orders_of_their_own() -> None:
    sizes = (50,) * 6
    orders = [
        epoch_of(Order(sizes, 3, seed, digest), epoch)
        for seed, digest, epoch in itertools.product((0, 1), ("a", "b"), (0, 1))
    ]
    for one, other in itertools.combinations(orders, 2):
        agree = sum(a == b for a, b in zip(one, other, strict=True))
        assert agree < 15  # two random permutations agree in about one place; 15 of 300 is no accident


def test_the_order_stays_what_it_is() -> None:
    # Checkpoints hold a position and nothing else: another order under the same seed would betray every one.
    shards, rows = Order((5, 4, 3), 2, 7, "digest").locate(np.arange(12, 24))
    assert shards.tolist() == PINNED[0]
    assert rows.tolist() == PINNED[1]


GOLDEN = {
    ((1,), 1, 0, "d"): "17b0761f87b081d5cf10757ccc89f12be355c70e2e29df288b65b30710dcbcd1",
    ((7,) * 5 + (3,), 2, 0, "a" * 64): "2b3324e2e52f184cfe76a488cc9643c75cfaf78fe36cf06c3165fc6d78bb50cf",
    ((1000,) * 60, 4, 0, "d"): "b4b1344fda9ed2ff22cf27221daaf233dce3c09ecb86d4cd3f5bcce1d232d410",
    ((1000, 427, 31), 4, 5, "d"): "fc8b3c8586f9c8ccca60a1aa35aa36bd2f9bf1a1366f636a2e069ce7bdc082ff",
    ((64,) * 100, 1000, 2**40, "x"): "c50516e75c069650dbe2197e4931b9a417d7ffcd6b27915de3cf724e0a51935c",
    (tuple(range(1, 200)), 7, 3, "y"): "6ffc40bfe67da3e8ca30fa1eefb6288bf72ea3bcef752c0831d96831cef0a451",
}
"""sha256 of (shards, rows), int64, as the first version of the order had them."""


@pytest.mark.parametrize(("sizes", "window", "seed", "digest"), GOLDEN)
def test_long_stretches_stay_what_they_are(sizes: tuple[int, ...], window: int, seed: int, digest: str) -> None:
    n = sum(sizes)
    positions = np.concatenate([np.arange(0, 2 * n), np.arange(10**6 * n, 10**6 * n + n)])
    assert sha256_of(Order(sizes, window, seed, digest), positions) == GOLDEN[sizes, window, seed, digest]


def sha256_of(order: Order, positions: np.ndarray) -> str:
    shards, rows = order.locate(positions)
    return hashlib.sha256(shards.astype("<i8").tobytes() + rows.astype("<i8").tobytes()).hexdigest()


PINNED = ([0, 1, 1, 0, 1, 0, 0, 1, 0, 2, 2, 2], [1, 1, 3, 4, 0, 0, 3, 2, 2, 1, 0, 2])


@pytest.mark.parametrize(("sizes", "window"), [((5, 4, 3), 2), ((1000, 427), 4), ((1, 1, 1, 9), 3), ((64,) * 9, 4)])
def test_the_order_is_the_documented_network(sizes: tuple[int, ...], window: int) -> None:
    """Position by position in Python's integers, without numpy."""
    order = Order(sizes, window, 11, "d")
    for epoch in (0, 3):
        expected = [written_out(order, epoch, offset) for offset in range(order.n)]
        assert epoch_of(order, epoch) == expected


def written_out(order: Order, epoch: int, offset: int) -> tuple[int, int]:
    def key(what: str) -> int:
        text = f"order/{order.seed}/{order.digest}/{epoch}/{what}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    word = {s: mix((s * golden + key("shards")) % 2**64) >> 24 for s in range(len(order.shard_sizes))}
    shards = sorted(word, key=lambda s: (word[s], s))
    for w in range(0, len(shards), order.window):
        inside = [(s, row) for s in shards[w : w + order.window] for row in range(order.shard_sizes[s])]
        if offset >= len(inside):
            offset -= len(inside)
            continue
        a = math.isqrt(len(inside) - 1) + 1
        b = -(-len(inside) // a)
        while True:
            x, y, k = offset % a, offset // a, key(f"window/{w // order.window}")
            for turn in range(8):
                k = mix((k + golden) % 2**64)
                if turn % 2:
                    y = (y + (mix(x ^ k) >> 11) % b) % b
                else:
                    x = (x + (mix(y ^ k) >> 11) % a) % a
            offset = y * a + x
            if offset < len(inside):
                return inside[offset]
    raise AssertionError("the offset is beyond the epoch")


def test_reads_stay_inside_a_window() -> None:
    sizes, window = (20,) * 12, 3
    shards, _ = Order(sizes, window, 0, "d").locate(np.arange(240))
    for first in range(0, 240, 20 * window):
        assert len(set(shards[first : first + 20 * window].tolist())) == window


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_of_a_small_window_come_up_equally(n: int) -> None:
    epochs = 2000
    order = Order((n,), 1, 0, "d")
    _, rows = order.locate(np.arange(epochs * n))
    _, counts = np.unique(rows.reshape(epochs, n), axis=0, return_counts=True)
    expected = epochs / len(list(itertools.permutations(range(n))))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = len(list(itertools.permutations(range(n)))) - 1
    assert len(counts) == degrees + 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_a_window_is_well_mixed() -> None:
    n = 2000
    _, rows = Order((n,), 1, 0, "d").locate(np.arange(20 * n))
    for epoch in rows.reshape(20, n):
        # Rank correlation with the stored order, and of neighbours, as for a random permutation (sd 1/sqrt(n)).
        assert abs(np.corrcoef(epoch, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(epoch[:-1], epoch[1:])[0, 1]) < 5 / np.sqrt(n)
    # Each sample's mean place over epochs: no sample is drawn to one end.
    places = np.argsort(rows.reshape(20, n), axis=1).mean(0) / n
    assert abs(places - 0.5).max() < 6 / np.sqrt(12 * 20)


@pytest.mark.parametrize(("slots", "workers"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 3), (8, 16)])
def test_workers_share_out_the_same_stream(slots: int, workers: int) -> None:
    batch, order = 16, Order((7, 7, 7), 2, 0, "d")
    seen = []
    for step in range(4):
        taken = [slot for rank in range(workers) for slot in owned_slots(rank, workers, slots)]
        assert taken == list(range(slots))
        for slot in taken:
            seen += slot_positions(step, slot, slots, batch).tolist()
    assert seen == list(range(4 * batch))
    assert len(order.locate(np.array(seen))[0]) == 64


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(0, 2**63),
    st.text(max_size=3),
    st.integers(0, 10**12),
    st.integers(1, 40),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_order_is_a_permutation_that_can_be_entered_anywhere(
    sizes: list[int], window: int, seed: int, digest: str, epoch: int, batch: int
) -> None:
    order = Order(sizes, window, seed, digest)
    stream = epoch_of(order, epoch) + epoch_of(order, epoch + 1)
    every = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(stream[: order.n]) == sorted(stream[order.n :]) == every
    assert stream[: order.n] == [written_out(order, epoch, offset) for offset in range(order.n)]
    # Batches, one of which straddles the epochs, each asked of an order that has seen nothing.
    for first in range(0, 2 * order.n - batch + 1, batch):
        positions = epoch * order.n + np.arange(first, first + batch)
        shards, rows = Order(np.array(sizes), window, seed, digest).locate(positions)
        assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == stream[first : first + batch]


def test_threads_may_share_an_order() -> None:
    order, alone = Order((9, 30, 4) * 5, 2, 1, "d"), Order((9, 30, 4) * 5, 2, 1, "d")
    positions = [np.arange(first, first + 50) for first in range(0, 20_000, 50)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(order.locate, positions))
    for asked, found in zip(positions, together, strict=True):
        assert np.array_equal(found, alone.locate(asked))


def test_an_order_travels() -> None:
    order = Order((5, 6), 2, 1, "d")
    order.locate(np.arange(30))
    copy = pickle.loads(pickle.dumps(order))
    assert np.array_equal(copy.locate(np.arange(60)), order.locate(np.arange(60)))
    assert (copy.n, copy.window, copy.seed, copy.digest) == (11, 2, 1, "d")


def test_an_order_does_not_follow_the_array_it_was_made_of() -> None:
    sizes = np.array([5, 6, 7])
    order = Order(sizes, 2, 1, "d")
    before = order.locate(np.arange(18))
    sizes[0] = 500
    assert np.array_equal(order.locate(np.arange(18)), before)
    with pytest.raises(ValueError, match="read-only"):
        order.shard_sizes[0] = 4


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Order((), 1, 0, "d")
    with pytest.raises(ValueError, match="at least one"):
        Order((3, 0), 1, 0, "d")
    with pytest.raises(ValueError, match="window"):
        Order((3,), 0, 0, "d")
    with pytest.raises(ValueError, match="negative"):
        Order((3,), 1, 0, "d").locate(np.array([-1]))
    with pytest.raises(ValueError, match="slots"):
        slot_positions(0, 0, 4, 6)
    with pytest.raises(ValueError, match="slot"):
        slot_positions(0, 4, 4, 8)

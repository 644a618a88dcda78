"""Streams of slots: the order, how far ahead they are, and how they end."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.manifest import Dataset
from pipelines.data.order import owned_slots
from pipelines.data.reader import Reader, SlotStream
from pipelines.files import StorageError
from pipelines.store import DamageError
from tests.data.dataset_helpers import noise, write_dataset
from tests.s3_faults import wait_until


class Counted(Reader):
    """A reader that counts what it is asked for, and can be held up."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.asked = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.asked += len(rows)
        self.go_on.wait(30)
        return super().read(shards, rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("slots", "workers"), [(4, 1), (4, 2), (4, 4), (8, 3)])
def test_the_stream_of_all_workers_is_the_order(digits: Dataset, slots: int, workers: int, threads: int) -> None:
    split, batch, start, steps = digits.split("train"), 64, 20, 6  # an epoch of about 1430 ends in between
    order = split.order(2, 5)
    assert start * batch < len(split) < (start + steps) * batch
    got: dict[tuple[int, int], np.ndarray] = {}
    places = []
    for rank in range(workers):
        owned = owned_slots(rank, workers, slots)
        with SlotStream(Reader(split), order, batch, slots, owned, start, threads=threads) as stream:
            for step, slot, images, labels in itertools.islice(stream, len(owned) * steps):
                assert images.shape == (batch // slots, 8, 8, 1)
                assert labels.shape == (batch // slots,)
                got[step, slot] = images
                places.append((rank, step, slot))
    assert places == sorted(places)
    assert sorted(got) == [(step, slot) for step in range(start, start + steps) for slot in range(slots)]
    expected, _ = Reader(split).read(*order.locate(np.arange(start * batch, (start + steps) * batch)))
    assert np.array_equal(np.concatenate([got[place] for place in sorted(got)]), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_stream_stays_ahead_by_the_bytes_that_it_was_told(digits: Dataset, threads: int) -> None:
    reader, order = Counted(digits.split("train")), digits.split("train").order(4, 0)
    slot_bytes, room = 8 * 64, 12
    with SlotStream(reader, order, 32, 4, [0, 1], 0, ahead_bytes=room * slot_bytes + 3, threads=threads) as stream:
        wait_until(lambda: reader.asked == room * 8)
        time.sleep(0.05)
        for taken in range(1, 30):
            next(stream)
            assert reader.asked <= (room + taken) * 8
        wait_until(lambda: reader.asked >= (room + 29 - 6) * 8)  # it goes on when there is room for a few slots
    with SlotStream(Counted(digits.split("train")), order, 32, 4, [0], 0, ahead_bytes=1, threads=threads) as stream:
        assert [step for step, *_ in itertools.islice(stream, 20)] == list(range(20))  # one slot there is always


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_stream_with_an_end_reads_nothing_beyond_it(digits: Dataset, threads: int, steps: int) -> None:
    split = digits.split("train")
    order = split.order(4, 0)
    reader = Counted(split)
    with SlotStream(reader, order, 32, 4, [1, 3], 2, threads=threads, end_step=2 + steps) as stream:
        found = list(stream)
        assert list(stream) == []
    assert [place[:2] for place in found] == [(step, slot) for step in range(2, 2 + steps) for slot in (1, 3)]
    assert reader.asked == steps * 2 * 8


def test_what_a_stream_gives_belongs_to_the_caller(digits: Dataset) -> None:
    split = digits.split("train")
    expected, _ = Reader(split).read(*split.order(4, 0).locate(np.arange(64)))
    with SlotStream(Reader(split), split.order(4, 0), 64, 4, range(4), 0) as stream:
        for start in range(0, 64, 16):
            images = next(stream)[2]
            assert np.array_equal(images, expected[start : start + 16])
            images[:] = 0


def test_closing_ends_the_threads_and_the_stream(digits: Dataset) -> None:
    threads = threading.active_count()
    split = digits.split("train")
    stream = SlotStream(Reader(split), split.order(4, 0), 64, 2, [0, 1], 0, threads=3)
    assert threading.active_count() > threads
    assert next(stream)[:2] == (0, 0)
    assert next(stream)[:2] == (0, 1)
    stream.close()
    stream.close()
    assert threading.active_count() == threads
    assert list(stream) == []
    with SlotStream(Reader(split), split.order(4, 0), 64, 2, [], 0) as idle:
        assert threading.active_count() == threads
        assert list(idle) == []


def test_closing_does_not_wait_for_a_stuck_read(digits: Dataset) -> None:
    reader = Counted(digits.split("train"))
    reader.go_on.clear()
    stream = SlotStream(reader, digits.split("train").order(4, 0), 64, 2, [0], 0)
    wait_until(lambda: reader.asked)
    ended: list[list] = []
    waiting = threading.Thread(target=lambda: ended.append(list(stream)))
    waiting.start()
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 2
    waiting.join(5)
    assert ended == [[]]
    reader.go_on.set()
    wait_until(lambda: not any(thread.name.startswith("slots") for thread in threading.enumerate()))


def test_an_error_is_raised_in_its_slot_s_place(tmp_path: Path) -> None:
    images = noise(40, 8)
    dataset = write_dataset(tmp_path, (images, [0] * 40), (noise(4, 8), [0] * 4), ["x"])
    split = dataset.split("train")
    order = split.order(8, 3)
    broken = int(order.locate(np.arange(40))[0][25])
    (dataset.place.path / split.shards[broken].name).unlink()
    first = int(np.flatnonzero(order.locate(np.arange(40))[0] == broken)[0])
    for threads in (1, 2):
        with SlotStream(Reader(split), order, 1, 1, [0], 0, threads=threads) as stream:
            assert [step for step, *_ in itertools.islice(stream, first)] == list(range(first))
            with pytest.raises(DamageError, match=rf"{split.shards[broken].name} is missing"):
                next(stream)
            assert list(stream) == []


class Faulty(Reader):
    """A reader that cannot reach one shard."""

    lost = -1

    def read(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if (shards == self.lost).any():
            raise StorageError(f"shard {self.lost} cannot be read")
        return super().read(shards, rows)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_fault_of_the_storage_is_raised_in_its_slot_s_place(digits: Dataset, threads: int) -> None:
    split = digits.split("train")
    order = split.order(1, 0)
    shards, rows = order.locate(np.arange(len(split)))
    reader = Faulty(split)
    reader.lost = int(shards[-1])
    first = int(np.flatnonzero(shards == reader.lost)[0])
    expected, _ = Reader(split).read(shards, rows)
    with SlotStream(reader, order, 1, 1, [0], 0, threads=threads) as stream:
        for step, _, images, _ in itertools.islice(stream, first):
            assert np.array_equal(images, expected[step : step + 1])
        assert step == first - 1
        with pytest.raises(StorageError, match=f"shard {reader.lost} cannot be read"):
            next(stream)


def test_memory_and_files_stay_flat_over_epochs(tmp_path: Path) -> None:
    """Of many shards; in a process of its own, whose memory nothing else moves."""
    images = noise(3000, 32, 3)
    write_dataset(tmp_path / "data", (images, [0] * 3000), (images[:4], [0] * 4), ["x"], 20)
    code = f"""
import os, numpy as np
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader, SlotStream
from pipelines.store import Place
split = Dataset.open(Place.of({str(tmp_path / "data")!r})).split("train")
reader = Reader(split, cache_bytes=0, shards_open=8)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
with SlotStream(reader, split.order(4, 0), 40, 1, [0], 0, ahead_bytes=2**20) as stream:
    sizes = []
    for step in range(300):
        next(stream)
        if step % 50 == 49:
            sizes.append((resident(), len(os.listdir("/proc/self/fd"))))
print(*[size for size, _ in sizes], *[files for _, files in sizes])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    sizes, files = [int(size) for size in out[:6]], [int(count) for count in out[6:]]
    assert max(sizes[2:]) - sizes[1] < 4 * 2**20  # what is read in between has 25 MB of pixels, an epoch 9
    assert max(files) < 8 + 20


@pytest.mark.parametrize("how", ["exception", "signal"])
def test_a_process_that_dies_without_closing_ends(digits: Dataset, how: str) -> None:
    code = f"""
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader, SlotStream
from pipelines.store import Place
split = Dataset.open(Place.of({str(digits.place)!r})).split("train")
stream = SlotStream(Reader(split, cache_bytes=0), split.order(4, 0), 64, 2, [0, 1], 0, threads=3)
next(stream)
print("read", flush=True)
if {how == "exception"}:
    raise RuntimeError("the loop dies")
import time
while True:
    time.sleep(0.1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"read\n"
    begun = time.monotonic()
    if how == "signal":
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert time.monotonic() - begun < 5

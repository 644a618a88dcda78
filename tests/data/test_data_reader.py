"""Reading by (shard, row), streams of slots, and every kind of damage named."""

import itertools
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.manifest import Dataset, Split
from pipelines.data.order import owned_slots
from pipelines.data.reader import Reader, SlotStream
from pipelines.errors import UserError
from pipelines.store import DamageError, Place

BOTH = pytest.mark.parametrize("cache", [0, 2**20], ids=["pread", "cached"])


@pytest.fixture
def copy(digits: Dataset, tmp_path: Path) -> Dataset:
    """The digits in a folder that may be damaged."""
    shutil.copytree(digits.place.path, tmp_path / "copy")
    return Dataset.open(Place.of(tmp_path / "copy"))


@BOTH
def test_any_rows_in_any_order(digits: Dataset, cache: int) -> None:
    split = digits.split("train")
    reader = Reader(split, cache_bytes=cache)
    images, labels = Reader(split).read_all()
    assert images.shape == (len(split), 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    starts = np.cumsum([0, *split.shard_sizes])
    for _ in range(2):
        picked = np.random.default_rng(0).integers(0, len(split), 500)
        shards = np.searchsorted(starts, picked, side="right") - 1
        some, their = reader.read(shards, picked - starts[shards])
        assert np.array_equal(some, images[picked])
        assert np.array_equal(their, labels[picked])
    assert reader.read(np.array([], int), np.array([], int))[0].shape == (0, 8, 8, 1)
    with pytest.raises(IndexError):
        reader.read(np.array([0]), np.array([300]))


def test_what_is_read_belongs_to_the_caller(digits: Dataset) -> None:
    reader = Reader(digits.split("train"))
    first, _ = reader.read(np.array([0]), np.array([0]))
    kept = first.copy()
    first[:] = 7
    assert np.array_equal(reader.read(np.array([0]), np.array([0]))[0], kept)


@BOTH
def test_threads_share_a_reader(digits: Dataset, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.reader._SHARDS_OPEN", 1)
    split = digits.split("train")
    images, _ = Reader(split).read_all()
    shared, order = Reader(split, cache_bytes=cache), split.order(4, 0)
    starts = np.cumsum([0, *split.shard_sizes])

    def read(number: int) -> bool:
        shards, rows = order.locate(np.arange(number * 50, number * 50 + 50))
        return np.array_equal(shared.read(shards, rows)[0], images[starts[shards] + rows])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))


def test_splits_travel_and_few_files_stay_open(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.reader._SHARDS_OPEN", 2)
    split: Split = pickle.loads(pickle.dumps(digits.split("train")))
    assert split.shard_sizes == digits.split("train").shard_sizes
    before = open_files()
    reader = Reader(split, cache_bytes=0)
    assert np.array_equal(reader.read_all()[0], Reader(digits.split("train")).read_all()[0])
    assert open_files() <= before + 2
    del reader
    assert open_files() == before


def open_files() -> int:
    return sum("digits" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


@pytest.mark.parametrize(("slots", "workers"), [(4, 1), (4, 2), (4, 4), (8, 3)])
def test_the_stream_of_all_workers_is_the_order(digits: Dataset, slots: int, workers: int) -> None:
    split, batch, start, steps = digits.split("train"), 64, 20, 6  # an epoch of about 1430 ends in between
    order = split.order(2, 5)
    assert start * batch < len(split) < (start + steps) * batch
    got: dict[tuple[int, int], np.ndarray] = {}
    for rank in range(workers):
        owned = owned_slots(rank, workers, slots)
        with SlotStream(Reader(split), order, batch, slots, owned, start) as stream:
            for step, slot, images, labels in itertools.islice(stream, len(owned) * steps):
                assert images.shape == (batch // slots, 8, 8, 1)
                assert labels.shape == (batch // slots,)
                got[step, slot] = images
    assert sorted(got) == [(step, slot) for step in range(start, start + steps) for slot in range(slots)]
    expected, _ = Reader(split).read(*order.locate(np.arange(start * batch, (start + steps) * batch)))
    assert np.array_equal(np.concatenate([got[place] for place in sorted(got)]), expected)


def test_the_stream_stays_ahead_by_what_it_was_told(digits: Dataset) -> None:
    reader = Reader(digits.split("train"))
    reads = []
    original = reader.read

    def read(shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reads.append(len(rows))
        return original(shards, rows)

    reader.read = read  # type: ignore[method-assign]
    with SlotStream(reader, digits.split("train").order(4, 0), 32, 4, [0, 1], 0, ahead=3) as stream:
        wait_until(lambda: len(reads) == 6)
        time.sleep(0.05)
        assert len(reads) == 6
        next(stream)
        wait_until(lambda: len(reads) == 7)
    assert set(reads) == {8}


def wait_until(condition: object) -> None:
    end = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.002)


def test_closing_ends_the_thread_and_the_stream(digits: Dataset) -> None:
    threads = threading.active_count()
    split = digits.split("train")
    stream = SlotStream(Reader(split), split.order(4, 0), 64, 2, [0, 1], 0)
    assert next(stream)[:2] == (0, 0)
    assert next(stream)[:2] == (0, 1)
    stream.close()
    stream.close()
    assert threading.active_count() == threads
    assert list(stream) == []
    with SlotStream(Reader(split), split.order(4, 0), 64, 2, [], 0) as idle:
        assert list(idle) == []
    assert threading.active_count() == threads


def test_an_error_of_the_thread_reaches_the_reader_of_the_stream(copy: Dataset) -> None:
    for file in copy.place.path.glob("train-*.tar"):
        file.unlink()
    split = copy.split("train")
    with (
        SlotStream(Reader(split), split.order(4, 0), 64, 1, [0], 0) as stream,
        pytest.raises(DamageError, match=r"train-\d+\.tar is missing"),
    ):
        next(stream)


@BOTH
def test_a_flipped_byte_is_named_by_shard_and_member(copy: Dataset, cache: int) -> None:
    import pyarrow.parquet as pq

    index = pq.read_table(copy.place.path / "train-000001.parquet").to_pylist()
    with open(copy.place.path / "train-000001.tar", "r+b") as file:
        file.seek(index[17]["offset"] + index[17]["size"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    reader = Reader(copy.split("train"), cache_bytes=cache)
    others = np.array([row for row in range(300) if row != 17])
    reader.read(np.full(299, 1), others)
    for _ in range(2):
        with pytest.raises(DamageError, match=rf"train-000001\.tar: member {index[17]['member']} does not match"):
            reader.read(np.array([1]), np.array([17]))


@BOTH
def test_a_truncated_shard_is_named(copy: Dataset, cache: int) -> None:
    file = copy.place.path / "held-out-000000.tar"
    file.write_bytes(file.read_bytes()[:10_000])
    reader = Reader(copy.split("held-out"), cache_bytes=cache)
    reader.read(np.array([0]), np.array([0]))  # what is there is read
    with pytest.raises(DamageError, match=r"held-out-000000\.tar: member \d+\.png is cut short"):
        reader.read_all()


def test_missing_and_damaged_indices_are_named(copy: Dataset) -> None:
    file = copy.place.path / "train-000000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match=r"train-000000\.parquet does not match the sha256 in shards\.parquet"):
        Reader(copy.split("train")).read_all()
    file.unlink()
    with pytest.raises(DamageError, match=r"train-000000\.parquet is missing"):
        Reader(copy.split("train")).read_all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"member": "evil.pkl"}, r"evil\.pkl is not of a type that is read"),
        ({"size": 2**40}, "cannot be 1099511627776 bytes"),
        ({"size": -1}, "cannot be -1 bytes"),
        ({"offset": -1}, "at -1, as the index"),
        ({"offset": 2**40}, "is cut short"),
        ({"content": "wrong size"}, "cannot be decoded: it is L 9 x 9"),
        ({"content": "not a png"}, "cannot be decoded"),
    ],
)
def test_an_index_is_not_trusted(copy: Dataset, changes: dict[str, object], message: str) -> None:
    """Even one whose own sha256 is right: a dataset may come from somebody else."""
    import hashlib
    import json

    import pyarrow.parquet as pq

    from pipelines.data.manifest import INDEX_COLUMNS, SHARD_COLUMNS, write_table
    from pipelines.data.shards import encode_png

    place = copy.place
    columns = pq.read_table(place.path / "held-out-000000.parquet").to_pydict()
    content = changes.pop("content", None) if (changes := dict(changes)) else None
    if content:
        data = encode_png(np.zeros((9, 9, 1), np.uint8)) if content == "wrong size" else b"GIF89a" * 20
        with open(place.path / "held-out-000000.tar", "r+b") as file:
            file.seek(columns["offset"][0])
            file.write(data)
        changes |= {"size": len(data), "sha256": hashlib.sha256(data).digest()}
    for name, value in changes.items():
        columns[name][0] = value
    index = write_table(INDEX_COLUMNS, columns)
    (place / "held-out-000000.parquet").write(index)
    table = copy.table.to_pydict()
    table["index_sha256"][table["name"].index("held-out-000000.tar")] = hashlib.sha256(index).digest()
    shards = write_table(SHARD_COLUMNS, table)
    (place / "shards.parquet").write(shards)
    card = json.loads((place / "dataset.json").read())
    (place / "dataset.json").write_json({**card, "shards_sha256": hashlib.sha256(shards).hexdigest()})
    reader = Reader(Dataset.open(place).split("held-out"))
    with pytest.raises(DamageError, match=message):
        reader.read(np.array([0]), np.array([0]))


def test_an_index_of_an_unknown_format_is_refused(copy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.manifest.FORMAT", 2)
    with pytest.raises(UserError, match=r"train-000000\.parquet: format 1 is not known here, only 2"):
        Reader(copy.split("train")).read(np.array([0]), np.array([0]))

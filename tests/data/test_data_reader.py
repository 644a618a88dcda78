"""Reading by (shard, row), and every kind of damage named."""

import hashlib
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.manifest import FORMAT, INDEX_COLUMNS, Dataset, Split, read_table, write_table
from pipelines.data.reader import Reader
from pipelines.data.shards import encode_png
from pipelines.errors import UserError
from pipelines.files import StorageError
from pipelines.store import DamageError, Place
from tests.data.dataset_helpers import change_index, change_table, flip, noise, patch, read_rows, reseal, write_dataset

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
def test_threads_share_a_reader(digits: Dataset, cache: int) -> None:
    split = digits.split("train")
    images, _ = Reader(split).read_all()
    shared, order = Reader(split, cache_bytes=cache, shards_open=1), split.order(4, 0)
    starts = np.cumsum([0, *split.shard_sizes])

    def read(number: int) -> bool:
        shards, rows = order.locate(np.arange(number * 50, number * 50 + 50))
        return np.array_equal(shared.read(shards, rows)[0], images[starts[shards] + rows])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))


def test_splits_travel_and_few_files_stay_open(digits: Dataset) -> None:
    split: Split = pickle.loads(pickle.dumps(digits.split("train")))
    assert split.shard_sizes == digits.split("train").shard_sizes
    before = open_files()
    reader = Reader(split, cache_bytes=0, shards_open=2)
    assert np.array_equal(reader.read_all()[0], Reader(digits.split("train")).read_all()[0])
    assert open_files() <= before + 2
    del reader
    assert open_files() == before


@BOTH
def test_what_is_read_is_what_webdataset_reads(digits: Dataset, cache: int) -> None:
    import webdataset
    from PIL import Image

    split = digits.split("train")
    tars = [str(digits.place.path / shard.name) for shard in split.shards]
    theirs = [
        np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in webdataset.WebDataset(tars, shardshuffle=False)
    ]
    images, _ = Reader(split, cache_bytes=cache).read_all()
    assert len(theirs) == len(images)
    assert all(np.array_equal(image, mine[:, :, 0]) for image, mine in zip(theirs, images, strict=True))


def open_files() -> int:
    return sum("digits" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


@BOTH
def test_a_flipped_byte_is_named_by_shard_and_member(copy: Dataset, cache: int) -> None:
    index = read_rows(copy.place, "train-000001.parquet")
    flip(copy.place.path / "train-000001.tar", index[17]["offset"] + index[17]["size"] // 2)
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
        ({"member": "evil.pkl"}, r"evil\.pkl is not of a type that is read \(png, jpg, jpeg, webp, npy\)"),
        ({"member": "png"}, "member png is not of a type"),
        ({"label": None}, r"held-out-000000\.parquet has empty fields"),
        ({"offset": None}, r"held-out-000000\.parquet has empty fields"),
        ({"size": 2**40}, "cannot be 1099511627776 bytes"),
        ({"size": -1}, "cannot be -1 bytes"),
        ({"offset": -1}, "at -1, as the index"),
        ({"offset": 2**40}, "is cut short"),
        ({"offset": 2**63 - 1}, "is cut short"),
        ({"content": "wrong size"}, "cannot be decoded: it is L 9 x 9"),
        ({"content": "not a png"}, "cannot be decoded: cannot identify image file;"),
    ],
)
def test_an_index_is_not_trusted(copy: Dataset, changes: dict[str, object], message: str) -> None:
    """Even one whose every sha256 is right: a dataset may come from somebody else."""
    place, index = copy.place, "held-out-000000.parquet"
    changes = dict(changes)
    if content := changes.pop("content", None):
        data = encode_png(np.zeros((9, 9, 1), np.uint8)) if content == "wrong size" else b"GIF89a" * 20
        patch(place.path / "held-out-000000.tar", read_rows(place, index)[0]["offset"], data)
        changes |= {"size": len(data), "sha256": hashlib.sha256(data).digest()}
    change_index(place, index, lambda rows: rows[0].update(changes))
    reader = Reader(Dataset.open(place).split("held-out"))
    with pytest.raises(DamageError, match=message):
        reader.read(np.array([0]), np.array([0]))


def test_an_index_of_an_unknown_format_is_refused(copy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.manifest.FORMAT", 99)
    with pytest.raises(UserError, match=r"train-000000\.parquet: format \d+ is not known here, only 99"):
        Reader(copy.split("train")).read(np.array([0]), np.array([0]))


def bomb(columns: dict[str, pa.DataType], fields: dict[str, object], rows: int, **options: object) -> bytes:
    """A table of ours whose rows are all alike."""
    schema = pa.schema(list(columns.items()), metadata={"ddpm.format": str(FORMAT)})
    file = io.BytesIO()
    table = pa.table({name: [fields[name]] * rows for name in columns}, schema=schema)
    pq.write_table(table, file, compression="zstd", **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "rows", "options", "message"),
    [
        ({"key": "k" * 100_000}, 300, {"use_dictionary": True}, "is encoded otherwise"),
        (
            {"key": "k" * 100_000},
            300,
            {"use_dictionary": False, "column_encoding": {"key": "DELTA_BYTE_ARRAY"}},
            "is encoded otherwise",
        ),
        ({"key": "k" * 100_000}, 300, {"use_dictionary": False}, r"would take 3\d,\d{3},\d{3} bytes in memory"),
        (dict.fromkeys(INDEX_COLUMNS), 300_000, {"use_dictionary": False}, r"would take 19,200,000 bytes in memory"),
    ],
)
def test_a_table_that_unfolds_to_too_much_is_not_unpacked(
    copy: Dataset, changes: dict[str, object], rows: int, options: dict[str, object], message: str
) -> None:
    index = "held-out-000000.parquet"
    data = bomb(INDEX_COLUMNS, {**read_rows(copy.place, index)[0], **changes}, rows, **options)
    (copy.place / index).write(data)
    reseal(copy.place)
    assert len(data) < 2**18
    before = pa.total_allocated_bytes()
    reader = Reader(Dataset.open(copy.place).split("held-out"))
    with pytest.raises(DamageError, match=rf"held-out-000000\.parquet {message}"):
        reader.read(np.array([0]), np.array([0]))
    assert pa.total_allocated_bytes() - before < 2**20


def test_images_that_are_all_alike_make_no_bomb(tmp_path: Path) -> None:
    many = 20_000
    fields = {"key": "", "member": "a.png", "offset": 512, "size": 70, "sha256": bytes(32), "content": bytes(32)}
    columns: dict[str, Sequence[object]] = {name: [value] * many for name, value in fields.items()}
    columns |= {"key": [f"train-000000-{row:06d}" for row in range(many)], "label": [-1] * many}
    data = write_table(INDEX_COLUMNS, columns)
    assert len(read_table(data, INDEX_COLUMNS, Place.of(tmp_path))) == many


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_index_that_cannot_be_read_is_a_fault_of_the_storage(copy: Dataset, on_error: Any) -> None:
    file = copy.place.path / "train-000001.parquet"
    file.unlink()
    file.mkdir()
    with pytest.raises(StorageError, match=rf"^{file}: cannot be read: .*Is a directory"):
        Reader(copy.split("train"), on_error=on_error).read(np.array([1]), np.array([0]))


def test_cards_and_tables_that_cannot_be_are_named(copy: Dataset) -> None:
    split = copy.split("held-out")
    columns = pq.read_table(copy.place.path / "shards.parquet").to_pydict()
    columns["samples"][0] = 0
    change_table(copy.place, columns)
    with pytest.raises(DamageError, match=r"shards\.parquet has a shard without samples"):
        Dataset.open(copy.place).split("train").order(4, 0)
    assert split.order(4, 0).n == len(split)
    (copy.place / "dataset.json").write(b"[" * 200_000)
    with pytest.raises(DamageError, match=r"dataset\.json is not JSON of ours: it is nested too deeply"):
        Dataset.open(copy.place)
    (copy.place.path / "dataset.json").unlink()
    (copy.place.path / "dataset.json").mkdir()
    with pytest.raises(StorageError, match=r"dataset\.json: cannot be read: .*Is a directory"):
        Dataset.open(copy.place)


_FEW_FILES = """
import resource, sys
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.store import Place
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
split = Dataset.open(Place.of(sys.argv[1])).split("train")
reader = Reader(split, 0, shards_open=1000)
for _ in range(2):
    reader.read_all()
files = [open("/dev/null") for _ in range(60)]  # others need some too
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_a_wide_window_needs_no_more_files_than_there_may_be(tmp_path: Path) -> None:
    write_dataset(tmp_path, (noise(300), [-1] * 300), (noise(1), [-1]), (), 1)
    for hard in (200, 250, 1000):
        done = subprocess.run([sys.executable, "-c", _FEW_FILES, tmp_path, str(hard)], capture_output=True, text=True)
        assert done.stderr == ""
        assert 200 <= int(done.stdout) <= min(hard, 600)  # no more than it needs

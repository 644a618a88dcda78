"""Whole shards on local disk: within the limit, shared by processes, and never a half of one."""

import fcntl
import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.cache import ShardCache
from pipelines.data.manifest import Dataset, Shard
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.files import StorageError
from pipelines.s3 import S3Place
from pipelines.store import DamageError
from tests.data.dataset_helpers import flip, noise, read_rows, write_dataset
from tests.s3_faults import (
    BUCKET,
    HASTE,
    FaultyProxy,
    stock_client,
    wait_until,
)

SIZE = 100_000
"""Bytes of each made-up shard."""


@pytest.fixture
def place(proxy: FaultyProxy, server: int, request: pytest.FixtureRequest) -> S3Place:
    """A prefix with six made-up shards, put there by Amazon's client."""
    prefix = request.node.name.replace("[", "-").replace("]", "")
    for number in range(6):
        stock_client(server).put_object(Bucket=BUCKET, Key=f"{prefix}/{number}.tar", Body=content(number))
    return S3Place(BUCKET, prefix, HASTE)


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def shard(number: int, **changes: Any) -> Shard:
    fields = {"samples": 1, "bytes": SIZE, "sha256": hashlib.sha256(content(number)).digest(), "index_sha256": b""}
    return Shard(**{"name": f"{number}.tar", "index": f"{number}.parquet", **fields, **changes})


def kept(cache: ShardCache) -> list[int]:
    """Which of the shards are there, whole, and nothing else but them and the lock."""
    names = {hashlib.sha256(content(number)).hexdigest() + ".tar": number for number in range(6)}
    files = [path for path in cache.folder.iterdir() if path.name != "lock"]
    for path in files:
        assert path.read_bytes() == content(names[path.name])
    return sorted(names[path.name] for path in files)


def opened(cache: ShardCache, place: S3Place, number: int) -> bool:
    """Whether the shard comes from the cache; and then its bytes are right."""
    file = cache.open(place / f"{number}.tar", shard(number))
    if file is not None:
        assert file.read_at(0, SIZE + 1) == content(number)
        file.close()
    return file is not None


def test_the_shards_that_were_used_last_stay(place: S3Place, proxy: FaultyProxy, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "deep" / "cache", 3 * SIZE + SIZE // 2)
    assert all(opened(cache, place, number) for number in (0, 1, 2))
    assert kept(cache) == [0, 1, 2]
    proxy.calm()
    assert opened(cache, place, 0)
    assert proxy.seen == {}
    assert opened(cache, place, 3)
    assert kept(cache) == [0, 2, 3]
    again = ShardCache(tmp_path / "deep" / "cache", 2 * SIZE)  # a smaller limit, from now on
    assert opened(again, place, 4)
    assert kept(again) == [3, 4]


def test_what_is_larger_than_the_limit_is_not_kept(place: S3Place, proxy: FaultyProxy, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE - 1)
    proxy.calm()
    with pytest.warns(UserWarning, match=r"data\.cache: .* is too small for .*/0\.tar, .*; raise data\.cache\.gib"):
        assert not opened(cache, place, 0)
    assert not opened(cache, place, 1)
    assert proxy.seen == {}
    assert kept(cache) == []


def test_what_leaves_while_it_is_open_takes_no_room(place: S3Place, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    files = [cache.open(place / f"{number}.tar", shard(number)) for number in range(6)]
    assert kept(cache) == [4, 5]
    found = [file.read_at(0, SIZE + 1) for file in files if file is not None]
    assert found == [b""] * 4 + [content(4), content(5)]


def test_what_is_not_as_the_table_says_is_not_kept(place: S3Place, proxy: FaultyProxy, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2**30)
    for changes in ({"bytes": SIZE - 1}, {"bytes": SIZE + 1}, {"sha256": bytes(32)}):
        assert cache.open(place / "0.tar", shard(0, **changes)) is None
    proxy.methods, proxy.always = frozenset({"GET"}), "short"  # half of the body, said to be all
    with pytest.raises(StorageError, match=r"5\.tar: could not be read .* fewer than the 100000 bytes"):
        cache.open(place / "5.tar", shard(5))
    proxy.always = "garbled"
    assert cache.open(place / "5.tar", shard(5)) is None
    assert kept(cache) == []
    with pytest.raises(DamageError, match=r"9\.tar is missing"):
        cache.open(place / "9.tar", shard(0))
    proxy.always = "500"
    with pytest.raises(StorageError, match=r"0\.tar: could not be read"):
        cache.open(place / "0.tar", shard(0))
    assert kept(cache) == []
    proxy.calm()
    assert opened(cache, place, 0)


def test_a_copy_of_the_wrong_size_is_replaced(place: S3Place, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2**30)
    assert opened(cache, place, 0)
    (file,) = tmp_path.glob("*.tar")
    file.write_bytes(content(0)[:-1])
    assert opened(cache, place, 0)
    assert kept(cache) == [0]


def test_what_a_dead_process_left_is_not_taken_for_a_shard(place: S3Place, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE)
    for number in (0, 1):  # as large as they are to become: their size proves nothing
        (tmp_path / f"{shard(number).sha256.hex()}.partial").write_bytes(bytes(SIZE))
    assert opened(cache, place, 0)  # it is downloaded anew, and the other, which nobody is at, makes room
    assert kept(cache) == [0]


def test_what_another_process_downloads_counts_and_is_waited_for(place: S3Place, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    partial = tmp_path / f"{shard(0).sha256.hex()}.partial"
    with open(partial, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(SIZE)
        assert opened(cache, place, 1)
        assert opened(cache, place, 2)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".partial", ".tar"]
        assert not opened(ShardCache(tmp_path, SIZE), place, 3)  # no room beside it
        waiting = threading.Thread(target=opened, args=(cache, place, 0))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        other.seek(0)
        other.write(content(0))
        other.flush()
        os.rename(partial, partial.with_suffix(".tar"))
    waiting.join(10)
    assert not waiting.is_alive()
    assert 0 in kept(cache)


def _use(folder: str, place: S3Place, seed: int, results: Any) -> None:
    cache, random = ShardCache(folder, 2 * SIZE), np.random.default_rng(seed)
    results.put([opened(cache, place, int(number)) for number in random.integers(0, 6, 25)])


def test_processes_share_a_folder(place: S3Place, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_use, args=(str(tmp_path), place, seed, results)) for seed in range(4)]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        taken = 0
        for path in tmp_path.iterdir():
            try:
                taken += path.stat().st_size
            except FileNotFoundError:
                continue
        largest = max(largest, taken)
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(sum(results.get(timeout=10)) for _ in processes) > 10  # of 100; the others found no room
    assert largest <= 3 * SIZE  # the sum is taken while files come and go: one may be counted that has just left
    assert len(kept(ShardCache(tmp_path, 2 * SIZE))) <= 2


def test_a_killed_download_is_done_again(place: S3Place, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.methods, proxy.always = frozenset({"GET"}), "drip"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_use, args=(str(tmp_path), place, 0, results))
    process.start()
    wait_until(lambda: proxy.seen.get("GET"), 30)
    assert [path.stat().st_size for path in tmp_path.glob("*.partial")] == [SIZE]
    process.kill()
    process.join()
    proxy.calm()
    cache = ShardCache(tmp_path, 2 * SIZE)
    assert all(opened(cache, place, number) for number in range(6))
    assert kept(cache) == [4, 5]


def test_a_folder_that_cannot_be_used(place: S3Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file/cache: cannot write there"):
        ShardCache(tmp_path / "file" / "cache", SIZE)
    cache = ShardCache(tmp_path / "gone", SIZE)
    (tmp_path / "gone" / "lock").unlink()
    (tmp_path / "gone").rmdir()
    with pytest.warns(UserWarning, match=r"data\.cache: .*/gone cannot be used \(No such file or directory\)"):
        assert not opened(cache, place, 0)  # it is read from where it is


def test_a_copy_that_rots_is_no_damage_of_the_dataset(proxy: FaultyProxy, tmp_path: Path, server: int) -> None:
    images = noise(12, 6)
    local = write_dataset(tmp_path / "data", (images, [0] * 12), (images[:2], [0] * 2), ["a"], 6)
    for file in local.place.path.iterdir():
        stock_client(server).put_object(Bucket=BUCKET, Key=f"rot/{file.name}", Body=file.read_bytes())
    split = Dataset.open(S3Place(BUCKET, "rot", HASTE)).split("train")
    cache = ShardCache(tmp_path / "cache", 2**30)
    reader = Reader(split, 0, shard_cache=cache)
    assert np.array_equal(reader.read_all()[0], images)
    copy = cache.folder / f"{split.shards[0].sha256.hex()}.tar"
    for row in read_rows(local.place, "train-000000.parquet")[2:4]:
        flip(copy, row["offset"] + 10)
    assert np.array_equal(reader.read_all()[0], images)  # from S3
    assert not copy.exists()
    assert np.array_equal(Reader(split, 0, shard_cache=cache).read_all()[0], images)  # downloaded anew
    assert hashlib.sha256(copy.read_bytes()).digest() == split.shards[0].sha256

"""A dataset on S3 is read as one in a folder is: by ranges, or from whole shards on local disk, through faults too."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.cache import ShardCache
from pipelines.data.manifest import Dataset, Split
from pipelines.data.reader import Damage, Reader, SlotStream
from pipelines.files import StorageError
from pipelines.s3 import S3Place
from pipelines.store import DamageError
from tests.data.dataset_helpers import noise, read_rows, write_dataset
from tests.s3_faults import (
    BUCKET,
    HASTE,
    FaultyProxy,
    wait_until,
)

N, SHARD = 60, 20
IMAGES = noise(N, 9, 3)


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    small = (noise(4, 9, 3, seed=1), [0] * 4)
    return write_dataset(tmp_path / "data", (IMAGES, [i % 2 for i in range(N)]), small, ["a", "b"], SHARD)


@pytest.fixture
def remote(local: Dataset, stock: Any, proxy: FaultyProxy, request: pytest.FixtureRequest) -> Dataset:
    """The same dataset under a prefix of the test's own, put there by Amazon's client."""
    prefix = request.node.name.replace("[", "-").replace("]", "")
    for file in local.place.path.iterdir():
        stock.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
    return Dataset.open(S3Place(BUCKET, prefix, HASTE))


@pytest.fixture(params=["ranges", "cache"])
def reader(request: pytest.FixtureRequest, remote: Dataset, tmp_path: Path) -> Reader:
    cache = ShardCache(tmp_path / "cache", 2**30) if request.param == "cache" else None
    return Reader(remote.split("train"), 0, shard_cache=cache)


def change(stock: Any, dataset: Dataset, name: str, data: bytes | None) -> None:
    key = f"{dataset.place.key}/{name}"  # type: ignore[attr-defined]
    if data is None:
        stock.delete_object(Bucket=BUCKET, Key=key)
    else:
        stock.put_object(Bucket=BUCKET, Key=key, Body=data)


def test_it_reads_what_is_read_from_a_folder(local: Dataset, reader: Reader, remote: Dataset) -> None:
    assert remote.digest == local.digest
    order = local.split("train").order(2, 0)
    for batch in range(4):
        at = order.locate(np.arange(batch * 25, batch * 25 + 25))
        ours, theirs = reader.read(*at), Reader(local.split("train")).read(*at)
        assert np.array_equal(ours[0], theirs[0])
        assert np.array_equal(ours[1], theirs[1])
    assert np.array_equal(reader.read_all()[0], IMAGES)


def test_members_near_each_other_come_by_one_request(remote: Dataset, proxy: FaultyProxy) -> None:
    reader = Reader(remote.split("train"), 0)
    proxy.calm()
    reader.read_all()
    # Of each of the three shards: the index is looked up and read, the tar looked up and read.
    assert proxy.seen == {"HEAD": 6, "GET": 6}
    proxy.calm()
    reader.read(np.array([1]), np.array([5]))
    assert proxy.seen == {"GET": 1}


def test_members_far_from_each_other_come_by_their_own(
    remote: Dataset, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.s3_file.S3File.gap", 2000)  # bytes: a sample and its JSON are some 2500 here
    reader = Reader(remote.split("train"), 0)
    reader.read(np.array([0]), np.array([0]))
    proxy.calm()
    images, _ = reader.read(np.zeros(5, int), np.array([11, 3, 4, 11, 19]))
    assert proxy.seen == {"GET": 3}
    assert np.array_equal(images, IMAGES[[11, 3, 4, 11, 19]])


def test_a_cached_shard_is_downloaded_once(remote: Dataset, proxy: FaultyProxy, tmp_path: Path) -> None:
    for _ in range(2):
        reader = Reader(remote.split("train"), 0, shard_cache=ShardCache(tmp_path / "cache", 2**30))
        proxy.calm()
        for _ in range(3):
            assert np.array_equal(reader.read_all()[0], IMAGES)
    assert proxy.seen == {"HEAD": 3, "GET": 3}  # the second reader fetched the indices alone


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fault", ["500", "cut", "refuse", "short", "garbled", "404"])
def test_passing_faults_are_passed_over(
    remote: Dataset, proxy: FaultyProxy, tmp_path: Path, fault: Any, cached: bool
) -> None:
    """Whichever request they meet: index or tar, looked up or read, at once or after others."""
    for clean in range(4):
        cache = ShardCache(tmp_path / f"cache-{clean}", 2**30) if cached else None
        told: list[Damage] = []
        reader = Reader(remote.split("train"), 0, shard_cache=cache, on_error="skip", on_damage=told.append)
        for shard in range(3):
            proxy.calm()
            proxy.faults = [None] * clean + [fault] * (HASTE.attempts - 1)
            rows = np.arange(SHARD)
            for some in (rows[:1], rows, rows):
                images, _ = reader.read(np.full(len(some), shard), some)
                assert np.array_equal(images, IMAGES[shard * SHARD + some])
        assert told == []


@pytest.mark.parametrize(("fault", "what"), [("404", "is missing"), ("garbled", "does not match the sha256")])
def test_what_is_wrong_however_often_it_is_read_is_damage(
    remote: Dataset, proxy: FaultyProxy, fault: Any, what: str
) -> None:
    reader = Reader(remote.split("train"), 0)
    reader.read(np.array([1]), np.array([0]))
    for one in (reader, Reader(remote.split("train"), 0)):
        proxy.calm()
        proxy.always = fault
        with pytest.raises(DamageError, match=rf"train-000001\..*{what}"):
            one.read(np.array([1]), np.array([5]))
        assert sum(proxy.seen.values()) >= HASTE.attempts
    proxy.calm()
    assert np.array_equal(reader.read_all()[0], IMAGES)


def test_many_damaged_samples_of_a_shard_are_waited_for_once(remote: Dataset, stock: Any) -> None:
    change(stock, remote, "train-000001.tar", bytes(remote.split("train").shards[1].bytes))
    patient = Dataset.open(S3Place(BUCKET, remote.place.name, replace(HASTE, pause_seconds=0.4)))
    begun = time.monotonic()
    images, _ = Reader(patient.split("train"), 0, on_error="skip").read(np.ones(SHARD, int), np.arange(SHARD))
    assert np.array_equal(images, IMAGES[2 * SHARD :])
    assert time.monotonic() - begun < 4  # 20 times that would be 18 s at least


@pytest.mark.parametrize("open_before", [False, True])
def test_a_tar_that_goes_is_missing_whoever_has_it_open(remote: Dataset, stock: Any, open_before: bool) -> None:
    told: list[Damage] = []
    reader = Reader(remote.split("train"), 0, on_error="skip", on_damage=told.append)
    if open_before:
        assert np.array_equal(reader.read_all()[0], IMAGES)
    change(stock, remote, "train-000001.tar", None)
    with pytest.raises(DamageError, match=r"train-000001\.tar is missing; `ddpm data verify"):
        Reader(remote.split("train"), 0).read(np.array([1]), np.array([3]))
    images, _ = reader.read(np.array([1, 1, 2]), np.array([3, 4, 3]))
    assert np.array_equal(images, IMAGES[[2 * SHARD + 3, 2 * SHARD + 4, 2 * SHARD + 3]])
    reason = f"{remote.place}/train-000001.tar is missing"
    assert told == [Damage("train-000001.tar", row, "", reason, "train-000002.tar", row) for row in (3, 4)]


@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_a_lasting_fault_is_told_and_is_no_damage(
    remote: Dataset, proxy: FaultyProxy, tmp_path: Path, fault: Any
) -> None:
    told: list[Damage] = []
    for cache in (None, ShardCache(tmp_path / "cache", 2**30)):
        reader = Reader(remote.split("train"), 0, shard_cache=cache, on_error="skip", on_damage=told.append)
        proxy.methods, proxy.always = frozenset({"GET"}), fault
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(StorageError, match=rf"{remote.place}/train-00000\d\.(parquet|tar): could not be read"):
                reader.read_all()
        assert time.monotonic() - begun < 5
        proxy.calm()
        assert np.array_equal(reader.read_all()[0], IMAGES)
    assert told == []


@pytest.mark.parametrize("cached", [False, True])
def test_damage_on_s3_is_what_it_is_in_a_folder(
    local: Dataset, remote: Dataset, stock: Any, tmp_path: Path, cached: bool
) -> None:
    tar = bytearray((local.place / "train-000000.tar").read())
    bad = read_rows(local.place, "train-000000.parquet")[4]
    tar[bad["offset"] + 20] ^= 1
    change(stock, remote, "train-000000.tar", bytes(tar))
    cut = read_rows(local.place, "train-000001.parquet")[10]["offset"]
    change(stock, remote, "train-000001.tar", (local.place / "train-000001.tar").read()[:cut])
    change(stock, remote, "train-000002.tar", None)
    told: list[Damage] = []
    cache = ShardCache(tmp_path / "cache", 2**30) if cached else None
    split = remote.split("train")
    images, _ = Reader(split, 0, shard_cache=cache, on_error="skip", on_damage=told.append).read_all()
    broken = {4, *range(30, 60)}
    for i in range(N):
        if i not in broken:
            assert np.array_equal(images[i], IMAGES[i])
    assert {(one.shard, one.row) for one in told} == {(f"train-00000{i // 20}.tar", i % 20) for i in broken}
    assert np.array_equal(images[4], IMAGES[5])
    assert np.array_equal(images[33], IMAGES[20])
    assert np.array_equal(images[44], IMAGES[5])  # the row of the same number in the next shard is damaged too
    reader = Reader(split, 0, shard_cache=cache)
    for place, what in (
        ((0, 4), r"does not match"),
        ((1, 12), "is cut short"),
        ((2, 0), r"train-000002\.tar is missing"),
    ):
        with pytest.raises(DamageError, match=what):
            reader.read(np.array([place[0]]), np.array([place[1]]))


def test_tars_may_lie_on_s3_and_their_indices_here(local: Dataset, remote: Dataset) -> None:
    split = local.split("train")
    apart = Split(split.place, remote.place, *[getattr(split, name) for name in list(Split.__dataclass_fields__)[2:]])
    for file in local.place.path.glob("*.tar"):
        file.unlink()
    assert np.array_equal(Reader(apart, 0).read_all()[0], IMAGES)


def test_a_stream_from_s3_is_prompt_to_close(remote: Dataset, local: Dataset, proxy: FaultyProxy) -> None:
    split = remote.split("train")
    reader, order = Reader(split, 0), split.order(2, 0)
    with SlotStream(reader, order, 8, 2, [0, 1], 0, threads=4) as stream:
        for number, (step, slot, images, _) in enumerate(itertools.islice(stream, 40)):
            assert (step, slot) == divmod(number, 2)
            at = order.locate(np.arange(number * 4, number * 4 + 4))
            assert np.array_equal(images, Reader(local.split("train")).read(*at)[0])
    proxy.calm()
    proxy.always = "silent"
    stream = SlotStream(reader, order, 8, 2, [0, 1], 0, threads=4)
    wait_until(lambda: proxy.seen.get("GET"))
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 1.5

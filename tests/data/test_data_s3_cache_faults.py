"""A cache of shards whose folder is full, whose processes hang, or that has links in it: training goes on from S3."""

import fcntl
import hashlib
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data import cache as caching
from pipelines.data.cache import ShardCache
from pipelines.data.manifest import Dataset, Split
from pipelines.data.reader import Damage, Reader
from pipelines.s3 import S3Place
from tests.data.dataset_helpers import noise, write_dataset
from tests.s3_faults import BUCKET, HASTE, FaultyProxy

N, SHARD = 40, 5
IMAGES = noise(N, 9, 3)


@pytest.fixture
def split(proxy: FaultyProxy, stock: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Split:
    """Eight shards on S3."""
    local = write_dataset(tmp_path / "data", (IMAGES, [-1] * N), (IMAGES[:2], [-1] * 2), (), SHARD)
    prefix = request.node.name.replace("[", "-").replace("]", "")
    for file in local.place.path.iterdir():
        stock.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
    return Dataset.open(S3Place(BUCKET, prefix, HASTE)).split("train")


def name(split: Split, number: int, suffix: str = ".tar") -> str:
    return split.shards[number].sha256.hex() + suffix


def taken(folder: Path) -> int:
    """Bytes of a folder's files, those included that are open and have no name any more."""
    files = {(s.st_dev, s.st_ino): s.st_size for s in map(os.stat, folder.iterdir())}
    for descriptor in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd") / descriptor
        if link.is_symlink() and str(link.readlink()).startswith(f"{folder}/"):
            found = link.stat()
            files[found.st_dev, found.st_ino] = found.st_size
    return sum(files.values())


def test_shards_that_are_open_stay_within_the_limit(split: Split, tmp_path: Path) -> None:
    size = split.shards[0].bytes
    cache = ShardCache(tmp_path / "cache", 2 * size)
    told: list[Damage] = []
    reader = Reader(split, 0, shard_cache=cache, on_error="skip", on_damage=told.append)
    for _ in range(2):
        for shard in (*range(8), 3, 0, 7):
            images, _ = reader.read(np.full(SHARD, shard), np.arange(SHARD))
            assert np.array_equal(images, IMAGES[shard * SHARD : shard * SHARD + SHARD])
            assert taken(cache.folder) <= 2 * size
    assert taken(cache.folder) == 2 * size
    assert told == []
    assert len(list(cache.folder.glob("*.tar"))) == 2  # those that left while they were open took no other with them


@pytest.mark.parametrize("where", [".partial", ".tar", "lock"])
@pytest.mark.parametrize("kind", ["file", "nothing", "pipe"])
def test_a_link_leads_nowhere(split: Split, tmp_path: Path, where: str, kind: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "cache"
    cache = ShardCache(folder, 2**30)
    file = folder / (where if where == "lock" else name(split, 0, where))
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(victim)
        if kind == "file":
            victim.write_bytes(b"precious")
    with pytest.warns(UserWarning, match=rf"data\.cache: {folder} cannot be used \((Too many|not a plain|No such dev)"):
        assert cache.open(split.tars / split.shards[0].name, split.shards[0]) is None
    assert np.array_equal(Reader(split, 0, shard_cache=cache).read_all()[0], IMAGES)
    cache.discard(split.shards[0])
    assert (victim.read_bytes() if victim.exists() else None) == (b"precious" if kind == "file" else None)


def test_a_shard_with_another_name_is_not_emptied(split: Split, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2**30)
    assert cache.open(split.tars / split.shards[0].name, split.shards[0]) is not None
    os.link(cache.folder / name(split, 0), tmp_path / "other")
    cache.discard(split.shards[0])
    assert not (cache.folder / name(split, 0)).exists()
    assert hashlib.sha256((tmp_path / "other").read_bytes()).digest() == split.shards[0].sha256


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond a size: what the system has that is most like a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_onto_a_full_disk_nothing_is_downloaded(
    split: Split, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path / "cache", 2**30)
    tars = [(split.tars / shard.name, shard) for shard in split.shards]
    assert cache.open(*tars[0]) is not None
    proxy.calm()
    with full_disk(split.shards[1].bytes - 1), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [cache.open(*tar) for tar in (*tars[1:], *tars[1:])] == [None] * 14
        assert cache.open(*tars[0]) is not None  # what is here is used
    assert proxy.seen == {}
    assert [str(one.message) for one in said] == [
        f"data.cache: {cache.folder} cannot be used (File too large); for now shards are read from where they are"
    ]
    assert cache.open(*tars[1]) is None  # nothing is tried for some minutes
    monkeypatch.setattr(caching, "REST_SECONDS", 0.0)
    again = ShardCache(tmp_path / "cache", 2**30)
    with full_disk(split.shards[1].bytes - 1), pytest.warns(UserWarning, match="cannot be used"):
        assert again.open(*tars[1]) is None
    assert again.open(*tars[1]) is not None


def test_no_shard_leaves_in_vain(split: Split, tmp_path: Path) -> None:
    size = split.shards[0].bytes
    cache = ShardCache(tmp_path / "cache", 3 * size)
    for number in (0, 1):
        assert cache.open(split.tars / split.shards[number].name, split.shards[number]) is not None
    with open(cache.folder / f"{'ab' * 32}.partial", "wb") as other:  # another process downloads a large one
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(2 * size + 1)
        assert cache.open(split.tars / split.shards[2].name, split.shards[2]) is None
    assert {path.name for path in cache.folder.glob("*.tar")} == {name(split, 0), name(split, 1)}


@pytest.mark.parametrize("where", [".partial", "lock"])
def test_a_process_that_has_stopped_is_not_waited_for(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(caching, "STALL_SECONDS", 0.2)
    cache = ShardCache(tmp_path / "cache", 2**30)
    with open(cache.folder / (where if where == "lock" else name(split, 0, where)), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match=r"data\.cache: .*another process has it locked, and does nothing\)"):
            assert np.array_equal(Reader(split, 0, shard_cache=cache).read_all()[0], IMAGES)

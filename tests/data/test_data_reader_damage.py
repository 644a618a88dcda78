"""With `on_error="skip"` a damaged sample has one substitute, whoever reads it and when."""

import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.manifest import Dataset, Split
from pipelines.data.order import owned_slots
from pipelines.data.reader import Damage, Reader, SlotStream
from pipelines.store import DamageError, Place
from tests.data.dataset_helpers import flip, noise, read_rows, write_dataset

SIZES = (7, 7, 7, 7, 4)
N = sum(SIZES)
IMAGES = noise(N, 6)
LABELS = np.arange(N) % 3
STARTS = np.cumsum([0, *SIZES])
BOTH = pytest.mark.parametrize("cache", [0, 2**20], ids=["pread", "cached"])

At = tuple[int, int]
"""(shard, row)."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_dataset(root, (IMAGES, LABELS.tolist()), (noise(3, 6), [0, 1, 2]), ["a", "b", "c"], shard_images=7)
    return root


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Dataset:
    """A copy that may be damaged."""
    shutil.copytree(whole, tmp_path / "data")
    return Dataset.open(Place.of(tmp_path / "data"))


def break_sample(dataset: Dataset, shard: int, row: int) -> str:
    """Flip a bit of a member; its name."""
    found = read_rows(dataset.place, f"train-{shard:06d}.parquet")[row]
    flip(dataset.place.path / f"train-{shard:06d}.tar", found["offset"] + 20)
    return found["member"]


def successors(shard: int, row: int) -> Iterator[At]:
    """The rule, as its documentation has it: the shard from the row on, around; then the next shards alike."""
    for other in [*range(shard, len(SIZES)), *range(shard)]:
        begin = row % SIZES[other]
        for candidate in [*range(begin, SIZES[other]), *range(begin)]:
            yield other, candidate


def expected(broken: set[At]) -> dict[At, At]:
    everything = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    return {place: next(p for p in successors(*place) if p not in broken) for place in everything}


def read_at(reader: Reader, places: list[At]) -> tuple[np.ndarray, np.ndarray]:
    return reader.read(np.array([shard for shard, _ in places]), np.array([row for _, row in places]))


def holds(reader: Reader, broken: set[At], places: list[At]) -> bool:
    """Whether the reader gives, for each place, image and label of the place that the rule names."""
    images, labels = read_at(reader, places)
    rule = expected(broken)
    at = [STARTS[shard] + row for shard, row in (rule[place] for place in places)]
    return bool(np.array_equal(images, IMAGES[at]) and np.array_equal(labels, LABELS[at]))


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_the_substitute_is_the_next_that_can_be_read(dataset: Dataset, cache: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    everything = list(expected(set()))
    broken = {everything[i] for i in random.choice(N, random.integers(1, 20), replace=False)}
    for place in broken:
        break_sample(dataset, *place)
    if seed % 2:
        lost = int(random.integers(len(SIZES)))
        (dataset.place.path / f"train-{lost:06d}.{'tar' if seed % 4 == 1 else 'parquet'}").unlink()
        broken |= {(lost, row) for row in range(SIZES[lost])}
    told: list[Damage] = []
    reader = Reader(dataset.split("train"), cache, on_error="skip", on_damage=told.append)
    for _ in range(3):
        random.shuffle(everything)
        for batch in (everything[:9], everything[9:10], everything[10:]):
            assert holds(reader, broken, batch)
            # One that has read nothing yet, and one batch of it alone, gives the same.
            assert holds(Reader(dataset.split("train"), cache, on_error="skip"), broken, batch)
    rule = expected(broken)
    names = [shard.name for shard in dataset.split("train").shards]
    assert {(one.shard, one.row, one.substitute_shard, one.substitute_row) for one in told} == {
        (names[place[0]], place[1], names[rule[place][0]], rule[place][1]) for place in broken
    }
    assert len(told) == len(broken)


def test_what_is_told(dataset: Dataset) -> None:
    member = break_sample(dataset, 1, 2)
    (dataset.place.path / "train-000003.tar").unlink()
    told: list[Damage] = []
    reader = Reader(dataset.split("train"), 0, on_error="skip", on_damage=told.append)
    read_at(reader, [(0, 0), (1, 2), (1, 2), (3, 6), (1, 3)])
    assert told == [
        Damage("train-000001.tar", 2, member, "does not match the sha256 in the index", "train-000001.tar", 3),
        Damage("train-000003.tar", 6, "", f"{dataset.place}/train-000003.tar is missing", "train-000004.tar", 2),
    ]


@pytest.mark.parametrize("harm", ["no tar", "no index", "damaged index", "empty tar", "not a tar"])
def test_a_whole_shard_is_replaced_by_the_next(dataset: Dataset, harm: str) -> None:
    tar, index = dataset.place.path / "train-000002.tar", dataset.place.path / "train-000002.parquet"
    if harm.startswith("no "):
        (tar if harm == "no tar" else index).unlink()
    elif harm == "damaged index":
        flip(index, 100)
    else:
        tar.write_bytes(b"" if harm == "empty tar" else bytes(len(tar.read_bytes())))
    broken = {(2, row) for row in range(7)}
    reader = Reader(dataset.split("train"), 0, on_error="skip")
    assert holds(reader, broken, list(expected(broken)))
    with pytest.raises(DamageError, match="train-000002"):
        read_at(Reader(dataset.split("train"), 0), [(2, 0)])


def test_a_truncated_shard_is_read_as_far_as_it_goes(dataset: Dataset) -> None:
    rows = read_rows(dataset.place, "train-000000.parquet")
    tar = dataset.place.path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[: rows[3]["offset"] + 5])
    told: list[Damage] = []
    reader = Reader(dataset.split("train"), 0, on_error="skip", on_damage=told.append)
    broken = {(0, row) for row in range(3, 7)}
    assert holds(reader, broken, list(expected(broken)))
    assert {one.reason for one in told} == {"is cut short: the file ends before it"}


@BOTH
def test_where_nothing_can_be_read_that_is_said(dataset: Dataset, cache: int) -> None:
    for number in range(len(SIZES)):
        (dataset.place.path / f"train-{number:06d}.tar").unlink()
    reader = Reader(dataset.split("train"), cache, on_error="skip")
    for _ in range(2):
        with pytest.raises(
            DamageError, match=r"no sample of the split train can be read; train-000001\.tar: .*missing"
        ):
            read_at(reader, [(1, 0)])


def test_it_is_the_default_to_raise(dataset: Dataset) -> None:
    member = break_sample(dataset, 1, 2)
    told: list[Damage] = []
    reader = Reader(dataset.split("train"), on_damage=told.append)
    for _ in range(2):
        with pytest.raises(DamageError, match=rf"train-000001\.tar: member {member} does not match the sha256"):
            read_at(reader, [(1, 3), (1, 2), (1, 4)])
    assert told == []


def test_threads_agree_and_tell_once(dataset: Dataset) -> None:
    broken = {(shard, row) for shard in (0, 1, 3) for row in (0, 1, 5)}
    for place in broken:
        break_sample(dataset, *place)
    told: list[Damage] = []
    reader = Reader(dataset.split("train"), 0, on_error="skip", on_damage=told.append, shards_open=2)
    everything = list(expected(broken))

    def check(seed: int) -> bool:
        places = [everything[i] for i in np.random.default_rng(seed).permutation(N)]
        return holds(reader, broken, places)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(check, range(24)))
    assert len(told) == len({(one.shard, one.row) for one in told}) == len(broken)


def slots_of(split: Split, workers: int, start: int, steps: int) -> dict[tuple[int, int], np.ndarray]:
    found = {}
    for rank in range(workers):
        owned = owned_slots(rank, workers, 4)
        reader = Reader(split, on_error="skip")
        with SlotStream(reader, split.order(2, 1), 16, 4, owned, start) as stream:
            for step, slot, images, _ in itertools.islice(stream, steps * len(owned)):
                found[step, slot] = images
    return found


def test_training_sees_the_same_with_any_workers_and_after_a_stop(dataset: Dataset) -> None:
    for place in [(0, 0), (2, 3), (2, 4), (4, 3)]:
        break_sample(dataset, *place)
    (dataset.place.path / "train-000001.tar").unlink()
    split = dataset.split("train")
    one = slots_of(split, 1, 0, 8)
    for other in (slots_of(split, 4, 0, 8), {**slots_of(split, 2, 0, 3), **slots_of(split, 2, 3, 5)}):
        assert sorted(other) == sorted(one)
        assert all(np.array_equal(one[place], other[place]) for place in one)

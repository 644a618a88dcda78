"""What training does with its data: augmentation keyed by slot, damage, datasets that were made before."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.cluster import Cluster
from pipelines.data.damage import Damage
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset, read_index
from pipelines.data.order import owned_slots
from pipelines.data.pixels import to_model
from pipelines.data.reader import Reader
from pipelines.progress import Progress
from pipelines.session import open_session
from pipelines.spec import Spec
from pipelines.store import DamageError, Place
from pipelines.train.augment import augment, shifted
from pipelines.train.driver import train as drive
from pipelines.train.images import TrainingImages
from pipelines.train.loop import Trainer, World, train
from pipelines.train.run import Run
from tests.conftest import tiny_spec
from tests.data.dataset_helpers import write_dataset
from tests.s3_faults import BUCKET, s3_server, set_environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Tests must not change it."""
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=100)


def images(n: int = 6) -> torch.Tensor:
    return to_model(np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))


def test_a_shift_repeats_the_edge() -> None:
    given = images(4)
    moved = shifted(given, torch.tensor([0, 3, -2, 7]), torch.tensor([0, -1, 4, -7]))
    for image, result, down, right in zip(given, moved, (0, 3, -2, 7), (0, -1, 4, -7), strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (8, 8), (8, 8)), mode="edge")
        assert np.array_equal(result.numpy(), padded[:, 8 - down : 16 - down, 8 - right : 16 - right])


def test_augmentation_is_keyed_by_step_and_slot() -> None:
    data = tiny_spec(data__flip=True, data__shift=2).data
    given = images()
    first = augment(given, data, 7, 3, 1)
    assert torch.equal(first, augment(given, data, 7, 3, 1))
    assert torch.equal(first[:2], augment(given[:2], data, 7, 3, 1))  # an image's changes do not depend on the others
    for other in ((8, 3, 1), (7, 4, 1), (7, 3, 2)):
        assert not torch.equal(first, augment(given, data, *other))
    assert torch.equal(given, augment(given, tiny_spec().data, 7, 3, 1))


def test_shifts_are_uniform_and_within_bounds() -> None:
    data = tiny_spec(data__shift=2).data
    spot = torch.zeros(4000, 1, 8, 8)
    spot[:, :, 4, 4] = 1.0
    found = augment(spot, data, 0, 0, 0).squeeze(1).nonzero()[:, 1:] - 4
    counts = torch.zeros(5, 5).index_put_((found[:, 0] + 2, found[:, 1] + 2), torch.ones(len(found)), accumulate=True)
    assert counts.sum() == 4000
    assert ((counts - 160) ** 2 / 160).sum() < 60  # chi squared of 24 degrees of freedom


@pytest.fixture
def damaged(whole: Dataset, tmp_path: Path) -> tuple[Dataset, set[tuple[str, int]]]:
    """A copy in which a bit of three training images is flipped; their shards and rows."""
    shutil.copytree(whole.place.path, tmp_path / "damaged")
    dataset = Dataset.open(Place.of(tmp_path / "damaged"))
    places = {(0, 5), (0, 6), (3, 99)}
    split = dataset.split("train")
    for number, row in places:
        found = read_index(split, split.shard(number)).slice(row, 1).to_pylist()[0]
        with open(dataset.place.path / split.shard(number).name, "r+b") as file:
            file.seek(found["offset"] + 45)
            byte = file.read(1)
            file.seek(found["offset"] + 45)
            file.write(bytes([byte[0] ^ 4]))
    return dataset, {(split.shard(number).name, row) for number, row in places}


def run_of(spec: Spec, dataset: Dataset, store: Path) -> Run:
    run = Run.of(spec, dataset.digest, Place.of(store))
    run.describe(spec, dataset.digest)
    return run


LONG = {"train__images": 1280, "train__checkpoint_every": 10}
"""More than an epoch of the 1,067 training images."""


def test_damage_stops_the_training_by_name(damaged: tuple[Dataset, set], tmp_path: Path) -> None:
    dataset, places = damaged
    with pytest.raises(DamageError) as error:
        train(tiny_spec(**LONG), dataset, run_of(tiny_spec(**LONG), dataset, tmp_path))
    assert any(shard in str(error.value) for shard, _ in places)
    assert "does not match the sha256 in the index" in str(error.value)


def test_skipped_damage_is_recorded_and_changes_no_bit_of_the_order(
    damaged: tuple[Dataset, set], tmp_path: Path
) -> None:
    dataset, places = damaged
    spec = tiny_spec(data__on_error="skip", **LONG)
    run = run_of(spec, dataset, tmp_path / "one")
    outcome = train(spec, dataset, run)
    found = run.damage()
    assert {(damage.shard, damage.row) for damage in found} == places
    by_row = {damage.row: damage for damage in found}
    assert by_row[5].substitute_row == by_row[6].substitute_row == 7
    assert all("does not match" in damage.reason for damage in found)
    # Stopped and gone on with, the same bits, and nothing recorded twice.
    other = run_of(spec, dataset, tmp_path / "two")

    def stop(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, dataset, other, at_checkpoint=stop)
    train(spec, dataset, other)
    assert other.checkpoints.digests(outcome.step) == run.checkpoints.digests(outcome.step)
    assert other.damage() == found
    # A slot is what another reader makes of it.
    fresh = run_of(spec, dataset, tmp_path / "three")
    alone, second = Trainer(spec, dataset, fresh, World()), Reader(dataset.split("train"), on_error="skip")
    order = dataset.split("train").order(spec.data.window, spec.seed)
    with alone.stream() as stream:
        step, slot, pixels, _ = next(stream)
    b = spec.train.global_batch // spec.train.slots
    first = (step * spec.train.slots + slot) * b
    assert np.array_equal(pixels, second.read(*order.locate(np.arange(first, first + b)))[0])


@pytest.mark.parametrize("images", [32, 320, 960])
def test_damage_is_recorded_of_what_was_trained_on_alone(
    damaged: tuple[Dataset, set], images: int, tmp_path: Path
) -> None:
    """Reading ahead meets no more of it, however far ahead it is."""
    dataset, places = damaged
    spec = tiny_spec(data__on_error="skip", train__images=images)
    run = run_of(spec, dataset, tmp_path)
    train(spec, dataset, run)
    split = dataset.split("train")
    shards, rows = split.order(spec.data.window, spec.seed).locate(np.arange(images))
    met = {(split.shard(int(shard)).name, int(row)) for shard, row in zip(shards, rows, strict=True)} & places
    assert {(damage.shard, damage.row) for damage in run.damage()} == met


def test_damage_that_was_read_ahead_and_mended_before_its_turn_is_not_recorded(
    damaged: tuple[Dataset, set], whole: Dataset, tmp_path: Path
) -> None:
    dataset, places = damaged
    spec = tiny_spec(data__on_error="skip", **LONG)
    split = dataset.split("train")
    shards, rows = split.order(spec.data.window, spec.seed).locate(np.arange(1280))
    names = [(split.shard(int(shard)).name, int(row)) for shard, row in zip(shards, rows, strict=True)]
    first = min(names.index(place) for place in places) // spec.train.global_batch
    assert first > 1
    run = run_of(spec, dataset, tmp_path / "run")
    trainer = Trainer(spec, dataset, run, World())
    with trainer.stream() as stream:
        while trainer.step < first:
            trainer.take_step(stream)
        trainer.save()
        trainer.recorder.settle()
    shutil.copytree(whole.place.path, dataset.place.path, dirs_exist_ok=True)
    outcome = train(spec, dataset, run)
    undisturbed = run_of(spec, whole, tmp_path / "undisturbed")
    train(spec, whole, undisturbed)
    assert run.checkpoints.digests(outcome.step) == undisturbed.checkpoints.digests(outcome.step)
    assert run.damage() == []


def test_a_run_of_damaged_images_says_so_when_they_are_whole_again(
    damaged: tuple[Dataset, set], whole: Dataset, tmp_path: Path
) -> None:
    dataset, _ = damaged
    said: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    spec = tiny_spec(data__on_error="skip", **LONG)
    train(spec, dataset, run_of(spec, dataset, tmp_path / "store"))
    for mended, words in ((False, "had others read in their place"), (True, "3 of them are whole now")):
        if mended:
            shutil.copytree(whole.place.path, dataset.place.path, dirs_exist_ok=True)
        said.clear()
        with Cluster(None) as unused:
            session = open_session(unused, Heard(), spec, str(tmp_path / "store"))
            done = drive(spec, dataset, session.store, unused, session.tracker, session.progress)
        assert done.damaged == 3
        assert [words in line for line in said] == [True]


def test_a_record_of_damage_is_kept_once(whole: Dataset, tmp_path: Path) -> None:
    run = run_of(tiny_spec(), whole, tmp_path)
    one = Damage("deep/a.tar", 3, "x.png", "is cut short", "deep/a.tar", 4)
    for damage in (one, one, Damage("b.tar", 0, "", "is missing", "deep/a.tar", 0)):
        run.record_damage(damage)
    assert [(damage.shard, damage.row) for damage in run.damage()] == [("b.tar", 0), ("deep/a.tar", 3)]
    assert run.damage()[1] == one


def test_other_ways_to_read_are_the_same_run() -> None:
    """What makes a run another one is what decides its bits."""
    plain = tiny_spec().training_fields()
    cache = {"folder": "/tmp/x", "gib": 1.0}
    assert tiny_spec(data__on_error="skip", data__cache=cache, data__workers=3).training_fields() == plain
    assert tiny_spec(data__shift=1).training_fields() != plain
    assert "shift" not in plain["data"]


@pytest.mark.parametrize("images", [1, 5, 40])
def test_fewer_images_than_a_batch_are_trained_on_the_same_by_any_number_of_workers(
    images: int, tmp_path: Path
) -> None:
    """One shard or two: ranks own slots, not shards. Batches of 32 straddle epochs."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 1), dtype=np.uint8)
    dataset = write_dataset(tmp_path / "data", (pixels, [-1] * images), (pixels[:0], []), shard_images=30)
    spec = tiny_spec(train__images=64)
    run = run_of(spec, dataset, tmp_path)
    outcome = train(spec, dataset, run)
    assert (outcome.step, outcome.images) == (2, 64)
    seen: dict[int, np.ndarray] = {}
    for rank in range(4):
        with TrainingImages(spec, dataset, run, owned_slots(rank, 4, 4)).stream(0) as stream:
            step, slot, batch, _ = next(stream)
            assert step == 0
            seen[slot] = batch
    order = dataset.split("train").order(spec.data.window, spec.seed)
    shards, rows = order.locate(np.arange(32))
    assert np.array_equal(np.concatenate([seen[slot] for slot in range(4)]), pixels[shards * 30 + rows])


def test_data_on_s3_give_the_same_bits_through_a_cache_or_without(
    whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(train__images=320)
    local = run_of(spec, whole, tmp_path / "local")
    step = train(spec, whole, local).step
    with s3_server() as port:
        set_environment(monkeypatch, f"http://127.0.0.1:{port}")
        place = Place.of(f"s3://{BUCKET}/digits")
        remote = ingest("digits", place, image_size=8, channels=1, held_out=0.4, shard_images=100)
        assert {name: (place / name).read() for name in place.list()} == {
            name: (whole.place / name).read() for name in whole.place.list()
        }
        for cache in (None, {"folder": str(tmp_path / "cache"), "gib": 0.001}):
            spec = tiny_spec(train__images=320, data__cache=cache)
            run = run_of(spec, Dataset.open(remote.place), tmp_path / str(cache is None))
            train(spec, Dataset.open(remote.place), run)
            assert run.name == local.name
            assert run.checkpoints.digests(step) == local.checkpoints.digests(step)
    assert list((tmp_path / "cache").glob("*.tar"))

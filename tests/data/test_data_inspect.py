"""Datasets told, shown and compared, as functions and as a person meets them."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data import inspect
from pipelines.data.diff import Difference, compare
from pipelines.data.manifest import Dataset, content_hash
from pipelines.errors import UserError
from pipelines.store import DamageError, Place
from tests.data.dataset_helpers import change_card, change_index, noise, write_dataset

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 training images sorted by class, 9 held out. Tests must not change it."""
    train = noise(60), [i // 20 for i in range(60)]
    return write_dataset(
        tmp_path_factory.mktemp("inspect") / "data", train, (noise(9, seed=1), [0, 1, -1] * 3), CLASSES
    )


def test_info_is_the_card_and_what_was_counted(original: Dataset) -> None:
    told = inspect.info(original, window=2, seed=3, batch=10)
    assert told.items() >= original.card.items()
    assert told["bytes"] == sum(file.stat().st_size for file in original.place.path.glob("*.tar"))
    quality = told["shuffle"]
    assert (quality["window"], quality["seed"], quality["batch"]) == (2, 3, 10)
    shards, rows = original.split("train").order(2, 3).locate(np.arange(32 * 60))
    assert quality["shards"]["found"] == pytest.approx(np.mean([len(set(b)) for b in shards.reshape(-1, 10).tolist()]))
    counts = np.stack([np.bincount(b, minlength=3) for b in ((shards * 5 + rows) // 20).reshape(-1, 10)])
    deviation = ((counts - 10 / 3) ** 2).sum(axis=1).mean()
    assert quality["classes"]["quality"] == pytest.approx(10 * 2 / 3 * 50 / 59 / deviation, rel=0.05)
    assert "raise data.window from 2" in quality["advice"]
    json.dumps(told)


def test_info_of_images_without_labels_and_without_enough_of_them(tmp_path: Path) -> None:
    bare = write_dataset(tmp_path / "bare", (noise(3, channels=3), [-1] * 3), (noise(0, channels=3), []))
    told = inspect.info(bare)
    assert "classes" not in told["shuffle"]
    assert told["shuffle"]["batch"] == 3
    with pytest.raises(UserError, match="the split held-out has no images"):
        inspect.preview(bare, "held-out", 5)


def test_info_names_an_index_with_labels_that_cannot_be(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", (noise(5), [0, 1] * 2 + [0]), (noise(0), []), ("a", "b"))
    change_index(dataset.place, "train-000000.parquet", lambda rows: rows[3].update(label=7))
    with pytest.raises(DamageError, match=r"train-000000\.parquet has labels beyond the 2 classes"):
        inspect.info(Dataset.open(dataset.place))


@pytest.mark.parametrize(("split", "n"), [("train", 25), ("held-out", 100)])
def test_a_preview_shows_the_images_in_the_order_of_training(original: Dataset, split: str, n: int) -> None:
    images = noise(60) if split == "train" else noise(9, seed=1)
    sheet = np.asarray(Image.open(io.BytesIO(inspect.preview(original, split, n, window=3, seed=4))).convert("L"))
    n = min(n, len(images))
    shards, rows = original.split(split).order(3, 4).locate(np.arange(n))
    columns = min(n, 10)
    cell = (sheet.shape[1] - 2) // columns - 2
    for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
        top, left = (2 + at * (cell + 2) for at in divmod(place, columns))
        shown = sheet[top : top + cell, left : left + cell]
        assert np.array_equal(shown[:: cell // 6, :: cell // 6], images[shard * 5 + row, :, :, 0])


def by_sets(a: Sequence, b: Sequence) -> dict:
    """The difference of two lists of (split, content, class name), the simple way."""
    places = [{}, {}]
    for side, samples in enumerate((a, b)):
        for split, content, name in samples:
            splits, names = places[side].setdefault(content, (set(), set()))
            splits.add(split)
            names.add(name)
    one, other = places
    both = one.keys() & other.keys()
    moved = [c for c in both if one[c][0] != other[c][0]]
    return {
        "only_a": len(one.keys() - other.keys()),
        "only_b": len(other.keys() - one.keys()),
        "both": len(both),
        "copies": (len(a) - len(one), len(b) - len(other)),
        "moved": len(moved),
        "to_held_out": sum((one[c][0], other[c][0]) == ({"train"}, {"held-out"}) for c in moved),
        "to_train": sum((one[c][0], other[c][0]) == ({"held-out"}, {"train"}) for c in moved),
        "relabelled": sum(one[c][1] != other[c][1] for c in both),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("piece", [1, 7, 2**17])
def test_a_difference_is_that_of_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, piece: int) -> None:
    """Images drawn from few, so that there are copies, moves and new labels of all kinds."""
    monkeypatch.setattr("pipelines.data.diff._PIECE", piece)
    random = np.random.default_rng(seed)
    pool = noise(25, size=2)
    datasets, samples = [], []
    for side, classes in enumerate((("ant", "bee"), ("cat", "bee", "ant"))):
        splits, listed = [], []
        for split, n in (("train", 17), ("held-out", 6)):
            picked = random.integers(0, 25, n)
            # Mostly by the image, at times another; both datasets with the same names.
            names = [("ant", "bee", None)[(i + (random.random() < 0.1)) % 3] for i in picked.tolist()]
            splits.append((pool[picked], [-1 if name is None else classes.index(name) for name in names]))
            listed += [(split, content_hash(pool[i]), name) for i, name in zip(picked.tolist(), names, strict=True)]
        datasets.append(write_dataset(tmp_path / str(side), *splits, classes))
        samples.append(listed)
    told = compare(*datasets)
    assert not told.same
    assert asdict(told).items() >= by_sets(*samples).items()
    assert told.recipe == {"classes": (["ant", "bee"], ["cat", "bee", "ant"])}
    for row in told.classes:
        assert (row["a"], row["b"]) == tuple(sum(s[2] == row["class"] for s in side) for side in samples)
    assert sum(row["only_a"] for row in told.classes) == told.only_a
    assert sum(row["only_b"] for row in told.classes) == told.only_b
    reverse = compare(*reversed(datasets))
    assert (reverse.only_a, reverse.only_b, reverse.to_train) == (told.only_b, told.only_a, told.to_held_out)


def test_the_same_dataset_is_said_to_be_the_same(original: Dataset, tmp_path: Path) -> None:
    train = noise(60), [i // 20 for i in range(60)]
    held_out = noise(9, seed=1), [0, 1, -1] * 3
    again = write_dataset(tmp_path / "again", train, held_out, CLASSES, resize="area")
    told = compare(original, again)
    assert told == Difference(True, {"resize": (None, "area")}, 0, 0, 69, (0, 0), 0, 0, 0, 0, [])
    cut = compare(original, write_dataset(tmp_path / "cut", train, held_out, CLASSES, shard_images=7))
    assert (cut.same, cut.only_a, cut.only_b, cut.both, cut.moved, cut.relabelled) == (False, 0, 0, 69, 0, 0)
    assert cut.recipe["shards"] == ({"train": 12, "held-out": 2}, {"train": 9, "held-out": 2})
    assert cut.recipe["shard_images"] == (5, 7)


def test_a_comparison_holds_32_bytes_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what one index and one piece take, whatever the number of images."""
    n, rows = 6000, 300
    monkeypatch.setattr("pipelines.data.diff._PIECE", rows)
    images, none = noise(n, size=2), [-1] * n
    one = write_dataset(tmp_path / "a", (images, none), (noise(1), [-1]), shard_images=rows)
    other = write_dataset(tmp_path / "b", (images[::-1], none), (noise(1), [-1]), shard_images=rows)
    first = compare(one, other)  # what is imported on the way is not the comparison's
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert compare(one, other) == first
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 32 * (2 * n + 2) + 1000 * rows  # Numpy's and Python's memory; an index itself is Arrow's


def ddpm_data(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "data", *words]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env=environment)


def test_info_and_diff_for_people_and_programs(original: Dataset, tmp_path: Path) -> None:
    done = ddpm_data("info", str(original.place), "--window", "2", "--batch", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert original.digest in done.stdout
    assert "raise data.window from 2" in done.stdout
    assert all(name in done.stdout for name in (*CLASSES, "held-out", "6 x 6 grey"))
    done = ddpm_data("diff", str(original.place), str(original.place), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["same"], told["recipe"], told["both"]) == (True, {}, 69)
    done = ddpm_data("info", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("ddpm: ")
    assert "nowhere: there is no such folder" in done.stderr


def test_a_preview_replaces_a_picture_with_a_word_and_nothing_else(original: Dataset, tmp_path: Path) -> None:
    done = ddpm_data("preview", str(original.place), "--n", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'preview.png'}\n"
    assert "replaced" not in done.stderr
    first = (tmp_path / "preview.png").read_bytes()
    assert first == inspect.preview(original, "train", 4)
    done = ddpm_data("preview", str(original.place), "--split", "held-out", "--json", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 9
    assert f"{tmp_path / 'preview.png'} was there, and is replaced" in done.stderr
    assert (tmp_path / "preview.png").read_bytes() == inspect.preview(original, "held-out", 9)
    (tmp_path / "notes.txt").write_text("precious")
    done = ddpm_data("preview", str(original.place), "--out", "notes.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "ddpm: --out notes.txt: there is a file that is no PNG; name another one"
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_verify_ends_with_one_where_there_is_damage_and_names_it(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", (noise(130), [-1] * 130), (noise(2, seed=1), [-1] * 2), shard_images=2)
    done = ddpm_data("verify", "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{dataset.place}: whole; 66 shards, 132 images, {done.stdout.split('images, ')[1]}"
    assert dataset.digest in done.stdout
    for file in sorted(dataset.place.path.glob("train-*.tar"))[:60]:
        file.unlink()
    done = ddpm_data("verify", "data", cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 51
    assert lines[0] == f"{dataset.place / 'train-000000.tar'}: is missing"
    assert lines[50] == "... and 10 more findings; --json has them all"
    assert done.stderr.splitlines()[-1].startswith(f"ddpm: failed: {dataset.place}: 60 findings")
    done = ddpm_data("verify", "data", "--json", cwd=tmp_path)
    assert done.returncode == 1
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["images"] == 12
    assert len(told["findings"]) == 60
    assert told["findings"][7] == {
        "file": str(Place.of(tmp_path) / "data" / "train-000007.tar"),
        "member": None,
        "what": "is missing",
    }


@pytest.mark.parametrize("counts", [{}, None, 3, {"samples": 5}, {"samples": 5, "shards": 1, "unlabelled": 0}])
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_card_that_does_not_count_the_images_is_named(tmp_path: Path, split: str, counts: object) -> None:
    dataset = write_dataset(tmp_path, (noise(8), [0] * 8), (noise(2), [0] * 2), ["a"])
    change_card(dataset.place, splits={**dataset.card["splits"], split: counts} if counts else {})
    with pytest.raises(DamageError, match=r"dataset\.json does not count the images of the split (train|held-out)"):
        inspect.info(Dataset.open(dataset.place))

"""Tars that are there become a dataset where they lie, locally or on S3; what cannot be is named by tar and member."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.cluster import Cluster
from pipelines.data.index import index
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset, read_index
from pipelines.data.reader import Reader
from pipelines.data.verify import verify
from pipelines.errors import UserError
from pipelines.store import DamageError, Place
from tests.data.data_helpers import noise_picture, png, write_tar
from tests.s3_faults import BUCKET, set_environment, stock_client

SETTINGS: dict[str, Any] = {"image_size": 12, "channels": 3}
N = 30


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def array_file(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def write_tars(root: Path, names: tuple[str, ...] = ("a.tar", "b.tar", "more/c.tar")) -> None:
    """N samples of several types and sizes, ten in each tar, with labels and other members."""
    for number, name in enumerate(names):
        files: dict[str, bytes] = {}
        for i in range(number * 10, number * 10 + 10):
            key = f"set.v1/{i:03d}"
            pixels = noise_picture(i, 10 + i % 7, 14)
            kind = ("png", "jpg", "npy")[i % 3]
            data = {"png": png, "jpg": jpeg, "npy": array_file}[kind](pixels)
            files[f"{key}.{kind}"] = data
            files[f"{key}.json"] = json.dumps({"label": i % 2, "class": ("cat", "dog")[i % 2], "note": "n"}).encode()
            files[f"{key}.txt"] = b"a caption"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(root / name, files)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    root = tmp_path / "tars"
    write_tars(root)
    return root


def images_of(dataset: Dataset) -> dict[bytes, tuple[str, int]]:
    """Pixels -> split and label."""
    found = {}
    for split in ("train", "held-out"):
        images, labels = Reader(dataset.split(split)).read_all()
        for image, label in zip(images, labels.tolist(), strict=True):
            found[image.tobytes()] = (split, label)
    return found


def files_of(place: Path) -> dict[str, bytes]:
    return {
        path.relative_to(place).as_posix(): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()
    }


def test_images_are_those_of_an_ingest_of_the_same_tars(tars: Path, tmp_path: Path) -> None:
    """Sizes, crops, splits and labels, but for arrays, which an ingest does not look for in tars."""
    before = files_of(tars)
    dataset = index(Place.of(tars), Place.of(tmp_path / "out"), **SETTINGS)
    assert files_of(tars) == before
    with pytest.warns(UserWarning, match="passed over in .*/tars: 40 files"):
        ingested = ingest(str(tars), Place.of(tmp_path / "ingested"), **SETTINGS)
    ours, theirs = images_of(dataset), images_of(ingested)
    assert len(ours) == N
    assert ours.items() >= theirs.items()
    assert len(theirs) == N - N // 3
    assert (dataset.classes, ingested.classes) == (("cat", "dog"), ("0", "1"))
    assert verify(dataset.place).findings == ()
    card = dataset.card
    train, labels = Reader(dataset.split("train")).read_all()
    assert card["splits"]["train"]["per_class"] == np.bincount(labels, minlength=2).tolist()
    assert card["mean"] == pytest.approx((train.mean((0, 1, 2)) / 255).tolist())
    assert card["std"] == pytest.approx((train.std((0, 1, 2)) / 255).tolist())
    assert Image.open(dataset.place.path / card["sheet"]).size[0] > 300


def test_keys_are_those_of_the_stock_library(tars: Path) -> None:
    dataset = index(Place.of(tars), **SETTINGS)
    ours: dict[str, set[str]] = {}
    for split in ("train", "held-out"):
        part = dataset.split(split)
        for shard in part.shards:
            ours.setdefault(shard.name, set()).update(read_index(part, shard)["key"].to_pylist())
    for name, keys in ours.items():
        stock = webdataset.WebDataset(str(tars / name), shardshuffle=False)
        assert {sample["__key__"] for sample in stock} == keys


def test_beside_the_tars_and_moved_with_them(tars: Path, tmp_path: Path) -> None:
    apart = index(Place.of(tars), Place.of(tmp_path / "apart"), **SETTINGS)
    beside = index(Place.of(tars), **SETTINGS)
    assert beside.place.path == tars
    assert beside.digest == apart.digest
    tars.rename(tmp_path / "moved")
    moved = Dataset.open(Place.of(tmp_path / "moved"))
    assert verify(moved.place).findings == ()
    assert len(images_of(moved)) == N
    with pytest.raises(DamageError, match=r"tars/.*\.tar is missing"):
        images_of(apart)


def test_a_split_in_the_names_of_the_tars_is_kept(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", ("train/0.tar", "train/1.tar", "val/0.tar"))
    dataset = index(Place.of(tmp_path / "tars"), **SETTINGS)
    assert {name: len(dataset.split(name)) for name in ("train", "held-out")} == {"train": 20, "held-out": 10}
    assert [shard.name for shard in dataset.split("held-out").shards] == ["val/0.tar"]
    with pytest.warns(UserWarning, match=r"data\.held_out: has no effect"):
        index(Place.of(tmp_path / "tars"), Place.of(tmp_path / "out"), held_out=0.5, **SETTINGS)


def test_a_stopped_indexing_goes_on_and_the_bytes_do_not_depend_on_workers(
    cluster: Cluster, tars: Path, tmp_path: Path
) -> None:
    alone = index(Place.of(tars), Place.of(tmp_path / "alone"), **SETTINGS)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    out = Place.of(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        index(Place.of(tars), out, progress=stop, **SETTINGS)
    with pytest.raises(UserError, match="no finished dataset"):
        Dataset.open(out)
    told: list[tuple[int, int]] = []

    def listen(done: int, total: int) -> None:
        told.append((done, total))

    index(Place.of(tars), out, cluster=cluster, workers=2, progress=listen, **SETTINGS)
    assert told == [(2, 3), (3, 3)]
    assert files_of(out.path) == files_of(alone.place.path)
    times = {file: file.stat().st_mtime_ns for file in out.path.rglob("*")}
    assert index(Place.of(tars), out, **SETTINGS).digest == alone.digest
    assert {file: file.stat().st_mtime_ns for file in out.path.rglob("*")} == times
    with pytest.raises(UserError, match=r"a dataset (of|with) other .* is here; give --out"):
        index(Place.of(tars), out, **{**SETTINGS, "channels": 1})


def test_tars_on_s3_are_indexed_and_read_there(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: int
) -> None:
    set_environment(monkeypatch, f"http://127.0.0.1:{server}")
    local = index(Place.of(tars), Place.of(tmp_path / "local"), **SETTINGS)
    for path in tars.rglob("*.tar"):
        stock_client(server).upload_file(str(path), BUCKET, f"sets/one/{path.relative_to(tars).as_posix()}")
    place = Place.of(f"s3://{BUCKET}/sets/one")
    apart = index(place, Place.of(tmp_path / "apart"), **SETTINGS)
    beside = index(place, **SETTINGS)
    assert apart.digest == beside.digest == local.digest
    assert images_of(apart) == images_of(beside) == images_of(local)
    assert verify(beside.place).findings == verify(apart.place).findings == ()
    assert str(beside.place) == f"s3://{BUCKET}/sets/one"
    assert beside.place.find("json") == ["dataset.json", "ingest.json"]  # no record of the work is left


def test_tars_that_came_went_or_changed_are_seen(tars: Path) -> None:
    first = index(Place.of(tars), **SETTINGS)
    write_tar(tars / "d.tar", {"9.png": png(noise_picture(99))})
    with pytest.raises(UserError, match=r"d\.tar is not as it was .*; delete its dataset\.json to index anew"):
        index(Place.of(tars), **SETTINGS)
    (tars / "dataset.json").unlink()
    second = index(Place.of(tars), **SETTINGS)
    assert len(images_of(second)) == N + 1
    (tars / "d.tar").unlink()
    with pytest.raises(UserError, match=r"d\.tar is not as it was"):
        index(Place.of(tars), **SETTINGS)
    (tars / "dataset.json").unlink()
    assert index(Place.of(tars), **SETTINGS).digest == first.digest
    assert list((tars / "index").glob("d.*")) == []
    write_tar(tars / "notes.tar", {"a.txt": b"no picture"})
    (tars / "dataset.json").unlink()
    with pytest.warns(UserWarning, match=r"without a picture: 1 tar, notes\.tar for one"):
        third = index(Place.of(tars), **SETTINGS)
    assert index(Place.of(tars), **SETTINGS).digest == third.digest == first.digest


def test_labels_that_changed_are_seen_though_no_size_did(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    tar = tmp_path / "tars" / "a.tar"
    write_tar(tar, {**GOOD, **{f"{i}.cls": b"0" for i in range(4)}})
    size = tar.stat().st_size
    index(Place.of(tmp_path / "tars"), held_out=0.0, **SETTINGS)
    write_tar(tar, {**GOOD, **{f"{i}.cls": b"1" for i in range(4)}})
    assert tar.stat().st_size == size
    with pytest.raises(UserError, match=r"a\.tar is not as it was"):
        index(Place.of(tmp_path / "tars"), held_out=0.0, **SETTINGS)


@pytest.mark.parametrize(
    ("notes", "unread"),
    [
        ({"0.cls": b"cat", "1.json": b'{"label": "dog"}', "2.cls": b"1"}, 2),
        ({"0.cls": b"cat", "0.json": b'{"label": 1}', "1.json": b'{"caption": "a dog"}', "2.json": b"{}"}, 0),
    ],
)
def test_labels_that_are_no_numbers_are_told(notes: dict[str, bytes], unread: int, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {**GOOD, **notes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = index(Place.of(tmp_path / "tars"), held_out=0.0, **SETTINGS)
    said = [str(warning.message) for warning in caught if "not read as labels" in str(warning.message)]
    assert [f": {unread} .cls or .json file" in text for text in said] == ([True] if unread else [])
    assert dataset.card["splits"]["train"]["unlabelled"] == 3


GOOD = {f"{i}.png": png(noise_picture(i)) for i in range(4)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**GOOD, "x.png": b"broken"}, r"a\.tar: member x\.png cannot be decoded"),
        ({**GOOD, "x.npy": array_file(np.zeros((4, 4)))}, r"a\.tar: member x\.npy cannot be decoded: it is float64"),
        ({**GOOD, "x.npy": b"\x80\x04pickled"}, r"a\.tar: member x\.npy cannot be decoded"),
        ({**GOOD, "0.jpg": jpeg(noise_picture(0))}, r"a\.tar: member 0\.jpg is a second picture of 0"),
        ({**GOOD, "0.cls": b"-7"}, r"a\.tar: member 0\.cls has the label -7, which is not from 0"),
        (
            {**GOOD, "0.json": b'{"label": 1, "class": "a"}', "1.json": b'{"label": 1, "class": "b"}'},
            "has a label 1 called b here, a before",
        ),
        ({"0.txt": b"no picture", "1.seg.png": png(noise_picture(1))}, "no picture to train on in 1 tar;"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", files)
    with pytest.raises(UserError, match=message) as error:
        index(Place.of(tmp_path / "tars"), Place.of(tmp_path / "out"), held_out=0.0, **SETTINGS)
    assert str(error.value).isprintable()
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_damaged_and_missing_tars_and_foreign_folders_are_named(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no \.tar below"):
        index(Place.of(tmp_path / "nowhere"), **SETTINGS)
    whole = (tars / "a.tar").read_bytes()
    (tars / "a.tar").write_bytes(whole[:1500] + b"\xff" * 512 + whole[2012:])
    with pytest.raises(UserError, match=r"a\.tar: "):
        index(Place.of(tars), Place.of(tmp_path / "out"), **SETTINGS)
    (tars / "a.tar").write_bytes(whole)
    (tars / "card.md").write_text("precious")
    with pytest.raises(UserError, match=r"card\.md is there and not from an unfinished work"):
        index(Place.of(tars), **SETTINGS)
    assert (tars / "card.md").read_text() == "precious"


def test_copies_and_missing_labels_are_told(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    files = {**GOOD, "copy.png": GOOD["2.png"], "0.cls": b"1"}
    write_tar(tmp_path / "tars" / "a.tar", files)
    with pytest.warns(UserWarning, match="exact copies of other images: 1"):
        dataset = index(Place.of(tmp_path / "tars"), held_out=0.0, **SETTINGS)
    assert dataset.card["splits"]["train"] == {"samples": 5, "shards": 1, "per_class": [0, 1], "unlabelled": 4}
    assert dataset.card["duplicates"]["copies"] == 1
    assert verify(dataset.place).findings == ()

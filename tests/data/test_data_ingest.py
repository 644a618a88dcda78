"""What ingest leaves on disk: standard shards, the same bytes every time, or nothing that looks done."""

import hashlib
import io
import json
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.data.recipe import is_held_out
from pipelines.data.shards import encode_png
from pipelines.data.sources import open_source
from pipelines.errors import UserError
from pipelines.store import DamageError, Place
from tests.data.data_helpers import Ingest, draw_pictures, noise_picture, png, write_tar


def files_of(place: Place) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(place.path.iterdir())}


def test_the_card_counts_the_digits(digits: Dataset) -> None:
    card = digits.card
    assert digits.classes == tuple("0123456789")
    assert (digits.image_size, digits.channels) == (8, 1)
    train, held_out = digits.split("train"), digits.split("held-out")
    assert len(train) + len(held_out) == 1797
    assert 0.17 < len(held_out) / 1797 < 0.23
    assert train.shard_sizes == (300,) * (len(train) // 300) + (len(train) % 300,)
    images, labels = Reader(train).read_all()
    assert card["splits"]["train"]["per_class"] == np.bincount(labels).tolist()
    assert card["mean"] == pytest.approx([images.mean() / 255])
    assert card["std"] == pytest.approx([images.std() / 255])
    assert Image.open(digits.place.path / card["sheet"]).size[0] > 300


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_the_stock_library_reads_the_shards(digits: Dataset, split: str) -> None:
    images, labels = Reader(digits.split(split)).read_all()
    urls = [str(digits.place / shard.name) for shard in digits.split(split).shards]
    stock = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "json", "__key__")
    keys = set()
    for (picture, note, key), image, label in zip(stock, images, labels, strict=True):
        assert (np.asarray(picture) == image).all()  # the stock decoder makes RGB of grey
        assert note["label"] == label == int(note["class"])
        keys.add(key)
    assert len(keys) == len(images)


def test_shards_carry_no_time_owner_or_surprise(digits: Dataset) -> None:
    shard = digits.split("train").shards[0]
    with tarfile.open(digits.place.path / shard.name) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert {m.name.split(".")[1] for m in members} == {"png", "json"}
    data = (digits.place / shard.name).read()
    assert (len(data), hashlib.sha256(data).digest()) == (shard.bytes, shard.sha256)


def test_the_digest_is_what_its_docstring_says(digits: Dataset) -> None:
    """Recomputed from the tars alone."""
    sizes, samples = b"ddpm-dataset-1\n", b""
    for split in ("train", "held-out"):
        tars = sorted(digits.place.path.glob(f"{split}-*.tar"))
        counts = []
        for file in tars:
            with tarfile.open(file) as tar:
                content = {member.name: tar.extractfile(member).read() for member in tar}
            keys = [name[:-4] for name in content if name.endswith(".png")]
            counts.append(len(keys))
            for key in keys:
                pixels = np.asarray(Image.open(io.BytesIO(content[f"{key}.png"])))
                samples += hashlib.sha256(struct.pack("<3I", *pixels.shape, 1) + pixels.tobytes()).digest()
                samples += struct.pack("<q", json.loads(content[f"{key}.json"])["label"])
        sizes += f"{split}\n".encode() + b"".join(n.to_bytes(8, "little") for n in [len(tars), *counts])
    assert hashlib.sha256(sizes + samples).hexdigest() == digits.digest


def test_the_digest_follows_pixels_labels_and_shards(pictures: Path, make: Ingest) -> None:
    one = make(pictures, "one").digest
    assert make(pictures, "cut", shard_images=9).digest != one
    (pictures / "dog" / "001.png").rename(pictures / "cat" / "001.png")  # sorted to where it was, with another label
    assert make(pictures, "label").digest != one
    (pictures / "cat" / "001.png").rename(pictures / "dog" / "001.png")
    assert make(pictures, "again").digest == one
    picture = np.asarray(Image.open(pictures / "dog" / "001.png")).copy()
    picture[3, 4, 1] ^= 1
    Image.fromarray(picture).save(pictures / "dog" / "001.png")
    assert make(pictures, "pixel").digest != one


def test_ingest_twice_is_byte_identical(pictures: Path, make: Ingest) -> None:
    one, two = make(pictures, "one"), make(pictures, "two")
    assert files_of(one.place) == files_of(two.place)
    assert len(one.split("train").shards) > 2
    for picture in pictures.rglob("*.png"):
        picture.touch()
    assert files_of(make(pictures, "three").place) == files_of(one.place)


def test_colour_folder_keeps_its_pixels(pictures: Path, make: Ingest) -> None:
    dataset = make(pictures)
    source = open_source(str(pictures))
    titles = {source.title(i): noise_picture(int(source.title(i)[4:7])) for i in range(40)}
    found = 0
    for split in ("train", "held-out"):
        images, labels = Reader(dataset.split(split)).read_all()
        urls = [str(dataset.place / shard.name) for shard in dataset.split(split).shards]
        notes = [json.loads(note) for (note,) in webdataset.WebDataset(urls, shardshuffle=False).to_tuple("json")]
        for image, label, note in zip(images, labels, notes, strict=True):
            assert np.array_equal(image, titles[note["source"]])
            assert dataset.classes[label] == note["class"] == note["source"][:3]
            found += 1
    assert found == 40


def test_held_out_is_stable_when_images_are_added(pictures: Path, make: Ingest) -> None:
    def side(dataset: Dataset, split: str) -> set[bytes]:
        return {image.tobytes() for image in Reader(dataset.split(split)).read_all()[0]}

    before = make(pictures, "before")
    draw_pictures(pictures, range(40, 60))
    for copy in ("a.png", "b.png"):  # the same content under other names goes to the same side
        (pictures / copy).write_bytes((pictures / "cat" / "000.png").read_bytes())
    after = make(pictures, "after")
    for split in ("train", "held-out"):
        assert side(before, split) < side(after, split)
    assert not side(after, "train") & side(after, "held-out")


def test_held_out_share_is_met() -> None:
    contents = [hashlib.sha256(str(i).encode()).digest() for i in range(10_000)]
    for share in (0.01, 0.2, 0.9):
        assert sum(is_held_out(c, share) for c in contents) / 10_000 == pytest.approx(share, abs=0.02)
    # A larger share keeps what a smaller one held out.
    assert all(is_held_out(c, 0.3) for c in contents if is_held_out(c, 0.2))


def test_a_killed_ingest_leaves_no_dataset(pictures: Path, tmp_path: Path, make: Ingest) -> None:
    code = f"""
import os, signal
from pipelines.data.ingest import ingest
from pipelines.store import Place
def kill(done, total):
    if done > 55:  # 40 scanned, one shard of 8 written, then another
        os.kill(os.getpid(), signal.SIGKILL)
ingest({str(pictures)!r}, Place.of({str(tmp_path / "killed")!r}),
       image_size=12, channels=3, held_out=0.3, shard_images=8, progress=kill)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    place = Place.of(tmp_path / "killed")
    assert "train-000000.tar" in place.list()
    assert "dataset.json" not in place.list()
    with pytest.raises(UserError, match="no finished dataset here"):
        Dataset.open(place)
    # Started again it ends as if nothing had happened.
    assert files_of(make(pictures, "killed").place) == files_of(make(pictures, "undisturbed").place)


def test_shards_of_an_unfinished_other_dataset_are_cleared(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", shard_images=2, progress=stop)
    left = len(list((tmp_path / "out").glob("*.tar")))
    dataset = make(pictures, "out", shard_images=30)
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(dataset.table) < left


def test_finished_datasets_and_foreign_shards_are_not_overwritten(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    dataset = make(pictures)
    before = {file: file.stat().st_mtime_ns for file in dataset.place.path.iterdir()}
    assert make(pictures).digest == dataset.digest
    assert {file: file.stat().st_mtime_ns for file in dataset.place.path.iterdir()} == before
    with pytest.raises(UserError, match=r"another dataset is here .*; name another folder"):
        make(pictures, shard_images=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"train-000000\.tar is there and not from"):
        make(pictures, "mine")
    assert files_of(Place.of(tmp_path / "mine")) == {"train-000000.tar": b"precious"}


def test_a_bad_image_stops_all_before_anything_is_written(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    (pictures / "dog" / "zz.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(UserError, match=r"dog/zz\.jpg: cannot be read as an image"):
        make(pictures)
    assert not (tmp_path / "dataset").exists()


def test_an_image_that_changes_during_the_ingest_is_named(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    def change(done: int, total: int) -> None:
        if done == 40:  # all scanned, none written
            Image.fromarray(noise_picture(999)).save(pictures / "dog" / "001.png")

    with pytest.raises(UserError, match=r"dog/001\.png changed during the ingest"):
        make(pictures, progress=change)
    assert not (tmp_path / "dataset" / "dataset.json").exists()


def test_progress_counts_every_image_twice(pictures: Path, make: Ingest) -> None:
    calls: list[tuple[int, int]] = []
    make(pictures, progress=lambda done, total: calls.append((done, total)))
    assert {total for _, total in calls} == {80}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 80)
    assert 40 in done  # all scanned, none written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, r"data\.image_size: 0 "),
        ({"channels": 2}, r"data\.channels: 2 is neither 1 \(grey\) nor 3"),
        ({"held_out": 1.0}, r"data\.held_out: 1\.0 "),
        ({"shard_images": 0}, r"data\.shard_images: 0 "),
        ({"held_out": 1e-9}, r"data\.held_out: .* none of the 40 images falls to held-out"),
        ({"held_out": 1 - 1e-9}, r"data\.held_out: .* none of the 40 images falls to train"),
    ],
)
def test_bad_recipes_are_named(
    pictures: Path, make: Ingest, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(pictures, **changes)
    assert not (tmp_path / "dataset").exists()


def test_a_place_that_cannot_be_written_is_named(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"storage .*/file/out: cannot write there"):
        make(pictures, "file/out")


def test_a_dataset_inside_its_source_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lies inside data\.source"):
        ingest(str(pictures), Place.of(pictures / "out"), image_size=4, channels=1, held_out=0.5, shard_images=5)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": png(noise_picture(0))})
    with pytest.raises(UserError, match=r"lies inside data\.source"):
        ingest(str(tmp_path / "tars"), Place.of(tmp_path / "tars" / "deep" / "out"), image_size=4, channels=1)
    # Beside a single file there is room.
    source = str(tmp_path / "tars" / "a.tar")
    assert len(ingest(source, Place.of(tmp_path / "tars" / "out"), image_size=4, channels=1, held_out=0.0).table) == 1


def test_a_dataset_is_not_ingested_anew(pictures: Path, make: Ingest) -> None:
    dataset = make(pictures)
    with pytest.raises(UserError, match="is a dataset already"), pytest.warns(UserWarning, match="passed over"):
        make(dataset.place, "another")


def test_small_pictures_are_stored_unfiltered_and_any_reader_takes_them(tmp_path: Path) -> None:
    for side, channels, filtered in ((28, 1, False), (26, 3, False), (27, 3, True), (64, 1, True)):
        ramp = np.add.outer(np.arange(side), np.arange(side))[..., None].repeat(channels, 2).astype(np.uint8)
        data = encode_png(ramp)
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image).reshape(ramp.shape), ramp)
        length = int.from_bytes(data[33:37], "big")
        rows = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(side, -1)
        assert bool(rows[:, 0].any()) == filtered


def test_unknown_formats_and_damaged_manifests_are_named(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    place = make(pictures).place
    card = json.loads((place / "dataset.json").read())

    def rewrite(**changes: object) -> None:
        (place / "dataset.json").write_json({**card, **changes})

    rewrite(format=99)
    with pytest.raises(UserError, match=r"dataset\.json: dataset format 99 is not known here"):
        Dataset.open(place)
    (place / "dataset.json").write(b"{")
    with pytest.raises(DamageError, match=r"dataset\.json is not JSON"):
        Dataset.open(place)
    (place / "dataset.json").write_json({"format": 2})
    with pytest.raises(DamageError, match=r"dataset\.json lacks digest"):
        Dataset.open(place)
    rewrite()
    table = (place / "shards.parquet").read()
    (place / "shards.parquet").write(table[:-1])
    with pytest.raises(DamageError, match=r"shards\.parquet does not match"):
        Dataset.open(place)
    (place / "shards.parquet").path.unlink()
    with pytest.raises(DamageError, match=r"shards\.parquet is missing"):
        Dataset.open(place)
    with pytest.raises(UserError, match="there is no such folder"):
        Dataset.open(Place.of(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no finished dataset"):
        Dataset.open(Place.of(tmp_path))


def test_a_shard_name_cannot_lead_out_of_the_folder(pictures: Path, make: Ingest) -> None:
    import pyarrow as pa

    from pipelines.data.manifest import SHARD_COLUMNS, write_table

    dataset = make(pictures)
    table: pa.Table = dataset.table
    for name in ("../evil.tar", "/etc/passwd", "pipe:evil/x", "a/../../b.tar", "a\\b.tar", ""):
        names = [name, *table["name"].to_pylist()[1:]]
        data = write_table(SHARD_COLUMNS, {**table.to_pydict(), "name": names})
        (dataset.place / "shards.parquet").write(data)
        sha = hashlib.sha256(data).hexdigest()
        (dataset.place / "dataset.json").write_json({**dataset.card, "shards_sha256": sha})
        with pytest.raises(DamageError, match="outside its folder"):
            Dataset.open(dataset.place)

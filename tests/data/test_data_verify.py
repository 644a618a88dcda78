"""Verification names all damage: each kind alone, and many at once."""

import hashlib
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.check import ShardCheck
from pipelines.data.manifest import Dataset, Shard, content_hash
from pipelines.data.shards import encode_png
from pipelines.data.verify import Verification, verify
from pipelines.errors import UserError
from pipelines.progress import Progress
from pipelines.store import Place
from tests.data.dataset_helpers import (
    change_card,
    change_index,
    change_table,
    findings,
    flip,
    noise,
    patch,
    read_rows,
    write_dataset,
)

TRAIN, HELD_OUT = 17, 7
TAR, INDEX = "train-000001.tar", "train-000001.parquet"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train = noise(TRAIN), [i % 3 - 1 for i in range(TRAIN)]  # every third has no label
    return write_dataset(
        tmp_path_factory.mktemp("verify") / "data", train, (noise(HELD_OUT, seed=1), [0] * HELD_OUT), ("a", "b")
    )


@pytest.fixture
def place(original: Dataset, tmp_path: Path) -> Place:
    """A copy that may be damaged."""
    shutil.copytree(original.place.path, tmp_path / "data")
    return Place.of(tmp_path / "data")


def header_of(place: Place, name: str, tar: str = TAR) -> tarfile.TarInfo:
    with tarfile.open(place.path / tar) as opened:
        return opened.getmember(name)


def test_a_whole_dataset_has_no_findings_and_is_read_to_the_last_byte(original: Dataset) -> None:
    seen: list[tuple[int, int, str]] = []

    class Listener(Progress):
        def advance(self, done: int, total: int, unit: str, rate: float | None = None, **figures: float) -> None:
            seen.append((done, total, unit))

    result = verify(original.place, progress=Listener())
    tars = sum(file.stat().st_size for file in original.place.path.glob("*.tar"))
    assert result == Verification(str(original.place), original.digest, 6, TRAIN + HELD_OUT, tars, ())
    assert seen == [(done, 24, "images") for done in (5, 10, 15, 17, 22, 24)]


@pytest.mark.parametrize("channels", [1, 3])
def test_whole_datasets_of_both_kinds(tmp_path: Path, channels: int) -> None:
    without = noise(3, channels=channels), [-1] * 3
    write_dataset(tmp_path / "data", without, (noise(0, channels=channels), []))
    assert findings(Place.of(tmp_path / "data")) == []


def test_missing_cut_and_longer_shards(place: Place) -> None:
    (place.path / "train-000000.tar").unlink()
    whole = (place.path / TAR).stat().st_size
    rows = read_rows(place, INDEX)
    os.truncate(place.path / TAR, rows[3]["offset"] + 10)
    with open(place.path / "train-000002.tar", "ab") as file:
        file.write(b"more")
    longer = (place.path / "train-000002.tar").stat().st_size
    assert findings(place) == [
        "train-000000.tar: is missing",
        f"{TAR}: is cut short: it has {rows[3]['offset'] + 10:,} bytes, shards.parquet says {whole:,}",
        f"{TAR}: member {rows[3]['member']} is cut short: the file ends before it",
        f"{TAR}: member {rows[4]['member']} is cut short: the file ends before it",
        f"train-000002.tar: is longer than it was: it has {longer:,} bytes, shards.parquet says {longer - 4:,}",
    ]


@pytest.mark.parametrize("left", [0, 1, 511, 512, 700])
def test_shards_cut_anywhere_are_one_finding_and_one_for_each_image(place: Place, left: int) -> None:
    os.truncate(place.path / TAR, left)
    found = findings(place)
    assert found[0].startswith(f"{TAR}: is cut short: it has {left} bytes")
    assert found[1:] == [
        f"{TAR}: member {r['member']} is cut short: the file ends before it" for r in read_rows(place, INDEX)
    ]


def test_every_flipped_byte_of_an_image_is_found(place: Place) -> None:
    row = read_rows(place, INDEX)[2]
    for at in (row["offset"], row["offset"] + row["size"] // 2, row["offset"] + row["size"] - 1):
        flip(place.path / TAR, at)
        assert findings(place) == [
            f"{TAR}: member {row['member']} does not match the sha256 in the index",
            f"{TAR}: does not match its sha256 in shards.parquet; damaged: 1 image of {INDEX}",
        ]
        flip(place.path / TAR, at)
    assert findings(place) == []


def test_damage_between_the_images_is_found(place: Place) -> None:
    rows = read_rows(place, INDEX)
    file, whole = place.path / TAR, (place.path / TAR).read_bytes()
    between = f"does not match its sha256 in shards.parquet; no damage to the images of {INDEX}"
    flip(file, rows[0]["offset"] + rows[0]["size"])  # the padding of a block
    assert findings(place) == [f"{TAR}: {between}"]
    file.write_bytes(whole)
    flip(file, rows[2]["offset"] - 512 + 3)  # a letter of a name
    header = f"has a header at byte {rows[2]['offset'] - 512:,} that cannot be read (bad checksum)"
    assert findings(place) == [f"{TAR}: member {rows[2]['member']} {header}", f"{TAR}: {between}"]
    file.write_bytes(whole)
    note = header_of(place, f"{rows[1]['key']}.json")
    patch(file, note.offset_data, b"{broken ")
    found = findings(place)
    assert found[0].startswith(f"{TAR}: member {rows[1]['key']}.json cannot be read: ")
    assert found[1:] == [f"{TAR}: {between}"]
    file.write_bytes(whole)
    patch(file, rows[4]["offset"] - 512, bytes(512))
    header = f"has a header at byte {rows[4]['offset']:,} that cannot be read (bad checksum)"
    assert findings(place) == [f"{TAR}: member {rows[4]['member']} {header}", f"{TAR}: {between}"]


def test_missing_and_damaged_indices_do_not_hide_damaged_images(place: Place) -> None:
    row = read_rows(place, INDEX)[1]
    flip(place.path / INDEX, 100)
    (place.path / "held-out-000001.parquet").unlink()
    patch(place.path / TAR, row["offset"], b"XXXX")
    found = findings(place)
    assert found[0] == f"{INDEX}: does not match its sha256 in shards.parquet"
    assert found[1].startswith(f"{TAR}: member {row['member']} cannot be decoded: ")
    assert found[2] == f"{TAR}: does not match its sha256 in shards.parquet; damaged: 1 image of {INDEX}"
    assert found[3] == "held-out-000001.parquet: is missing"
    assert len(found) == 4


DISAGREEING: list[tuple[dict[str, Any], str]] = [
    ({"member": "evil.png"}, "is in the index, but its name is not in the tar"),
    ({"key": "another"}, "has the key 'another' in the index"),
    ({"label": 2}, "has the label 2 in the index, where there are 2 classes"),
    ({"label": -2}, "has the label -2 in the index, where there are 2 classes"),
    ({"label": 1}, "has the label 1 in the index, 0 in its json"),
    ({"label": -1}, "has the label -1 in the index, 0 in its json"),
    ({"content": bytes(32)}, "has other pixels than the content hash in the index"),
    ({"sha256": bytes(32)}, "does not match the sha256 in the index"),
]


@pytest.mark.parametrize(("changes", "message"), DISAGREEING)
def test_indices_that_disagree_with_the_tar_are_found(place: Place, changes: dict[str, Any], message: str) -> None:
    """Even where every sha256 above them fits."""
    number = 2
    assert read_rows(place, INDEX)[number]["label"] == 0
    change_index(place, INDEX, lambda rows: rows[number].update(changes))
    found = findings(place)
    assert any(line.startswith(f"{TAR}: member ") and line.endswith(message) for line in found), found
    others = [line for line in found if not line.startswith((f"{TAR}: member", "dataset.json: "))]
    assert others == []


@pytest.mark.parametrize("changes", [{"offset": 7}, {"offset": 2**40}, {"offset": -1}, {"size": -1}, {"size": 2**40}])
def test_places_that_disagree_with_the_tar_are_found_and_the_image_is_looked_at(
    place: Place, changes: dict[str, int]
) -> None:
    row = read_rows(place, INDEX)[3]
    change_index(place, INDEX, lambda rows: rows[3].update(changes))
    listed = {**row, **changes}
    assert findings(place) == [
        f"{TAR}: member {row['member']} has {row['size']:,} bytes at {row['offset']:,} in the tar, "
        f"{listed['size']:,} bytes at {listed['offset']:,} in the index"
    ]


def test_rows_that_are_twice_or_absent(place: Place) -> None:
    rows = read_rows(place, INDEX)

    def change(rows: list[dict[str, Any]]) -> None:
        rows[4] = dict(rows[3])

    change_index(place, INDEX, change)
    found = findings(place)
    assert f"{TAR}: member {rows[3]['member']} is in the index twice" in found
    assert f"{TAR}: member {rows[4]['member']} is in the tar, but not in the index" in found
    change_index(place, INDEX, lambda rows: rows.pop())
    found = findings(place)
    assert f"{INDEX}: has 4 samples, shards.parquet says 5" in found
    assert f"{TAR}: member {rows[4]['member']} is in the tar, but not in the index" in found


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (encode_png(np.zeros((7, 6, 1), np.uint8)), "it is L 6 x 7"),
        (encode_png(np.zeros((6, 6, 3), np.uint8)), "it is RGB 6 x 6"),
        (b"GIF89a" + b"\0" * 100, "cannot be decoded"),
        (encode_png(noise(1)[0])[:60], "cannot be decoded"),
    ],
)
def test_pictures_that_are_none_or_another_are_found(place: Place, picture: bytes, message: str) -> None:
    row = read_rows(place, INDEX)[2]
    assert len(picture) <= -(-row["size"] // 512) * 512
    patch(place.path / TAR, row["offset"], picture)
    header = header_of(place, row["member"])
    header.size = len(picture)
    patch(place.path / TAR, row["offset"] - 512, header.tobuf(tarfile.USTAR_FORMAT))
    fields = {"size": len(picture), "sha256": hashlib.sha256(picture).digest()}
    change_index(place, INDEX, lambda rows: rows[2].update(fields))
    (found,) = findings(place)
    assert found.startswith(f"{TAR}: member {row['member']} cannot be decoded: ")
    assert message in found


def test_the_digest_and_the_counts_are_made_anew(place: Place) -> None:
    change_card(place, digest="0" * 64)
    (found,) = findings(place)
    assert found.startswith(f"dataset.json: has the digest {'0' * 64}, the images as they are have ")
    card = json.loads((place.path / "dataset.json").read_text())
    counts = {**card["splits"]["train"], "samples": 18, "per_class": [9, 9], "shards": 5}
    change_card(place, splits={"train": counts}, mean=[0.1], std="none")
    text = "\n".join(findings(place))
    for words in ("18 samples of train", "5 shards of train", "[9, 9] per_class of train", "None samples of held-out"):
        assert f"dataset.json: says {words}" in text
    assert "dataset.json: says mean [0.1], the training images have [0." in text
    assert "dataset.json: says std none" in text


def test_an_image_put_in_place_of_another_changes_the_digest(place: Place) -> None:
    """Everything but the digest is made to fit it."""
    row, other = read_rows(place, INDEX)[0], noise(1, seed=5)[0]
    picture = encode_png(other)
    patch(place.path / TAR, row["offset"], picture)
    header = header_of(place, row["member"])
    header.size = len(picture)
    patch(place.path / TAR, row["offset"] - 512, header.tobuf(tarfile.USTAR_FORMAT))
    fields = {"size": len(picture), "sha256": hashlib.sha256(picture).digest(), "content": content_hash(other)}
    change_index(place, INDEX, lambda rows: rows[0].update(fields))
    found = findings(place)
    assert [line.split(",")[0].split(" [")[0].split(" 0.")[0] for line in found] == [
        "dataset.json: says mean",
        "dataset.json: says std",
        f"dataset.json: has the digest {Dataset.open(place).digest}",
    ]


def test_the_table_of_shards_is_checked_in_itself_and_against_the_folder(place: Place) -> None:
    shutil.copy(place.path / TAR, place.path / "train-000009.tar")
    columns = pq.read_table(place.path / "shards.parquet").to_pydict()
    columns["index"][1] = columns["index"][0]
    columns["split"][2] = "test"
    change_table(place, columns)
    found = "\n".join(findings(place))
    assert "shards.parquet: names an index for two shards" in found
    assert "shards.parquet: has shards of a split 'test', there are only train, held-out" in found
    assert "train-000009.tar: is not in shards.parquet" in found
    assert f"{INDEX}: is not in shards.parquet" in found


def test_what_hinders_the_opening_is_the_only_finding(place: Place, tmp_path: Path) -> None:
    table = (place.path / "shards.parquet").read_bytes()
    flip(place.path / "shards.parquet", 50)
    (found,) = findings(place)
    assert found.startswith("shards.parquet: does not match the sha256 in dataset.json; nothing else")
    (place.path / "shards.parquet").write_bytes(table)
    change_card(place, image_size="large", channels=2, classes="ab")
    assert [line.split(",")[0] for line in findings(place)] == [
        "dataset.json: says image_size 'large'",
        "dataset.json: says channels 2",
        "dataset.json: has classes that are not a list of names",
    ]
    (place.path / "dataset.json").write_text("{")
    (found,) = findings(place)
    assert found.startswith("dataset.json: is not JSON: ")
    with pytest.raises(UserError, match="there is no such folder"):
        verify(Place.of(tmp_path / "nowhere"))


def test_many_kinds_at_once_are_all_named(place: Place) -> None:
    first, second = read_rows(place, "train-000000.parquet"), read_rows(place, INDEX)
    flip(place.path / "train-000000.tar", first[0]["offset"] + 5)
    flip(place.path / "train-000000.tar", first[4]["offset"] + 5)
    flip(place.path / TAR, second[1]["offset"] + 5)
    (place.path / "train-000002.parquet").unlink()
    (place.path / "held-out-000000.tar").unlink()
    change_card(place, digest="f" * 64)  # not told: an image is missing anyway
    found = findings(place)
    assert [line.split(" does")[0].split(" is missing")[0] for line in found] == [
        f"train-000000.tar: member {first[0]['member']}",
        f"train-000000.tar: member {first[4]['member']}",
        "train-000000.tar:",
        f"{TAR}: member {second[1]['member']}",
        f"{TAR}:",
        "train-000002.parquet:",
        "held-out-000000.tar:",
    ]
    assert found[2].endswith("damaged: 2 images of train-000000.parquet")


def test_shards_may_be_looked_at_anywhere_in_any_order(place: Place) -> None:
    row = read_rows(place, INDEX)[1]
    flip(place.path / TAR, row["offset"] + 5)

    def elsewhere(work: Callable[[Shard], ShardCheck], shards: Sequence[Shard]) -> Iterator[tuple[int, ShardCheck]]:
        """As other processes would, the last first."""
        for number in reversed(range(len(shards))):
            their_work, shard = pickle.loads(pickle.dumps((work, shards[number])))
            yield number, pickle.loads(pickle.dumps(their_work(shard)))

    assert verify(place, map_shards=elsewhere) == verify(place)
    flip(place.path / TAR, row["offset"] + 5)
    assert verify(place, map_shards=elsewhere).findings == ()

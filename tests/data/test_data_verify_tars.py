"""Verification of tars that others packed: elsewhere, shared by both splits, with long names, or hostile."""

import hashlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.damage import Damage
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.data.verify import verify
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
    reseal,
    write_dataset,
)

TAR, INDEX = "train-000001.tar", "train-000001.parquet"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train, held_out = (noise(17), [i % 3 - 1 for i in range(17)]), (noise(7, seed=1), [0] * 7)
    return write_dataset(tmp_path_factory.mktemp("verify") / "data", train, held_out, ("a", "b"))


@pytest.fixture
def place(original: Dataset, tmp_path: Path) -> Place:
    """A copy that may be damaged."""
    shutil.copytree(original.place.path, tmp_path / "data")
    return Place.of(tmp_path / "data")


def test_tars_that_lie_elsewhere_and_hold_both_splits(original: Dataset, place: Place, tmp_path: Path) -> None:
    """One tar with the images of two: two rows of the table, each with an index of its own."""
    elsewhere = Place.of(tmp_path / "tars")
    data = (original.place / "train-000003.tar").read(), (original.place / "held-out-000001.tar").read()
    (elsewhere / "sub/both.tar").write(data[0] + data[1])  # a tar joined to another, with zeros between
    shift = len(data[0])
    change_index(place, "held-out-000001.parquet", lambda rows: [r.update(offset=r["offset"] + shift) for r in rows])
    columns = pq.read_table(place.path / "shards.parquet").to_pydict()
    for file in place.path.glob("*.tar"):
        shutil.move(file, elsewhere.path / file.name)
    both = (elsewhere / "sub/both.tar").read()
    for row, name in enumerate(columns["name"]):
        if name in ("train-000003.tar", "held-out-000001.tar"):
            columns["name"][row], columns["bytes"][row] = "sub/both.tar", len(both)
            columns["sha256"][row] = hashlib.sha256(both).digest()
    change_table(place, columns)
    change_card(place, tars=str(elsewhere))
    assert findings(place) == []
    flip(elsewhere.path / "sub" / "both.tar", len(both) - 1)
    found = [str(finding).removeprefix(f"{elsewhere}/") for finding in verify(place).findings]
    assert len(found) == 3
    assert found[0].startswith("sub/both.tar: has a header at byte")  # of the tar as a whole: told once
    for index, line in zip(("train-000003.parquet", "held-out-000001.parquet"), found[1:], strict=True):
        assert line.startswith("sub/both.tar: does not match its sha256")
        assert line.endswith(f"no damage to the images of {index}")


def member(name: str, data: bytes = b"", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


def sealed(header: bytes) -> bytes:
    """A header with the checksum that its bytes have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


NEGATIVE = sealed(member("x")[:124] + b"\xff" * 12 + member("x")[136:])
PAX = b"99999999 path=y\n", b"9 path=y\n", b"-1 path=y\n", b"path=y", b"12 size=-99\n", b"6 a=b\n" * 1000
HOSTILE = {
    "negative size": NEGATIVE * 3,
    "size beyond the end": member("x.png", size=2**40),
    "name of a terabyte": member("././@LongLink", size=2**40, type=tarfile.GNUTYPE_LONGNAME),
    "endless pax": member("p", size=2**33, type=tarfile.XHDTYPE),
    **{f"pax {data[:12]!r}": member("p", data, type=tarfile.XHDTYPE) + member("x.png", b"abc") for data in PAX},
    "names that drive a terminal": member("\x1b[2J\udcff.png", b"abc"),
    "links, folders, devices": b"".join(
        member(f"x{kind!r}", type=kind, linkname="/etc/passwd") for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"S")
    ),
    "noise": np.random.default_rng(0).bytes(512 * 40),
    "not a whole block": b"x" * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tars_are_findings_and_nothing_more(place: Place, data: bytes) -> None:
    whole = (place / TAR).read()
    (place / TAR).write(data + whole)
    shift = len(data)
    if shift % 512 == 0:  # behind what is hostile lies a whole shard
        change_index(place, INDEX, lambda rows: [r.update(offset=r["offset"] + shift) for r in rows])
    else:
        reseal(place)
    for finding in verify(place).findings:
        assert str(finding).isprintable()
    (place / TAR).write(data)
    reseal(place)
    lines = findings(place)
    assert len(lines) >= 5
    assert all(TAR in line for line in lines)


def test_long_names_are_read_as_other_libraries_read_them(place: Place) -> None:
    """GNU and pax: a dataset that somebody else packed."""
    rows = read_rows(place, INDEX)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = io.BytesIO()
        keys = [f"{'folder/' * 30}ü-{form}-{number}" for number in range(len(rows))]
        with tarfile.open(place.path / TAR) as old, tarfile.open(fileobj=data, mode="w", format=form) as new:
            for key, row in zip(keys, rows, strict=True):
                for suffix in ("png", "json"):
                    info = old.getmember(f"{row['key']}.{suffix}")
                    content = old.extractfile(info)
                    info.name = f"{key}.{suffix}"
                    new.addfile(info, content)
        with tarfile.open(fileobj=io.BytesIO(data.getvalue())) as new:
            places = {info.name: info.offset_data for info in new}
        shutil.copy(place.path / TAR, place.path / "old.tar")
        (place / TAR).write(data.getvalue())
        fields = [{"key": key, "member": f"{key}.png", "offset": places[f"{key}.png"]} for key in keys]
        change_index(place, INDEX, lambda rows, fields=fields: [r.update(f) for r, f in zip(rows, fields, strict=True)])
        assert findings(place) == []
        shutil.move(place.path / "old.tar", place.path / TAR)


def test_large_tars_are_read_in_pieces(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    row = read_rows(place, INDEX)[1]
    monkeypatch.setattr("pipelines.data.headers._WHOLE", 0)
    monkeypatch.setattr("pipelines.data.headers._CHUNK", 700)
    assert findings(place) == []
    flip(place.path / TAR, row["offset"] + 5)
    found = findings(place)
    monkeypatch.undo()
    assert found == findings(place) != []


def test_pictures_that_are_brought_to_the_size_are_decoded_as_they_are(place: Place) -> None:
    """Of any size and of the formats that a source may have; whether they are what was indexed, their sha256 says."""
    row = read_rows(place, INDEX)[2]
    jpeg = io.BytesIO()
    Image.new("RGB", (1, 1)).save(jpeg, "JPEG", optimize=True)
    picture = jpeg.getvalue()
    data = (place / TAR).read()
    begins = row["offset"] - 512
    name = row["key"] + ".jpg"
    packed = member(name, picture)
    (place / TAR).write(data[:begins] + packed + data[begins + 512 + -(-row["size"] // 512) * 512 :])
    shift = (place / TAR).size() - len(data)
    fields = {"member": name, "size": len(picture), "sha256": hashlib.sha256(picture).digest()}

    def change(rows: list[dict[str, Any]]) -> None:
        rows[2].update(fields)
        for later in rows[3:]:
            later["offset"] += shift

    change_index(place, INDEX, change)
    assert any("cannot be decoded" in line for line in findings(place))
    change_card(place, decode="fit", resize="auto")
    assert findings(place) == []
    patch(place.path / TAR, row["offset"], b"XX")
    assert f"{TAR}: member {name} does not match the sha256 in the index" in findings(place)
    change_index(place, INDEX, lambda rows: rows[2].update(sha256=sha256_at(place, row["offset"], len(picture))))
    (found,) = findings(place)
    assert found.startswith(f"{TAR}: member {name} cannot be decoded: ")


def sha256_at(place: Place, offset: int, size: int) -> bytes:
    return hashlib.sha256((place / TAR).read()[offset : offset + size]).digest()


def test_what_the_disk_does_not_give_is_a_finding_and_the_search_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / TAR).delete()
    (place.path / TAR).mkdir()  # it can be opened, and reading it fails as a broken disk does
    small = findings(place)
    flip(place.path / "train-000002.tar", read_rows(place, "train-000002.parquet")[0]["offset"])
    monkeypatch.setattr("pipelines.data.headers._WHOLE", 0)
    large = findings(place)
    assert len(small) == 1
    assert len(large) == 3
    assert small[0].startswith(f"{TAR}: cannot be read: ")
    assert large[0].startswith(f"{TAR}: cannot be read: ")
    assert large[1].startswith("train-000002.tar: member ")


def test_what_is_said_of_a_broken_picture_has_no_address_in_it(place: Place) -> None:
    row = read_rows(place, INDEX)[1]
    data = b"GIF89a".ljust(row["size"], b"\0")
    patch(place.path / TAR, row["offset"], data)
    change_index(place, INDEX, lambda rows: rows[1].update(sha256=hashlib.sha256(data).digest()))
    told: list[Damage] = []
    Reader(Dataset.open(place).split("train"), on_error="skip", on_damage=told.append).read_all()
    reason = "cannot be decoded: cannot identify image file"
    assert [damage.reason for damage in told] == [reason]
    assert findings(place) == [f"{TAR}: member {row['member']} {reason}"]

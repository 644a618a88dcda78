"""Zip and tar that are damaged, hostile or merely odd: one line that says what to do, and nothing is unpacked."""

import bz2
import io
import json
import lzma
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources import NO_LABEL, images, notes, open_source
from pipelines.errors import UserError
from tests.data.data_helpers import noise_picture, png, refused, write_tar, write_zip

PICTURE = png(noise_picture(0))
FILES = {"cat/0.png": PICTURE, "dog/1.png": png(noise_picture(1))}


def add(file: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    file.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_what_is_no_image_is_passed_over(tmp_path: Path, write: object) -> None:
    path = tmp_path / f"a{'.zip' if write is write_zip else '.tar'}"
    extra = {"notes.txt": b"", "set/notes.TIF": b"", ".DS_Store": b"", "set/.hidden/2.png": b"", "__MACOSX/x.png": b""}
    write(path, {f"set/{name}": data for name, data in FILES.items()} | extra)
    with pytest.warns(UserWarning, match=r"passed over in .*: 2 files, not ending in"):
        source = open_source(str(path))
    assert [source.title(i) for i in range(len(source))] == ["cat/0.png", "dog/1.png"]
    assert source.classes == ("cat", "dog")


def test_only_one_folder_around_all_images_is_stripped(tmp_path: Path) -> None:
    for names, titles, classes in (
        (["set/cat/0.png"], ["cat/0.png"], ("cat",)),
        (["cat/0.png"], ["0.png"], ()),
        (["cat/0.png", "1.png"], ["1.png", "cat/0.png"], ("cat",)),
        (["0.png"], ["0.png"], ()),
    ):
        write_zip(tmp_path / "a.zip", dict.fromkeys(names, PICTURE))
        source = open_source(str(tmp_path / "a.zip"))
        assert ([source.title(i) for i in range(len(source))], source.classes) == (titles, classes)
        assert source.label(0) == (NO_LABEL if "/" not in titles[0] else 0)


def test_links_and_devices_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURE)
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        add(file, "cat/0.png", PICTURE)
        add(file, "cat/symbolic.png", kind=tarfile.SYMTYPE, link=str(secret))
        add(file, "cat/hard.png", kind=tarfile.LNKTYPE, link="../secret.png")
        add(file, "cat/device.png", kind=tarfile.CHRTYPE)
        add(file, "cat/pipe.png", kind=tarfile.FIFOTYPE)
    with pytest.warns(UserWarning, match=r"passed over in .*: 4 files, .*links"):
        assert len(open_source(str(tmp_path / "a.tar"))) == 1


def test_links_in_a_zip_are_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("0.png", PICTURE)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    with pytest.warns(UserWarning, match=r"passed over in .*: 1 file, not ending in"):
        assert len(open_source(str(tmp_path / "a.zip"))) == 1


@pytest.mark.parametrize("name", ["/abs/0.png", "../0.png", "cat/../../0.png", "..\\0.png", "C:\\0.png", "/0.cls"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "a.zip", FILES | {name: PICTURE})
    refused(tmp_path / "a.zip", "lies outside of the archive's folder; pack it with relative names")
    if "\\" not in name:
        write_tar(tmp_path / "a.tar", FILES | {name: PICTURE})
        refused(tmp_path / "a.tar", "lies outside of the archive's folder; pack it with relative names")


def test_names_cannot_break_the_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"cat/\x1b[31m\n0.png": b"no image"})
    refused(tmp_path / "a.tar", r"\\x1b\[31m\\n0\.png: cannot be read as an image", load=0)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        add(file, "\xff.png", PICTURE)
    refused(tmp_path / "b.tar", "not valid UTF-8; rename it")


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        add(file, "0.png", PICTURE)
        add(file, "./0.png", FILES["dog/1.png"])
    source = open_source(str(tmp_path / "a.tar"))
    assert len(source) == 1
    assert np.array_equal(np.asarray(source.load(0)), noise_picture(1))


def test_encrypted_and_rarely_packed_members_are_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", FILES)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    refused(tmp_path / "a.zip", "dog/1.png: is encrypted; unpack it and give the folder")
    write_zip(tmp_path / "b.zip", FILES, zipfile.ZIP_BZIP2)
    refused(tmp_path / "b.zip", "is packed by method 12, and only stored and deflated")


def test_a_bomb_costs_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file, file.open("0.png", "w") as member:
        for _ in range(65):
            member.write(bytes(2**20))
    assert (tmp_path / "a.zip").stat().st_size < 100_000
    refused(tmp_path / "a.zip", "0.png: an image of 68,157,440 bytes is more than the 67,108,864 that are read")
    # One that announces little: no more than that is unpacked.
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rindex(b"PK\1\2") + 24
    data[at : at + 4] = struct.pack("<I", 1000)
    (tmp_path / "a.zip").write_bytes(data)
    refused(tmp_path / "a.zip", r"0\.png: cannot be read as a member \(its size is not as listed\)", load=0)
    file = io.BytesIO()
    Image.new("1", (10_000, 7_000)).save(file, "PNG")
    write_zip(tmp_path / "b.zip", {"0.png": file.getvalue()})
    refused(tmp_path / "b.zip", "0.png: 10000 x 7000 is more than", load=0)


def test_a_large_member_of_a_tar_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    write_tar(tmp_path / "a.tar", FILES)
    refused(tmp_path / "a.tar", r"cat/0\.png: an image of \d+ bytes is more than the 100")


def test_damaged_zips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write_zip(path, FILES)
    whole = path.read_bytes()
    for data in (b"", b"no zip", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(data)
        refused(path, r"cannot be read as a zip archive \(.+\); copy or make it again")
    path.write_bytes(whole[:60] + b"\0" * 100 + whole[160:])
    refused(path, r"cat/0\.png: cannot be read as a member", load=0)
    path.write_bytes(b"XX" + whole[2:])
    refused(path, r"cat/0\.png: cannot be read as a member \(no member where", load=0)
    write_zip(path, {"cat/0.png": PICTURE[:60]})
    refused(path, r"a\.zip: cat/0\.png: cannot be read as an image", load=0)
    write_zip(path, {"notes.txt": b""})
    refused(path, "no image in .*a.zip; files ending in .png")


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, FILES)
    whole = path.read_bytes()
    second = whole.index(b"dog/1.png")
    end = second + 512 + 512 * -(-len(FILES["dog/1.png"]) // 512)
    for data in (b"", b"no tar", whole[:700], whole[: second + 100], whole[:second], whole[:end]):
        path.write_bytes(data)
        refused(path, r"cannot be read as a tar archive \(.+\); copy or make it again")
    path.write_bytes(whole[: second + 3] + b"X" + whole[second + 4 :])
    refused(path, r"cannot be read as a tar archive \(a header is damaged\)")
    path.write_bytes(bytes(1024))
    refused(path, "no image in ")
    # What is cut off after it was opened is noticed when it is read.
    path.write_bytes(whole)
    source = open_source(str(path))
    path.write_bytes(whole[: second + 600])
    with pytest.raises(UserError, match=r"dog/1\.png: cannot be read as a member \(its size is not as listed\)"):
        source.load(1)


def test_a_packed_tar_is_to_be_unpacked_first(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.b.TAR.GZ"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "is packed as a whole, .*; unpack it first")
    write_tar(tmp_path / "b.tar", FILES, "w:gz")
    for data in ((tmp_path / "b.tar").read_bytes(), bz2.compress(b"x"), lzma.compress(b"x")):
        (tmp_path / "b.tar").write_bytes(data)
        refused(tmp_path / "b.tar", "unpack it first")


def test_labels_beside_the_images_count_each_by_itself(tmp_path: Path) -> None:
    def labels(beside: dict[str, bytes], warns: int = 0) -> tuple[tuple[str, ...], list[int]]:
        path = tmp_path / "a.tar"
        write_tar(path, {"a/0.png": PICTURE, "a/1.jpg": b""} | beside)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source = open_source(str(path))
        told = [f"{warns} .cls or .json file{'s' if warns > 1 else ''};"] if warns else []
        assert [text for w in caught for text in told if text in str(w.message)] == told
        assert len(caught) == len(told)
        return source.classes, [source.label(i) for i in range(2)]

    assert labels({"a/0.cls": b"3", "a/1.json": b'{"label": 1}'}) == (("0", "1", "2", "3"), [3, 1])
    assert labels({"a/0.cls": b"3", "a/0.json": b'{"label": 3}', "a/1.cls": b"0"}) == (tuple("0123"), [3, 0])
    assert labels({"a/0.cls": b"3", "a/0.json": b'{"label": 1}', "a/1.cls": b"0"}, warns=1) == (tuple("0123"), [3, 0])
    one = (tuple("0123"), [3, NO_LABEL])
    for none in ({}, {"a/1.cls": b"-1"}, {"a/1.json": b"[]"}, {"a/1.json": b'{"name": 1, "label": null}'}):
        assert labels({"a/0.cls": b"3"} | none) == one
    for bad in (b"", b"cat", b"1.5", b"\xff"):
        assert labels({"a/0.cls": b"3", "a/1.cls": bad}, warns=1) == one
        assert labels({"a/1.cls": bad}, warns=1) == ((), [NO_LABEL] * 2)
    for value in (1.0, True, "1", [1]):
        assert labels({"a/0.cls": b"3", "a/1.json": json.dumps({"label": value}).encode()}, warns=1) == one
    for bad in (b"[" * 100_000, b"\xff", b" " * (notes.NOTE_BYTES + 1)):
        assert labels({"a/0.cls": b"3", "a/1.json": bad}, warns=1) == one
    assert labels({"a/0.cls": b"3", "a/2.cls": b"1", "a/2.json": b"{}"}, warns=2) == one  # beside no image
    write_tar(tmp_path / "a.tar", {"0.png": PICTURE, "0.cls": b"9" * 30})
    refused(tmp_path / "a.tar", "0.cls: has the label 9+, which is not from 0 to 1048575; correct it")


def test_tars_whose_labels_are_of_two_kinds_are_refused(tmp_path: Path) -> None:
    picture = png(noise_picture(0))
    write_tar(tmp_path / "a.tar", {"0.png": picture, "0.cls": b"3"})
    write_tar(tmp_path / "b.tar", {"cat/0.png": picture, "dog/1.png": picture})
    refused(tmp_path, r"b\.tar: its labels are class folders, unlike those of .*a\.tar; give them separately")
    write_tar(tmp_path / "b.tar", {"1.png": picture})
    source = open_source(str(tmp_path))
    assert [source.label(i) for i in range(2)] == [3, NO_LABEL]
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    refused(tmp_path, r"c\.tar: is packed as a whole")

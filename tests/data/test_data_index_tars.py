"""Tars as other packers make them: what tarfile and the stock library find in one is what is indexed, or it is told."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipelines.data.index import index
from pipelines.data.manifest import Dataset, read_index
from pipelines.data.sources import open_source
from pipelines.data.verify import verify
from pipelines.errors import UserError
from pipelines.store import Place
from tests.data.data_helpers import noise_picture, png, refused, write_tar

PICTURES = {f"{i}.png": png(noise_picture(i)) for i in range(6)}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


def write(path: Path, extra: bytes = b"", behind: int = 1) -> None:
    """A tar of the six pictures with other blocks behind one of them."""
    with tarfile.open(path, "w") as file:
        for number, (name, data) in enumerate(PICTURES.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
            if number == behind:
                assert file.fileobj is not None
                file.fileobj.write(extra)
                file.offset += len(extra)


def header(name: str, kind: bytes, size: int = 0) -> bytearray:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "1.png"
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def sealed(block: bytearray) -> bytes:
    """A header with the checksum that its bytes have."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse(name: str) -> bytes:
    """A sparse file of GNU's old kind, whose map goes on in two blocks of its own; the data looks like a header."""
    data = bytes(header("inside.png", tarfile.REGTYPE))
    block = header(name, tarfile.GNUTYPE_SPARSE, len(data))
    entry = b"%011o\0%011o\0" % (0, len(data))
    block[386 : 386 + 24], block[482], block[483:495] = entry, 1, b"%011o\0" % 4096
    return sealed(block) + bytes(504) + b"\1" + bytes(7) + bytes(512) + data


def sparse_pax(name: str) -> bytes:
    data = b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
    info = tarfile.TarInfo("GNUSparseFile.0/x")
    info.size = len(data)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    info.pax_headers["GNU.sparse.realsize"] = "4096"
    return info.tobuf(tarfile.PAX_FORMAT) + data


def members(dataset: Dataset) -> list[str]:
    parts = [dataset.split(split) for split in ("train", "held-out")]
    return sorted(
        name for part in parts for shard in part.shards for name in read_index(part, shard)["member"].to_pylist()
    )


def all_of(tars: Path) -> Dataset:
    return index(Place.of(tars), image_size=12, channels=3, held_out=0.0)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_no_data_follows_a_link_whatever_size_it_gives(tars: Path, kind: bytes) -> None:
    write(tars / "a.tar", bytes(header("link.txt", kind, 2000)))
    stock = [f"{sample['__key__']}.png" for sample in webdataset.WebDataset(str(tars / "a.tar"), shardshuffle=False)]
    dataset = all_of(tars)
    assert members(dataset) == sorted(PICTURES) == sorted(stock)
    assert verify(dataset.place).findings == ()


@pytest.mark.parametrize("form", [sparse, sparse_pax])
def test_sparse_files_are_skipped_as_tarfile_skips_them(tars: Path, form: object) -> None:
    assert callable(form)
    write(tars / "a.tar", form("notes.txt"))
    with tarfile.open(tars / "a.tar") as file:
        assert [info.name for info in file if info.isreg() and not info.issparse()] == list(PICTURES)
        assert file.getmember("notes.txt").issparse()
    dataset = all_of(tars)
    assert members(dataset) == sorted(PICTURES)
    assert verify(dataset.place).findings == ()


@pytest.mark.parametrize("name", ["x.png", "1.cls"])
@pytest.mark.parametrize(
    "blocks",
    [
        lambda name: bytes(header(name, tarfile.LNKTYPE)),
        lambda name: bytes(header(name, tarfile.SYMTYPE)),
        sparse,
        sparse_pax,
    ],
)
def test_pictures_and_labels_that_are_links_or_sparse_are_not_left_out_in_silence(
    tars: Path, blocks: object, name: str
) -> None:
    assert callable(blocks)
    write(tars / "a.tar", blocks(name))
    with pytest.raises(UserError, match=rf"a\.tar: member {name} is a link, a device or sparse, .*; pack the tar anew"):
        all_of(tars)
    with pytest.warns(UserWarning, match="passed over in .*a.tar: 1 file, .*links"):
        assert len(open_source(str(tars / "a.tar"))) == 6


def test_tars_joined_to_another_are_read_to_the_end(tars: Path, tmp_path: Path) -> None:
    more = {f"more{i}.png": png(noise_picture(9 + i)) for i in range(2)}
    write(tmp_path / "first.tar")
    write_tar(tmp_path / "second.tar", more)
    joined = b"".join((tmp_path / f"{name}.tar").read_bytes() for name in ("first", "second"))
    (tars / "a.tar").write_bytes(joined)
    source = open_source(str(tars / "a.tar"))
    assert [source.title(i) for i in range(len(source))] == sorted(PICTURES | more)
    assert source.load(7).tobytes() == noise_picture(10).tobytes()
    assert members(all_of(tars)) == sorted(PICTURES | more)


@pytest.mark.parametrize("lost", range(6))
def test_a_header_lost_to_zeros_is_not_the_end(tars: Path, lost: int) -> None:
    write(tars / "a.tar")
    with tarfile.open(tars / "a.tar") as file:
        offset = file.getmembers()[lost].offset
    data = bytearray((tars / "a.tar").read_bytes())
    data[offset : offset + 512] = bytes(512)
    (tars / "a.tar").write_bytes(data)
    refused(tars / "a.tar", r"cannot be read as a tar archive \(.+\); copy or make it again")
    with pytest.raises(UserError, match=r"a\.tar: has a header at byte .* that cannot be read"):
        all_of(tars)


def test_tars_in_capital_letters_are_tars(tars: Path) -> None:
    write_tar(tars / "a.tar", {"1.png": png(noise_picture(1))})
    write_tar(tars / "a.TAR", {"2.png": png(noise_picture(2))})
    dataset = all_of(tars)
    assert members(dataset) == ["1.png", "2.png"]
    assert sorted(shard.name for shard in dataset.split("train").shards) == ["a.TAR", "a.tar"]
    assert verify(dataset.place).findings == ()


def test_what_is_said_of_a_broken_picture_is_the_same_in_every_process(tars: Path) -> None:
    write_tar(tars / "a.tar", {**PICTURES, "x.png": b"GIF89a" + bytes(99)})
    code = (
        "import sys; from pipelines.data.index import index; from pipelines.store import Place\n"
        "padding = [bytes(n) for n in range(int(sys.argv[2]))]\n"
        "try: index(Place.of(sys.argv[1]), image_size=12, channels=3)\n"
        "except ValueError as error: print(error)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(tars), padding], capture_output=True, text=True, check=True
        ).stdout.removeprefix(str(tars))
        for padding in ("1", "5000")
    }
    assert said == {"/a.tar: member x.png cannot be decoded: cannot identify image file\n"}

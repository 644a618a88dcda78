"""NumPy, IDX and CIFAR files that are damaged, hostile or of another kind: one line that says what to do."""

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.sources import NO_LABEL, open_source, stacks
from pipelines.data.sources.stacks import Stored
from pipelines.errors import UserError
from tests.data.data_helpers import refused, write_idx

PIXELS = np.random.default_rng(1).integers(0, 256, (6, 8, 5), dtype=np.uint8)


def save_npz(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PIXELS / 255.0, r"values are float64; save uint8, 0..255, instead \(floats in 0..1: multiply by 255"),
        (PIXELS.astype(np.int64), "values are int64; save uint8, 0..255, instead$"),
        (PIXELS > 9, "values are bool; save uint8"),
        (PIXELS[0], r"shape \[8, 5\] is not that of images; write \[N, H, W\]"),
        (np.zeros((4, 4, 4, 4), np.uint8), r"shape \[4, 4, 4, 4\] is not that of images"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "is not that of images"),
        (np.zeros((9, 7, 3), np.uint8), r"one image, its channels last; write \[1, 9, 7, 3\], or \[9, 7, 3, 1\] where"),
        (np.zeros((9, 7, 1), np.uint8), r"\[9, 7, 1\] looks like one image"),
        (np.zeros((0, 8, 8), np.uint8), r"no image in shape \[0, 8, 8\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), "no image in shape"),
        (np.array({"an": "object"}), "values are object; save uint8"),
        (np.zeros(3, "u1,u1"), "values are .*; save uint8"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    refused(tmp_path / "a.npy", message)
    np.savez(tmp_path / "a.npz", images=array)
    refused(tmp_path / "a.npz", message)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    trap = np.array([Trap()] * 6)
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=trap)
    save_npz(tmp_path / "b.npz", {"images": npy_bytes(PIXELS), "labels": pickle.dumps(Trap())})
    for name in ("a.npy", "b.npy", "a.npz", "b.npz"):
        refused(tmp_path / name, "object|not correct")
    assert not (tmp_path / "sprung").exists()


def test_npz_with_other_names_says_which_are_understood(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures=PIXELS, **{f"more\n{i}": PIXELS for i in range(20)})
    refused(
        tmp_path / "a.npz", r"no array of images among pictures, more\\n0, .*, \.\.\.; name it one of x_train/x_test"
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5, int), r"labels\.npy: int64 of shape \[5\] cannot be the labels of 6 images"),
        (np.zeros((6, 14), int), r"write integers of shape \[6\], or leave it out"),
        (np.zeros(6), "float64 of shape"),
        (np.array([0, 1, 2, 2**33, 0, 0]), r"labels\.npy/3: label 8589934592 is not from 0 to 1048575"),
        (np.array([0, 1, 2, 0, -3, 0]), r"labels\.npy/4: label -3 is not from 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=PIXELS, labels=labels)
    refused(tmp_path / "a.npz", message)


def test_damaged_numpy_files_are_refused(tmp_path: Path) -> None:
    whole = npy_bytes(PIXELS)
    deep = "{'descr': " + "(" * 5000 + ")" * 5000 + "}"
    cases = {
        b"": "cannot be read as an npy file",
        whole[:60]: "cannot be read as an npy file",
        whole[:-1]: r"cannot be read as images \(239 bytes are not the 240 of shape",
        whole + b"x": r"cannot be read as images \(241 bytes",
        header(deep): "cannot be read as an npy file",
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (-6, 8, 5)}"): "no image in shape",
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 9999, 9999)}"): "9999 x 9999 is more than",
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (10**9, 8, 5)}"): "cannot be read as an npy file",
        whole.replace(b"NUMPY\1", b"NUMPY\2"): r"format 2\.0 is not that of plain arrays",
    }
    for data, message in cases.items():
        (tmp_path / "a.npy").write_bytes(data)
        refused(tmp_path / "a.npy", message)
        save_npz(tmp_path / "a.npz", {"arr_0": data})
        refused(tmp_path / "a.npz", message)


def test_damaged_npz_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"no zip")
    refused(path, r"cannot be read as an npz file \(.+\)")
    save_npz(path, {"images": npy_bytes(PIXELS)}, zipfile.ZIP_LZMA)
    refused(path, r"images\.npy: is packed by method 14; save it with np\.savez")
    save_npz(path, {"images": npy_bytes(np.random.default_rng(2).integers(0, 256, (99, 16, 16), np.uint8))})
    whole = path.read_bytes()
    path.write_bytes(whole[:-999] + b"\0\0\0\0" + whole[-995:])
    refused(path, r"images\.npy: cannot be read as packed images", load=0)
    path.write_bytes(whole)
    monkeypatch.setattr(stacks, "MAX_UNPACKED", 100)
    refused(path, "bytes are more than the 100 that are unpacked in memory; unpack it first")
    np.savez(path, images=PIXELS)  # mapped, so that its size does not matter
    assert np.array_equal(np.asarray(open_source(str(path)).load(5)), PIXELS[5])


def test_an_array_that_shrinks_after_opening_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    source = open_source(str(tmp_path / "a.npy"))
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.npy: cannot be read as a stack of images"):
        source.load(0)


def test_a_shape_that_can_be_read_both_ways_has_channels_last(tmp_path: Path) -> None:
    for shape, size, mode in (((2, 3, 7, 1), (7, 3), "L"), ((2, 3, 7, 3), (7, 3), "RGB"), ((2, 1, 7, 9), (9, 7), "L")):
        np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
        image = open_source(str(tmp_path / "a.npy")).load(1)
        assert (image.size, image.mode) == (size, mode)


def test_one_image_is_one_and_thin_grey_ones_are_many(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for array, expected in ((pixels[None], [pixels]), (pixels[..., None], list(pixels))):
        np.save(tmp_path / "a.npy", array)
        source = open_source(str(tmp_path / "a.npy"))
        assert [np.asarray(source.load(i)).tolist() for i in range(len(source))] == [p.tolist() for p in expected]


def test_records_with_labels_between_them_are_mapped_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(240)) * 3)
    array = Stored(str(tmp_path / "a"), 0, (180, 1, 3), skip=1).open()
    assert array.base is not None
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert array[1].tolist() == [[5, 6, 7]]


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("end", ["", ".gz"])
def test_damaged_idx_files_are_refused(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"train-images-idx3-ubyte{end}"
    whole = idx_bytes(PIXELS)
    cases = {
        b"": "cannot be read as an IDX file",
        whole[:10]: "cannot be read as an IDX file",
        b"\1" + whole[1:]: "it does not begin as one",
        idx_bytes(PIXELS, 0x0D): r"values of type 0x0D in 3 dimensions, not unsigned bytes \(0x08\) in 3",
        idx_bytes(PIXELS[0]): "values of type 0x08 in 2 dimensions",
        idx_bytes(PIXELS[:0]): "no image in shape",
        idx_bytes(np.empty((1, 9000, 0), np.uint8))[:12] + struct.pack(">I", 9000) + bytes(81_000_000): "9000 x 9000",
    }
    for data, message in cases.items():
        path.write_bytes(gzip.compress(data, 1) if end else data)
        refused(path, message)
    for data in (whole[:-1], whole + b"x"):
        path.write_bytes(gzip.compress(data) if end else data)
        refused(path, "it has fewer bytes|it has more bytes|bytes are not the 256", load=0 if end else None)


def test_damaged_gzips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte.gz"
    whole = gzip.compress(idx_bytes(PIXELS))
    for data in (b"no gzip", whole[:12]):
        path.write_bytes(data)
        refused(path, r"cannot be read as an IDX file")
    for data in (whole[:-9], whole[:-6] + b"\0\0" + whole[-4:]):
        path.write_bytes(data)
        refused(path, r"cannot be read as an IDX file", load=0)
    # A few bytes that announce 4 GiB, and some that hold more than they announce.
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**22, 32, 32)))
    refused(path, r"bytes cannot hold the 4,294,967,312 that it announces")
    path.write_bytes(gzip.compress(idx_bytes(PIXELS) + bytes(50_000_000), 1))
    refused(path, "it has more bytes than it announces", load=0)


def test_idx_files_belong_together_by_name(tmp_path: Path) -> None:
    images_file, labels_file = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels_file, np.arange(6))
    refused(tmp_path, "IDX labels are there and no images")
    refused(labels_file, "these are labels; give the file of images")
    write_idx(images_file, PIXELS)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", PIXELS)  # the same, packed
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert [source.label(i) for i in range(len(source))] == list(range(6))
    assert [source.split(i) for i in range(6)] == [None] * 6
    write_idx(labels_file, np.arange(5))
    refused(tmp_path, r"uint8 of shape \[5\] cannot be the labels of 6 images")
    labels_file.unlink()
    assert open_source(str(images_file)).label(0) == NO_LABEL
    write_idx(tmp_path / "latest-images.idx3-ubyte", PIXELS)
    refused(tmp_path, r"several data sets are there \(latest, no name\)")
    (tmp_path / "latest-images.idx3-ubyte").unlink()
    for name in ("emnist-letters-train", "emnist-letters-test"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", PIXELS)
    refused(tmp_path, r"several data sets are there \(emnist-letters, no name\); give each a folder of its own")
    images_file.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    source = open_source(str(tmp_path))
    assert [source.split(i) for i in range(12)] == ["held-out"] * 6 + ["train"] * 6


def test_cifar_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    record = bytes(3073)
    for name in ("data_batch_1", "data_batch_2", "data_batch_4", "data_batch_5", "test_batch"):
        (tmp_path / f"{name}.bin").write_bytes(record)
    refused(tmp_path, r"data_batch_3\.bin of CIFAR-10 is missing; unpack all of it again")
    third = tmp_path / "data_batch_3.bin"
    for data in (b"", record[:-1], record * 2 + b"x"):
        third.write_bytes(data)
        refused(tmp_path, r"data_batch_3\.bin: cannot be read as CIFAR-10 \(.* records of 3,073\)")
    third.write_bytes(record + b"\x0a" + record[1:])
    refused(tmp_path, r"data_batch_3\.bin/1: label 10 is not from 0 to 9")
    third.write_bytes(record)
    assert open_source(str(tmp_path)).classes == tuple("0123456789")
    (tmp_path / "batches.meta.txt").write_text("plane\nship\n")
    refused(tmp_path, r"batches\.meta\.txt: 2 names are not the 10 of CIFAR-10")
    (tmp_path / "batches.meta.txt").write_bytes(b"\xff")
    refused(tmp_path, r"batches\.meta\.txt: cannot be read as names of classes")


def test_cifars_pickles_are_refused(tmp_path: Path) -> None:
    for name in ("data_batch_1", "batches.meta"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "CIFAR's Python version, pickles, which are not read; take the binary version")

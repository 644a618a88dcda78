"""The same images in every kind of container: the same pixels, labels, split and order come out."""

import json
import os
import pickle
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.sources import NO_LABEL, Source, open_source
from pipelines.errors import UserError
from tests.data.data_helpers import (
    Known,
    Written,
    png,
    refused,
    write_files,
    write_zip,
)
from tests.data.source_kinds import (
    KINDS,
    KNOWN,
    Kind,
    cifar10,
    idx,
    npz_keras,
    parquet,
    tars,
    zip_deflated,
)

EACH = pytest.mark.parametrize(
    ("kind", "write"), [pytest.param(kind, write, id=write.__name__) for kind in KINDS for write in KINDS[kind]]
)


def check(source: Source, known: Known, written: Written, order: list[int]) -> None:
    for index in order:
        number = written[index][1]
        image = source.load(index)
        assert image.mode == ("L" if known.pixels.ndim == 3 else "RGB")
        assert np.array_equal(np.asarray(image), known.pixels[number])
        assert source.label(index) == known.labels[number]
        assert source.split(index) == known.splits[number]


@EACH
def test_what_was_written_is_read(tmp_path: Path, kind: str, write: Kind) -> None:
    path, known, written, classes = write(tmp_path)
    source = open_source(str(path))
    assert (source.kind, source.name, source.classes) == (kind, str(path), classes)
    assert [source.title(i) for i in range(len(source))] == [title for title, _ in written]
    everything = list(range(len(source)))
    check(source, known, written, everything)
    check(source, known, written, everything[::-1])  # random access too, and not only forwards
    assert all(type(source.label(i)) is int for i in everything)


@EACH
def test_a_source_that_was_used_travels_and_has_no_open_files(tmp_path: Path, kind: str, write: Kind) -> None:
    path, known, written, _ = write(tmp_path)
    source = open_source(str(path))
    source.load(1)
    sent = pickle.dumps(source)
    # No pixels in it, and nothing that is open: files and memory maps cannot be pickled.
    assert len(sent) < 5000
    copy = pickle.loads(sent)
    assert copy.fingerprint() == source.fingerprint()
    check(copy, known, written, [3, 0])
    check(source, known, written, [2])


@EACH
def test_the_fingerprint_follows_every_file(tmp_path: Path, kind: str, write: Kind) -> None:
    path, *_ = write(tmp_path)
    source = open_source(str(path))
    before = source.fingerprint()
    assert open_source(str(path)).fingerprint() == before
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".md")
    seen = {before}
    for file in files or [path]:
        os.utime(file, ns=(1, 1))
        seen.add(open_source(str(path)).fingerprint())
    assert len(seen) == 1 + len(files or [path])


@pytest.mark.parametrize("write", [zip_deflated, parquet, npz_keras, idx, cifar10])
def test_another_process_opens_it_from_the_pickle(tmp_path: Path, write: Kind) -> None:
    path, known, written, _ = write(tmp_path)
    source = open_source(str(path))
    source.load(0)
    (tmp_path / "sent").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys, zlib; s = pickle.load(open(sys.argv[1], 'rb')); "
        "print([zlib.crc32(s.load(i).tobytes()) for i in range(len(s))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [zlib.crc32(known.pixels[number].tobytes()) for _, number in written]


def test_only_train_and_another_make_a_split(tmp_path: Path) -> None:
    picture = png(KNOWN.pixels[0])
    cases: dict[tuple[str, ...], list[str] | None] = {
        ("train/a/1.png", "val/b/1.png", "Testing/1.png"): ["held-out", "train", "held-out"],
        ("Training/1.png", "held-out/1.png"): ["train", "held-out"],
        ("train/a/1.png", "training/b/1.png"): None,
        ("val/a/1.png", "test/b/1.png"): None,
        ("train/a/1.png",): None,
    }
    for number, (names, splits) in enumerate(cases.items()):
        root = tmp_path / str(number)
        write_files(root, dict.fromkeys(names, picture))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source = open_source(str(root))
        assert [source.title(i) for i in range(len(source))] == sorted(names)
        assert [source.split(i) for i in range(len(source))] == (splits or [None] * len(names))
        if splits is None:
            assert source.classes == tuple(sorted({name.split("/")[0] for name in names if "/" in name}))
    first = open_source(str(tmp_path / "0"))
    assert first.classes == ("a", "b")
    assert [first.label(i) for i in range(3)] == [NO_LABEL, 0, 1]


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("extra", ["logo.png", "extra/a/1.png", "unsupervised/1.png"])
def test_a_published_split_is_kept_whatever_lies_beside_it(tmp_path: Path, extra: str, as_zip: bool) -> None:
    names = ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", extra)
    files = {name: png(KNOWN.pixels[i]) for i, name in enumerate(names)}
    path = tmp_path / ("images.zip" if as_zip else "images")
    (write_zip if as_zip else write_files)(path, files)
    with pytest.warns(UserWarning, match=rf"and taken for training: {extra.split('/')[0]} \(beside test, train\)"):
        source = open_source(str(path))
    assert source.classes == ("a", "b")
    found = {source.title(i): (source.split(i), source.label(i)) for i in range(len(source))}
    assert found == {
        "train/a/1.png": ("train", 0),
        "train/b/1.png": ("train", 1),
        "test/a/1.png": ("held-out", 0),
        "test/b/1.png": ("held-out", 1),
        extra: ("train", 0 if "/a/" in extra else NO_LABEL),
    }


def test_images_kept_from_training_by_name_alone_are_not_trained_on_in_silence(tmp_path: Path) -> None:
    picture = png(KNOWN.pixels[0])
    write_files(tmp_path / "a", dict.fromkeys(("cat/1.png", "dog/1.png", "test/1.png"), picture))
    message = r"by name kept from training: test; neither that nor for training: cat, dog; call what is to train on"
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "a"))
    write_files(tmp_path / "b", dict.fromkeys(("bus/1.png", "car/1.png", "train/1.png"), picture))
    with pytest.warns(UserWarning, match=r"no split, so that none is taken from the names: bus, car \(beside train\)"):
        source = open_source(str(tmp_path / "b"))
    assert (source.classes, source.split(0)) == (("bus", "car", "train"), None)


def test_several_kinds_in_one_folder_are_refused_by_name(tmp_path: Path) -> None:
    picture = png(KNOWN.pixels[0])
    for kind, write in {"Parquet": parquet, "tars": tars, "IDX": idx, "CIFAR": cifar10}.items():
        (tmp_path / kind).mkdir()
        path, *_ = write(tmp_path / kind)
        write_files(path, {"assets/logo.png": picture})
        refused(
            path, rf"several kinds of source are in it: {kind} \(.*\), images \(assets/logo\.png\); give a folder or"
        )
    parquet(tmp_path / "tars")
    (tmp_path / "tars" / "set" / "assets" / "logo.png").unlink()
    refused(
        tmp_path / "tars", r"several kinds of source are in it: Parquet \(data/.*\), tars \(set/.*\); give a folder"
    )


def test_a_file_of_one_name_in_both_splits_is_two_images(tmp_path: Path) -> None:
    files = {"train/cat/1.png": png(KNOWN.pixels[0]), "test/cat/1.png": png(KNOWN.pixels[1])}
    write_files(tmp_path / "images", files)
    write_zip(tmp_path / "images.zip", files)
    for name in ("images", "images.zip"):
        source = open_source(str(tmp_path / name))
        assert [(source.title(i), source.label(i), source.split(i)) for i in range(2)] == [
            ("test/cat/1.png", 0, "held-out"),
            ("train/cat/1.png", 0, "train"),
        ]
        assert np.array_equal(np.asarray(source.load(1)), KNOWN.pixels[0])


def test_debians_fashion_mnist() -> None:
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    source = open_source(str(root))
    assert (len(source), source.kind, source.classes) == (70_000, "idx", tuple("0123456789"))
    splits = [source.split(i) for i in range(70_000)]
    assert splits == ["held-out"] * 10_000 + ["train"] * 60_000
    labels = np.array([source.label(i) for i in range(70_000)])
    assert np.bincount(labels[10_000:]).tolist() == [6000] * 10
    assert source.load(0).size == (28, 28)
    first = np.asarray(source.load(10_000), dtype=float)  # an ankle boot, dark above and bright below
    assert source.label(10_000) == 9
    assert first[:10].mean() < first[14:].mean()

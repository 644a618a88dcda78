"""The label of a sample in a tar is one and the same to those who ingest it, index it and verify it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.index import index
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.data.sources import NO_LABEL, open_source
from pipelines.data.verify import verify
from pipelines.errors import UserError
from pipelines.store import Place
from tests.data.data_helpers import noise_picture, png, refused, write_tar, write_zip
from tests.data.dataset_helpers import change_index

N = 6
NAMES = ("cat", "dog", "owl")
SETTINGS: dict[str, Any] = {"image_size": 12, "channels": 3, "held_out": 0.0}

Notes = Callable[[int], dict[str, bytes]]


def said(**fields: object) -> bytes:
    return json.dumps(fields).encode()


CASES: dict[str, tuple[Notes, list[int], int]] = {
    "padded": (lambda i: {"cls": b"%02d\n" % (i % 3)}, [0, 1, 2] * 2, 0),
    "with a sign": (lambda i: {"cls": b"+%d" % (i % 3)}, [0, 1, 2] * 2, 0),
    "number and text": (lambda i: {"cls": b"%d" % (i % 3), "json": said(label=NAMES[i % 3])}, [0, 1, 2] * 2, 0),
    "text and number": (lambda i: {"cls": NAMES[i % 3].encode(), "json": said(label=i % 3)}, [0, 1, 2] * 2, 0),
    "class is a number": (lambda i: {"json": said(label=i % 3, **{"class": 100 + i})}, [0, 1, 2] * 2, 0),
    "class has a name": (lambda i: {"json": said(label=i % 3, **{"class": NAMES[i % 3]})}, [0, 1, 2] * 2, 0),
    "two numbers": (lambda i: {"cls": b"1", "json": said(label=2)}, [1] * 6, 6),
    "broken beside good": (lambda i: {"cls": b"%d" % (i % 3), "json": b"{nope"}, [0, 1, 2] * 2, 0),
    "endings in capitals": (lambda i: {"CLS": b"%d" % (i % 3)}, [0, 1, 2] * 2, 0),
    "text and caption": (lambda i: {"cls": b"cat", "json": said(caption="a cat")}, [NO_LABEL] * 6, 6),
    "broken": (lambda i: {"json": b"{nope"}, [NO_LABEL] * 6, 6),
    "caption": (lambda i: {"json": said(caption="a cat")}, [NO_LABEL] * 6, 0),
    "one is none": (lambda i: {"cls": b"1" if i else b"-1"}, [NO_LABEL, *[1] * 5], 0),
    "one is text": (lambda i: {"cls": b"1" if i else b"cat"}, [NO_LABEL, *[1] * 5], 1),
    "one is absent": (lambda i: {"cls": b"1"} if i else {}, [NO_LABEL, *[1] * 5], 0),
    "one is not said": (lambda i: {"json": said(label=1 if i else None)}, [NO_LABEL, *[1] * 5], 0),
    "none, but in JSON": (lambda i: {"cls": b"-1", "json": said(label=i % 3)}, [0, 1, 2] * 2, 0),
    "too large": (lambda i: {"json": said(label=1, padding="x" * (2**20 if not i else 0))}, [NO_LABEL, *[1] * 5], 1),
}


def write(tars: Path, notes: Notes) -> None:
    tars.mkdir()
    files = {}
    for i in range(N):
        files[f"{i}.png"] = png(noise_picture(i))
        files |= {f"{i}.{ending}": data for ending, data in notes(i).items()}
    write_tar(tars / "a.tar", files)


def labels(dataset: Dataset) -> dict[bytes, int]:
    images, found = Reader(dataset.split("train")).read_all()
    return {image.tobytes(): label for image, label in zip(images, found.tolist(), strict=True)}


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [text.split(": ")[2] for w in caught if "not read as labels" in (text := str(w.message))]


@pytest.mark.parametrize(("notes", "expected", "passed_over"), CASES.values(), ids=CASES.keys())
def test_ingest_index_and_verify_agree(tmp_path: Path, notes: Notes, expected: list[int], passed_over: int) -> None:
    tars = tmp_path / "tars"
    write(tars, notes)
    known = {noise_picture(i).tobytes(): label for i, label in enumerate(expected)}
    files = "1 .cls or .json file;" if passed_over == 1 else f"{passed_over} .cls or .json files;"
    told = [files.partition(";")[0]] if passed_over else []
    for make in (lambda out: ingest(str(tars), out, **SETTINGS), lambda out: index(Place.of(tars), out, **SETTINGS)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = make(Place.of(tmp_path / f"out-{len(list(tmp_path.iterdir()))}"))
        assert labels(dataset) == known
        assert [text.partition(";")[0] for text in warned(caught)] == told
        assert verify(dataset.place).findings == ()


def test_of_notes_that_are_there_twice_the_last_counts(tmp_path: Path) -> None:
    write(tmp_path / "tars", lambda i: {"cls": b"0"})
    tar = tmp_path / "tars" / "a.tar"
    write_tar(tmp_path / "more.tar", {f"{i}.cls": b"1" for i in range(N)})
    tar.write_bytes(tar.read_bytes() + (tmp_path / "more.tar").read_bytes())
    dataset = index(Place.of(tar.parent), **SETTINGS)
    source = open_source(str(tar))
    assert set(labels(dataset).values()) == {source.label(i) for i in range(N)} == {1}
    assert verify(dataset.place).findings == ()


@pytest.mark.parametrize("label", [-2, 2**20, 10**30])
def test_numbers_that_can_be_no_label_are_named(tmp_path: Path, label: int) -> None:
    write(tmp_path / "tars", lambda i: {"cls": b"%d" % (label if i == 4 else 0)})
    message = rf"4\.cls:? has the label {label}, which is not from 0 to 1048575; correct it"
    refused(tmp_path / "tars" / "a.tar", message)
    with pytest.raises(UserError, match=message):
        index(Place.of(tmp_path / "tars"), **SETTINGS)


def test_a_wrong_label_of_an_indexed_tar_is_found(tmp_path: Path) -> None:
    write(tmp_path / "tars", lambda i: {"cls": b"%d" % (i % 3), "json": said(**{"class": NAMES[i % 3]})})
    dataset = index(Place.of(tmp_path / "tars"), **SETTINGS)
    assert dataset.classes == NAMES
    change_index(dataset.place, dataset.split("train").shards[0].index, lambda rows: rows[0].update(label=2))
    found = [str(finding) for finding in verify(dataset.place).findings if finding.member]
    assert [text.split("member ")[1] for text in found] == ["0.png has the label 2 in the index, 0 in its cls and json"]


def test_class_folders_are_not_given_up_for_notes_of_some(tmp_path: Path) -> None:
    files = {f"{('cat', 'dog')[i % 2]}/{i}.png": png(noise_picture(i)) for i in range(4)}
    for write_archive, name in ((write_tar, "a.tar"), (write_zip, "a.zip")):
        write_archive(tmp_path / name, files | {"cat/0.cls": b"7"})
        with pytest.warns(UserWarning, match=r"not read as labels in .*: 1 \.cls or \.json file;"):
            source = open_source(str(tmp_path / name))
        assert (source.classes, [source.label(i) for i in range(4)]) == (("cat", "dog"), [0, 0, 1, 1])
        notes = {name.replace(".png", ".cls"): b"-1" if name == "cat/0.png" else b"1" for name in files}
        write_archive(tmp_path / name, files | notes)
        source = open_source(str(tmp_path / name))
        assert (source.classes, [source.label(i) for i in range(4)]) == (("0", "1"), [NO_LABEL, 1, 1, 1])
        write_archive(tmp_path / name, files | {"cat/notes.json": b"{}"})
        with pytest.warns(UserWarning, match=r"not read as labels in .*: 1 \.cls or \.json file;"):
            assert open_source(str(tmp_path / name)).classes == ("cat", "dog")

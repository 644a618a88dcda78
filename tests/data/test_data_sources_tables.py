"""Parquet files that are damaged, large or of another kind: one line that says what to do, and bounded memory."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.sources import NO_LABEL, images, open_source
from pipelines.errors import UserError
from tests.data.data_helpers import noise_picture, png, refused

PICTURE = png(noise_picture(0))


def write_table(path: Path, metadata: dict | None = None, **columns: object) -> None:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)


def features(names: object, column: str = "label") -> dict:
    return {"info": {"features": {column: {"_type": "ClassLabel", "names": names}}}}


def test_a_large_row_group_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    pictures = [png(noise_picture(i, 128, 128)) for i in range(320)]
    table = pa.table({"image": pa.array([{"bytes": data} for data in pictures])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=320, write_batch_size=4)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    del table
    source = open_source(str(tmp_path / "a.parquet"))
    before, held = pa.total_allocated_bytes(), []
    for i in range(0, 320, 7):
        assert np.array_equal(np.asarray(source.load(i)), noise_picture(i, 128, 128))
        held.append(pa.total_allocated_bytes() - before)
    assert max(held) < 6e6 < sum(map(len, pictures)) / 2
    assert np.array_equal(np.asarray(source.load(2)), noise_picture(2, 128, 128))  # backwards


def test_rows_without_an_image_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": PICTURE}, None, {"bytes": None, "path": "elsewhere.png"}, {"bytes": b"no image"}]
    write_table(path, image=pa.array(rows, kind))
    refused(path, r"a\.parquet: row 1: no image; remove the row", load=1)
    refused(path, r"a\.parquet: row 2: no image; remove the row", load=2)
    refused(path, r"a\.parquet: row 3: cannot be read as an image", load=3)
    write_table(path, image=pa.array([PICTURE, None]))
    refused(path, r"a\.parquet: row 1: no image", load=1)


def test_tables_without_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_table(path, picture=[PICTURE], label=[1])
    refused(path, "no column image or img among picture, label; name the column")
    write_table(path, image=[[1, 2], [3]])
    refused(path, r"column image is list<.*>, not image files")
    write_table(path, image=[{"path": "0.png"}])
    refused(path, r"column image is struct<.*>, not image files")
    write_table(path, image=pa.array([], pa.binary()))
    refused(path, "no image in it, as it has no rows")
    write_table(path, image=[PICTURE])
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    refused(path, "row 0: an image of .* bytes is more than the 100", load=0)


def test_labels_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def labels(values: object, metadata: dict | None = None) -> tuple[tuple[str, ...], list[int]]:
        write_table(path, metadata, image=[PICTURE] * 3, label=values)
        source = open_source(str(path))
        return source.classes, [source.label(i) for i in range(3)]

    assert labels(pa.array([0, None, -1], pa.int8())) == (("0",), [0, NO_LABEL, NO_LABEL])
    assert labels([1, 0, 1], features(["cat", "dog", "bird"])) == (("cat", "dog", "bird"), [1, 0, 1])
    for unusable in ({}, {"info": None}, features([]), features("cat"), features(["cat"], "fine_label"), [1]):
        assert labels([1, 0, 1], unusable)[0] == ("0", "1")  # type: ignore[arg-type]
    write_table(path, features(["cat"]), image=[PICTURE] * 2, label=[0, 1])
    refused(path, r"a\.parquet: label/1: label 1 is not from 0 to 0; correct it")
    for values in ([0, -2], [0, 2**40]):
        write_table(path, image=[PICTURE] * 2, label=values)
        refused(path, r"a\.parquet: label/1: label .* is not from 0 to 1048575")
    write_table(path, image=[PICTURE], label=["cat"])
    refused(path, "label: a column of string, not of integers; convert or remove it")


def test_tables_of_one_folder_agree_on_the_names_of_classes(tmp_path: Path) -> None:
    write_table(tmp_path / "train-0.parquet", features(["cat", "dog"]), image=[PICTURE], label=[1])
    write_table(tmp_path / "test-0.parquet", image=[PICTURE])
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert [(source.label(i), source.split(i)) for i in range(2)] == [(NO_LABEL, "held-out"), (1, "train")]
    write_table(tmp_path / "test-0.parquet", features(["dog", "cat"]), image=[PICTURE], label=[1])
    refused(tmp_path, r"train-0\.parquet: its classes are not named as those of test-0\.parquet")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train-00000-of-00001", "validation-00000-of-00001"), ["train", "held-out"]),
        (("held-out", "train"), ["held-out", "train"]),
        (("train", "trainer"), [None, None]),
        (("train-0", "train-1"), [None, None]),
        (("test-0", "val-0"), [None, None]),
        (("extra-0", "train-0"), [None, None]),
    ],
)
def test_the_split_of_tables_is_in_their_names(tmp_path: Path, names: tuple[str, ...], splits: list) -> None:
    for name in names:
        write_table(tmp_path / f"{name}.parquet", image=[PICTURE])
    source = open_source(str(tmp_path))
    assert [source.split(i) for i in range(2)] == splits


def test_tables_of_no_split_beside_those_of_one_are_for_training(tmp_path: Path) -> None:
    for name in ("test-0", "train-0", "unsupervised-0"):
        write_table(tmp_path / f"{name}.parquet", image=[PICTURE])
    with pytest.warns(UserWarning, match=r"taken for training: unsupervised-0\.parquet \(beside test-0"):
        source = open_source(str(tmp_path))
    assert [source.split(i) for i in range(3)] == ["held-out", "train", "train"]
    (tmp_path / "train-0.parquet").unlink()
    with pytest.raises(UserError, match=r"kept from training: test-0\.parquet; neither .*: unsupervised-0\.par"):
        open_source(str(tmp_path))


def test_a_table_beside_images_describes_them(tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.parquet", name=["0.png"])
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(PICTURE)
    with pytest.warns(UserWarning, match="1 file,"):
        assert open_source(str(tmp_path)).kind == "folder"


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(path, image=[png(noise_picture(i)) for i in range(20)])
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-20], b"x" * 100, whole[: len(whole) // 2]):
        path.write_bytes(data)
        refused(path, r"cannot be read as a Parquet file \(.+\); copy or make it again")
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    refused(path, r"cannot be read as a Parquet file", load=0)

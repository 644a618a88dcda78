"""What is printed of datasets that somebody else made: nothing of it reaches the terminal's controls."""

import json
from pathlib import Path

import pytest

from jobs.data_tables import show_difference, show_info, show_verification
from pipelines.data.diff import compare
from pipelines.data.index import index
from pipelines.data.inspect import info
from pipelines.data.manifest import CARD, Dataset
from pipelines.data.verify import verify
from pipelines.store import Place
from tests.data.data_helpers import noise_picture, png, write_tar
from tests.data.dataset_helpers import noise, write_dataset

NAMES = ("cat\x1b[2J", "dog")


def made(place: Path, names: tuple[str, ...] = NAMES, seed: int = 0) -> Dataset:
    return write_dataset(place, (noise(12, seed=seed), [i % 2 for i in range(12)]), (noise(4, seed=9), [0] * 4), names)


def test_names_are_printed_without_their_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = made(tmp_path / "a"), made(tmp_path / "b", ("cow", "dog\x07"), seed=1)
    (one.place / "train-000000.tar").delete()
    show_info(info(one))
    show_difference(compare(one, other))
    show_verification(verify(one.place))
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed
    assert "train-000000.tar: is missing" in printed
    assert not any(ord(character) < 32 for character in printed.replace("\n", ""))


def test_classes_in_another_order_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = made(tmp_path / "a", ("cat", "dog")), made(tmp_path / "b", ("dog", "cat"), seed=1)
    show_difference(compare(one, other))
    assert "the same names in another order: their labels are other numbers to a model" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("mean", [9, 9, 9]), ("std", "x"), ("mean", [0.5, 0.5]), ("std", None)])
def test_an_indexed_datasets_mean_and_deviation_can_be_shares(tmp_path: Path, name: str, value: object) -> None:
    """Its pictures are not brought to the size to verify them, so that more cannot be said."""
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {f"{i}.png": png(noise_picture(i)) for i in range(6)})
    place = index(Place.of(tmp_path / "tars"), image_size=8, channels=3, held_out=0.0).place
    assert verify(place).findings == ()
    card = (place / CARD).read_json()
    (place / CARD).write(json.dumps({**card, name: value}).encode())
    assert [finding.what.split(",")[0] for finding in verify(place).findings] == [f"says {name} {value}".split(",")[0]]

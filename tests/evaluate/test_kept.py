"""What is kept: made once, read back, and made again where it was damaged or is of another version."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.cluster import Cluster
from pipelines.evaluate.kept import kept, kept_arrays, kept_json, over_kept
from pipelines.store import DamageError, Place


def test_what_was_made_once_is_read_back(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "kept" / "a.npz")
    made = {"features": np.linspace(0, 1, 12).reshape(3, 4), "guesses": np.arange(3)}
    kept_arrays(place, lambda: made)

    def never() -> dict[str, np.ndarray]:
        raise AssertionError("it is there")

    again = kept_arrays(place, never)
    assert list(again) == list(made)
    assert all(np.array_equal(again[name], made[name]) for name in made)


def test_any_byte_that_is_another_or_lacks_is_told_and_made_again(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "a.json")
    kept_json(place, lambda: {"frechet": 1.5})
    whole = place.read()
    for damaged in (
        whole[:-1],
        whole[:20],
        b"",
        *(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (0, 40)),
    ):
        place.write(damaged)
        with pytest.warns(UserWarning, match=r"a\.json: is damaged, and made again"):
            assert kept_json(place, lambda: {"frechet": 1.5}) == {"frechet": 1.5}
        assert place.read() == whole


def test_what_another_version_kept_is_made_again(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "a")

    def load(data: bytes) -> int:
        if (version := json.loads(data)["format"]) != 2:
            raise DamageError(f"has format {version}, not 2")
        return 2

    kept(place, lambda: 1, lambda version: json.dumps({"format": version}).encode(), load)
    with pytest.warns(UserWarning, match="has format 1, not 2, and made again"):
        assert kept(place, lambda: 2, lambda version: json.dumps({"format": version}).encode(), load) == 2


def test_damage_that_another_process_meets_is_told_here(cluster: Cluster, tmp_path: Path) -> None:
    places = [Place.of(tmp_path / name) for name in ("a.json", "b.json")]

    def named(place: Place) -> str:
        return kept_json(place, lambda: place.name)

    def all_of_them() -> list[tuple[int, str]]:
        return sorted(over_kept(named, places, cluster, workers=2))

    assert all_of_them() == [(0, "a.json"), (1, "b.json")]
    places[1].write(b"damaged")
    with pytest.warns(UserWarning, match=r"b\.json: is damaged, and made again") as told:
        assert all_of_them() == [(0, "a.json"), (1, "b.json")]
    assert len(told) == 1

"""The folder that a dataset is made in: what is its user's stays, and of two who work there one is refused."""

import fcntl
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.data.index import index
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.data.verify import verify
from pipelines.errors import UserError
from pipelines.store import Place
from tests.data.data_helpers import Ingest, draw_pictures, files_below, noise_picture, png, stop_at, write_tar
from tests.s3_faults import BUCKET, set_environment

RECIPE: dict[str, Any] = {"image_size": 12, "channels": 3}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Four tars of a user's, named as an ingest names its shards."""
    for tar in range(4):
        (tmp_path / "tars").mkdir(exist_ok=True)
        files = {f"{i:03d}.png": png(noise_picture(i)) for i in range(tar * 10, tar * 10 + 10)}
        write_tar(tmp_path / "tars" / f"train-{tar:06d}.tar", files)
    return tmp_path / "tars"


def test_what_else_lies_in_the_folder_stays_and_the_source_does(make: Ingest, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "project" / "scan", range(40))
    theirs = {
        "done/thesis.txt": b"x",
        "lock": b"precious",
        "indexed/a.json": b"{}",
        "train-7.tar": b"not a shard's name",
    }
    for name, data in theirs.items():
        (tmp_path / "project" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "project" / name).write_bytes(data)
    before = files_below(tmp_path / "project")
    make(tmp_path / "project" / "scan", "project")
    make(tmp_path / "project" / "scan", "apart")
    assert files_below(tmp_path / "project") == {**before, **files_below(tmp_path / "apart")}


def test_what_else_lies_beside_the_tars_stays(tars: Path) -> None:
    (tars / "lock").write_text("precious")
    (tars / "indexed").mkdir()
    (tars / "indexed" / "a.json").write_text("{}")
    before = files_below(tars)
    index(Place.of(tars), **RECIPE)
    assert files_below(tars).items() >= before.items()


@pytest.mark.parametrize("text", ["mine", '{"mine": 1}', '{"format": 2}', "[]"])
def test_a_mark_that_is_not_ours_is_left_alone(text: str, pictures: Path, make: Ingest, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ingest.json").write_text(text)
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"precious")
    before = files_below(tmp_path / "out")
    with pytest.raises(UserError, match=r"ingest\.json is there and not from an unfinished work; name another folder"):
        make(pictures, "out")
    assert files_below(tmp_path / "out") == before


def test_a_mark_of_an_unknown_format_is_named(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", progress=stop_at(55))
    mark = tmp_path / "out" / "ingest.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "format": 99}))
    with pytest.raises(UserError, match=r"ingest\.json: format 99 is not known here"):
        make(pictures, "out")


def test_a_shard_that_is_not_from_the_unfinished_ingest_is_left_alone(
    pictures: Path, make: Ingest, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", progress=stop_at(55))
    (tmp_path / "out" / "train-000900.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"train-000900\.tar is there and not from"):
        make(pictures, "out")
    assert (tmp_path / "out" / "train-000900.tar").read_bytes() == b"precious"


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "card deleted"])
def test_tars_that_are_indexed_are_no_shards_of_an_ingest(
    stopped: bool, tars: Path, make: Ingest, pictures: Path
) -> None:
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            index(Place.of(tars), progress=stop_at(2), **RECIPE)
    else:
        index(Place.of(tars), **RECIPE)
        (tars / "dataset.json").unlink()  # as it is told to index anew
    before = files_below(tars)
    with pytest.raises(UserError, match=r"an unfinished data index of .*/tars is here; name another folder"):
        make(pictures, "tars")
    (pictures / "cat" / "000.png").write_bytes(b"broken")
    with pytest.raises(UserError):
        make(pictures, "tars")
    assert files_below(tars) == before
    assert len(Reader(index(Place.of(tars), **RECIPE).split("train")).read_all()[0]) > 20


def test_an_ingest_does_not_write_over_its_source(tars: Path, make: Ingest) -> None:
    before = files_below(tars)
    with pytest.raises(UserError, match=r"data\.source lies in it under a name that a dataset has"):
        make(tars / "train-000000.tar", "tars")
    assert files_below(tars) == before


@pytest.mark.parametrize("change", [{"resize": "lanczos"}, {"drop_duplicates": True}, {"held_out": 0.3000001}])
def test_a_dataset_of_another_recipe_is_not_taken_for_the_one_asked_for(
    change: dict[str, Any], pictures: Path, make: Ingest, tmp_path: Path
) -> None:
    """Though its digest would be the same."""
    make(pictures)
    before = files_below(tmp_path / "dataset")
    with pytest.raises(UserError, match=rf"another dataset is here \(other {next(iter(change))}\); name another"):
        make(pictures, **change)
    assert files_below(tmp_path / "dataset") == before


def test_a_dataset_with_other_names_of_classes_is_not_taken_for_the_one_asked_for(pictures: Path, make: Ingest) -> None:
    make(pictures)
    (pictures / "dog").rename(pictures / "wolf")
    with pytest.raises(UserError, match=r"another dataset is here \(other classes\)"):
        make(pictures)


def test_a_dataset_that_another_process_finished_meanwhile_stays(
    pictures: Path, make: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is finished when the second has seen no card, and before it holds the lock."""
    lock, ended = Place.lock, threading.Event()

    @contextmanager
    def late_lock(place: Place, what: str, wait: bool = False) -> Iterator[None]:
        if not ended.is_set():
            ended.set()
            make(pictures, "out")
        with lock(place, what, wait):
            yield

    monkeypatch.setattr(Place, "lock", late_lock)
    with pytest.raises(UserError, match="another dataset is here"):
        make(pictures, "out", shard_images=20)
    assert verify(Dataset.open(Place.of(tmp_path / "out")).place).findings == ()
    make(pictures, "undisturbed")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "undisturbed")


def test_a_lock_that_was_opened_before_its_holder_ended_holds_nothing(
    pictures: Path, make: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ends between the second's opening the lock and its taking it; then the second keeps out a third."""
    flock, opened, ended = fcntl.flock, threading.Event(), threading.Event()
    refused: list[str] = []

    def late_flock(file: Any, how: int) -> None:
        if threading.current_thread() is second and not opened.is_set():
            opened.set()
            ended.wait(60)
        flock(file, how)

    def third(done: int, total: int) -> None:
        if done == 40 and not refused:
            refused.append("nothing")
            with pytest.raises(UserError) as error:
                make(pictures, "out")
            refused.append(str(error.value))

    second = threading.Thread(target=make, args=(pictures, "out"), kwargs={"progress": third})

    def start_second(done: int, total: int) -> None:
        second.start()
        opened.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", late_flock)
    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", progress=start_second)
    ended.set()
    second.join()
    assert "is being driven by process" in refused[-1]


def test_of_two_that_make_something_else_at_one_address_the_second_is_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: int
) -> None:
    """On S3, where there are no locks."""
    set_environment(monkeypatch, f"http://127.0.0.1:{server}")
    out = Place.of(f"s3://{BUCKET}/one")
    settings: dict[str, Any] = {"channels": 3, "held_out": 0.3, "shard_images": 8}
    refused: list[str] = []

    def second(done: int, total: int) -> None:
        if done >= 55 and not refused:
            for change in ({"image_size": 6}, {"image_size": 12, "shard_images": 5}):
                with pytest.raises(UserError) as error:
                    ingest(str(pictures), out, **{**settings, **change})
                refused.append(str(error.value))

    dataset = ingest(str(pictures), out, image_size=12, progress=second, **settings)
    assert ["of other images or settings; name another folder" in text for text in refused] == [True, True]
    assert verify(dataset.place).findings == ()
    local = ingest(str(pictures), Place.of(tmp_path / "local"), image_size=12, **settings)
    assert {name: (out / name).read() for name in out.list()} == files_below(local.place.path)


def test_what_was_begun_at_the_same_moment_at_one_address_is_not_committed_twice(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, server: int
) -> None:
    set_environment(monkeypatch, f"http://127.0.0.1:{server}")
    out = Place.of(f"s3://{BUCKET}/two")

    def take_over(done: int, total: int) -> None:
        if done >= 55:
            (out / "ingest.json").write_json({**(out / "ingest.json").read_json(), "identity": "another's"})

    with pytest.raises(UserError, match="another process was at work here meanwhile"):
        ingest(str(pictures), out, progress=take_over, image_size=12, channels=3, held_out=0.3, shard_images=8)
    assert not (out / "dataset.json").exists()


def test_a_refused_ingest_at_an_address_removes_nothing_else_there(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, server: int
) -> None:
    set_environment(monkeypatch, f"http://127.0.0.1:{server}")
    out = Place.of(f"s3://{BUCKET}/three")
    Image.fromarray(noise_picture(3)).save(pictures / "dog" / "zz.png")
    (pictures / "dog" / "zz.png").write_bytes((pictures / "dog" / "zz.png").read_bytes()[:90])

    def bring(done: int, total: int) -> None:
        (out / "notes.txt").write(b"mine")

    with pytest.raises(UserError, match="cannot be read as an image"):
        ingest(str(pictures), out, progress=bring, image_size=12, channels=3)
    assert out.list() == ["notes.txt"]


def test_an_option_without_effect_makes_no_other_dataset(tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw_pictures(tmp_path / "images" / split, range(6))
    with pytest.warns(UserWarning, match=r"held_out: has no effect"):
        first = ingest(str(tmp_path / "images"), Place.of(tmp_path / "out"), image_size=8, channels=3, held_out=0.4)
    again = ingest(str(tmp_path / "images"), Place.of(tmp_path / "out"), image_size=8, channels=3)
    assert again.digest == first.digest


def test_what_an_unfinished_work_of_other_settings_has_left_is_replaced_with_a_word(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "images", range(40))
    with pytest.raises(KeyboardInterrupt):
        ingest(
            str(tmp_path / "images"),
            Place.of(tmp_path / "out"),
            image_size=8,
            channels=3,
            shard_images=7,
            progress=stop_at(70),
        )
    with pytest.warns(UserWarning, match=r"an unfinished ingest of .*/images, of other .* is replaced"):
        ingest(str(tmp_path / "images"), Place.of(tmp_path / "out"), image_size=8, channels=3, shard_images=9)

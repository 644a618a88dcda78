"""Work that was killed, stopped or refused: what the next attempt takes over, and what it leaves behind."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.index import index
from pipelines.data.ingest import ingest
from pipelines.data.verify import verify
from pipelines.errors import UserError
from pipelines.store import Place
from tests.data.data_helpers import Ingest, draw_pictures, files_below, noise_picture, png, stop_at, write_tar
from tests.data.killing import RECIPE, VERBS


def write_tars(root: Path, count: int, images: int) -> None:
    for tar in range(count):
        numbers = range(tar * images, tar * images + images)
        root.mkdir(exist_ok=True)
        write_tar(root / f"{tar}.tar", {f"{i:04d}.png": png(noise_picture(i)) for i in numbers})


@pytest.mark.parametrize("verb", ["ingest", "index"])
def test_killed_at_any_change_on_disk_it_ends_with_the_files_of_an_undisturbed_one(verb: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if verb == "ingest":
        draw_pictures(source, range(16))
    else:
        write_tars(source, 2, 8)
    VERBS[verb](str(source), Place.of(tmp_path / "undisturbed"))
    undisturbed = files_below(tmp_path / "undisturbed")
    (tmp_path / "killed").mkdir()
    call = [sys.executable, "-W", "ignore", "-m", "tests.data.killing", verb, str(source), str(tmp_path / "killed")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = sorted((tmp_path / "killed").iterdir())
    assert len(killed) > 30
    for out in killed:
        VERBS[verb](str(source), Place.of(out))
        assert files_below(out) == undisturbed, out.name


@pytest.mark.parametrize("changed", [1 - np.arange(40) % 2, np.arange(40) % 5], ids=["corrected", "new class"])
def test_labels_that_were_corrected_after_a_stop_are_those_of_the_dataset(
    changed: np.ndarray, make: Ingest, tmp_path: Path
) -> None:
    images, file = np.stack([noise_picture(i) for i in range(40)]), tmp_path / "set.npz"
    np.savez(file, images=images, labels=np.arange(40) % 2)
    with pytest.raises(KeyboardInterrupt):
        make(file, "out", progress=stop_at(55))
    np.savez(file, images=images, labels=changed)
    make(file, "out")
    make(file, "undisturbed")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "undisturbed")


def test_names_that_were_changed_after_a_stop_are_those_of_the_dataset(
    pictures: Path, make: Ingest, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", progress=stop_at(70))
    (pictures / "dog").rename(pictures / "wolf")  # sorted to where it was, with the same labels
    make(pictures, "out")
    make(pictures, "undisturbed")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "undisturbed")


def test_a_shard_that_another_attempt_has_written_over_is_not_taken_for_ones_own(
    pictures: Path, make: Ingest, tmp_path: Path
) -> None:
    """The other one, of another resize, was killed when it had written the first shard, which has the same size, and
    not yet its record."""
    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", image_size=6, resize="area", progress=stop_at(70))
    code = f"""
import os, signal
from pipelines.data.ingest import ingest
from pipelines.store import Place
real = os.replace
def replace(old, new):
    real(old, new)
    if str(new).endswith("train-000000.parquet"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
ingest({str(pictures)!r}, Place.of({str(tmp_path / "out")!r}),
       image_size=6, channels=3, held_out=0.3, shard_images=8, resize="lanczos")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    make(pictures, "out", image_size=6, resize="area")
    make(pictures, "undisturbed", image_size=6, resize="area")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "undisturbed")


def test_an_index_that_another_attempt_has_written_over_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", 4, 10)
    tars, out = Place.of(tmp_path / "tars"), Place.of(tmp_path / "out")
    for resize in ("area", "lanczos"):
        with pytest.raises(KeyboardInterrupt):
            index(tars, out, resize=resize, progress=stop_at(3), **RECIPE)
    dataset = index(tars, out, resize="area", **RECIPE)
    assert verify(dataset.place).findings == ()
    index(tars, Place.of(tmp_path / "undisturbed"), resize="area", **RECIPE)
    assert files_below(out.path) == files_below(tmp_path / "undisturbed")


def test_a_broken_image_costs_nothing_that_was_finished(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(pictures, "out", progress=stop_at(70))
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.tar")}
    assert len(finished) > 2
    whole = (pictures / "cat" / "000.png").read_bytes()
    (pictures / "cat" / "000.png").write_bytes(whole[:40])  # as when it is just being copied
    with pytest.raises(UserError, match=r"cat/000\.png: cannot be read as an image"):
        make(pictures, "out")
    (pictures / "cat" / "000.png").write_bytes(whole)
    make(pictures, "out")
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    make(pictures, "undisturbed")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "undisturbed")


def test_what_cannot_be_leaves_a_folder_as_it_was(pictures: Path, make: Ingest, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (pictures / "dog" / "zz.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(UserError, match="cannot be read as an image"):
        make(pictures, "out")
    assert files_below(tmp_path / "out") == {"notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read as an image"):
        make(pictures, "empty")
    assert (tmp_path / "empty").is_dir()
    assert files_below(tmp_path / "empty") == {}


def test_records_grow_with_the_images_and_not_with_the_largest_label(make: Ingest, tmp_path: Path) -> None:
    labels = [*range(11), 50_000]
    np.savez(tmp_path / "set.npz", images=np.stack([noise_picture(i) for i in range(12)]), labels=labels)
    recorded: list[int] = []

    def weigh(done: int, total: int) -> None:
        if done == total:
            recorded.append(sum(len(data) for name, data in files_below(tmp_path / "out").items() if "json" in name))

    dataset = make(tmp_path / "set.npz", "out", shard_images=1, held_out=0.0, progress=weigh)
    assert recorded[0] < 20_000
    counts = dataset.card["splits"]["train"]["per_class"]
    assert [label for label, count in enumerate(counts) if count] == labels
    assert (len(counts), sum(counts)) == (50_001, 12)


def test_a_held_out_set_that_was_published_keeps_its_copies(tmp_path: Path) -> None:
    for split, numbers in (("train", [1, 2, 3, 3, 11]), ("test", [10, 11, 11, 12])):
        (tmp_path / "set" / split).mkdir(parents=True)
        for place, number in enumerate(numbers):
            Image.fromarray(noise_picture(number)).save(tmp_path / "set" / split / f"{place}.png")
    with pytest.warns(UserWarning, match=r"exact copies of other images: 2, .* \(dropped, as asked\)"):
        dataset = ingest(
            str(tmp_path / "set"), Place.of(tmp_path / "out"), image_size=12, channels=3, drop_duplicates=True
        )
    assert (len(dataset.split("train")), len(dataset.split("held-out"))) == (3, 4)

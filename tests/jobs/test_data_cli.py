"""`ddpm ingest` and `ddpm data index` as a person meets them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.store import Place
from tests.data.data_helpers import draw_pictures, noise_picture, png, write_tar
from tests.jobs.test_cli import assert_refused, ddpm

SIZE = ("--image-size", "8")


def test_ingest_takes_every_option_of_the_recipe(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", range(30))
    for name in ("a.png", "b.png"):
        Image.fromarray(noise_picture(3)).save(tmp_path / "pictures" / name)
    options = ("--channels", "3", "--resize", "lanczos", "--held-out", "0", "--shard-images", "7", "--drop-duplicates")
    done = ddpm("ingest", "pictures", "out", *SIZE, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["out"], told["resize"], told["held_out"]) == (str(tmp_path / "out"), "lanczos", 0)
    assert told["splits"]["train"]["samples"] == 30
    assert (told["duplicates"]["copies"], told["duplicates"]["dropped"]) == (2, True)
    assert "exact copies of other images: 2" in done.stderr
    images, _ = Reader(Dataset.open(Place.of(tmp_path / "out")).split("train")).read_all()
    resized = Image.fromarray(noise_picture(0)).resize((8, 8), Image.Resampling.LANCZOS)
    assert any(np.array_equal(image, np.asarray(resized)) for image in images)
    again = ddpm("ingest", "pictures", "out", *SIZE, *options, "--workers", "2", "--json", cwd=tmp_path)
    assert json.loads(again.stdout.splitlines()[-1]) == told


def test_what_cannot_be_ingested_or_indexed_is_one_line(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", range(4))
    assert_refused(ddpm("ingest", "pictures", "out", *SIZE, "--resize", "cubic", cwd=tmp_path), "--resize", "cubic")
    assert_refused(ddpm("ingest", "pictures", "out", *SIZE, "--workers", "0", cwd=tmp_path), "--workers: 0")
    assert_refused(ddpm("ingest", "pictures", "pictures/out", *SIZE, cwd=tmp_path), "lies inside SOURCE")
    assert_refused(ddpm("data", "index", "pictures", *SIZE, cwd=tmp_path), "there is no .tar below")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", range(40))
    words = [sys.executable, "-m", "jobs", "ingest", "pictures", "out", *SIZE]
    done = subprocess.run(  # a file may have 8 KiB
        ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ddpm: failed: ")
    assert "out: File too large; what is done is kept" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_tars_are_indexed_and_looked_at(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", {f"{i}.png": png(noise_picture(i)) for i in range(20)})
    done = ddpm("data", "index", "tars", *SIZE, "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["out"], told["tars"]) == (str(tmp_path / "out"), str(tmp_path / "tars"))
    assert sum(split["samples"] for split in told["splits"].values()) == 20
    for words in (("info", "out"), ("verify", "out", "--workers", "1"), ("preview", "out"), ("diff", "out", "out")):
        looked = ddpm("data", *words, cwd=tmp_path)
        assert looked.returncode == 0, looked.stderr
    (tmp_path / "tars" / "0.tar").unlink()
    damaged = ddpm("data", "verify", "out", cwd=tmp_path)
    assert damaged.returncode == 1
    assert "0.tar: is missing" in damaged.stdout

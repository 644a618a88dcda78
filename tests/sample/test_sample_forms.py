"""What becomes of a job's images beside its shards: other forms, single images again, a strip of one coming to be."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cluster import Cluster
from pipelines.data.shards import members
from pipelines.data.sources import open_source
from pipelines.errors import UserError
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample import (
    Samples,
    Studio,
    draw_trajectory,
    other_forms,
    read_samples,
    sample_images,
    sample_job,
    write_form,
)
from pipelines.sample.job import job_at
from pipelines.sample.singles import trace
from pipelines.store import Place
from tests.s3_faults import FaultyProxy
from tests.sample.conftest import SETTINGS, NoCluster, changed, copied, draw, files_of, moved, studio, untrained


@pytest.fixture(scope="module")
def pixels(forty: Samples) -> np.ndarray:
    return np.concatenate(list(read_samples(forty, 40)))


def members_of(samples: Samples) -> dict[str, bytes]:
    shards = sorted(Path(samples.out).glob("*.tar"))
    return {name: data for shard in shards for name, data in members(shard.read_bytes())}


def test_png_files_are_those_of_the_shards_and_of_as_many_images_as_are_asked_for(
    forty: Samples, tmp_path: Path
) -> None:
    samples = moved(forty, tmp_path)
    bulk = members_of(forty)
    for n in (40, 20):
        folder = Path(write_form(replace(samples, n=n), "png"))
        expected = {name: data for name, data in bulk.items() if int(name.split(".")[0]) < n}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_forms_of_another_number_of_images_are_told_of(forty: Samples, tmp_path: Path) -> None:
    samples = moved(forty, tmp_path)
    for form in ("png", "parquet"):
        write_form(samples, form)
    assert other_forms(samples) == []
    fewer = replace(samples, n=20)
    write_form(fewer, "png")
    (line,) = other_forms(fewer)
    assert "`--format parquet` has written there has 40 and not 20 images" in line


def test_single_images_beside_those_of_a_form_are_told_of_and_files_of_others_stay(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    samples = moved(forty, tmp_path)
    fewer = replace(samples, n=20)
    folder = Path(write_form(fewer, "png"))
    (folder / "notes.txt").write_text("mine")
    for index, told in ((17, 0), (33, 1)):
        sample_images(model, SETTINGS, [index], Place.of(samples.out), studio(cluster))
        assert len(other_forms(fewer)) == told
    write_form(fewer, "png")
    assert other_forms(fewer) == []
    assert {path.name for path in folder.iterdir()} == {"notes.txt", *(f"{i:09d}.png" for i in range(20))}


def test_forms_and_pictures_are_written_by_who_holds_the_job(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    """Another command deletes what it takes for left half-written."""
    samples = moved(forty, tmp_path)
    with job_at(Place.of(samples.out)).held():
        with pytest.raises(UserError, match="sampling into"):
            write_form(samples, "parquet")
        with pytest.raises(UserError, match="sampling into"):
            draw_trajectory(model, SETTINGS, [17], Place.of(samples.out), studio(cluster))


def test_on_s3_forms_have_the_same_bytes(
    model: Model, forty: Samples, proxy: FaultyProxy, stock: Any, tmp_path: Path
) -> None:
    there, here = Place.of("s3://bucket/out"), moved(forty, tmp_path)
    for name, data in files_of(forty.out).items():
        stock.put_object(Bucket="bucket", Key=f"out/{name}", Body=data)
    served = sample_job(model, SETTINGS, 20, there, Studio(NoCluster(), 1, {}, Progress()))
    fewer = replace(here, n=20)
    for form in ("png", "npz", "parquet"):
        write_form(served, form)
        write_form(fewer, form)
    assert {name: (there / name).read() for name in there.find("")} == files_of(here.out)


def test_npz_has_three_channels_and_classes_as_the_evaluator_of_guided_diffusion_reads_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    conditional = untrained(model__classes=10, train__label_dropout=0.1)
    samples = draw(conditional, 20, tmp_path / "out", cluster, labels=(7, 3))
    file = write_form(samples, "npz")
    with np.load(file) as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    expected = np.concatenate(list(read_samples(samples, 20)))
    assert images.shape == (20, 8, 8, 3)
    assert images.dtype == np.uint8
    assert all(np.array_equal(images[..., c], expected[..., 0]) for c in range(3))
    assert labels.tolist() == [7, 3] * 10
    assert pq.read_table(write_form(samples, "parquet"))["label"].to_pylist() == [7, 3] * 10
    with zipfile.ZipFile(file) as archive:  # it streams over an entry that is not packed
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED


def test_a_table_is_one_that_an_ingest_reads(forty: Samples, pixels: np.ndarray, tmp_path: Path) -> None:
    file = write_form(moved(forty, tmp_path), "parquet")
    table = pq.read_table(file)
    assert table["index"].to_pylist() == list(range(40))
    assert set(table["seed"].to_pylist()) == {3}
    source = open_source(file)
    assert len(source) == 40
    assert np.array_equal(np.asarray(source.load(17)), pixels[17, ..., 0])


def test_forms_have_the_images_that_were_asked_for_and_the_same_bytes_each_time(forty: Samples, tmp_path: Path) -> None:
    fewer = replace(moved(forty, tmp_path), n=20)
    for form, count in (("npz", lambda f: len(np.load(f)["arr_0"])), ("parquet", lambda f: pq.read_table(f).num_rows)):
        first = Path(write_form(fewer, form)).read_bytes()
        assert count(io.BytesIO(first)) == 20
        assert Path(write_form(fewer, form)).read_bytes() == first
    with pytest.raises(UserError, match="only png, npz, parquet"):
        write_form(fewer, "gif")


def test_single_images_are_those_of_the_bulk_job_byte_by_byte(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    again = sample_images(model, SETTINGS, [33, 17, 33], Place.of(tmp_path / "out"), studio(cluster))
    bulk = members_of(forty)
    assert list(again.images) == [17, 33]
    for index, file in again.images.items():
        assert Path(file).read_bytes() == bulk[f"{index:09d}.png"]
    with pytest.raises(UserError, match="differs in steps"):
        sample_images(model, changed(steps=5), [17], Place.of(tmp_path / "out"), studio(cluster))
    with pytest.raises(UserError, match="counted from 0"):
        sample_images(model, SETTINGS, [-1], Place.of(tmp_path / "other"), studio(cluster))


def test_a_trajectory_ends_in_the_jobs_images(
    model: Model, forty: Samples, pixels: np.ndarray, cluster: Cluster, tmp_path: Path
) -> None:
    place = Place.of(copied(forty, tmp_path))
    frames, times = trace(model, SETTINGS, [33, 17], place, studio(cluster))
    assert np.array_equal(frames[:, -1], pixels[[17, 33]])
    assert times[-1] == 0
    assert sorted(times, reverse=True) == times
    assert not np.array_equal(frames[:, 0], frames[:, -1])
    picture = draw_trajectory(model, SETTINGS, [17, 33], place, studio(cluster))
    shown = np.asarray(Image.open(str(picture)).convert("RGB"))
    assert shown.shape[0] > 200
    assert shown.std() > 10


def test_classes_are_given_in_turn_or_follow_the_datas_whatever_n_is() -> None:
    assert changed(labels=(2, 0)).labels_of(3, range(20)) == [2, 0] * 10
    drawn = changed(class_counts=(70, 0, 30)).labels_of(3, range(100))
    assert drawn is not None
    assert 1 not in drawn
    for n in (10, 30, 100):
        assert abs(drawn[:n].count(0) - 0.7 * n) <= 1.5
    assert changed(class_counts=(70, 0, 30)).labels_of(3, range(40, 60)) == drawn[40:60]


def test_a_spec_is_told_of_classes_that_the_model_does_not_know() -> None:
    for fields, said in (
        ({"sample__labels": [3]}, "the model has no classes"),
        ({"sample__labels": [3], "model__classes": 3}, "3 is no class of the model, which has 3"),
    ):
        with pytest.raises(UserError, match=said):
            untrained(**fields)

"""Bulk sampling: bytes do not depend on n, on the pool, or on what was there before; another job is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from ddpm_core import noise, sample
from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_pixels
from pipelines.data.reader import Reader
from pipelines.data.verify import verify
from pipelines.errors import UserError
from pipelines.models import Model
from pipelines.sample import Samples, read_samples
from pipelines.store import Place
from tests.sample.conftest import draw, files_of


def test_images_are_those_of_the_core_by_their_seeds(model: Model, forty: Samples) -> None:
    torch.set_num_threads(1)
    process, unet = model.build()
    expected = to_pixels(
        torch.cat(
            [
                sample(process, unet, (1, 8, 8), [noise.key(3, "image", i) for i in range(c * 16, c * 16 + 16)],
                       sampler="ddim", steps=4, eta=0.5)
                for c in range(3)
            ]
        )
    )  # fmt: skip
    assert np.array_equal(np.concatenate(list(read_samples(forty, 40))), expected[:40])


def copied(samples: Samples, folder: Path) -> Path:
    """A job's place, elsewhere."""
    return Path(shutil.copytree(samples.out, folder / "out"))


def test_one_actor_and_growing_n_leave_the_same_files(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    for n in (10, 35):
        draw(model, n, tmp_path / "out", cluster, workers=1)
        assert not verify(Place.of(tmp_path / "out")).findings
    assert {name for name in files_of(tmp_path / "out") if "first" in name} == {
        "chunks/000002-first-3.json",
        "samples-000002-first-3.parquet",
        "samples-000002-first-3.tar",
    }
    grown = draw(model, 40, tmp_path / "out", cluster, workers=1)
    assert grown.sha256 == forty.sha256
    assert files_of(tmp_path / "out") == files_of(forty.out)


def test_only_missing_chunks_are_made_and_damage_counts_as_missing(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out = copied(forty, tmp_path)
    kept = os.stat(out / "samples-000000.tar").st_mtime_ns
    (out / "chunks" / "000001.json").unlink()  # killed between shard and record
    torn = bytearray((out / "samples-000002-first-8.tar").read_bytes())
    torn[torn.index(b"IDAT") + 10] ^= 1
    (out / "samples-000002-first-8.tar").write_bytes(torn)  # the disk's doing
    found = [str(finding) for finding in verify(Place.of(out)).findings]
    assert any("000000032.png" in finding for finding in found)
    again = draw(model, 40, out, cluster)
    assert (again.sha256, again.made) == (forty.sha256, 24)
    assert files_of(out) == files_of(forty.out)
    assert os.stat(out / "samples-000000.tar").st_mtime_ns == kept


def test_chunks_of_which_a_file_was_cut_short_are_made_again(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out = copied(forty, tmp_path)
    for file in ("samples-000000.tar", "samples-000001.parquet", "chunks/000002-first-8.json"):
        (out / file).write_bytes((out / file).read_bytes()[:300])
    assert draw(model, 40, out, cluster).made == 40
    assert files_of(out) == files_of(forty.out)


def test_a_smaller_n_is_served_without_a_cluster_and_changes_nothing(model: Model, forty: Samples) -> None:
    class NoCluster(Cluster):
        def connect(self) -> None:
            raise AssertionError("nothing to make")

    before = files_of(forty.out)
    fewer = draw(model, 20, Path(forty.out), NoCluster(None))
    first = np.concatenate(list(read_samples(fewer, 20)))
    assert np.array_equal(first, np.concatenate(list(read_samples(forty, 40)))[:20])
    assert files_of(forty.out) == before


def test_fewer_of_what_a_larger_job_has_left_unfinished_are_a_dataset_of_so_many(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out = copied(forty, tmp_path)
    draw(model, 48, out, cluster)
    for name in ("manifest.json", "dataset.json", "shards.parquet"):  # as if killed before its end
        (out / name).unlink()
    fewer = draw(model, 40, out, cluster)
    assert (fewer.sha256, fewer.made) == (forty.sha256, 0)
    assert len(Dataset.open(Place.of(out)).split("train")) == 40


@pytest.mark.parametrize("other", [{"seed": 4}, {"steps": 5}, {"chunk": 8}, {"threads": 2}, {"device": "cuda"}])
def test_another_job_in_the_same_place_is_refused(
    model: Model, forty: Samples, cluster: Cluster, other: dict[str, int]
) -> None:
    with pytest.raises(UserError, match=f"differs in {next(iter(other))}"):
        draw(model, 40, Path(forty.out), cluster, **other)


def test_a_folder_with_other_files_is_refused_untouched(model: Model, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        draw(model, 5, tmp_path, cluster)
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_the_stock_library_reads_the_shards(forty: Samples) -> None:
    shards = sorted(str(p) for p in Path(forty.out).glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [s["json"]["index"] for s in samples] == list(range(40))
    images = np.concatenate(list(read_samples(forty, 40)))
    assert np.array_equal(samples[17]["png"][..., 0], images[17, ..., 0])


def test_the_shards_are_a_whole_dataset_that_our_own_reader_reads(forty: Samples) -> None:
    dataset = Dataset.open(Place.of(forty.out))
    assert not verify(dataset.place).findings
    assert dataset.digest == json.loads((Path(forty.out) / "manifest.json").read_text())["dataset_digest"]
    pixels, labels = Reader(dataset.split("train")).read_all()
    assert np.array_equal(pixels, np.concatenate(list(read_samples(forty, 40))))
    assert set(labels.tolist()) == {-1}

"""Bulk sampling: bytes do not depend on n, on the pool, or on what was there before; another job is refused."""

import hashlib
import json
import os
from pathlib import Path
from socket import gethostname
from typing import Any

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
from pipelines.errors import Failed, UserError
from pipelines.models import Model
from pipelines.sample import Samples, bulk, read_samples, sample_job
from pipelines.sample.artist import Artist, commit
from pipelines.sample.bulk import claimed
from pipelines.sample.job import Job, Part
from pipelines.store import Place
from tests.sample.conftest import SETTINGS, NoCluster, Said, copied, draw, files_of, studio, untrained


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


def test_one_actor_and_growing_n_leave_the_same_files(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    for n in (10, 35):
        draw(model, n, tmp_path / "out", cluster)
        assert not verify(Place.of(tmp_path / "out")).findings
    assert {name for name in files_of(tmp_path / "out") if "first" in name} == {
        "chunks/000002-first-3.json",
        "samples-000002-first-3.parquet",
        "samples-000002-first-3.tar",
    }
    grown = draw(model, 40, tmp_path / "out", cluster)
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


def test_chunks_of_which_a_file_is_cut_short_or_anothers_are_made_again(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out = copied(forty, tmp_path)
    for file in ("samples-000000.tar", "chunks/000002-first-8.json"):
        (out / file).write_bytes((out / file).read_bytes()[:300])
    for file in ("samples-00000{}.parquet", "chunks/00000{}.json"):
        (out / file.format(1)).write_bytes((out / file.format(0)).read_bytes())
    assert draw(model, 40, out, cluster).made == 40
    assert files_of(out) == files_of(forty.out)


def test_a_commit_record_that_was_changed_in_any_field_is_none(model: Model, forty: Samples, tmp_path: Path) -> None:
    whole = json.loads((Path(forty.out) / "chunks" / "000000.json").read_text())
    (tmp_path / "changed" / "chunks").mkdir(parents=True)
    for section, field in [*((None, field) for field in whole), *(("shard", field) for field in whole["shard"])]:
        record = json.loads(json.dumps(whole))
        inside = record[section] if section else record
        inside[field] = 7 if inside[field] != 7 else 8
        (tmp_path / "changed" / "chunks" / "000000.json").write_text(json.dumps(record))
        assert job_of(model, tmp_path / "changed").committed(Part(0, 16, 16)) is None, field
    assert job_of(model, Path(forty.out)).committed(Part(0, 16, 16)) is not None


def job_of(model: Model, out: Path) -> Job:
    return Job(Place.of(out), SETTINGS, model.identity, model.digest, None)


@pytest.mark.parametrize("left", [b"", b"[1]", b"{}", None])
def test_a_job_whose_own_file_was_damaged_goes_on_and_another_is_refused_still(
    model: Model, forty: Samples, tmp_path: Path, left: bytes | None
) -> None:
    out = copied(forty, tmp_path)
    (out / "job.json").unlink()
    if left is not None:
        (out / "job.json").write_bytes(left)
    with pytest.raises(UserError, match="holds no sampling job"):
        draw(model, 40, out, NoCluster(), seed=4)
    assert draw(model, 40, out, NoCluster()).sha256 == forty.sha256
    assert json.loads((out / "job.json").read_text())["seed"] == 3


def test_a_smaller_n_is_served_without_a_cluster_and_changes_nothing(model: Model, forty: Samples) -> None:
    before = files_of(forty.out)
    fewer = draw(model, 20, Path(forty.out), NoCluster())
    first = np.concatenate(list(read_samples(fewer, 20)))
    assert np.array_equal(first, np.concatenate(list(read_samples(forty, 40)))[:20])
    assert (fewer.n, fewer.made) == (20, 0)
    assert fewer.sha256 == hashlib.sha256(first.tobytes()).hexdigest()
    assert files_of(forty.out) == before


def test_a_smaller_n_makes_what_is_damaged_of_a_larger_job_as_large_as_it_was(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out, said = copied(forty, tmp_path), Said()
    (out / "samples-000001.tar").write_bytes(b"")
    (out / "chunks" / "000000.json").unlink()  # as if killed when it was to be made again
    place = Place.of(out)
    assert sample_job(model, SETTINGS, 20, place, studio(cluster, 1, said)).n == 20
    assert said.lines == [f"{place}: 1 damaged chunk made again"]
    assert files_of(out) == files_of(forty.out)


def test_of_a_larger_job_that_is_not_done_the_damaged_chunk_is_made_whole(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out = copied(forty, tmp_path)
    (out / "manifest.json").unlink()
    whole = (out / "samples-000001.tar").read_bytes()
    (out / "samples-000001.tar").write_bytes(whole[:700])
    assert draw(model, 20, out, cluster).sha256 == draw(model, 20, Path(forty.out), NoCluster()).sha256
    assert (out / "samples-000001.tar").read_bytes() == whole


def test_who_draws_where_bits_may_differ_is_told_of(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out, said = copied(forty, tmp_path), Said()
    first = json.loads((out / "environment.json").read_text())
    assert first["device"] == "cpu"
    (out / "environment.json").write_text(json.dumps({**first, "torch": "1.0"}))
    (out / "chunks" / "000001.json").unlink()
    sample_job(model, SETTINGS, 40, Place.of(out), studio(cluster, 1, said))
    (line,) = said.lines
    assert "may differ from those of the first images: torch 1.0 is" in line


def test_a_host_that_cannot_write_there_is_named(model: Model, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shared = (cluster.connect().put(model),)
    with pytest.raises(Failed, match=f"cannot be written to on {gethostname()} .*share"):
        Artist(job_of(model, tmp_path / "file" / "out")).do(shared, Part(0, 16, 16))


def test_what_another_has_committed_is_not_written_over(
    model: Model, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was while this one drew, and of more images."""
    job, shared = job_of(model, tmp_path / "out"), (cluster.connect().put(model),)

    def drawn(self: Artist, shared: Any, chunk: int) -> Any:
        pixels = np.full((16, 8, 8, 1), 7, dtype=np.uint8)
        commit(job, Part(0, 16, 16), pixels)
        return pixels + 1

    monkeypatch.setattr(Artist, "drawn", drawn)
    Artist(job).do(shared, Part(0, 16, 16))
    Artist(job).do(shared, Part(0, 3, 16))
    assert (job.pixels(Part(0, 16, 16)) == 7).all()
    assert job.stems() == {"000000"}


def test_fewer_of_what_a_larger_job_has_left_unfinished_are_served_and_it_goes_on(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    """Its chunks stay: nothing that was drawn is drawn again."""
    out = copied(forty, tmp_path)
    whole = draw(model, 48, out, cluster)
    expected = files_of(out)
    for name in ("manifest.json", "dataset.json", "shards.parquet"):  # as if killed before its end
        (out / name).unlink()
    fewer = draw(model, 40, out, NoCluster())
    assert (fewer.sha256, fewer.made, fewer.sheet) == (forty.sha256, 0, None)
    assert not (out / "dataset.json").exists()
    again = draw(model, 48, out, NoCluster())
    assert (again.sha256, again.made) == (whole.sha256, 0)
    assert files_of(out) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"steps": 5},
        {"chunk": 8},
        {"threads": 2},
        {"device": "cuda"},
        {"eta": 0.0},
        {"sampler": "dpmpp_2m"},
        {"guidance": 2.0},
    ],
)
def test_another_job_in_the_same_place_is_refused(model: Model, forty: Samples, other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"differs in {next(iter(other))}"):
        draw(model, 40, Path(forty.out), NoCluster(), **other)


def test_another_model_in_the_same_place_is_refused(forty: Samples) -> None:
    with pytest.raises(UserError, match="differs in model, model_digest"):
        draw(untrained(model__channels=[8, 8]), 40, Path(forty.out), NoCluster())


def test_a_folder_with_other_files_is_refused_untouched(model: Model, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        draw(model, 5, tmp_path, NoCluster())
    assert os.listdir(tmp_path) == ["letter.txt"]


@pytest.mark.parametrize("out", ["file", "file/below", "n" * 300], ids=["file", "below-a-file", "long"])
def test_a_place_that_cannot_be_a_folder_is_named(model: Model, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*name (a|another) folder"):
        draw(model, 5, tmp_path / out, NoCluster())


def test_a_job_that_cannot_be_drawn_leaves_nothing(model: Model, cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample\.threads: 99 threads"):
        draw(model, 5, tmp_path / "out", cluster, threads=99)
    assert list((tmp_path / "out").iterdir()) == []


def test_of_two_commands_at_once_one_is_refused(model: Model, cluster: Cluster, tmp_path: Path) -> None:
    place = Place.of(tmp_path / "out")
    with (
        claimed(job_of(model, tmp_path / "out"), model, studio(cluster)),
        pytest.raises(UserError, match=f"sampling into {place}"),
    ):
        draw(model, 5, tmp_path / "out", cluster)


def test_what_processes_write_has_to_be_seen_here(
    model: Model, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else hosts have each a folder of this name: here because what they committed cannot be read back."""
    monkeypatch.setattr(bulk, "_SEEN_SECONDS", 0.5)
    monkeypatch.setattr(Job, "committed", lambda self, part: None)
    with pytest.raises(Failed, match="is not seen here; name a folder that all hosts of the cluster share"):
        draw(model, 5, tmp_path / "out", cluster)


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

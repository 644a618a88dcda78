"""Bulk sampling: bytes do not depend on n, on the pool, or on what was there before; another job is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from ddpm_core import noise, sample
from pipelines.build import build_model
from pipelines.cluster import Cluster
from pipelines.data.pixels import to_pixels
from pipelines.drawing import Settings
from pipelines.errors import UserError
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample import Samples, read_samples, sample_job
from pipelines.sections import Sample
from pipelines.spec import Spec
from pipelines.store import Place
from tests.conftest import tiny_spec

SETTINGS = Settings.of(Sample(sampler="ddim", steps=4, eta=0.5, chunk=16), seed=3)


@pytest.fixture(scope="module")
def model() -> Model:
    """Untrained but not blank: the last layers, zero at first, get numbers too."""
    spec: Spec = tiny_spec()
    weights = {
        name: value + 0.05 * noise.normal([noise.key(1, name)], tuple(value.shape))[0]
        for name, value in build_model(spec).state_dict().items()
    }
    return Model(spec, safetensors.torch.save(weights), "no-data", "test", "none")


def draw(model: Model, n: int, out: Path, cluster: Cluster, workers: int = 2, **settings: object) -> Samples:
    chosen = Settings(**{**SETTINGS.__dict__, **settings})  # type: ignore[arg-type]
    return sample_job(model, chosen, n, Place.of(out), cluster, workers, Progress())


@pytest.fixture(scope="module")
def forty(model: Model, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return draw(model, 40, tmp_path_factory.mktemp("samples") / "forty", cluster)


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


def test_one_actor_and_growing_n_make_the_same_bytes(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    draw(model, 10, tmp_path / "out", cluster, workers=1)
    grown = draw(model, 40, tmp_path / "out", cluster, workers=1)
    assert grown.sha256 == forty.sha256
    for name in sorted(os.listdir(forty.out)):
        if name.endswith(".tar"):
            assert (tmp_path / "out" / name).read_bytes() == (Path(forty.out) / name).read_bytes()


def test_only_missing_chunks_are_made_and_damage_counts_as_missing(
    model: Model, forty: Samples, cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    draw(model, 40, out, cluster)
    kept = os.stat(out / "samples-000000.tar").st_mtime_ns
    (out / "chunks" / "000001.json").unlink()  # killed between shard and record
    torn = bytearray((out / "samples-000002.tar").read_bytes())
    torn[700] ^= 1
    (out / "samples-000002.tar").write_bytes(torn)  # the disk's doing
    again = draw(model, 40, out, cluster)
    assert again.sha256 == forty.sha256
    assert os.stat(out / "samples-000000.tar").st_mtime_ns == kept


def test_a_smaller_n_is_served_without_a_cluster(model: Model, forty: Samples) -> None:
    class NoCluster(Cluster):
        def connect(self) -> None:
            raise AssertionError("nothing to make")

    fewer = draw(model, 20, Path(forty.out), NoCluster(None))
    first = np.concatenate(list(read_samples(fewer, 20)))
    assert np.array_equal(first, np.concatenate(list(read_samples(forty, 40)))[:20])


@pytest.mark.parametrize("other", [{"seed": 4}, {"steps": 5}, {"chunk": 8}, {"threads": 2}])
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

"""A model that draws something without being trained, and a finished job of 40 images in chunks of 16."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from ddpm_core import noise
from pipelines.build import build_model
from pipelines.cluster import Cluster
from pipelines.drawing import Settings
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample import Samples, Studio, sample_job
from pipelines.sections import Sample
from pipelines.store import Place
from tests.conftest import tiny_spec

SETTINGS = Settings.of(Sample(sampler="ddim", steps=4, eta=0.5, chunk=16), seed=3)


def untrained(**overrides: Any) -> Model:
    """Not blank: the last layers, zero at first, get numbers too."""
    spec = tiny_spec(**overrides)
    weights = {
        name: value + 0.05 * noise.normal([noise.key(1, name)], tuple(value.shape))[0]
        for name, value in build_model(spec).state_dict().items()
    }
    return Model(spec, safetensors.torch.save(weights), "no-data", "test", "none")


def studio(cluster: Cluster, workers: int = 1, progress: Progress | None = None) -> Studio:
    return Studio(cluster, workers, {}, progress or Progress())


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def changed(**fields: Any) -> Settings:
    return Settings(**{**SETTINGS.__dict__, **fields})


def draw(model: Model, n: int, out: Path, cluster: Cluster, workers: int = 1, **settings: Any) -> Samples:
    return sample_job(model, changed(**settings), n, Place.of(out), studio(cluster, workers))


@pytest.fixture(scope="session")
def model() -> Model:
    return untrained()


@pytest.fixture(scope="session")
def forty(model: Model, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Not to be written into: `copied` gives one that may."""
    return draw(model, 40, tmp_path_factory.mktemp("samples") / "forty", cluster, workers=2)


def copied(samples: Samples, folder: Path) -> Path:
    """A job's place, elsewhere."""
    return Path(shutil.copytree(samples.out, folder / "out"))


def moved(samples: Samples, folder: Path) -> Samples:
    """A job's copy, and what is known of it."""
    return replace(samples, out=str(copied(samples, folder)))


class NoCluster(Cluster):
    """For what is to be done without one."""

    def __init__(self) -> None:
        super().__init__(None)

    def connect(self) -> None:
        raise AssertionError("nothing is to be made")


def files_of(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every file of a job's place, but for its lock."""
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.name != ".lock"}

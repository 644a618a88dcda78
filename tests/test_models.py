"""A model is its weights and what is done with them: what draws other images is another model."""

from dataclasses import replace
from pathlib import Path

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.drawing import Settings
from pipelines.models import Model
from pipelines.pipeline import evaluate_step
from pipelines.sample import Job
from pipelines.sections import Sample
from pipelines.session import Session
from pipelines.store import Place
from tests.conftest import tiny_spec

SETTINGS = Settings.of(Sample(sampler="ancestral", steps=4))


def model(**diffusion: str) -> Model:
    fields = {"timesteps": 50, "schedule": {"kind": "cosine"}, **diffusion}
    return Model(tiny_spec(diffusion=fields), b"the same weights", "no-data", "test", "none")


def small_dataset(place: Place) -> Dataset:
    return ingest("digits", place, image_size=8, channels=1, held_out=0.4, shard_images=1000)


def test_the_same_weights_used_otherwise_are_another_model(session: Session, tmp_path: Path) -> None:
    """The variance of the reverse step trains nothing, so that two runs end with the same weights."""
    small, large = model(), model(variance="large")
    assert small.digest == large.digest
    assert small.identity != large.identity
    assert small.identity == replace(model(), origin="elsewhere").identity
    dataset = small_dataset(session.store / "data")
    steps = [evaluate_step(m.spec, dataset, m, session) for m in (small, large)]
    assert steps[0].key != steps[1].key
    jobs = [Job(Place.of(tmp_path), SETTINGS, m.identity, m.digest).record() for m in (small, large)]
    assert jobs[0] != jobs[1]

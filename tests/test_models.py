"""A model is its weights and what is done with them: what draws other images is another model."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.drawing import Settings
from pipelines.errors import UserError
from pipelines.models import Model, find_model
from pipelines.pipeline import evaluate_step
from pipelines.sample.job import Job
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
    jobs = [Job(Place.of(tmp_path), SETTINGS, m.identity, m.digest, None).record() for m in (small, large)]
    assert jobs[0] != jobs[1]


@pytest.mark.parametrize(
    ("verb", "override", "has_effect"),
    [
        ("sample", "sample.steps=4", True),
        ("sample", "sample.workers=2", True),
        ("sample", "promote.frechet_over_floor=3", False),
        ("sample", "evaluate.bits_images=8", False),
        ("evaluate", "sample.steps=4", True),
        ("evaluate", "evaluate.bits_images=8", True),
        ("evaluate", "sample.n=8", False),
        ("evaluate", "promote.feature_accuracy=0.9", False),
        ("export", "sample.clip_x0=false", True),
        ("export", "sample.ema_length=0.1", True),
        ("export", "sample.steps=4", False),
        ("export", "sample.guidance=2", False),
        ("export", "evaluate.bits_images=8", False),
    ],
)
def test_what_is_set_of_a_model_without_effect_on_the_verb_is_said(
    session: Session, verb: str, override: str, has_effect: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="run no-such: not in"):
            find_model("no-such", session.store, session.tracker, [override], verb=verb)
    assert [str(w.message) for w in caught] == ([] if has_effect else [f"--set {override}: has no effect on {verb}"])

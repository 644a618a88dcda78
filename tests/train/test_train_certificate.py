"""`verify-resume` kills real workers, and says so where the bits differ."""

from pathlib import Path

import pytest

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.errors import UserError
from pipelines.progress import Progress
from pipelines.spec import parse_spec
from pipelines.store import Place
from pipelines.train import certificate
from pipelines.train.certificate import certify
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec

STEPS = 40


def test_killed_workers_and_other_numbers_of_them_make_the_same_bits(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ingest("digits", Place.of(tmp_path / "d"), image_size=8, channels=1, held_out=0.4, shard_images=128)
    spec = tiny_spec(train__images=10**6, train__oversubscribe=True)
    place = Place.of(tmp_path / "proof")
    given = (spec, dataset, place, cluster, Progress())
    with pytest.raises(UserError, match=r"--steps 100000: the spec trains 31250 steps; give fewer"):
        certify(*given, steps=100_000, kills=1)
    found = certify(*given, steps=STEPS, kills=1)
    assert found.same
    assert found.differs == []
    assert found.workers[0] != found.workers[1]
    (kill,) = found.kills
    assert kill.lost >= 1
    assert kill.at_step < STEPS
    run = Run(place / "disturbed" / "runs" / found.name)
    assert run.newest_attempt() >= 3  # begun, begun again after the kill, gone on with by others
    assert {row.step for row in run.journal.read(STEPS)} == set(range(1, STEPS + 1))
    assert found.digests == run.checkpoints.digests(STEPS) | {"state.json": found.digests["state.json"]}
    # The check can fail: a run of another seed is not the same.
    other = certificate._begun(spec.model_copy(update={"seed": 1}), dataset, place / "other")
    train(certificate._shortened(other.spec(), STEPS, 1), dataset, other)
    assert set(certificate.compare(run, other, STEPS)) == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "journal",
    }


def test_what_ends_or_keeps_by_scores_is_left_out_of_the_proof() -> None:
    limits = {"keep_best": True, "plateau": {"patience_images": 32}, "score": {"every_images": 32}}
    spec = tiny_spec(train={**tiny_spec().train.model_dump(), **limits, "budget_minutes": 1.0, "workers": [1, 2]})
    shortened = certificate._shortened(spec, 3, 1)
    assert parse_spec(shortened.model_dump(mode="json")) == shortened
    assert shortened.train.total_steps == 3

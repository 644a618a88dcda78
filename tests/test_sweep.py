"""Sweeps through real Ray Tune: ranked by held-out bits/dim, early stops leave nothing behind, mistakes come first."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import trial
from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed, UserError
from pipelines.evaluate.likelihood import held_out_bits
from pipelines.models import of_checkpoint
from pipelines.pipeline import run_sweep, run_training
from pipelines.session import Session
from pipelines.spec import Spec, load_spec, parse_spec
from pipelines.store import Place
from pipelines.sweep import trial_specs
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_fields, tiny_spec

SCHEDULE = {"kind": "cosine", "s": 0.008}
GOOD, POOR, DIVERGES = 5e-3, 1e-8, 1e30
"""Learning rates: one that learns, one that does not, and one that ends in what is no number."""


def sweep_spec(parameters: dict[str, list[Any]], train_fields: dict[str, Any] | None = None, **sweep: Any) -> Spec:
    fields = tiny_fields(name="tried", sweep={"parameters": parameters, "frechet_images": 32, **sweep})
    fields["train"] = {**fields["train"], "images": 1920, "checkpoint_every": 20, **(train_fields or {})}
    return parse_spec(fields)


def unsettled(cluster: Cluster) -> str:
    """What still holds CPUs or a placement group after some seconds; nothing where all is free."""
    ray = cluster.connect()
    from ray.util import placement_group_table

    deadline = time.monotonic() + 20
    while True:
        left = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        free, total = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
        if not left and abs(free - total) < 1e-6:
            return ""
        if time.monotonic() > deadline:
            return f"{free} of {total} CPUs free, placement groups {left}"
        time.sleep(0.2)


def test_a_grid_is_ranked_by_held_out_bits_and_its_winner_is_a_spec(
    cluster: Cluster, session: Session, tmp_path: Path
) -> None:
    parameters = {"train.learning_rate": [DIVERGES, POOR, GOOD], "diffusion.schedule": [SCHEDULE]}
    spec = sweep_spec(parameters, {"grad_clip": None, "ema_profiles": [0.05, 0.1]}, concurrent=2)
    # Of this length there is no good average on the way, which is no reason to break off.
    spec = spec.model_copy(update={"sample": spec.sample.model_copy(update={"ema_length": 0.2})})
    outputs = run_sweep(spec, session)
    best, worst, diverged = outputs["ranking"]
    assert best["parameters"] == {"train.learning_rate": GOOD, "diffusion.schedule": SCHEDULE}
    assert best["bits_per_dim"] < worst["bits_per_dim"]
    assert best["finished"]
    assert worst["finished"]
    assert best["frechet"] > 0
    assert not diverged["finished"]
    assert "diverged" in diverged["error"]
    assert (best["error"], worst["error"]) == (None, None)
    assert unsettled(cluster) == ""

    # The winner's figure is that of its checkpoint, and the checkpoint is that of plain training.
    winner = load_spec(outputs["winner"])
    dataset = Dataset.open(session.store / "datasets" / (session.store / "datasets").list()[0])
    alone = Run.of(winner, dataset.digest, Place.of(tmp_path / "alone"))
    alone.describe(winner, dataset.digest)
    train(winner, dataset, alone)
    trained = run_training(winner, session)
    assert trained["attempts"] == 1, "the sweep had trained it already"
    pins = Run(session.store / "runs" / best["run"]).checkpoints.place / "pins"
    assert "60" in pins.list(), "a longer run must not thin out the trial's end"
    assert alone.checkpoints.digests(60)["ema.safetensors"] == trained["ema_sha256"]
    assert held_out_bits(of_checkpoint(alone, 60), dataset, winner) == best["bits_per_dim"]

    client = session.tracker.client()
    runs = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
    parents = [r for r in runs if "ddpm.sweep" in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert {r.data.tags["ddpm.rank"] for r in children} == {"1", "2", "3"}
    assert all(client.get_metric_history(r.info.run_id, "loss") for r in children if r.data.tags["ddpm.rank"] != "3")
    assert run_sweep(spec, session) == outputs


def test_an_early_stop_of_a_group_frees_its_place(cluster: Cluster, session: Session) -> None:
    """Two Ray Train workers a trial, one trial at a time: a leaked placement group would hang whoever comes next."""
    spec = sweep_spec(
        {"train.learning_rate": [GOOD, POOR]},
        {"workers": 2, "oversubscribe": True},
        early_stop={"grace_images": 640, "reduction": 2},
    )
    good, poor = run_sweep(spec, session)["ranking"]
    assert good["parameters"] == {"train.learning_rate": GOOD}
    assert good["finished"]
    assert not poor["finished"]
    assert 0 < poor["images"] < 1920
    assert poor["frechet"] is None
    assert unsettled(cluster) == ""


def test_random_trials_are_distinct_points_keyed_by_the_seed() -> None:
    parameters = {"diffusion.timesteps": [10, 20, 30], "train.learning_rate": [0.1, 0.2, 0.3]}
    drawn = [p for p, _ in trial_specs(sweep_spec(parameters, search="random", trials=5))]
    assert drawn == [p for p, _ in trial_specs(sweep_spec(parameters, search="random", trials=5))]
    assert len({yaml.safe_dump(p) for p in drawn}) == 5
    other = parse_spec({**sweep_spec(parameters, search="random", trials=5).model_dump(), "seed": 8})
    assert [p for p, _ in trial_specs(other)] != drawn


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"parameters": {"diffusion.timestep": [10]}}, "did you mean diffusion.timesteps?"),
        ({"parameters": {"diffusion.timesteps": [10, 1]}}, "diffusion.timesteps"),
        ({"parameters": {"sample.n": [10]}}, "sample.n cannot be swept"),
        ({"parameters": {"diffusion.timesteps": [10]}, "search": "random", "trials": 9}, "only 1 combinations"),
    ],
)
def test_a_mistake_is_found_before_any_trial_starts(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        trial_specs(sweep_spec(**sweep))


def test_a_spec_without_a_sweep_is_refused(session: Session) -> None:
    with pytest.raises(UserError, match="no `sweep:` section"):
        run_sweep(tiny_spec(), session)


def test_a_checkpoint_without_bits_does_not_part_rank_0_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone scores. It reports, as all do, and the trial ends where all of them see that it diverged."""
    import ray.train

    def no_bits(*args: Any) -> float:
        raise Failed("the model answers NaN to held-out images: it diverged, and has no bits/dim")

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.train, "report", reported.append)
    monkeypatch.setattr(trial, "held_out_bits", no_bits)
    spec = tiny_spec(train__images=32, train__checkpoint_every=1)
    dataset = ingest("digits", Place.of(tmp_path / "data"), image_size=8, channels=1, held_out=0.4, shard_images=1000)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    run.describe(spec, dataset.digest)
    train(spec, dataset, run, at_checkpoint=trial._report_from_worker)
    assert reported == [{"images": 32, "bits_per_dim": math.inf, "finished": 0}]

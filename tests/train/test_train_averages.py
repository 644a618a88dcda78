"""Averages whose length is chosen after training: made of which snapshots, and that nothing else moves them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.models import Model, find_model, of_checkpoint
from pipelines.progress import Progress
from pipelines.session import open_session
from pipelines.spec import Spec, load_spec, parse_spec
from pipelines.store import Place
from pipelines.train.checkpoint import Checkpoints
from pipelines.train.run import Run
from tests.conftest import tiny_fields, tiny_spec, write_spec
from tests.train.train_helpers import trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=100)


def test_an_average_of_another_length_is_made_after_training(dataset: Dataset, tmp_path: Path) -> None:
    """As if it had been kept from the start; it decides how a run is drawn, not what it learns."""
    fields = {"train__images": 1920, "train__keep_checkpoints": 12, "train__ema_profiles": [0.05, 0.1]}
    run = trained(tiny_spec(**fields), dataset, tmp_path / "a")
    wanted = tiny_spec(**fields, sample__ema_length=0.07)
    assert Run.of(wanted, dataset.digest, Place.of(tmp_path / "a")).name == run.name
    made = of_checkpoint(run, 60, wanted)
    assert re.fullmatch(r"power function, sigma_rel 0\.07, its profile met to within 0\.\d%", made.average)

    kept = trained(tiny_spec(**{**fields, "train__ema_profiles": [0.07]}), dataset, tmp_path / "b")
    assert kept.checkpoints.digests(60)["model.safetensors"] == run.checkpoints.digests(60)["model.safetensors"]
    direct = kept.checkpoints.load(60).profiles[0.07]
    weights = safetensors.torch.load(made.weights)

    def away(tensors: Mapping[str, Tensor]) -> float:
        return sum(float((tensors[n] - direct[n]).square().sum()) for n in direct) ** 0.5

    others = [run.checkpoints.load(60).model, *run.checkpoints.load(60).profiles.values()]
    assert away(weights) < 0.1 * min(away(other) for other in others)

    live = of_checkpoint(run, 60, tiny_spec(**fields, sample__ema_length="live"))
    trained_weights = safetensors.torch.load(live.weights)
    assert all(torch.equal(trained_weights[n], tensor) for n, tensor in run.checkpoints.load(60).model.items())
    assert live.average == "none, the live weights"

    with pytest.raises(UserError, match=r"make 0\.2 with an error of"):
        of_checkpoint(run, 5, tiny_spec(**fields, sample__ema_length=0.2))  # of the first snapshots alone


def test_neither_stops_nor_checkpoints_change_an_average_made_after_training(dataset: Dataset, tmp_path: Path) -> None:
    """Snapshots are kept at 100, 200, ... images, that is at the first batch of 32 that reaches them."""

    def spec(**train_fields: object) -> Spec:
        fields = {"ema_profiles": [0.05, 0.1], "ema_snapshot_every": 100, **train_fields}
        return tiny_spec(train={**tiny_fields()["train"], **fields}, sample={"ema_length": 0.08, "steps": 5})

    undisturbed = trained(spec(), dataset, tmp_path / "a")
    disturbed = trained(spec(checkpoint_every=3), dataset, tmp_path / "b", stop_at=7 * 32)
    assert disturbed.name == undisturbed.name
    pair = (undisturbed, disturbed)
    assert [each.checkpoints.kept_snapshots() for each in pair] == [[4, 7, 10, 13, 16, 19]] * 2
    one, two = (of_checkpoint(each, 20) for each in pair)
    assert one.weights == two.weights
    assert one.average == two.average


def test_where_snapshots_lie_is_part_of_a_run_that_keeps_them(dataset: Dataset, tmp_path: Path) -> None:
    def name(**train_fields: object) -> str:
        return Run.of(tiny_spec(train={**tiny_fields()["train"], **train_fields}), dataset.digest, place).name

    place, profiles = Place.of(tmp_path), {"ema_profiles": [0.05, 0.1]}
    assert name(**profiles) == name(**profiles, checkpoint_every=7, ema_snapshot_every=40), "a 16th of 640"
    assert name(**profiles) != name(**profiles, ema_snapshot_every=96)
    assert name(**profiles) != name(**profiles, images=6400), "whose 16th is longer"
    fixed = {**profiles, "ema_snapshot_every": 96}
    assert name(**fixed) == name(**fixed, images=6400)
    assert name() == name(images=6400, ema_snapshot_every=96), "where none are kept"


def test_an_average_that_cannot_be_made_is_refused_before_anything_starts(tmp_path: Path) -> None:
    def load(**fields: object) -> Spec:
        known = {"train__images": 1920, "train__ema_profiles": [0.05, 0.1]}
        return load_spec(write_spec(tmp_path / "spec.yaml", **{**known, **fields}))

    load(sample__ema_length=0.03)
    said = r"sample\.ema_length: snapshots of 0\.05, 0\.1, 16 of each, make 0\.015 with"
    with pytest.raises(UserError, match=said):
        load(sample__ema_length=0.015)
    with pytest.raises(UserError, match=r"sample\.ema_length: snapshots of 0\.05, 0\.1, 1 of each, make 0\.2 with"):
        load(sample__ema_length=0.2, train__ema_snapshot_every=100_000)
    with pytest.raises(UserError, match=r"train\.ema_snapshot_every: 1 images make 2,000 snapshots"):
        load(train__images=64_000, train__ema_snapshot_every=1)


def test_a_model_that_was_made_needs_no_snapshots_any_more() -> None:
    """Whatever a spec would make of its length today: the weights are there."""
    spec = tiny_spec(train__images=1920, train__ema_profiles=[0.05, 0.1], sample__ema_length=0.015)
    model = Model(spec, b"weights", "d", "run/60", "power function, sigma_rel 0.015")
    assert Model.from_config(json.loads(json.dumps(model.config())), b"weights", "models:/a/1") == model


def test_a_run_without_its_snapshots_is_drawn_by_half_life(dataset: Dataset, tmp_path: Path) -> None:
    fields = {"train__ema_profiles": [0.05, 0.1], "train__ema_snapshot_every": 100, "sample__ema_length": 0.08}
    spec = tiny_spec(**fields)
    with Cluster(None) as unused:
        session = open_session(unused, Progress(), spec, str(tmp_path / "store"))
        run = trained(spec, dataset, tmp_path / "store")
        (run.checkpoints.snapshots / "000000007").remove()
        with pytest.raises(UserError, match=r"keeps no snapshot of step 7, .*leave sample\.ema_length out"):
            find_model(run.name, session.store, session.tracker)
        found = find_model(run.name, session.store, session.tracker, ["sample.ema_length=null"])
    assert found.average == "half-life 20000 images"


def test_a_kill_between_a_snapshot_and_its_checkpoint_changes_no_average(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"train__ema_profiles": [0.05, 0.1], "train__ema_snapshot_every": 96, "sample__ema_length": 0.08}
    spec = tiny_spec(**fields, train__checkpoint_every=6)
    undisturbed = trained(spec, dataset, tmp_path / "a")

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        save = Checkpoints.save_snapshot

        def save_and_die(self: Checkpoints, step: int, *args: Any) -> None:
            save(self, step, *args)
            if step == 9:
                raise Killed

        patch.setattr(Checkpoints, "save_snapshot", save_and_die)
        with pytest.raises(Killed):
            trained(spec, dataset, tmp_path / "b")
    killed = trained(spec, dataset, tmp_path / "b")
    assert killed.name == undisturbed.name
    assert killed.newest_attempt() == 2
    assert of_checkpoint(killed, 20).weights == of_checkpoint(undisturbed, 20).weights


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"train__label_dropout": 0.3}, True),
        ({"model__null_class": False, "train__label_dropout": 0.0}, True),
        ({"model__classes": 10}, False),
        ({"train__ema_profiles": [0.1]}, False),
    ],
)
def test_what_has_no_effect_makes_no_other_run(fields: dict[str, Any], same: bool) -> None:
    made = {**tiny_fields(), "model": {**tiny_fields()["model"]}, "train": {**tiny_fields()["train"]}}
    for name, value in fields.items():
        section, _, field = name.partition("__")
        made[section][field] = value
    assert (parse_spec(made).training_fields() == tiny_spec().training_fields()) == same


def test_the_order_of_profiles_and_their_copies_make_no_other_run() -> None:
    names = [tiny_spec(train__ema_profiles=widths).training_fields() for widths in ([0.05, 0.1], [0.1, 0.05, 0.1])]
    assert names[0] == names[1]


@pytest.mark.parametrize(("batch", "every"), [(32, 100), (32, 96), (32, 20), (64, 1000), (8, 7)])
def test_a_snapshot_is_kept_at_the_first_batch_that_reaches_its_images(batch: int, every: int) -> None:
    train = tiny_spec(train__ema_profiles=[0.1], train__global_batch=batch, train__ema_snapshot_every=every).train
    marks = range(every, 50 * batch + 1, every)
    by_hand = [step for step in range(1, 51) if any((step - 1) * batch < at <= step * batch for at in marks)]
    assert train.snapshot_steps(50) == by_hand

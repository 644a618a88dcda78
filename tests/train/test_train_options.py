"""What may be trained beside the plain model: classes, a learned variance, averages of any length, others' weights."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelines.build import build_model
from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.drawing import Settings, draw
from pipelines.errors import UserError
from pipelines.evaluate.likelihood import held_out_bits
from pipelines.interop import export_diffusers
from pipelines.models import Model, find_model, of_checkpoint
from pipelines.pipeline import run, run_sweep, run_training
from pipelines.progress import Progress
from pipelines.session import open_session
from pipelines.spec import Spec, parse_spec
from pipelines.store import Place
from pipelines.train.loop import Trainer, train
from pipelines.train.run import Run, run_name
from tests.conftest import tiny_fields, tiny_spec
from tests.train.train_helpers import trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=100)


def conditional_spec(**train_fields: object) -> Spec:
    fields = tiny_fields()
    return tiny_spec(
        model={**fields["model"], "classes": 10},
        diffusion={**fields["diffusion"], "variance": "learned_range"},
        train={
            **fields["train"],
            "images": 320,
            "loss": "hybrid",
            "timesteps": "importance",
            "label_dropout": 0.2,
            "ema_profiles": [0.05, 0.1],
            **train_fields,
        },
    )


def test_a_stop_changes_no_bit_of_a_conditional_model_with_learned_variance(dataset: Dataset, tmp_path: Path) -> None:
    spec = conditional_spec()
    one, two = trained(spec, dataset, tmp_path / "a"), trained(spec, dataset, tmp_path / "b", stop_at=160)
    ours, theirs = one.checkpoints.digests(10), two.checkpoints.digests(10)
    assert "profiles.safetensors" in ours
    assert {n: d for n, d in ours.items() if n != "state.json"} == {
        n: d for n, d in theirs.items() if n != "state.json"
    }
    rows = [(row.step, row.exact) for row in one.journal.read(10)]
    assert rows == [(row.step, row.exact) for row in two.journal.read(10)]


def test_a_conditional_model_is_drawn_and_scored_by_class(dataset: Dataset, tmp_path: Path) -> None:
    spec = conditional_spec(images=960, learning_rate=5e-3)
    model = of_checkpoint(trained(spec, dataset, tmp_path), 30)
    process, unet = model.build()
    settings = Settings.of(spec.sample.model_copy(update={"sampler": "ancestral", "guidance": 2.0}))
    seeds = [3] * 10
    images = draw(process, unet, 8, settings, range(10), seeds=seeds)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 10, "the same noise, ten classes"
    one, two = (draw(process, unet, 8, settings, [i], seeds=[3])[0] for i in (4, 14))
    assert torch.equal(one, two), "image 14 is of class 4"
    assert 0 < held_out_bits(model, dataset, spec) < 20


def test_classes_are_those_of_the_dataset(tmp_path: Path) -> None:
    fields = tiny_fields()
    spec = tiny_spec(model={**fields["model"], "classes": 9})
    with Cluster(None) as unused:
        session = open_session(unused, Progress(), spec, str(tmp_path))
        for verb in (run_training, run):
            with pytest.raises(UserError, match=r"model\.classes: 9, where the images have 10: set it to 10"):
                verb(spec, session)
        fields = {**spec.model_dump(mode="json"), "sweep": {"parameters": {"seed": [1, 2]}}}
        with pytest.raises(UserError, match=r"model\.classes: 9, where the images have 10: set it to 10"):
            run_sweep(parse_spec(fields), session)


def test_a_run_goes_on_from_a_model_made_elsewhere(dataset: Dataset, tmp_path: Path) -> None:
    first = trained(tiny_spec(train__images=320), dataset, tmp_path)
    model = of_checkpoint(first, 10)
    export_diffusers(model, tmp_path / "exported")
    checkpoint = str(first.checkpoints.at(10))
    from_checkpoint, from_folder = (
        tiny_spec(train__images=320, train__init_from=folder) for folder in (checkpoint, str(tmp_path / "exported"))
    )
    run = trained(from_checkpoint, dataset, tmp_path)
    assert run.name != first.name
    assert Run.of(from_folder, dataset.digest, Place.of(tmp_path)).name == run.name, "it is the weights that count"
    losses = [[row.exact["loss"] for row in r.journal.read(10)] for r in (first, run)]
    assert losses[1][0] < 0.8 * losses[0][0], "the first step is not a beginner's"
    other = tiny_spec(model={"channels": [16, 32], "groups": 8}, train__init_from=checkpoint)
    with pytest.raises(ValueError, match="another model's"):
        trained(other, dataset, tmp_path)
    with pytest.raises(UserError, match="neither a checkpoint nor a folder"):
        Run.of(tiny_spec(train__init_from=str(tmp_path)), dataset.digest, Place.of(tmp_path))
    with pytest.raises(UserError, match=r"is a run, name one of its checkpoints; its last checkpoint is .*000000010"):
        Run.of(tiny_spec(train__init_from=str(run.place)), dataset.digest, Place.of(tmp_path))
    with pytest.raises(UserError, match=r"there is no folder .*gone"):
        Run.of(tiny_spec(train__init_from=str(tmp_path / "gone")), dataset.digest, Place.of(tmp_path))


def test_a_diffusers_folder_is_a_model_like_any_other(dataset: Dataset, tmp_path: Path) -> None:
    spec = tiny_spec(train__images=320, diffusion={"timesteps": 50, "predict": "v", "variance": "large"})
    model = of_checkpoint(trained(spec, dataset, tmp_path), 10)
    export_diffusers(model, tmp_path / "exported")
    with Cluster(None) as unused:
        session = open_session(unused, Progress(), spec, str(tmp_path / "store"))
        found = find_model(str(tmp_path / "exported"), session.store, session.tracker, ["sample.steps=7"])
    assert found.spec.sample.steps == 7
    settings = Settings.of(found.spec.sample)
    ours, theirs = (draw(*m.build(), 8, settings, range(4)) for m in (model, found))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_folder_of_a_model_of_classes_alone_is_a_model_too(tmp_path: Path) -> None:
    """It was trained with every label shown, as diffusers has no word for a class that stands for none."""
    spec = tiny_spec(model={**tiny_fields()["model"], "classes": 10, "null_class": False}, train__label_dropout=0.0)
    weights = safetensors.torch.save(build_model(spec).state_dict())
    export_diffusers(Model(spec, weights, "no-data", "test", "none"), tmp_path / "exported")
    with Cluster(None) as unused:
        session = open_session(unused, Progress(), spec, str(tmp_path / "store"))
        found = find_model(str(tmp_path / "exported"), session.store, session.tracker)
    assert (found.spec.model.classes, found.spec.model.null_class) == (10, False)
    assert draw(*found.build(), 8, Settings.of(found.spec.sample), range(2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("warmup", [0, 100])
def test_a_learning_rate_that_falls_as_a_cosine(dataset: Dataset, warmup: int, tmp_path: Path) -> None:
    """Against torch's own scheduler, asked at the images seen since the warm-up. Stopped and gone on with: the same."""
    spec = tiny_spec(train__images=320, train__decay="cosine", train__warmup_images=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=spec.train.learning_rate)
    stock = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=352 - warmup)
    run = trained(spec, dataset, tmp_path / "at once")
    for row in run.journal.read(10):
        stock.last_epoch = row.images - warmup
        risen = row.images / warmup if row.images < warmup else None
        expected = stock._get_closed_form_lr()[0] if risen is None else spec.train.learning_rate * risen
        assert row.exact["learning_rate"] == pytest.approx(expected)
        assert row.exact["learning_rate"] > 0
    other = Run.of(spec, dataset.digest, Place.of(tmp_path / "stopped"))
    other.describe(spec, dataset.digest)

    def stop(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, dataset, other, at_checkpoint=stop)
    train(spec, dataset, other)
    assert other.checkpoints.digests(10) == run.checkpoints.digests(10)


def test_only_with_decay_a_longer_run_is_another_run() -> None:
    for decay in ("constant", "cosine"):
        short, long = (tiny_spec(train__images=n, train__decay=decay) for n in (320, 640))
        assert (run_name(short, "digest") == run_name(long, "digest")) == (decay == "constant")
    assert tiny_spec().training_fields()["train"].keys().isdisjoint({"decay", "images"})
    whole, half = (tiny_spec(train__images=n, train__decay="cosine") for n in (320, 300))  # both are ten batches
    assert run_name(whole, "digest") == run_name(half, "digest")

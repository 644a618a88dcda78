"""Which images a score is taken from, and which models can be scored against them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import bits_per_dim
from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_model
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.evaluate.chance import choose_images
from pipelines.evaluate.job import Evaluation, Question, evaluate, evaluate_samples
from pipelines.evaluate.scores import Score
from pipelines.evaluate.sets import uniform_noise
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.session import Session, open_session
from pipelines.spec import parse_spec
from pipelines.store import Place
from tests.conftest import tiny_fields, tiny_spec
from tests.sample.conftest import untrained


def test_images_of_a_dataset_sorted_by_class_are_drawn_from_all_of_them() -> None:
    classes = np.repeat(np.arange(4), 50)
    chosen = choose_images(200, 40, seed=0)
    assert np.bincount(classes[chosen]).min() >= 4
    assert len(set(chosen.tolist())) == 40
    assert np.array_equal(chosen, choose_images(200, 40, seed=0))
    assert not np.array_equal(chosen, choose_images(200, 40, seed=1))
    assert np.array_equal(choose_images(200, 999, seed=0), np.arange(200))


class NoCluster(Cluster):
    def connect(self) -> None:
        raise AssertionError("nothing may start")


def test_a_model_of_other_classes_is_refused_before_anything_starts(tmp_path: Path) -> None:
    dataset = ingest("digits", Place.of(tmp_path / "data"), image_size=8, channels=1, held_out=0.4, shard_images=1000)
    spec = tiny_spec(model={**tiny_fields()["model"], "classes": 9})
    model = Model(spec, b"weights that nobody reads", "no-data", "test", "none")
    session = open_session(NoCluster(None), Progress(), spec, str(tmp_path / "store"))
    with pytest.raises(UserError, match="images of 10 classes, the model knows 9"):
        evaluate(model, dataset, spec, session)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=200)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations") / "store"


@pytest.fixture
def shared(cluster: Cluster, store: Path) -> Session:
    """A session whose feature network is trained once for all."""
    return open_session(cluster, Progress(), tiny_spec(), storage=str(store))


QUESTION = Question(tiny_spec(evaluate__feature_epochs=20).evaluate, seed=0)


def by_name(evaluation: Evaluation) -> dict[str, Score]:
    return {score.name: score for score in evaluation.scores}


def ingested(pixels: np.ndarray, folder: Path) -> Dataset:
    """Images without labels, all to train on."""
    folder.mkdir()
    np.save(folder / "images.npy", pixels)
    return ingest(
        str(folder / "images.npy"), Place.of(folder / "out"), image_size=8, channels=1, held_out=0.0, shard_images=100
    )


def test_real_images_score_the_floor_and_training_images_are_known_for_what_they_are(
    dataset: Dataset, shared: Session
) -> None:
    scores = by_name(evaluate_samples(dataset, dataset, QUESTION, shared))
    assert 0.6 < scores["frechet"].in_floors < 1.4
    assert scores["kid"].interval[0] <= 0.0 <= scores["kid"].interval[1]
    for name in ("precision", "recall", "density", "coverage"):
        assert scores[name].value == pytest.approx(scores[name].provenance["floor"], abs=0.1)
    for name in ("near_training_in_features", "near_training_in_pixels"):
        assert scores[name].value == 1.0
        assert scores[name].provenance["copies"] == len(dataset.split("train"))
        assert scores[name].provenance["floor"] < 0.12
    for score in scores.values():
        assert score.interval[0] <= score.value <= score.interval[1]
        assert score.provenance["dataset_digest"] == score.provenance["samples_digest"] == dataset.digest


def test_a_model_that_returns_some_training_images_is_caught(dataset: Dataset, shared: Session, tmp_path: Path) -> None:
    """Held-out images stand for those that it did not copy."""
    train, _ = Reader(dataset.split("train")).read_all()
    held_out, _ = Reader(dataset.split("held-out")).read_all()
    honest = by_name(evaluate_samples(ingested(held_out[:300], tmp_path / "a"), dataset, QUESTION, shared))
    touched_up = train[:100].clip(3, 252)
    mixed = np.concatenate([held_out[:200], touched_up])
    evaluation = evaluate_samples(ingested(mixed, tmp_path / "b"), dataset, QUESTION, shared)
    copied = by_name(evaluation)
    for name in ("near_training_in_features", "near_training_in_pixels"):
        assert honest[name].value < 0.12
        assert copied[name].value > 0.3
        assert copied[name].interval[0] > honest[name].interval[1]
    shown = np.asarray(Image.open(evaluation.pairs))
    assert shown.shape[0] > 4 * 8


def test_noise_is_fifty_floors_away(dataset: Dataset, shared: Session, tmp_path: Path) -> None:
    noise = ingested(uniform_noise((400, 8, 8, 1), seed=9), tmp_path / "noise")
    scores = by_name(evaluate_samples(noise, dataset, QUESTION, shared))
    assert scores["frechet"].in_floors >= 50
    # Not precision: noise lies at one place of the features, and there in the wide ball of some outlier.
    for name, most in (("recall", 0.1), ("density", 0.5), ("coverage", 0.1)):
        assert scores[name].value < most < scores[name].provenance["floor"]
    assert scores["kid"].value > 10 * scores["kid"].provenance["spread"]


def test_a_model_is_scored_with_all_that_the_scores_depend_on_and_only_once(
    dataset: Dataset, shared: Session, store: Path
) -> None:
    spec = tiny_spec(model__classes=10, train__label_dropout=0.1, evaluate__samples=60, evaluate__feature_epochs=20)
    model = untrained(model__classes=10, train__label_dropout=0.1)
    evaluation = evaluate(model, dataset, spec, shared)
    scores = by_name(evaluation)
    assert {"frechet", "kid", "precision", "recall", "density", "coverage", "bits_per_dim", "class_agreement"} <= set(
        scores
    )
    assert scores["frechet"].provenance["n"] == 60
    assert scores["frechet"].provenance["model_digest"] == model.digest
    assert scores["class_agreement"].value < 0.5 < scores["class_agreement"].provenance["floor"]
    idle = open_session(NoCluster(None), Progress(), spec, storage=str(store))
    again = evaluate(model, dataset, spec, idle)
    assert again.to_json() == evaluation.to_json()


def test_exact_bits_are_the_cores(dataset: Dataset, shared: Session) -> None:
    spec = tiny_spec(evaluate__samples=20, evaluate__bits_images=8, evaluate__exact=True, diffusion__timesteps=10)
    spec = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"feature_epochs": 20})})
    model = untrained(diffusion__timesteps=10)
    score = by_name(evaluate(model, dataset, spec, shared))["bits_per_dim"]
    assert score.provenance["estimate"] == "exact"
    images, _ = Reader(dataset.split("held-out")).read_all()
    process, unet = model.build()
    torch.set_num_threads(1)
    chosen = to_model(images[choose_images(len(images), 8, spec.seed)])
    assert score.value == float(bits_per_dim(process, unet, chosen, spec.seed).total.mean())


def test_images_need_not_be_kept_to_be_scored(dataset: Dataset, shared: Session, store: Path) -> None:
    """Other steps than any test's, so that nothing of it lies in the store."""
    chosen = {"evaluate__samples": 40, "evaluate__feature_epochs": 20, "sample__steps": 3}
    before = set((store / "samples").glob("*")) if (store / "samples").exists() else set()
    forgotten = evaluate(untrained(), dataset, parse_spec(tiny_fields(**chosen, evaluate__keep_samples=False)), shared)
    assert set((store / "samples").glob("*") if (store / "samples").exists() else ()) == before
    kept = evaluate(untrained(), dataset, parse_spec(tiny_fields(**chosen)), shared)
    assert forgotten.images == ""
    assert [(s.name, s.value, s.interval) for s in forgotten.scores] == [
        (s.name, s.value, s.interval) for s in kept.scores
    ]
    assert Path(forgotten.pairs).read_bytes() == Path(kept.pairs).read_bytes()


def test_a_look_that_was_damaged_is_made_again(dataset: Dataset, shared: Session, store: Path) -> None:
    first = evaluate_samples(dataset, dataset, QUESTION, shared)
    for look in (store / "looks").rglob("*.npz"):
        look.write_bytes(look.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="is damaged, and made again"):
        again = evaluate_samples(dataset, dataset, Question(QUESTION.evaluate, seed=1), shared)
    assert [score.name for score in again.scores] == [score.name for score in first.scores]


def test_data_with_nothing_held_out_is_refused_before_anything_starts(dataset: Dataset, tmp_path: Path) -> None:
    none_held_out = ingested(Reader(dataset.split("train")).read_all()[0][:50], tmp_path / "none")
    session = open_session(NoCluster(None), Progress(), tiny_spec(), storage=str(tmp_path / "store"))
    with pytest.raises(UserError, match="against 0 held-out ones"):
        evaluate_samples(dataset, none_held_out, QUESTION, session)

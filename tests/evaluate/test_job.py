"""Which images a score is taken from, and which models can be scored against them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from pipelines.evaluate import statistics
from pipelines.evaluate.answers import Evaluation, Question
from pipelines.evaluate.chance import choose_images
from pipelines.evaluate.extractors import feature_place, kept_net
from pipelines.evaluate.job import evaluate, evaluate_samples
from pipelines.evaluate.overlap import held_out_seen
from pipelines.evaluate.scores import Score
from pipelines.evaluate.sets import uniform_noise
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample import sample_spec
from pipelines.session import Session, open_session
from pipelines.spec import parse_spec
from pipelines.store import Place
from tests.conftest import tiny_fields, tiny_spec
from tests.evaluate.conftest import Digits
from tests.sample.conftest import Said, untrained


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


def test_images_that_were_scored_elsewhere_are_known_by_their_own_place(
    dataset: Dataset, shared: Session, tmp_path: Path
) -> None:
    first = evaluate_samples(dataset, dataset, QUESTION, shared)
    copy = Dataset.open(Place.of(shutil.copytree(dataset.place.path, tmp_path / "copy")))
    idle = open_session(NoCluster(None), Progress(), tiny_spec(), storage=str(shared.store))
    again = evaluate_samples(copy, dataset, QUESTION, idle)
    assert (first.images, again.images) == (str(dataset.place), str(copy.place))
    assert again.scores == first.scores


def test_who_was_killed_among_the_scores_goes_on_with_those_that_lack(
    dataset: Dataset, shared: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, made = Question(QUESTION.evaluate, seed=5), list[str]()
    whole = statistics.set_scores

    def killed(part: str, *rest: Any) -> list[Score]:
        made.append(part)
        if made == ["frechet", "kid"]:
            raise KeyboardInterrupt
        return whole(part, *rest)

    monkeypatch.setattr(statistics, "set_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_samples(dataset, dataset, question, shared)
    evaluate_samples(dataset, dataset, question, shared)
    assert made == ["frechet", "kid", "kid", "neighbours"]


def test_images_of_a_job_are_known_by_its_record_and_other_classes_than_the_networks_are_left_out(
    dataset: Dataset, shared: Session, tmp_path: Path
) -> None:
    spec = tiny_spec(model__classes=9, train__label_dropout=0.1, sample__labels=[3, 5], sample__steps=1)
    drawn = Dataset.open(Place.of(sample_spec(untrained(model__classes=9), spec, 12, shared).out))
    said = Said()
    session = replace(shared, progress=said)
    found = evaluate_samples(drawn, dataset, QUESTION, session)
    job = {"labels": [3, 5], "threads": 1, "device": "cpu", "steps": 1, "sample_seed": 0}
    assert job.items() <= by_name(found)["frechet"].provenance.items()
    assert {"ema", "model_digest"} <= by_name(found)["frechet"].provenance.keys()
    assert "class_agreement" not in by_name(found)
    assert any("class_agreement is left out: the images are of 9 classes, of the 10" in line for line in said.lines)
    assert any("at n = 12, fewer than the 64 features" in line for line in said.lines)

    copy = Path(shutil.copytree(drawn.place.path, tmp_path / "copy"))
    (copy / "job.json").write_text("{}")
    unknown = by_name(evaluate_samples(Dataset.open(Place.of(copy)), dataset, QUESTION, session))["frechet"]
    assert (unknown.value, unknown.interval) == (by_name(found)["frechet"].value, by_name(found)["frechet"].interval)
    assert "steps" not in unknown.provenance
    assert any("job.json" in line and "nothing is known" in line for line in said.lines)


def test_images_without_labels_are_judged_by_noise_and_not_by_the_accuracy_on_their_turns(
    shared: Session, tmp_path: Path, digits: Digits
) -> None:
    np.save(tmp_path / "images.npy", np.concatenate([digits.train[:200], digits.held_out[:200]]))
    source, out = str(tmp_path / "images.npy"), Place.of(tmp_path / "unlabelled")
    unlabelled = ingest(source, out, image_size=8, channels=1, held_out=0.4, shard_images=400)
    question = Question(tiny_spec(evaluate__feature_epochs=2).evaluate, seed=0)
    evidence = evaluate_samples(unlabelled, unlabelled, question, shared).evidence
    assert "feature_accuracy" not in evidence
    assert 0.2 < evidence["feature_turns_accuracy"] < 1
    assert evidence["noise_over_floor"] > 1


def test_held_out_images_that_a_model_was_trained_on_are_counted(dataset: Dataset, tmp_path: Path) -> None:
    store = Place.of(tmp_path / "store")
    model = untrained()
    assert held_out_seen(replace(model, dataset_digest=dataset.digest), dataset, store) == 0
    assert held_out_seen(replace(model, dataset_digest="that of data that is gone"), dataset, store) is None
    held_out, _ = Reader(dataset.split("held-out")).read_all()
    train, _ = Reader(dataset.split("train")).read_all()
    (tmp_path / "store" / "datasets" / "damaged").mkdir(parents=True)
    (tmp_path / "store" / "datasets" / "damaged" / "dataset.json").write_text("{")
    np.save(tmp_path / "other.npy", np.concatenate([train[:30], held_out[:50], held_out[:5]]))
    source, out = str(tmp_path / "other.npy"), store / "datasets" / "other"
    with pytest.warns(UserWarning, match="exact copies"):
        other = ingest(source, out, image_size=8, channels=1, held_out=0.0, shard_images=7)
    expected = sum(any(np.array_equal(image, seen) for seen in held_out[:50]) for image in held_out)
    foreign = replace(model, dataset_digest=other.digest)
    assert held_out_seen(foreign, dataset, store) == expected >= 50

    said = Said()
    session = open_session(NoCluster(None), said, tiny_spec(), storage=str(store))
    for one, told in (
        (foreign, f"{expected} of {len(held_out)} images"),
        (replace(model, dataset_digest=""), "may be"),
    ):
        with pytest.raises(AssertionError, match="nothing may start"):
            evaluate(one, dataset, tiny_spec(), session)
        assert told in said.lines[-2]
        assert "near_training is about training images that it may not have seen" in said.lines[-1]


def test_a_source_that_has_images_on_both_sides_is_no_exception(tmp_path: Path) -> None:
    """Its card tells: with them dropped, none of its own held-out images was seen."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 8, 8), dtype=np.uint8)
    for split, rows in (("train", range(30)), ("test", [*range(26, 40), 29])):
        for place, row in enumerate(rows):
            file = tmp_path / "source" / split / "a" / f"{place:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(file)
    for drop, seen in ((False, 5), (True, 0)):
        source, out = str(tmp_path / "source"), Place.of(tmp_path / str(drop))
        with pytest.warns(UserWarning, match="copies"):
            own = ingest(source, out, image_size=8, channels=1, shard_images=100, drop_duplicates=drop)
        assert len(own.split("held-out")) == 15
        model = replace(untrained(), dataset_digest=own.digest)
        assert held_out_seen(model, own, Place.of(tmp_path / "store")) == seen


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


def kept_in(store: Path) -> dict[str, int]:
    """Inodes of all kept parts: a file that is made again has another."""
    found = (
        path for name in ("bits", "floors", "looks", "features", "statistics") for path in (store / name).rglob("*")
    )
    return {str(path.relative_to(store)): path.stat().st_ino for path in found if path.is_file()}


def test_a_model_is_scored_with_all_that_the_scores_depend_on_once_and_who_was_killed_goes_on(
    dataset: Dataset, shared: Session, store: Path
) -> None:
    classes = {"model__classes": 10, "train__label_dropout": 0.1}
    spec = tiny_spec(**classes, evaluate__samples=60, evaluate__feature_epochs=20)
    spec = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"bits_images": 100})})
    model, before = replace(untrained(**classes), dataset_digest=dataset.digest), kept_in(store)
    evaluation = evaluate(model, dataset, spec, shared)
    scores = by_name(evaluation)
    assert {"frechet", "kid", "precision", "recall", "density", "coverage", "bits_per_dim", "class_agreement"} <= set(
        scores
    )
    assert scores["frechet"].provenance["n"] == 60
    drawn = {"model_digest": model.digest, "labels": "uniform", "threads": 1, "device": "cpu", "held_out_seen": 0}
    assert drawn.items() <= scores["frechet"].provenance.items()
    assert evaluation.evidence["held_out_seen"] == scores["bits_per_dim"].provenance["held_out_seen"] == 0
    assert scores["class_agreement"].value < 0.5 < scores["class_agreement"].provenance["floor"]
    idle = open_session(NoCluster(None), Progress(), spec, storage=str(store))
    again = evaluate(model, dataset, spec, idle)
    assert again.to_json() == evaluation.to_json()

    after = kept_in(store)
    new = sorted(path for path in after if path not in before)
    lost = [next(path for path in new if path.startswith(name)) for name in ("bits", "looks", "statistics")]
    for path in lost:
        (store / path).unlink()
    shutil.rmtree(Path(evaluation.pairs).parent)
    assert evaluate(model, dataset, spec, shared).to_json() == evaluation.to_json()
    assert {path for path, number in kept_in(store).items() if after[path] != number} == set(lost)


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
    spec = parse_spec(tiny_fields(**chosen))
    larger = Path(sample_spec(untrained(), spec, 80, shared, dataset.class_counts).out)
    for name in ("manifest.json", "dataset.json"):  # as if killed at its end: it is no dataset
        (larger / name).unlink()
    kept = evaluate(untrained(), dataset, spec, shared)
    assert (kept.images, evaluate(untrained(), dataset, spec, shared).images) == (str(larger), str(larger))
    assert forgotten.images == ""
    assert [(s.name, s.value, s.interval) for s in forgotten.scores] == [
        (s.name, s.value, s.interval) for s in kept.scores
    ]
    assert Path(forgotten.pairs).read_bytes() == Path(kept.pairs).read_bytes()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_damaged_in_the_store_is_named_and_made_again(dataset: Dataset, shared: Session, store: Path) -> None:
    question, before = Question(QUESTION.evaluate, seed=6), kept_in(store)
    first = evaluate_samples(dataset, dataset, question, shared)
    new = [name for name in kept_in(store) if name not in before]
    old = [name for name in before if name.startswith(("looks", "features")) and name.endswith(".npz")]
    scores = Path(first.pairs).parent / "scores.json"
    for path in (*(store / name for name in (*new, *old)), scores):
        damage(path)
    with pytest.warns(UserWarning, match="is damaged, and made again|it is scored again") as said:
        again = evaluate_samples(dataset, dataset, question, shared)
    assert again.to_json() == first.to_json()
    told = "\n".join(str(one.message) for one in said)
    assert f"{scores} does not match the sha256 in its manifest; it is scored again" in told
    for name in ("floors", "frechet.json", "looks", "features"):
        assert name in told


def test_a_network_that_was_damaged_is_trained_again(dataset: Dataset, tmp_path: Path) -> None:
    asked, store = tiny_spec(evaluate__feature_epochs=1).evaluate, Place.of(tmp_path)
    first = kept_net(dataset, asked, store)
    damage(feature_place(dataset, asked, store).path)
    with pytest.warns(UserWarning, match=r"\.net: is damaged, and made again"):
        assert kept_net(dataset, asked, store).digest == first.digest


def test_data_with_nothing_held_out_is_refused_before_anything_starts(dataset: Dataset, tmp_path: Path) -> None:
    none_held_out = ingested(Reader(dataset.split("train")).read_all()[0][:50], tmp_path / "none")
    session = open_session(NoCluster(None), Progress(), tiny_spec(), storage=str(tmp_path / "store"))
    with pytest.raises(UserError, match="against 0 held-out ones"):
        evaluate_samples(dataset, none_held_out, QUESTION, session)

"""Evaluation as a job: what scores need is made by Ray's processes and kept by digest, they by pure functions.

What was scored once lies in the store's `evaluations/KEY/`, with the picture of the images that lie nearest to training
images; the same question again is answered from there.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.manifest import CARD, Dataset
from pipelines.data.pixels import to_pixels
from pipelines.data.reader import Reader
from pipelines.drawing import Settings, draw
from pipelines.errors import UserError
from pipelines.evaluate.chance import REPLICATES
from pipelines.evaluate.extractors import SEED as FEATURE_SEED
from pipelines.evaluate.extractors import extractor, kept_net
from pipelines.evaluate.features import FORMAT as FEATURES_FORMAT
from pipelines.evaluate.frechet import SPLITS, WORK
from pipelines.evaluate.images import Reference, score_images
from pipelines.evaluate.inception import file_digest
from pipelines.evaluate.judge import draw_and_look
from pipelines.evaluate.kernel import SUBSET, SUBSETS
from pipelines.evaluate.likelihood import LikelihoodTasks
from pipelines.evaluate.look import Look
from pipelines.evaluate.memory import NEAR
from pipelines.evaluate.memory import SPLITS as NEAR_SPLITS
from pipelines.evaluate.neighbours import NEIGHBOURS
from pipelines.evaluate.scores import BITS_PER_DIM, FRECHET, NEAR_FEATURES, NEAR_PIXELS, Score
from pipelines.evaluate.sets import (
    FEWEST,
    HELD_OUT,
    KERNEL_SPLITS,
    NEIGHBOUR_PAIRS,
    SetFeatures,
    frechet_score,
)
from pipelines.models import Model
from pipelines.sample import Studio, sample_spec
from pipelines.sample.job import JOB, Job
from pipelines.session import Session
from pipelines.spec import Evaluate, Spec
from pipelines.store import MANIFEST, Place, identity

_BITS_FORMAT = 2
"""Of the bits' interval; since 2, copies of an image count in it as one."""
_SETS_FORMAT = 2
"""Of their values and intervals; since 2, intervals have the chance of both sides in them."""
_OF_A_JOB = ("model_digest", "sampler", "steps", "eta", "spacing", "clip_x0", "dynamic_threshold", "guidance", "chunk")
_SCORES, PAIRS = "scores.json", "pairs.png"

MEASURE = {
    "bits": _BITS_FORMAT,
    "features": FEATURES_FORMAT,
    "feature_seed": FEATURE_SEED,
    "sets": _SETS_FORMAT,
    "splits": SPLITS,
    "frechet_work": WORK,
    "kernel_splits": KERNEL_SPLITS,
    "neighbour_pairs": NEIGHBOUR_PAIRS,
    "replicates": REPLICATES,
    "neighbours": NEIGHBOURS,
    "near": NEAR,
    "near_splits": NEAR_SPLITS,
    "subsets": SUBSETS,
    "subset": SUBSET,
}
"""What scores depend on beside the spec, the model and the data; with it in their key, old ones are not taken for new.
"""


@dataclass(frozen=True)
class Evaluation:
    """Scores with their provenance, and the figures that gates look at."""

    scores: list[Score]
    evidence: dict[str, float]
    pairs: str
    """Picture of the images that lie nearest to training images, above these."""
    images: str
    """Where the images lie; empty where they were not kept."""

    def to_json(self) -> dict[str, Any]:
        where = {"pairs": self.pairs, "images": self.images}
        return {"scores": [score.to_json() for score in self.scores], "evidence": self.evidence, **where}

    def summary(self) -> str:
        figures = self.evidence
        bits = f", {figures[BITS_PER_DIM]:.3f} bits/dim" if BITS_PER_DIM in figures else ""
        return f"Frechet {figures['frechet']:.3g} = {figures['frechet_over_floor']:.2f} floors{bits}"


@dataclass(frozen=True)
class Question:
    """What is asked of a model or of images."""

    evaluate: Evaluate
    seed: int
    """Of the scores' own chance."""

    def fields(self) -> dict[str, Any]:
        """All of it that an answer depends on. UserError where the file of a network cannot be read."""
        asked = self.evaluate.model_dump(mode="json", exclude={"keep_samples", "inception"})
        features = file_digest(self.evaluate.inception) if self.evaluate.inception is not None else None
        return {"evaluate": asked, "features": features, "seed": self.seed, "measure": MEASURE}


def evaluate(model: Model, dataset: Dataset, spec: Spec, session: Session) -> Evaluation:
    """Score a model against the held-out images of a dataset. UserError where they are too few or do not fit it."""
    _check_fits(model, dataset)
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    n = _images_to_draw(dataset, spec, session)
    asked = {"model": model.identity, "settings": asdict(settings), "n": n}
    answer = _Answer(asked, dataset, Question(spec.evaluate, spec.seed), session)
    if (known := answer.known()) is not None:
        return known
    if model.dataset_digest != dataset.digest:
        session.progress.say(
            f"warning: {model.origin} was trained on other data than {dataset.place}: images that are held out there "
            "may be among them, and near_training is about training images that it may not have seen"
        )
    reference = answer.reference()
    # The bound's tasks run beside the sampling.
    bits = LikelihoodTasks(model, dataset, spec, session)
    look, drawn = _look_at_drawn(model, dataset, spec, n, reference, session)
    asked_for = model.spec.model.classes is not None
    scored = score_images(look, reference, seed=spec.seed, provenance=_of_model(model, spec), asked=asked_for)
    return answer.keep([*scored.scores, bits.score()], scored.pairs, drawn, reference)


def evaluate_samples(images: Dataset, dataset: Dataset, question: Question, session: Session) -> Evaluation:
    """Score the images of a sampling job, or the training images of any dataset, against the held-out ones of another.

    UserError where they are too few or of another kind.
    """
    for name in ("image_size", "channels"):
        if (given := getattr(images, name)) != (wanted := getattr(dataset, name)):
            raise UserError(f"SAMPLES {images.place}: {name} {given}, --against {dataset.place}: {wanted}")
    if min(n := len(images.split("train")), len(dataset.split(HELD_OUT)) // 2) < FEWEST // 2:
        held_out = len(dataset.split(HELD_OUT))
        raise UserError(
            f"SAMPLES {images.place}: {n} images against {held_out} held-out ones of {dataset.place}; scores need "
            f"{FEWEST // 2} and {FEWEST}"
        )
    answer = _Answer({"samples": images.digest}, dataset, question, session)
    if (known := answer.known()) is not None:
        return known
    reference = answer.reference()
    provenance: dict[str, Any] = {"samples_digest": images.digest}
    if is_job := (images.place / JOB).exists():
        record = (images.place / JOB).read_json()
        provenance |= {name: record[name] for name in _OF_A_JOB} | {"sample_seed": record["seed"]}
    look = reference.look(images, n)
    asked_for = is_job and bool(images.classes)
    scored = score_images(look, reference, seed=question.seed, provenance=provenance, asked=asked_for)
    return answer.keep(scored.scores, scored.pairs, str(images.place), reference)


def find_samples(text: str) -> Dataset | None:
    """The dataset in a folder: images that are there, and no model."""
    if "@" in text and not Path(text).exists():
        return None
    place = Place.of(text)
    return Dataset.open(place) if (place / CARD).exists() else None


def trained_on(model: Model, store: Place) -> Dataset:
    """The dataset that a model was trained on, in the store or where its spec names one. UserError where it is gone."""
    datasets = store / "datasets"
    source = model.spec.data.source
    for place in [*(datasets / name for name in datasets.list()), *([] if source == "digits" else [Place.of(source)])]:
        if (place / CARD).exists() and (found := Dataset.open(place)).digest == model.dataset_digest:
            return found
    raise UserError(f"{model.origin}: the data that it was trained on is not in {store}; name a dataset by --against")


class _Answer:
    """To one question about one model or set of images: kept in the store, or to be worked out."""

    def __init__(self, asked: Mapping[str, Any], dataset: Dataset, question: Question, session: Session) -> None:
        self._dataset, self._question, self._session = dataset, question, session
        key = identity({**asked, "dataset": dataset.digest, **question.fields()})[:16]
        self._place = session.store / "evaluations" / key

    def known(self) -> Evaluation | None:
        """What was answered before."""
        if not (self._place / MANIFEST).exists():
            return None
        record = json.loads(self._place.read_folder(_SCORES, PAIRS)[_SCORES])
        scores, images = [Score.from_json(one) for one in record["scores"]], record["images"]
        if not Path(images).is_absolute() and "://" not in images:
            images = str(self._session.store / images)
        return Evaluation(scores, record["evidence"], str(self._place / PAIRS), images)

    def reference(self) -> Reference:
        session = self._session
        net = extractor(self._dataset, self._question.evaluate, session)
        return Reference.of(self._dataset, net, session.store, session.cluster)

    def keep(self, scores: list[Score], pairs: bytes, images: str, reference: Reference) -> Evaluation:
        """Commit the answer, with its picture."""
        evidence = _evidence(scores, reference)
        record = {
            "scores": [score.to_json() for score in scores],
            "evidence": evidence,
            "images": images.removeprefix(f"{self._session.store}/"),  # the store may be moved
        }
        self._place.commit_folder({_SCORES: json.dumps(record).encode(), PAIRS: pairs})
        return Evaluation(scores, evidence, str(self._place / PAIRS), images)


def score_quality(model: Model, dataset: Dataset, spec: Spec, session: Session) -> Score:
    """The Frechet distance of a model's images alone, as `evaluate` has it."""
    _check_fits(model, dataset)
    n = _images_to_draw(dataset, spec, session)
    net = extractor(dataset, spec.evaluate, session)
    reference = Reference.of(dataset, net, session.store, session.cluster)
    look, _ = _look_at_drawn(model, dataset, spec, n, reference, session)
    sets = reference.sets(look.features, spec.seed)
    known = {**_of_model(model, spec), "dataset_digest": dataset.digest}
    return frechet_score(sets, seed=spec.seed, provenance=known)


def sampled_frechet(model: Model, dataset: Dataset, spec: Spec, store: Place, n: int) -> float:
    """Frechet distance of n images drawn in this process; the feature network must be in the store."""
    held_out, _ = Reader(dataset.split(HELD_OUT)).read_all()
    n = min(n, len(held_out) // 2)
    process, unet = model.build()
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    chunks = [range(start, start + settings.chunk) for start in range(0, n, settings.chunk)]
    drawn = [to_pixels(draw(process, unet, dataset.image_size, settings, indices)) for indices in chunks]
    net = kept_net(dataset, spec.evaluate, store)
    sets = SetFeatures.of(net, np.concatenate(drawn)[:n], held_out, spec.seed)
    return frechet_score(sets, seed=spec.seed, provenance={}).value


def _look_at_drawn(
    model: Model, dataset: Dataset, spec: Spec, n: int, reference: Reference, session: Session
) -> tuple[Look, str]:
    """What there is to see of a model's images, and where they lie; nowhere, where they are not to be kept."""
    if spec.evaluate.keep_samples:
        samples = sample_spec(model, spec, n, session, dataset.class_counts)
        return reference.look(Dataset.open(Place.of(samples.out)), n), samples.out
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    job = Job(session.store, settings, model.identity, model.digest, model.spec.model.classes)
    return draw_and_look(job, model, n, reference.looker, Studio.of(spec.sample, session)), ""


def _of_model(model: Model, spec: Spec) -> dict[str, Any]:
    """What the scores of a model's images know of it."""
    drawn = spec.sample.model_dump(mode="json", exclude={"n", "workers", "resources", "threads", "seed"})
    known = {"model_digest": model.digest, "trained_on_digest": model.dataset_digest, "ema": model.average}
    return {**known, **drawn, "sample_seed": spec.sample.seed}


def _images_to_draw(dataset: Dataset, spec: Spec, session: Session) -> int:
    held_out = len(dataset.split(HELD_OUT))
    n = min(spec.evaluate.samples or held_out, held_out // 2)
    if held_out < FEWEST:
        raise UserError(f"data.held_out: {held_out} images held out are too few to score against, raise it")
    if spec.evaluate.samples is not None and n < spec.evaluate.samples:
        session.progress.say(f"warning: evaluate.samples: {n} are drawn, half as many as are held out")
    if spec.evaluate.inception is None and n < spec.evaluate.feature_width:
        session.progress.say(
            f"warning: at n = {n}, fewer than the {spec.evaluate.feature_width} features, much of Frechet is chance: "
            "hold out more images (data.held_out), or add some"
        )
    return n


def _check_fits(model: Model, dataset: Dataset) -> None:
    data = model.spec.data
    if (data.image_size, data.channels) != (dataset.image_size, dataset.channels):
        raise UserError(
            f"--against {dataset.place}: images of {dataset.image_size} pixels and {dataset.channels} channels, "
            f"the model draws {data.image_size} and {data.channels}"
        )
    if (classes := model.spec.model.classes) not in (None, len(dataset.classes)):
        raise UserError(
            f"--against {dataset.place}: images of {len(dataset.classes)} classes, the model knows {classes}; "
            "name the dataset it was trained on, or one with the same classes"
        )
    if classes is not None and dataset.card["splits"][HELD_OUT]["unlabelled"]:
        raise UserError(f"--against {dataset.place}: some held-out images have no label, which this model needs")


def _evidence(scores: list[Score], reference: Reference) -> dict[str, float]:
    """The figures that gates look at."""
    values = {score.name: score.value for score in scores}
    (frechet,) = (score for score in scores if score.name == FRECHET)
    found = {
        **values,
        "frechet_floor": frechet.provenance["floor"],
        "frechet_over_floor": frechet.in_floors,
        "noise_over_floor": frechet.provenance["noise_in_floors"],
    }
    for score in scores:
        if score.name in (NEAR_FEATURES, NEAR_PIXELS):
            found[f"{score.name}_of_held_out"] = score.provenance["floor"]
    if (accuracy := reference.accuracy()) is not None:
        found["feature_accuracy"] = accuracy
    return found

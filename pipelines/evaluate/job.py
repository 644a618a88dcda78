"""Evaluation as a job: what scores need is made by Ray's processes and kept by digest, they by pure functions."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.manifest import CARD, Dataset
from pipelines.data.pixels import to_pixels
from pipelines.data.reader import Reader
from pipelines.drawing import Settings, draw
from pipelines.errors import UserError
from pipelines.evaluate.answers import Answer, Evaluation, Question
from pipelines.evaluate.extractors import extractor, kept_net
from pipelines.evaluate.images import Reference, score_images
from pipelines.evaluate.inception import WIDTH as INCEPTION_WIDTH
from pipelines.evaluate.judge import draw_and_look
from pipelines.evaluate.kept import kept
from pipelines.evaluate.likelihood import LikelihoodTasks
from pipelines.evaluate.look import Look
from pipelines.evaluate.overlap import SEEN, held_out_seen
from pipelines.evaluate.provenance import of_model, of_samples
from pipelines.evaluate.scores import FRECHET, NEAR_FEATURES, NEAR_PIXELS, Score
from pipelines.evaluate.sets import FEWEST, HELD_OUT, SetFeatures, frechet_score
from pipelines.evaluate.units import units_of, units_of_job
from pipelines.models import Model
from pipelines.sample import Studio, sample_spec
from pipelines.sample.job import Job, job_at
from pipelines.sections import Evaluate
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place, identity


def evaluate(model: Model, dataset: Dataset, spec: Spec, session: Session) -> Evaluation:
    """Score a model against the held-out images of a dataset. UserError where they are too few or do not fit it."""
    _check_fits(model, dataset)
    n, question = _images_to_draw(dataset, spec, session), Question(spec.evaluate, spec.seed)
    seen = held_out_seen(model, dataset, session.store)
    _warn_of_seen(model, dataset, seen, session)
    answer = Answer({**_asked(model, dataset, spec, n), SEEN: seen}, dataset, question, session)
    known = answer.known()
    if known is not None and (known.images or not spec.evaluate.keep_samples):
        return known
    reference = _reference(dataset, spec.evaluate, session)
    # The bound's tasks run beside the sampling.
    bits = LikelihoodTasks(model, dataset, spec, session)
    look, drawn = _look_at_drawn(model, dataset, spec, n, reference, session)
    provenance = {**of_model(model, dataset, spec), SEEN: seen}
    asked = _told_apart(model.spec.model.classes, reference, session)
    scored = score_images(look, reference, seed=spec.seed, provenance=provenance, asked=asked)
    scores = [*scored.scores, bits.score({SEEN: seen})]
    evidence = _evidence(scores, reference) | ({} if seen is None else {SEEN: float(seen)})
    return answer.keep(scores, evidence, scored.pairs, drawn)


def evaluate_samples(images: Dataset, dataset: Dataset, question: Question, session: Session) -> Evaluation:
    """Score the images of a sampling job, or the training images of any dataset, against the held-out ones of another.

    UserError where they are too few or of another kind.
    """
    for name in ("image_size", "channels"):
        if (given := getattr(images, name)) != (wanted := getattr(dataset, name)):
            raise UserError(f"SAMPLES {images.place}: {name} {given}, --against {dataset.place}: {wanted}")
    n, held_out = len(images.split("train")), len(dataset.split(HELD_OUT))
    if min(n, held_out // 2) < FEWEST // 2:
        raise UserError(
            f"SAMPLES {images.place}: {n} images against {held_out} held-out ones of {dataset.place}; scores need "
            f"{FEWEST // 2} and {FEWEST}"
        )
    _warn_of_few(min(n, held_out // 2), question.evaluate, session)
    drawn = of_samples(images, session.progress)
    answer = Answer({"samples": images.digest, "drawn": drawn}, dataset, question, session)
    if (known := answer.known()) is not None:
        # The same images may lie in several places.
        return replace(known, images=str(images.place))
    reference = _reference(dataset, question.evaluate, session)
    look = reference.look(units_of(images, "train", n))
    provenance = {"samples_digest": images.digest, **(drawn or {})}
    asked = drawn is not None and _told_apart(len(images.classes) or None, reference, session)
    scored = score_images(look, reference, seed=question.seed, provenance=provenance, asked=asked)
    return answer.keep(scored.scores, _evidence(scored.scores, reference), scored.pairs, str(images.place))


def find_samples(text: str) -> Dataset | None:
    """The dataset in a folder: images that are there, and no model."""
    if "@" in text and not Path(text).exists():
        return None
    place = Place.of(text)
    return Dataset.open(place) if (place / CARD).exists() else None


def score_quality(model: Model, dataset: Dataset, spec: Spec, session: Session) -> Score:
    """The Frechet distance of a model's images alone, as `evaluate` has it; kept, too, by itself."""
    _check_fits(model, dataset)
    n, question = _images_to_draw(dataset, spec, session), Question(spec.evaluate, spec.seed)
    known = {**_asked(model, dataset, spec, n), "dataset": dataset.digest, **question.fields(bits=False)}

    def score() -> Score:
        reference = _reference(dataset, spec.evaluate, session)
        look, _ = _look_at_drawn(model, dataset, spec, n, reference, session)
        provenance = {**of_model(model, dataset, spec), "dataset_digest": dataset.digest}
        return reference.frechet(look.features, spec.seed, provenance)

    return kept(session.store / "qualities" / f"{identity(known)[:16]}.json", score, Score.to_bytes, Score.of_bytes)


def sampled_frechet(model: Model, dataset: Dataset, spec: Spec, store: Place, n: int) -> float:
    """Frechet distance of n images drawn in this process; the feature network should be in the store."""
    held_out, _ = Reader(dataset.split(HELD_OUT)).read_all()
    n = min(n, len(held_out) // 2)
    process, unet = model.build()
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    chunks = [range(start, start + settings.chunk) for start in range(0, n, settings.chunk)]
    drawn = [to_pixels(draw(process, unet, dataset.image_size, settings, indices)) for indices in chunks]
    net = kept_net(dataset, spec.evaluate, store)
    sets = SetFeatures.of(net, np.concatenate(drawn)[:n], held_out, spec.seed)
    return frechet_score(sets, seed=spec.seed, provenance={}).value


def _reference(dataset: Dataset, asked: Evaluate, session: Session) -> Reference:
    return Reference.of(dataset, extractor(dataset, asked, session), session.store, session.cluster)


def _look_at_drawn(
    model: Model, dataset: Dataset, spec: Spec, n: int, reference: Reference, session: Session
) -> tuple[Look, str]:
    """What there is to see of a model's images, and where they lie; nowhere, where they are not to be kept."""
    if spec.evaluate.keep_samples:
        samples = sample_spec(model, spec, n, session, dataset.class_counts)
        # Not by the dataset that they are: of a larger job that has not ended they are none yet.
        return reference.look(units_of_job(job_at(Place.of(samples.out)), n)), samples.out
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    job = Job(session.store, settings, model.identity, model.digest, model.spec.model.classes)
    return draw_and_look(job, model, n, reference.looker, Studio.of(spec.sample, session)), ""


def _asked(model: Model, dataset: Dataset, spec: Spec, n: int) -> Mapping[str, Any]:
    """What an answer about a model depends on, beside dataset and question."""
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    return {"model": model.identity, "settings": asdict(settings), "n": n}


def _images_to_draw(dataset: Dataset, spec: Spec, session: Session) -> int:
    held_out = len(dataset.split(HELD_OUT))
    n = min(spec.evaluate.samples or held_out, held_out // 2)
    if held_out < FEWEST:
        raise UserError(f"data.held_out: {held_out} images held out are too few to score against, raise it")
    if spec.evaluate.samples is not None and n < spec.evaluate.samples:
        session.progress.say(f"warning: evaluate.samples: {n} are drawn, half as many as are held out")
    _warn_of_few(n, spec.evaluate, session)
    return n


def _warn_of_few(n: int, asked: Evaluate, session: Session) -> None:
    width = asked.feature_width if asked.inception is None else INCEPTION_WIDTH
    if n < width:
        session.progress.say(
            f"warning: at n = {n:,}, fewer than the {width:,} features, much of Frechet is chance: hold out more "
            "images (data.held_out), or add some"
        )


def _warn_of_seen(model: Model, dataset: Dataset, seen: int | None, session: Session) -> None:
    """Of held-out images that the model was trained on, and of training images that it may not have seen."""
    held_out = f"images held out in {dataset.place}"
    if seen is None:
        session.progress.say(
            f"warning: the data that {model.origin} was trained on is not to be found: {held_out} may be among it"
        )
    elif seen:
        of_all = f"{seen:,} of {len(dataset.split(HELD_OUT)):,}"
        session.progress.say(f"warning: {of_all} {held_out} are among those that {model.origin} was trained on")
    if model.dataset_digest != dataset.digest:
        session.progress.say(
            f"warning: {model.origin} was trained on other data than {dataset.place}: near_training is about training "
            "images that it may not have seen"
        )


def _told_apart(classes: int | None, reference: Reference, session: Session) -> bool:
    """Whether images were drawn for so many classes and the feature network tells just these; a line where it tells
    others."""
    known = reference.classes_told
    if classes is None or known is None:
        return False
    named = len(reference.dataset.classes)
    if classes == named == known:
        return True
    session.progress.say(
        f"warning: class_agreement is left out: the images are of {classes} classes, of the {named} of "
        f"{reference.dataset.place} the feature network knows {known}"
    )
    return False


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
    found = {score.name: score.value for score in scores}
    for score in scores:
        if score.name == FRECHET:
            found["frechet_floor"] = score.provenance["floor"]
            found["frechet_over_floor"] = score.in_floors
            found["noise_over_floor"] = score.provenance["noise_in_floors"]
        if score.name in (NEAR_FEATURES, NEAR_PIXELS):
            found[f"{score.name}_of_held_out"] = score.provenance["floor"]
    return found | reference.accuracy()

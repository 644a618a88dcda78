"""`ddpm evaluate` and `ddpm compare`: how good a model's images are, or images that are there, and which are better."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from jobs.options import Json, Overrides, RayAddress, Storage, TrackingUri, session_of
from jobs.output import print_result
from pipelines.errors import UserError

EXTRA = {"allow_extra_args": True}
"""For `--grid`, whose words follow one another."""

Subject = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|SAMPLES",
        help="A model as for `sample`, or the folder of images that `sample` or `ingest` wrote.",
        show_default=False,
    ),
]


def evaluate(
    words: typer.Context,
    subject: Subject,
    against: Annotated[str, typer.Option(metavar="DATASET", help="Folder of an ingested dataset.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="Bits/dim from every timestep, not from some drawn at random.")
    ] = False,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="steps=10,50 sampler=ddim,ancestral ...",
            help="A study instead: draw in all these ways, and find the cheapest that is as good as the best.",
        ),
    ] = None,
    ray: RayAddress = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score a model, or images, against a dataset's held-out images."""
    from jobs.live import kept_where_interrupted
    from jobs.score_tables import show_scores, show_study
    from pipelines.data.manifest import Dataset
    from pipelines.evaluate.job import find_samples
    from pipelines.evaluate.study import parse_grid, study
    from pipelines.models import find_model
    from pipelines.store import Place
    from pipelines.unused import warn_unused_by_study

    if words.args and grid is None:
        raise UserError(f"{words.args[0]}: one MODEL or SAMPLES is evaluated; `ddpm compare` takes two")
    ways = None if grid is None else parse_grid([word for text in (grid, *words.args) for word in text.split()])
    set_anew = [*(overrides or ()), *(["evaluate.exact=true"] if exact else [])]
    with session_of(None, storage, tracking_uri, address=ray) as session, kept_where_interrupted(session.progress):
        dataset = Dataset.open(Place.of(against))
        if ways is None:
            result = _evaluation(subject, dataset, set_anew, session).to_json()
        elif find_samples(subject) is not None:
            raise UserError(f"{subject}: these are images; a study draws from a MODEL")
        else:
            warn_unused_by_study(set_anew, ways[0])

            def model_of(chosen: Sequence[str]) -> Any:
                return find_model(subject, session.store, session.tracker, [*set_anew, *chosen], verb="evaluate")

            found = study(ways, model_of, dataset, session)
            result = found.to_json()
    if ways is None:
        print_result(as_json, result, lambda: show_scores(result["scores"], result["evidence"], result["pairs"]))
    else:
        print_result(as_json, result, lambda: show_study(found))


def compare(
    first: Subject,
    second: Subject,
    against: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="Folder of an ingested dataset [default: what a model was trained on]."),
    ] = None,
    ray: RayAddress = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Hold two models, or sets of images, against each other: only what may be compared, and where it can be told."""
    from jobs.live import kept_where_interrupted
    from jobs.score_tables import show_comparison
    from pipelines.data.manifest import Dataset
    from pipelines.evaluate.compare import compare as compare_evaluations
    from pipelines.evaluate.compare import keep_pictures
    from pipelines.store import Place

    with session_of(None, storage, tracking_uri, address=ray) as session, kept_where_interrupted(session.progress):
        if against is None:
            dataset = _trained_on((first, second), overrides or (), session)
        else:
            dataset = Dataset.open(Place.of(against))
        both = [_evaluation(subject, dataset, overrides or (), session) for subject in (first, second)]
        compared = compare_evaluations(*both)
        kept = keep_pictures(both, session.store, session.progress)
    picture = None if kept is None else str(kept)
    told = {"scores": [one.to_json() for one in compared], "first": first, "second": second, "picture": picture}
    print_result(as_json, told, lambda: show_comparison(compared, picture))


def _trained_on(subjects: Sequence[str], overrides: Sequence[str], session: Any) -> Any:
    """The data of the first that is a model."""
    from pipelines.evaluate.job import find_samples
    from pipelines.evaluate.overlap import trained_on
    from pipelines.models import find_model

    for subject in subjects:
        if find_samples(subject) is None:
            model = find_model(subject, session.store, session.tracker, overrides, verb="evaluate")
            return trained_on(model, session.store)
    raise UserError("--against: name the dataset that these images are scored against")


def _evaluation(subject: str, dataset: Any, overrides: Sequence[str], session: Any) -> Any:
    """The evaluation of a model, or of images."""
    from pipelines.evaluate import job
    from pipelines.models import find_model

    images = job.find_samples(subject)
    if images is not None:
        question = _question(overrides)
        session.progress.start("evaluate", subject)
        evaluation = job.evaluate_samples(images, dataset, question, session)
    else:
        found = find_model(subject, session.store, session.tracker, overrides, verb="evaluate")
        session.progress.start("evaluate", found.origin)
        evaluation = job.evaluate(found, dataset, found.spec, session)
    session.progress.finish("evaluate", evaluation.summary())
    return evaluation


def _question(overrides: Sequence[str]) -> Any:
    """What is asked of images: the fields of `evaluate` that are said."""
    import pydantic

    from pipelines.evaluate.answers import Question
    from pipelines.fields import apply_overrides
    from pipelines.mistakes import explain
    from pipelines.sections import Evaluate
    from pipelines.unused import OF_A_MODEL, warn_unused_by_images

    for override in overrides:
        if not override.startswith("evaluate."):
            raise UserError(f"--set {override}: of images that are there, only fields of evaluate can be set")
        if override.partition("=")[0] == "evaluate.samples":
            raise UserError(f"--set {override}: it is for a MODEL; images that are there are all scored")
    try:
        fields = apply_overrides({}, overrides)
        asked = Evaluate.model_validate(fields.get("evaluate", {}))
        warn_unused_by_images(overrides, asked)
        # Fields of a model leave no trace in the question: with them or without it is the same one.
        return Question(Evaluate.model_validate(asked.model_dump(exclude=set(OF_A_MODEL))), seed=0)
    except pydantic.ValidationError as error:
        raise UserError(f"evaluate: {explain(error, Evaluate)}") from None

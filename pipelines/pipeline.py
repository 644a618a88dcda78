"""The main job: ingest -> train -> evaluate -> sample -> register -> promote, each a content-addressed step."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.drawing import device_of
from pipelines.errors import Refused, UserError
from pipelines.ingested import ingested
from pipelines.models import Model, of_checkpoint
from pipelines.progress import counted
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.steps import Done, Step, Steps
from pipelines.store import Place, sha256
from pipelines.train.end import last_step, limits
from pipelines.train.registered import with_first_weights
from pipelines.train.run import Run, check_trainable, run_name, training_identity


@dataclass(frozen=True)
class Result:
    """What the main job ended with."""

    run: str
    folder: str
    grid: str
    scores: list[dict[str, Any]]
    evidence: dict[str, float]
    samples: dict[str, Any]
    name: str
    version: int
    champion: int | None
    """The version that has the alias now; another one where somebody decided so later."""
    decision: Mapping[str, Any] | None
    steps_done: list[str]
    steps_skipped: list[str]


def run(spec: Spec, session: Session) -> Result:
    """Bring a spec to a promoted model; what is done already is skipped.

    Refused, with the result so far, where a gate says no.
    """
    spec = with_first_weights(spec, session)
    steps = Steps(session.store / "steps", session.progress)
    dataset, ingest = ingested(spec, session, steps)
    _check_evaluable(spec, dataset)
    trained = steps.run(train_step(spec, dataset, session))
    training = Run(session.store / "runs" / trained.outputs["run"])
    # The run's own record has the spec it was first trained by; sampling and gates are those of this one.
    model = of_checkpoint(training, trained.outputs["step"], spec)
    evaluated = steps.run(evaluate_step(spec, dataset, model, session))
    sampled = steps.run(sample_step(spec, dataset, model, training, evaluated, session))
    registered = steps.run(register_step(spec, dataset, model, training, evaluated, session))
    every = {
        "ingest": ingest,
        "train": trained,
        "evaluate": evaluated,
        "sample": sampled,
        "register": registered,
    }
    refusal = None
    try:
        every["promote"] = steps.run(promote_step(spec, registered.outputs, session))
    except Refused as no:
        refusal = no
    result = Result(
        run=training.name,
        folder=str(training.place),
        grid=str(training.place / "grid.png"),
        scores=evaluated.outputs["scores"],
        evidence=evaluated.outputs["evidence"],
        samples={**sampled.outputs, "out": str(session.store / sampled.outputs["out"])},
        name=spec.name,
        version=registered.outputs["version"],
        champion=session.tracker.champion(spec.name),
        decision=every["promote"].outputs["decision"] if refusal is None else refusal.decision,
        steps_done=[name for name, step in every.items() if not step.skipped],
        steps_skipped=[name for name, step in every.items() if step.skipped],
    )
    if refusal is not None:
        refusal.result = result
        raise refusal
    if result.champion != result.version:
        session.progress.say(f"warning: {spec.name}@champion is version {result.champion} now, by a later decision")
    return result


def _check_evaluable(spec: Spec, dataset: Dataset) -> None:
    """UserError, before the training, where the evaluation after it could not be done."""
    from pipelines.evaluate.sets import FEWEST

    if (held_out := len(dataset.split("held-out"))) < FEWEST:
        raise UserError(
            f"data.held_out: of {spec.data.source} {held_out} images are held out, and scores need {FEWEST}; raise it"
        )


def run_training(spec: Spec, session: Session) -> dict[str, Any]:
    """Ingest and train, or find both done; where the trained checkpoint is and what is in it."""
    spec = with_first_weights(spec, session)
    steps = Steps(session.store / "steps", session.progress)
    dataset, _ = ingested(spec, session, steps)
    done = steps.run(train_step(spec, dataset, session))
    if done.skipped:  # MLflow may have been out of reach then, or be another one now
        made = Run(session.store / "runs" / done.outputs["run"])
        with session.tracker.shipping(made, spec, dataset, session.progress, driven=False):
            pass
    return done.outputs


def run_certificate(spec: Spec, session: Session, steps: int, kills: int) -> dict[str, Any]:
    """Ingest, and try whether the spec's training goes on to the same bits after kills; kept, and told to MLflow."""
    from pipelines.train.certificate import certify

    spec = with_first_weights(spec, session)
    dataset, _ = ingested(spec, session, Steps(session.store / "steps", session.progress))
    check_trainable(spec, dataset)
    place = session.store / "verify-resume" / run_name(spec, dataset.digest)
    certificate = certify(spec, dataset, place, session.cluster, session.progress, steps, kills)
    told = {**asdict(certificate), "place": str(place / "certificate.json")}
    (place / "certificate.json").write_json(told)
    with session.tracker.tolerant("certificate kept back"):
        session.tracker.certificate(certificate.name, told)
    return told


def run_sweep(spec: Spec, session: Session) -> dict[str, Any]:
    """Ingest and sweep, or find both done: the ranking, and where the winner's spec is."""
    from pipelines.sweep import sweep_step

    if not session.store.is_local:
        raise UserError(f"storage {session.store}: a sweep needs a folder that its hosts share; give a path")
    spec = with_first_weights(spec, session)
    steps = Steps(session.store / "steps", session.progress)
    dataset, _ = ingested(spec, session, steps)
    return steps.run(sweep_step(spec, dataset, session)).outputs


def register_finished(training: Run, session: Session) -> dict[str, Any]:
    """Evaluate, sample and register a run that has ended, by the spec recorded with it."""
    spec = training.spec()
    step = last_step(training, spec.train)
    if not training.checkpoints.verifies(step):
        raise UserError(f"run {training.name}: its training has not ended; `ddpm train` its spec first")
    steps = Steps(session.store / "steps", session.progress)
    dataset, _ = ingested(spec, session, steps)
    if dataset.digest != training.description()["dataset_digest"]:
        raise UserError(f"run {training.name}: its data source has changed since, so it cannot be evaluated as it was")
    model = of_checkpoint(training, step)
    evaluated = steps.run(evaluate_step(spec, dataset, model, session))
    steps.run(sample_step(spec, dataset, model, training, evaluated, session))
    return steps.run(register_step(spec, dataset, model, training, evaluated, session)).outputs


def train_step(spec: Spec, dataset: Dataset, session: Session) -> Step:
    """The U-Net learns. UserError where it cannot learn from these images, or from its first weights."""
    check_trainable(spec, dataset)
    fields = training_identity(spec)
    named = run_name(spec, dataset.digest, fields["train"]["init_from"])

    def work() -> dict[str, Any]:
        from pipelines.train.driver import train

        done = train(spec, dataset, session.store, session.cluster, session.tracker, session.progress)
        if done.run != named:  # or the step would be remembered as what another run is the result of
            raise UserError(
                f"train.init_from: the weights in {spec.train.init_from} were changed at the start; try again"
            )
        images = done.step * spec.train.global_batch
        ended = {"budget": ", all that its budget allowed", "plateau": ", where its score got no better"}
        told = f"{images:,} images in {done.step:,} steps{ended.get(done.why or '', '')}, run {done.run}"
        return {**asdict(done), "summary": told}

    return Step(
        name="train",
        version=1,
        inputs={
            **fields,
            "dataset": dataset.digest,
            "steps": spec.train.total_steps,
            **{name: limit for name, limit in limits(spec.train).items() if limit is not None},
            "name": spec.name,
        },
        work=work,
        needs=lambda outputs: Run(session.store / "runs" / outputs["run"]).checkpoints.verifies(outputs["step"]),
        doing=_starting(spec),
    )


def _starting(spec: Spec) -> str:
    least, most = spec.train.least_workers, spec.train.most_workers
    if least < most:
        return f"{least} to {counted(most, 'worker')} start"
    return f"{counted(most, 'worker')} start{'s' if most == 1 else ''}"


def evaluate_step(spec: Spec, dataset: Dataset, model: Model, session: Session) -> Step:
    """The model meets images that it has not seen."""
    from pipelines.evaluate.answers import Question
    from pipelines.evaluate.job import evaluate

    def work() -> dict[str, Any]:
        evaluation = evaluate(model, dataset, spec, session)
        return {**evaluation.to_json(), "summary": evaluation.summary()}

    return Step(
        name="evaluate",
        version=2,
        inputs={
            "model": model.identity,
            "dataset": dataset.digest,
            **Question(spec.evaluate, spec.seed).fields(),
            "sampling": _sampling(spec),
        },
        work=work,
        needs=lambda outputs: Place.of(outputs["pairs"]).exists(),
        doing="feature network, samples, bits/dim",
    )


def sample_step(spec: Spec, dataset: Dataset, model: Model, training: Run, evaluated: Done, session: Session) -> Step:
    """Images in bulk, and the pictures of the run."""
    from pipelines.pictures import draw_pictures
    from pipelines.sample import holds_samples, sample_spec

    def work() -> dict[str, Any]:
        samples = sample_spec(model, spec, spec.sample.n, session, dataset.class_counts)
        pairs = Place.of(evaluated.outputs["pairs"]).read()
        pictures = draw_pictures(spec, dataset, model, training, samples, pairs)
        out = samples.out.removeprefix(f"{session.store}/")
        summary = f"{samples.n:,} images, grid at {training.place / 'grid.png'}"
        return {"out": out, "n": samples.n, "sha256": samples.sha256, "pictures": pictures, "summary": summary}

    def needs(outputs: Mapping[str, Any]) -> bool:
        if not holds_samples(session.store / outputs["out"], outputs["n"]):
            return False
        # A longer run, or other samplings of this one, may have drawn into the same folder since.
        return all(
            (training.place / name).exists() and sha256((training.place / name).read()) == digest
            for name, digest in outputs["pictures"].items()
        )

    return Step(
        name="sample",
        version=2,
        inputs={
            "model": model.identity,
            "sampling": _sampling(spec),
            "n": spec.sample.n,
            "run": training.name,
            "scores": evaluated.outputs["scores"],
        },
        work=work,
        needs=needs,
        doing=f"{counted(spec.sample.n, 'image')}, {counted(spec.sample.steps, 'step')} of {spec.sample.sampler}",
    )


def register_step(spec: Spec, dataset: Dataset, model: Model, training: Run, evaluated: Done, session: Session) -> Step:
    """The model enters the registry, with its evidence."""
    scores, tracker = evaluated.outputs, session.tracker

    def work() -> dict[str, Any]:
        from pipelines.registry.evidence import register_run

        version, run_id = register_run(spec, dataset, model, training, scores, tracker)
        return {"version": version, "run_id": run_id, "summary": f"{spec.name} version {version}"}

    return Step(
        name="register",
        version=1,
        inputs={
            "model": model.identity,
            "name": spec.name,
            "sampling": _sampling(spec),
            "scores": scores["scores"],
            "tracking": session.tracking_uri,
        },
        work=work,
        needs=lambda outputs: session.tracker.has_version(spec.name, outputs["version"], model.identity),
        doing=f"as {spec.name}",
    )


def promote_step(spec: Spec, registered: Mapping[str, Any], session: Session) -> Step:
    """The gates decide, once for a registered version: a later rollback is not undone by running the spec again."""
    version = registered["version"]

    def work() -> dict[str, Any]:
        from pipelines.registry.promote import promote

        decision = promote(spec.name, str(version), spec.promote, session.tracking_uri, session.store)
        return {"decision": decision, "summary": f"{spec.name} version {version} passed every gate"}

    return Step(
        name="promote",
        version=1,
        inputs={
            "name": spec.name,
            "version": version,
            "run_id": registered["run_id"],
            "gates": spec.promote.model_dump(mode="json"),
            "tracking": session.tracking_uri,
        },
        work=work,
        doing="through the gates",
    )


def _sampling(spec: Spec) -> dict[str, Any]:
    """The fields of sampling that decide an image."""
    sampling = spec.sample.model_dump(mode="json")
    del sampling["n"], sampling["workers"], sampling["resources"]
    return {**sampling, "device": device_of(spec.sample)}

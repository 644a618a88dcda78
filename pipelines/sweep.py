"""Sweep schedule settings with Ray Tune: every trial is a training run like any other, ranked by what is comparable.

Training losses of different schedules are sums over different noise levels and say nothing about each other, so trials
are scored by bits/dim on the same held-out images, with the Frechet distance of their samples beside it.

What a trial does is in `pipelines/trial.py`. Which trials an early-stopping scheduler ends depends on the order in
which they report; what each trial computes does not.
"""

import itertools
import math
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ddpm_core import noise
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed, UserError, one_line
from pipelines.evaluate.extractors import feature_net
from pipelines.evaluate.measure import MEASURE
from pipelines.fields import set_field
from pipelines.progress import counted
from pipelines.session import Session
from pipelines.spec import Spec, Sweep, dump_spec, parse_spec
from pipelines.steps import Step
from pipelines.store import Place, identity
from pipelines.train.run import Run, check_trainable, training_identity
from pipelines.trial import CLOCK, METRIC, run_trial
from pipelines.unused import warn_without_effect, without_effect

_OF_TRAINING = tuple(
    f"train.{name}" for name in ("learning_rate", "warmup_images", "weight_decay", "grad_clip", "ema_half_life")
)
"""Fields of `train` that may be swept: not those that say how much is trained, or by whom."""
_WATCH_SECONDS = 0.5
_TRIAL_CPU = 0.01
"""CPUs of a trial that only starts a group of workers; Tune refuses none at all."""


@dataclass(frozen=True)
class Trial:
    """One setting and how it did."""

    run: str
    parameters: dict[str, Any]
    images: int
    """Images that it trained on."""
    bits_per_dim: float
    frechet: float | None
    """None where it was stopped early."""
    finished: bool
    error: str | None
    """Why it diverged, where it did."""


def sweep_step(spec: Spec, dataset: Dataset, session: Session) -> Step:
    """The sweep as a step: the same spec and data are swept once."""
    if spec.sweep is None:
        raise UserError("sweep: this spec has no `sweep:` section, add one with the parameters to try")
    if len(dataset.split("held-out")) < 4:
        raise UserError("data.held_out: fewer than 4 images are held out, too few to rank trials by; raise it")
    trials = trial_specs(spec)
    for _, trial in trials:
        _check_comparable(trial)
        check_trainable(trial, dataset)
        warn_without_effect(trial, said=without_effect(spec))
    inputs = {
        "name": spec.name,
        "dataset": dataset.digest,
        "trials": [training_identity(trial) for _, trial in trials],
        "images": spec.train.total_steps * spec.train.global_batch,
        "sweep": spec.sweep.model_dump(mode="json"),
        "measure": MEASURE,
        "evaluate": spec.evaluate.model_dump(mode="json"),
        "sampling": spec.sample.model_dump(mode="json", exclude={"workers", "resources", "n"}),
        "tracking": session.tracking_uri,
    }
    name = f"{spec.name}-{identity(inputs)[:12]}"

    def work() -> dict[str, Any]:
        with (session.store / "sweeps" / name / "lock").lock(f"sweep {name}"):
            ranking = sweep(spec, dataset, session, name)
        best = ranking[0]
        winner = session.store / "sweeps" / name / "winner.yaml"
        settings = next(trial for parameters, trial in trials if parameters == best.parameters)
        winner.write(dump_spec(settings).encode())
        return {
            "sweep": name,
            "winner": str(winner),
            "ranking": [{**asdict(trial), "setting": words(trial.parameters)} for trial in ranking],
            "summary": f"{counted(len(ranking), 'trial')}, best {words(best.parameters)}",
        }

    return Step(
        name="sweep",
        version=1,
        inputs=inputs,
        work=work,
        needs=lambda outputs: Place.of(outputs["winner"]).exists(),
        doing=f"{counted(len(trials), 'trial')}, {spec.sweep.concurrent} at a time",
    )


def _check_comparable(trial: Spec) -> None:
    """UserError where a trial could end early, or have another number of workers than was made room for."""
    train = trial.train
    other = {
        "train.budget_minutes": train.budget_minutes,
        "train.plateau": train.plateau,
        "train.keep_best": train.keep_best,
    }
    if given := next((name for name, value in other.items() if value), None):
        raise UserError(f"{given}: trials are compared at as many images: leave it out; there is sweep.early_stop")
    if train.least_workers != train.most_workers:
        raise UserError("train.workers: a trial has a fixed number of them, give one number")


def trial_specs(spec: Spec) -> list[tuple[dict[str, Any], Spec]]:
    """Every trial's parameters and full spec. UserError, before anything starts, where one is not valid."""
    sweep = spec.sweep
    assert sweep is not None
    trials = []
    for parameters in _grid(sweep) if sweep.search == "grid" else _draws(sweep, spec.seed):
        fields = spec.model_dump(mode="json", exclude={"sweep"})
        for name, value in parameters.items():
            if name.split(".")[0] not in ("diffusion", "model", "seed") and name not in _OF_TRAINING:
                known = ", ".join(("diffusion.*", "model.*", "seed", *_OF_TRAINING))
                raise UserError(f"sweep.parameters: {name} cannot be swept, only {known}")
            fields = set_field(fields, name, value)
        trials.append((parameters, parse_spec(fields, f"sweep trial {words(parameters)}")))
    identities = [identity(trial.training_fields()) for _, trial in trials]
    if len(set(identities)) < len(identities):
        raise UserError("sweep.parameters: two trials have the same settings; leave one of them out")
    return trials


def sweep(spec: Spec, dataset: Dataset, session: Session, name: str) -> list[Trial]:
    """Train and score every trial; finished ones first, by bits/dim. Failed where one broke off, or none finished."""
    assert spec.sweep is not None
    session.cluster.check_serves_tune()
    from ray import tune

    trials = trial_specs(spec)
    runs = [Run.of(trial, dataset.digest, session.store) for _, trial in trials]
    for run, (_, trial) in zip(runs, trials, strict=True):
        run.describe(trial, dataset.digest)
        run.forget_live()
    feature_net(dataset, spec.evaluate, session)
    folder = session.store / "sweeps" / name
    setting = {
        "dataset": str(dataset.place),
        "store": str(session.store),
        "frechet_images": spec.sweep.frechet_images,
    }
    tuner = tune.Tuner(
        tune.with_resources(run_trial, _resources(spec)),
        param_space={
            "trial": tune.grid_search([trial.model_dump(mode="json") for _, trial in trials]),
            **setting,
        },
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            max_concurrent_trials=_concurrent(spec, session),
            scheduler=_scheduler(spec),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder / "ray"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    shutil.rmtree((folder / "ray").path, ignore_errors=True)
    total = sum(trial.train.total_steps * trial.train.global_batch for _, trial in trials)
    results = _fit_and_watch(tuner, runs, total, session)
    shutil.rmtree((folder / "ray").path, ignore_errors=True)
    if crashed := [str(result.error).splitlines()[-1] for result in results if result.error]:
        raise Failed(f"{len(crashed)} of {len(trials)} trials broke off, run the sweep again: {crashed[0]}")
    ranking = sorted((_outcome(result, trials) for result in results), key=_rank)
    if not ranking[0].finished:
        how = ranking[0].error or "all were stopped early; raise sweep.early_stop.grace_images"
        raise Failed(f"no trial finished: {how}")
    try:
        _track(spec, dataset, session, name, trials, ranking)
    except Exception as error:
        # Not done, then: the trials are trained, so that running it again takes little more than to record it.
        raise Failed(f"the trials are done, but MLflow does not take them ({one_line(error)}): sweep again") from error
    return ranking


def _grid(sweep: Sweep) -> list[dict[str, Any]]:
    return [
        dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*sweep.parameters.values())
    ]


def _draws(sweep: Sweep, seed: int) -> list[dict[str, Any]]:
    """Distinct random points of the grid, keyed by the spec's seed."""
    grid = _grid(sweep)
    assert sweep.trials is not None
    if sweep.trials > len(grid):
        raise UserError(f"sweep.trials: {sweep.trials} asked, but the parameters have only {len(grid)} combinations")
    keys = noise.bits([noise.key(seed, "sweep")], len(grid))[0].tolist()
    chosen = sorted(range(len(grid)), key=lambda i: (keys[i], i))[: sweep.trials]
    return [grid[i] for i in chosen]


def _resources(spec: Spec) -> dict[str, float]:
    alone = spec.train.most_workers == 1 and not spec.train.oversubscribe
    return {"CPU": spec.train.threads if alone else _TRIAL_CPU}


def _concurrent(spec: Spec, session: Session) -> int:
    """Trials at a time: no more than fit, or the groups would wait for CPUs that waiting trials hold."""
    assert spec.sweep is not None
    workers = spec.train.most_workers
    need = spec.train.threads * workers + (_TRIAL_CPU if workers > 1 else 0)
    fit = math.floor(session.cluster.cpus() / need)
    if fit < 1 and not spec.train.oversubscribe:
        raise UserError(
            f"sweep: a trial of {counted(workers, 'worker')} needs {need:g} CPUs, the cluster has "
            f"{session.cluster.cpus()}: lower train.workers or train.threads"
        )
    return max(1, min(spec.sweep.concurrent, fit))


def _scheduler(spec: Spec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    assert spec.sweep is not None
    stop = spec.sweep.early_stop
    if stop is None:
        return FIFOScheduler()
    # Rungs on the images-seen clock: Tune's own iteration starts again where a trial is retried.
    return ASHAScheduler(
        time_attr=CLOCK,
        max_t=spec.train.total_steps * spec.train.global_batch + 1,
        grace_period=stop.grace_images,
        reduction_factor=stop.reduction,
    )


def _fit_and_watch(tuner: Any, runs: Sequence[Run], total: int, session: Session) -> Any:
    """Tune beside the main thread, which shows how far the trials are."""
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(tuner.fit())
        except BaseException as error:  # handed to the main thread
            ended.append(error)

    thread = threading.Thread(target=work, name="ray-tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_WATCH_SECONDS)
        images = [live["images"] for run in runs if (live := run.live())]
        session.progress.advance(sum(images), total, "images", trials=len(images))
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


def _outcome(result: Any, trials: Sequence[tuple[dict[str, Any], Spec]]) -> Trial:
    fields = result.config["trial"]
    spec = parse_spec(fields)
    parameters = next(p for p, trial in trials if trial == spec)
    metrics = result.metrics or {}
    dataset = Dataset.open(Place.of(result.config["dataset"]))
    return Trial(
        run=Run.of(spec, dataset.digest, Place.of(result.config["store"])).name,
        parameters=parameters,
        images=int(metrics.get(CLOCK, 0)),
        bits_per_dim=float(metrics.get(METRIC, math.inf)),
        frechet=metrics.get("frechet"),
        finished=bool(metrics.get("finished")),
        error=metrics.get("diverged"),
    )


def _rank(trial: Trial) -> tuple[bool, float]:
    bits = trial.bits_per_dim
    return (not trial.finished, math.inf if math.isnan(bits) else bits)


def _track(
    spec: Spec,
    dataset: Dataset,
    session: Session,
    name: str,
    trials: Sequence[tuple[dict[str, Any], Spec]],
    ranking: Sequence[Trial],
) -> None:
    """A parent run for the sweep, a child run a trial with its metrics."""
    tracker = session.tracker
    parent = tracker.parent_run(name, {"ddpm.sweep": name, "ddpm.dataset_digest": dataset.digest})
    specs = {Run.of(trial, dataset.digest, session.store).name: trial for _, trial in trials}
    for place, trial in enumerate(ranking, start=1):
        run = Run(session.store / "runs" / trial.run)
        run_id = tracker.run_id(run, specs[trial.run], dataset, parent=parent)
        tracker.ship(run, specs[trial.run], dataset, "FINISHED")
        figures = {METRIC: trial.bits_per_dim, "frechet": trial.frechet}
        step = trial.images // spec.train.global_batch
        tracker.scores(run_id, {k: v for k, v in figures.items() if v is not None and math.isfinite(v)}, step)
        tracker.finish(run_id, {"ddpm.rank": str(place), "ddpm.finished": str(trial.finished)})
    tracker.json(parent, "ranking.json", [asdict(trial) for trial in ranking])
    tracker.finish(parent, {"ddpm.winner": ranking[0].run})


def words(parameters: Mapping[str, Any]) -> str:
    """A trial's parameters as people say them: `schedule linear beta_end 0.01`."""
    return ", ".join(f"{name.split('.')[-1]} {_short(value)}" for name, value in parameters.items())


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(v) if k == "kind" else f"{k} {v}" for k, v in value.items())
    return str(value)

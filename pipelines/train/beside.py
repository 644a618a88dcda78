"""Held-out scores beside training: a Ray task takes them, of committed checkpoints, where the cluster has room for it.

On a cluster, hosts that offer the resource `ddpm_scoring` are for it: a resource of its own neither takes the workers'
CPUs nor misleads Ray, which counts all CPUs of the cluster when it looks for more workers. On a single host, a group of
fixed size also leaves a task the CPUs that it does not use itself. Else the ranks pause and share the work.
"""

import time
from typing import Any

import safetensors.torch

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed, one_line
from pipelines.progress import Progress
from pipelines.spec import Spec, parse_spec
from pipelines.store import DamageError, Place
from pipelines.train.checkpoint import EMA
from pipelines.train.end import awaited_scores
from pipelines.train.group import on_gpu, worker_environment, workers_needed
from pipelines.train.run import Run

RESOURCE = "ddpm_scoring"
_PAUSE_SECONDS = 30.0
"""Between scores, where no interval is given: each begins a process."""
_ATTEMPTS = 3
_LOOK_SECONDS = 0.25
_PATIENCE_SECONDS = 900.0


class ScoresBeside:
    """Of one drive of a run: one task at a time."""

    def __init__(self, spec: Spec, dataset: Dataset, run: Run, options: dict[str, Any], progress: Progress) -> None:
        self._spec, self._dataset, self._run, self._options, self._progress = spec, dataset, run, options, progress
        self._task: Any = None
        self._step = 0
        self._begun = time.monotonic()
        self._waits = False
        """Whether it was said that a task waits."""
        self._failures: dict[int, int] = {}

    @staticmethod
    def where_there_is_room(
        spec: Spec, dataset: Dataset, run: Run, cluster: Cluster, progress: Progress
    ) -> "ScoresBeside | None":
        """None where the ranks have to score, or nobody."""
        train = spec.train
        if train.score is None or len(dataset.split("held-out")) < 2:
            return None
        alone = train.least_workers == train.most_workers and not on_gpu(spec) and cluster.hosts() == 1
        if cluster.resource(RESOURCE) >= 1:
            options: dict[str, Any] = {"num_cpus": 0, "resources": {RESOURCE: 1}}
        elif alone and cluster.cpus() >= (workers_needed(spec) + 1) * train.threads:
            options = {"num_cpus": train.threads}
        else:
            return None
        options["runtime_env"] = {"env_vars": worker_environment(train.threads)}
        return ScoresBeside(spec, dataset, run, {**options, "max_retries": 0}, progress)

    def look(self) -> bool:
        """Have the next score taken, if none is in hand; whether one was finished."""
        finished = False
        if self._task is not None:
            if not self._is_over():
                return False
            finished = True
        if (step := self._next()) is not None:
            self._begin(step)
        return finished

    def _begin(self, step: int) -> None:
        import ray

        task = ray.remote(**self._options)(_score)
        self._step, self._begun = step, time.monotonic()
        self._task = task.remote(
            self._spec.model_dump(mode="json"), str(self._dataset.place), str(self._run.place), step
        )

    def finish(self) -> None:
        """Wait for the scores that are due by an interval. Failed where they cannot be had."""
        heard = time.monotonic()
        while due := self._due():
            if self.look():
                heard = time.monotonic()
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - heard > _PATIENCE_SECONDS:
                raise Failed(
                    f"run {self._run.name}: the held-out score of step {due[0]:,} was not taken within "
                    f"{_PATIENCE_SECONDS / 60:g} minutes, by a task with "
                    f"{self._asked()}; the same command goes on with it"
                )

    def cancel(self) -> None:
        """Leave what is not finished."""
        if self._task is not None:
            import ray

            ray.cancel(self._task, force=True)
            self._task = None

    def _is_over(self) -> bool:
        import ray

        if not ray.wait([self._task], timeout=0)[0]:
            if not self._waits and time.monotonic() - self._begun > _PATIENCE_SECONDS:
                self._waits = True
                self._progress.say(
                    f"warning: a held-out score has been waiting for {_PATIENCE_SECONDS / 60:g} minutes, "
                    f"for a task with {self._asked()}; training goes on"
                )
            return False
        task, self._task = self._task, None
        try:
            ray.get(task)
        except Exception as error:
            damaged = isinstance(getattr(error, "cause", error), DamageError)
            self._failures[self._step] = _ATTEMPTS if damaged else self._failures.get(self._step, 0) + 1
            if self._failures[self._step] >= _ATTEMPTS:
                self._give_up(f"the held-out score of step {self._step:,} could not be taken ({one_line(error)})")
        return True

    def _give_up(self, told: str) -> None:
        if self._spec.train.plateau is None:
            self._progress.say(f"warning: {told}; training goes on")
            return
        raise Failed(
            f"run {self._run.name}: {told}, by which train.plateau ends it; if its checkpoint is damaged, delete it "
            "and those after it, and the same command goes on from the one before"
        )

    def _next(self) -> int | None:
        """The step to be scored now."""
        if self._spec.train.scored_steps(self._spec.train.total_steps):
            return next(iter(self._due()), None)
        if time.monotonic() - self._begun < _PAUSE_SECONDS:
            return None
        done = {score.step for score in self._run.scores.taken(self._spec.train)}
        newest = max(self._run.checkpoints.steps(), default=0)
        return newest if newest and newest not in done and newest not in self._failures else None

    def _due(self) -> list[int]:
        """Steps to be scored by the spec's interval, and not given up."""
        awaited = awaited_scores(self._run, self._spec.train)
        return [step for step in awaited if self._failures.get(step, 0) < _ATTEMPTS]

    def _asked(self) -> str:
        resources = self._options.get("resources", {})
        return ", ".join(f"{n:g} {name}" for name, n in {"CPU": self._options["num_cpus"], **resources}.items() if n)


def _score(fields: dict[str, Any], dataset: str, run: str, step: int) -> None:
    """The task: what a checkpoint's average scores, kept in the run's folder."""
    import torch

    from pipelines.train.scoring import Scoring

    began = time.perf_counter()
    spec, training = parse_spec(fields), Run(Place.of(run))
    torch.set_num_threads(spec.train.threads)
    try:
        weights = safetensors.torch.load(training.checkpoints.at(step).read_folder(EMA)[EMA])
    except (DamageError, FileNotFoundError):
        if step in spec.train.scored_steps(step):
            raise
        return  # thinned out meanwhile
    scoring = Scoring(spec, Dataset.open(Place.of(dataset)), torch.device("cpu"))
    training.scores.commit(*scoring.score([scoring.work(weights)], step, began))

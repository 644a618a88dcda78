"""The group of workers that train a run: Ray Train starts them, and starts them again when one dies."""

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import Failed
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.loop import Hook, World, train_from_config
from pipelines.train.run import Run

MAX_WORKER_FAILURES = 5
"""Times the workers may die before the run gives up."""
_STARTUP_FAILURES = 5
_COLLECTIVE_SECONDS = 120


def fit(
    spec: Spec, dataset: Dataset, run: Run, callbacks: Sequence[Any] = (), at_checkpoint: Hook | None = None
) -> None:
    """Train with a group of Ray Train workers, in a process connected to Ray. The run's lock is the caller's."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus: float = spec.train.threads
    if spec.train.oversubscribe:
        cpus = min(cpus, ray.cluster_resources().get("CPU", 1) / (2 * spec.train.workers))
    notes = _notes_of(run)
    config = {"spec": spec.model_dump(mode="json"), "dataset": str(dataset.place), "run": str(run.place)}
    trainer = TorchTrainer(
        functools.partial(_worker, at_checkpoint=at_checkpoint),
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=spec.train.workers, resources_per_worker={"CPU": cpus, **spec.train.resources}
        ),
        run_config=RunConfig(
            # Ray is given no checkpoints; what it notes about an attempt is of no use to the next one.
            name=f"attempt-{run.newest_attempt() + 1:04d}",
            storage_path=str(notes),
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES, controller_failure_limit=_STARTUP_FAILURES),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": worker_environment(spec.train.threads)},
        ),
    )
    try:
        diverged = trainer.fit().return_value
    finally:
        notes.remove()
    if diverged:
        raise Failed(diverged)


def _notes_of(run: Run) -> Place:
    """A folder for what Ray notes of an attempt: the run's, or where that is none, one of this host's own."""
    return run.place / "ray" if run.place.is_local else Place.of(tempfile.mkdtemp(prefix="ddpm-ray-"))


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes: its threads come from the spec, not from what Ray guesses."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }


def _worker(config: dict[str, Any], at_checkpoint: Hook | None) -> str | None:
    import ray.train

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    try:
        train_from_config(config, world, at_checkpoint)
    except (Failed, ValueError) as error:
        # Not raised: Ray would start the group again, which would meet the same bits again.
        return str(error)
    return None


def explained(error: BaseException) -> BaseException:
    """The failure of a worker, not Ray's wrapping of it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = min(failures.items())
        cause = getattr(first, "cause", None) or first
        return Failed(f"training worker {rank} failed: {type(cause).__name__}: {cause}")
    return error

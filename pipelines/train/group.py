"""The group of workers that train a run: Ray Train starts them, and starts them again when one dies."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.data.order import owners
from pipelines.errors import Diverged, Failed, one_line
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.end import Why
from pipelines.train.loop import Hook, train_from_config
from pipelines.train.run import Run
from pipelines.train.world import PATIENCE, World

_WORKER_FAILURES = 5
_CONTROLLER_FAILURES = 5
"""As many deaths in a row, of either, without a checkpoint in between are made good again."""
START_SECONDS = 180
"""How long a group is waited for that does not find its resources."""
_RESIZE_SECONDS = 10


def fit_through_deaths(
    spec: Spec,
    dataset: Dataset,
    run: Run,
    say: Callable[[str], None],
    is_given_up: Callable[[], bool],
    scores: bool = True,
    alone: bool = False,
) -> Why | None:
    """`fit`, begun again where the group is past help though the run got on, or where its controller died; not any
    more once the run's lock `is_given_up`.
    """
    controllers = 0
    while True:
        before = _newest(run)
        try:
            return fit(spec, dataset, run, scores=scores, alone=alone)
        except Failed:
            raise
        except Exception as error:
            got_on = _newest(run) > before
            controllers = 0 if got_on else controllers + 1
            by_controller = _is_death(error)
            if is_given_up() or not (got_on or (by_controller and controllers <= _CONTROLLER_FAILURES)):
                raise
            what = (
                "Ray Train's controller died"
                if by_controller
                else f"the workers failed ({one_line(explained(error, spec))})"
            )
            say(f"warning: {what}: the group starts again from the last checkpoint")


def fit(
    spec: Spec,
    dataset: Dataset,
    run: Run,
    callbacks: Sequence[Any] = (),
    at_checkpoint: Hook | None = None,
    scores: bool = True,
    alone: bool = False,
) -> Why | None:
    """Train with a group of Ray Train workers, in a process connected to Ray; what ended it before `train.images`, if
    anything did. The run's lock is the caller's. `alone`: nothing else runs on the cluster. Failed where the training
    diverged.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    notes = _notes_of(run)
    config = {
        "spec": spec.model_dump(mode="json"),
        "dataset": str(dataset.place),
        "run": str(run.place),
        "scores": scores,
    }
    least, most = spec.train.least_workers, spec.train.most_workers
    elastic = least != most
    trainer = _trainer(alone)(
        functools.partial(_worker, at_checkpoint=at_checkpoint),
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=int(PATIENCE.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=(least, most) if elastic else workers_needed(spec),
            use_gpu=on_gpu(spec),
            resources_per_worker=needs(spec),
            **({"elastic_resize_monitor_interval_s": _RESIZE_SECONDS} if elastic else {}),
        ),
        run_config=RunConfig(
            # Ray is given no checkpoints; what it notes about an attempt is of no use to the next one.
            name=f"attempt-{run.newest_attempt() + 1:04d}",
            storage_path=str(notes),
            failure_config=FailureConfig(
                max_failures=_WORKER_FAILURES, controller_failure_limit=START_SECONDS // _start_seconds()
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": worker_environment(spec.train.threads)},
        ),
    )
    before = _placement_groups() if alone else set()
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except BaseException:
        if alone:
            with contextlib.suppress(Exception):  # the failure itself is what there is to tell
                _remove(_placement_groups() - before)
        raise
    finally:
        notes.remove()
    if outcome["failed"] is not None:
        raise Failed(outcome["failed"])
    return outcome["why"]


@functools.cache
def _trainer(alone: bool) -> Any:
    """Torch's trainer with fewer helpers beside the workers, each of which is a process that starts and takes its share
    of the CPUs: none for Ray Data, which serves no images here, and where `alone` none that waits for the controller's
    death, to free what it held (the driver does), nor metrics for a dashboard.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback, WorkerMetricsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    left_out = [DatasetsCallback]
    if alone:
        left_out += [PlacementGroupCleanerCallback, ControllerMetricsCallback, WorkerMetricsCallback]

    class WithFewerHelpers(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [made for made in super()._create_default_callbacks() if not isinstance(made, tuple(left_out))]

    return WithFewerHelpers


def _placement_groups() -> set[str]:
    """Ids of those that hold resources, or wait for them."""
    import ray
    from ray.util.placement_group import placement_group_table

    if not ray.is_initialized():  # ended by an interrupt, and its groups with it
        return set()
    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


def _remove(groups: set[str]) -> None:
    """Free what the group of a controller that died held; one that lives has freed it."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def on_gpu(spec: Spec) -> bool:
    """Whether the workers compute on GPUs: where the spec asks for them, or the cluster has any. However many the
    workers are, for another device gives other bits.
    """
    import ray

    return "GPU" in spec.train.resources or ray.cluster_resources().get("GPU", 0) > 0


def needs(spec: Spec) -> dict[str, float]:
    """What a worker asks of the cluster."""
    gpu = {"GPU": 1.0} if on_gpu(spec) else {}
    return {"CPU": _cpus(spec), **gpu, **spec.train.resources}


def _cpus(spec: Spec) -> float:
    import ray

    if not spec.train.oversubscribe:
        return spec.train.threads
    return min(spec.train.threads, ray.cluster_resources().get("CPU", 1) / (2 * spec.train.most_workers))


def _start_seconds() -> int:
    """How long Ray Train waits for a group's resources before it tries again."""
    return max(1, int(float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])))


def _notes_of(run: Run) -> Place:
    """A folder for what Ray notes of an attempt: the run's, or where that is none, one of this host's own."""
    return run.place / "ray" if run.place.is_local else Place.of(tempfile.mkdtemp(prefix="ddpm-ray-"))


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes: its threads come from the spec, not from what Ray guesses."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its pool of processes outlives the worker's work
    }


def _worker(config: dict[str, Any], at_checkpoint: Hook | None) -> dict[str, Any]:
    world = _world(config["spec"]["train"]["slots"])
    if world is None:
        return {"failed": None, "why": None}
    run = Run(Place.of(config["run"]))
    if (known := run.failure()) is not None:
        return {"failed": known, "why": None}
    try:
        outcome = train_from_config(config, world, at_checkpoint)
    except (Diverged, ValueError) as error:
        if world.size > 1 and not isinstance(error, Diverged):
            run.note_failure(str(error))
            raise  # one rank's own, for which the others wait
        # Not raised: Ray would start the group again, which would meet the same bits again.
        return {"failed": str(error), "why": None}
    return {"failed": None, "why": outcome.why}


def _world(slots: int) -> World | None:
    """This worker among those with slots; None where there are none for it. Every worker calls it."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    context, device = ray.train.get_context(), get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World.among(context.get_world_rank(), context.get_world_size(), slots, device)


def explained(error: BaseException, spec: Spec) -> BaseException:
    """The failure of a worker, of the controller or of a start, not Ray's wrapping of it."""
    if failures := getattr(error, "worker_failures", None):
        causes = {rank: getattr(failure, "cause", None) or failure for rank, failure in failures.items()}
        # Where one rank ends, the others' exchange with it does.
        rank, cause = min(causes.items(), key=lambda item: (type(item[1]) is RuntimeError, item[0]))
        return Failed(f"training worker {rank} failed: {type(cause).__name__}: {cause}")
    if _is_death(error):
        return Failed(
            f"Ray Train's controller died {_CONTROLLER_FAILURES + 1} times and no checkpoint came in between; "
            "if memory ran out, lower train.workers or train.global_batch"
        )
    cause = error
    while cause is not None and "WorkerGroupStartup" not in type(cause).__name__:
        cause = getattr(cause, "controller_failure", None) or cause.__cause__
    return error if cause is None else Failed(_no_room(spec))


def _no_room(spec: Spec) -> str:
    """What was asked for and what there is, where the workers were not given their resources in time."""
    import ray

    each = needs(spec)
    there, free = ray.cluster_resources(), ray.available_resources()
    asked = ", ".join(f"{value:g} {name}" for name, value in each.items())
    have = ", ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name} free" for name in each)
    return (
        f"the workers did not start within {START_SECONDS} s: asked for were {workers_needed(spec)} with {asked} each, "
        f"the cluster has {have}; wait for what holds them, or lower train.workers"
    )


def workers_needed(spec: Spec) -> int:
    """The least number of workers that a group starts with: of a fixed number, those with slots."""
    train = spec.train
    return train.least_workers if train.least_workers < train.most_workers else owners(train.most_workers, train.slots)


def _newest(run: Run) -> int:
    return max(run.checkpoints.steps(), default=0)


def _is_death(error: BaseException) -> bool:
    """Whether it is the end of the actor that ran the group, not of the group."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

    return isinstance(error, ActorDiedError | ActorUnavailableError | RayActorError)

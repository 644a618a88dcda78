"""The whole product: `ddpm train` as a user starts it, watched from outside through the run's folder."""

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.presets import Preset, write
from benchmarks.stepping.processes import ROOT, run_group
from pipelines.cluster import Cluster
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.journal import Row
from pipelines.train.run import Run

_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Race:
    """A round of the product against the bare loop: so many steps of each, the first `skip` left out.

    Of the product, steps up to the first checkpoint are its plain ones. The `following` ones after it are slowed by
    it: it is written, and sent to MLflow. They count as often as the preset has checkpoints.
    """

    steps: int
    skip: int
    checkpoint_every: int
    following: int
    log_every: int

    def spec(self, preset: Preset) -> Spec:
        return preset.lasting(self.steps, checkpoint_every=self.checkpoint_every, log_every=self.log_every)

    def saves(self) -> list[int]:
        """The checkpoints that all their following steps come after."""
        return list(range(self.checkpoint_every, self.steps - self.following + 1, self.checkpoint_every))


def amortised(seconds: Mapping[int, float], race: Race, interval: int) -> float:
    """Seconds a step where a checkpoint is written every `interval` steps, out of those of each step."""
    saves = race.saves()
    plain = statistics.fmean(seconds[step] for step in range(race.skip + 1, saves[0] + 1))
    after = statistics.fmean(sum(seconds[save + n] for n in range(1, race.following + 1)) for save in saves)
    return (after + (interval - race.following) * plain) / interval


def race_product(preset: Preset, race: Race, root: Path) -> dict[str, float]:
    """Seconds a step, and the share of them that waited for images, of a run that starts a Ray of its own."""
    rows = _rows(_train(race.spec(preset), root))
    seconds = {row.step: (row.time_ms - before.time_ms) / 1e3 for before, row in itertools.pairwise(rows)}
    measured = [row for row in rows if row.step > race.skip]
    waited = sum(row.wall["data_wait_seconds"] for row in measured)
    return {
        "product": amortised(seconds, race, preset.spec.train.checkpoint_every),
        "data wait": waited / sum(seconds[row.step] for row in measured),
    }


def race_bare(preset: Preset, race: Race) -> dict[str, float]:
    """Seconds a step of the bare loop, of the same steps."""
    spec = race.spec(preset)
    seconds = run_group(
        "benchmarks.stepping.bare:step_seconds",
        preset.workers,
        spec.train.threads,
        spec=spec.model_dump(mode="json"),
        dataset=str(preset.place),
        steps=race.steps,
    )
    return {"bare": statistics.fmean(seconds[race.skip :])}


@contextmanager
def warm_cluster() -> Iterator[str]:
    """The address of a Ray cluster on this host, which `ddpm` of this process's environment can join."""
    with Cluster(None, for_tune=True) as cluster:  # with a dashboard, as a user's has
        yield str(cluster.connect().get_runtime_context().gcs_address)


def first_step(preset: Preset, address: str, root: Path) -> dict[str, float]:
    """Seconds from the command until the workers are set up for the run's first step, `begun`, and until it is `done`,
    on a cluster that is up.
    """
    began = time.time()
    first = _rows(_train(_joining(preset.lasting(2, log_every=1), address), root))[0]
    done = first.time_ms / 1e3 - began
    return {"begun": done - preset.spec.train.global_batch / first.wall["images_per_second"], "done": done}


def recovery(preset: Preset, address: str, root: Path) -> dict[str, float]:
    """Seconds from a worker's SIGKILL to the end of the first step after it, on a cluster that is up."""
    spec = _joining(preset.lasting(8, checkpoint_every=2, log_every=1), address)
    killed: list[float] = []

    def kill_once(run: Run) -> None:
        live, worker = run.live(), run.worker(1, preset.workers - 1)
        step = 0 if live is None else live["images"] // spec.train.global_batch
        if killed or worker is None or not 0 < max(run.checkpoints.steps(), default=0) < step:
            return
        os.kill(worker["pid"], signal.SIGKILL)
        killed.append(time.time())

    run = _train(spec, root, kill_once)
    journal = run.place / "journal"
    again = [name for name in journal.list() if name.endswith("-0002.jsonl")]  # segments are named STEP-ATTEMPT
    if not again:
        raise RuntimeError(f"{run.name} was over before its worker could be killed")
    first_row = json.loads((journal / min(again)).read().decode().splitlines()[1])
    return {"seconds": first_row["time_ms"] / 1e3 - killed[0]}


def _joining(spec: Spec, address: str) -> Spec:
    return spec.model_copy(update={"ray": spec.ray.model_copy(update={"address": address})})


def _train(spec: Spec, root: Path, watch: Callable[[Run], None] | None = None) -> Run:
    """Train a spec anew by the command; `watch` meanwhile looks at the run again and again."""
    store = root / "store"
    for folder in ("runs", "steps"):
        shutil.rmtree(store / folder, ignore_errors=True)
    command = [sys.executable, "-m", "jobs", "train", str(write(spec, root / "spec.yaml")), "--storage", str(store)]
    with (root / "train.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                if watch is not None and (runs := list((store / "runs").glob("*"))):
                    watch(Run(Place.of(runs[0])))
                time.sleep(_LOOK_SECONDS if watch else 10 * _LOOK_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {root / 'train.log'}")
    (run,) = (store / "runs").glob("*")
    return Run(Place.of(run))


def _rows(run: Run) -> list[Row]:
    return list(run.journal.read(run.last_step()))

"""What a sampling job costs beside drawing, and what scores take: `python -m benchmarks.sampling` (some 30 minutes).

Sides take turns in rounds, which are kept below `--work`; a run that was interrupted goes on with `--resume`. What each
row means is said in docs/benchmarks-sampling.md, which `--write` writes.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import describe
from benchmarks.presets import prepare
from benchmarks.rows import Kept, Measure, table_of
from pipelines.build import build_model
from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_pixels
from pipelines.drawing import Settings, draw
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample import Studio, sample_job
from pipelines.spec import Spec, load_spec
from pipelines.store import Place

RESULTS = Path(__file__).parent / "results" / "sampling.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks-sampling.md"
PRESET = Path(__file__).parents[1] / "jobs" / "presets" / "fashion-mnist.yaml"
LIBRARIES = ("torch", "ray", "numpy")
ROUNDS = 15
EVALUATIONS = 3
CHUNKS = 6
STEPS = 10
"""Of the sampler: fewer than one draws with, so that what comes beside drawing weighs more, not less."""
SCORED = 10_000
_LOOK_SECONDS = 0.5


def untrained(spec: Spec) -> Model:
    """A network that was never trained takes as long as any."""
    import safetensors.torch

    return Model(spec, safetensors.torch.save(build_model(spec).state_dict()), "no-data", "untrained", "none")


def job(
    model: Model, settings: Settings, chunks: int, workers: int, cluster: Cluster, folder: Path
) -> dict[str, float]:
    """A whole job: images a second once it runs, and the share of its processes' time inside the sampler."""
    studio = Studio(cluster, workers, {}, Progress())
    done = sample_job(model, settings, chunks * settings.chunk, Place.of(folder), studio)
    assert done.images_per_second is not None
    assert done.drawing_share is not None
    return {"speed": done.images_per_second, "share": done.drawing_share}


def bare(spec_file: str, chunks: int) -> float:
    """Images a second of the sampler alone, in a process of its own."""
    code = f"from benchmarks.sampling import draw_alone; print(draw_alone({spec_file!r}, {chunks}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def draw_alone(spec_file: str, chunks: int) -> float:
    """In this process: the same chunks by as many threads, nothing kept."""
    import torch

    spec = load_spec(spec_file, _CHOSEN)
    settings = Settings.of(spec.sample)
    torch.set_num_threads(settings.threads)
    process, unet = untrained(spec).build()
    size, began = spec.data.image_size, 0.0
    for chunk in range(chunks + 1):
        if chunk == 1:  # the first sets things up
            began = time.perf_counter()
        to_pixels(draw(process, unet, size, settings, range(chunk * settings.chunk, (chunk + 1) * settings.chunk)))
    return chunks * settings.chunk / (time.perf_counter() - began)


def evaluation(dataset: Dataset, samples: Path, work: Path) -> dict[str, float]:
    """Seconds and memory of features and statistics of images that are there, from nothing, as a user asks for them."""
    store = work / f"store-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "jobs", "evaluate", str(samples), "--against", str(dataset.place)]
    began, most = time.perf_counter(), 0
    with subprocess.Popen([*command, "--storage", str(store)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _memory(psutil.Process(process.pid)))
            time.sleep(_LOOK_SECONDS)
    assert process.returncode == 0
    return {"seconds": time.perf_counter() - began, "GiB": most / 2**30}


def _memory(process: psutil.Process) -> int:
    """Bytes that a process and all that descend from it have for themselves."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().uss
    return total


_CHOSEN = (f"sample.steps={STEPS}", "sample.threads=1")

_PROSE = """
# Sampling and scoring, measured

This page is written by `python -m benchmarks.sampling --write` (some 30 minutes on two cores), together with
`benchmarks/results/sampling.json`. The network is that of the preset `fashion-mnist`, with weights that were never
trained, drawn from by DDIM in 10 steps and chunks of the preset's size, on one thread a process. Both sides of a ratio
take turns; a value is the median over the rounds, with the quartiles; above 1 is faster.

- **job-vs-sampler**: images a second of `ddpm sample`'s job (Ray actor, PNG, shards, index, commit records, all synced
  to disk) once it runs, against the sampler alone in a process of its own, nothing kept.
- **drawing**: of the job's processes' time, the share inside the sampler, by their own clocks.
- **two-actors**: two actors against one.
- **scoring-time**, **scoring-memory**: `ddpm evaluate SAMPLES --against DATASET` of 10,000 images of 28 x 28 that are
  there, from an empty store: training the feature network, features of these and of all 70,000 real images, all scores
  of a set, the nearest training images; the memory is all that the command's processes, Ray's too, have to themselves.
"""

MEASURES = (
    Measure("job-vs-sampler", "race", "ratio", lambda one: one["job"] / one["bare"], 0.98, 0.95),
    Measure("drawing", "race", "ratio", lambda one: one["share"], 0.98, 0.95),
    Measure("two-actors", "actors", "ratio", lambda one: one["two"] / one["one"], 1.9, 1.75),
    Measure("scoring-time", "scoring", "seconds", lambda one: one["seconds"], None, 120.0),
    Measure("scoring-memory", "scoring", "GiB", lambda one: one["GiB"], None, 2.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sampling job costs beside drawing, and what scores take.")
    parser.add_argument("--work", type=Path, default=Path("out/sampling"), help="folder of what is done")
    parser.add_argument("--resume", action="store_true", help="keep the rounds of an interrupted run")
    parser.add_argument("--rounds", type=int, help="of every stage, instead of its own number: for a quick look")
    parser.add_argument("--only", nargs="+", choices=("race", "actors", "scoring"))
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and {PAGE.name}")
    options = parser.parse_args()
    load, work = os.getloadavg()[0], options.work.absolute()
    kept = Kept(work / "rounds.json", options.resume)
    spec = load_spec(PRESET, _CHOSEN)
    model, settings = untrained(spec), Settings.of(spec.sample)

    def wanted(stage: str, rounds: int) -> int:
        return 0 if options.only and stage not in options.only else (options.rounds or rounds)

    def fresh() -> Path:
        return work / "jobs" / str(time.monotonic_ns())

    def race(number: int, _: int) -> list[dict[str, Any]]:
        def ours() -> dict[str, float]:
            with Cluster(None) as cluster:
                done = job(model, settings, CHUNKS, 1, cluster, fresh())
            return {"job": done["speed"], "share": done["share"]}

        sides: list[Callable[[], dict[str, float]]] = [ours, lambda: {"bare": bare(str(PRESET), CHUNKS)}]
        found: dict[str, float] = {}
        for side in sides if number % 2 else sides[::-1]:
            found |= side()
        return [found]

    def actors(number: int, _: int) -> list[dict[str, Any]]:
        found = {}
        with Cluster(None) as cluster:
            for name, workers in (("one", 1), ("two", 2))[:: 1 if number % 2 else -1]:
                found[name] = job(model, settings, CHUNKS * workers, workers, cluster, fresh())["speed"]
        return [found]

    def scoring(*_: int) -> list[dict[str, Any]]:
        preset = prepare("fashion-mnist", work)
        random = np.random.default_rng(0)
        source = work / "scored.npy"
        if not source.exists():
            np.save(source, random.integers(0, 256, (SCORED, 28, 28), dtype=np.uint8))
        place = Place.of(work / "scored")
        ingest(str(source), place, image_size=28, channels=1, held_out=0.0)
        return [evaluation(preset.dataset(), place.path, work)]

    kept.collect("race", wanted("race", ROUNDS), race)
    kept.collect("actors", wanted("actors", ROUNDS), actors)
    kept.collect("scoring", wanted("scoring", EVALUATIONS), scoring)
    rows = [measure.row(kept.rounds[measure.stage]) for measure in MEASURES if kept.rounds.get(measure.stage)]
    machine = describe(load, LIBRARIES)
    text = "\n".join([_PROSE.strip(), "", f"{machine}.", "", *table_of(rows)]) + "\n"
    if options.write:
        RESULTS.write_text(json.dumps({"machine": machine, "rows": [row.to_json() for row in rows]}, indent=1) + "\n")
        PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""How long training waits for its images: the presets, for some steps, by one worker on all cores of this host."""

import shutil
from pathlib import Path

from benchmarks.loading.data import PACKAGE
from benchmarks.presets import prepare
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run

STEPS = {"digits": 300, "fashion-mnist": 30}


def blocked(root: Path) -> dict[str, float]:
    """Share of the time, percent, by preset; the first step, which nothing was read ahead of, is left out."""
    return {
        f"training waits for data, {name} preset (%)": _share(name, steps, root)
        for name, steps in STEPS.items()
        if name == "digits" or PACKAGE.exists()
    }


def _share(name: str, steps: int, root: Path) -> float:
    preset = prepare(name, root)
    spec, dataset = preset.lasting(steps, workers=1), preset.dataset()
    shutil.rmtree(root / "runs", ignore_errors=True)
    run = Run.of(spec, dataset.digest, Place.of(root))
    run.describe(spec, dataset.digest)
    outcome = train(spec, dataset, run)
    rows = list(run.journal.read(outcome.step))
    waited = sum(row.wall["data_wait_seconds"] for row in rows[1:])
    return 100 * waited / ((rows[-1].time_ms - rows[0].time_ms) / 1000)

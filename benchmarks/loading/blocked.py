"""How long training waits for its images: the presets, for some steps, by one worker on all cores of this host."""

import shutil
from pathlib import Path

from benchmarks.loading.data import PACKAGE
from pipelines.data.ingest import ingest
from pipelines.spec import load_spec
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run

PRESETS = Path(__file__).parents[2] / "jobs" / "presets"
STEPS = {"digits": 300, "fashion-mnist": 30}


def blocked(root: Path) -> dict[str, float]:
    """Share of the time, percent, by preset; the first step, which nothing was read ahead of, is left out."""
    return {
        f"training waits for data, {name} preset (%)": _share(name, steps, root)
        for name, steps in STEPS.items()
        if name == "digits" or PACKAGE.exists()
    }


def _share(name: str, steps: int, root: Path) -> float:
    spec = load_spec(PRESETS / f"{name}.yaml")
    small = {"images": steps * spec.train.global_batch, "workers": 1}
    spec = spec.model_copy(update={"train": spec.train.model_copy(update=small)})
    data, place = spec.data, Place.of(root / f"preset-{name}")
    dataset = ingest(
        data.source,
        place,
        image_size=data.image_size,
        channels=data.channels,
        held_out=data.held_out if "held_out" in data.model_fields_set else None,
        shard_images=data.shard_images,
    )
    shutil.rmtree(root / "runs", ignore_errors=True)
    run = Run.of(spec, dataset.digest, Place.of(root))
    run.describe(spec, dataset.digest)
    outcome = train(spec, dataset, run)
    rows = list(run.journal.read(outcome.step))
    waited = sum(row.wall["data_wait_seconds"] for row in rows[1:])
    return 100 * waited / ((rows[-1].time_ms - rows[0].time_ms) / 1000)

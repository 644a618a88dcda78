"""The presets, with their images ingested."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.sections import Data
from pipelines.spec import Spec, dump_spec, load_spec
from pipelines.store import Place

PRESETS = Path(__file__).parents[1] / "jobs" / "presets"


@dataclass(frozen=True)
class Preset:
    """A preset's spec, its source replaced by the dataset that was made of it, and without held-out scores."""

    spec: Spec
    place: Place

    def dataset(self) -> Dataset:
        return Dataset.open(self.place)

    @property
    def workers(self) -> int:
        assert isinstance(self.spec.train.workers, int), "presets have a fixed number"
        return self.spec.train.workers

    def having(self, **train: Any) -> Spec:
        """The spec with other values in its section `train`."""
        return self.spec.model_copy(update={"train": self.spec.train.model_copy(update=train)})

    def lasting(self, steps: int, **train: Any) -> Spec:
        """As `having`, and so many steps long."""
        batch = train.get("global_batch", self.spec.train.global_batch)
        return self.having(images=steps * batch, **train)


def prepare(name: str, root: Path) -> Preset:
    """Ingest a preset's images below `root`, if that is not done yet."""
    spec, place = load_spec(PRESETS / f"{name}.yaml"), Place.of(root / f"preset-{name}")
    data = spec.data
    ingest(
        data.source,
        place,
        image_size=data.image_size,
        channels=data.channels,
        held_out=data.held_out if "held_out" in data.model_fields_set else None,
        shard_images=data.shard_images,
    )
    # What only ingesting looks at goes back to its default, or `ddpm` says that it has no effect.
    asked: dict[str, Any] = {"source": str(place), "image_size": data.image_size, "channels": data.channels}
    kept: dict[str, Any] = {field: getattr(data, field) for field in ("window", "flip", "shift", "on_error")}
    train = spec.train.model_copy(update={"score": None})
    return Preset(spec.model_copy(update={"data": Data(**asked, **kept), "train": train}), place)


def write(spec: Spec, file: Path) -> Path:
    """The spec as a file for `ddpm`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_spec(spec))
    return file

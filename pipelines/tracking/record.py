"""What each tracker was sent of a run: `tracking.json` in the run's folder."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.train.run import Run

FORMAT = 1
_FILE = "tracking.json"


@dataclass(frozen=True)
class Record:
    """What one tracker was sent of a run."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the MLflow run by which it is found again where nobody heard that it was made."""
    run_id: str | None = None
    described: bool = False
    """Whether params, dataset and environment are there."""
    shipped_step: int = 0
    """The rows up to this step are there."""
    doubtful_step: int = 0
    """Those up to this one may be: they were sent, and nobody heard whether they arrived."""
    scored_steps: Sequence[int] = ()
    """Whose scores on held-out images are there."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Those that change as the run goes on."""
    status: str | None = None
    """How the MLflow run ended; None while it goes on."""
    ended_step: int | None = None


@dataclass(frozen=True)
class Lineage:
    """The dataset that a run learns from, as far as a tracker is told of it."""

    digest: str
    name: str
    place: str

    @staticmethod
    def of(dataset: Dataset) -> "Lineage":
        return Lineage(dataset.digest, dataset.place.name, str(dataset.place))


class Records:
    """The records of a run, one a tracker. Who changes them holds the lock."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._place = run.place / _FILE

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """A thread of the driver and `ddpm reconcile` may both send: one after the other."""
        with (self._run.place / "tracking.lock").lock(f"tracking of run {self._run.name}", wait=True):
            yield

    def of(self, uri: str) -> Record:
        """The record of one tracker, an empty one where it was sent nothing."""
        found = self._read()["trackers"].get(uri)
        return Record() if found is None else Record(**found)

    def save(self, uri: str, record: Record) -> None:
        found = self._read()
        found["trackers"][uri] = asdict(record)
        self._place.write_json(found)

    @property
    def lineage(self) -> Lineage | None:
        """The dataset; None where no tracker was ever told of this run."""
        found = self._read()["lineage"]
        return None if found is None else Lineage(**found)

    def keep(self, lineage: Lineage) -> None:
        """So that what is owed can be sent by those who have the run alone."""
        if (found := self._read())["lineage"] != asdict(lineage):
            self._place.write_json({**found, "lineage": asdict(lineage)})

    def _read(self) -> dict[str, Any]:
        try:
            found = self._place.read_json()
        except FileNotFoundError:
            return {"format": FORMAT, "lineage": None, "trackers": {}}
        if found.get("format") != FORMAT:
            raise UserError(
                f"{self._place} has format {found.get('format')}: this version reads {FORMAT}; "
                "delete it, and the run is sent to MLflow anew"
            )
        return found

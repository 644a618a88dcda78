"""What each tracker was sent of a run: `tracking.json` in the run's folder."""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.store import Place
from pipelines.tracking.address import tracker_name
from pipelines.train.run import Run

FORMAT = 2
_FILE = "tracking.json"


@dataclass(frozen=True)
class Record:
    """What one tracker was sent of a run."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the MLflow run by which it is found again where nobody heard that it was made, or by another address."""
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
    """The records of a run, one a tracker, by the name of its address. Who changes them holds the lock."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._place = run.place / _FILE
        self._check_held: Callable[[], None] | None = None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """A thread of the driver and `ddpm reconcile` may both send: one after the other."""
        lock = (self._run.place / "tracking.lock").lock(f"tracking of run {self._run.name}", wait=True)
        with lock as self._check_held:
            try:
                yield
            finally:
                self._check_held = None

    def names(self) -> list[str]:
        """Of the trackers that were to be told of this run."""
        return sorted(self._read()["trackers"])

    def of(self, name: str) -> Record:
        """The record of one tracker, an empty one where it was sent nothing."""
        return _record(self._read(), name)

    def save(self, name: str, record: Record) -> None:
        found = self._read()
        self._write({**found, "key": found["key"] or record.key}, name, record)

    @property
    def lineage(self) -> Lineage | None:
        """The dataset; None where no tracker was ever told of this run."""
        found = self._read()["lineage"]
        return None if found is None else Lineage(**found)

    def keep(self, lineage: Lineage, name: str) -> None:
        """That this tracker is to be told of the run, so that what is owed can be sent by those who have the run
        alone."""
        found = self._read()
        if found["lineage"] != asdict(lineage) or name not in found["trackers"]:
            record = _record(found, name)
            self._write({**found, "lineage": asdict(lineage), "key": found["key"] or record.key}, name, record)

    def _write(self, found: Mapping[str, Any], name: str, record: Record) -> None:
        assert self._check_held is not None, "the lock is not held"
        self._check_held()
        self._place.write_json({**found, "trackers": {**found["trackers"], name: asdict(record)}})

    def _read(self) -> dict[str, Any]:
        try:
            found = self._place.read_json()
        except FileNotFoundError:
            return {"format": FORMAT, "key": None, "lineage": None, "trackers": {}}
        except ValueError:
            raise UserError(f"{self._place} is damaged: delete it, and the run is sent to MLflow anew") from None
        if found.get("format") == 1:
            return _of_format_1(found, self._run.place.parent.parent)
        if found.get("format") != FORMAT:
            raise UserError(
                f"{self._place} has format {found.get('format')}: this version reads {FORMAT}; "
                "delete it, and the run is sent to MLflow anew"
            )
        return found


def _record(found: Mapping[str, Any], name: str) -> Record:
    """One with the run's key where the tracker has none: it may know the run by another address."""
    if name in found["trackers"]:
        return Record(**found["trackers"][name])
    return Record() if found["key"] is None else Record(key=found["key"])


def _of_format_1(found: Mapping[str, Any], store: Place) -> dict[str, Any]:
    """Which knew trackers by their whole addresses, and had a key for each."""
    trackers = {tracker_name(uri, store): record for uri, record in found["trackers"].items()}
    key = next((record["key"] for record in trackers.values()), None)
    return {"format": FORMAT, "key": key, "lineage": found["lineage"], "trackers": trackers}

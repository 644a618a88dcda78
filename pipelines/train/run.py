"""A training run: what it is, where it lives, who drives it.

The run's name is the spec's name and a hash of all that decides its weights; its folder holds its checkpoints, its
journal and its pictures. Attempts to drive it are numbered, so that what a zombie of an earlier one writes can be told
from the present one's.
"""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from socket import gethostname
from typing import Any, Literal

from pipelines.data.damage import Damage
from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.files import StorageError
from pipelines.progress import counted
from pipelines.spec import Spec, parse_spec
from pipelines.store import Place, canonical_json, identity
from pipelines.train.board import RayBoard
from pipelines.train.checkpoint import Checkpoints
from pipelines.train.journal import Journal
from pipelines.train.scores import Scores

FORMAT = 1

Ask = Literal["checkpoint", "stop"]

_LIVE = "live.json"
_ASKED: dict[Ask, str] = {"stop": "asked-to-stop", "checkpoint": "asked-for-checkpoint"}
_FAILURE = "failure.json"
_RUNS_NAMED = 5


@dataclass(frozen=True)
class Attempt:
    """Workers that drove a run together."""

    number: int
    workers: int
    hosts: tuple[str, ...]
    """Those whose workers told so far, each once, in rank order."""
    step: int
    """From which they went on."""


class Run:
    """A run's folder: `STORE/runs/RUN/`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.checkpoints = Checkpoints(place / "checkpoints")
        self.journal = Journal(place / "journal")
        self.scores = Scores(place / "scores")

    @property
    def name(self) -> str:
        return self.place.name

    @staticmethod
    def of(spec: Spec, dataset_digest: str, store: Place) -> "Run":
        """The run of a spec on a dataset."""
        return Run(store / "runs" / run_name(spec, dataset_digest))

    def describe(self, spec: Spec, dataset_digest: str) -> None:
        """Record what the run is: the full spec, the dataset, the environment of its latest driver."""
        record = {
            "format": FORMAT,
            "spec": spec.model_dump(mode="json"),
            "dataset_digest": dataset_digest,
            "environment": environment(),
        }
        (self.place / "run.json").write_json(record)

    def description(self) -> dict[str, Any]:
        record = (self.place / "run.json").read_json()
        if record["format"] != FORMAT:
            raise ValueError(f"{self.place / 'run.json'} has format {record['format']}, not {FORMAT}")
        return record

    def spec(self) -> Spec:
        """The spec recorded with the run."""
        return parse_spec(self.description()["spec"], origin=str(self.place / "run.json"))

    @contextlib.contextmanager
    def driving(self) -> Iterator[Callable[[], None]]:
        """Hold the run while driving it; UserError by name where somebody else does. The block is given what
        `Place.lock` gives."""
        with (self.place / "lock").lock(f"run {self.name}") as check_held:
            self.place.sweep_temporaries()
            self.checkpoints.sweep()
            self.forget_asked()
            yield check_held

    def is_driven(self) -> bool:
        """Whether somebody drives the run, who is not disturbed by the look."""
        return (self.place / "lock").is_held()

    @property
    def board(self) -> Place:
        """Where its driver and its workers leave each other what need not last: the picture of the moment, and what is
        asked. The run's folder, or Ray's memory for a run in a store where each look is a request."""
        return self.place if self.place.is_local else RayBoard(str(self.place))

    def ask(self, what: Ask) -> None:
        """Ask who trains the run for a checkpoint at once, or to stop with one."""
        (self.board / _ASKED[what]).write(b"")  # for which a full disk has room, too

    def asked(self) -> Ask | None:
        """What is asked of who trains the run; to stop, where both are."""
        for what, name in _ASKED.items():
            with contextlib.suppress(FileNotFoundError, StorageError):  # what cannot be learnt now is looked for again
                (self.board / name).read()
                return what
        return None

    def forget_asked(self) -> None:
        """What was asked is done, or was asked of an earlier driver's workers."""
        for name in _ASKED.values():
            (self.board / name).delete()

    def note_failure(self, told: str) -> None:
        """Say why a rank ended that others cannot know of: who takes its place would meet the same again."""
        (self.place / _FAILURE).write_json({"told": told})

    def failure(self) -> str | None:
        """What a rank of this drive ended by."""
        return (self.place / _FAILURE).read_json()["told"] if (self.place / _FAILURE).exists() else None

    def forget_failure(self) -> None:
        """It was of an earlier drive: what it met may be mended."""
        (self.place / _FAILURE).delete()

    def claim_attempt(self) -> int:
        """A number higher than every earlier attempt's."""
        place = self.place / "attempts"
        number = 1 + self.newest_attempt()
        while not (place / f"{number:04d}").claim(b""):
            number += 1
        return number

    def note_worker(self, attempt: int, rank: int, workers: int, step: int) -> None:
        """Tell which process is a rank of an attempt, of how many, and from which step the attempt goes on."""
        note = {"host": gethostname(), "pid": os.getpid(), "workers": workers, "step": step}
        (self.place / "workers" / f"{attempt:04d}-{rank}.json").write_json(note)

    def worker(self, attempt: int, rank: int) -> dict[str, Any] | None:
        """What a rank of an attempt told, see `note_worker`; None where it has not."""
        try:
            return (self.place / "workers" / f"{attempt:04d}-{rank}.json").read_json()
        except FileNotFoundError:
            return None

    def show(self, live: Mapping[str, Any]) -> None:
        """Replace the picture of the moment; in place where a full disk has no room for another."""
        place, data = self.board / _LIVE, canonical_json(live).encode()
        try:
            place.write(data)
        except OSError:
            with open(place.path, "r+b", buffering=0) as file:
                file.write(data)
                file.truncate()

    def forget_live(self) -> None:
        """The picture is of an earlier moment."""
        (self.board / _LIVE).delete()

    def attempts(self, newest: int) -> list[Attempt]:
        """The newest attempts, at most so many, rising; without those that were killed before rank 0 told."""
        folder = self.place / "workers"
        ranks: dict[int, list[int]] = {}
        for name in folder.list():
            attempt, rank = (int(part) for part in name.removesuffix(".json").split("-"))
            ranks.setdefault(attempt, []).append(rank)
        found = []
        for number in sorted(n for n in ranks if 0 in ranks[n])[-newest:]:
            notes = [self.worker(number, rank) or {} for rank in sorted(ranks[number])]
            hosts = tuple(dict.fromkeys(note["host"] for note in notes))
            # An earlier version told neither.
            found.append(Attempt(number, notes[0].get("workers", len(notes)), hosts, notes[0].get("step", 0)))
        return found

    def live(self) -> dict[str, Any] | None:
        """The picture of the moment; None before the first, and where it is just being replaced in place."""
        try:
            return (self.board / _LIVE).read_json()
        except (FileNotFoundError, ValueError):
            return None

    def record_damage(self, damage: Damage) -> None:
        """Keep which sample was read in place of a damaged one, once, whichever rank or attempt meets it."""
        name = identity({"shard": damage.shard, "row": damage.row})[:16]
        (self.place / "damage" / f"{name}.json").claim(canonical_json(asdict(damage)).encode())

    def damage(self) -> list[Damage]:
        """What was read in place of what, by shard and row."""
        folder = self.place / "damage"
        found = [Damage(**(folder / name).read_json()) for name in folder.list()]
        return sorted(found, key=lambda damage: (damage.shard, damage.row))

    def last_step(self) -> int:
        """Step of the last checkpoint that verifies. UserError where there is none."""
        step = self.checkpoints.latest_step()
        if step is None:
            raise UserError(f"run {self.name}: it has no checkpoint yet, or none that is whole")
        return step

    def newest_attempt(self) -> int:
        """The highest number claimed; 0 before the first."""
        return max((int(n) for n in (self.place / "attempts").list()), default=0)


def run_name(spec: Spec, dataset_digest: str, first_digest: str | None = None) -> str:
    """The spec's name and a hash of all that decides the weights, for which see `training_identity`."""
    fields = {"format": FORMAT, "dataset": dataset_digest, **training_identity(spec, first_digest)}
    return f"{spec.name}-{identity(fields)[:12]}"


def training_identity(spec: Spec, first_digest: str | None = None) -> dict[str, Any]:
    """The spec's fields that decide a run's weights, with the first weights' digest in place of where they lie.

    They are read for it, unless the digest is given. UserError where they cannot be.
    """
    fields = spec.training_fields()
    if (folder := spec.train.init_from) is not None:
        from pipelines.train.initial import read_initial  # loads torch

        fields["train"]["init_from"] = first_digest or read_initial(folder).digest
    return fields


def check_trainable(spec: Spec, dataset: Dataset) -> None:
    """UserError, before anything starts, where the spec cannot be trained on these images or from its first weights.

    A warning where the first weights were trained to do something else.
    """
    if spec.train.init_from is not None:
        from pipelines.train.initial import check_initial  # loads torch

        check_initial(spec)
    if not len(dataset.split("train")):
        raise UserError("data.held_out: no image is left for training, lower it or add images")
    score, held_out = spec.train.score, len(dataset.split("held-out"))
    if score is not None and score.every_images is not None and held_out < 2:
        raise UserError(f"train.score: it needs 2 held-out images, {dataset.place} has {held_out}: raise data.held_out")
    if (classes := spec.model.classes) is None:
        return
    if classes != len(dataset.classes) or dataset.card["splits"]["train"]["unlabelled"]:
        raise UserError(f"model.classes: {_why_not(classes, dataset)}, or leave model.classes out")


def _why_not(classes: int, dataset: Dataset) -> str:
    """Why these images cannot train a model of so many classes, and what to change."""
    known, unlabelled = len(dataset.classes), dataset.card["splits"]["train"]["unlabelled"]
    if not known:
        return f"{classes}, but the images have no labels: label them (a folder a class, say) and ingest them anew"
    if classes != known:
        return f"{classes}, where the images have {known}: set it to {known}"
    return f"{counted(unlabelled, 'training image')} of {dataset.place} without a label: label or remove them"


def find_run(name: str, store: Place) -> Run:
    """The run of that name in a store. UserError where there is none."""
    run = Run(store / "runs" / name)
    if "/" in name or not (run.place / "run.json").exists():
        known = [other for other in (store / "runs").list() if Run(store / "runs" / other).checkpoints.steps()]
        more = f" and {len(known) - _RUNS_NAMED:,} more" if len(known) > _RUNS_NAMED else ""
        there = f"; there are {', '.join(known[:_RUNS_NAMED])}{more}" if known else ""
        raise UserError(f"run {name}: not in {store}{there}")
    return run


def environment() -> dict[str, str]:
    """What the bits depend on beside spec and data."""
    import torch

    packages = ("ddpm-pipelines", "torch", "numpy", "ray", "mlflow", "pyarrow", "pillow")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How one environment differs from an earlier one, in words."""
    return [f"{name} {then.get(name)} is {now[name]} now" for name in now if then.get(name) != now[name]]

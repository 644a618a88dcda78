"""Content-addressed steps: same inputs, nothing to do.

A step is named by what makes it new: its own name and version, the spec fields that matter to it, and the digests of
what it builds on. Its record is written last, whole or not at all, so a step killed half way has none and is done
again. (The idea is that of Marin's executor: https://github.com/marin-community/marin.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.progress import Progress
from pipelines.store import Place, identity

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A verb applied to inputs."""

    name: str
    version: int
    """Raised with the code wherever the same inputs now mean other outputs."""
    inputs: Mapping[str, Any]
    """Spec fields and upstream digests, as plain values: all that decides the outputs."""
    work: Callable[[], dict[str, Any]]
    """Does it; returns the outputs as plain values. Called only if there is no record."""
    needs: Callable[[Mapping[str, Any]], bool] = field(default=lambda outputs: True)
    """Whether what the recorded outputs point at is still there."""
    doing: str = ""

    @property
    def key(self) -> str:
        return identity({"format": FORMAT, "step": self.name, "version": self.version, "inputs": dict(self.inputs)})


@dataclass(frozen=True)
class Done:
    """A finished step's outputs, and whether they had been there already."""

    outputs: dict[str, Any]
    skipped: bool


class Steps:
    """The records of finished steps, in a folder of the store."""

    def __init__(self, place: Place, progress: Progress) -> None:
        self._place = place
        self._progress = progress

    def run(self, step: Step) -> Done:
        """Do a step unless it is done."""
        outputs = self.recorded(step)
        if outputs is not None:
            self._progress.finish(step.name, _summary(outputs), skipped=True)
            return Done(outputs, skipped=True)
        self._progress.start(step.name, step.doing)
        outputs = step.work()
        record = {"format": FORMAT, "step": step.name, "inputs": dict(step.inputs), "outputs": outputs}
        self._at(step).write_json(record)
        self._progress.finish(step.name, _summary(outputs))
        return Done(outputs, skipped=False)

    def recorded(self, step: Step) -> dict[str, Any] | None:
        """The outputs of a step that is done and whose outputs are still there."""
        place = self._at(step)
        if not place.exists():
            return None
        record = place.read_json()
        if record["format"] != FORMAT:
            raise ValueError(f"{place} has format {record['format']}, not {FORMAT}")
        return record["outputs"] if step.needs(record["outputs"]) else None

    def _at(self, step: Step) -> Place:
        return self._place / f"{step.name}-{step.key[:16]}.json"


def _summary(outputs: Mapping[str, Any]) -> str:
    return str(outputs.get("summary", ""))

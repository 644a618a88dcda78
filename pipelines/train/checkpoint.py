"""Checkpoints: the whole state of a run after a step, nothing per worker, nothing pickled.

A folder named by the step: `model.safetensors` (live weights), `ema.safetensors`, `optimizer.safetensors`,
`profiles.safetensors` (where power-function averages are kept), `state.json`, and `MANIFEST.json` with the sha256 of
each. It appears whole or not at all; a damaged one is named and passed over for the one before it.
"""

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.store import MANIFEST, DamageError, Place

FORMAT = 1
_PINS = "pins"
MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
PROFILES = "profiles.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State after `step` optimizer steps; tensors keyed by parameter name, on the CPU."""

    step: int
    images: int
    """Images seen."""
    skipped: int = 0
    """Of the steps, those that moved nothing but the clock."""
    skipped_in_a_row: int = 0
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    profiles: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    """Power-function averages by their sigma_rel."""
    environment: Mapping[str, Any]
    """What it was computed on; for the reader, never read back into a run."""


class Checkpoints:
    """The checkpoints of a run, in a folder of their own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.snapshots = place.parent / "ema"
        """Power-function averages, never thinned out: of them, any length is made afterwards."""

    def at(self, step: int) -> Place:
        return self.place / f"{step:09d}"

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, rising."""
        return sorted(int(name) for name in self.place.committed() if name.isdigit())

    def sweep(self) -> None:
        """Remove what killed writers left half-written. Only for the holder of the run's lock."""
        for place in (self.place, self.snapshots):
            place.sweep_temporaries()
            if not place.is_local:  # halves have the names of what they were to be
                whole = set(place.committed())
                for name in place.list():
                    if name.isdigit() and name not in whole:
                        (place / name).remove()

    def save(
        self,
        checkpoint: Checkpoint,
        keep: int,
        every: int | None = None,
        also: Collection[int] = (),
        check: Callable[[], None] | None = None,
    ) -> None:
        """Commit a checkpoint, and `thin` those before it. `check` is called just before it is there, too."""
        state = {
            "format": FORMAT,
            "step": checkpoint.step,
            "images": checkpoint.images,
            "skipped": checkpoint.skipped,
            "skipped_in_a_row": checkpoint.skipped_in_a_row,
            "environment": dict(checkpoint.environment),
        }
        files = {
            MODEL: _tensors(checkpoint.model),
            EMA: _tensors(checkpoint.ema),
            OPTIMIZER: _tensors(checkpoint.optimizer),
            **({PROFILES: _tensors(_flattened(checkpoint.profiles))} if checkpoint.profiles else {}),
            STATE: (json.dumps(state, indent=2, sort_keys=True) + "\n").encode(),
        }
        self.at(checkpoint.step).commit_folder(files, check)
        if not checkpoint.skipped_in_a_row:  # else it may be past help: the last good one must not make room for it
            self.thin(checkpoint.step, keep, every, also, check)

    def thin(
        self,
        last: int,
        keep: int,
        every: int | None = None,
        also: Collection[int] = (),
        check: Callable[[], None] | None = None,
    ) -> None:
        """Remove those up to step `last`, but for the last `keep` of them, those at multiples of `every` steps, and
        those of the steps in `also`. `check` is called before each: what it raises leaves the others as they are.
        """
        # Only what `last` supersedes: a later one that was passed over as damaged is not a reason to lose it.
        pinned = set((self.place / _PINS).list())
        for step in [step for step in self.steps() if step <= last][:-keep]:
            if str(step) not in pinned and step not in also and (every is None or step % every):
                if check is not None:
                    check()
                self.at(step).remove()

    def save_snapshot(self, step: int, profiles: Mapping[float, Mapping[str, Tensor]]) -> None:
        """Commit the power-function averages of a step: the same bits whoever does, and however often."""
        (self.snapshots / f"{step:09d}").commit_folder({PROFILES: _tensors(_flattened(profiles))})

    def snapshot(self, step: int) -> dict[float, dict[str, Tensor]]:
        """The power-function averages of a step, by sigma_rel. DamageError where they are missing or damaged."""
        return profiles_of((self.snapshots / f"{step:09d}").read_folder(PROFILES)[PROFILES])

    def kept_snapshots(self) -> list[int]:
        """Steps whose power-function averages are kept, rising."""
        return sorted(int(n) for n in self.snapshots.list() if n.isdigit())

    def profiles(self, step: int) -> dict[float, dict[str, Tensor]]:
        """The power-function averages in a step's checkpoint, by sigma_rel; none where none are kept."""
        if PROFILES not in self.digests(step):
            return {}
        return profiles_of(self.at(step).read_folder(PROFILES)[PROFILES])

    def pin(self, step: int) -> None:
        """Keep a step's checkpoint for good: some run's end, which a longer run must not thin out."""
        (self.place / _PINS / str(step)).claim(b"")

    def is_pinned(self, step: int) -> bool:
        return (self.place / _PINS / str(step)).exists()

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step, every file verified. DamageError names what is wrong."""
        files = self.at(step).read_folder()
        state = json.loads(files[STATE])
        if state["format"] != FORMAT:
            raise UserError(f"{self.at(step) / STATE} has format {state['format']}: this version reads {FORMAT}")
        return Checkpoint(
            step=state["step"],
            images=state["images"],
            skipped=state.get("skipped", 0),  # of a time when a run ended at the first
            skipped_in_a_row=state.get("skipped_in_a_row", 0),
            model=safetensors.torch.load(files[MODEL]),
            ema=safetensors.torch.load(files[EMA]),
            optimizer=safetensors.torch.load(files[OPTIMIZER]),
            profiles=profiles_of(files[PROFILES]) if PROFILES in files else {},
            environment=state["environment"],
        )

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that verifies; a warning names each damaged one passed over."""
        step = self.latest_step()
        return None if step is None else self.load(step)

    def latest_step(self) -> int | None:
        """Step of the last checkpoint that verifies; a warning names each damaged one passed over."""
        for step in reversed(self.steps()):
            try:
                self.at(step).read_folder()
                return step
            except DamageError as error:
                warnings.warn(f"checkpoint {step} is damaged and passed over: {error}", stacklevel=2)
        return None

    def environment(self, step: int) -> dict[str, Any]:
        """What a step's checkpoint was computed on."""
        return json.loads(self.at(step).read_folder(STATE)[STATE])["environment"]

    def verifies(self, step: int) -> bool:
        """Whether a step's checkpoint is there and every file of it is what was written."""
        try:
            self.at(step).read_folder()
        except DamageError:
            return False
        return True

    def digests(self, step: int) -> dict[str, str]:
        """sha256 of each file of a step's checkpoint, by its manifest."""
        return (self.at(step) / MANIFEST).read_json()["files"]


def profiles_of(data: bytes) -> dict[float, dict[str, Tensor]]:
    """Power-function averages, by rising sigma_rel, of a `profiles.safetensors`, which keeps no order."""
    profiles: dict[float, dict[str, Tensor]] = {}
    for name, tensor in safetensors.torch.load(data).items():
        width, _, parameter = name.partition("/")
        profiles.setdefault(float(width), {})[parameter] = tensor
    return dict(sorted(profiles.items()))


def _flattened(profiles: Mapping[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{width!r}/{name}": tensor for width, named in profiles.items() for name, tensor in named.items()}


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

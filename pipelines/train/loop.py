"""The training loop, the same for one process and for many.

Everything that decides a bit is keyed by (seed, step, slot): which images, which timesteps, which noise, which flips.
Ranks only share the slots out. The one clock is images seen.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.build import build_model
from pipelines.data.manifest import Dataset
from pipelines.data.order import owned_slots
from pipelines.data.reader import SlotStream
from pipelines.errors import Diverged
from pipelines.spec import Spec, parse_spec
from pipelines.store import Place
from pipelines.train.checkpoint import Checkpoint
from pipelines.train.diagnosis import SlotInputs, diagnose
from pipelines.train.end import Why, awaited_scores, end_of
from pipelines.train.images import TrainingImages
from pipelines.train.initial import first_weights
from pipelines.train.pace import WORDS, Pace, Word, spent_until
from pipelines.train.rate import learning_rate
from pipelines.train.recorder import Recorder
from pipelines.train.reduce import SlotGradients
from pipelines.train.run import Run, environment
from pipelines.train.scores import HeldOutScore
from pipelines.train.scoring import Scoring, scoring_calls
from pipelines.train.slots import Drawn, SlotLosses
from pipelines.train.state import State
from pipelines.train.world import World

_BUCKET_MB = 1 << 20

MOST_SKIPPED = 5
"""Steps in a row whose gradient is not finite: then the run ends, for going back would meet the same bits again."""


@dataclass(frozen=True)
class Outcome:
    """Where training ended."""

    step: int
    images: int
    attempt: int
    why: Why | None = None
    """What ended it before `train.images`, if it was not a stop from outside."""


Hook = Callable[["Trainer"], None]


def train(
    spec: Spec,
    dataset: Dataset,
    run: Run,
    world: World | None = None,
    at_checkpoint: Hook | None = None,
    scores: bool = True,
) -> Outcome:
    """Train from the last checkpoint that verifies (or the start) to `spec.train.images`, or until a limit of the spec
    or `Run.ask` ends it.

    `at_checkpoint` is called on every rank after each checkpoint. Where not `scores`, others take the held-out scores.
    Raises DamageError where data is damaged, Failed where the training diverged.
    """
    torch.set_num_threads(spec.train.threads)
    trainer = Trainer(spec, dataset, run, world or World(), scores)
    try:
        with trainer.stream() as stream:
            why = _train(trainer, stream, at_checkpoint)
    except BaseException:
        with contextlib.suppress(Exception):  # what is being written is worth waiting for
            trainer.recorder.settle()
        raise
    trainer.recorder.finish()
    return Outcome(trainer.step, trainer.images, trainer.attempt, why)


def _train(trainer: "Trainer", stream: SlotStream, at_checkpoint: Hook | None) -> Why | None:
    train = trainer.spec.train
    snapshots = frozenset(train.snapshot_steps(train.total_steps))
    scored = frozenset(train.scored_steps(train.total_steps))
    for step in trainer.awaited_scores():  # a kill may have come between a checkpoint and its score
        if trainer.score(step):
            return "plateau"
    word: Word = "end" if trainer.is_spent() else ""
    while trainer.step < train.total_steps and word not in ("stop", "end"):
        word = trainer.take_step(stream)
        if trainer.step in snapshots:
            trainer.save_snapshot()
        last = trainer.step == train.total_steps or word in ("stop", "end")
        due = trainer.step % train.checkpoint_every == 0 or word in ("checkpoint", "score")
        # In a row of skipped steps, the next checkpoint is one that may be past help.
        saved = last or trainer.step in scored or (due and not trainer.state.skipped_in_a_row)
        if saved:
            trainer.save()
            if at_checkpoint is not None:
                trainer.recorder.settle()
                at_checkpoint(trainer)
        is_scored = trainer.step in scored or (word == "score" and saved)
        if trainer.scores and is_scored and trainer.score(trainer.step):
            return "plateau"
    return "budget" if word == "end" else None


class Trainer:
    """The state of a run between steps, and the step."""

    def __init__(self, spec: Spec, dataset: Dataset, run: Run, world: World, scores: bool = True) -> None:
        self.spec, self.dataset, self.run, self.world = spec, dataset, run, world
        self.scores = scores and spec.train.score is not None and len(dataset.split("held-out")) > 1
        self._losses = SlotLosses(spec, world.device)
        self.model = build_model(spec).to(world.device)
        self.parameters = list(self.model.parameters())
        self.state = State(self.model, spec.train)
        self.owned = owned_slots(world.rank, world.size, spec.train.slots)
        self._images = TrainingImages(spec, dataset, run, self.owned)
        self._spent = self._resume()
        self._gradients = SlotGradients(self.parameters)
        if spec.train.compile:
            self.model.compile()
        self._module: Any = self.model
        if world.size > 1:
            devices = None if world.device.type == "cpu" else [world.device]
            # One bucket: the exchange waits for the last gradient anyhow, and is over sooner in one piece.
            self._module = DistributedDataParallel(
                self.model, device_ids=devices, process_group=world.group, bucket_cap_mb=_BUCKET_MB
            )
            self._module.register_comm_hook(world.group, self._gradients.hook)
        self._scoring: Scoring | None = None
        self._scored: dict[int, HeldOutScore] = {}
        """By step; rank 0 alone knows them, and looks for those of earlier attempts once."""
        if world.rank == 0 and self.scores:
            self._scored = {score.step: score for score in run.scores.taken(spec.train)}
        calls = scoring_calls(spec) if self.scores and not spec.train.scored_steps(spec.train.total_steps) else 0
        self._pace = Pace(run, spec.train, self._spent, calls) if world.rank == 0 else None
        run.note_worker(self.attempt, world.rank, world.size, self.step)
        self.recorder = Recorder(run, spec.train, self.attempt, self.images, world)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def images(self) -> int:
        """Images seen."""
        return self.state.images

    def is_spent(self) -> bool:
        """Whether earlier attempts have spent the budget."""
        budget = self.spec.train.budget_minutes
        return budget is not None and self._spent >= 60 * budget

    # --- the step ---

    def take_step(self, stream: SlotStream) -> Word:
        """One optimizer step on the next global batch; what is to be done after it, the same on all ranks."""
        self.model.train()
        waited = 0.0
        stats = []
        self._gradients.word = 0.0 if self._pace is None else float(WORDS.index(self._pace.word(self.step + 1)))
        for slot in self.owned:
            before = time.perf_counter()
            step, of_slot, images, labels = next(stream)
            waited += time.perf_counter() - before
            assert (step, of_slot) == (self.step, slot)
            stats.append(self._slot(slot, images, labels))
        self._images.record_damage(self.step)
        gradient = self._gradients.total.div_(self.spec.train.slots)
        norm = float(torch.linalg.vector_norm(gradient))
        rate = learning_rate(self.spec.train, self.images)
        if math.isfinite(norm):
            if self.spec.train.grad_clip is not None and norm > self.spec.train.grad_clip:
                gradient.mul_(self.spec.train.grad_clip / norm)
            self.state.advance(gradient, rate)
        else:  # the same bits on all ranks, so all skip
            if self.state.skipped_in_a_row + 1 == MOST_SKIPPED:
                raise Diverged(self._diagnosis())
            self.state.skip()
        exact = {
            "gradient_norm": norm,
            "learning_rate": rate,
            "skipped": float(self.state.skipped),
            "ema_half_life_images": self.state.ema_half_life,
        }
        self.recorder.beat(self.step)
        self.recorder.add(torch.stack(stats), exact, {"data_wait_seconds": waited})
        if self.step % self.spec.train.log_every == 0:
            self.recorder.log(self.step)
        return WORDS[int(self._gradients.heard)]

    def _slot(self, slot: int, images: Any, labels: Any) -> Tensor:
        """Forward and backward of one slot, its gradient merged with the others'; its statistics."""
        drawn = self._losses.draw(self.step, slot, images, labels)
        last = slot == self.owned[-1]
        with self._module.no_sync() if self.world.size > 1 and not last else contextlib.nullcontext():
            statistics = self._losses.backward(self._module, drawn)
        if not last:
            self._gradients.add()
        elif self.world.size == 1:
            self._gradients.finish()
        for parameter in self.parameters:
            parameter.grad = None
        return statistics

    def _diagnosis(self) -> str:
        """What went wrong in this step, of which all ranks know a part, and what there is to go back to."""

        def inputs(slot: int) -> SlotInputs:
            images, labels, names = self._images.read(self.step, slot)

            def draw() -> Drawn:  # anew each time, which seeds dropout
                return self._losses.draw(self.step, slot, images, labels)

            return SlotInputs(names, draw()[1], lambda: self._losses.losses(self.model, draw()))

        found = self.world.gather(diagnose(self.model, [inputs(slot) for slot in self.owned]))
        where = next((part for part in found if part), "in the sum of the slots' gradients, each of which is finite")
        if self.world.rank == 0:
            self.recorder.settle()
        good = [step for step in self.run.checkpoints.steps() if step <= self.step + 1 - MOST_SKIPPED]
        kept = f"its last good checkpoint is {self.run.checkpoints.at(good[-1])}" if good else "it has no checkpoint"
        return (
            f"run {self.run.name} diverged: the gradient was not finite {MOST_SKIPPED} steps in a row, up to step "
            f"{self.step + 1}: {where}; {kept}; lower train.learning_rate or add train.warmup_images"
        )

    # --- state ---

    def save(self) -> None:
        """Commit the journal's segment, then the checkpoint, while training goes on (rank 0 writes)."""
        self.recorder.save(self.step, self._checkpoint)
        if self._pace is not None:
            self._pace.saved()

    def awaited_scores(self) -> list[int]:
        """Steps before this one whose checkpoints are to be scored still, the same on all ranks."""
        return self.world.broadcast(awaited_scores(self.run, self.spec.train) if self._pace and self.scores else [])

    def score(self, step: int) -> bool:
        """Score the average after a step, this one or an earlier checkpoint's, on held-out images, all ranks a part of
        them; whether the run is at the end of its patience.
        """
        if not self.world.broadcast(step in self._scored):
            began = time.perf_counter()
            if self._scoring is None:
                self._scoring = Scoring(self.spec, self.dataset, self.world.device)
            weights = self.state.average() if step == self.step else self.run.checkpoints.load(step).ema
            done = self.world.gather(self._scoring.work(weights, self.world.rank, self.world.size))
            if self._pace is not None:
                score, grid = self._scoring.score(done, step, began)
                self._scored[step] = score
                self.recorder.save_score(score, grid)
                self._pace.scored(score.seconds)
        end = end_of(self._scored.values(), self.spec.train)
        return self.world.broadcast(end is not None and end.step <= self.step)

    def save_snapshot(self) -> None:
        """Keep the power-function averages of this step (rank 0 writes, nobody waits)."""
        self.recorder.save_snapshot(self.step, self.state.profiles)

    def _checkpoint(self) -> Checkpoint:
        device = self.world.device
        where: dict[str, Any] = {"threads": self.spec.train.threads, "device": device.type}
        if device.type == "cuda":
            where["gpu"] = torch.cuda.get_device_name(device)
        return self.state.checkpoint({**environment(), **where})

    def stream(self) -> SlotStream:
        """The images of the owned slots from this step on, to the end."""
        return self._images.stream(self.step)

    def _resume(self) -> float:
        """Agree with all ranks on attempt and checkpoint, and load it; the seconds spent until there."""
        found: tuple[int, int | None, float] = (0, None, 0.0)
        if self.world.rank == 0:
            attempt = self.run.claim_attempt()  # first: an earlier one commits nothing more then
            step = self.run.checkpoints.latest_step()
            budget = self.spec.train.budget_minutes is not None and step is not None
            found = (attempt, step, spent_until(self.run, self.spec.train, step or 0) if budget else 0.0)
        self.attempt, step, spent = self.world.broadcast(found)
        if step is not None:
            self.state.load(self.run.checkpoints.load(step))
        elif self.spec.train.init_from is not None:
            self.state.start_from(first_weights(self.spec, self.dataset.digest, self.run))
        return spent


def train_from_config(config: Mapping[str, Any], world: World, at_checkpoint: Hook | None = None) -> Outcome:
    """`train` from plain values, as they travel to a worker."""
    spec, dataset = parse_spec(config["spec"]), Dataset.open(Place.of(config["dataset"]))
    return train(spec, dataset, Run(Place.of(config["run"])), world, at_checkpoint, config.get("scores", True))

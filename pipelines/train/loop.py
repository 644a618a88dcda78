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
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_core import noise, timesteps
from ddpm_core.guidance import dropped
from pipelines.build import build_loss, build_model, build_process
from pipelines.data.manifest import Dataset
from pipelines.data.order import owned_slots
from pipelines.data.pixels import to_model
from pipelines.data.reader import SlotStream
from pipelines.errors import Failed
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.augment import augment
from pipelines.train.checkpoint import Checkpoint
from pipelines.train.diagnosis import SlotInputs, diagnose
from pipelines.train.images import TrainingImages
from pipelines.train.initial import first_weights
from pipelines.train.recorder import QUARTILES, Recorder
from pipelines.train.reduce import SlotGradients
from pipelines.train.run import Ask, Run, environment
from pipelines.train.state import State

_ASKS: tuple[Ask | None, ...] = (None, "checkpoint", "stop")
_LOOK_SECONDS = 0.2

MOST_SKIPPED = 5
"""Steps in a row whose gradient is not finite: then the run ends, for going back would meet the same bits again."""


@dataclass(frozen=True)
class World:
    """Who computes: this process's rank among `size`."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Outcome:
    """Where training ended."""

    step: int
    images: int
    attempt: int


Hook = Callable[["Trainer"], None]


def train(
    spec: Spec, dataset: Dataset, run: Run, world: World | None = None, at_checkpoint: Hook | None = None
) -> Outcome:
    """Train from the last checkpoint that verifies (or the start) to `spec.train.images`, or until `Run.ask` stops it.

    `at_checkpoint` is called on every rank after each checkpoint. Raises DamageError where data is damaged, Failed
    where the training diverged.
    """
    torch.set_num_threads(spec.train.threads)
    trainer = Trainer(spec, dataset, run, world or World())
    snapshots = frozenset(spec.train.snapshot_steps(spec.train.total_steps))
    try:
        with trainer.stream() as stream:
            while trainer.step < spec.train.total_steps:
                asked = trainer.take_step(stream)
                last = trainer.step == spec.train.total_steps
                if trainer.step in snapshots:
                    trainer.save_snapshot()
                due = trainer.step % spec.train.checkpoint_every == 0 and not trainer.state.skipped_in_a_row
                if asked or last or due:  # no good one makes room for one that may be past help
                    trainer.save()
                    if at_checkpoint is not None:
                        trainer.recorder.settle()
                        at_checkpoint(trainer)
                if asked == "stop":
                    break
    except BaseException:
        with contextlib.suppress(Exception):  # what is being written is worth waiting for
            trainer.recorder.settle()
        raise
    trainer.recorder.finish()
    return Outcome(trainer.step, trainer.images, trainer.attempt)


class Trainer:
    """The state of a run between steps, and the step."""

    def __init__(self, spec: Spec, dataset: Dataset, run: Run, world: World) -> None:
        self.spec, self.dataset, self.run, self.world = spec, dataset, run, world
        self.process = build_process(spec.diffusion)
        self._loss = build_loss(spec.train)
        even = spec.train.timesteps == "uniform"
        self._density = None if even else timesteps.vlb_density(self.process)
        self.model = build_model(spec)
        self.parameters = list(self.model.parameters())
        self.state = State(self.model, spec.train)
        self.owned = owned_slots(world.rank, world.size, spec.train.slots)
        self._images = TrainingImages(spec, dataset, run, self.owned)
        self._resume()
        self._gradients = SlotGradients(self.parameters)
        self._module: Any = self.model
        if world.size > 1:
            self._module = DistributedDataParallel(self.model)
            self._module.register_comm_hook(None, self._gradients.hook)
        self._boundaries = _log_snr_quartiles(self.process.schedule.log_snr)
        run.note_worker(self.attempt, world.rank, world.size, self.step)
        self._looked_at = 0.0
        self.recorder = Recorder(run, spec.train, self.attempt, self.images, world.rank, world.size)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def images(self) -> int:
        """Images seen."""
        return self.state.images

    # --- the step ---

    def take_step(self, stream: SlotStream) -> Ask | None:
        """One optimizer step on the next global batch; what is asked of the run meanwhile, the same on all ranks."""
        self.model.train()
        waited = 0.0
        stats = []
        self._gradients.word = self._asked()
        for slot in self.owned:
            before = time.perf_counter()
            step, of_slot, images, labels = next(stream)
            waited += time.perf_counter() - before
            assert (step, of_slot) == (self.step, slot)
            stats.append(self._slot(slot, images, labels))
        self._images.record_damage(self.step)
        gradient = self._gradients.total.div_(self.spec.train.slots)
        norm = float(torch.linalg.vector_norm(gradient))
        rate = self._learning_rate()
        if math.isfinite(norm):
            if self.spec.train.grad_clip is not None and norm > self.spec.train.grad_clip:
                gradient.mul_(self.spec.train.grad_clip / norm)
            self.state.advance(gradient, rate)
        else:  # the same bits on all ranks, so all skip
            if self.state.skipped_in_a_row + 1 == MOST_SKIPPED:
                raise Failed(self._diagnosis())
            self.state.skip()
        exact = {
            "gradient_norm": norm,
            "learning_rate": rate,
            "skipped": float(self.state.skipped),
            "ema_half_life_images": self.state.ema_half_life,
        }
        self.recorder.add(torch.stack(stats), exact, {"data_wait_seconds": waited})
        if self.step % self.spec.train.log_every == 0:
            self.recorder.log(self.step)
        asked = _ASKS[int(self._gradients.heard)]
        if asked == "checkpoint" and self.world.rank == 0:
            self.run.forget_asked()
        return asked

    def _asked(self) -> float:
        """Rank 0 looks, now and then, and tells the others by the exchange of a step."""
        if self.world.rank == 0 and time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self._looked_at = time.monotonic()
            return float(_ASKS.index(self.run.asked()))
        return 0.0

    def _slot(self, slot: int, images: Any, labels: Any) -> Tensor:
        """Forward and backward of one slot; its statistics, float64 [1 + 2 * quartiles]: loss, then by quartile of the
        log-SNR the sums of losses and of what they count, so that the means are those over timesteps alike.
        """
        x0, t, eps, shown = self._draw(slot, images, labels)
        last = slot == self.owned[-1]
        if self.world.size > 1 and not last:
            with self._module.no_sync():
                losses, weights = self._backward(x0, t, eps, shown)
        else:
            losses, weights = self._backward(x0, t, eps, shown)
        if not last:
            self._gradients.add()
        elif self.world.size == 1:
            self._gradients.finish()
        for parameter in self.parameters:
            parameter.grad = None
        quartile = torch.bucketize(self.process.schedule.log_snr[t - 1], self._boundaries)
        sums = torch.zeros(2, QUARTILES, dtype=torch.float64)
        sums[0].index_add_(0, quartile, losses)
        sums[1].index_add_(0, quartile, weights)
        return torch.cat((losses.mean()[None], sums.flatten()))

    def _draw(self, slot: int, images: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the network sees of a slot: x0, timesteps, noise, labels. Dropout is seeded, too."""
        seed, step = self.spec.seed, self.step
        x0 = augment(to_model(images), self.spec.data, seed, step, slot)
        t = self._timesteps(slot, len(images))
        eps = noise.normal([noise.key(seed, "eps", step, slot)], x0.shape)[0]
        if self.spec.model.dropout:
            torch.manual_seed(noise.key(seed, "dropout", step, slot) >> 1)
        return x0, t, eps, self._labels(slot, labels)

    def _timesteps(self, slot: int, n: int) -> Tensor:
        keys = [noise.key(self.spec.seed, "timestep", self.step, slot)]
        if self._density is None:
            return noise.integers(keys, n, 1, self.process.timesteps)[0]
        return timesteps.draw(self._density, noise.uniform(keys, n)[0])

    def _labels(self, slot: int, labels: Any) -> Tensor | None:
        """The labels that the network is shown, some of them hidden; None for a model without classes."""
        if (classes := self.spec.model.classes) is None:
            return None
        keys = [noise.key(self.spec.seed, "label", self.step, slot)]
        uniforms = noise.uniform(keys, len(labels))[0]
        return dropped(torch.as_tensor(labels, dtype=torch.int64), uniforms, self.spec.train.label_dropout, classes)

    def _losses(self, module: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        def network(x_t: Tensor, timestep: Tensor) -> Any:
            return module(x_t, timestep) if labels is None else module(x_t, timestep, labels)

        return self._loss(self.process, network, x0, t, eps)

    def _backward(self, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The losses of the images as they count, and how much they count: float64 [N] both."""
        losses = self._losses(self._module, x0, t, eps, labels)
        weights = torch.ones(len(losses), dtype=torch.float64)
        if self._density is not None:
            weights = timesteps.importance(self._density, t)
            losses = losses * weights.to(losses)
        losses.mean().backward()
        return losses.detach().double(), weights

    def _learning_rate(self) -> float:
        train, done = self.spec.train, self.images + self.spec.train.global_batch
        if done < train.warmup_images:
            return train.learning_rate * (done / train.warmup_images)
        if train.decay == "constant":
            return train.learning_rate
        # The last step still moves: 0 comes a batch after it.
        span = train.total_steps * train.global_batch + train.global_batch - train.warmup_images
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - train.warmup_images) / span))

    def _diagnosis(self) -> str:
        """What went wrong in this step, of which all ranks know a part, and what there is to go back to."""

        def inputs(slot: int) -> SlotInputs:
            images, labels, names = self._images.read(self.step, slot)
            t = self._draw(slot, images, labels)[1]
            return SlotInputs(names, t, lambda: self._losses(self.model, *self._draw(slot, images, labels)))

        found: list[str | None] = [diagnose(self.model, [inputs(slot) for slot in self.owned])]
        if self.world.size > 1:
            mine, found = found[0], [None] * self.world.size
            dist.all_gather_object(found, mine)
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

    def save_snapshot(self) -> None:
        """Keep the power-function averages of this step (rank 0 writes, nobody waits)."""
        self.recorder.save_snapshot(self.step, self.state.profiles)

    def _checkpoint(self) -> Checkpoint:
        return self.state.checkpoint({**environment(), "threads": self.spec.train.threads})

    def stream(self) -> SlotStream:
        """The images of the owned slots from this step on, to the end."""
        return self._images.stream(self.step)

    def _resume(self) -> None:
        """Agree with all ranks on attempt and checkpoint, and load it."""
        found: list[Any] = [None, None]
        if self.world.rank == 0:
            checkpoint = self.run.checkpoints.latest()
            found = [self.run.claim_attempt(), None if checkpoint is None else checkpoint.step]
        if self.world.size > 1:
            dist.broadcast_object_list(found, src=0)
        self.attempt, step = found
        if step is not None:
            self.state.load(self.run.checkpoints.load(step))
        elif self.spec.train.init_from is not None:
            self.state.start_from(first_weights(self.spec, self.dataset.digest, self.run))


def _log_snr_quartiles(log_snr: Tensor) -> Tensor:
    """The three values that cut the schedule's timesteps into quarters by log-SNR, rising."""
    return torch.quantile(log_snr, torch.tensor([0.25, 0.5, 0.75], dtype=log_snr.dtype))


def train_from_config(config: Mapping[str, Any], world: World, at_checkpoint: Hook | None = None) -> Outcome:
    """`train` from plain values, as they travel to a worker."""
    from pipelines.spec import parse_spec

    spec = parse_spec(config["spec"])
    return train(spec, Dataset.open(Place.of(config["dataset"])), Run(Place.of(config["run"])), world, at_checkpoint)

"""The training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipelines.sections.base import Section

_SNAPSHOTS = 16
"""Of the power-function averages of a run, by default: of two widths, an average of one between them is then made to
within 1 %."""
_MOST_SNAPSHOTS = 256


class Uniform(Section):
    kind: Literal["uniform"] = "uniform"


class MinSnr(Section):
    kind: Literal["min_snr"]
    gamma: PositiveFloat = 5.0


class P2(Section):
    kind: Literal["p2"]
    gamma: Annotated[float, Field(ge=0)] = 1.0
    k: PositiveFloat = 1.0


Weighting = Annotated[Uniform | MinSnr | P2, Field(discriminator="kind")]


class Train(Section):
    images: PositiveInt
    """Images to train on (the clock of everything); rounds up to a whole batch."""
    global_batch: PositiveInt = 128
    slots: PositiveInt = 4
    """Parts of a batch, a power of two; workers share them out."""
    workers: PositiveInt = 1
    threads: PositiveInt = 1
    """Torch threads a worker; part of the run's identity."""
    resources: dict[str, PositiveFloat] = {}
    """Ray resources a worker, beside its CPUs."""
    oversubscribe: bool = False
    """Allow more workers than cores (for tests)."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 3
    """The last so many."""
    keep_every: PositiveInt | None = None
    """Steps between checkpoints that are kept for good, beside the last ones."""
    log_every: PositiveInt = 10
    """Steps between rows of the journal."""
    learning_rate: PositiveFloat = 2e-4
    warmup_images: Annotated[int, Field(ge=0)] = 0
    """Images over which the learning rate rises from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Of the learning rate, after that; cosine falls to 0 at `images`, with which a longer run is another run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: PositiveFloat | None = 1.0
    """Largest norm of the gradient."""
    loss: Literal["simple", "mean_matching", "vlb", "hybrid"] = "simple"
    """See `ddpm_core.losses`; a learned variance takes hybrid or vlb."""
    weighting: Weighting = Uniform()
    """Of the squared error, in the simple and the hybrid loss."""
    timesteps: Literal["uniform", "importance"] = "uniform"
    """How timesteps are drawn; "importance" where the bound is large, each loss divided by what that favours it."""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labels hidden from a class-conditional model, which is what guidance steers away from; 0 for one
    without a null class."""
    ema_half_life: PositiveInt = 20_000
    """Images after which a weight counts half in the moving average."""
    ema_profiles: list[Annotated[float, Field(gt=0, lt=0.288)]] = []
    """Widths (sigma_rel) of power-function averages kept beside it, say [0.05, 0.1]: of their snapshots, an average of
    any other length is made after training, see `sample.ema_length`."""
    ema_snapshot_every: PositiveInt | None = None
    """Images between these snapshots, each at the first whole batch; part of the run's identity. By default a 16th of
    `images`, with which a longer run is another run."""
    init_from: str | None = None
    """Folder of the first weights: a checkpoint, whose average is taken, or one of diffusers' DDPMPipeline."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "Train":
        if self.slots & (self.slots - 1):
            raise ValueError(f"train.slots: {self.slots} is not a power of two")
        if self.global_batch % self.slots:
            raise ValueError(f"train.global_batch: {self.global_batch} is not a multiple of train.slots = {self.slots}")
        if self.slots % self.workers:
            raise ValueError(f"train.workers: {self.workers} does not divide train.slots = {self.slots}")
        return self

    @model_validator(mode="after")
    def _snapshots_are_few(self) -> "Train":
        every = max(self.snapshot_every, self.global_batch)
        count = self.total_steps * self.global_batch // every if self.ema_profiles else 0
        if count > _MOST_SNAPSHOTS:
            raise ValueError(
                f"train.ema_snapshot_every: {self.ema_snapshot_every} images make {count:,} snapshots, "
                f"more than the {_MOST_SNAPSHOTS} that are of any use; raise it"
            )
        return self

    @property
    def total_steps(self) -> int:
        return -(-self.images // self.global_batch)

    @property
    def snapshot_every(self) -> int:
        """Images between the snapshots of `ema_profiles`."""
        return self.ema_snapshot_every or -(-self.total_steps * self.global_batch // _SNAPSHOTS)

    def snapshot_steps(self, last: int) -> list[int]:
        """The steps up to `last` after which a snapshot of `ema_profiles` is kept, rising: on the clock of images, so
        that neither checkpoints nor stops move them.
        """
        if not self.ema_profiles:
            return []
        batch, every = self.global_batch, self.snapshot_every
        return sorted({-(-k * every // batch) for k in range(1, last * batch // every + 1)})

"""The training."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.sections.base import Section

_SNAPSHOTS = 16
"""Of the power-function averages of a run, by default: of two widths, an average of one between them is then made to
within 1 %."""
_MOST_SNAPSHOTS = 256
_MOST_SCORES = 10_000


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


class Score(Section):
    """Of held-out images, while a run trains. It decides no bit of it, but with `train.plateau` where it ends."""

    every_images: PositiveInt | None = None
    """Images between scores, each at the first whole batch, where a checkpoint is made. By default the ranks score at
    checkpoints, as often as it takes less than a twentieth of the time, and spare hosts whenever they can."""
    images: Annotated[int, Field(ge=2)] = 64
    """Held-out images that are scored."""
    timesteps: Annotated[int, Field(ge=2)] = 8
    """Of each image's bits/dim, and bins of log-SNR for which an error is given."""
    grid: PositiveInt = 16
    """Images drawn, from the same noise each time."""
    grid_steps: PositiveInt = 20
    """Steps of DDIM for each."""


class Plateau(Section):
    """The end of a run whose held-out bits/dim does not fall any more."""

    patience_images: PositiveInt
    """Images without a gain; the run ends at the first score that comes so long after the last one that was."""
    least_gain: Annotated[float, Field(ge=0)] = 0.0
    """A score counts as a gain if it lies more than so many bits/dim below that of the last gain."""


def _checked_workers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        numbers = list(value)
        if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers) or numbers[0] > numbers[1]:
            raise ValueError(f"train.workers: {value} is not [least, most], two numbers, rising")
        return numbers[0] if numbers[0] == numbers[1] else numbers
    if type(value) is not int or value < 1:
        raise ValueError(f"train.workers: give a number, or [least, most], not {value!r}")
    return value


class Train(Section):
    images: PositiveInt
    """Images to train on (the clock of everything); rounds up to a whole batch."""
    global_batch: PositiveInt = 128
    slots: PositiveInt = 4
    """Parts of a batch, a power of two; workers share them out."""
    workers: Annotated[int | list[int], BeforeValidator(_checked_workers)] = 1
    """How many train, or [least, most] to take as many as there is room for, more or fewer as hosts come and go."""
    threads: PositiveInt = 1
    """Torch threads a worker; part of the run's identity."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """In which the network computes; weights, gradients' sums, optimizer and averages are float32."""
    compile: bool = False
    """By torch.compile, which needs a compiler on each host; it is outside of what makes the same bits elsewhere."""
    resources: dict[str, PositiveFloat] = {}
    """Ray resources a worker, beside its CPUs."""
    oversubscribe: bool = False
    """Allow more workers than cores (for tests)."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""
    checkpoint_minutes: PositiveFloat | None = None
    """Most minutes between checkpoints, whatever the steps."""
    keep_checkpoints: PositiveInt = 3
    """The last so many."""
    keep_every: PositiveInt | None = None
    """Steps between checkpoints that are kept for good, beside the last ones."""
    keep_best: bool = False
    """Keep the one with the best held-out score, too."""
    budget_minutes: PositiveFloat | None = None
    """Minutes of training after which the run ends before `images`; the images that it reached are recorded."""
    plateau: Plateau | None = None
    """End the run before `images` where its held-out score gets no better."""
    score: Score | None = Score()
    """Held-out scores along the way; null for none."""
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
    """The first weights: a checkpoint's folder, whose average is taken, a registered model (NAME@champion or
    NAME@VERSION), or a folder of diffusers' DDPMPipeline."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "Train":
        if self.slots & (self.slots - 1):
            raise ValueError(f"train.slots: {self.slots} is not a power of two")
        if self.global_batch % self.slots:
            raise ValueError(f"train.global_batch: {self.global_batch} is not a multiple of train.slots = {self.slots}")
        return self

    @model_validator(mode="after")
    def _what_ends_it_is_scored(self) -> "Train":
        needs = "train.plateau" if self.plateau is not None else "train.keep_best" if self.keep_best else None
        if needs is not None and self.score is None:
            raise ValueError(f"{needs}: it needs train.score, which is off")
        if needs is not None and self.score is not None and self.score.every_images is None:
            raise ValueError(f"train.score.every_images: {needs} needs it, or the clock would decide")
        if self.score is not None and self.score.every_images is not None:
            batch = self.global_batch
            count = self.total_steps * batch // max(batch, self.score.every_images)
            if count > _MOST_SCORES:
                raise ValueError(
                    f"train.score.every_images: {self.score.every_images} images make {count:,} scores, more than "
                    f"{_MOST_SCORES:,}; raise it"
                )
        if self.plateau is not None and self.decay == "cosine":
            raise ValueError("train.plateau: with train.decay cosine the score is best at the end: use decay constant")
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
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def total_steps(self) -> int:
        return -(-self.images // self.global_batch)

    @property
    def snapshot_every(self) -> int:
        """Images between the snapshots of `ema_profiles`."""
        return self.ema_snapshot_every or -(-self.total_steps * self.global_batch // _SNAPSHOTS)

    def scored_steps(self, last: int) -> list[int]:
        """The steps up to `last` after which held-out images are scored, rising; none where no interval is given."""
        if self.score is None or self.score.every_images is None:
            return []
        batch, every = self.global_batch, self.score.every_images
        if every <= batch:
            return list(range(1, last + 1))
        return [-(-k * every // batch) for k in range(1, last * batch // every + 1)]

    def snapshot_steps(self, last: int) -> list[int]:
        """The steps up to `last` after which a snapshot of `ema_profiles` is kept, rising: on the clock of images, so
        that neither checkpoints nor stops move them.
        """
        if not self.ema_profiles:
            return []
        batch, every = self.global_batch, self.snapshot_every
        return sorted({-(-k * every // batch) for k in range(1, last * batch // every + 1)})

"""The sections of a spec: typed, frozen, each with its defaults in sight and every field's meaning under it."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Of a spec, its runs and its registered model: what is safe in paths, URIs and filters."""

_SNAPSHOTS = 16
"""Of the power-function averages of a run, by default: of two widths, an average of one between them is then made to
within 1 %."""
_MOST_SNAPSHOTS = 256

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking URI; by default `mlflow.db` in the store."""
    experiment: str = "ddpm"


class RayCluster(Section):
    address: str | None = None
    """A Ray cluster's address ("auto": the one this host is part of); by default Ray is started for the run."""


class LocalCache(Section):
    folder: str
    """On a local disk of each host that trains."""
    gib: PositiveFloat = 50.0
    """Largest size; the shards that were not used for longest make room."""


class Data(Section):
    source: str
    """`digits` (bundled), the path of images (a folder, whose class folders become labels, zip, tar, Parquet, IDX, npz,
    npy or CIFAR), or a dataset that was made before, by `ddpm ingest` or `ddpm data index`, also on S3."""
    image_size: Annotated[int, Field(ge=8)]
    """Side of the square images, pixels."""
    channels: Literal[1, 3] = 1
    resize: Literal["auto", "area", "lanczos"] = "auto"
    """Area averaging or Lanczos; auto is area where an image shrinks, Lanczos where it grows."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the images kept from training, chosen by a hash of their content; a split that the source has is kept
    instead."""
    drop_duplicates: bool = False
    """Keep one of images with the same pixels."""
    shard_images: PositiveInt = 1000
    """Images a shard."""
    workers: PositiveInt | None = None
    """Ray tasks that ingest at a time; by default one a CPU. The result does not depend on it."""
    window: PositiveInt = 4
    """Consecutive shards whose images are shuffled together."""
    flip: bool = False
    """Mirror half of the training images, keyed by slot."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Move each training image by up to so many pixels along each axis, keyed by slot; its edge is repeated."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a damaged training image stop, naming it, or read the next whole one instead, which is recorded in the run."""
    cache: LocalCache | None = None
    """Whole shards of a dataset on S3, kept on local disk; by default images are read from there one by one."""

    @model_validator(mode="after")
    def _shift_stays_inside(self) -> "Data":
        if self.shift >= self.image_size:
            raise ValueError(f"data.shift: {self.shift} pixels leave nothing of an image of {self.image_size}")
        return self


class Model(Section):
    channels: Annotated[list[PositiveInt], Field(min_length=1)] = [32, 64, 64]
    """Width of each resolution level; each level halves the image's side."""
    blocks: PositiveInt = 2
    """Residual blocks a level."""
    attention: list[Annotated[int, Field(ge=0)]] = []
    """Levels with self-attention; 0 is the full resolution."""
    mid_attention: bool = False
    head_channels: PositiveInt | None = None
    """Channels of an attention head; by default one head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    groups: PositiveInt = 32
    classes: PositiveInt | None = None
    """Classes of a class-conditional model, those of the dataset; by default the model knows none."""
    null_class: bool = True
    """Whether a class-conditional model can also be asked of no class, which guidance needs."""
    # Where networks trained by others differ.
    norm_eps: PositiveFloat = 1e-5
    time_sine_first: bool = False
    time_frequency_shift: Annotated[int, Field(ge=0)] = 0
    asymmetric_downsample: bool = False


class Linear(Section):
    kind: Literal["linear"] = "linear"
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class Quadratic(Section):
    kind: Literal["quadratic"]
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class Constant(Section):
    kind: Literal["constant"]
    beta: Fraction = 0.01


class Cosine(Section):
    kind: Literal["cosine"]
    s: PositiveFloat = 0.008


class Sigmoid(Section):
    kind: Literal["sigmoid"]
    start: float = -3.0
    end: float = 3.0
    tau: PositiveFloat = 1.0


class Rates(Section):
    kind: Literal["rates"]
    min_signal_rate: Fraction = 0.02
    max_signal_rate: Fraction = 0.95


class Betas(Section):
    kind: Literal["betas"]
    values: Annotated[list[float], Field(min_length=2)]
    """beta_1..beta_T."""


class AlphaBars(Section):
    kind: Literal["alpha_bars"]
    values: Annotated[list[float], Field(min_length=2)]
    """alpha_bar_1..alpha_bar_T, falling."""


Schedule = Annotated[
    Linear | Quadratic | Constant | Cosine | Sigmoid | Rates | Betas | AlphaBars, Field(discriminator="kind")
]


class Diffusion(Section):
    timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Schedule = Linear()
    """Its kind (linear where none is given) and that kind's own parameters."""
    zero_terminal: bool = False
    """Rescale the schedule to leave no signal at T; then predict v or x0."""
    predict: Literal["eps", "x0", "v", "mean"] = "eps"
    variance: Literal["small", "large", "learned_range"] = "small"

    @model_validator(mode="before")
    @classmethod
    def _linear_where_no_kind(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("schedule"), dict):
            return {**fields, "schedule": {"kind": "linear", **fields["schedule"]}}
        return fields


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


class Sample(Section):
    n: PositiveInt = 1000
    seed: int = 0
    ema_length: Annotated[float, Field(gt=0, lt=0.288)] | None = None
    """Length (sigma_rel) of the average that is drawn with, made of the snapshots of `train.ema_profiles`; by default
    the one by half-life."""
    sampler: Literal["ddim", "ancestral", "dpmpp_2m"] = "ddim"
    steps: PositiveInt = 50
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    """Which of the timesteps are taken; "trailing" begins at the last one, where nothing but noise is left."""
    clip_x0: bool = True
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Quantile of each image's predicted values to clip at, instead of at 1."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """How far a class-conditional model is steered towards the class; 1 is not at all."""
    chunk: PositiveInt = 100
    """Images computed together; part of the job's identity."""
    workers: PositiveInt = 1
    threads: PositiveInt = 1


class Evaluate(Section):
    feature_width: Annotated[int, Field(ge=2, le=64)] = 64
    feature_epochs: PositiveInt = 30
    """Passes of the feature network over the training images."""
    bits_images: Annotated[int, Field(ge=2)] = 256
    """Held-out images whose bits/dim is estimated."""
    bits_timesteps: Annotated[int, Field(ge=2)] = 8
    """Timesteps evaluated for each of them."""


class Gates(Section):
    """What a model must show before it becomes `champion`."""

    frechet_over_floor: PositiveFloat = 2.0
    """Largest Frechet distance, in units of the real-against-real floor at the same n."""
    feature_accuracy: Fraction = 0.95
    """Least held-out accuracy of the feature network, or its score means nothing."""


class EarlyStop(Section):
    """Asynchronous successive halving (Li et al. 2018) on the images-seen clock."""

    grace_images: PositiveInt
    """Images every trial may train on."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """One trial in so many goes on at each rung."""


class Sweep(Section):
    parameters: dict[str, Annotated[list[Any], Field(min_length=1)]]
    """Dotted spec field -> the values to try."""
    search: Literal["grid", "random"] = "grid"
    trials: PositiveInt | None = None
    """Number of random trials; a grid has its own."""
    concurrent: PositiveInt = 1
    early_stop: EarlyStop | None = None
    frechet_images: PositiveInt = 256
    """Samples a trial's Frechet distance is taken from."""

    @model_validator(mode="after")
    def _trials_belong_to_random(self) -> "Sweep":
        if (self.search == "random") != (self.trials is not None):
            raise ValueError("sweep.trials: give it with `search: random`, and only then")
        return self

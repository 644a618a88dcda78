"""The spec: everything a run is a function of, beside its data. YAML in, validated typed objects out.

Each section is a frozen model with its defaults in sight; an unknown field is an error that suggests the nearest
name. `Spec.training_fields` says which fields make a run a different run.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipelines.errors import UserError
from pipelines.fields import absolute_uri, apply_overrides, read_yaml

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


class Data(Section):
    source: str
    """`digits` (bundled), or the path of a folder of images (its class folders become labels)."""
    image_size: Annotated[int, Field(ge=8)]
    """Side of the square images, pixels."""
    channels: Literal[1, 3] = 1
    held_out: Fraction = 0.2
    """Share of the images kept from training, chosen by a hash of their content."""
    shard_images: PositiveInt = 1000
    """Images a shard."""
    window: PositiveInt = 4
    """Consecutive shards whose images are shuffled together."""
    flip: bool = False
    """Mirror half of the training images, keyed by slot."""


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


class Linear(Section):
    kind: Literal["linear"] = "linear"
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class Quadratic(Section):
    kind: Literal["quadratic"]
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class Cosine(Section):
    kind: Literal["cosine"]
    s: PositiveFloat = 0.008


class Sigmoid(Section):
    kind: Literal["sigmoid"]
    start: float = -3.0
    end: float = 3.0
    tau: PositiveFloat = 1.0


Schedule = Annotated[Linear | Quadratic | Cosine | Sigmoid, Field(discriminator="kind")]


class Diffusion(Section):
    timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Schedule = Linear()
    """Its kind (linear where none is given) and that kind's own parameters."""
    predict: Literal["eps", "x0", "v"] = "eps"
    variance: Literal["small", "large"] = "small"

    @model_validator(mode="before")
    @classmethod
    def _linear_where_no_kind(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("schedule"), dict):
            return {**fields, "schedule": {"kind": "linear", **fields["schedule"]}}
        return fields


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
    log_every: PositiveInt = 10
    """Steps between rows of the journal."""
    learning_rate: PositiveFloat = 2e-4
    warmup_images: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: PositiveFloat | None = 1.0
    """Largest norm of the gradient."""
    ema_half_life: PositiveInt = 20_000
    """Images after which a weight counts half in the moving average."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "Train":
        if self.slots & (self.slots - 1):
            raise ValueError(f"train.slots: {self.slots} is not a power of two")
        if self.global_batch % self.slots:
            raise ValueError(f"train.global_batch: {self.global_batch} is not a multiple of train.slots = {self.slots}")
        if self.slots % self.workers:
            raise ValueError(f"train.workers: {self.workers} does not divide train.slots = {self.slots}")
        return self

    @property
    def total_steps(self) -> int:
        return -(-self.images // self.global_batch)


class Sample(Section):
    n: PositiveInt = 1000
    seed: int = 0
    sampler: Literal["ddim", "ancestral"] = "ddim"
    steps: PositiveInt = 50
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    chunk: PositiveInt = 100
    """Images computed together; part of the job's identity."""
    workers: PositiveInt = 1
    threads: PositiveInt = 1


class Evaluate(Section):
    feature_width: Annotated[int, Field(ge=2, le=64)] = 64
    feature_epochs: PositiveInt = 30
    """Passes of the feature network over the training images."""
    bits_images: PositiveInt = 256
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


class Spec(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    """Also the name of the registered model."""
    seed: int = 0
    storage: str | None = None
    """Folder of the store; by default $DDPM_STORAGE, else ./ddpm-store."""
    tracking: Tracking = Tracking()
    ray: RayCluster = RayCluster()
    data: Data
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    promote: Gates = Gates()
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> "Spec":
        self._check_model()
        timesteps, sample = self.diffusion.timesteps, self.sample
        if sample.steps > timesteps:
            raise ValueError(f"sample.steps: {sample.steps} is more than diffusion.timesteps = {timesteps}")
        if sample.eta and sample.sampler != "ddim":
            raise ValueError(f"sample.eta: belongs to the ddim sampler, {sample.sampler} has none; leave it out")
        if (bits := self.evaluate.bits_timesteps) > timesteps:
            raise ValueError(f"evaluate.bits_timesteps: {bits} is more than diffusion.timesteps = {timesteps}")
        return self

    def _check_model(self) -> None:
        step = 2 ** (len(self.model.channels) - 1)
        if self.data.image_size % step:
            raise ValueError(
                f"data.image_size: {self.data.image_size} is not divisible by {step}, "
                f"which {len(self.model.channels)} levels of model.channels need"
            )
        if bad := [level for level in self.model.attention if level >= len(self.model.channels)]:
            raise ValueError(
                f"model.attention: there is no level {bad[0]}, model.channels has {len(self.model.channels)}"
            )
        if uneven := [width for width in self.model.channels if width % self.model.groups]:
            raise ValueError(f"model.groups: {self.model.groups} does not divide {uneven[0]} of model.channels")
        heads = [self.model.channels[level] for level in self.model.attention]
        heads += [self.model.channels[-1]] if self.model.mid_attention else []
        if self.model.head_channels and (uneven := [width for width in heads if width % self.model.head_channels]):
            raise ValueError(f"model.head_channels: {self.model.head_channels} does not divide {uneven[0]} channels")

    def training_fields(self) -> dict[str, Any]:
        """The fields that decide a run's weights, but for how long it trains: with the dataset, its identity.

        Where and by how many workers it runs is not among them; `train.images` is not, because nothing before the
        end depends on it.
        """
        spec = self.model_dump(mode="json")
        train = spec["train"]
        for name in (
            "images",
            "workers",
            "resources",
            "oversubscribe",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            del train[name]
        data = {"window": self.data.window, "flip": self.data.flip}
        return {
            "seed": self.seed,
            "data": data,
            "model": spec["model"],
            "diffusion": spec["diffusion"],
            "train": train,
        }


def load_spec(path: str | os.PathLike[str], overrides: Sequence[str] = (), resolve: bool = True) -> Spec:
    """Read and validate a spec file; each override is `a.b=c` with c in YAML. UserError names field and fix.

    Relative paths are resolved here, once, against the working directory, unless `resolve` is off.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such spec file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        fields = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a spec is a mapping of fields, starting with `name: ...`")
    spec = parse_spec(apply_overrides(fields, overrides), origin=str(path))
    return resolve_paths(spec) if resolve else spec


def resolve_paths(spec: Spec) -> Spec:
    """The spec with its paths absolute, so that it means the same from any working directory."""

    def absolute(text: str) -> str:
        return str(Path(text).expanduser().absolute())

    changes: dict[str, Any] = {}
    if spec.data.source != "digits":
        changes["data"] = spec.data.model_copy(update={"source": absolute(spec.data.source)})
    if spec.storage is not None and "://" not in spec.storage:
        changes["storage"] = absolute(spec.storage)
    if spec.tracking.uri is not None:
        changes["tracking"] = spec.tracking.model_copy(update={"uri": absolute_uri(spec.tracking.uri)})
    return spec.model_copy(update=changes)


def parse_spec(fields: dict[str, Any], origin: str = "spec") -> Spec:
    """Validated spec of plain fields. UserError, in one line, names the first wrong field and the fix."""
    try:
        return Spec.model_validate(fields)
    except pydantic.ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def dump_spec(spec: Spec) -> str:
    """A spec as YAML, complete: every default written out."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)


def _explain(error: pydantic.ValidationError) -> str:
    # An unknown field often makes a required one missing too: the misspelt name is the better message.
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in problem["loc"] if part not in ("linear", "quadratic", "cosine", "sigmoid")]
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_fields(problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"fields here: {', '.join(known)}"
        return f"unknown field {field}: {hint}"
    if problem["type"] == "missing":
        return f"{field}: this field is required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    given = repr(problem["input"])
    return f"{field}: {message}, not {given if len(given) <= 60 else given[:57] + '...'}"


def _known_fields(location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section at a location of a validation error."""
    model: Any = Spec
    kinds = {"linear": Linear, "quadratic": Quadratic, "cosine": Cosine, "sigmoid": Sigmoid}
    for part in location:
        if part in kinds and model is not Spec:
            model = kinds[part]
            continue
        annotation = model.model_fields[part].annotation
        candidates = [a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type)]
        model = next((c for c in candidates if issubclass(c, pydantic.BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)

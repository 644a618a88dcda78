"""The spec: everything a run is a function of, beside its data. YAML in, validated typed objects out.

The whole and its identity are here, what each section holds in `pipelines/sections/`. An unknown field is an error
that suggests the nearest name. `Spec.training_fields` says which fields make a run a different run.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field, model_validator

from pipelines.errors import UserError, one_line
from pipelines.fields import absolute_uri, apply_overrides, is_registered, read_yaml, what_is_wrong
from pipelines.mistakes import explain
from pipelines.sections import (
    NAME,
    Data,
    Diffusion,
    Evaluate,
    Gates,
    Model,
    RayCluster,
    Sample,
    Section,
    Sweep,
    Tracking,
    Train,
)
from pipelines.unused import warn_without_effect


class Spec(Section):
    name: Annotated[str, Field(pattern=NAME, max_length=64)]
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
        self._check_loss()
        if isinstance(self.sample.ema_length, float) and not self.train.ema_profiles:
            raise ValueError(
                "sample.ema_length: an average of another length needs train.ema_profiles, say [0.05, 0.1]"
            )
        timesteps, sample = self.diffusion.timesteps, self.sample
        if sample.steps > timesteps:
            raise ValueError(f"sample.steps: {sample.steps} is more than diffusion.timesteps = {timesteps}")
        if sample.eta and sample.sampler != "ddim":
            raise ValueError(f"sample.eta: belongs to the ddim sampler, {sample.sampler} has none; leave it out")
        if sample.dynamic_threshold is not None and not sample.clip_x0:
            raise ValueError("sample.dynamic_threshold: it says where to clip, but sample.clip_x0 is off")
        if self.model.classes is not None and not self.model.null_class and self.train.label_dropout:
            raise ValueError(
                f"train.label_dropout: {self.train.label_dropout:g} of the labels are to be hidden, which "
                "model.null_class, being off, leaves nothing for: set it to 0, or model.null_class to true"
            )
        if sample.guidance != 1 and (self.model.classes is None or not self.train.label_dropout):
            raise ValueError("sample.guidance: it needs model.classes, and train.label_dropout above 0")
        if sample.labels != "uniform":
            if self.model.classes is None:
                raise ValueError("sample.labels: the model has no classes (model.classes); leave it out")
            if sample.labels != "data" and max(sample.labels) >= self.model.classes:
                raise ValueError(
                    f"sample.labels: {max(sample.labels)} is no class of the model, which has {self.model.classes}: "
                    f"0 to {self.model.classes - 1}"
                )
        if (bits := self.evaluate.bits_timesteps) > timesteps:
            raise ValueError(f"evaluate.bits_timesteps: {bits} is more than diffusion.timesteps = {timesteps}")
        return self

    def _check_loss(self) -> None:
        train, learned = self.train, self.diffusion.variance == "learned_range"
        if train.loss not in (("hybrid", "vlb") if learned else ("simple", "mean_matching", "vlb")):
            raise ValueError(
                f"train.loss: {train.loss} does not train diffusion.variance {self.diffusion.variance}: a learned one "
                "takes hybrid or vlb, a fixed one simple, mean_matching or vlb"
            )
        if train.weighting.kind != "uniform" and train.loss not in ("simple", "hybrid"):
            raise ValueError(f"train.weighting: the loss {train.loss} has weights of its own, leave it out")

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
        end depends on it, but for a learning rate that falls towards it, and for where snapshots of
        `train.ema_profiles` are kept if nothing else says so.
        """
        spec = self.model_dump(mode="json")
        train = spec["train"]
        if self.train.decay == "constant":  # without decay, a run is what it was before there was such a field
            del train["images"], train["decay"]
        else:
            train["images"] = self.train.total_steps * self.train.global_batch
        for name in (
            "workers",
            "resources",
            "oversubscribe",
            "checkpoint_every",
            "checkpoint_minutes",
            "keep_checkpoints",
            "keep_every",
            "keep_best",
            "budget_minutes",
            "plateau",
            "score",
            "log_every",
        ):
            del train[name]
        for name in ("precision", "compile"):  # at its default, a run is what it was before there was such a field
            if train[name] == Train.model_fields[name].default:
                del train[name]
        del train["ema_snapshot_every"]
        if self.train.ema_profiles:
            train["ema_snapshot_every"] = self.train.snapshot_every
            train["ema_profiles"] = sorted(set(self.train.ema_profiles))
        if self.model.classes is None:  # what then has no effect makes no other run
            train["label_dropout"] = Train.model_fields["label_dropout"].default
            spec["model"]["null_class"] = Model.model_fields["null_class"].default
        data = {"window": self.data.window, "flip": self.data.flip}
        if self.data.shift:  # without it, a run is what it was before there was such a field
            data["shift"] = self.data.shift
        return {
            "seed": self.seed,
            "data": data,
            "model": spec["model"],
            "diffusion": spec["diffusion"],
            "train": train,
        }


def load_spec(path: str | os.PathLike[str], overrides: Sequence[str] = (), resolve: bool = True) -> Spec:
    """Read and validate a spec file; each override is `a.b=c` with c in YAML. UserError names field and fix, and a
    warning each option that has no effect.

    Relative paths are resolved here, once, against the working directory, unless `resolve` is off.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such spec file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a spec file (NAME.yaml)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    try:
        fields = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {what_is_wrong(error)}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a spec is a mapping of fields, starting with `name: ...`")
    spec = parse_spec(apply_overrides(fields, overrides), origin=str(path))
    check_average(spec, str(path))
    warn_without_effect(spec)
    return resolve_paths(spec) if resolve else spec


def resolve_paths(spec: Spec) -> Spec:
    """The spec with its paths absolute, so that it means the same from any working directory."""

    def absolute(text: str) -> str:
        return str(Path(text).expanduser().absolute())

    changes: dict[str, Any] = {}
    data: dict[str, Any] = {}
    if spec.data.source != "digits" and "://" not in spec.data.source:
        data["source"] = absolute(spec.data.source)
    if (cache := spec.data.cache) is not None:
        data["cache"] = cache.model_copy(update={"folder": absolute(cache.folder)})
    if data:
        changes["data"] = spec.data.model_copy(update=data)
    if spec.storage is not None and "://" not in spec.storage:
        changes["storage"] = absolute(spec.storage)
    first = spec.train.init_from
    if first is not None and "://" not in first and not is_registered(first):
        changes["train"] = spec.train.model_copy(update={"init_from": absolute(first)})
    if spec.evaluate.inception is not None:
        changes["evaluate"] = spec.evaluate.model_copy(update={"inception": absolute(spec.evaluate.inception)})
    if spec.tracking.uri is not None:
        changes["tracking"] = spec.tracking.model_copy(update={"uri": absolute_uri(spec.tracking.uri)})
    return spec.model_copy(update=changes)


def parse_spec(fields: dict[str, Any], origin: str = "spec") -> Spec:
    """Validated spec of plain fields. UserError, in one line, names the first wrong field and the fix."""
    try:
        spec = Spec.model_validate(fields)
    except pydantic.ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Spec)}") from None
    _check_buildable(spec, origin)
    return spec


def _check_buildable(spec: Spec, origin: str) -> None:
    """What only the science knows: a schedule that cannot be, a combination that means nothing."""
    from pipelines.build import build_config, build_process  # loads torch, which no earlier mistake has to wait for

    for field, build in (
        ("diffusion", lambda: build_process(spec.diffusion)),
        ("model", lambda: build_config(spec.model, spec.data, spec.diffusion)),
    ):
        try:
            build()
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"{origin}: {field}: {error}") from None


def check_average(spec: Spec, origin: str) -> None:
    """UserError where the spec's training would not leave the average that it samples with.

    Of what is to be trained: of what was trained, that is known by what is there.
    """
    if isinstance(length := spec.sample.ema_length, float):
        from pipelines.averages import recipe

        try:
            recipe(spec.train, spec.train.total_steps, length)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None


def dump_spec(spec: Spec) -> str:
    """A spec as YAML, complete: every default written out."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, width=110)

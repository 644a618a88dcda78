"""Where a run's first weights come from, if not from its seed: a checkpoint's average, or a model made elsewhere."""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from ddpm_core import UNetConfig
from pipelines.build import build_config, build_schedule
from pipelines.errors import UserError
from pipelines.fields import is_registered
from pipelines.interop import is_diffusers, parameter_shapes, read_diffusers, spec_of
from pipelines.models import CONFIG, Model
from pipelines.sections import Diffusion, Section
from pipelines.spec import Spec
from pipelines.store import Place, sha256
from pipelines.train.checkpoint import EMA
from pipelines.train.run import Run, run_name

_SAME_ALPHA_BAR = 1e-3
"""Relative difference below which two schedules are one: what rounding to float32 does is far below it."""
_SHORT = 16
"""Most numbers of a schedule that are written out in a message."""
_FIELDS = {
    "image_channels": "data.channels",
    "num_classes": "model.classes",
    "learned_variance": "a learned diffusion.variance",
}
"""The network's settings that a spec has under another name than model.NAME."""


@dataclass(frozen=True)
class Initial:
    """Weights by parameter name, and what they mean."""

    weights: Mapping[str, Tensor]
    spec: Spec | None
    """That which they were trained by, in the sections model and diffusion; None where nothing says it."""

    @property
    def digest(self) -> str:
        """What a run is a function of: the weights themselves, wherever they lie."""
        return sha256(safetensors.torch.save({name: t.contiguous() for name, t in self.weights.items()}))


def read_initial(folder: str) -> Initial:
    """The weights in a folder. UserError where it holds none that can be read, DamageError where they are damaged."""
    if "://" not in folder and is_diffusers(folder):
        found = read_diffusers(folder)
        return Initial(found.weights, spec_of(found, folder))
    if is_registered(folder):
        raise UserError(f"train.init_from: {folder} is a registered model, which is fetched where a tracker is known")
    place = Place.of(folder)
    if place.is_local and not Path(folder).is_dir():
        raise UserError(f"train.init_from: there is no folder {folder}")
    if (place / "run.json").exists():
        last = Run(place).checkpoints.latest_step()
        hint = "" if last is None else f"; its last checkpoint is {Run(place).checkpoints.at(last)}"
        raise UserError(f"train.init_from: {folder} is a run, name one of its checkpoints{hint}")
    if not (place / EMA).exists():
        raise UserError(f"train.init_from: {folder} is neither a checkpoint nor a folder of diffusers' DDPMPipeline")
    weights = safetensors.torch.load(data := place.read_folder(EMA)[EMA])
    if (place / CONFIG).exists():  # of a registered model
        config = json.loads(place.read_folder(CONFIG)[CONFIG])
        return Initial(weights, Model.from_config(config, data, folder).spec)
    run = Run(place.parent.parent)
    return Initial(weights, run.spec() if (run.place / "run.json").exists() else None)


def first_weights(spec: Spec, dataset_digest: str, run: Run) -> Mapping[str, Tensor]:
    """The weights that a run begins with. UserError where they are not those any more that gave it its name."""
    assert spec.train.init_from is not None
    initial = read_initial(spec.train.init_from)
    if run_name(spec, dataset_digest, initial.digest) != run.name:
        raise UserError(
            f"train.init_from: the weights in {spec.train.init_from} are not those that run {run.name} was named by: "
            "put them back, or start the spec again, which is another run now"
        )
    return initial.weights


def check_initial(spec: Spec) -> None:
    """UserError where the first weights are not of the spec's network; a warning where they were trained otherwise."""
    folder = spec.train.init_from
    assert folder is not None
    initial = read_initial(folder)
    ours = build_config(spec.model, spec.data, spec.diffusion)
    if initial.spec is None:
        warnings.warn(
            f"train.init_from: {folder} has left its run's folder, whose run.json says what the weights mean: only "
            "their shapes are compared with this spec",
            stacklevel=2,
        )
    else:
        theirs = build_config(initial.spec.model, initial.spec.data, initial.spec.diffusion)
        if differing := list(_differences(theirs, ours)):
            raise UserError(
                f"train.init_from: {folder} holds the weights of another network: {'; '.join(differing)}. To train "
                f"them on, set model: {_words(initial.spec.model)} and diffusion: {_words(initial.spec.diffusion)}"
            )
        _warn_of_other_process(initial.spec.diffusion, spec.diffusion, folder)
    there = {name: tuple(value.shape) for name, value in initial.weights.items()}
    here = {name: tuple(shape) for name, shape in parameter_shapes(ours).items()}
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        name = differing[0]
        raise UserError(
            f"train.init_from: {folder} holds the weights of another network: of {len(differing)} that differ, {name} "
            f"is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        )


def _differences(theirs: UNetConfig, ours: UNetConfig) -> Iterator[str]:
    there, here = _meaning(theirs), _meaning(ours)
    for name in there:
        if there[name] != here[name]:
            field = _FIELDS.get(name, f"model.{name}")
            yield f"{field} is {_value(there[name])} there, {_value(here[name])} here"


def _meaning(config: UNetConfig) -> dict[str, Any]:
    """The settings that say what the weights do: all but dropout, and but those that have no effect."""
    fields = config.to_dict()
    del fields["dropout"]
    fields["attention"] = sorted(set(config.attention))
    if config.num_classes is None:
        fields["null_class"] = None
    attended = [config.channels[level] for level in fields["attention"]]
    attended += [config.channels[-1]] * config.mid_attention
    if all(width == (config.head_channels or width) for width in attended):
        fields["head_channels"] = None  # one head, or no attention to have any
    return fields


def _warn_of_other_process(theirs: Diffusion, ours: Diffusion, folder: str) -> None:
    there, here = build_schedule(theirs), build_schedule(ours)
    differing = []
    if theirs.predict != ours.predict:
        differing.append(f"to predict {theirs.predict}, not {ours.predict}")
    if there.timesteps != here.timesteps:
        differing.append(f"with {there.timesteps} timesteps, not {here.timesteps}")
    elif not torch.allclose(there.alpha_bar, here.alpha_bar, rtol=_SAME_ALPHA_BAR, atol=0):
        differing.append("on another noise schedule")
    if differing:
        warnings.warn(
            f"train.init_from: the weights in {folder} were trained {' and '.join(differing)}, which they have to "
            f"unlearn; as they were trained: diffusion: {_words(theirs)}",
            stacklevel=2,
        )


def _words(section: Section) -> str:
    """A section as YAML that fits into a line and into a spec; a long schedule is only hinted at."""
    fields = section.model_dump(mode="json", exclude_defaults=True)
    values = fields.get("schedule", {}).get("values", [])
    if len(values) > _SHORT:
        fields["schedule"]["values"] = [values[0], "...", values[-1]]
    return _value(fields)


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")

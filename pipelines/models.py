"""What MODEL means on the command line, and how its weights are loaded: safetensors and JSON, never unpickled.

A model is the moving average of a checkpoint's weights with the spec that they belong to, wherever it comes from: a
run's name, a checkpoint's folder, `name@champion` or `name@VERSION` of the registry.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ddpm_core import GaussianDiffusion, UNet
from pipelines.averages import MOST_ERROR, averaged
from pipelines.build import build_model, build_process
from pipelines.errors import UserError
from pipelines.fields import apply_overrides
from pipelines.interop import is_diffusers
from pipelines.mistakes import nearest
from pipelines.sections import Sample
from pipelines.spec import Spec, parse_spec
from pipelines.store import DamageError, Place, identity, sha256
from pipelines.tracking import Tracker
from pipelines.train.checkpoint import EMA
from pipelines.train.run import Run, find_run
from pipelines.unused import warn_unused, warn_without_effect, without_effect

CONFIG = "config.json"
WEIGHTS = "ema.safetensors"
FORMAT = 2
_SETTABLE = ("sample", "evaluate", "promote")
"""Sections of a model's spec that may be set anew."""

USED = {
    "sample": ("sample",),
    "evaluate": (*(f"sample.{name}" for name in Sample.model_fields if name != "n"), "evaluate"),
    "export": tuple(f"sample.{name}" for name in ("ema_length", "clip_x0", "dynamic_threshold", "spacing")),
}
"""What of these each verb depends on that takes a model."""


@dataclass(frozen=True)
class Model:
    """Weights as bytes with what they mean; cheap to send to a worker."""

    spec: Spec
    weights: bytes
    """A safetensors file."""
    dataset_digest: str
    origin: str
    average: str
    """Which average of a run's weights these are, in words; of one made after training, how well it is met."""

    @property
    def digest(self) -> str:
        """sha256 of the weights' file: its name in every record of provenance."""
        return sha256(self.weights)

    @property
    def identity(self) -> str:
        """What it draws, as a digest: the weights and all that says how they are used. Trained alike, models with
        another variance of the reverse step, say, have the same weights and draw other images.
        """
        spec = self.spec
        use = {"model": spec.model, "diffusion": spec.diffusion}
        fields = {name: section.model_dump(mode="json") for name, section in use.items()}
        size = {"image_size": spec.data.image_size, "channels": spec.data.channels}
        return identity({"weights": self.digest, **fields, **size})

    def build(self) -> tuple[GaussianDiffusion, UNet]:
        """The process and the network, in evaluation mode."""
        unet = build_model(self.spec)
        unet.load_state_dict(safetensors.torch.load(self.weights), strict=True)
        return build_process(self.spec.diffusion), unet.eval().requires_grad_(False)

    def config(self) -> dict[str, Any]:
        """What is stored beside the weights."""
        return {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "dataset_digest": self.dataset_digest,
            "model_digest": self.digest,
            "origin": self.origin,
            "average": self.average,
            "torch": torch.__version__,
        }

    @staticmethod
    def from_config(config: Mapping[str, Any], weights: bytes, where: str) -> "Model":
        """The model of a stored config and weights. DamageError where they do not belong together."""
        if config.get("format") != FORMAT:
            raise UserError(f"{where}: model format {config.get('format')}, this version reads {FORMAT}")
        said = (config[name] for name in ("dataset_digest", "origin", "average"))
        model = Model(parse_spec(config["spec"], where), weights, *said)
        if model.digest != config["model_digest"]:
            raise DamageError(f"{where}: the weights do not match the recorded sha256 {config['model_digest']}")
        return model


def of_checkpoint(run: Run, step: int, spec: Spec | None = None, most_error: float = MOST_ERROR) -> Model:
    """A moving average of a run's checkpoint: that which the spec, by default the recorded one, draws with.

    UserError where it is one of another length that is not met to within the relative error `most_error`.
    """
    spec = spec or run.spec()
    weights, average = averaged(run, step, spec, most_error)
    return Model(spec, weights, run.description()["dataset_digest"], f"{run.name}/{step}", average)


def find_model(
    text: str, store: Place, tracker: Tracker, overrides: Sequence[str] = (), verb: str = "evaluate"
) -> Model:
    """The MODEL of the command line, with fields of its recorded spec set anew: how it is sampled and evaluated, not
    what it is. UserError where there is none, or it is damaged; a warning for what is set and has no effect on `verb`,
    one of `USED`.
    """
    for override in overrides:
        if (section := override.split(".")[0]) not in _SETTABLE:
            near = nearest(section, _SETTABLE)
            hint = f"did you mean {near}?" if near else f"of a model, only {', '.join(_SETTABLE)} can be set"
            raise UserError(f"--set {override}: {hint}")
    warn_unused(overrides, USED[verb], verb)

    def changed(recorded: Spec) -> Spec:
        if not overrides:
            return recorded
        spec = parse_spec(apply_overrides(recorded.model_dump(mode="json"), overrides), text)
        warn_without_effect(spec, said=without_effect(recorded))
        return spec

    try:
        found = _find(text, store, tracker)
        if not isinstance(found, Model):
            run, step = found
            return of_checkpoint(run, step, changed(run.spec()))
    except DamageError as error:
        raise UserError(f"MODEL {text}: {error}") from error
    spec = changed(found.spec)
    if spec.sample.ema_length != found.spec.sample.ema_length:
        raise UserError("--set sample.ema_length: this model's weights are one average; name the run they come from")
    return replace(found, spec=spec)


def _find(text: str, store: Place, tracker: Tracker) -> Model | tuple[Run, int]:
    """The model, or the run and step whose averages it is to be made of."""
    if is_diffusers(text):
        from pipelines.foreign import of_diffusers

        return of_diffusers(text)
    if "@" in text and not Path(text).exists():
        from pipelines.registry.register import download

        name, _, version = text.partition("@")
        return download(name, version, tracker.existing())
    folder = Place.of(text)
    if (folder / EMA).exists():
        if not folder.name.isdigit() or not (folder.parent.parent / "run.json").exists():
            raise UserError(f"MODEL {text}: this checkpoint is not in its run's folder, whose run.json says what it is")
        return Run(folder.parent.parent), int(folder.name)
    run = Run(folder) if (folder / "run.json").exists() else find_run(text, store)
    return run, run.last_step()


def dump_config(model: Model) -> bytes:
    """`config.json` of a model."""
    return (json.dumps(model.config(), indent=2, sort_keys=True) + "\n").encode()

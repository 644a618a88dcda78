"""Models that were trained elsewhere: a folder of diffusers' pipeline as a MODEL like any other."""

import re
from pathlib import Path
from typing import Any

import safetensors.torch

from ddpm_core import NoiseSchedule
from pipelines.interop import Portable, read_diffusers
from pipelines.interop.configs import all_but_zero_terminal
from pipelines.models import Model
from pipelines.spec import Spec, parse_spec


def of_diffusers(folder: str) -> Model:
    """The model of a folder that `diffusers.DDPMPipeline` loads. UserError for what cannot be honoured."""
    found = read_diffusers(folder)
    weights = safetensors.torch.save(dict(found.weights))
    return Model(_spec_of(found, folder), weights, "", f"diffusers: {Path(folder).name}", "the weights in the folder")


def _spec_of(found: Portable, folder: str) -> Spec:
    """What the folder says, in a spec's words. What it does not say (data, training) is nobody's claim."""
    config = found.config
    model = config.to_dict()
    model["classes"] = model.pop("num_classes")
    for name in ("image_channels", "learned_variance"):
        del model[name]
    learned = found.variance == "learned_range"
    hidden = {} if config.null_class else {"label_dropout": 0.0}
    return parse_spec(
        {
            "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(folder).resolve().name).lstrip("-._")[:64] or "diffusers",
            "data": {"source": folder, "image_size": found.image_size, "channels": config.image_channels},
            "model": model,
            "diffusion": {
                "timesteps": found.schedule.timesteps,
                **_schedule_fields(found.schedule),
                "predict": found.predict,
                "variance": found.variance,
            },
            "train": {"images": 1, "loss": "hybrid" if learned else "simple", **hidden},
            "sample": {
                "sampler": "ancestral",
                "steps": found.schedule.timesteps,
                "clip_x0": found.clip_x0,
                "dynamic_threshold": found.dynamic_threshold,
                "spacing": found.spacing,
            },
        },
        folder,
    )


def _schedule_fields(schedule: NoiseSchedule) -> dict[str, Any]:
    if schedule.alpha_bar[-1] > 0:
        return {"schedule": {"kind": "betas", "values": schedule.beta.tolist()}}
    values = all_but_zero_terminal(schedule.alpha_bar).tolist()
    return {"schedule": {"kind": "alpha_bars", "values": values}, "zero_terminal": True}

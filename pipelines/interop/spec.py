"""What a folder of diffusers' pipeline says, in a spec's words."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_core import NoiseSchedule
from pipelines.interop.configs import before_rescaling
from pipelines.interop.folder import Portable
from pipelines.spec import Spec, parse_spec


def spec_of(found: Portable, folder: str) -> Spec:
    """The spec of a model read from a folder. What it does not say (data, training) is nobody's claim.

    UserError for a combination that a spec does not allow.
    """
    config = found.config
    model = config.to_dict()
    model["classes"] = model.pop("num_classes")
    unsaid = ["image_channels", "learned_variance"]  # other sections say them
    unsaid += [] if config.num_classes is not None else ["null_class"]
    unsaid += [] if config.attention or config.mid_attention else ["head_channels"]
    for name in unsaid:
        del model[name]
    train: dict[str, Any] = {"images": 1, "loss": "hybrid" if found.variance == "learned_range" else "simple"}
    if config.num_classes is not None and not config.null_class:
        train["label_dropout"] = 0.0
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
            "train": train,
            "sample": {
                "sampler": found.sampler,
                "steps": found.steps or found.schedule.timesteps,
                "eta": 0.0,
                "clip_x0": found.clip_x0,
                "dynamic_threshold": found.dynamic_threshold,
                "spacing": found.spacing,
            },
        },
        folder,
    )


def _schedule_fields(schedule: NoiseSchedule) -> dict[str, Any]:
    """By its kind where that gives the same bits, else by its numbers."""
    if schedule.alpha_bar[-1] > 0:
        for words, beta in _kinds(schedule):
            if torch.equal(beta, schedule.beta):
                return {"schedule": words}
        return {"schedule": {"kind": "betas", "values": schedule.beta.tolist()}}
    values = before_rescaling(schedule.alpha_bar).tolist()
    return {"schedule": {"kind": "alpha_bars", "values": values}, "zero_terminal": True}


def _kinds(schedule: NoiseSchedule) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What it may be called, and the betas of what is called so. Those of a line are not made as a schedule, which
    might warn of itself.
    """
    timesteps, (start, end) = schedule.timesteps, schedule.beta[[0, -1]].tolist()
    ends = {"beta_start": start, "beta_end": end}
    yield {"kind": "linear", **ends}, torch.linspace(start, end, timesteps, dtype=torch.float64)
    root = torch.linspace(math.sqrt(start), math.sqrt(end), timesteps, dtype=torch.float64)
    yield {"kind": "quadratic", **ends}, root**2
    yield {"kind": "cosine"}, NoiseSchedule.cosine(timesteps).beta

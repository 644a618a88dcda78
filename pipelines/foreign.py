"""Models that were trained elsewhere: a folder of diffusers' pipeline as a MODEL like any other."""

from pathlib import Path

import safetensors.torch

from pipelines.interop import read_diffusers, spec_of
from pipelines.models import Model


def of_diffusers(folder: str) -> Model:
    """The model of a folder that diffusers' DDPMPipeline or DDIMPipeline loads, drawn with as that one draws.

    UserError for what cannot be honoured.
    """
    found = read_diffusers(folder)
    weights = safetensors.torch.save(dict(found.weights))
    spec = spec_of(found, folder)
    return Model(spec, weights, "", f"diffusers: {Path(folder).name}", "the weights in the folder")

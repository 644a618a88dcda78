"""Where a run's first weights come from, if not from its seed: a checkpoint's average, or a model made elsewhere."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.interop import is_diffusers, read_diffusers
from pipelines.store import Place, sha256
from pipelines.train.checkpoint import EMA


def initial_weights(folder: str) -> Mapping[str, Tensor]:
    """Weights by parameter name. UserError where the folder holds none that can be read."""
    if is_diffusers(folder):
        return read_diffusers(folder).weights
    if not (Path(folder) / EMA).is_file():
        raise UserError(f"train.init_from: {folder} is neither a checkpoint nor a folder of diffusers' DDPMPipeline")
    return safetensors.torch.load(Place.of(folder).read_folder(EMA)[EMA])


def initial_digest(folder: str) -> str:
    """What a run is a function of: the weights themselves, wherever they lie."""
    return sha256(safetensors.torch.save({name: t.contiguous() for name, t in initial_weights(folder).items()}))

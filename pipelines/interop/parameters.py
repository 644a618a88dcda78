"""The network's parameters under our names and under those of diffusers' UNet2DModel: one to one."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ddpm_core import UNet, UNetConfig
from pipelines.errors import UserError

WEIGHTS, PICKLE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"

_WORDS = {
    "down": "down_blocks",
    "middle": "mid_block",
    "up": "up_blocks",
    "blocks": "resnets",
    "time": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "time_linear1": "time_embedding.linear_1",
    "time_linear2": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
}
# An attention's, as the published DDPM checkpoints have them and diffusers still reads them.
_OLD_WORDS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def parameter_names(config: UNetConfig) -> list[tuple[str, str]]:
    """(name in our UNet, name in diffusers' UNet2DModel) of every parameter of a network."""
    return [(name, _theirs(name)) for name in _shapes(config)]


def dump_weights(config: UNetConfig, weights: Mapping[str, Tensor]) -> bytes:
    """Our weights as diffusers' safetensors file."""
    named = {theirs: weights[ours].contiguous() for ours, theirs in parameter_names(config)}
    return safetensors.torch.save(named, metadata={"format": "pt"})


def read_weights(folder: Path, config: UNetConfig) -> dict[str, Tensor]:
    """diffusers' safetensors file in a folder as our weights, float32.

    UserError where there is none, or a pickle only, and where it does not hold the network of the config.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise UserError(
                f"{folder / PICKLE}: a pickle can run its author's code and is not read; convert it where you trust "
                "it, with diffusers: DDPMPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise UserError(f"{path}: there is no such file, and the weights are read from no other")
    try:
        stored = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    given = {_translated(name, _OLD_WORDS): value for name, value in stored.items()}
    shapes = _shapes(config)
    names = {theirs: ours for ours, theirs in parameter_names(config)}
    if odd := sorted(given.keys() ^ names.keys()):
        problem = "is there, but not in the network of its config" if odd[0] in given else "is missing"
        raise UserError(f"{path}: the tensor {odd[0]} {problem}")
    for theirs, value in given.items():
        if value.shape != shapes[names[theirs]] or not value.is_floating_point():
            raise UserError(
                f"{path}: the tensor {theirs} is {value.dtype} {list(value.shape)}, but the network of its config has "
                f"floating-point {list(shapes[names[theirs]])} there"
            )
    return {names[theirs]: value.to(torch.float32) for theirs, value in given.items()}


def _shapes(config: UNetConfig) -> dict[str, torch.Size]:
    """The parameters of a network under our names."""
    with torch.device("meta"):
        return {name: value.shape for name, value in UNet(config, seed=None).state_dict().items()}


def _theirs(name: str) -> str:
    resample = "downsamplers.0" if name.startswith("down.") else "upsamplers.0"
    return _translated(name, {**_WORDS, "resample": resample})


def _translated(name: str, words: Mapping[str, str]) -> str:
    return ".".join(words.get(word, word) for word in name.split("."))

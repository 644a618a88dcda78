"""The network's parameters under our names and under those of diffusers' UNet2DModel: one to one."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ddpm_core import UNet, UNetConfig
from pipelines.errors import UserError
from pipelines.interop.configs import read_json

WEIGHTS, PICKLE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
SHARDS = f"{WEIGHTS}.index.json"
"""Beside weights in several files, in place of the one: which tensor is in which."""

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
    return [(name, _theirs(name)) for name in parameter_shapes(config)]


def dump_weights(config: UNetConfig, weights: Mapping[str, Tensor]) -> bytes:
    """Our weights as diffusers' safetensors file."""
    named = {theirs: weights[ours].contiguous() for ours, theirs in parameter_names(config)}
    return safetensors.torch.save(named, metadata={"format": "pt"})


def read_weights(folder: Path, config: UNetConfig) -> dict[str, Tensor]:
    """diffusers' safetensors in a folder, one file or shards with their index, as our weights, float32.

    UserError where there are none, or a pickle only, and where they are not those of the network of the config.
    """
    path, stored = _stored(folder)
    given: dict[str, Tensor] = {}
    for name, value in stored.items():
        theirs = _translated(name, _OLD_WORDS)
        if theirs in given:
            raise UserError(f"{path}: the tensor {theirs} is there twice, under an old name and under the present one")
        given[theirs] = value
    shapes = parameter_shapes(config)
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


def _stored(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors under diffusers' names, and the file that says which there are."""
    path, shards = folder / WEIGHTS, folder / SHARDS
    if shards.is_file():  # where there are both, diffusers too takes the shards
        return shards, _sharded(shards)
    if path.is_file():
        return path, _tensors(path)
    if (folder / PICKLE).is_file():
        raise UserError(
            f"{folder / PICKLE}: a pickle can run its author's code and is not read; convert it where you trust "
            "it, with diffusers: DDPMPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{path}: there is no such file, nor {SHARDS}, and the weights are read from no other")


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of the shards that an index names: files beside it, each with just the tensors that it says."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{index}: weight_map: must say in which file each tensor is")
    found: dict[str, Tensor] = {}
    for file in sorted(set(placed.values())):
        if not file.endswith(".safetensors") or file != Path(file).name:
            raise UserError(f"{index}: weight_map: {file!r} is no safetensors file beside the index")
        tensors = _tensors(index.with_name(file))
        if odd := sorted(tensors.keys() ^ {name for name, other in placed.items() if other == file}):
            problem = "is missing" if odd[0] in placed and odd[0] not in tensors else "is there, but not by the index"
            raise UserError(f"{index.with_name(file)}: the tensor {odd[0]} {problem}")
        found |= tensors
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def parameter_shapes(config: UNetConfig) -> dict[str, torch.Size]:
    """The shape of every parameter of a network, under our names."""
    with torch.device("meta"):
        return {name: value.shape for name, value in UNet(config, seed=None).state_dict().items()}


def _theirs(name: str) -> str:
    resample = "downsamplers.0" if name.startswith("down.") else "upsamplers.0"
    return _translated(name, {**_WORDS, "resample": resample})


def _translated(name: str, words: Mapping[str, str]) -> str:
    return ".".join(words.get(word, word) for word in name.split("."))

"""Networks that diffusers made give the same outputs here, whatever their conventions."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_core import NoiseSchedule, UNetConfig
from pipelines.interop import parameter_names, read_diffusers, write_diffusers
from tests.interop.interop_helpers import (
    CIFAR10,
    DIGITS,
    FASHION,
    LARGE,
    NARROW,
    SCHEDULER,
    SMALL,
    assert_equal_outputs,
    portable,
    saved,
    theirs,
)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (DIGITS, 8),
        (FASHION | {"attention_head_dim": None}, 28),
        (FASHION | {"attention_head_dim": 8}, 28),
        (FASHION | {"out_channels": 2, "dropout": 0.1}, 28),  # heads of 8 are diffusers' default
        (FASHION | {"attention_head_dim": None, "freq_shift": 1, "norm_num_groups": 16}, 28),
        (CIFAR10 | NARROW, 32),
        (CIFAR10, 32),
        (LARGE | {"block_out_channels": [32, 32, 64, 64, 128, 128]}, 64),
    ],
    ids=["digits", "one-head", "heads-of-8", "learned-variance", "mixed", "cifar10-narrow", "cifar10", "256-narrow"],
)
def test_a_network_of_diffusers_gives_its_outputs_here(config: dict[str, Any], size: int, tmp_path: Path) -> None:
    unet = theirs(**config)
    variance = "learned_range" if config["out_channels"] == 2 else "fixed_large"
    read = read_diffusers(saved(tmp_path, unet, DDPMScheduler(variance_type=variance)))
    assert_equal_outputs(read.network(), unet, size)
    names = [theirs for _, theirs in parameter_names(read.config)]
    assert sorted(names) == sorted(unet.state_dict())
    assert read.image_size == config["sample_size"]
    assert read.variance == ("learned_range" if config["out_channels"] == 2 else "large")


def test_a_published_folder_is_read_flat_and_under_old_attention_names(tmp_path: Path) -> None:
    unet = theirs(**CIFAR10 | NARROW)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = unet.state_dict()
    for new, before in old.items():
        tensors = {name.replace(f".{new}.", f".{before}."): value for name, value in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1", "unet": ["diffusers", "UNet2DModel"]}
    config = CIFAR10 | NARROW | {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    scheduler = SCHEDULER | {"_class_name": "DDPMScheduler", "clip_sample": True, "trained_betas": None}
    scheduler |= {"variance_type": "fixed_large", "timestep_values": None, "tensor_format": "pt"}
    for name, fields in (
        ("model_index.json", index),
        ("config.json", config),
        ("scheduler_config.json", scheduler),
    ):
        (tmp_path / name).write_text(json.dumps(fields))

    read = read_diffusers(tmp_path)
    assert_equal_outputs(read.network(), unet, 32)
    assert (read.predict, read.variance, read.clip_x0, read.image_size) == ("eps", "large", True, 32)
    assert torch.equal(read.schedule.alpha_bar, NoiseSchedule.linear().alpha_bar)


def test_class_labels_are_those_of_diffusers(tmp_path: Path) -> None:
    unet = theirs(**DIGITS, num_class_embeds=4)
    read = read_diffusers(saved(tmp_path / "theirs", unet))
    assert (read.config.num_classes, read.config.null_class) == (4, False)
    assert_equal_outputs(read.network(), unet, 8, torch.tensor([0, 3, 1]))

    given = portable(UNetConfig(**(SMALL.to_dict() | {"num_classes": 3})))
    write_diffusers(given, tmp_path / "ours")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "ours").unet
    assert_equal_outputs(given.network(), loaded, 8, torch.tensor([0, 3, 1]))
    assert read_diffusers(tmp_path / "ours").config == given.config

"""Class-conditional networks as the two-argument networks that losses and samplers know, with guidance or without."""

import torch
from torch import Tensor

from ddpm_core.diffusion import Network
from ddpm_core.unet import UNet


def conditioned(model: UNet, labels: Tensor, guidance: float = 1.0, channels: int | None = None) -> Network:
    """model(x_t, timestep) of a class-conditional U-Net, for the labels int64 [N] of the images it will be given.

    guidance w steers towards the class: unconditional + w (conditional - unconditional), the null class standing
    for "unconditional" (Ho and Salimans 2022, "Classifier-free diffusion guidance", eq. 6 with w one more than
    there). 1 is the class-conditional model itself, in one pass; any other takes a pass of twice the batch. Only the
    first `channels` of the output are steered (by default all): those of a learned variance stay the conditional
    ones. ValueError for a network without classes, without a null class where one is needed, or a guidance below 0.
    """
    classes = model.config.num_classes
    if classes is None:
        raise ValueError("labels were given, but the network has no classes")
    if not guidance >= 0:
        raise ValueError(f"guidance must be 0 or more, not {guidance}")
    if guidance != 1 and not model.config.null_class:
        raise ValueError("guidance needs a network with a null class")

    def one_pass(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model(x_t, timestep, labels)

    def two_passes(x_t: Tensor, timestep: Tensor) -> Tensor:
        both = torch.cat((labels, torch.full_like(labels, classes)))
        output = model(torch.cat((x_t, x_t)), torch.cat((timestep, timestep)), both)
        with_class, without = output.chunk(2)
        steered = without + guidance * (with_class - without)
        return steered if channels is None else torch.cat((steered[:, :channels], with_class[:, channels:]), dim=1)

    return one_pass if guidance == 1 else two_passes


def dropped(labels: Tensor, uniforms: Tensor, share: float, null: int) -> Tensor:
    """The labels [N] with a share of them made the null class, those whose uniform [N] lies below it: a network
    trained so is conditional and unconditional in one (Ho and Salimans 2022, algorithm 1).
    """
    return torch.where(uniforms.to(labels.device) < share, null, labels)

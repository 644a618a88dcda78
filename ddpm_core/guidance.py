"""Class-conditional networks as the two-argument networks that losses and samplers know, with guidance or without."""

import math

import torch
from torch import Tensor, nn

from ddpm_core.unet import UNet


class Conditioned(nn.Module):
    """model(x_t, timestep) of a class-conditional U-Net, for the labels int64 [N] of the images it will be given.

    guidance w steers towards the class: unconditional + w (conditional - unconditional), the null class standing
    for "unconditional" (Ho and Salimans 2022, "Classifier-free diffusion guidance", eq. 6 with w one more than
    there). 1 is the class-conditional model itself and 0 the unconditional one, in one pass; any other takes a pass of
    twice the batch. Only the first `channels` of the output are steered (by default all): those of a learned variance
    stay the conditional ones, but for 0, which has no class in it at all. ValueError for a network without classes,
    without a null class where one is needed, or a guidance below 0.
    """

    _labels: Tensor
    _null: Tensor

    def __init__(self, model: UNet, labels: Tensor, guidance: float = 1.0, channels: int | None = None) -> None:
        super().__init__()
        classes = model.config.num_classes
        if classes is None:
            raise ValueError("labels were given, but the network has no classes")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance must be 0 or more, and finite, not {guidance}")
        if guidance != 1 and not model.config.null_class:
            raise ValueError("guidance needs a network with a null class")
        self.model = model
        self.register_buffer("_labels", labels, persistent=False)
        self.register_buffer("_null", torch.full_like(labels, classes), persistent=False)
        self._guidance = guidance
        self._channels = channels

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The network's answer for the labels; arguments as those of a network without."""
        timestep = timestep.expand(len(x_t))
        if self._guidance in (0, 1):
            return self.model(x_t, timestep, self._labels if self._guidance else self._null)
        both = torch.cat((self._labels, self._null))
        output = self.model(torch.cat((x_t, x_t)), torch.cat((timestep, timestep)), both)
        with_class, without = output.chunk(2)
        steered = without + self._guidance * (with_class - without)
        if self._channels is None:
            return steered
        return torch.cat((steered[:, : self._channels], with_class[:, self._channels :]), dim=1)


def dropped(labels: Tensor, uniforms: Tensor, share: float, null: int) -> Tensor:
    """The labels [N] with a share of them made the null class, those whose uniform [N] lies below it: a network
    trained so is conditional and unconditional in one (Ho and Salimans 2022, algorithm 1). ValueError for a share
    outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of labels to drop must lie in 0..1, not {share}")
    return torch.where(uniforms.to(labels.device) < share, null, labels)

"""Between pixels, uint8 NHWC in 0..255, and what the model sees, float NCHW in [-1, 1]."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_model(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W], x / 127.5 - 1, contiguous; the same layout for the same shape."""
    # An axis of length 1 may have any stride, by which convolutions choose their kernel, and so the last bits.
    _, height, width, channels = images.shape
    plain = (height * width * channels, width * channels, channels, 1)
    if images.strides != plain or not images.flags.writeable:  # which torch does not take
        images = images.copy()
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]: clamp, scale to 0..255, round half to even.

    The inverse of `to_model`. Raises ValueError for NaN, which has no pixel.
    """
    if torch.isnan(images).any():
        raise ValueError("the images hold NaN: the model or its sampler diverged")
    scaled = images.detach().float().clamp(-1.0, 1.0).add(1.0).mul_(127.5).round_().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()

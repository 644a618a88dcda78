"""Changes to training images that leave them what they are, keyed by (seed, step, slot) as all that is random."""

import torch
from torch import Tensor

from ddpm_core import noise
from pipelines.sections import Data


def augment(images: Tensor, data: Data, seed: int, step: int, slot: int) -> Tensor:
    """Images [N, C, H, W] of a slot, mirrored and moved as the spec says."""
    n = len(images)
    if data.flip:
        mirrored = noise.bits([noise.key(seed, "flip", step, slot)], n)[0] >> 31 == 1
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if data.shift:
        moves = noise.integers([noise.key(seed, "shift", step, slot)], 2 * n, -data.shift, data.shift)[0]
        images = shifted(images, *moves.view(n, 2).unbind(1))
    return images


def shifted(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images [N, C, H, W] moved by whole pixels [N] down and to the right; the edge that was left is repeated."""
    n, channels, height, width = images.shape
    rows = (torch.arange(height) - down[:, None]).clamp_(0, height - 1)  # [N, H]
    columns = (torch.arange(width) - right[:, None]).clamp_(0, width - 1)  # [N, W]
    images = images.gather(2, rows[:, None, :, None].expand(n, channels, height, width))
    return images.gather(3, columns[:, None, None, :].expand(n, channels, height, width))

"""Exponential moving averages of the weights, on the clock of images seen."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_decay(images_seen: int, batch: int, half_life: float, ramp_up: float | None = 0.05) -> float:
    """The factor that the average so far keeps in one update.

    images_seen: the clock after this batch, that is with its images counted. half_life: images after which a
    weight's share has halved. ramp_up: the half-life is at most this part of images_seen, so that a short run does
    not keep its initial noise; None for none (Karras et al. 2022, "Elucidating the design space of diffusion-based
    generative models", appendix F.2: half-life in images, ramp-up 0.05).
    """
    if half_life < 0 or batch < 1 or images_seen < batch:
        raise ValueError(
            "half_life >= 0 and images_seen >= batch >= 1 are needed, "
            f"not half_life {half_life}, images_seen {images_seen}, batch {batch}"
        )
    if ramp_up is not None:
        half_life = min(half_life, ramp_up * images_seen)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


class Ema:
    """One average of a flat list of float32 tensors, updated in place.

    Its whole state is `tensors` (in the order given); the clock belongs to the caller. To resume, copy into them.
    """

    def __init__(self, values: Sequence[Tensor], half_life: float, ramp_up: float | None = 0.05) -> None:
        """Starts as a copy of `values`; half_life and ramp_up as in `ema_decay`."""
        ema_decay(1, 1, half_life, ramp_up)  # refuse a bad half-life now, not at the first update
        if any(value.dtype != torch.float32 for value in values):
            raise ValueError("an average is kept in float32: give it the float32 master weights")
        self.half_life = half_life
        self.ramp_up = ramp_up
        self.tensors = [value.detach().clone() for value in values]

    @torch.no_grad()
    def update(self, values: Sequence[Tensor], images_seen: int, batch: int) -> None:
        """average = decay average + (1 - decay) values, after the optimizer step that saw `batch` more images."""
        weight = 1 - ema_decay(images_seen, batch, self.half_life, self.ramp_up)
        for average, value in zip(self.tensors, values, strict=True):
            average.lerp_(value.detach(), weight)

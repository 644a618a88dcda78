"""What one slot of a step computes: its draws, keyed by (seed, step, slot) and by nothing else, and its losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_core import noise, timesteps
from ddpm_core.guidance import dropped
from pipelines.build import build_loss, build_process
from pipelines.data.pixels import to_model
from pipelines.spec import Spec
from pipelines.train.augment import augment

QUARTILES = 4
"""Parts of the log-SNR's range, as many timesteps in each, for which the journal has losses of their own."""

Drawn = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What the network sees of a slot: x0 [N, C, H, W], timesteps [N], noise [N, C, H, W], labels [N]."""


class SlotLosses:
    """The loss of a spec's slots, wherever they are computed."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self.process = build_process(spec.diffusion)
        self._loss = build_loss(spec.train)
        self._in_bfloat16 = spec.train.precision == "bfloat16"
        even = spec.train.timesteps == "uniform"
        self._density = None if even else timesteps.vlb_density(self.process)
        self._boundaries = _log_snr_quartiles(self.process.schedule.log_snr)

    def draw(self, step: int, slot: int, images: Any, labels: Any) -> Drawn:
        """What the network sees of a slot, of its images (uint8 [N, H, W, C]) and labels. Dropout is seeded, too."""
        seed = self._spec.seed
        x0 = augment(to_model(images), self._spec.data, seed, step, slot)
        t = self._timesteps(step, slot, len(images))
        eps = noise.normal([noise.key(seed, "eps", step, slot)], x0.shape)[0]
        if self._spec.model.dropout:
            torch.manual_seed(noise.key(seed, "dropout", step, slot) >> 1)
        return x0.to(self._device), t, eps.to(self._device), self._labels(step, slot, labels)

    def _timesteps(self, step: int, slot: int, n: int) -> Tensor:
        keys = [noise.key(self._spec.seed, "timestep", step, slot)]
        if self._density is None:
            return noise.integers(keys, n, 1, self.process.timesteps)[0]
        return timesteps.draw(self._density, noise.uniform(keys, n)[0])

    def _labels(self, step: int, slot: int, labels: Any) -> Tensor | None:
        """The labels that the network is shown, some of them hidden; None for a model without classes."""
        if (classes := self._spec.model.classes) is None:
            return None
        keys = [noise.key(self._spec.seed, "label", step, slot)]
        uniforms = noise.uniform(keys, len(labels))[0]
        shown = dropped(torch.as_tensor(labels, dtype=torch.int64), uniforms, self._spec.train.label_dropout, classes)
        return shown.to(self._device)

    def losses(self, network: Callable[..., Any], drawn: Drawn) -> Tensor:
        """Of each image: float [N]."""
        x0, t, eps, labels = drawn

        def shown(x_t: Tensor, timestep: Tensor) -> Any:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._in_bfloat16):
                return network(x_t, timestep) if labels is None else network(x_t, timestep, labels)

        return self._loss(self.process, shown, x0, t, eps)

    def backward(self, network: Callable[..., Any], drawn: Drawn) -> Tensor:
        """Forward and backward; the slot's statistics, float64 [1 + 2 * QUARTILES] on the CPU: loss, then by quartile
        of the log-SNR the sums of losses and of what they count, so that the means are those over timesteps alike.
        """
        losses, t = self.losses(network, drawn), drawn[1]
        weights = torch.ones(len(losses), dtype=torch.float64)
        if self._density is not None:
            weights = timesteps.importance(self._density, t)
            losses = losses * weights.to(losses)
        losses.mean().backward()
        counted = losses.detach().double().cpu()
        quartile = torch.bucketize(self.process.schedule.log_snr[t - 1], self._boundaries)
        sums = torch.zeros(2, QUARTILES, dtype=torch.float64)
        sums[0].index_add_(0, quartile, counted)
        sums[1].index_add_(0, quartile, weights)
        return torch.cat((counted.mean()[None], sums.flatten()))


def _log_snr_quartiles(log_snr: Tensor) -> Tensor:
    """The three values that cut the schedule's timesteps into quarters by log-SNR, rising."""
    return torch.quantile(log_snr, torch.tensor([0.25, 0.5, 0.75], dtype=log_snr.dtype))

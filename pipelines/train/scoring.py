"""Scores the moving average on held-out images, in units of work that any number of processes may share.

Each unit has a fixed part of the images or of the grid, so that its numbers do not depend on who computes it; the
score is put together of all units in their order.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core import bits_per_dim_estimate, noise, sample
from ddpm_core.checks import NotFiniteError
from ddpm_core.guidance import Conditioned
from ddpm_core.likelihood import mean_interval
from pipelines import report
from pipelines.build import build_model, build_process
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_model, to_pixels
from pipelines.data.reader import Reader
from pipelines.drawing import labels_of
from pipelines.evaluate.chance import choose_images
from pipelines.spec import Spec
from pipelines.train.scores import HeldOutScore, settings

_PART = 16
"""Images of one unit."""

Figures = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Unit:
    kind: str
    indices: range


class Scoring:
    """Of a run's average, on a device; the held-out images are read once. The spec must ask for scores."""

    def __init__(self, spec: Spec, dataset: Dataset, device: torch.device) -> None:
        assert spec.train.score is not None
        self._spec, self._score, self._device = spec, spec.train.score, device
        self._process = build_process(spec.diffusion)
        split = dataset.split("held-out")
        chosen = choose_images(len(split), self._score.images, spec.seed)
        sizes = np.array(split.shard_sizes, dtype=np.int64)
        ends = np.cumsum(sizes)
        shards = np.searchsorted(ends, chosen, side="right")
        images, labels = Reader(split, on_error=spec.data.on_error).read(shards, chosen - (ends - sizes)[shards])
        self._images = to_model(images)
        self._labels = torch.as_tensor(labels.astype(np.int64))
        self._timesteps = min(self._score.timesteps, self._process.timesteps)
        self._units = [
            *(_Unit("scores", part) for part in _parts(len(self._images))),
            *(_Unit("grid", part) for part in _parts(self._score.grid)),
        ]
        self._unet = build_model(spec).to(device).eval().requires_grad_(False)

    def work(self, weights: Mapping[str, Tensor], rank: int = 0, ranks: int = 1) -> dict[int, Figures]:
        """The units of one of so many processes, by number. weights: the average, by parameter name."""
        self._unet.load_state_dict(weights, strict=True)
        mine = range(rank, len(self._units), ranks)
        with torch.no_grad():
            return {number: self._compute(self._units[number]) for number in mine}

    def score(self, done: Sequence[Mapping[int, Figures]], step: int, began: float) -> tuple[HeldOutScore, bytes]:
        """What the units of all processes come to, and the grid as a PNG."""
        units = {number: figures for part in done for number, figures in part.items()}
        ordered = [units[number] for number in range(len(self._units))]
        bits = torch.cat([figures["bits"] for figures in ordered if "bits" in figures])
        errors = torch.cat([figures["errors"] for figures in ordered if "errors" in figures]).mean(0)
        drawn = np.concatenate([figures["pixels"].numpy() for figures in ordered if "pixels" in figures])
        found: tuple[float | None, float | None, float | None] = (None, None, None)
        with contextlib.suppress(NotFiniteError):
            interval = mean_interval(bits)
            found = (interval.mean, interval.low, interval.high)
        score = HeldOutScore(
            step=step,
            images=step * self._spec.train.global_batch,
            bits_per_dim=found[0],
            low=found[1],
            high=found[2],
            error=tuple(error if math.isfinite(error) else None for error in errors.tolist()),
            log_snr=tuple(self._bounds()),
            scored=len(self._images),
            asked=settings(self._spec.train),
            seconds=time.perf_counter() - began,
            time_ms=time.time_ns() // 1_000_000,
        )
        return score, report.grid(drawn, columns=math.ceil(math.sqrt(len(drawn))))

    def _compute(self, unit: _Unit) -> Figures:
        if unit.kind == "grid":
            return {"pixels": torch.from_numpy(self._draw(unit.indices))}
        part = slice(unit.indices.start, unit.indices.stop)
        x0, labels = self._images[part].to(self._device), self._labels[part].to(self._device)
        network: nn.Module = self._unet if self._unet.config.num_classes is None else Conditioned(self._unet, labels)
        bits = bits_per_dim_estimate(self._process, network, x0, self._spec.seed, max(2, self._timesteps))
        errors = [self._errors(network, x0, unit.indices, k) for k in range(self._timesteps)]
        return {"bits": bits.cpu(), "errors": torch.stack(errors, dim=1).cpu()}

    def _errors(self, network: nn.Module, x0: Tensor, indices: range, k: int) -> Tensor:
        """Squared error of the noise that is predicted at one timestep of bin k for each image: float64 [N]."""
        first, last = self._edges()[k], self._edges()[k + 1]
        keys = [noise.key(self._spec.seed, "score", k, index) for index in indices]
        t = torch.cat([noise.integers([key], 1, first + 1, last)[0] for key in keys])
        eps = noise.normal(keys, x0.shape[1:], 1, device=self._device)
        x_t = self._process.q_sample(x0, t, eps)
        predicted = self._process.predict_x0(x_t, t, self._process.call(network, x_t, t))
        signal, noise_rate = (self._process.at(name, t, like=x_t) for name in ("signal_rate", "noise_rate"))
        guessed = (x_t.double() - signal.double() * predicted.double()) / noise_rate.double()
        return (guessed - eps.double()).square().flatten(1).mean(1)

    def _edges(self) -> list[int]:
        """Of the bins: bin k has the timesteps edges[k] + 1 .. edges[k + 1]; the first is the data's end."""
        bins, timesteps = self._timesteps, self._process.timesteps
        return [timesteps * k // bins for k in range(bins + 1)]

    def _bounds(self) -> list[float | None]:
        bounds = self._process.schedule.log_snr[[max(edge - 1, 0) for edge in self._edges()]].tolist()
        return [bound if math.isfinite(bound) else None for bound in bounds]

    def _draw(self, indices: range) -> np.ndarray:
        size = self._spec.data.image_size
        try:
            drawn = sample(
                self._process,
                self._unet,
                shape=(self._unet.config.image_channels, size, size),
                seeds=[noise.key(self._spec.seed, "grid", index) for index in indices],
                sampler="ddim",
                steps=min(self._score.grid_steps, self._process.timesteps),
                labels=labels_of(self._unet.config.num_classes, indices),
            )
        except NotFiniteError:  # a picture of nothing, and the score says why
            drawn = torch.zeros(len(indices), self._unet.config.image_channels, size, size)
        return to_pixels(drawn.cpu())


def _parts(n: int) -> list[range]:
    return [range(start, min(start + _PART, n)) for start in range(0, n, _PART)]


def scoring_calls(spec: Spec) -> int:
    """Images that the network sees for a score."""
    score, timesteps = spec.train.score, spec.diffusion.timesteps
    assert score is not None
    return score.images * 2 * min(score.timesteps, timesteps) + score.grid * min(score.grid_steps, timesteps)

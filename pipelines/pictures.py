"""The pictures of a run: what it draws and how near that comes to training images, how it gets there, its schedule, its
loss."""

import numpy as np
import torch

from ddpm_core import noise
from pipelines import report
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_model, to_pixels
from pipelines.data.reader import Reader
from pipelines.drawing import Settings, draw
from pipelines.evaluate.answers import PAIRS
from pipelines.models import Model
from pipelines.sample import Samples, read_samples
from pipelines.spec import Spec
from pipelines.store import sha256
from pipelines.train.end import last_step
from pipelines.train.run import Run

GRID, TRAJECTORY, SCHEDULE, LOSS = "grid.png", "trajectory.png", "schedule.png", "loss.png"
PICTURES = (GRID, TRAJECTORY, SCHEDULE, LOSS, PAIRS)
_GRID_IMAGES = 64
_FRAMES = 9


def draw_pictures(
    spec: Spec, dataset: Dataset, model: Model, training: Run, samples: Samples, pairs: bytes
) -> dict[str, str]:
    """Write every picture of a finished run into its folder; the sha256 of each. `pairs` is its evaluation's."""
    process, _ = model.build()
    rows = [
        row for row in training.journal.read(last_step(training, spec.train)) if "loss" in row.exact
    ]  # else it is not finite
    pictures = {
        GRID: _grid(samples),
        TRAJECTORY: _trajectory(spec, dataset, model),
        SCHEDULE: report.schedule_curves(process.schedule),
        LOSS: report.loss_curve([row.images for row in rows], [row.exact["loss"] for row in rows]),
        PAIRS: pairs,
    }
    for name, picture in pictures.items():
        (training.place / name).write(picture)
    return {name: sha256(picture) for name, picture in pictures.items()}


def _grid(samples: Samples) -> bytes:
    shown = np.concatenate(list(read_samples(samples, min(samples.n, _GRID_IMAGES))))
    return report.grid(shown, columns=int(np.ceil(np.sqrt(len(shown)))))


def _trajectory(spec: Spec, dataset: Dataset, model: Model) -> bytes:
    """One held-out image on its way to noise, and noise on its way to the first sample."""
    process, unet = model.build()
    image = to_model(Reader(dataset.split("held-out")).read(np.array([0]), np.array([0]))[0])
    eps = noise.normal([noise.key(spec.seed, "trajectory")], image.shape[1:])
    # Closer together towards the data, where most of what the eye sees comes and goes.
    steps = np.linspace(0, 1, _FRAMES) ** 2
    forward_t = (steps * process.schedule.timesteps).round().astype(int).tolist()
    forward = [image if t == 0 else process.q_sample(image, torch.tensor([t]), eps) for t in forward_t]

    seen: list[tuple[int, torch.Tensor]] = []
    final = draw(
        process,
        unet,
        spec.data.image_size,
        Settings.of(spec.sample, class_counts=dataset.class_counts),
        indices=[0],
        callback=lambda index, t, x_t, x0: seen.append((t, x_t.clone())),
    )
    seen.append((0, final))
    chosen = [seen[i] for i in ((1 - steps[::-1]) * (len(seen) - 1)).round().astype(int)]
    return report.trajectory(
        to_pixels(torch.cat(forward)), forward_t, to_pixels(torch.cat([x for _, x in chosen])), [t for t, _ in chosen]
    )

"""Pictures, as PNG bytes: grids of images, trajectories, a schedule's curves, a loss curve."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_core import NoiseSchedule

Pixels = NDArray[np.uint8]

_CELL = 64
"""Side that small images are enlarged to, pixels."""
_GUTTER = 4
_BLUE, _ORANGE, _GREEN, _GREY = "#2f5d8a", "#d9822b", "#4f8a5b", "#9aa5b1"


def grid(images: Pixels, columns: int) -> bytes:
    """Images uint8 [N, H, W, C] in rows of `columns`.

    Small ones are enlarged to some 64 pixels a side by bicubic interpolation: eight bare squares a side are not read
    at a glance. The bare pixels are in the shards.
    """
    n, height, width, channels = images.shape
    if n < 1 or columns < 1:
        raise ValueError(f"a grid needs an image and a column, not {n} and {columns}")
    scale = max(1, _CELL // max(height, width))
    cell = (width * scale, height * scale)
    size = (columns * (cell[0] + _GUTTER) + _GUTTER, -(-n // columns) * (cell[1] + _GUTTER) + _GUTTER)
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    for i, image in enumerate(images):
        picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        left, top = _GUTTER + i % columns * (cell[0] + _GUTTER), _GUTTER + i // columns * (cell[1] + _GUTTER)
        canvas.paste(picture.resize(cell, Image.Resampling.BICUBIC), (left, top))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def trajectory(forward: Pixels, forward_t: Sequence[int], reverse: Pixels, reverse_t: Sequence[int]) -> bytes:
    """Two strips of images uint8 [K, H, W, C]: data to noise, and noise to data, each frame under its timestep."""
    columns = max(len(forward), len(reverse))
    figure = _figure(0.9 * columns + 0.2, 3.1)
    strips = (("data to noise: q(x_t | x_0)", forward, forward_t), ("noise to data: the sampler", reverse, reverse_t))
    for row, (title, frames, timesteps) in enumerate(strips):
        for column, (frame, t) in enumerate(zip(frames, timesteps, strict=True)):
            axes = figure.add_subplot(2, columns, row * columns + column + 1)
            axes.imshow(frame.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(f"t = {t}", fontsize=7, color="#444444", pad=3)
            axes.set_axis_off()
        figure.text(0.012, 0.965 - 0.49 * row, title, fontsize=9, va="top")
    figure.subplots_adjust(left=0.012, right=0.988, top=0.84, bottom=0.02, wspace=0.08, hspace=0.55)
    return _png(figure)


def schedule_curves(schedule: NoiseSchedule) -> bytes:
    """Signal rate and noise rate, and the log signal-to-noise ratio, over the timesteps."""
    t = np.arange(1, schedule.timesteps + 1)
    figure = _figure(8.4, 3.2)
    rates, ratio = figure.subplots(1, 2)
    rates.plot(t, schedule.signal_rate.numpy(), color=_BLUE, label="signal rate")
    rates.plot(t, schedule.noise_rate.numpy(), color=_ORANGE, label="noise rate")
    rates.set_ylim(-0.02, 1.05)
    rates.legend(frameon=False, fontsize=8, loc="center right")
    ratio.plot(t, schedule.log_snr.numpy(), color=_GREEN)
    ratio.axhline(0, color=_GREY, linewidth=0.6)
    for axes, title in ((rates, "what x_t is made of"), (ratio, "log SNR (natural log)")):
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("timestep t", fontsize=8)
        _plain(axes)
    figure.tight_layout()
    return _png(figure)


def loss_curve(images: Sequence[int], losses: Sequence[float]) -> bytes:
    """The loss of every step over images seen, with its running mean; the loss axis is logarithmic."""
    figure = _figure(7.2, 3.4)
    axes = figure.subplots()
    axes.plot(images, losses, color=_GREY, linewidth=0.5, alpha=0.6, label="every step")
    window = max(1, len(losses) // 50)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(images[window - 1 :], smooth, color=_BLUE, linewidth=1.6, label=f"mean of {window} steps")
        axes.legend(frameon=False, fontsize=8)
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set_title("training loss", fontsize=9, loc="left")
    axes.set_xlabel("images seen", fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain(axes)
    figure.tight_layout()
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    """A figure of its own, off pyplot's global list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=7, colors="#444444", which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    # No software version and no date in it: the same picture is the same bytes.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()

"""The pictures of a run, as PNG bytes: samples, a trajectory, the schedule, the loss.

Each is a pure function of its arguments, drawn with matplotlib's object interface (imported when first needed):
no global state is read or left, so that workers and a caller's own figures do not disturb each other.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_core import NoiseSchedule

Pixels = NDArray[np.uint8]

INK, SOFT, FAINT = "#22303c", "#6b7885", "#e3e7eb"
BLUE, ORANGE = "#2a6fb0", "#d9742b"
COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8d5fb0", "#b03a5b", "#7a6a3a")
DPI = 180

_CELL = 56
"""Pixels that `grid` gives the shorter side of an image, unless told."""
_GUTTER = 4
_PAPER = 88
"""Grey of the gutters: neither black nor white, so that strokes at the edge of an image end where it does."""
_LOG_ABOVE = 4.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""
_SMOOTH = 0.05
"""Part of the points that a smoothed loss is the mean of."""


def grid(images: Pixels, columns: int | None = None, scale: int | None = None) -> bytes:
    """Images uint8 [N, H, W, C] in rows of `columns` (by default about square), each pixel `scale` pixels wide.

    Cell (row, column) begins `_GUTTER` + index * (side * scale + `_GUTTER`) pixels from the top and the left;
    `scale` is by default such that an image's shorter side has about 56 pixels. ValueError for no images.
    """
    n, height, width, channels = _checked(images)
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    scale = scale or max(1, round(_CELL / min(height, width)))
    rows = -(-n // columns)
    step_y, step_x = height * scale + _GUTTER, width * scale + _GUTTER
    sheet = np.full((_GUTTER + rows * step_y, _GUTTER + columns * step_x, channels), _PAPER, dtype=np.uint8)
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for index, image in enumerate(large):
        top, left = _GUTTER + index // columns * step_y, _GUTTER + index % columns * step_x
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    out = io.BytesIO()
    Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(out, format="PNG", optimize=True)
    return out.getvalue()


def trajectory(forward: Pixels, forward_t: Sequence[int], reverse: Pixels, reverse_t: Sequence[int]) -> bytes:
    """Two strips: an image on its way to noise (x_0..x_T), and noise on its way to an image (x_T..x_0).

    Frames uint8 [K, H, W, C], as many times t as frames. ValueError where their numbers differ.
    """
    for frames, times in ((forward, forward_t), (reverse, reverse_t)):
        _checked(frames)
        if len(frames) != len(times):
            raise ValueError(f"{len(frames)} frames and {len(times)} times")
    # All in inches: a strip is its title, the frames, their captions.
    pitch, side, margin, caption, strip = 0.95, 0.88, 0.16, 0.22, 1.62
    width = max(4.2, max(len(forward), len(reverse)) * pitch + 2 * margin)
    figure = _figure(width, 2 * strip)
    height = figure.get_figheight()
    strips = (
        (strip, "Forward: noise is added to an image of the data", forward, forward_t),
        (0.0, "Reverse: the model draws an image out of noise", reverse, reverse_t),
    )
    for low, title, frames, times in strips:
        bottom = low + margin + caption
        figure.text(margin / width, (bottom + side + 0.1) / height, title, color=INK, fontsize=9.5, fontweight="bold")
        for index, (frame, t) in enumerate(zip(frames, times, strict=True)):
            left = margin + index * pitch
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            _show(axes, frame)
            middle, below = (left + side / 2) / width, (low + margin) / height
            figure.text(middle, below, f"$t$ = {t}", color=SOFT, fontsize=8, ha="center")
    return _png(figure)


def strips(images: NDArray[np.uint8], times: Sequence[int]) -> bytes:
    """How images come out of noise: uint8 [N, K, H, W, C], a row an image of the moments before each time t, the last
    column the image itself. ValueError where there are not as many times as columns."""
    rows, columns = images.shape[:2]
    if columns != len(times):
        raise ValueError(f"{columns} columns and {len(times)} times")
    _checked(images.reshape(-1, *images.shape[2:]))
    pitch, side, margin, caption = 0.95, 0.88, 0.16, 0.24
    width, height = columns * pitch + 2 * margin, rows * pitch + 2 * margin + caption
    figure = _figure(width, height)
    for row in range(rows):
        for column in range(columns):
            left, bottom = margin + column * pitch, margin + caption + (rows - 1 - row) * pitch
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            _show(axes, images[row, column])
    for column, t in enumerate(times):
        middle = (margin + column * pitch + side / 2) / width
        figure.text(middle, margin / height, f"$t$ = {t}", color=SOFT, fontsize=8, ha="center")
    return _png(figure)


def schedule_curves(schedule: NoiseSchedule) -> bytes:
    """Signal rate and noise rate (left) and the log-SNR (right) over the timesteps 1..T."""
    t = schedule.original_timesteps.numpy()
    figure = _figure(width=8.4, height=3.3)
    rates, ratio = figure.subplots(1, 2)
    rates.plot(t, schedule.signal_rate.numpy(), color=BLUE, label=r"signal rate $\sqrt{\bar\alpha_t}$")
    rates.plot(t, schedule.noise_rate.numpy(), color=ORANGE, label=r"noise rate $\sqrt{1-\bar\alpha_t}$")
    rates.set_ylim(-0.03, 1.03)
    log_snr = schedule.log_snr.numpy()
    shown = np.isfinite(log_snr)  # no signal is left at the end of a schedule with zero terminal SNR
    ratio.plot(t[shown], log_snr[shown], color=INK, label=r"$\log\mathrm{SNR}_t=\log\,\bar\alpha_t/(1-\bar\alpha_t)$")
    ratio.axhline(0, color=SOFT, linewidth=0.7, linestyle=(0, (3, 3)), zorder=1)
    for axes in (rates, ratio):
        _dress(axes, "timestep $t$")
        axes.set_xlim(0, max(t[-1], 2))
        _legend(axes)
    figure.subplots_adjust(left=0.06, right=0.97, top=0.87, bottom=0.15, wspace=0.18)
    return _png(figure)


def loss_curve(images_seen: Sequence[int], losses: Sequence[float], smoothed: Sequence[float] | None = None) -> bytes:
    """The training loss over images seen, faint, and its smoothed course (by default a running mean).

    The axis of losses is logarithmic where they fall by more than a factor of four. ValueError for unequal lengths.
    """
    x, y = np.asarray(images_seen, dtype=float), np.asarray(losses, dtype=float)
    course = _running_mean(y) if smoothed is None else np.asarray(smoothed, dtype=float)
    if not len(x) == len(y) == len(course):
        raise ValueError(f"{len(x)} counts of images, {len(y)} losses, {len(course)} smoothed")
    figure = _figure(width=7.2, height=3.6)
    axes = figure.subplots()
    # A single point makes no line.
    axes.plot(x, y, color=BLUE, alpha=0.28, linewidth=0.8, label="loss", marker="." if len(x) == 1 else None)
    axes.plot(x, course, color=BLUE, linewidth=1.8, label="smoothed")
    finite = course[np.isfinite(course)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > _LOG_ABOVE:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    _dress(axes, "images seen")
    axes.xaxis.set_major_formatter(_thousands())
    axes.margins(x=0.015)
    _legend(axes)
    if len(finite):
        axes.annotate(
            f"{course[-1]:.3g}",
            (x[-1], course[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=BLUE,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    figure.subplots_adjust(left=0.09, right=0.92, top=0.89, bottom=0.14)
    return _png(figure)


def _show(axes: Any, image: NDArray[np.uint8]) -> None:
    """An image [H, W, C] without axes."""
    # As RGB: a colour map would round the greys.
    axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=FAINT, linewidth=0.6)


def quality_against_cost(
    lines: Mapping[str, Sequence[tuple[int, float, tuple[float, float]]]], floor: float, chosen: tuple[int, float]
) -> bytes:
    """A line each of (network calls an image, Frechet distance, its interval), the floor, and a ring around one."""
    figure = _figure(width=7.2, height=4.2)
    axes = figure.subplots()
    for colour, (name, points) in zip(itertools.cycle(COLOURS), lines.items(), strict=False):
        calls, values, intervals = zip(*sorted(points), strict=True)
        below = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
        above = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
        look = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.4, "capsize": 2}
        axes.errorbar(calls, values, (below, above), label=name, **look)
    axes.axhline(floor, color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)), label="real images")
    ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "color": INK, "linestyle": "none"}
    axes.plot(*chosen, label="cheapest as good", **ring)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    _plain_ticks_of(axes.xaxis, sorted({call for points in lines.values() for call, _, _ in points}))
    _dress(axes, "network calls an image")
    axes.set_ylabel("Frechet distance", color=INK, fontsize=9.5)
    _legend(axes)
    figure.subplots_adjust(left=0.11, right=0.97, top=0.86, bottom=0.13)
    return _png(figure)


def _plain_ticks_of(axis: Any, values: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _checked(images: Pixels) -> tuple[int, int, int, int]:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 1 or 3], one or more, not {images.dtype} {images.shape}")
    n, height, width, channels = images.shape
    return n, height, width, channels


def _figure(width: float, height: float) -> Any:
    """An empty figure, inches, on a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _dress(axes: Any, xlabel: str) -> None:
    """The look that the curves share."""
    axes.set_xlabel(xlabel, color=INK, fontsize=9.5)
    axes.tick_params(which="both", colors=SOFT, labelsize=8.5, length=3)
    axes.grid(True, which="major", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set(color=SOFT, linewidth=0.7)


def _legend(axes: Any) -> None:
    # Above the axes, where no curve can run through it.
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.6,
        borderaxespad=0.2,
    )


def _plain_log_ticks(axes: Any) -> None:
    """Ticks at a few round numbers of each decade, written plainly."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thousands() -> Any:
    """Counts as 500, 20 k, 1.5 M."""
    from matplotlib.ticker import FuncFormatter

    def written(value: float, _: int) -> str:
        for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
            if abs(value) >= unit:
                return f"{value / unit:g}{name}"
        return f"{value:g}"

    return FuncFormatter(written)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the neighbours within half of 5 % of the points, fewer at the ends; same length."""
    reach = round(len(values) * _SMOOTH / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)

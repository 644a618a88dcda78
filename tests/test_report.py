import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_core import NoiseSchedule
from pipelines import report


def images(n: int, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, side, side, channels), dtype=np.uint8)


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_of_a_grid_is_its_images(channels: int) -> None:
    shown = images(7, channels=channels)
    sheet = pixels(report.grid(shown, columns=3, scale=5)).reshape(4 + 3 * 44, 4 + 3 * 44, channels)
    for index, image in enumerate(shown):
        top, left = 4 + index // 3 * 44, 4 + index % 3 * 44
        cell = sheet[top : top + 40, left : left + 40]
        assert np.array_equal(cell[2::5, 2::5], image)
        assert np.array_equal(cell, image.repeat(5, 0).repeat(5, 1))
    gutter = sheet[:4]
    assert (gutter == gutter[0, 0, 0]).all()
    assert (sheet[4 + 2 * 44 :, 4 + 44 :] == gutter[0, 0, 0]).all()  # places without an image


def test_a_grid_is_square_and_large_enough_to_read_unless_told() -> None:
    assert pixels(report.grid(images(64))).shape == (8 * 60 + 4, 8 * 60 + 4)
    assert pixels(report.grid(images(2, side=100))).shape == (108, 212)
    assert pixels(report.grid(images(1), columns=10, scale=1)).shape == (16, 16)


def test_a_trajectory_shows_every_frame() -> None:
    forward, reverse = images(9), images(5)[::-1].copy()
    times = [0, 125, 250, 375, 500, 625, 750, 875, 1000]
    picture = pixels(report.trajectory(forward, times, reverse, [981, 700, 400, 100, 0]))
    assert picture.shape[1] > picture.shape[0] > 400
    grey = picture[..., 0]
    # Frames are wide flat squares: every grey of both strips appears, about as often as its pixels are wide.
    side = round(0.88 * report.DPI / 8)
    for value in (*np.unique(forward), *np.unique(reverse)):
        assert (grey == value).sum() >= 0.7 * side**2
    with pytest.raises(ValueError, match="9 frames and 2 times"):
        report.trajectory(forward, [0, 1], reverse, [0, 1, 2, 3, 4])


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in picture[..., :3].reshape(-1, 3).tolist()}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.cosine(1000).respace(50, "trailing"),
        NoiseSchedule.linear(100, 1e-3, 0.2).rescale_zero_terminal(),  # its last log-SNR is -inf
    ],
)
def test_schedule_curves(schedule: NoiseSchedule) -> None:
    picture = pixels(report.schedule_curves(schedule))
    assert picture.shape[:2] == (594, 1512)
    left, right = picture[:, :756], picture[:, 756:]
    assert {rgb(report.BLUE), rgb(report.ORANGE)} <= colours(left)
    assert rgb(report.INK) in colours(right)
    assert not {rgb(report.BLUE), rgb(report.ORANGE)} & colours(right)


@pytest.mark.parametrize(
    "losses",
    [
        np.geomspace(2, 0.01, 40).tolist(),
        [0.3],
        [0.5, float("nan"), 0.0],
    ],
)
def test_loss_curve(losses: list[float]) -> None:
    seen = list(range(128, 128 * (len(losses) + 1), 128))
    picture = pixels(report.loss_curve(seen, losses))
    assert picture.shape[:2] == (648, 1296)
    assert rgb(report.BLUE) in colours(picture)


def test_the_smoothed_loss_is_the_one_given_or_a_running_mean() -> None:
    seen, losses = [1, 2, 3], [3.0, 1.0, 2.0]
    assert report.loss_curve(seen, losses, [3.0, 2.0, 1.5]) != report.loss_curve(seen, losses)
    line = np.arange(100.0)
    np.testing.assert_allclose(report._running_mean(line)[2:-2], line[2:-2])
    with pytest.raises(ValueError, match="3 counts of images, 2 losses"):
        report.loss_curve(seen, losses[:2])


def test_a_picture_is_a_function_of_its_arguments() -> None:
    schedule = NoiseSchedule.cosine(20)
    assert report.schedule_curves(schedule) == report.schedule_curves(schedule)
    assert report.grid(images(4)) == report.grid(images(4))


def test_what_is_no_image_is_refused() -> None:
    for wrong in (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 1)), np.zeros((0, 8, 8, 1), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            report.grid(wrong)


def test_neither_import_nor_drawing_touches_pyplot() -> None:
    code = (
        "import sys; from pipelines import report; assert 'matplotlib' not in sys.modules; "
        "report.loss_curve([1, 2], [1.0, 0.5]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

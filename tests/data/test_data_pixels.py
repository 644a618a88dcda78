"""Pixels to the model and back."""

import numpy as np
import pytest
import torch

from pipelines.data.pixels import to_model, to_pixels


def test_every_pixel_value_comes_back() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(3, axis=3)
    images[..., 1] = 255 - images[..., 1]
    x = to_model(images)
    assert x.shape == (4, 3, 8, 8)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert x[0, 1, 0, 3].item() == pytest.approx((255 - 3) / 127.5 - 1)
    assert np.array_equal(to_pixels(x), images)
    assert np.array_equal(to_pixels(x.double()), images)


def test_the_layout_is_that_of_the_shape_whatever_the_arrays_was() -> None:
    """Or convolutions of the same pixels would differ in their last bits."""
    plain = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    odd = to_pixels(to_model(plain))
    assert odd.flags.c_contiguous
    assert odd.strides != plain.strides, "of an axis of length 1, any stride will do"
    frozen = np.frombuffer(plain.tobytes(), dtype=np.uint8).reshape(plain.shape)
    for images in (odd, frozen, plain[:, ::-1], plain[:1], odd[:1]):
        assert to_model(images).stride() == to_model(np.array(images.tolist(), dtype=np.uint8)).stride()


def test_values_beyond_are_clamped_and_halves_go_to_even() -> None:
    x = torch.tensor([-9.0, -1.0, 1.0, 9.0, float("inf"), 0.0, 0.5 / 127.5 - 1 + 1e-6]).reshape(1, 1, 1, 7)
    assert to_pixels(x).ravel().tolist() == [0, 0, 255, 255, 255, 128, 1]  # 127.5 goes to 128


def test_diverged_images_have_no_pixels() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_pixels(torch.full((1, 1, 2, 2), float("nan")))

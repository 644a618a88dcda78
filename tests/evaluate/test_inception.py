"""The published network, rebuilt: its numbers are those of an implementation by others, with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.errors import UserError
from pipelines.evaluate.inception import Inception, InceptionV3

NUMBERS = 23_885_392
"""In the published file: with a head of 1,008 classes, and means and variances of the normalisations."""


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, given in sorted(InceptionV3().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith(("running_var", "bn.weight")):
            drawn[name] = torch.rand(given.shape, generator=generator) + 0.5
        elif given.ndim == 1:
            drawn[name] = torch.randn(given.shape, generator=generator) * 0.1
        else:
            drawn[name] = torch.randn(given.shape, generator=generator) * (2 / given[0].numel()) ** 0.5
    return drawn


def test_features_are_those_of_torch_fidelity() -> None:
    """Its 0.4.0, `inception-v3-compat`, gave these on the same weights and images, of 28 x 32 pixels."""
    network = InceptionV3()
    network.load_state_dict(weights())
    assert sum(given.numel() for given in weights().values()) == NUMBERS
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 32, 3), dtype=np.uint8)
    found = Inception(network, "digest").features(images)
    assert found.shape == (3, 2048)
    np.testing.assert_allclose(found[0, :4], [1.4985925, 0.0, 0.15912735, 1.5273793], rtol=1e-4, atol=1e-5)
    assert found.mean() == pytest.approx(1.6037484, rel=1e-4)
    assert found.std() == pytest.approx(2.260798, rel=1e-4)


def test_grey_images_are_three_channels_alike() -> None:
    network = InceptionV3()
    network.load_state_dict(weights())
    inception = Inception(network, "digest")
    grey = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    assert np.array_equal(inception.features(grey), inception.features(grey.repeat(3, axis=3)))


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    torch.save({"code": Inception}, tmp_path / "pickled.pth")
    for name in ("absent", "other.safetensors", "text", "pickled.pth"):
        with pytest.raises(UserError, match=r"evaluate\.inception: .*" + name):
            Inception.load(str(tmp_path / name))

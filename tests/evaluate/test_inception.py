"""The published network, rebuilt: its numbers are those of an implementation by others, with the same weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.data.ingest import ingest
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.evaluate.answers import Question
from pipelines.evaluate.inception import Inception, InceptionV3
from pipelines.evaluate.job import evaluate_samples
from pipelines.evaluate.sets import SetFeatures, frechet_score
from pipelines.sections import Evaluate
from pipelines.session import Session
from pipelines.store import Place, sha256
from tests.sample.conftest import Said

NUMBERS = 23_885_392
"""In the published file: with a head of 1,008 classes, and means and variances of the normalisations."""


@pytest.fixture(scope="module")
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


def test_features_are_those_of_torch_fidelity(weights: dict[str, torch.Tensor]) -> None:
    """Its 0.4.0, `inception-v3-compat`, gave these on the same weights and images, of 28 x 32 pixels."""
    network = InceptionV3()
    network.load_state_dict(weights)
    assert sum(given.numel() for given in weights.values()) == NUMBERS
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 32, 3), dtype=np.uint8)
    found = Inception(network, "digest").features(images)
    assert found.shape == (3, 2048)
    np.testing.assert_allclose(found[0, :4], [1.4985925, 0.0, 0.15912735, 1.5273793], rtol=1e-4, atol=1e-5)
    assert found.mean() == pytest.approx(1.6037484, rel=1e-4)
    assert found.std() == pytest.approx(2.260798, rel=1e-4)


def test_grey_images_are_three_channels_alike(weights: dict[str, torch.Tensor]) -> None:
    network = InceptionV3()
    network.load_state_dict(weights)
    inception = Inception(network, "digest")
    grey = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    assert np.array_equal(inception.features(grey), inception.features(grey.repeat(3, axis=3)))


def test_images_are_scored_in_its_features_and_the_network_goes_by_its_files_digest(
    weights: dict[str, torch.Tensor], tmp_path: Path, session: Session
) -> None:
    file, pixels = tmp_path / "weights.safetensors", np.random.default_rng(2).integers(256, size=(20, 8, 8, 1))
    safetensors.torch.save_file(weights, file)
    np.save(tmp_path / "images.npy", pixels.astype(np.uint8))
    source, out = str(tmp_path / "images.npy"), Place.of(tmp_path / "data")
    dataset = ingest(source, out, image_size=8, channels=1, held_out=0.65, shard_images=100)
    said = Said()
    question = Question(Evaluate(inception=str(file)), seed=0)
    found = evaluate_samples(dataset, dataset, question, replace(session, progress=said))
    (frechet,) = (score for score in found.scores if score.name == "frechet")
    assert frechet.provenance["features_digest"] == sha256(file.read_bytes())
    assert "TensorFlow" in frechet.provenance["preprocessing"]
    assert found.evidence["noise_over_floor"] is not None
    assert not {"feature_accuracy", "feature_turns_accuracy"} & found.evidence.keys()
    assert any("fewer than the 2,048 features" in line for line in said.lines)
    inception = Inception.load(str(file))
    train, _ = Reader(dataset.split("train")).read_all()
    held_out, _ = Reader(dataset.split("held-out")).read_all()
    sets = SetFeatures.of(inception, train, held_out, seed=0)
    assert frechet.value == pytest.approx(frechet_score(sets, seed=0, provenance={}).value, rel=1e-6)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    torch.save({"code": Inception}, tmp_path / "pickled.pth")
    for name in ("absent", "other.safetensors", "text", "pickled.pth"):
        with pytest.raises(UserError, match=r"evaluate\.inception: .*" + name):
            Inception.load(str(tmp_path / name))

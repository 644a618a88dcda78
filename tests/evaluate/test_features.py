import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from pipelines.evaluate.features import FeatureNet, train_feature_net
from pipelines.store import DamageError
from tests.evaluate.conftest import Digits


def short(digits: Digits, **settings: int) -> FeatureNet:
    chosen = {"width": 16, "epochs": 2, "seed": 0, **settings}
    return train_feature_net(digits.train[:200], digits.train_labels[:200], **chosen)


def test_it_knows_held_out_digits(net: FeatureNet, digits: Digits) -> None:
    assert net.accuracy(digits.held_out, digits.held_out_labels) >= 0.95
    # Accuracy is of the labels given, not of something that is always high.
    wrong = (digits.held_out_labels + 1) % 10
    assert net.accuracy(digits.held_out, wrong) < 0.05


def test_the_same_seed_trains_the_same_bits_and_another_does_not(digits: Digits) -> None:
    first = short(digits)
    torch.manual_seed(99)  # whatever the caller has done to the global generators
    np.random.default_rng(99)
    again = short(digits)
    assert first.save() == again.save()
    assert first.digest == again.digest != short(digits, seed=1).digest


def test_training_leaves_global_state_alone(digits: Digits) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    short(digits, threads=threads + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_saved_and_loaded_it_is_the_same(net: FeatureNet, digits: Digits) -> None:
    loaded = FeatureNet.load(net.save())
    assert loaded.config == net.config
    assert loaded.digest == net.digest
    assert np.array_equal(loaded.features(digits.held_out[:50]), net.features(digits.held_out[:50]))


def test_features_are_finite_and_do_not_depend_on_the_batch_but_for_rounding(net: FeatureNet, digits: Digits) -> None:
    images = digits.held_out[:70]
    features = net.features(images)
    assert features.shape == (70, 64)
    assert features.dtype == np.float64
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features, net.features(images, batch=33), atol=1e-5)


@pytest.mark.parametrize(("side", "channels", "levels"), [(8, 3, 2), (13, 1, 2), (28, 1, 3), (32, 3, 4)])
def test_images_of_other_sizes(side: int, channels: int, levels: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(12, side, side, channels), dtype=np.uint8)
    net = train_feature_net(images, np.arange(12) % 3, width=8, epochs=1, seed=0)
    assert net.config.levels == levels
    assert net.features(images).shape == (12, 8)


@pytest.mark.parametrize("labels", [np.full(200, -1), np.arange(200) % 10 - 1, np.zeros(200, int)])
def test_data_without_classes_teaches_which_way_up_it_is(digits: Digits, labels: np.ndarray) -> None:
    """Which is harder: a turned 0 is a 0."""
    learned = train_feature_net(digits.train[:200], labels, epochs=20, seed=0)
    assert learned.config.task == "turns"
    none = np.full(len(digits.held_out), -1)
    assert learned.accuracy(digits.held_out, none) > 0.4  # by chance, 0.25
    assert FeatureNet.load(learned.save()).digest == learned.digest


def test_images_too_small_or_of_another_dataset_are_refused(net: FeatureNet) -> None:
    with pytest.raises(UserError, match=r"data\.image_size: .* 8 pixels"):
        train_feature_net(np.zeros((4, 6, 6, 1), np.uint8), np.array([0, 1, 0, 1]), epochs=1, seed=0)
    with pytest.raises(UserError, match="trained on images of side 8 with 1 channels"):
        net.features(np.zeros((2, 16, 16, 1), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        net.features(np.zeros((2, 8, 8, 1), np.float32))  # type: ignore[arg-type]


def test_damaged_and_foreign_files_are_refused(net: FeatureNet) -> None:
    data = net.save()
    for damaged in (b"", b"not a network", data[:-10], data.replace(b"feature-net", b"feature-nut")):
        with pytest.raises(DamageError):
            FeatureNet.load(damaged)
    with pytest.raises(DamageError, match="format 7"):
        FeatureNet.load(data.replace(rb"\"format\":2", rb"\"format\":7"))

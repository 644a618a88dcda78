"""The bundled digits, split as ingest splits them, and one feature network of them."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from pipelines.data.manifest import content_hash
from pipelines.data.recipe import is_held_out
from pipelines.evaluate.features import FeatureNet, train_feature_net


class Digits(NamedTuple):
    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    held_out: NDArray[np.uint8]
    held_out_labels: NDArray[np.int64]


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = load_digits()
    images = (data.images * 255 / 16).round().astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    out = np.array([is_held_out(content_hash(image), 0.4) for image in images])
    return Digits(images[~out], labels[~out], images[out], labels[out])


@pytest.fixture(scope="session")
def net(digits: Digits) -> FeatureNet:
    return train_feature_net(digits.train, digits.train_labels, epochs=20, seed=0)

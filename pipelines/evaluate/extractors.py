"""The network that features come from: one small one a dataset, trained once and kept, or InceptionV3 of the user's."""

from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.evaluate.features import FORMAT, FeatureNet, train_feature_net
from pipelines.evaluate.inception import Inception
from pipelines.evaluate.kept import kept
from pipelines.evaluate.sets import Extractor
from pipelines.sections import Evaluate
from pipelines.session import Session
from pipelines.store import Place, identity

SEED = 0
"""Not the run's: scores of runs that differ in their seed are to be compared, so in the same features."""


def extractor(dataset: Dataset, evaluate: Evaluate, session: Session) -> Extractor:
    """The network that a dataset's scores are taken in."""
    if evaluate.inception is not None:
        return Inception.load(evaluate.inception)
    return feature_net(dataset, evaluate, session)


def feature_net(dataset: Dataset, evaluate: Evaluate, session: Session) -> FeatureNet:
    """The feature network of a dataset, trained once by a task and kept in the store."""

    def train() -> FeatureNet:
        ray = session.cluster.connect()
        task = ray.remote(num_cpus=1)(_train)
        return FeatureNet.load(ray.get(task.remote(str(dataset.place), evaluate)))

    return kept(feature_place(dataset, evaluate, session.store), train, FeatureNet.save, FeatureNet.load)


def kept_net(dataset: Dataset, evaluate: Evaluate, store: Place) -> FeatureNet:
    """The same where it was trained before; else it is trained here."""
    place = feature_place(dataset, evaluate, store)
    return kept(place, lambda: FeatureNet.load(_train(str(dataset.place), evaluate)), FeatureNet.save, FeatureNet.load)


def feature_place(dataset: Dataset, evaluate: Evaluate, store: Place) -> Place:
    """Where the feature network of a dataset is kept."""
    fields: dict[str, Any] = {"width": evaluate.feature_width, "epochs": evaluate.feature_epochs, "format": FORMAT}
    return store / "features" / f"{identity({'dataset': dataset.digest, **fields})[:16]}.net"


def _train(dataset: str, evaluate: Evaluate) -> bytes:
    # Whatever data.on_error says: a network of other images would go by the dataset's digest, and so would its scores.
    images, labels = Reader(Dataset.open(Place.of(dataset)).split("train")).read_all()
    width, epochs = evaluate.feature_width, evaluate.feature_epochs
    return train_feature_net(images, labels, width=width, epochs=epochs, seed=SEED, threads=1).save()

"""Evaluation as a job: what the scores need is made by Ray tasks and actors, the scores by pure functions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_core.guidance import Conditioned
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_pixels
from pipelines.data.reader import Reader
from pipelines.drawing import Settings, draw
from pipelines.errors import UserError
from pipelines.evaluate.chance import choose_images
from pipelines.evaluate.evaluate import HELD_OUT, REPLICATES, SPLITS, bits_score, estimate_bits, frechet_score
from pipelines.evaluate.features import FORMAT as FEATURES_FORMAT
from pipelines.evaluate.features import FeatureNet, train_feature_net
from pipelines.evaluate.scores import Score
from pipelines.models import Model
from pipelines.sample import read_samples, sample_spec
from pipelines.session import Session
from pipelines.spec import Evaluate, Spec
from pipelines.store import Place, identity

_BITS_BATCH = 64
_FEATURE_SEED = 0
"""Not the run's: scores of runs that differ in their seed are to be compared, so in the same features."""

_BITS_FORMAT = 2
"""Of the bits' interval; since 2, copies of an image count in it as one."""

MEASURE = {
    "bits": _BITS_FORMAT,
    "features": FEATURES_FORMAT,
    "feature_seed": _FEATURE_SEED,
    "splits": SPLITS,
    "replicates": REPLICATES,
}
"""What scores depend on beside the spec, the model and the data; with it in their key, old ones are not taken for new.
"""


@dataclass(frozen=True)
class Evaluation:
    """Scores with their provenance, and the figures that gates look at."""

    scores: list[Score]
    evidence: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"scores": [score.to_json() for score in self.scores], "evidence": self.evidence}

    def summary(self) -> str:
        figures = self.evidence
        return (
            f"Frechet {figures['frechet']:.3g} = {figures['frechet_over_floor']:.2f} floors, "
            f"{figures['bits_per_dim']:.3f} bits/dim"
        )


def evaluate(model: Model, dataset: Dataset, spec: Spec, session: Session) -> Evaluation:
    """Score a model against the held-out images of a dataset. UserError where they are too few or do not fit it."""
    _check_fits(model, dataset)
    ray = session.cluster.connect()
    held_out, labels = Reader(dataset.split("held-out")).read_all()
    n = len(held_out) // 2
    if n < 2:
        raise UserError(f"data.held_out: {len(held_out)} images held out are too few to score against, raise it")
    if n < spec.evaluate.feature_width:
        session.progress.say(
            f"warning: at n = {n}, fewer than the {spec.evaluate.feature_width} features, much of Frechet is chance: "
            "hold out more images (data.held_out), or add some"
        )
    net = feature_net(dataset, spec, session)

    # The bound's tasks run beside the sampling; each takes a fixed part of the images, whoever computes it.
    parts = _bits_parts(held_out, labels, spec)
    session.cluster.check_cpus("sample.threads", spec.sample.threads)
    task = ray.remote(num_cpus=spec.sample.threads)(_bits_of)
    shared = ray.put(model)
    timesteps, threads = spec.evaluate.bits_timesteps, spec.sample.threads
    bits = [task.remote(shared, *part, spec.seed, timesteps, threads) for part in parts]

    samples = sample_spec(model, spec, n, session)
    pixels = np.concatenate(list(read_samples(samples, n)))
    provenance = {
        "model_digest": model.digest,
        "dataset_digest": dataset.digest,
        "ema": model.average,
        **spec.sample.model_dump(mode="json", exclude={"n", "workers", "threads", "seed"}),
        "sample_seed": spec.sample.seed,
    }
    frechet = frechet_score(net, pixels, held_out, seed=spec.seed, provenance=provenance)
    bound = bits_score(
        np.concatenate(ray.get(bits)),
        np.concatenate([images for images, _ in parts]),
        seed=spec.seed,
        provenance={
            **{name: provenance[name] for name in ("model_digest", "dataset_digest", "ema")},
            "timesteps_per_image": spec.evaluate.bits_timesteps,
            "levels": 256,
        },
    )
    return Evaluation([frechet, bound], _evidence(net, dataset, frechet, bound))


def feature_net(dataset: Dataset, spec: Spec, session: Session) -> FeatureNet:
    """The feature network of a dataset, trained once by a task and kept in the store."""
    place = _feature_place(dataset, spec.evaluate, session.store)
    if not place.exists():
        ray = session.cluster.connect()
        task = ray.remote(num_cpus=1)(_train_feature_net)
        place.write(ray.get(task.remote(str(dataset.place), spec.evaluate)))
    return FeatureNet.load(place.read())


def held_out_bits(model: Model, dataset: Dataset, spec: Spec) -> float:
    """Bits/dim of a model on the held-out images, estimated in this process."""
    parts = _bits_parts(*Reader(dataset.split("held-out")).read_all(), spec)
    threads, timesteps = spec.train.threads, spec.evaluate.bits_timesteps
    estimates = [_bits_of(model, *part, spec.seed, timesteps, threads) for part in parts]
    return float(np.concatenate(estimates).mean())


def sampled_frechet(model: Model, dataset: Dataset, spec: Spec, store: Place, n: int) -> float:
    """Frechet distance of n images drawn in this process; the feature network must be in the store."""
    net = FeatureNet.load(_feature_place(dataset, spec.evaluate, store).read())
    held_out, _ = Reader(dataset.split("held-out")).read_all()
    n = min(n, len(held_out) // 2)
    process, unet = model.build()
    settings = Settings.of(spec.sample)
    chunks = [range(start, start + settings.chunk) for start in range(0, n, settings.chunk)]
    drawn = [to_pixels(draw(process, unet, dataset.image_size, settings, indices)) for indices in chunks]
    score = frechet_score(net, np.concatenate(drawn)[:n], held_out, seed=spec.seed, provenance={})
    return score.value


def _bits_parts(images: np.ndarray, labels: np.ndarray, spec: Spec) -> list[tuple[np.ndarray, np.ndarray]]:
    """The images whose bits/dim is estimated, and their labels, in fixed parts: whoever computes one, its bits stay."""
    chosen = choose_images(len(images), spec.evaluate.bits_images, spec.seed)
    parts = [chosen[i : i + _BITS_BATCH] for i in range(0, len(chosen), _BITS_BATCH)]
    return [(images[part], labels[part]) for part in parts]


def _check_fits(model: Model, dataset: Dataset) -> None:
    data = model.spec.data
    if (data.image_size, data.channels) != (dataset.image_size, dataset.channels):
        raise UserError(
            f"--against {dataset.place}: images of {dataset.image_size} pixels and {dataset.channels} channels, "
            f"the model draws {data.image_size} and {data.channels}"
        )
    if (classes := model.spec.model.classes) not in (None, len(dataset.classes)):
        raise UserError(
            f"--against {dataset.place}: images of {len(dataset.classes)} classes, the model knows {classes}; "
            "name the dataset it was trained on, or one with the same classes"
        )
    if classes is not None and dataset.card["splits"][HELD_OUT]["unlabelled"]:
        raise UserError(f"--against {dataset.place}: some held-out images have no label, which this model needs")


def _feature_place(dataset: Dataset, evaluate: Evaluate, store: Place) -> Place:
    fields = {
        "width": evaluate.feature_width,
        "epochs": evaluate.feature_epochs,
        "format": FEATURES_FORMAT,
    }
    return store / "features" / f"{identity({'dataset': dataset.digest, **fields})[:16]}.safetensors"


def _train_feature_net(dataset: str, evaluate: Evaluate) -> bytes:
    # Whatever data.on_error says: a network of other images would go by the dataset's digest, and so would its scores.
    images, labels = Reader(Dataset.open(Place.of(dataset)).split("train")).read_all()
    width, epochs = evaluate.feature_width, evaluate.feature_epochs
    return train_feature_net(images, labels, width=width, epochs=epochs, seed=_FEATURE_SEED, threads=1).save()


def _bits_of(
    model: Model, images: np.ndarray, labels: np.ndarray, seed: int, timesteps: int, threads: int
) -> np.ndarray:
    """Of a model with classes, the bits of each image given its class."""
    import torch

    torch.set_num_threads(threads)
    process, unet = model.build()
    network = unet if unet.config.num_classes is None else Conditioned(unet, torch.from_numpy(labels.astype(np.int64)))
    assert len(images) <= _BITS_BATCH  # one batch, for which the labels are
    return estimate_bits(process, network, images, seed, timesteps_per_image=timesteps, batch=_BITS_BATCH)


def _evidence(net: FeatureNet, dataset: Dataset, frechet: Score, bits: Score) -> dict[str, float]:
    images, labels = Reader(dataset.split("held-out")).read_all()
    return {
        "frechet": frechet.value,
        "frechet_floor": frechet.provenance["floor"],
        "frechet_over_floor": frechet.in_floors,
        "noise_over_floor": frechet.provenance["noise_in_floors"],
        "feature_accuracy": net.accuracy(images, labels),
        "bits_per_dim": bits.value,
    }

"""Bits/dim of a model on a dataset's held-out images, worked out by Ray tasks or in this process."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_core.guidance import Conditioned
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.evaluate.bits import bits_score, estimate_bits, exact_bits
from pipelines.evaluate.chance import choose_images
from pipelines.evaluate.features import Pixels
from pipelines.evaluate.kept import found, kept_arrays, load_arrays
from pipelines.evaluate.measure import MEASURE
from pipelines.evaluate.scores import Score
from pipelines.evaluate.sets import HELD_OUT
from pipelines.models import Model
from pipelines.sections import Evaluate
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place, identity, sha256

_BATCH = 64

Part = tuple[Pixels, np.ndarray]
"""Images and labels that one process estimates at a time: whoever does, their bits stay."""


class LikelihoodTasks:
    """Tasks that are under way; other work may go on beside them. Each keeps what it came to, and what was kept before
    has none."""

    def __init__(self, model: Model, dataset: Dataset, spec: Spec, session: Session) -> None:
        self._model, self._dataset, self._spec = model, dataset, spec
        self._parts = _parts(dataset, spec)
        places = [session.store / "bits" / f"{_key(model, part, spec)[:16]}.npz" for part in self._parts]
        self._there = [found(place, load_arrays) for place in places]
        self._cluster, self._tasks = session.cluster, list[Any]()
        lacking = [
            (place, part) for place, part, there in zip(places, self._parts, self._there, strict=True) if there is None
        ]
        if not lacking:
            return
        ray, threads = session.cluster.connect(), spec.sample.threads
        session.cluster.check_cpus("sample.threads", threads)
        task = ray.remote(num_cpus=threads)(_kept_bits_of)
        shared = ray.put(model)
        self._tasks = [task.remote(place, shared, *part, spec.evaluate, spec.seed, threads) for place, part in lacking]

    def score(self, known: Mapping[str, Any]) -> Score:
        """Wait for them. `known`: what else the provenance is to say."""
        made_now = iter(self._cluster.connect().get(self._tasks) if self._tasks else ())
        estimates = np.concatenate([next(made_now) if there is None else there["bits"] for there in self._there])
        images = np.concatenate([images for images, _ in self._parts])
        evaluate = self._spec.evaluate
        made: dict[str, Any] = (
            {"estimate": "exact"}
            if evaluate.exact
            else {
                "estimate": "bounded",
                "timesteps_per_image": evaluate.bits_timesteps,
            }
        )
        provenance = {
            "model_digest": self._model.digest,
            "dataset_digest": self._dataset.digest,
            "ema": self._model.average,
            "given": "nothing" if self._model.spec.model.classes is None else "class",
            "levels": 256,
            "threads": self._spec.sample.threads,
            "device": "cpu",
        }
        return bits_score(estimates, images, seed=self._spec.seed, provenance={**provenance, **known, **made})


def held_out_bits(model: Model, dataset: Dataset, spec: Spec) -> float:
    """Bits/dim of a model on the held-out images, estimated in this process."""
    parts = _parts(dataset, spec)
    estimates = [_bits_of(model, *part, spec.evaluate, spec.seed, spec.train.threads) for part in parts]
    return float(np.concatenate(estimates).mean())


def _parts(dataset: Dataset, spec: Spec) -> list[Part]:
    split = dataset.split(HELD_OUT)
    chosen = choose_images(len(split), spec.evaluate.bits_images, spec.seed)
    ends = np.cumsum([0, *split.shard_sizes])
    shards = np.searchsorted(ends, chosen, side="right") - 1
    images, labels = Reader(split).read(shards, chosen - ends[shards])
    return [(images[i : i + _BATCH], labels[i : i + _BATCH]) for i in range(0, len(chosen), _BATCH)]


def _key(model: Model, part: Part, spec: Spec) -> str:
    """Of all that the bits of a part depend on."""
    images, labels = part
    known = {
        "model": model.identity,
        "images": sha256(images.tobytes()),
        "labels": sha256(labels.tobytes()),
        "timesteps": None if spec.evaluate.exact else spec.evaluate.bits_timesteps,
        "seed": spec.seed,
        "threads": spec.sample.threads,
        "measure": MEASURE,
    }
    return identity(known)


def _kept_bits_of(place: Place, *question: Any) -> np.ndarray:
    """A part's bits, worked out unless they were before."""
    return kept_arrays(place, lambda: {"bits": _bits_of(*question)})["bits"]


def _bits_of(
    model: Model, images: Pixels, labels: np.ndarray, evaluate: Evaluate, seed: int, threads: int
) -> np.ndarray:
    """Of a model with classes, the bits of each image given its class."""
    import torch

    torch.set_num_threads(threads)
    process, unet = model.build()
    network = unet if unet.config.num_classes is None else Conditioned(unet, torch.from_numpy(labels.astype(np.int64)))
    assert len(images) <= _BATCH  # one batch, for which the labels are
    if evaluate.exact:
        return exact_bits(process, network, images, seed)
    return estimate_bits(process, network, images, seed, evaluate.bits_timesteps, batch=_BATCH)

"""The models that are compared: how each is trained, and what is measured of it. Every measurement is a stage."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.claims import forward
from benchmarks.claims.cache import Cache
from benchmarks.claims.data import Data, Pixels, Work
from ddpm_core import Ema, GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, losses, noise, sample
from pipelines.data.pixels import to_model, to_pixels
from pipelines.evaluate.bits import bits_score, estimate_bits
from pipelines.evaluate.chance import generator
from pipelines.evaluate.features import FORMAT as FEATURES_FORMAT
from pipelines.evaluate.features import FeatureNet, train_feature_net
from pipelines.evaluate.sets import SetFeatures, frechet_score

TIMESTEPS = 1000
EMA_HALF_LIFE = 2000.0
WARM_UP = 2000
"""Images over which the learning rate rises to its value; it stays there."""
BITS_TIMESTEPS, BITS_BATCH = 10, 64
SPLITS = 50
REPLICATES = 2
"""Of the interval of one set of samples, which is not used here: the spread is over seeds."""
CHUNK = 125
"""Images drawn at a time."""
PACE_ROUNDS, PACE_STEPS = 7, 5
MEASURE_SEED = 0
"""Which held-out images, timesteps and noise measure a model: the same for all models, so that they can be compared."""


@dataclass(frozen=True)
class Variant:
    """What a model is trained to do."""

    predict: str = "eps"
    loss: str = "simple"
    """`simple`: the squared error of what is predicted, all timesteps alike; `bound`: that of the mean, each timestep
    weighted as in the variational bound (`losses.mean_matching`)."""
    schedule: str = "linear"
    timed: bool = True
    """Whether the network is told the timestep; else it is always told 0."""

    def process(self, variance: str = "small") -> GaussianDiffusion:
        """The diffusion process, with the given variance of the reverse steps."""
        schedule: NoiseSchedule = getattr(NoiseSchedule, self.schedule)(TIMESTEPS)
        return GaussianDiffusion(schedule, self.predict, variance)


VARIANTS = {
    "eps": Variant(),
    "eps, bound": Variant(loss="bound"),
    "mean, bound": Variant(predict="mean", loss="bound"),
    "x0": Variant(predict="x0"),
    "v": Variant(predict="v"),
    "eps, no time": Variant(timed=False),
    "eps, cosine": Variant(schedule="cosine"),
    "eps, sigmoid": Variant(schedule="sigmoid"),
}
BASELINE = "eps"


@dataclass(frozen=True)
class Way:
    """How images are drawn."""

    sampler: str
    steps: int
    variance: str = "small"


STEPS = (10, 20, 50, 100, 1000)
SAMPLERS = {
    "ancestral, small": ("ancestral", "small"),
    "ancestral, large": ("ancestral", "large"),
    "DDIM": ("ddim", "small"),
    "DPM-Solver++(2M)": ("dpmpp_2m", "small"),
}
USUAL = Way("ancestral", 100)
"""How models are compared with each other."""


class Untimed(nn.Module):
    """A network that is always told timestep 0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.network(x, torch.zeros_like(timestep))


@dataclass(frozen=True)
class Study:
    """The stages over one data set: each method gives a result out of the cache, made if need be."""

    data: Data
    cache: Cache
    images: int
    """Training budget, images seen."""
    threads: int

    # What is measured. Each is None where it is not there and the cache does not compute.

    def forward(self, seed: int) -> Any:
        """See `forward.compare`."""
        recipe = {"data": self.data.digest, "seed": seed, "timesteps": TIMESTEPS, "version": forward.VERSION}
        process = Variant().process()
        return self.cache.numbers(
            "forward", recipe, lambda: forward.compare(process, to_model(self.data.held_out[:1000]), seed)
        )

    def bits(self, variant: Variant, seed: int) -> Any:
        """`value`, bits/dim on held-out images, and its 95 % `interval` over images and draws."""
        recipe = {
            "train": self._training(variant, seed),
            "images": self.data.work.bits_images,
            "timesteps": BITS_TIMESTEPS,
            "batch": BITS_BATCH,
            "clip_x0": True,
            "measure_seed": MEASURE_SEED,
        }

        def make() -> dict[str, Any]:
            images = self._held_out("bits", self.data.work.bits_images)
            process, network = variant.process(), self.model(variant, seed)
            estimates = estimate_bits(process, network, images, MEASURE_SEED, BITS_TIMESTEPS, BITS_BATCH)
            score = bits_score(estimates, images, seed=MEASURE_SEED, provenance={})
            return {"value": score.value, "interval": list(score.interval)}

        return self.cache.numbers("bits", recipe, make)

    def frechet(self, variant: Variant, seed: int, way: Way) -> Any:
        """`value`, the Frechet distance of drawn images, its `floor`, and the `noise` of uniform noise in floors."""
        recipe = {
            "draw": self._drawing(variant, seed, way),
            "features": self._features_recipe,
            "splits": SPLITS,
            "held_out": 2 * self.data.work.samples,
            "measure_seed": MEASURE_SEED,
        }

        def make() -> dict[str, Any]:
            drawn = self.drawn(variant, seed, way)
            assert drawn is not None
            held_out = self._held_out("frechet", 2 * self.data.work.samples)
            score = frechet_score(
                SetFeatures.of(self._feature_net, drawn, held_out, MEASURE_SEED),
                seed=MEASURE_SEED,
                provenance={},
                splits=SPLITS,
                replicates=REPLICATES,
            )
            provenance = score.provenance
            return {"value": score.value, "floor": provenance["floor"], "noise": provenance["noise_in_floors"]}

        return self.cache.numbers("frechet", recipe, make)

    def pace(self) -> Any:
        """Seconds an image and step, by sampler: the fastest of several rounds, in which they take turns."""
        work = self.data.work
        network_fields = {"channels": list(work.channels), "groups": work.groups, "side": self.data.side}
        timed = {"rounds": PACE_ROUNDS, "steps": PACE_STEPS, "batch": CHUNK, "threads": self.threads}

        def make() -> dict[str, float]:
            network, shape = self._network(0), (1, self.data.side, self.data.side)
            best = dict.fromkeys(SAMPLERS, float("inf"))
            for _ in range(PACE_ROUNDS):
                for name, (sampler, variance) in SAMPLERS.items():
                    process = VARIANTS[BASELINE].process(variance)
                    begin = time.perf_counter()
                    sample(process, network, shape, range(CHUNK), sampler, steps=PACE_STEPS)
                    best[name] = min(best[name], (time.perf_counter() - begin) / CHUNK / PACE_STEPS)
            return best

        return self.cache.numbers("pace", network_fields | timed, make)

    def drawn(self, variant: Variant, seed: int, way: Way) -> Pixels | None:
        """The images drawn, uint8 [n, H, W, 1]."""

        def make() -> dict[str, Tensor]:
            network, process = self.model(variant, seed), variant.process(way.variance)
            side, n = self.data.side, self.data.work.samples
            parts = []
            for start in range(0, n, CHUNK):
                seeds = [noise.key(seed, "claims-image", i) for i in range(start, min(start + CHUNK, n))]
                parts.append(sample(process, network, (1, side, side), seeds, way.sampler, way.steps))
            return {"images": torch.from_numpy(to_pixels(torch.cat(parts)))}

        found = self.cache.tensors("draw", self._drawing(variant, seed, way), make)
        return None if found is None else found["images"].numpy()

    def accuracy(self) -> Any:
        """Part of the held-out images whose class the feature network names."""

        def make() -> dict[str, Any]:
            return {"value": self._feature_net.accuracy(self.data.held_out, self.data.held_out_labels)}

        return self.cache.numbers("accuracy", self._features_recipe, make)

    def model(self, variant: Variant, seed: int) -> nn.Module:
        """The trained network, with its averaged weights."""

        def make() -> dict[str, Tensor]:
            return train(variant, self._network(seed), self.data.train, seed, self.images, self.data.work)

        weights = self.cache.tensors("train", self._training(variant, seed), make)
        assert weights is not None
        unet = self._network(None)
        unet.load_state_dict(weights)
        return unet if variant.timed else Untimed(unet)

    # Recipes.

    def _training(self, variant: Variant, seed: int) -> dict[str, Any]:
        work = self.data.work
        return {
            "data": self.data.digest,
            "variant": asdict(variant),
            "seed": seed,
            "images": self.images,
            "channels": list(work.channels),
            "groups": work.groups,
            "learning_rate": work.learning_rate,
            "batch": work.batch,
            "warm_up": WARM_UP,
            "ema_half_life": EMA_HALF_LIFE,
            "timesteps": TIMESTEPS,
            "threads": self.threads,
        }

    def _drawing(self, variant: Variant, seed: int, way: Way) -> dict[str, Any]:
        recipe = {"train": self._training(variant, seed), **asdict(way)}
        return {**recipe, "n": self.data.work.samples, "chunk": CHUNK, "spacing": "trailing", "clip_x0": True}

    @property
    def _features_recipe(self) -> dict[str, Any]:
        work = self.data.work
        fields = {"images": work.feature_images, "epochs": work.feature_epochs, "threads": self.threads}
        return {"data": self.data.digest, "format": FEATURES_FORMAT, "measure_seed": MEASURE_SEED, **fields}

    # Parts.

    @cached_property
    def _feature_net(self) -> FeatureNet:
        def make() -> bytes:
            chosen = _chosen(len(self.data.train), self.data.work.feature_images, "features")
            images, labels = self.data.train[chosen], self.data.labels[chosen]
            epochs = self.data.work.feature_epochs
            return train_feature_net(images, labels, epochs=epochs, seed=MEASURE_SEED, threads=self.threads).save()

        data = self.cache.raw("features", self._features_recipe, make)
        assert data is not None
        return FeatureNet.load(data)

    def _network(self, seed: int | None) -> UNet:
        return UNet(UNetConfig(channels=self.data.work.channels, groups=self.data.work.groups), seed)

    def _held_out(self, purpose: str, n: int) -> Pixels:
        return self.data.held_out[_chosen(len(self.data.held_out), n, purpose)]


def _chosen(count: int, n: int, purpose: str) -> np.ndarray:
    """n of `count` indices, rising."""
    return np.sort(generator(MEASURE_SEED, f"claims-{purpose}").permutation(count)[:n])


def train(variant: Variant, unet: UNet, images: Pixels, seed: int, budget: int, work: Work) -> dict[str, Tensor]:
    """Averaged weights by name after `budget` images, rounded up to a whole batch.

    The seed decides the order of the images, the timesteps and the noise (and, with the network, the first weights):
    the same for every variant, so that variants can be compared seed by seed.
    """
    process, network = variant.process(), unet if variant.timed else Untimed(unet)
    loss = losses.mean_matching if variant.loss == "bound" else GaussianDiffusion.loss
    names, parameters = zip(*unet.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate, fused=True)
    ema = Ema(parameters, EMA_HALF_LIFE)
    for step, rows in enumerate(_batches(len(images), budget, work.batch, seed)):
        x0, seen = to_model(images[rows]), (step + 1) * work.batch
        t = noise.integers([noise.key(seed, "claims-timestep", step)], work.batch, 1, TIMESTEPS)[0]
        eps = noise.normal([noise.key(seed, "claims-eps", step)], x0.shape)[0]
        optimizer.param_groups[0]["lr"] = work.learning_rate * min(1.0, seen / WARM_UP)
        optimizer.zero_grad(set_to_none=True)
        loss(process, network, x0, t, eps).mean().backward()
        optimizer.step()
        ema.update(parameters, seen, work.batch)
    return dict(zip(names, ema.tensors, strict=True))


def _batches(count: int, budget: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of each batch of an endless stream that visits every image once an epoch."""
    stream = np.empty(0, dtype=np.int64)
    epoch = 0
    for _ in range(-(-budget // batch)):
        while len(stream) < batch:
            stream = np.concatenate((stream, generator(seed, "claims-order", epoch).permutation(count)))
            epoch += 1
        yield stream[:batch]
        stream = stream[batch:]


def compute(study: Study, seeds: Sequence[int], steps: Sequence[int]) -> None:
    """Make every stage of the seeds that is not there; of the samplers, at these numbers of steps."""
    study.accuracy()
    study.pace()
    for seed in seeds:
        study.forward(seed)
        for variant in VARIANTS.values():
            study.bits(variant, seed)
            study.frechet(variant, seed, USUAL)
    ways = [Way(sampler, count, variance) for count in steps for sampler, variance in SAMPLERS.values()]
    # The longest last, so that a table of fewer steps can be had early.
    for seed, way in sorted(itertools.product(seeds, ways), key=lambda pair: pair[1].steps == TIMESTEPS):
        study.frechet(VARIANTS[BASELINE], seed, way)

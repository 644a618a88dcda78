"""A small network whose features a Frechet distance is taken in, trained on the data's own labels, or without any.

No download and no Inception: the network is a classifier of the training split, at most 64 features wide, so that
a covariance is well estimated from a few hundred images. What makes its features fit for judging samples:

- They are the average over the picture of the last convolution's output, as in Inception's last pooling layer
  (Heusel et al. 2017), and that comes early: they hold texture as well as class. Behind one more convolution or a
  linear layer there is little but the class, and noise is 30 to 60 floors from the digits instead of 65 to 85.
- It is trained on shifted and slightly noised images, so that it does not hang on the last grey level of a pixel.
- Layer normalisation: with batch normalisation it is contrast that moves a model away from the data.

Where the data has no labels, the network learns which of four ways an image was turned (Gidaris et al. 2018,
"Unsupervised representation learning by predicting image rotations").

Training is a pure function of (images, labels, settings, seed, threads), bit for bit on the same software. Bits of
the features may depend on `batch` and on torch's threads.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from ddpm_core import noise
from pipelines.data.pixels import to_model
from pipelines.errors import UserError
from pipelines.store import DamageError, canonical_json, sha256

FORMAT = 2
MAX_WIDTH = 64
MIN_SIDE = 8
PREPROCESSING = "uint8 / 127.5 - 1, at the data's own size"

Pixels = NDArray[np.uint8]
Features = NDArray[np.float64]

TURNS = 4
"""Ways in which an image can be turned by right angles."""

BATCH = 64
LEARNING_RATE = 3e-3
WARM_UP = 0.3
"""Part of the training in which the learning rate rises."""
WEIGHT_DECAY = 1e-2
DROPOUT = 0.2
NOISE = 0.1
"""Standard deviation of the noise on training images, in units of [-1, 1]."""
SHIFT = 1 / 8
"""Largest shift of a training image, as a part of its side."""


@dataclass(frozen=True)
class FeatureConfig:
    """The network's shape."""

    channels: int
    """Of the images: 1 or 3."""
    side: int
    """The images' smaller side, pixels."""
    classes: int
    width: int
    """Number of features."""
    task: Literal["classes", "turns"] = "classes"
    """What the network was trained to tell."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or self.side < MIN_SIDE:
            raise ValueError(
                f"images of 1 or 3 channels and {MIN_SIDE} pixels or more a side, not {self.channels}, {self.side}"
            )
        if not 2 <= self.width <= MAX_WIDTH or self.classes < 2:
            raise ValueError(f"2..{MAX_WIDTH} features and 2 classes or more, not {self.width}, {self.classes}")

    @property
    def levels(self) -> int:
        """Resolutions, each half of the one before, down to 4..7 pixels."""
        return int(math.log2(self.side // 4)) + 1


class FeatureNet(nn.Module):
    """Two 3x3 convolutions, one more after each halving, all normalised over the image; their mean; a classifier."""

    def __init__(self, config: FeatureConfig) -> None:
        """The weights are not initialised: `train_feature_net` or `load` makes a network to use."""
        super().__init__()
        self.config = config
        widths = [config.channels, max(2, config.width // 2)] + [config.width] * config.levels
        # skip_init: torch's own initialisation would draw from, and move, the global generator.
        self.convolutions = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, fan_in, fan_out, 3, padding=1)
            for fan_in, fan_out in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:])
        self.classifier = nn.utils.skip_init(nn.Linear, config.width, config.classes)

    def pooled(self, x: Tensor) -> Tensor:
        """Images float [N, C, H, W] in [-1, 1] -> features [N, width]."""
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if index >= 2:
                x = F.avg_pool2d(x, 2)
            x = F.silu(norm(convolution(x)))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images float [N, C, H, W] in [-1, 1] -> logits [N, classes]."""
        return self.classifier(self.pooled(x))

    def features(self, images: Pixels, batch: int = 256) -> Features:
        """uint8 [N, H, W, C] -> float64 [N, width]. UserError for images of another kind than it was trained on."""
        self._check(images)
        out = np.empty((len(images), self.config.width))
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                out[start : start + batch] = self.pooled(to_model(images[start : start + batch])).numpy()
        return out

    def accuracy(self, images: Pixels, labels: NDArray[np.int64], batch: int = 256) -> float:
        """Part of the images uint8 [N, H, W, C] whose class it names as `labels` int64 [N] do; of a network without
        classes, part of the four turns of each that it tells.
        """
        if self.config.task == "turns":
            turned = [np.rot90(images, turn, axes=(1, 2)) for turn in range(TURNS)]
            return float(np.mean([self.guesses(x, batch) == turn for turn, x in enumerate(turned)]))
        _check_labels(images, labels)
        return float((self.guesses(images, batch) == labels).mean())

    def guesses(self, images: Pixels, batch: int = 256) -> NDArray[np.int64]:
        """The class, or turn, that it takes each of the images uint8 [N, H, W, C] for."""
        self._check(images)
        found = np.empty(len(images), dtype=np.int64)
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                found[start : start + batch] = self(to_model(images[start : start + batch])).argmax(1).numpy()
        return found

    @property
    def preprocessing(self) -> str:
        return PREPROCESSING

    @property
    def digest(self) -> str:
        """sha256 over shape and weights: what a score names its features by."""
        return sha256(self.save())

    def save(self) -> bytes:
        """A safetensors file with the config in its metadata."""
        # One metadata entry: safetensors writes several in no fixed order.
        fields = asdict(self.config)
        if self.config.task == "classes":  # a network with classes is what it was before there were others
            del fields["task"]
        config = canonical_json({"format": FORMAT, "kind": "feature-net", **fields})
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        return safetensors.save(weights, metadata={"config": config})

    @staticmethod
    def load(data: bytes) -> "FeatureNet":
        """The inverse of `save`. DamageError for bytes that are something else, or of an unknown format."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            config: dict[str, Any] = json.loads(header["__metadata__"]["config"])
            kind, version = config.pop("kind"), config.pop("format")
            weights = safetensors.load(data)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DamageError(f"the feature network's file cannot be read: {error}") from None
        if kind != "feature-net" or version != FORMAT:
            raise DamageError(f"the feature network's file is {kind} of format {version}, not {FORMAT}")
        net = FeatureNet(FeatureConfig(**config))
        net.load_state_dict(weights)
        return net.eval()

    def _check(self, images: Pixels) -> None:
        shape, config = images.shape, self.config
        if images.dtype != np.uint8 or len(shape) != 4:
            raise ValueError(f"images must be uint8 [N, H, W, C], not {images.dtype} {list(shape)}")
        if shape[3] != config.channels or min(shape[1:3]) != config.side:
            raise UserError(
                f"the feature network was trained on images of side {config.side} with {config.channels} channels, "
                f"these are {shape[1]} x {shape[2]} with {shape[3]}: evaluate against the dataset it belongs to"
            )


def train_feature_net(
    images: Pixels, labels: NDArray[np.int64], *, width: int = MAX_WIDTH, epochs: int, seed: int, threads: int = 1
) -> FeatureNet:
    """A network trained to name the labels int64 [N] (0-based classes) of images uint8 [N, H, W, C]; where some have
    none, or all have the same, to tell which way square images were turned.

    Runs on `threads` torch threads of this process and puts their number back; global generators stay as they are.
    UserError for images that are too small.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: as many of both, and not none")
    side = min(images.shape[1:3])
    if side < MIN_SIDE:
        raise UserError(f"data.image_size: evaluation needs {MIN_SIDE} pixels or more a side, not {side}")
    has_classes = int(labels.min()) >= 0 and len(np.unique(labels)) > 1
    classes = int(labels.max()) + 1 if has_classes else TURNS
    net = FeatureNet(FeatureConfig(images.shape[3], side, classes, width, "classes" if has_classes else "turns"))
    with torch_threads(threads):
        _initialise(net, seed)
        _fit(net, to_model(images), torch.from_numpy(labels) if has_classes else None, epochs, seed)
    return net.eval()


def _fit(net: FeatureNet, images: Tensor, labels: Tensor | None, epochs: int, seed: int) -> None:
    batch = min(BATCH, len(images))
    batches = len(images) // batch
    steps = epochs * batches
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=_generator(seed, "feature-order", epoch))
        for step in range(epoch * batches, (epoch + 1) * batches):
            rows = order[step % batches * batch :][:batch]
            generator = _generator(seed, "feature-step", step)
            given = images[rows]
            if labels is None:
                told = torch.randint(TURNS, (len(rows),), generator=generator)
                given = torch.stack([x.rot90(int(turn), (1, 2)) for x, turn in zip(given, told, strict=True)])
            else:
                told = labels[rows]
            features = net.pooled(_augment(given, generator))
            # Dropout by hand: torch's own takes the global generator.
            kept = torch.rand(features.shape, generator=generator) >= DROPOUT
            loss = F.cross_entropy(net.classifier(features * kept / (1 - DROPOUT)), told)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _rate((step + 1) / (steps + 1))
            optimizer.step()


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, C, H, W] shifted by whole pixels, its border repeated, with noise on top."""
    n, _, height, width = x.shape
    reach = max(1, round(min(height, width) * SHIFT))
    offset = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + offset[0]).clamp_(0, height - 1)
    columns = (torch.arange(width) + offset[1]).clamp_(0, width - 1)
    moved = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved + NOISE * torch.randn(x.shape, generator=generator)


def _rate(progress: float) -> float:
    """Learning rate over its peak: a straight rise, then half a cosine to 0."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def _initialise(net: FeatureNet, seed: int) -> None:
    """Weights and biases uniform in +-1/sqrt(fan-in); the norms start as the identity.

    The biases matter: started at 0, noise came to lie a quarter less far from the data.
    """
    for norm in net.norms:
        assert isinstance(norm, nn.GroupNorm)
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    for index, layer in enumerate([*net.convolutions, net.classifier]):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        generator = _generator(seed, "feature-init", index)
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    return torch.Generator().manual_seed(noise.key(seed, purpose, *index))


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block on so many torch threads of this process, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_labels(images: Pixels, labels: NDArray[np.int64]) -> None:
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: as many of both, and not none")
    if int(labels.min()) < 0:
        raise UserError(
            "evaluation needs labels, and this data has none: "
            "give data.source as a folder with one folder of images for each class"
        )

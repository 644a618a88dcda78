"""The product's training against the same training written with torch's own tools: every part of the plain objective.

The reference below knows the spec, the contract (docs/determinism.md) and the order of the images; it shares no code
with `pipelines/train`. It differs where it may: AdamW tensor by tensor and not on one flat vector, slots summed one
after the other and not in a tree, a clip factor of clip / (norm + 1e-6). That costs last bits of the gradient, and as
much of a weight, but for a few: where a gradient is about as small as AdamW's eps (1e-8), its last bits decide how far
the weight moves. Hence an absolute tolerance beside the relative one, 1 % of the learning rate; the worst weight seen,
with and without AVX and oneDNN and on one thread or two, differed by 0.4 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec

STEPS, BATCH, SLOTS = 8, 16, 4
RELATIVE, ABSOLUTE = 1e-5, 2e-5


def busy_spec(**overrides: Any) -> Spec:
    """Every ingredient on. Warm-up ends in the fourth step; from there on the average's half-life holds, not its ramp.

    The clip lies among the norms of the gradients, so that some steps are clipped and some are not.
    """
    ingredients: dict[str, Any] = {
        "data__flip": True,
        "model__dropout": 0.3,
        "train__images": STEPS * BATCH,
        "train__global_batch": BATCH,
        "train__slots": SLOTS,
        "train__warmup_images": 56,
        "train__weight_decay": 0.5,
        "train__grad_clip": 2.0,
        "train__ema_half_life": 3,
        "train__log_every": 1,
        "train__checkpoint_every": 1,
        "train__keep_checkpoints": STEPS,
    }
    return tiny_spec(**{**ingredients, **overrides})


@dataclass(frozen=True)
class Step:
    """What a step saw, and the weights after it."""

    loss: float
    gradient_norm: float
    learning_rate: float
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]


def stock_training(spec: Spec, dataset: Dataset) -> list[Step]:
    """Every step of a run, by the book."""
    width, settings = spec.model, spec.train
    config = UNetConfig(channels=tuple(width.channels), blocks=width.blocks, groups=width.groups, dropout=width.dropout)
    model = UNet(config, spec.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    states = []
    for step in range(STEPS):
        seen = (step + 1) * BATCH
        optimizer.zero_grad()
        losses = [slot_loss(spec, dataset, model, step, slot) for slot in range(SLOTS)]
        clip = float("inf") if settings.grad_clip is None else settings.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        rate = settings.learning_rate * (min(1.0, seen / settings.warmup_images) if settings.warmup_images else 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        keep = 0.5 ** (BATCH / min(settings.ema_half_life, 0.05 * seen))
        ema = {name: keep * ema[name] + (1 - keep) * weights[name] for name in weights}
        states.append(Step(sum(losses) / SLOTS, float(norm), rate, weights, ema))
    return states


def slot_loss(spec: Spec, dataset: Dataset, model: torch.nn.Module, step: int, slot: int) -> float:
    """Forward and backward of one slot: its share of the mean's gradient is added to `.grad`."""
    process = GaussianDiffusion(NoiseSchedule.cosine(spec.diffusion.timesteps))
    split, size = dataset.split("train"), BATCH // SLOTS

    def key(purpose: str) -> int:
        return noise.key(spec.seed, purpose, step, slot)

    positions = np.arange((step * SLOTS + slot) * size, (step * SLOTS + slot + 1) * size)
    pixels, _ = Reader(split).read(*split.order(spec.data.window, spec.seed).locate(positions))
    if spec.data.flip:
        words = noise.bits([key("flip")], size)[0].tolist()
        pixels = np.stack([p[:, ::-1] if w >= 2**31 else p for p, w in zip(pixels, words, strict=True)])
    x0 = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    t = noise.integers([key("timestep")], size, 1, process.timesteps)[0]
    eps = noise.normal([key("eps")], x0.shape)[0]
    torch.manual_seed(key("dropout") >> 1)  # a seed has 63 bits
    loss = ((model(process.q_sample(x0, t, eps), t - 1) - eps) ** 2).mean()
    (loss / SLOTS).backward()
    return loss.item()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = tiny_spec().data
    return ingest(
        data.source,
        Place.of(tmp_path_factory.mktemp("data") / "digits"),
        image_size=data.image_size,
        channels=data.channels,
        held_out=data.held_out,
        shard_images=data.shard_images,
    )


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Every step of the product's own run."""
    spec = busy_spec()
    run = Run.of(spec, dataset.digest, Place.of(tmp_path_factory.mktemp("store")))
    run.describe(spec, dataset.digest)
    train(spec, dataset, run)
    states = []
    for row in run.journal.read(STEPS):
        checkpoint = run.checkpoints.load(row.step)
        exact = {name: row.exact[name] for name in ("loss", "gradient_norm", "learning_rate")}
        states.append(Step(**exact, model=checkpoint.model, ema=checkpoint.ema))
    return states


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference between two sets of tensors; 1 is the tolerance."""
    assert ours.keys() == theirs.keys()
    apart = [(ours[name] - theirs[name]).abs() / (ABSOLUTE + RELATIVE * theirs[name].abs()) for name in theirs]
    return float(torch.stack([difference.max() for difference in apart]).max())  # NaN where there is one


def test_training_is_what_stock_tools_make_of_the_same_spec(dataset: Dataset, trained: list[Step]) -> None:
    expected = stock_training(busy_spec(), dataset)
    for step, (ours, theirs) in enumerate(zip(trained, expected, strict=True), start=1):
        assert ours.learning_rate == pytest.approx(theirs.learning_rate, rel=1e-12), f"step {step}"
        assert ours.loss == pytest.approx(theirs.loss, rel=RELATIVE), f"step {step}"
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=RELATIVE), f"step {step}"
        assert distance(ours.model, theirs.model) < 1, f"weights of step {step}"
        assert distance(ours.ema, theirs.ema) < 1, f"moving average of step {step}"


@pytest.mark.parametrize(
    "change",
    [
        {"data__flip": False},
        {"model__dropout": 0.0},
        {"train__warmup_images": 0},
        {"train__weight_decay": 0.0},
        {"train__grad_clip": None},
        {"train__grad_clip": 1.0},
        {"train__ema_half_life": 50},
    ],
    ids=str,
)
def test_one_ingredient_changed_is_far_beyond_the_tolerance(
    dataset: Dataset, trained: list[Step], change: dict[str, Any]
) -> None:
    other, last = stock_training(busy_spec(**change), dataset)[-1], trained[-1]
    assert max(distance(last.model, other.model), distance(last.ema, other.ema)) > 10

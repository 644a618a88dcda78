"""The product's training against the same training written with torch's own tools: every option of the objective.

The reference below knows the spec, the contract (docs/determinism.md) and the order of the images; it shares no code
with `pipelines/train` and `pipelines/build.py`, and takes the bound's losses from `ddpm_core`, where they have tests of
their own. It differs where it may: AdamW tensor by tensor and not on one flat vector, slots summed one after the other
and not in a tree, a clip factor of clip / (norm + 1e-6). That costs last bits of the gradient, and as much of a weight,
but for a few: where a gradient is about as small as AdamW's eps (1e-8), its last bits decide how far the weight moves.
Hence an absolute tolerance beside the relative one, 1 % of the learning rate; the worst weight seen, with and without
AVX and oneDNN and on one thread or two, differed by 0.4 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, losses, noise, timesteps
from ddpm_core.diffusion import Network
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec

STEPS, BATCH, SLOTS, CLASSES = 8, 16, 4, 10
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


PLAIN: dict[str, Any] = {"train__images": 3 * BATCH, "train__warmup_images": 0, "train__grad_clip": 100.0}
WITH_CLASSES: dict[str, Any] = {"model__classes": CLASSES, "train__label_dropout": 0.4}
LEARNED: dict[str, Any] = {"diffusion__variance": "learned_range"}
MIN_SNR: dict[str, Any] = {"kind": "min_snr", "gamma": 2.0}
P2: dict[str, Any] = {"kind": "p2", "gamma": 0.5, "k": 3.0}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "min_snr": {"train__weighting": MIN_SNR},
    "p2": {"train__weighting": P2},
    "mean_matching": {"train__loss": "mean_matching"},
    "vlb": {"train__loss": "vlb"},
    "importance": {"train__timesteps": "importance"},
    "classes": WITH_CLASSES,
    "hybrid": {**LEARNED, "train__loss": "hybrid"},
    "all at once": {
        **LEARNED,
        **WITH_CLASSES,
        "train__loss": "hybrid",
        "train__weighting": P2,
        "train__timesteps": "importance",
    },
    "vlb of a learned variance": {**LEARNED, "train__loss": "vlb", "train__timesteps": "importance"},
}
"""What is trained, beside the plain objective; in three steps."""


@dataclass(frozen=True)
class Step:
    """What a step saw, and the weights after it."""

    loss: float
    gradient_norm: float
    learning_rate: float
    quartiles: Mapping[str, float]
    """The mean loss of the timesteps in each quarter by log-SNR, as if they had been drawn evenly."""
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]


def stock_training(spec: Spec, dataset: Dataset) -> list[Step]:
    """Every step of a run, by the book."""
    width, settings = spec.model, spec.train
    config = UNetConfig(
        channels=tuple(width.channels),
        blocks=width.blocks,
        groups=width.groups,
        dropout=width.dropout,
        num_classes=width.classes,
        learned_variance=spec.diffusion.variance == "learned_range",
    )
    model = UNet(config, spec.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    states = []
    for step in range(settings.images // BATCH):
        seen = (step + 1) * BATCH
        optimizer.zero_grad()
        slots = [of_slot(spec, dataset, model, step, slot) for slot in range(SLOTS)]
        t, counted, importance = map(torch.cat, zip(*slots, strict=True))
        clip = float("inf") if settings.grad_clip is None else settings.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        rate = settings.learning_rate * (min(1.0, seen / settings.warmup_images) if settings.warmup_images else 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        live = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        keep = 0.5 ** (BATCH / min(settings.ema_half_life, 0.05 * seen))
        ema = {name: keep * ema[name] + (1 - keep) * live[name] for name in live}
        states.append(
            Step(float(counted.mean()), float(norm), rate, by_quartile(spec, t, counted, importance), live, ema)
        )
    return states


def by_quartile(spec: Spec, t: Tensor, counted: Tensor, importance: Tensor) -> dict[str, float]:
    """What the journal says of a step's timesteps [N], weighted losses [N] and weights [N]."""
    log_snr = NoiseSchedule.cosine(spec.diffusion.timesteps).log_snr.numpy()
    quarter = np.searchsorted(np.quantile(log_snr, [0.25, 0.5, 0.75]), log_snr[t.numpy() - 1])
    means = {q: counted[quarter == q].sum() / importance[quarter == q].sum() for q in set(quarter.tolist())}
    return {f"loss_log_snr_q{q + 1}": float(mean) for q, mean in means.items()}


def of_slot(
    spec: Spec, dataset: Dataset, model: torch.nn.Module, step: int, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward of one slot: its share of the mean's gradient is added to `.grad`.

    The timesteps, the losses as they count and their weights, [N] each.
    """
    process = GaussianDiffusion(NoiseSchedule.cosine(spec.diffusion.timesteps), variance=spec.diffusion.variance)
    split, size = dataset.split("train"), BATCH // SLOTS

    def key(purpose: str) -> int:
        return noise.key(spec.seed, purpose, step, slot)

    positions = np.arange((step * SLOTS + slot) * size, (step * SLOTS + slot + 1) * size)
    pixels, labels = Reader(split).read(*split.order(spec.data.window, spec.seed).locate(positions))
    if spec.data.flip:
        words = noise.bits([key("flip")], size)[0].tolist()
        pixels = np.stack([p[:, ::-1] if w >= 2**31 else p for p, w in zip(pixels, words, strict=True)])
    x0 = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    weights = torch.ones(size)
    if spec.train.timesteps == "importance":
        density = timesteps.vlb_density(process).numpy()
        at = np.searchsorted(np.cumsum(density), noise.uniform([key("timestep")], size)[0].numpy(), side="right")
        t, weights = torch.from_numpy(at + 1), torch.from_numpy(1 / (process.timesteps * density[at])).float()
    else:
        t = noise.integers([key("timestep")], size, 1, process.timesteps)[0]
    eps = noise.normal([key("eps")], x0.shape)[0]
    given: tuple[Tensor, ...] = ()
    if spec.model.classes is not None:
        hidden = noise.uniform([key("label")], size)[0].numpy() < spec.train.label_dropout
        given = (torch.from_numpy(np.where(hidden, CLASSES, labels.astype(np.int64))),)
    torch.manual_seed(key("dropout") >> 1)  # a seed has 63 bits
    counted = weights * objective(spec, process, lambda x_t, at: model(x_t, at, *given), x0, t, eps)
    (counted.mean() / SLOTS).backward()
    return t, counted.detach().double(), weights.double()


def objective(spec: Spec, process: GaussianDiffusion, network: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The loss of each image [N]; the weights are those of the squared error of eps."""

    def weighting(process: GaussianDiffusion, t: Tensor) -> Tensor:
        snr = process.schedule.alpha_bar[t - 1] / (1 - process.schedule.alpha_bar[t - 1])
        match spec.train.weighting.model_dump():
            case {"kind": "min_snr", "gamma": gamma}:
                return (snr.clamp(max=gamma) / snr).float()
            case {"kind": "p2", "gamma": gamma, "k": k}:
                return ((k + snr) ** -gamma).float()
        return torch.ones(len(t))

    match spec.train.loss:
        case "mean_matching":
            return losses.mean_matching(process, network, x0, t, eps)
        case "vlb":
            return losses.vlb(process, network, x0, t, eps)
        case "hybrid":
            return losses.hybrid(process, network, x0, t, eps, weighting)
    error = network(process.q_sample(x0, t, eps), t - 1) - eps
    return weighting(process, t) * (error**2).flatten(1).mean(1)


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


def product_training(spec: Spec, dataset: Dataset, store: Path) -> list[Step]:
    """Every step of the product's own run."""
    run = Run.of(spec, dataset.digest, Place.of(store))
    run.describe(spec, dataset.digest)
    train(spec, dataset, run)
    states = []
    for row in run.journal.read(spec.train.total_steps):
        checkpoint = run.checkpoints.load(row.step)
        exact = {name: row.exact[name] for name in ("loss", "gradient_norm", "learning_rate")}
        quartiles = {name: mean for name, mean in row.exact.items() if name.startswith("loss_log_snr_q")}
        states.append(Step(**exact, quartiles=quartiles, model=checkpoint.model, ema=checkpoint.ema))
    return states


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    return product_training(busy_spec(), dataset, tmp_path_factory.mktemp("store"))


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference between two sets of tensors; 1 is the tolerance."""
    assert ours.keys() == theirs.keys()
    apart = [(ours[name] - theirs[name]).abs() / (ABSOLUTE + RELATIVE * theirs[name].abs()) for name in theirs]
    return float(torch.stack([difference.max() for difference in apart]).max())  # NaN where there is one


def assert_alike(trained: list[Step], expected: list[Step]) -> None:
    for step, (ours, theirs) in enumerate(zip(trained, expected, strict=True), start=1):
        assert ours.learning_rate == pytest.approx(theirs.learning_rate, rel=1e-12), f"step {step}"
        assert ours.loss == pytest.approx(theirs.loss, rel=RELATIVE), f"step {step}"
        assert ours.quartiles == pytest.approx(theirs.quartiles, rel=RELATIVE), f"step {step}"
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=RELATIVE), f"step {step}"
        assert distance(ours.model, theirs.model) < 1, f"weights of step {step}"
        assert distance(ours.ema, theirs.ema) < 1, f"moving average of step {step}"


def test_training_is_what_stock_tools_make_of_the_same_spec(dataset: Dataset, trained: list[Step]) -> None:
    assert_alike(trained, stock_training(busy_spec(), dataset))


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_is_what_stock_tools_make_of_it(
    dataset: Dataset, options: dict[str, Any], tmp_path: Path
) -> None:
    spec = busy_spec(**{**PLAIN, **options})
    assert_alike(product_training(spec, dataset, tmp_path), stock_training(spec, dataset))


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


@pytest.mark.parametrize(
    "change",
    [
        {"diffusion__variance": "large", "train__loss": "simple"},
        {"train__loss": "vlb", "train__weighting": {"kind": "uniform"}},
        {"train__weighting": {"kind": "uniform"}},
        {"train__weighting": {**P2, "k": 2.0}},
        {"train__weighting": {**P2, "gamma": 0.6}},
        {"train__weighting": MIN_SNR},
        {"train__timesteps": "uniform"},
        {"train__label_dropout": 0.0},
        {"train__label_dropout": 0.5},
    ],
    ids=str,
)
def test_one_option_changed_is_far_beyond_the_tolerance(dataset: Dataset, change: dict[str, Any]) -> None:
    options = {**PLAIN, **OBJECTIVES["all at once"]}
    one, other = (stock_training(busy_spec(**each), dataset)[-1] for each in (options, {**options, **change}))
    shared = [name for name, weight in one.model.items() if other.model[name].shape == weight.shape]
    assert distance({name: one.model[name] for name in shared}, {name: other.model[name] for name in shared}) > 10

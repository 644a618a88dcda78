"""Training is a pure function of spec and data: the same bits for any number of workers, and after any stop."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.order import slot_positions
from pipelines.data.reader import Reader
from pipelines.models import of_checkpoint
from pipelines.spec import Spec, parse_spec
from pipelines.store import Place
from pipelines.train.loop import Outcome, Trainer, World, train, train_from_config
from pipelines.train.run import Run
from tests.conftest import tiny_spec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = tiny_spec().data
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest(
        data.source,
        out,
        image_size=data.image_size,
        channels=data.channels,
        held_out=data.held_out,
        shard_images=data.shard_images,
    )


def keyed_spec(**overrides: Any) -> Spec:
    """Everything on that must not depend on who computes or on a stop: what is drawn, and what has a clock.

    Neither the warm-up nor the ramp of the average is over at the first checkpoint, after 160 images.
    """
    keyed: dict[str, Any] = {
        "data__flip": True,
        "data__shift": 1,
        "model__dropout": 0.3,
        "train__warmup_images": 250,
        "train__weight_decay": 0.1,
        "train__ema_half_life": 16,
    }
    return tiny_spec(**{**keyed, **overrides})


def conditional_spec(**overrides: Any) -> Spec:
    """What else is drawn or summed: hidden labels, timesteps by importance, the bound; and averages of any length."""
    options: dict[str, Any] = {
        "model__classes": 10,
        "diffusion__variance": "learned_range",
        "train__loss": "hybrid",
        "train__timesteps": "importance",
        "train__label_dropout": 0.3,
        "train__ema_profiles": [0.05, 0.1],
        "train__images": 320,
        "sample__ema_length": 0.08,
    }
    return keyed_spec(**{**options, **overrides})


def make_run(spec: Spec, dataset: Dataset, store: Path) -> Run:
    run = Run.of(spec, dataset.digest, Place.of(store))
    run.describe(spec, dataset.digest)
    return run


def _rank(rank: int, size: int, configs: list[dict[str, object]], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    for config in configs:
        spec = parse_spec(config["spec"])
        if (world := World.among(rank, size, spec.train.slots)) is not None:
            train_from_config(config, world)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Outcome]:
    """One worker, no stop."""
    run = make_run(keyed_spec(), dataset, tmp_path_factory.mktemp("one"))
    return run, train(keyed_spec(), dataset, run)


def exact_rows(run: Run) -> list[tuple[int, dict[str, float]]]:
    return [(row.step, row.exact) for row in run.journal.read(10**9)]


def assert_same_bits(run: Run, other: Run, step: int) -> None:
    """Two runs' states at a step, and all that their journals hold of the steps up to it."""
    ours, theirs = run.checkpoints.digests(step), other.checkpoints.digests(step)
    for name in ("model", "ema", "optimizer"):
        assert ours[f"{name}.safetensors"] == theirs[f"{name}.safetensors"], name
    assert exact_rows(run) == exact_rows(other)


def test_two_workers_make_the_same_bits_as_one(
    dataset: Dataset, undisturbed: tuple[Run, Outcome], tmp_path: Path
) -> None:
    in_bfloat16 = keyed_spec(train__workers=2, train__precision="bfloat16", train__images=320)
    specs = [keyed_spec(train__workers=2), conditional_spec(train__workers=2, train__checkpoint_every=3), in_bfloat16]
    runs = [make_run(spec, dataset, tmp_path) for spec in specs]
    configs = [
        {"spec": spec.model_dump(mode="json"), "dataset": str(dataset.place), "run": str(run.place)}
        for spec, run in zip(specs, runs, strict=True)
    ]
    torch.multiprocessing.spawn(_rank, (2, configs, str(tmp_path)), nprocs=2)
    alone, outcome = undisturbed
    assert runs[0].name == alone.name
    assert_same_bits(runs[0], alone, outcome.step)

    alone = make_run(conditional_spec(), dataset, tmp_path / "alone")
    outcome = train(conditional_spec(), dataset, alone)
    assert runs[1].name == alone.name
    assert_same_bits(runs[1], alone, outcome.step)
    averages = [of_checkpoint(run, outcome.step) for run in (runs[1], alone)]
    assert averages[0].average.startswith("power function, sigma_rel 0.08")
    assert averages[0].weights == averages[1].weights

    alone = make_run(in_bfloat16, dataset, tmp_path / "alone")
    outcome = train(in_bfloat16, dataset, alone)
    assert runs[2].name == alone.name != runs[0].name
    assert_same_bits(runs[2], alone, outcome.step)
    weights = alone.checkpoints.load(outcome.step).model
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    # Another rounding of the same training: near the one in float32, and not the same.
    losses = [[row.exact["loss"] for row in run.journal.read(outcome.step)] for run in (runs[0], alone)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_worker_too_many_has_nothing_to_do_and_ranks_share_a_score(dataset: Dataset, tmp_path: Path) -> None:
    """Three processes, four slots: two share them, and the scores; both end where these say."""
    train_fields = {**keyed_spec().train.model_dump(), "workers": 3, "learning_rate": 1e-12, "images": 3200}
    ends = {"score": {"every_images": 64, "images": 20, "timesteps": 2, "grid": 2}, "plateau": {"patience_images": 128}}
    spec = keyed_spec(train={**train_fields, **ends})
    run, alone = (make_run(spec, dataset, tmp_path / name) for name in ("three", "one"))
    config = {"spec": spec.model_dump(mode="json"), "dataset": str(dataset.place), "run": str(run.place)}
    torch.multiprocessing.spawn(_rank, (3, [config], str(tmp_path)), nprocs=3)
    outcome = train(spec, dataset, alone)
    assert outcome.why == "plateau"
    assert_same_bits(run, alone, outcome.step)
    assert len(list(run.place.path.glob("workers/*"))) == 2
    assert run.scores.steps() == alone.scores.steps()
    for ours, theirs in zip(run.scores.all(), alone.scores.all(), strict=True):
        assert (ours.bits_per_dim, ours.low, ours.error) == (theirs.bits_per_dim, theirs.low, theirs.error)
        assert run.scores.picture(ours.step).read() == alone.scores.picture(ours.step).read()


def test_a_stopped_run_goes_on_to_the_same_bits(
    dataset: Dataset, undisturbed: tuple[Run, Outcome], tmp_path: Path
) -> None:
    alone, outcome = undisturbed
    run = make_run(keyed_spec(), dataset, tmp_path)

    def die(trainer: Trainer) -> None:
        trainer.take_step(stream := trainer.stream())  # a step that no checkpoint holds
        stream.close()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(keyed_spec(), dataset, run, at_checkpoint=die)
    assert run.checkpoints.steps() == [5]
    resumed = train(keyed_spec(), dataset, run)
    assert (resumed.step, resumed.attempt) == (outcome.step, 2)
    assert_same_bits(run, alone, outcome.step)


def test_all_ranks_stop_at_the_same_step_when_they_are_asked_to(dataset: Dataset, tmp_path: Path) -> None:
    spec = keyed_spec(train__workers=2, train__images=10**7, train__checkpoint_every=10**6)
    run = make_run(spec, dataset, tmp_path)
    config = {"spec": spec.model_dump(mode="json"), "dataset": str(dataset.place), "run": str(run.place)}
    ranks = torch.multiprocessing.spawn(_rank, (2, [config], str(tmp_path)), nprocs=2, join=False)
    try:
        wait_for(lambda: run.newest_attempt() == 1)
        run.ask("checkpoint")
        wait_for(lambda: len(run.checkpoints.steps()) == 1)
        assert run.asked() is None
        run.ask("stop")
        wait_for(lambda: ranks.join(timeout=1))
    finally:
        for process in ranks.processes:
            process.kill()
    _, last = run.checkpoints.steps()
    assert [row.step for row in run.journal.read(10**9)] == list(range(1, last + 1))
    # Gone on with to a length that another run has: the same bits.
    whole = make_run(keyed_spec(train__images=last * 32), dataset, tmp_path / "whole")
    train(keyed_spec(train__images=last * 32), dataset, whole)
    assert_same_bits(run, whole, last)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_longer_run_continues_a_shorter_one(
    dataset: Dataset, undisturbed: tuple[Run, Outcome], tmp_path: Path
) -> None:
    alone, outcome = undisturbed
    run = make_run(keyed_spec(), dataset, tmp_path)
    train(keyed_spec(train__images=200, train__checkpoint_every=3), dataset, run)
    assert run.checkpoints.steps()[-1] == 7  # 200 images are 6.25 batches: a whole one more
    train(keyed_spec(), dataset, run)
    assert_same_bits(run, alone, outcome.step)


def test_the_first_step_is_what_the_contract_says(dataset: Dataset, tmp_path: Path) -> None:
    """The same step with torch's own tools: one batch in contract order, one backward, stock AdamW."""
    spec = tiny_spec()
    process = GaussianDiffusion(NoiseSchedule.cosine(50))
    model = UNet(UNetConfig(channels=(16, 16), groups=8), spec.seed)
    reader, order = Reader(dataset.split("train")), dataset.split("train").order(spec.data.window, spec.seed)
    losses = []
    for slot in range(4):
        pixels, _ = reader.read(*order.locate(slot_positions(0, slot, 4, 32)))
        x0 = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        t = noise.integers([noise.key(spec.seed, "timestep", 0, slot)], 8, 1, 50)[0]
        eps = noise.normal([noise.key(spec.seed, "eps", 0, slot)], (8, 1, 8, 8))[0]
        losses.append(((model(process.q_sample(x0, t, eps), t - 1) - eps) ** 2).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=spec.train.learning_rate, weight_decay=0.0).step()

    run = make_run(spec, dataset, tmp_path)
    train(tiny_spec(train__images=32, train__log_every=1), dataset, run)
    row = next(iter(run.journal.read(1)))
    assert row.exact["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row.exact["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    trained = run.checkpoints.load(1).model
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_a_superseded_attempt_writes_no_more(dataset: Dataset, tmp_path: Path) -> None:
    run = make_run(tiny_spec(), dataset, tmp_path)
    zombie = Trainer(tiny_spec(), dataset, run, World())
    with zombie.stream() as stream:
        zombie.take_step(stream)
    run.claim_attempt()
    zombie.save()
    with pytest.raises(RuntimeError, match="superseded"):
        zombie.recorder.settle()
    assert run.checkpoints.steps() == []
    assert run.journal.read(10**9) is not None
    assert list(run.journal.read(10**9)) == []


def test_training_learns(undisturbed: tuple[Run, Outcome]) -> None:
    rows = [exact["loss"] for _, exact in exact_rows(undisturbed[0])]
    assert sum(rows[-5:]) < 0.7 * sum(rows[:5])


def test_flips_are_keyed_and_change_the_run(dataset: Dataset, tmp_path: Path) -> None:
    digests = []
    for place in ("a", "b"):
        spec = tiny_spec(data__flip=True, train__images=64)
        run = make_run(spec, dataset, tmp_path / place)
        train(spec, dataset, run)
        digests.append(run.checkpoints.digests(2)["model.safetensors"])
    plain = make_run(tiny_spec(train__images=64), dataset, tmp_path / "c")
    train(tiny_spec(train__images=64), dataset, plain)
    assert digests[0] == digests[1] != plain.checkpoints.digests(2)["model.safetensors"]

"""Gradients that are not finite: such a step is skipped by all ranks alike, many in a row end the run with a cause."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_core import noise
from pipelines.build import build_model
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.diagnosis import SlotInputs, diagnose
from pipelines.train.loop import MOST_SKIPPED, Trainer, World, train
from pipelines.train.run import Run
from tests.conftest import tiny_spec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=128)


def run_of(spec: Spec, dataset: Dataset, store: Path) -> Run:
    run = Run.of(spec, dataset.digest, Place.of(store))
    run.describe(spec, dataset.digest)
    return run


@pytest.fixture
def broken_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps, counted from 0, in whose slot 2 the middle of the network makes infinity of image 3."""
    steps: set[int] = set()
    drawn = {noise.integers([noise.key(0, "timestep", step, 2)], 8, 1, 50)[0]: step for step in range(100)}
    known = {tuple((t - 1).tolist()): step for t, step in drawn.items()}

    def build(spec: Spec) -> torch.nn.Module:
        model = build_model(spec)
        is_broken = [False]

        def look(module: torch.nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> None:
            is_broken[0] = known.get(tuple(given[1].tolist())) in steps

        def spoil(module: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
            if not is_broken[0]:
                return output
            factors = torch.ones(len(output), 1, 1, 1)
            factors[3] = math.inf
            return output * factors

        model.register_forward_pre_hook(look)
        model.get_submodule(LAYER).register_forward_hook(spoil)
        return model

    monkeypatch.setattr("pipelines.train.loop.build_model", build)
    return steps


LAYER = "middle.blocks.0.conv1"
SPEC = {"seed": 0, "train__log_every": 1, "train__images": 12 * 32, "train__ema_profiles": [0.1]}


def test_a_step_that_is_not_finite_moves_the_clock_alone(
    dataset: Dataset, broken_steps: set[int], tmp_path: Path
) -> None:
    broken_steps |= {4, 6, 7}
    spec = tiny_spec(**SPEC)
    run = run_of(spec, dataset, tmp_path / "one")
    torch.set_num_threads(spec.train.threads)
    trainer = Trainer(spec, dataset, run, World())
    before = {}
    with trainer.stream() as stream:
        for step in range(12):
            weights = trainer.state.weights.detach().clone()
            trainer.take_step(stream)
            before[step] = torch.equal(weights, trainer.state.weights)
        trainer.save()
        trainer.recorder.finish()
    assert [step for step, same in before.items() if same] == [4, 6, 7]
    rows = list(run.journal.read(12))
    assert [row.exact["skipped"] for row in rows] == [0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3]
    assert ["loss" in row.exact for row in rows] == [step not in (4, 6, 7) for step in range(12)]
    assert all(math.isfinite(value) for row in rows for value in row.exact.values())
    # Stopped between two skipped steps and gone on with: the same bits, the optimizer's count among them.
    other = run_of(spec, dataset, tmp_path / "two")
    train(tiny_spec(**{**SPEC, "train__images": 7 * 32}), dataset, other)
    train(spec, dataset, other)
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "profiles.safetensors", "state.json"):
        assert other.checkpoints.digests(12)[name] == run.checkpoints.digests(12)[name], name
    assert [row.exact for row in other.journal.read(12)] == [row.exact for row in rows]


def test_too_many_in_a_row_end_the_run_with_layer_timestep_and_image(
    dataset: Dataset, broken_steps: set[int], tmp_path: Path
) -> None:
    broken_steps |= {0, 1, 2, 3, *range(6, 20)}
    spec = tiny_spec(**{**SPEC, "train__checkpoint_every": 1})
    run = run_of(spec, dataset, tmp_path)
    with pytest.raises(Failed) as error:
        train(spec, dataset, run)
    said = str(error.value)
    assert f"not finite {MOST_SKIPPED} steps in a row, up to step 11: first in the output of {LAYER}, for " in said
    assert str(run.checkpoints.at(6)) in said
    order = dataset.split("train").order(spec.data.window, 0)
    shards, rows = order.locate(np.array([10 * 32 + 2 * 8 + 3]))
    shard = dataset.split("train").shard(int(shards[0])).name
    t = noise.integers([noise.key(0, "timestep", 10, 2)], 8, 1, 50)[0][3]
    assert f"{LAYER}, for {shard} row {rows[0]} at t = {t}; its last good" in said
    assert run.checkpoints.steps()[-1] == 6
    # A step that is skipped does not make room: what was good is there.
    with pytest.raises(Failed, match="up to step 11"):
        train(spec, dataset, run)


def test_a_run_that_diverges_by_its_own_doing_is_told_where(dataset: Dataset, tmp_path: Path) -> None:
    spec = tiny_spec(train__learning_rate=1e30, train__checkpoint_every=1)
    run = run_of(spec, dataset, tmp_path)
    with pytest.raises(Failed, match=r"up to step 6: .* at t = .*its last good checkpoint is .*000000001;"):
        train(spec, dataset, run)
    assert run.checkpoints.steps() == [1]


def test_gradients_alone_can_fail() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    x = torch.ones(4, 2)

    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * math.inf

    def losses() -> torch.Tensor:
        return model[1](Cliff.apply(model[0](x))).squeeze(1) ** 2

    slot = SlotInputs(["a", "b", "c", "d"], torch.arange(4), losses)
    assert diagnose(model, [slot]) == "in the gradient of 0.bias, of losses that are finite"
    whole = SlotInputs(["a", "b", "c", "d"], torch.arange(4), lambda: model(x).squeeze(1) ** 2)
    assert diagnose(model, [whole]) is None
    with torch.no_grad():
        model[1].weight.fill_(math.inf)
    assert diagnose(model, [whole]) == ("first in the output of 1, for a at t = 0, b at t = 1, c at t = 2, d at t = 3")

"""The benchmark of training, at a size that says nothing: that its sides do the same work and its rows mean it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.stepping import table
from benchmarks.stepping.account import EXCHANGE, FORWARD_BACKWARD, MERGING, OPTIMIZER, REST, Account
from benchmarks.stepping.bare import BareLoop, images_in_memory
from benchmarks.stepping.processes import run_group
from benchmarks.stepping.product import Race, amortised
from benchmarks.training import Kept
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.store import Place
from pipelines.train.world import World
from tests.conftest import tiny_spec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = tiny_spec().data
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest(
        data.source, out, image_size=data.image_size, channels=1, held_out=data.held_out, shard_images=data.shard_images
    )


def test_a_checkpoint_counts_as_often_as_the_preset_has_it() -> None:
    race = Race(steps=15, skip=3, checkpoint_every=8, following=7, log_every=5)
    slow = {9: 0.5, 11: 1.5}  # seconds that steps after a checkpoint take longer
    seconds = {step: (9.0 if step <= 3 else 2.0) + slow.get(step, 0.0) for step in range(2, 16)}
    long_run = [2.0 + slow.get(8 + (step - 1) % 250 + 1, 0.0) for step in range(1, 1001)]  # four intervals of 250
    assert amortised(seconds, race, 250) == pytest.approx(sum(long_run) / 1000)


def test_whole_intervals_count_as_they_are() -> None:
    race = Race(steps=15, skip=2, checkpoint_every=5, following=5, log_every=5)
    seconds = {step: float(step**2) for step in range(2, 16)}
    assert race.saves() == [5, 10]
    assert amortised(seconds, race, 5) == pytest.approx(sum(step**2 for step in range(6, 16)) / 10)


@pytest.mark.parametrize("slots", [1, 4])
def test_the_peer_takes_the_same_step_whichever_way_its_gradients_are_summed(dataset: Dataset, slots: int) -> None:
    spec, images = tiny_spec(train__slots=slots), images_in_memory(dataset)
    loops = []
    for tree in (True, False):
        loop = BareLoop(spec, images, World(), tree=tree)  # which seeds torch
        for _ in range(2):
            loop.step()
        loops.append(loop)
    first = torch.nn.utils.parameters_to_vector(BareLoop(spec, images, World()).parameters).detach()
    tree, plain = (torch.nn.utils.parameters_to_vector(loop.parameters).detach() for loop in loops)
    assert loops[0].losses == pytest.approx(loops[1].losses, rel=1e-4)
    moved = float((plain - first).abs().max())
    assert moved > 1e-3
    assert float((tree - plain).abs().max()) < moved / 20


def test_the_average_of_the_peer_follows_its_weights(dataset: Dataset) -> None:
    spec = tiny_spec(train__ema_half_life=32)  # a batch: the new weights count half
    loop = BareLoop(spec, images_in_memory(dataset), World())
    before = torch.nn.utils.parameters_to_vector(loop.average)
    loop.step()
    after = torch.nn.utils.parameters_to_vector(loop.parameters).detach()
    average = torch.nn.utils.parameters_to_vector(loop.average)
    assert torch.allclose(average, (before + after) / 2, atol=1e-7)
    assert not torch.allclose(before, after, atol=1e-4)


def test_a_group_takes_turns_and_its_account_is_whole(dataset: Dataset) -> None:
    spec = tiny_spec(train__workers=2, train__images=32 * 60)
    common: dict[str, Any] = {"dataset": str(dataset.place)}
    turns = run_group(
        "benchmarks.stepping.turns:reduction", 2, 1, spec=spec.model_dump(mode="json"), rounds=2, steps=2, **common
    )
    assert [set(one) for one in turns] == [{"tree", "all-reduce"}] * 2
    one = tiny_spec(train__images=32 * 60)
    turns = run_group(
        "benchmarks.stepping.turns:sharing",
        2,
        1,
        specs={"one": one.model_dump(mode="json"), "two": spec.model_dump(mode="json")},
        sizes={"one": 1, "two": 2},
        rounds=2,
        steps=2,
        **common,
    )
    assert [set(one) for one in turns] == [{"one", "two"}] * 2
    told = run_group(
        "benchmarks.stepping.account:account",
        2,
        1,
        spec=spec.model_dump(mode="json"),
        checkpoint_every=3,
        checkpoints=2,
        **common,
    )
    assert sum(told["shares"].values()) == pytest.approx(1)
    for part in (FORWARD_BACKWARD, EXCHANGE, MERGING, OPTIMIZER, REST):
        assert 0 < told["shares"][part] < 1, part
    assert len(told["blocked"]) == 2


def test_a_rank_that_fails_ends_its_group(dataset: Dataset) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="a process of its group failed"):
        run_group("benchmarks.stepping.turns:reduction", 2, 1, spec={}, dataset="", rounds=1, steps=1)
    assert time.monotonic() - began < 60


def test_a_part_of_a_step_counts_without_the_parts_that_it_calls() -> None:
    class Work:
        def outer(self) -> None:
            time.sleep(0.05)
            self.inner()

        def inner(self) -> None:
            time.sleep(0.2)

    account = Account()
    account.wrap(Work, "outer", "outside")
    account.wrap(Work, "inner", "inside")
    began = time.perf_counter()
    Work().outer()
    whole = time.perf_counter() - began
    assert account.seconds["inside"] >= 0.2
    assert 0.05 <= account.seconds["outside"] <= whole - account.seconds["inside"]


def test_an_interrupted_stage_goes_on_with_the_rounds_that_are_missing(tmp_path: Path) -> None:
    def interrupted(number: int, missing: int) -> list[dict[str, Any]]:
        assert (number, missing) == (len(made), 4 - len(made))
        if number == 2:
            raise KeyboardInterrupt
        made.append(number)
        return [{"seconds": number}]

    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path / "rounds.json", resume=False).collect("race", 4, interrupted)
    resumed = Kept(tmp_path / "rounds.json", resume=True)
    resumed.collect("race", 4, lambda number, missing: [{"seconds": number + n} for n in range(missing)])
    assert [one["seconds"] for one in resumed.rounds["race"]] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "rounds.json").read_text()) == resumed.rounds
    assert Kept(tmp_path / "rounds.json", resume=False).rounds == {}


def test_a_row_is_the_median_and_its_verdict_knows_which_way_is_better() -> None:
    made = {one.name: one for one in table.measures(["fashion-mnist", "digits"])}
    race = made["product-vs-loop"].row([{"bare": bare, "product": 1.0} for bare in (0.9, 0.96, 1.2)])
    assert (race.median, race.least, race.greatest, race.verdict) == (0.96, 0.9, 1.2, "met, the goal is not")
    assert race.low == pytest.approx(0.93)
    assert race.high == pytest.approx(1.08)
    assert made["product-vs-loop"].row([{"bare": 0.9, "product": 1.0}]).verdict == "MISSED"
    assert made["recovery"].row([{"seconds": 15.0}]).verdict == "MISSED"
    assert made["recovery"].row([{"seconds": 14.9}]).verdict == "met"
    assert made["recovery"].row([{"seconds": 14.9}]).to_json()["seconds"] == 14.9
    blocked = {"blocked": [0.1, 0.3], "step": 0.5, "interval": 125}
    assert made["checkpoint-blocked, digits"].row([blocked]).median == pytest.approx(0.2 / 62.5)

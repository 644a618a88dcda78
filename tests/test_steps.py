"""A step is done once for the same inputs, and a step that failed or lost its outputs is done again."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.progress import Progress
from pipelines.steps import Step, Steps
from pipelines.store import Place


def counting(inputs: dict[str, Any], calls: list[int], there: list[bool] | None = None) -> Step:
    def work() -> dict[str, Any]:
        calls.append(1)
        return {"value": len(calls)}

    return Step(name="s", version=1, inputs=inputs, work=work, needs=lambda outputs: there is None or there[0])


def test_same_inputs_nothing_to_do(tmp_path: Path) -> None:
    steps, calls = Steps(Place.of(tmp_path), Progress()), []
    first = steps.run(counting({"a": 1, "b": 2}, calls))
    again = Steps(Place.of(tmp_path), Progress()).run(counting({"b": 2, "a": 1}, calls))
    assert (first.skipped, again.skipped, again.outputs) == (False, True, {"value": 1})
    assert not steps.run(counting({"a": 1, "b": 3}, calls)).skipped


def test_a_step_that_dies_leaves_no_record(tmp_path: Path) -> None:
    steps = Steps(Place.of(tmp_path), Progress())

    def die() -> dict[str, Any]:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        steps.run(Step(name="s", version=1, inputs={}, work=die))
    assert Place.of(tmp_path).list() == []


def test_lost_outputs_are_made_again(tmp_path: Path) -> None:
    steps, calls, there = Steps(Place.of(tmp_path), Progress()), [], [True]
    steps.run(counting({}, calls, there))
    assert steps.run(counting({}, calls, there)).skipped
    there[0] = False
    assert not steps.run(counting({}, calls, there)).skipped
    assert len(calls) == 2

"""Training's speed against a bare loop, and what each promise costs: `python -m benchmarks.training` (over an hour).

Sides take turns in rounds. Every round is kept below `--work`, and a run that was interrupted goes on with `--resume`.
What each row means is said in docs/benchmarks-training.md, which `--write` writes.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.presets import Preset, prepare
from benchmarks.rows import Kept
from benchmarks.stepping import product, table
from benchmarks.stepping.processes import run_group
from pipelines.sections.train import Score
from pipelines.train.scoring import scoring_calls

RESULTS = Path(__file__).parent / "results" / "training.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks-training.md"
LIBRARIES = ("torch", "ray", "mlflow", "numpy")
ROUNDS = 15
START_ROUNDS = 7
"""Of what takes many seconds and is held to a bound far from what it takes."""
ACCOUNT_ROUNDS = 5
SCORING_ROUNDS = 3
TOGETHER = 5
"""Rounds of sides that share their processes, before these are started anew."""


@dataclass(frozen=True)
class Sizes:
    """Steps of a preset's rounds."""

    race: product.Race
    turn: int
    """Steps of a side in its turn."""
    account: tuple[int, int]
    """Steps between two checkpoints, and checkpoints."""
    scoring: int
    """Steps, before a score."""


SIZES = {
    # Seconds a step. Of a second of training there is less than one checkpoint; a round has one.
    "fashion-mnist": Sizes(product.Race(15, 3, 8, 7, log_every=5), 2, (5, 3), 5),
    # Hundredths of a second a step: whole intervals of the preset.
    "digits": Sizes(product.Race(375, 25, 125, 125, log_every=10), 40, (125, 2), 50),
}


def measure(name: str, preset: Preset, wanted: Callable[[str], int], kept: Kept, work: Path, first: bool) -> None:
    """All stages of a preset; those about starts and workers only of the first."""
    sizes, spec = SIZES[name], preset.spec
    dataset = str(preset.place)

    def race(number: int, _: int) -> list[dict[str, Any]]:
        sides = [lambda: product.race_product(preset, sizes.race, work), lambda: product.race_bare(preset, sizes.race)]
        done: dict[str, Any] = {}
        for side in sides if number % 2 else sides[::-1]:
            done |= side()
        return [done]

    def reduction(_: int, missing: int) -> Any:
        fields = preset.having(workers=2).model_dump(mode="json")
        rounds = min(TOGETHER, missing)
        return run_group(
            "benchmarks.stepping.turns:reduction",
            2,
            spec.train.threads,
            spec=fields,
            dataset=dataset,
            rounds=rounds,
            steps=sizes.turn,
        )

    def sharing(specs: dict[str, Any], workers: dict[str, int], missing: int) -> Any:
        return run_group(
            "benchmarks.stepping.turns:sharing",
            max(workers.values()),
            spec.train.threads,
            specs={side: one.model_dump(mode="json") for side, one in specs.items()},
            sizes=workers,
            dataset=dataset,
            rounds=min(TOGETHER, missing),
            steps=sizes.turn,
        )

    def slots(_: int, missing: int) -> Any:
        specs = {"many": preset.having(workers=1), "one": preset.having(workers=1, slots=1)}
        return sharing(specs, {"many": 1, "one": 1}, missing)

    def workers(_: int, missing: int) -> Any:
        specs = {"one": preset.having(workers=1), "two": preset.having(workers=2)}
        return sharing(specs, {"one": 1, "two": 2}, missing)

    def account(*_: int) -> list[dict[str, Any]]:
        every, checkpoints = sizes.account
        done = run_group(
            "benchmarks.stepping.account:account",
            preset.workers,
            spec.train.threads,
            spec=spec.model_dump(mode="json"),
            dataset=dataset,
            checkpoint_every=every,
            checkpoints=checkpoints,
        )
        return [{**done, "interval": spec.train.checkpoint_every}]

    def scoring(*_: int) -> list[dict[str, Any]]:
        done = run_group(
            "benchmarks.stepping.account:scoring",
            preset.workers,
            spec.train.threads,
            spec=preset.having(score=Score()).model_dump(mode="json"),
            dataset=dataset,
            steps=sizes.scoring,
        )
        calls = scoring_calls(preset.having(score=Score())) / spec.train.global_batch  # in steps' worth of images
        return [{**done, "interval": spec.train.checkpoint_every, "calls": calls}]

    kept.collect(f"account {name}", wanted("account"), account)
    kept.collect(f"scoring {name}", wanted("scoring"), scoring)
    kept.collect(f"reduction {name}", wanted("reduction"), reduction)
    kept.collect(f"slots {name}", wanted("slots"), slots)
    if first:
        kept.collect(f"workers {name}", wanted("workers"), workers)
        if wanted("first step") or wanted("recovery"):
            _starts(name, preset, wanted, kept, work)
    kept.collect(f"race {name}", wanted("race"), race)


def _starts(name: str, preset: Preset, wanted: Callable[[str], int], kept: Kept, work: Path) -> None:
    done = (len(kept.rounds.get(f"{stage} {name}", [])) >= wanted(stage) for stage in ("first step", "recovery"))
    if all(done):
        return
    with product.warm_cluster() as address:
        product.first_step(preset, address, work)  # the cluster has then run a group before
        for stage, seconds in (("first step", product.first_step), ("recovery", product.recovery)):
            kept.collect(
                f"{stage} {name}",
                wanted(stage),
                lambda *_, seconds=seconds: [seconds(preset, address, work)],
            )


def main() -> None:
    stages = {
        "account": ACCOUNT_ROUNDS,
        "scoring": SCORING_ROUNDS,
        "reduction": ROUNDS,
        "slots": ROUNDS,
        "workers": ROUNDS,
        "first step": START_ROUNDS,
        "recovery": START_ROUNDS,
        "race": ROUNDS,
    }
    parser = argparse.ArgumentParser(description="Training's speed against a bare loop, and what each promise costs.")
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="folder of datasets and what is done")
    parser.add_argument("--resume", action="store_true", help="keep the rounds of an interrupted run")
    parser.add_argument("--rounds", type=int, help="of every stage, instead of its own number: for a quick look")
    parser.add_argument("--only", nargs="+", choices=stages, help="measure these stages, and print what is there")
    parser.add_argument("--presets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and {PAGE.name}")
    options = parser.parse_args()

    def wanted(stage: str) -> int:
        return 0 if options.only and stage not in options.only else (options.rounds or stages[stage])

    load, work = os.getloadavg()[0], options.work.absolute()
    kept = Kept(work / "rounds.json", options.resume)
    for name in options.presets:
        measure(name, prepare(name, work), wanted, kept, work, first=name == options.presets[0])
    rows = [one.row(kept.rounds[one.stage]) for one in table.measures(options.presets) if kept.rounds.get(one.stage)]
    machine = describe(load, LIBRARIES)
    text = table.page(rows, kept.rounds, options.presets, machine)
    if options.write:
        RESULTS.write_text(json.dumps({"machine": machine, "rows": [row.to_json() for row in rows]}, indent=1) + "\n")
        PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

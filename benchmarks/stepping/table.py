"""What the rounds say: a row each, and the page that shows them."""

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.rows import Measure, Round, Rounds, Row, Unit, table_of
from benchmarks.stepping.account import EXCHANGE, FORWARD_BACKWARD, MERGING, OPTIMIZER
from pipelines.train.pace import FORWARD_SHARE, SCORING_SHARE


def _of_step(*parts: str) -> Callable[[Round], float]:
    return lambda one: sum(one["shares"][part] for part in parts)


def _blocked(one: Round) -> float:
    return statistics.fmean(one["blocked"]) / (one["interval"] * one["step"])


def _scoring(one: Round) -> float:
    """Share of the time that scores have taken after a run's first one, which is let in by what it is expected to take,
    at the end of a checkpoint's interval.
    """
    interval, expected = one["interval"] * one["step"], one["calls"] * FORWARD_SHARE * one["step"]
    before = math.ceil(expected / SCORING_SHARE / interval) * interval
    return float(one["score"] / (before + one["score"]))


def _outside(one: Round) -> float:
    return 1 - _of_step(FORWARD_BACKWARD, EXCHANGE, MERGING, OPTIMIZER)(one)


def measures(presets: Sequence[str]) -> list[Measure]:
    """Rows of the first preset bear their plain names, those of the others the preset's name, too."""
    found = []
    for preset in presets:
        suffix = "" if preset == presets[0] else f", {preset}"

        def add(
            name: str,
            stage: str,
            unit: Unit,
            value: Callable[[Round], float],
            goal: float | None = None,
            bound: float | None = None,
            suffix: str = suffix,
            preset: str = preset,
        ) -> None:
            found.append(Measure(name + suffix, f"{stage} {preset}", unit, value, goal, bound))

        add("product-vs-loop", "race", "ratio", lambda one: one["bare"] / one["product"], 0.98, 0.95)
        add("reduction", "reduction", "ratio", lambda one: one["all-reduce"] / one["tree"], 0.98, 0.95)
        add("slots", "slots", "ratio", lambda one: one["one"] / one["many"])
        if preset == presets[0]:
            add("two-workers", "workers", "ratio", lambda one: one["one"] / one["two"], 1.85, 1.7)
            add("command-to-first-step", "first step", "seconds", lambda one: one["begun"], None, 15.0)
            add("command-to-first-step-done", "first step", "seconds", lambda one: one["done"], None, 15.0)
            add("recovery", "recovery", "seconds", lambda one: one["seconds"], None, 15.0)
        add("scoring", "scoring", "share", _scoring, None, SCORING_SHARE)
        add("outside-compute", "account", "share", _outside)
        add("checkpoint-blocked", "account", "share", _blocked, None, 0.01)
        add("data-wait", "race", "share", lambda one: one["data wait"])
    return found


def page(rows: Sequence[Row], rounds: Rounds, presets: Sequence[str], machine: str) -> str:
    """The page in docs, markdown."""
    lines = [_PROSE.strip(), "", f"{machine}.", "", *table_of(rows)]
    accounts = {preset: rounds[f"account {preset}"] for preset in presets if rounds.get(f"account {preset}")}
    if accounts:
        lines += ["", _ACCOUNT.strip(), "", f"| part | {' | '.join(accounts)} |", "|---|" + "---:|" * len(accounts)]
        for part in next(iter(accounts.values()))[0]["shares"]:
            cells = (
                f"{100 * statistics.median(one['shares'][part] for one in found):.2f}" for found in accounts.values()
            )
            lines.append(f"| {part} | {' | '.join(cells)} |")
        cells = (f"{statistics.median(one['step'] for one in found):.3f}" for found in accounts.values())
        lines.append(f"| a step (s) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_PROSE = """
# Training, measured

This page is written by `python -m benchmarks.training --write` (over an hour on two cores; `--resume` goes on with an
interrupted run, `--presets fashion-mnist` leaves `digits` out), together with `benchmarks/results/training.json`. Both
sides of a row take turns, so that a slow minute of the machine meets them both; a value is the median over the rounds,
with the quartiles. Rows without a preset's name are of the preset `fashion-mnist`. Ratios are of speeds, ours over
theirs: above 1 is faster.

- **product-vs-loop**: `ddpm train` as a user starts it (Ray Train, its own local Ray, shards, journal, checkpoints,
  MLflow in sqlite, scoring off) against a bare loop in processes of its own, with no Ray on the host: the same network,
  loss, batch, number of workers, threads and slots; all images as float32 tensors in memory; plain DDP on gloo
  (`no_sync` for all slots but the last); `torch.randn`; `clip_grad_norm_`; torch's fused AdamW on the parameters;
  an average of the weights by one `_foreach_lerp_`; the loss read every `log_every` steps; nothing saved. A round is
  a whole run of each; start-up and first steps are left out, by the journal's timestamps here, by the loop's clock
  there. At
  `fashion-mnist` a round is short and has one checkpoint: it and the steps that follow count as often as the preset's
  `checkpoint_every` has them; at `digits`, where it is measured, a round has two whole checkpoint intervals.
- **reduction**: that bare loop with the gradients summed in the fixed tree (`pipelines/train/reduce.py`) against DDP's
  own all-reduce, two workers; nothing else differs, and both alternate in the same processes.
- **slots**: the product's loop without Ray, one worker, with the preset's slots against one slot of the whole batch.
- **two-workers**: the product's loop without Ray, W = 2 against W = 1, one thread each, in the same processes.
- **command-to-first-step**: from `ddpm train` to where the workers are set up and go for the first step's images, which
  were ingested before, on a local Ray cluster that is up (with its dashboard, without metrics); **-done**: to the end
  of that step.
- **recovery**: from SIGKILL of a worker to the end of the first step after it (which is a lost one, made again).
- **scoring**: share of the time that held-out scores of the default size take where all ranks pause for them, when a
  run has taken its first one, the dearest: it sets things up, and is let in by what it is expected to take.
- **outside-compute**: share of a step's time in the product's own processes that is neither forward and backward nor
  the sum of gradients nor the optimizer with its average.
- **checkpoint-blocked**: what a checkpoint keeps training waiting, over the preset's interval between two.
- **data-wait**: share of the time that training waits for images, by the journal of the product's rounds.
"""

_ACCOUNT = """
## Where a step's time goes

The product's loop with the preset's workers and threads, accounted in rank 0; percent of the time of a step, medians.
The exchange includes the wait for the slower worker.
"""

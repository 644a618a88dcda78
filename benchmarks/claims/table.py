"""Markdown out of the results that are there: means over seeds, with their standard deviation."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.claims import forward
from benchmarks.claims.study import (
    BASELINE,
    BITS_TIMESTEPS,
    CHUNK,
    PACE_ROUNDS,
    SAMPLERS,
    STEPS,
    USUAL,
    VARIANTS,
    Study,
    Variant,
    Way,
)

NOTHING = "–"


def tables(study: Study, seeds: Sequence[int]) -> Iterator[str]:
    """The parts of the report, one after the other."""
    yield _head(study, seeds)
    yield _forward(study, seeds)
    yield _models(study, seeds)
    yield _samplers(study, seeds)
    yield _times(study)


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation of the values that are there; how many, where some are missing."""
    there = [value for value in values if value is not None]
    if not there:
        return NOTHING
    text = f"{statistics.fmean(there):.{digits}f}"
    if len(there) > 1:
        text += f" ± {statistics.stdev(there):.{digits}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)} seeds)"


def _differences(values: Sequence[float | None], base: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(values, base, strict=True)]


def _value(result: Any) -> float | None:
    return None if result is None else result["value"]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(study: Study, seeds: Sequence[int]) -> str:
    data, work = study.data, study.data.work
    accuracy = study.accuracy()
    told = NOTHING if accuracy is None else f"{accuracy['value']:.3f}"
    return (
        f"## {data.name}\n\n"
        f"{len(data.train):,} training images {data.side}x{data.side}, {len(data.held_out):,} held out. Network: "
        f"channels {work.channels}. Training: {study.images:,} images seen, batches of {work.batch}, learning "
        f"rate {work.learning_rate:g}, {len(seeds)} seeds. Measured: bits/dim on {work.bits_images:,} held-out images, "
        f"{BITS_TIMESTEPS} network calls each; Frechet distances at n = {work.samples}, by a feature network that "
        f"names {told} of the held-out images. Threads: {study.threads}."
    )


def _forward(study: Study, seeds: Sequence[int]) -> str:
    results = [result for result in map(study.forward, seeds) if result is not None]
    if not results:
        return f"### 1. Closed form against iterated noise\n\n{NOTHING}"
    rows = []
    for i, t in enumerate(forward.SHOWN):
        exact = (max(result[name][i] for result in results) for name in ("exact_mean", "exact_variance"))
        drawn = []
        for name in ("signal", "variance"):
            error = results[0][f"{name}_error"][i]
            values = ", ".join(f"{result[name][i] / error:+.1f}" for result in results)
            drawn.append(f"{values} (of {100 * error:.2g} %)")
        rows.append([str(t), *(f"{value:.1e}" for value in exact), *drawn])
    head = ["t", "mean, exact", "variance, exact", "signal, drawn", "noise variance, drawn"]
    cost = spread([result["cost"] for result in results], 0)
    return (
        "### 1. Closed form against iterated noise\n\n"
        "exact: largest relative deviation of the moments that the steps compose. drawn: deviation of chains of noise "
        f"on {results[0]['pixels']:,} real pixels, in standard errors, one number a seed.\n\n"
        f"{_rows(head, rows)}\n\nTo get to x_T by steps takes {cost} times as long as at once."
    )


def _models(study: Study, seeds: Sequence[int]) -> str:
    def bits(variant: Variant) -> list[Any]:
        return [study.bits(variant, seed) for seed in seeds]

    def frechet(variant: Variant) -> list[Any]:
        return [study.frechet(variant, seed, USUAL) for seed in seeds]

    base_bits, base_frechet = ([_value(r) for r in get(VARIANTS[BASELINE])] for get in (bits, frechet))
    rows = []
    for name, variant in VARIANTS.items():
        b, f = bits(variant), frechet(variant)
        values, distances = [_value(r) for r in b], [_value(r) for r in f]
        half = [None if r is None else (r["interval"][1] - r["interval"][0]) / 2 for r in b]
        floors = [None if r is None else r["value"] / r["floor"] for r in f]
        row = [name, spread(values), _mean(half), spread(_differences(values, base_bits))]
        rows.append([*row, spread(distances), spread(_differences(distances, base_frechet)), _mean(floors, 1)])
    for row in rows[:1]:
        row[3] = row[5] = NOTHING
    head = ["model", "bits/dim", "±95 %", "less that of eps, by seed", "Frechet", "less that of eps, by seed", "floors"]
    floor = next((r["floor"] for v in VARIANTS.values() for r in frechet(v) if r is not None), None)
    noise = next((r["noise"] for v in VARIANTS.values() for r in frechet(v) if r is not None), None)
    told = "" if floor is None else f" The floor is {floor:.4f}; uniform noise lies {noise:.0f} floors away."
    return (
        "### 2. Models at equal budget\n\n"
        "Mean ± standard deviation over seeds; differences are taken seed by seed. ±95 %: of one model's bits/dim, "
        f"over images and draws. Frechet distances of {USUAL.steps} ancestral steps, small variance.{told}\n\n"
        f"{_rows(head, rows)}"
    )


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    there = [value for value in values if value is not None]
    return f"{statistics.fmean(there):.{digits}f}" if there else NOTHING


def _samplers(study: Study, seeds: Sequence[int]) -> str:
    compared = {"DPM-Solver++(2M)": "DDIM"}  # all others with the first sampler

    def results(name: str, steps: int) -> list[Any]:
        sampler, variance = SAMPLERS[name]
        return [study.frechet(VARIANTS[BASELINE], seed, Way(sampler, steps, variance)) for seed in seeds]

    def distances(name: str, steps: int) -> list[float | None]:
        return [_value(result) for result in results(name, steps)]

    def cell(name: str, steps: int) -> str:
        floors = _mean([None if r is None else r["value"] / r["floor"] for r in results(name, steps)], 1)
        return NOTHING if floors == NOTHING else f"{spread(distances(name, steps))} ({floors})"

    first, *others = SAMPLERS
    pairs = [(name, compared.get(name, first)) for name in others]
    differences = [
        [str(steps), *(spread(_differences(distances(a, steps), distances(b, steps))) for a, b in pairs)]
        for steps in STEPS
    ]
    rows = [[str(steps), *(cell(name, steps) for name in SAMPLERS)] for steps in STEPS]
    return (
        "### 3. Samplers\n\n"
        "Frechet distance (in floors) of the models eps with the linear schedule, trailing spacing, the same seeds for "
        f"every sampler.\n\n{_rows(['steps', *SAMPLERS], rows)}\n\n"
        "Differences, taken seed by seed:\n\n"
        f"{_rows(['steps', *(f'{a} − {b}' for a, b in pairs)], differences)}"
    )


def _times(study: Study) -> str:
    pace = study.pace()
    cells = [NOTHING if pace is None else f"{1e3 * pace[name]:.2f}" for name in SAMPLERS]
    return (
        "### 4. Time\n\n"
        f"Milliseconds an image and step, {CHUNK} images at a time, threads: {study.threads}; the fastest of "
        f"{PACE_ROUNDS} rounds, for the machine is shared.\n\n{_rows(list(SAMPLERS), [cells])}"
    )

"""Decoded images/s a core, ours against others: `python -m benchmarks.loader` (about four minutes).

In each round every side reads the same images once, in batches, each on the same one core and in one thread; the
sides take turns, so that a slow minute of the machine meets them all. A ratio is ours over theirs in one round. What
is done is kept below `--work`, and a run that was interrupted goes on with `--resume`.
"""

import os

# One thread each, said before any library counts the cores.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.loading import scale, sides
from benchmarks.loading.blocked import blocked
from benchmarks.loading.data import PACKAGE, Images, prepare, prepare_indexed
from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results" / "loader.json"
LIBRARIES = ("numpy", "pillow", "pyarrow", "torch", "webdataset")


@dataclass(frozen=True)
class Group:
    """Sides that take turns on one set of images."""

    size: int
    images: int
    rounds: int
    peers: dict[str, sides.Side]
    prepare: Callable[[Path, int, int], Images] = prepare
    title: str = ""
    """What sets it apart from the others of its size."""

    @property
    def name(self) -> str:
        return f"{self.size}x{self.size}{self.title}"


_WEBDATASET = {
    "webdataset, at its best": sides.webdataset_best,
    "webdataset, as usual": sides.webdataset_usual,
}
_FOLDER = {
    "image folder + DataLoader, at its best": sides.folder_best,
    "image folder + DataLoader, as usual": sides.folder_usual,
}
GROUPS = [
    Group(28, 10_000, 15, {**_WEBDATASET, **_FOLDER}),
    Group(28, 10_000, 7, _WEBDATASET, prepare_indexed, ", its own tars indexed"),
    Group(64, 3000, 7, {**_WEBDATASET, **_FOLDER}),
    Group(256, 500, 7, {**_WEBDATASET, **_FOLDER}),
]
MEMORY_IMAGES = 60_000
FLOORS = {28: 3.0}
"""Ratios that the sizes are held to."""


@dataclass(frozen=True)
class Row:
    """A ratio: the median of the rounds, the least and the greatest."""

    name: str
    ratio: float
    low: float
    high: float
    rounds: int
    ours: float
    """Images/s, median."""
    theirs: float
    floor: float | None


def rate(side: sides.Side, images: Images, epoch: int) -> float:
    """Images/s of one epoch."""
    start, n = time.perf_counter(), 0
    for _, labels in side(images, epoch):
        n += len(labels)
    return n / (time.perf_counter() - start)


def run_group(group: Group, images: Images, rounds: int) -> list[Row]:
    every = {"ours": sides.ours, **group.peers}
    rates: dict[str, list[float]] = {name: [] for name in every}
    for side in every.values():  # the first pass fills the page cache, and imports what is imported late
        rate(side, images, 0)
    names = list(every)
    for number in range(rounds):
        # Nobody is always the one after the same other.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rates[name].append(rate(every[name], images, number))
    rows = []
    for name in group.peers:
        ratios = [one / other for one, other in zip(rates["ours"], rates[name], strict=True)]
        medians = statistics.median(rates["ours"]), statistics.median(rates[name])
        title = f"{name}, {group.name}"
        spread = statistics.median(ratios), min(ratios), max(ratios)
        rows.append(Row(title, *spread, rounds, *medians, FLOORS.get(group.size)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoded images/s a core, ours against others.")
    parser.add_argument("--work", type=Path, default=Path("out/loader"), help="folder of the images and what is done")
    parser.add_argument("--resume", action="store_true", help="keep the measurements of an interrupted run")
    parser.add_argument("--rounds", type=int, help="of every row, instead of its own number: for a quick look")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="the core that all run on")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/loader.json")
    options = parser.parse_args()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="webdataset")
    kept = options.work / "done.json"
    done = json.loads(kept.read_text()) if options.resume and kept.exists() else {"groups": {}, "numbers": {}}

    def keep() -> None:
        kept.write_text(json.dumps(done))

    options.work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    for group in GROUPS:
        if group.name not in done["groups"]:
            images = group.prepare(options.work, group.images, group.size)
            done["groups"][group.name] = [
                asdict(row) for row in run_group(group, images, options.rounds or group.rounds)
            ]
            keep()
    if not done["numbers"]:
        everything = prepare(options.work, MEMORY_IMAGES, 28, folder=False)
        done["numbers"] = {**scale.opening(options.work, 5), **scale.memory(everything.shards)}
        os.sched_setaffinity(0, cores)
        done["numbers"] |= blocked(options.work)
        keep()
    machine = f"{describe(load, LIBRARIES)}; {'Fashion-MNIST' if PACKAGE.exists() else 'random pixels'}"
    rows = [Row(**row) for group in GROUPS for row in done["groups"][group.name]]
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        keys = ("name", "ratio", "low", "high", "rounds")
        told = {
            "machine": machine,
            "rows": [{key: asdict(row)[key] for key in keys} for row in rows],
            "numbers": done["numbers"],
        }
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    report(rows, done["numbers"], machine)


def report(rows: list[Row], numbers: dict[str, float], machine: str) -> None:
    """Markdown."""
    print(f"{machine}. One core, one thread; median (least to greatest) of the rounds.\n")
    print("| against | ours / theirs | ours (images/s) | theirs (images/s) | rounds | floor |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        floor = "" if row.floor is None else f"{row.floor:g}, {'met' if row.ratio >= row.floor else 'MISSED'}"
        spread = f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
        print(f"| {row.name} | {spread} | {row.ours:,.0f} | {row.theirs:,.0f} | {row.rounds} | {floor} |")
    print("\n| | |\n|---|---:|")
    for name, value in numbers.items():
        print(f"| {name} | {value:.3g} |")


if __name__ == "__main__":
    main()

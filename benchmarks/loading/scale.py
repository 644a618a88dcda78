"""What does not grow: opening a huge dataset, finding a position in it, memory over an epoch.

Each is measured in a process of its own, which has imported what it needs before the clock starts.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.data.manifest import CARD
from pipelines.store import Place
from tests.data.dataset_helpers import write_made_up

SHARDS, SAMPLES = 100_000, 10_000

_OPEN = """
import json, sys, time
import numpy
import psutil
from pipelines.data.manifest import Dataset
from pipelines.store import Place

resident = psutil.Process().memory_info
before, began = resident().rss, time.perf_counter()
order = Dataset.open(Place.of(sys.argv[1])).split("train").order(4, 0)
opened, grown = time.perf_counter() - began, resident().rss - before
first, after = [], []
for epoch, offset in enumerate(numpy.random.default_rng(0).integers(0, order.n, 50).tolist()):
    for times in (first, after):
        began = time.perf_counter()
        order.locate(numpy.array([epoch * order.n + offset]))
        times.append(time.perf_counter() - began)
print(json.dumps({"s": opened, "MB": grown / 1e6, "first": first, "after": after}))
"""

_EPOCH = """
import json, sys
from pathlib import Path
import psutil
from benchmarks.loading.data import Images
from benchmarks.loading.sides import ours
from pipelines.store import Place

images = Images(Place.of(sys.argv[1]), Path())
resident, seen = psutil.Process().memory_info, []
for number, _ in enumerate(ours(images, 0)):
    if number % 10 == 0:
        seen.append(resident().rss / 1e6)
tenth = seen[len(seen) // 10]
print(json.dumps({"growth": seen[-1] - tenth, "most": max(seen) - tenth}))
"""


def opening(root: Path, rounds: int) -> dict[str, float]:
    """Seconds and MB that opening takes (medians), and ms that a position takes, also as the first of its epoch."""
    place = Place.of(root / f"made-up-{SHARDS}")
    if not (place / CARD).exists():
        write_made_up(place.path, SHARDS, SAMPLES)
    found = [_run(_OPEN, str(place)) for _ in range(rounds)]
    return {
        "open 10^5 shards, 10^9 images (s)": statistics.median(one["s"] for one in found),
        "open 10^5 shards, 10^9 images (MB)": statistics.median(one["MB"] for one in found),
        "position to (shard, row) (ms)": 1e3 * statistics.median(t for one in found for t in one["after"]),
        "position to (shard, row), first of its epoch (ms)": 1e3
        * statistics.median(t for one in found for t in one["first"]),
    }


def memory(shards: Place) -> dict[str, float]:
    """MB that the process grows by over an epoch of our reader, after the first tenth of it."""
    found = _run(_EPOCH, str(shards))
    return {
        "memory at the end of an epoch, over its first tenth (MB)": found["growth"],
        "memory at most in an epoch, over its first tenth (MB)": found["most"],
    }


def _run(code: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

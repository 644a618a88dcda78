"""What keyed noise costs in sampling: `python -m benchmarks.noise` (about a minute and a half).

The digits preset's network and process, the ancestral sampler, one thread. In each round every case samples once as
the sampler stands, with a clock around what it calls in `ddpm_core.noise`, and then makes the same noise alone, one
counter a call; the cases take turns, so that a slow minute of the machine meets them all. `share` is the time in
noise over the time of the whole, `share, one a call` what it would be if each step made its own. The weights are
those of initialisation: what a step costs does not depend on them.
"""

import argparse
import functools
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ddpm_core import GaussianDiffusion, UNet, noise, sample
from pipelines.build import build_model, build_process
from pipelines.spec import load_spec

PRESET = Path(__file__).parents[1] / "jobs" / "presets" / "digits.yaml"
# (images at once, size, steps). A step at 28x28 takes half a second, and its share does not depend on their number.
CASES = [(100, 8, 100), (10, 8, 100), (1, 8, 100), (100, 28, 10), (1, 28, 100)]


class Clock:
    """Seconds spent inside functions, nested calls counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self._inside = False

        return timed


@contextmanager
def clock_on_noise() -> Iterator[Clock]:
    """Times every call of the functions that make normals, whoever calls them."""
    clock = Clock()
    with (
        mock.patch.object(noise, "normal", clock.around(noise.normal)),
        mock.patch.object(noise, "normals", clock.around(noise.normals)),
    ):
        yield clock


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_round(process: GaussianDiffusion, model: UNet, batch: int, size: int, steps: int) -> dict[str, float]:
    """The measurements of one case, by column."""
    shape = (1, size, size)
    seeds = [noise.key(0, "image", i) for i in range(batch)]
    keys = [noise.key(seed, "sample") for seed in seeds]

    def draw_each() -> None:
        for counter in range(steps):
            noise.normal(keys, shape, counter)

    with clock_on_noise() as clock:
        whole = seconds(lambda: sample(process, model, shape, seeds, steps=steps))
    each = seconds(draw_each)
    return {
        "step (ms)": 1e3 * whole / steps,
        "noise (us/step)": 1e6 * clock.seconds / steps,
        "share (%)": 100 * clock.seconds / whole,
        "one a call (us/step)": 1e6 * each / steps,
        "share, one a call (%)": 100 * each / (whole - clock.seconds + each),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What keyed noise costs in sampling.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    spec = load_spec(str(PRESET), resolve=False)
    process, model = build_process(spec.diffusion), build_model(spec)
    results: dict[tuple[int, int, int], dict[str, list[float]]] = {case: defaultdict(list) for case in CASES}
    for batch, size, _ in CASES:  # the first run of each shape allocates and picks kernels
        one_round(process, model, batch, size, 2)
    for _ in range(rounds):
        for case, columns in results.items():
            for name, value in one_round(process, model, *case).items():
                columns[name].append(value)

    print(
        f"torch {torch.__version__}, {platform.machine()}, one thread; median (least to greatest) of {rounds} rounds\n"
    )
    names = list(results[CASES[0]])
    print("| images | size | steps | " + " | ".join(names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for (batch, size, steps), columns in results.items():
        cells = (f"{statistics.median(v):.3g} ({min(v):.3g} to {max(v):.3g})" for v in columns.values())
        print(f"| {batch} | {size}x{size} | {steps} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

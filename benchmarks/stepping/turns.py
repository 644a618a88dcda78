"""Sides that take turns in one group of processes: what one choice costs when all else is the same."""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from benchmarks.stepping.bare import BareLoop, images_in_memory
from pipelines.data.manifest import Dataset
from pipelines.spec import parse_spec
from pipelines.store import Place
from pipelines.train.loop import Trainer
from pipelines.train.run import Run
from pipelines.train.world import World

Turns = list[dict[str, float]]
"""By round: seconds a step of each side."""

WARM_UP = 2
"""Steps of each side before the first round: what is set up lazily, DDP's second look at its buckets included."""


def reduction(world: World, spec: dict[str, Any], dataset: str, rounds: int, steps: int) -> Turns:
    """The bare loop with the fixed-tree sum, `tree`, and with what DDP does by itself, `all-reduce`."""
    parsed, images = parse_spec(spec), images_in_memory(Dataset.open(Place.of(dataset)))
    tree, plain = (BareLoop(parsed, images, world, tree=tree) for tree in (True, False))
    return take_turns({"tree": tree.step, "all-reduce": plain.step}, rounds, steps)


def sharing(
    world: World, specs: dict[str, dict[str, Any]], sizes: dict[str, int], dataset: str, rounds: int, steps: int
) -> Turns:
    """The product's own loop, with journal, without checkpoints, by the first so many ranks of this group."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        sides: dict[str, Callable[[], object]] = {}
        for name, fields in specs.items():
            spec, opened = parse_spec(fields), Dataset.open(Place.of(dataset))
            if world.rank >= sizes[name]:
                sides[name] = _nothing
                continue
            assert sizes[name] in (1, world.size), "DDP works in the whole group"
            run = Run.of(spec, opened.digest, Place.of(f"{folders[0]}/{name}"))
            trainer = Trainer(spec, opened, run, World(world.rank, sizes[name]))
            sides[name] = functools.partial(trainer.take_step, trainer.stream())
        turns = take_turns(sides, rounds, steps)
        dist.barrier()
    return turns


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, steps: int) -> Turns:
    """Every side makes so many steps a round, all ranks at once; nobody is always the first."""
    names = list(sides)
    for name in names:
        _seconds(sides[name], WARM_UP)
    turns = []
    for number in range(rounds):
        first = number % len(names)
        turns.append({name: _seconds(sides[name], steps) / steps for name in names[first:] + names[:first]})
    return turns


def _seconds(step: Callable[[], object], steps: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return time.perf_counter() - began


def _nothing() -> None:
    """What a rank does while others take their turn."""

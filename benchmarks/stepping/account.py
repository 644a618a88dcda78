"""Where the time of the product's own steps goes, accounted from inside its processes."""

import functools
import statistics
import tempfile
import time
from typing import Any

import torch.distributed as dist

from pipelines.data.manifest import Dataset
from pipelines.data.reader import SlotStream
from pipelines.spec import parse_spec
from pipelines.store import Place
from pipelines.train import reduce
from pipelines.train.loop import Trainer
from pipelines.train.recorder import Recorder
from pipelines.train.reduce import SlotGradients
from pipelines.train.run import Run
from pipelines.train.slots import SlotLosses
from pipelines.train.state import State
from pipelines.train.world import World

FORWARD_BACKWARD, EXCHANGE, OPTIMIZER = "forward and backward", "exchange between workers", "optimizer and average"
MERGING, CHECKPOINT = "merging of slots", "checkpoints, what training waits for"
_PARTS: list[tuple[Any, str, str]] = [
    (SlotLosses, "backward", FORWARD_BACKWARD),
    (reduce, "exchange", EXCHANGE),
    (State, "advance", OPTIMIZER),
    (SlotGradients, "hook", MERGING),
    (SlotGradients, "add", MERGING),
    (SlotGradients, "finish", MERGING),
    (SlotLosses, "draw", "timesteps, noise, flips"),
    (SlotStream, "__next__", "waiting for images"),
    (Recorder, "log", "journal"),
    (Recorder, "save", CHECKPOINT),
]
"""Where the named parts of a step are: a function's own time, without that of the others that it calls."""
REST = "all else"
WARM_UP = 3


class Account:
    """Seconds by part, of functions that were wrapped where they are found."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """From now on, each call's own time counts for the part."""
        function = getattr(owner, name)
        self.seconds.setdefault(part, 0.0)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                whole, inner = time.perf_counter() - began, self._inner.pop()
                self.seconds[part] += whole - inner
                if self._inner:
                    self._inner[-1] += whole

        setattr(owner, name, timed)


def account(world: World, spec: dict[str, Any], dataset: str, checkpoint_every: int, checkpoints: int) -> Any:
    """Of rank 0: `shares` of the time of a step by part, checkpoints left out; `step` and `blocked`, seconds: a step's,
    and what each checkpoint kept training waiting.
    """
    parsed, opened = parse_spec(spec), Dataset.open(Place.of(dataset))
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        parts = Account()
        for where, name, part in _PARTS:
            parts.wrap(where, name, part)
        trainer = Trainer(parsed, opened, Run.of(parsed, opened.digest, Place.of(folders[0])), world)
        blocked, times = [], []
        with trainer.stream() as stream:
            for _ in range(WARM_UP):
                trainer.take_step(stream)
            for part in parts.seconds:
                parts.seconds[part] = 0.0
            for _ in range(checkpoints):
                for _ in range(checkpoint_every):
                    began = time.perf_counter()
                    trainer.take_step(stream)
                    times.append(time.perf_counter() - began)
                of_steps, began = dict(parts.seconds), time.perf_counter()
                trainer.save()
                blocked.append(time.perf_counter() - began)
                parts.seconds.update(of_steps)
        trainer.recorder.settle()
        dist.barrier()
    del parts.seconds[CHECKPOINT]
    whole = sum(times)
    shares = {part: seconds / whole for part, seconds in parts.seconds.items()}
    return {"shares": {**shares, REST: 1 - sum(shares.values())}, "step": statistics.median(times), "blocked": blocked}


def scoring(world: World, spec: dict[str, Any], dataset: str, steps: int) -> dict[str, float]:
    """Of rank 0: seconds of a `score` that all ranks take together, the first of a run included, and of a `step`."""
    parsed, opened = parse_spec(spec), Dataset.open(Place.of(dataset))
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        trainer = Trainer(parsed, opened, Run.of(parsed, opened.digest, Place.of(folders[0])), world)
        times = []
        with trainer.stream() as stream:
            for _ in range(WARM_UP + steps):
                began = time.perf_counter()
                trainer.take_step(stream)
                times.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer.score(trainer.step)
            score = time.perf_counter() - began
        trainer.recorder.settle()
        dist.barrier()
    return {"score": score, "step": statistics.median(times[WARM_UP:])}

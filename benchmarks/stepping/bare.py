"""The peer: what one would write by hand, and not badly: tensors in memory, plain DDP, fused AdamW, foreach average."""

import contextlib
import itertools
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.build import build_loss, build_model, build_process
from pipelines.data.manifest import Dataset
from pipelines.data.pixels import to_model
from pipelines.data.reader import Reader
from pipelines.spec import Spec, parse_spec
from pipelines.store import Place
from pipelines.train.reduce import SlotGradients
from pipelines.train.world import World


def images_in_memory(dataset: Dataset) -> Tensor:
    """All training images, as the network takes them: float32 [N, C, H, W] in [-1, 1]."""
    split = dataset.split("train")
    order = split.order(1, 0)
    pixels, _ = Reader(split).read(*order.locate(np.arange(len(split))))
    return to_model(pixels)


class BareLoop:
    """The same network, loss, batch, slots and workers as a spec's run; nothing of it can be resumed or repeated.

    A rank's part of the batch goes through in as many pieces as it has slots, their gradients added up by torch. With
    `tree`, they are summed as the product does it, in one fixed tree, and nothing else is different.
    """

    def __init__(self, spec: Spec, images: Tensor, world: World, tree: bool = False) -> None:
        self._train, self._images, self._world = spec.train, images, world
        self._process, self._loss = build_process(spec.diffusion), build_loss(spec.train)
        self.model = build_model(spec)
        self.parameters = list(self.model.parameters())
        self._tree = SlotGradients(self.parameters) if tree else None
        self._module: Any = self.model
        if world.size > 1:
            self._module = DistributedDataParallel(self.model)
            if self._tree is not None:
                self._module.register_comm_hook(None, self._tree.hook)
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=spec.train.learning_rate, weight_decay=spec.train.weight_decay, fused=True
        )
        self._new_share = 1 - 0.5 ** (spec.train.global_batch / spec.train.ema_half_life)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self._order, self._at, self._epoch = torch.empty(0, dtype=torch.int64), 0, 0
        self.losses: list[float] = []
        """Of this rank, every `train.log_every` steps."""
        self._steps = 0
        torch.manual_seed(spec.seed + world.rank)

    def step(self) -> None:
        """One optimizer step."""
        mine = self._next_images()
        pieces = mine.chunk(self._train.slots // self._world.size)
        self.model.train()
        total = torch.zeros(())
        for number, x0 in enumerate(pieces):
            last = number == len(pieces) - 1
            t = torch.randint(1, self._process.timesteps + 1, (len(x0),))
            alone = contextlib.nullcontext() if last or self._world.size == 1 else self._module.no_sync()
            with alone:
                loss = self._loss(self._process, self._module, x0, t, torch.randn_like(x0)).mean()
                (loss if self._tree is not None else loss / len(pieces)).backward()
            total = total + loss.detach()
            if self._tree is not None and not last:
                self._tree.add()
        if self._tree is not None:
            self._take_sum(self._tree)
        if self._train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._train.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        # Torch's AveragedModel walks through the modules for that, which costs a small network a tenth of its step.
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], self._new_share)
        self._steps += 1
        if self._steps % self._train.log_every == 0:
            self.losses.append(float(total) / len(pieces))

    def _take_sum(self, tree: SlotGradients) -> None:
        if self._world.size == 1:
            tree.finish()
        mean, at = tree.total.div_(self._train.slots), 0
        for parameter in self.parameters:
            parameter.grad = mean[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()

    def _next_images(self) -> Tensor:
        """This rank's part of the next batch: an epoch is a permutation, its short end is dropped."""
        batch, size = self._train.global_batch, self._train.global_batch // self._world.size
        if self._at + batch > len(self._order):
            self._order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(self._epoch))
            self._at, self._epoch = 0, self._epoch + 1
        first = self._at + self._world.rank * size
        self._at += batch
        return self._images[self._order[first : first + size]]


def step_seconds(world: World, spec: dict[str, Any], dataset: str, steps: int) -> list[float]:
    """Seconds of each step."""
    loop = BareLoop(parse_spec(spec), images_in_memory(Dataset.open(Place.of(dataset))), world)
    dist.barrier()
    times = [time.perf_counter()]
    for _ in range(steps):
        loop.step()
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]

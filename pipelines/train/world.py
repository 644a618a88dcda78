"""Who computes a step: one process, or several that exchange what they found."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipelines.data.order import owners

PATIENCE = timedelta(seconds=120)
"""How long ranks wait for one that does not answer."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank among the `size` that have slots. Every rank calls each method, in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Torch's process group of these; None for all the processes that there are."""
    idle: int = 0
    """Processes beside them that have nothing to do, for their number does not divide the slots."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def among(rank: int, size: int, slots: int, device: torch.device | None = None) -> "World | None":
        """A rank of `size` processes, all of which call this; None for one that has no slots."""
        sharing = owners(size, slots)
        # Of its own, a group waits half an hour.
        group = dist.new_group(list(range(sharing)), timeout=PATIENCE) if sharing < size else None
        return World(rank, sharing, group, size - sharing, device or torch.device("cpu")) if rank < sharing else None

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)  # rank 0 of the group is rank 0 of all
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_tensors(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, all of one shape, by rank, on the CPU of all ranks."""
        if self.size == 1:
            return [mine]
        mine = mine.to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return [part.cpu() for part in everyone]

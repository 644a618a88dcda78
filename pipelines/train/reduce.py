"""The sum of the slots' gradients, in one fixed binary tree whatever the number of workers.

Floating-point addition is not associative: ((g0+g1)+g2)+g3 and (g0+g1)+(g2+g3) differ in their last bits, so a plain
running sum (or a ring all-reduce) would make the weights depend on who computed what. Here slot gradients are always
merged pairwise: a worker's own slots like the digits of a binary counter (log2 buffers), the workers' partial sums in
the same tree, inside DDP's communication hook.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def tree_sum(parts: Tensor) -> Tensor:
    """Sum over dim 0, pairwise: parts [W, ...] with W a power of two -> [...]."""
    while parts.shape[0] > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


class SlotGradients:
    """Merges the gradients of one worker's slots, and over the workers, step by step.

    Every slot but a worker's last goes through `add`; the last one's gradient is still in DDP's buckets, where `hook`
    merges it with the earlier ones and with the other workers' sums. A lone worker's last slot goes through `finish`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        sizes = [p.numel() for p in self._parameters]
        self._offsets = dict(zip(map(id, self._parameters), _running_offsets(sizes), strict=True))
        self._levels: list[Tensor | None] = []
        self.total = torch.zeros(sum(sizes), dtype=torch.float32, device=self._parameters[0].device)
        """Sum over all slots, float32 [P], in the order of the parameters; whole after the last slot's backward."""
        self.word = 0.0
        """What this worker has to say to all: it goes with the step's exchange, set before the last slot's backward."""
        self.heard = 0.0
        """Sum of all workers' words, the same on all of them, once the last slot's backward is over."""

    def add(self) -> None:
        """Take the gradient of a slot out of `.grad` and merge it."""
        carry = self._take()
        for level, waiting in enumerate(self._levels):
            if waiting is None:
                self._levels[level] = carry
                return
            carry = waiting + carry
            self._levels[level] = None
        self._levels.append(carry)

    def finish(self) -> None:
        """Take the last slot of a lone worker, which completes the sum."""
        self.total.copy_(self._carry_through(self._take(), 0, self.total.numel()))
        self._levels.clear()
        self.heard = self.word

    def hook(self, group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP communication hook: one bucket of the last slot's gradients, completed to the sum over all slots."""
        buffer = bucket.buffer()
        spans, at = [], 0
        for parameter in bucket.parameters():
            offset, size = self._offsets[id(parameter)], parameter.numel()
            spans.append((offset, size, at))
            at += size
        partial = torch.cat(
            [self._carry_through(buffer[at : at + size].float(), offset, size) for offset, size, at in spans]
        )
        if bucket.is_last():
            partial = torch.cat((partial, partial.new_tensor([self.word])))
        total = exchange(partial, group)
        for offset, size, at in spans:
            self.total[offset : offset + size] = total[at : at + size]
        if bucket.is_last():
            self._levels.clear()
            self.heard = float(total[-1])
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    def _take(self) -> Tensor:
        pieces = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            pieces.append(parameter.grad.detach().reshape(-1).float())
            parameter.grad = None
        return torch.cat(pieces)

    def _carry_through(self, carry: Tensor, offset: int, size: int) -> Tensor:
        # A worker owns a power of two of slots, so its last one meets a waiting partner at every level.
        for waiting in self._levels:
            assert waiting is not None
            carry = waiting[offset : offset + size] + carry
        return carry


def exchange(partial: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of the workers' partial sums [P], in tree order of their ranks, the same bits on all of them.

    Each worker sums one chunk of it: all-to-all, sum, all-gather, which moves the bytes of a ring all-reduce.
    """
    workers = dist.get_world_size(group)
    chunk = -(-partial.numel() // workers)
    padded = torch.zeros(workers * chunk, dtype=partial.dtype, device=partial.device)
    padded[: partial.numel()] = partial
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded, group=group)
    mine = tree_sum(received.view(workers, chunk)).contiguous()
    dist.all_gather_into_tensor(padded, mine, group=group)
    return padded[: partial.numel()]


def _running_offsets(sizes: Sequence[int]) -> list[int]:
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += size
    return offsets

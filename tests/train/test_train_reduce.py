"""The slots' sum is one fixed tree, whoever computes what; checked against a tree written out by hand."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_core import noise
from pipelines.train.reduce import SlotGradients, exchange, tree_sum

SLOTS = 8


def gradient_like(slot: int, n: int) -> Tensor:
    """Numbers of very different size, so that another order of summation gives other bits."""
    size = noise.uniform([noise.key(1, "size", slot)], n)[0]
    return noise.normal([noise.key(1, "g", slot)], (n,))[0] * (10 ** (8 * size - 4)).float()


def by_hand(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return by_hand(parts[:half]) + by_hand(parts[half:])


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16])
def test_tree_sum_and_binary_counter_equal_the_tree_by_hand(slots: int) -> None:
    parts = [gradient_like(slot, 1000) for slot in range(slots)]
    expected = by_hand(parts)
    assert torch.equal(tree_sum(torch.stack(parts)), expected)
    parameters = [nn.Parameter(torch.zeros(30, 10)), nn.Parameter(torch.zeros(700))]
    gradients = SlotGradients(parameters)
    for _ in range(2):  # a second step starts from nothing
        for slot, part in enumerate(parts):
            parameters[0].grad, parameters[1].grad = part[:300].reshape(30, 10).clone(), part[300:].clone()
            gradients.finish() if slot == slots - 1 else gradients.add()
        assert torch.equal(gradients.total, expected)
    if slots >= 4:
        assert not torch.equal(sum(parts[1:], parts[0]), expected), "the numbers do not tell the orders apart"


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(300))
        self.b = nn.Parameter(torch.zeros(701))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.cat((self.a, self.b)) * x).sum()


def _rank(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    n = 1001  # no multiple of the number of ranks
    total = exchange(gradient_like(rank, n))
    model = Affine()
    gradients = SlotGradients(list(model.parameters()))
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-3)  # several buckets
    ddp.register_comm_hook(None, gradients.hook)
    each = SLOTS // size
    owned = range(rank * each, (rank + 1) * each)
    for _ in range(3):  # DDP lays its buckets out anew after the first step
        for slot in owned:
            if slot == owned[-1]:
                ddp(gradient_like(slot, n)).backward()
            else:
                with ddp.no_sync():
                    ddp(gradient_like(slot, n)).backward()
                gradients.add()
            for parameter in model.parameters():
                parameter.grad = None
        step = gradients.total.clone()
    torch.save([total, step], f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_workers_agree_with_the_tree_to_the_bit(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (size, folder), nprocs=size)
        results = [torch.load(Path(folder) / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
    exchanged = by_hand([gradient_like(rank, 1001) for rank in range(size)])
    summed = by_hand([gradient_like(slot, 1001) for slot in range(SLOTS)])
    for total, step in results:
        assert torch.equal(total, exchanged)
        assert torch.equal(step, summed)

"""One epoch of an image set, read in each of the ways that are compared: uint8 images and labels in batches of 64.

Peers run at a user's usual settings and at the best that are known for them. Each call starts afresh, with nothing
open and nothing kept but the page cache of the system.
"""

import io
import json
import random
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.loading.data import Images
from pipelines.data.reader import Reader

Batches = Iterator[tuple[Any, Any]]
Side = Callable[[Images, int], Batches]

BATCH = 64
WINDOW = 4
_BLOCK = 64 * BATCH
"""Positions that are located at once."""


def ours(images: Images, epoch: int) -> Batches:
    """The training order, sha256 of every image checked, nothing kept decoded, no thread."""
    split = images.dataset().split("train")
    order, reader = split.order(WINDOW, seed=0), Reader(split, cache_bytes=0)
    for block in range(0, order.n, _BLOCK):
        positions = epoch * order.n + np.arange(block, min(block + _BLOCK, order.n))
        shards, rows = order.locate(positions)
        for first in range(0, len(rows), BATCH):
            here = slice(first, first + BATCH)
            yield reader.read(shards[here], rows[here])


def webdataset_usual(images: Images, epoch: int) -> Batches:
    """As its documentation has it: shards and samples shuffled, decoded by Pillow (which makes RGB of grey)."""
    random.seed(epoch)
    samples = webdataset.WebDataset(images.urls(), shardshuffle=100).shuffle(1000)
    arrays = samples.decode("pil").to_tuple("png", "json").map_tuple(np.asarray, itemgetter("label"))
    return iter(arrays.batched(BATCH))


def webdataset_best(images: Images, epoch: int) -> Batches:
    """A decoder of its own that leaves grey as it is, no chain of handlers, and a small buffer for the shuffle."""
    random.seed(epoch)
    samples = webdataset.WebDataset(images.urls(), shardshuffle=100).shuffle(100)
    return iter(samples.map(_decode).batched(BATCH))


def _decode(sample: dict[str, bytes]) -> tuple[NDArray[np.uint8], int]:
    with Image.open(io.BytesIO(sample["png"]), formats=("PNG",)) as image:
        return np.asarray(image), json.loads(sample["json"])["label"]


class _Folder(torch.utils.data.Dataset[tuple[Any, int]]):
    """What torchvision's ImageFolder does, less its transforms: open, convert, hand over."""

    def __init__(self, files: list[tuple[str, int]], mode: str | None) -> None:
        self.files, self.mode = files, mode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        path, label = self.files[index]
        with open(path, "rb") as file:
            image = Image.open(file, formats=None if self.mode else ("PNG",))
            return np.array(image.convert(self.mode) if self.mode else image), label


def folder_usual(images: Images, epoch: int) -> Batches:
    """RGB, as ImageFolder's own loader makes it, and torch's own collation."""
    torch.manual_seed(epoch)
    return iter(DataLoader(_Folder(images.files(), "RGB"), batch_size=BATCH, shuffle=True, num_workers=0))


def folder_best(images: Images, epoch: int) -> Batches:
    """Grey as it is, one format looked for, batches stacked by numpy."""
    torch.manual_seed(epoch)
    loader = DataLoader(
        _Folder(images.files(), None), batch_size=BATCH, shuffle=True, num_workers=0, collate_fn=_stacked
    )
    return iter(loader)


def _stacked(samples: list[tuple[NDArray[np.uint8], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pictures)), torch.tensor(labels)

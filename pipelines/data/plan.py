"""Which image of a source goes into which shard: a pure function of what the scan saw."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import SPLITS, dataset_digest
from pipelines.data.recipe import Recipe, is_held_out
from pipelines.data.sources import Source
from pipelines.errors import UserError

TRAIN, HELD_OUT = SPLITS
_EXAMPLES = 5


@dataclass(frozen=True)
class Scan:
    """What every image of a source was found to be."""

    contents: NDArray[np.uint8]
    """[N, 32]: `content_hash` of its pixels in the dataset."""
    sizes: NDArray[np.int64]
    """[N, 2]: width and height in the source, pixels."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written: images of the source, and the content that the scan saw in each."""

    name: str
    split: str
    items: tuple[int, ...]
    contents: tuple[bytes, ...]

    @property
    def index(self) -> str:
        """File name of its index."""
        return self.name.removesuffix(".tar") + ".parquet"


@dataclass(frozen=True)
class Duplicates:
    """Images whose pixels are exactly those of another."""

    copies: int = 0
    """How many there are beyond the first of each."""
    dropped: bool = False
    between_splits: int = 0
    """Contents that lie in both splits, as they come from the source."""
    labels_differ: int = 0
    """Contents that come with more than one label."""
    examples: tuple[tuple[str, str], ...] = field(default=())
    """Titles of a few: one and its copy."""


@dataclass(frozen=True)
class Plan:
    """All shards, in order, and the digest that the dataset will have."""

    shards: tuple[ShardPlan, ...]
    digest: str
    duplicates: Duplicates
    source_sizes: dict[str, Any]


def plan_shards(source: Source, scan: Scan, recipe: Recipe) -> Plan:
    """Cut each split, in the order of the source, into shards of `shard_images` (the last may be smaller)."""
    contents = [row.tobytes() for row in scan.contents]
    sides = _sides(source, contents, recipe)
    sides, duplicates = _without_duplicates(source, contents, sides, recipe.drop_duplicates)
    _check_sides(source, sides, recipe)
    shards = []
    for split, items in sides.items():
        for number, first in enumerate(range(0, len(items), recipe.shard_images)):
            chosen = tuple(items[first : first + recipe.shard_images])
            shards.append(ShardPlan(f"{split}-{number:06d}.tar", split, chosen, tuple(contents[i] for i in chosen)))
    sizes = {split: [len(s.items) for s in shards if s.split == split] for split in SPLITS}
    samples = ((contents[i], source.label(i)) for shard in shards for i in shard.items)
    return Plan(tuple(shards), dataset_digest(sizes, samples), duplicates, sizes_of(scan.sizes))


def sizes_of(sizes: NDArray[np.int64]) -> dict[str, Any]:
    """Smallest, median and largest [width, height] by area, of sizes [N, 2]."""
    order = np.lexsort((sizes[:, 1], sizes[:, 0], sizes[:, 0] * sizes[:, 1]))
    places = {"smallest": 0, "median": len(order) // 2, "largest": -1}
    return {name: sizes[order[place]].tolist() for name, place in places.items()}


def own_split(source: Source) -> bool:
    """Whether the source says itself which images are held out."""
    return len(source) > 0 and source.split(0) is not None


def _sides(source: Source, contents: Sequence[bytes], recipe: Recipe) -> dict[str, list[int]]:
    sides: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, content in enumerate(contents):
        by_content = HELD_OUT if is_held_out(content, recipe.held_out) else TRAIN
        sides[source.split(index) or by_content].append(index)
    return sides


def _without_duplicates(
    source: Source, contents: Sequence[bytes], sides: dict[str, list[int]], drop: bool
) -> tuple[dict[str, list[int]], Duplicates]:
    """The sides with each content once, where that is asked; and what was found.

    A published held-out set stays as it is, with the copies in it, so that scores against it mean what they meant
    elsewhere: of a content in both splits the training copy goes.
    """
    first: dict[bytes, int] = {}
    copies: set[int] = set()
    examples: list[tuple[str, str]] = []
    straddling, differing = set(), set()
    for split in (HELD_OUT, TRAIN):
        stays = drop and split == HELD_OUT and own_split(source)
        for index in sides[split]:
            content = contents[index]
            known = first.setdefault(content, index)
            if known == index:
                continue
            if source.label(known) != source.label(index):
                differing.add(content)
            if stays:
                continue
            copies.add(index)
            if len(examples) < _EXAMPLES:
                examples.append((source.title(known), source.title(index)))
            if split == TRAIN and (known_split := source.split(known)) is not None and known_split != TRAIN:
                straddling.add(content)
    found = Duplicates(len(copies), drop, len(straddling), len(differing), tuple(examples))
    if drop:
        sides = {split: [index for index in items if index not in copies] for split, items in sides.items()}
    return sides, found


def _check_sides(source: Source, sides: dict[str, list[int]], recipe: Recipe) -> None:
    if not sides[TRAIN] or (not sides[HELD_OUT] and recipe.held_out > 0 and not own_split(source)):
        empty = HELD_OUT if sides[TRAIN] else TRAIN
        total = sum(map(len, sides.values()))
        if own_split(source):
            raise UserError(f"data.source: {source.name} has no image for {empty}; put some there")
        raise UserError(
            f"data.held_out: with {recipe.held_out} none of the {total} images falls to {empty}; change it"
            + (" (0 keeps none from training)" if empty == HELD_OUT else "")
            + ", or give more (different) images"
        )

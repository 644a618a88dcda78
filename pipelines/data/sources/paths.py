"""What the paths of images say, in a folder as in an archive: which are read, their classes and their split.

Paths are relative and have forward slashes. The top-level folders are the classes; or they are a split
(`train` and `test`, say), and then the folders below them are the classes.
"""

import re
import warnings
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipelines.data.sources.base import NO_LABEL
from pipelines.data.sources.files import printable
from pipelines.data.sources.images import SUFFIXES
from pipelines.errors import UserError
from pipelines.progress import counted

TRAIN, HELD_OUT = "train", "held-out"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation", "held-out", "heldout"), HELD_OUT),
}
"""What data sets call their splits, and which of ours that is."""
_NAMED = 5
"""Parts of a source that a message names."""

_SPLIT_BEGINS = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])")


class Layout(NamedTuple):
    """What the paths say of each image."""

    classes: tuple[str, ...]
    """Names of the class folders, sorted."""
    labels: tuple[int, ...]
    splits: tuple[str, ...] | None
    """`train` or `held-out` of each image; None where the paths are not split."""

    def split(self, index: int) -> str | None:
        """What the source's `split` says of an image."""
        return self.splits[index] if self.splits else None


def read_layout(files: Sequence[str]) -> Layout:
    """Classes, labels and split by path. An image beside the class folders has no label. UserError as `own_split`."""
    tops = [file.partition("/")[0] for file in files]  # of an image beside the folders, itself
    split_of = own_split({top: SPLIT_NAMES.get(top.lower()) for top in tops})
    splits = None
    if split_of is not None:
        splits = tuple(split_of[top] for top in tops)
        files = [file.partition("/")[2] or file for file in files]
    folders = [file.partition("/")[0] if "/" in file else None for file in files]
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    numbers: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    return Layout(classes, tuple(numbers.get(folder, NO_LABEL) for folder in folders), splits)


def own_split(found: dict[str, str | None]) -> dict[str, str] | None:
    """The split of each part of a source, given what its name says; None unless both are there.

    Parts that say neither are for training where both are there, and that is told. UserError where some are named as
    held out and none for training: are the others for training, or are all of them classes?
    """
    said = {part: split for part, split in found.items() if split is not None}
    splits, named, others = set(said.values()), _listed(said), _listed(set(found).difference(said))
    if others and splits == {HELD_OUT}:
        raise UserError(
            f"data.source: by name kept from training: {named}; neither that nor for training: {others}; call what is "
            "to train on `train`, or rename what is no split"
        )
    if others and splits:
        told = "and taken for training" if len(splits) == 2 else "so that none is taken from the names"
        warnings.warn(f"data.source: named as no split, {told}: {others} (beside {named})", stacklevel=5)
    return {part: said.get(part, TRAIN) for part in found} if len(splits) == 2 else None


def _listed(parts: Collection[str]) -> str:
    """Names in a message; empty where there are none."""
    more = f" and {len(parts) - _NAMED:,} more" if len(parts) > _NAMED else ""
    return ", ".join(map(printable, sorted(parts)[:_NAMED])) + more


def split_of_file(path: str) -> str | None:
    """The split that the name of a file of many images begins with, or else that of the folders it lies in, the inner
    ones first: `train-00000-of-00002.parquet`, `data/test/0000.parquet`."""
    found = (_SPLIT_BEGINS.match(part.lower()) for part in reversed(path.split("/")))
    return next((SPLIT_NAMES[match[1]] for match in found if match), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is never looked at: dot files, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def no_image(where: object) -> UserError:
    """For a folder or an archive without any image."""
    return UserError(
        f"data.source: no image in {printable(where)}; files ending in {', '.join(SUFFIXES)} are looked for"
    )


def warn_passed_over(count: int, where: object, also: str = "") -> None:
    """Say how many files are not read, if any, and why: by their names, or what `also` says."""
    if count:
        warnings.warn(
            f"data.source: passed over in {printable(where)}: {counted(count, 'file')}, not ending in "
            f"{', '.join(SUFFIXES)}{also}",
            stacklevel=5,  # where `open_source` was called
        )


def warn_of_labels(count: int, where: object) -> None:
    """Say how many labels beside images do not count, if any, and which would."""
    if count:
        warnings.warn(
            f"data.source: not read as labels in {printable(where)}: {counted(count, '.cls or .json file')}; labels "
            "are whole numbers from 0 on beside an image, alone in KEY.cls or else `label` in KEY.json",
            stacklevel=5,
        )

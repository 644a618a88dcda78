"""The binary versions of CIFAR-10 and CIFAR-100: records of the label's byte or bytes and 3 x 32 x 32 pixels.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.sources.base import as_labels
from pipelines.data.sources.files import printable, refused, unreadable
from pipelines.data.sources.stacks import Part, Stacks, Stored

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    title: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    """The last of them is the label; CIFAR-100's first is the coarse one."""
    names: str
    """File of the classes' names, one a line; without it they are numbers."""
    classes: int


_CIFAR10 = _Version(
    "CIFAR-10", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, "batches.meta.txt", 10
)
_CIFAR100 = _Version("CIFAR-100", ("train.bin",), "test.bin", 2, "fine_label_names.txt", 100)


def is_cifar(names: Collection[str]) -> bool:
    """Whether a folder of these files has CIFAR, in whatever version."""
    return _is_pickled(names) or _version(names) is not None


def open_cifar(root: Path, names: Collection[str]) -> Stacks:
    """All images of a folder of these files. UserError where one is missing or damaged."""
    if _is_pickled(names):
        raise refused(root, "this is CIFAR's Python version, pickles, which are not read; take the binary version")
    version = _version(names)
    assert version is not None
    files = sorted((*version.train, version.test))
    missing = [name for name in files if name not in names]
    if missing:
        raise refused(root, f"{', '.join(missing)} of {version.title} is missing; unpack all of it again")
    classes = _class_names(root, names, version)
    parts = []
    for name in files:
        path = root / name
        record, size = version.label_bytes + _PIXELS, path.stat().st_size
        if size == 0 or size % record:
            raise unreadable(path, version.title, f"{size:,} bytes are not a number of records of {record:,}")
        stack = Stored(str(path), 0, (size // record, *_SHAPE), skip=version.label_bytes)
        # Mapped, so that of a record's page the labels alone are looked at.
        rows = np.memmap(path, np.uint8, "r", shape=(size // record, record))
        labels = as_labels(np.array(rows[:, version.label_bytes - 1]), str(path), len(classes))
        parts.append(Part(name, stack, labels, "held-out" if name == version.test else "train"))
    read = [root / name for name in (*files, version.names) if name in names]
    return Stacks("cifar", root, parts, classes, read)


def _is_pickled(names: Collection[str]) -> bool:
    return {"data_batch_1", "batches.meta"} <= set(names) or {"train", "test", "meta"} <= set(names)


def _version(names: Collection[str]) -> _Version | None:
    if _CIFAR10.train[0] in names or _CIFAR10.test in names:
        return _CIFAR10
    if _CIFAR100.train[0] in names and _CIFAR100.test in names:
        return _CIFAR100
    return None


def _class_names(root: Path, names: Collection[str], version: _Version) -> tuple[str, ...]:
    if version.names not in names:
        return tuple(str(label) for label in range(version.classes))
    path = root / version.names
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "names of classes", error) from None
    found = tuple(printable(line.strip()) for line in lines if line.strip())
    if len(found) != version.classes:
        raise refused(
            path, f"{len(found)} names are not the {version.classes} of {version.title}; correct or remove it"
        )
    return found

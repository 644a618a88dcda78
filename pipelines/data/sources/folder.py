"""A folder of image files."""

import heapq
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from pipelines.data.sources.files import check_text, fingerprint, printable, reason, refused
from pipelines.data.sources.images import is_image, load_image
from pipelines.data.sources.paths import Layout, is_hidden, no_image, read_layout, warn_passed_over
from pipelines.progress import counted


@dataclass(frozen=True)
class Folder:
    """Images below a folder, sorted by relative path. Its subfolders are the classes, labelled in sorted order, or a
    split with the classes below; an image beside the classes has no label."""

    name: str
    files: tuple[str, ...]
    """Paths relative to the folder, with forward slashes."""

    kind = "folder"

    @cached_property
    def _layout(self) -> Layout:
        return read_layout(self.files)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._layout.classes

    def __len__(self) -> int:
        return len(self.files)

    def title(self, index: int) -> str:
        return self.files[index]

    def label(self, index: int) -> int:
        return self._layout.labels[index]

    def split(self, index: int) -> str | None:
        return self._layout.split(index)

    def load(self, index: int) -> Image.Image:
        return load_image(Path(self.name) / self.files[index])

    def fingerprint(self) -> str:
        return fingerprint(self.name, self.files)


def list_files(root: Path) -> list[str]:
    """Paths of the files below a folder that are not hidden, sorted, links followed. UserError where it cannot be
    searched.

    A folder is read once, and where it lies rather than where a link leads to it. Links to what they lie in would never
    end, and those to what is beside would multiply the images: they are passed over.
    """
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    # Links last, and each by its name: what a folder is called must not depend on the order of the file system.
    waiting = [(False, "")]
    again = others = 0
    while waiting:
        is_link, folder = heapq.heappop(waiting)
        try:
            here = root / folder
            known = (here.stat().st_dev, here.stat().st_ino)
            if known in seen or (is_link and here.parent.resolve().is_relative_to(here.resolve())):
                again += 1
                continue
            seen.add(known)
            with os.scandir(here) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    name, what = f"{folder}/{entry.name}" if folder else entry.name, _what_is(entry)
                    if what == "folder":
                        heapq.heappush(waiting, (entry.is_symlink(), name))
                    elif what == "file":
                        files.append(name)
                    else:
                        others += 1
        except OSError as error:
            raise refused(root / folder, f"cannot be read ({reason(error)}); change its permissions") from None
    links = f"{counted(again, 'link')} to folders that are read already or lie above"
    for count, told in (again, links), (others, f"{counted(others, 'special file')} (a pipe, say)"):
        if count:
            warnings.warn(f"data.source: passed over in {printable(root)}: {told}", stacklevel=4)
    return sorted(files)


def _what_is(entry: os.DirEntry[str]) -> str:
    """`folder`, `file`, or `other`: a pipe, say, which would never end. A link to nowhere is named when it is read."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "other"
    except OSError:  # a link to itself
        return "file"


def open_folder(root: Path, files: Sequence[str]) -> Folder:
    """The images among these files of a folder, sorted. UserError where there is none."""
    images = [file for file in files if is_image(file)]
    if not images:
        raise no_image(root)
    check_text(images, root)
    warn_passed_over(len(files) - len(images), root)
    folder = Folder(str(root), tuple(images))
    _ = folder.classes  # its paths are looked at now: what is wrong with them is told at opening, and once
    return folder

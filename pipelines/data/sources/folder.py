"""A folder of image files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from pipelines.data.sources.files import check_text, fingerprint, reason, refused
from pipelines.data.sources.images import is_image, load_image
from pipelines.data.sources.paths import Layout, is_hidden, no_image, read_layout, warn_passed_over


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
    """Paths below a folder that are not hidden, sorted, links followed. UserError where it cannot be searched."""

    def refuse(error: OSError) -> None:
        raise refused(error.filename, f"cannot be read ({reason(error)}); change its permissions")

    files = []
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder).resolve()
        # A link to where it lies, or to above, would never end.
        subfolders[:] = [
            name
            for name in subfolders
            if not is_hidden(name) and not here.is_relative_to((Path(folder) / name).resolve())
        ]
        below = Path(folder).relative_to(root)
        files += [(below / name).as_posix() for name in names if not is_hidden(name)]
    return sorted(files)


def open_folder(root: Path, files: Sequence[str]) -> Folder:
    """The images among these files of a folder, sorted. UserError where there is none."""
    images = [file for file in files if is_image(file)]
    if not images:
        raise no_image(root)
    check_text(images, root)
    warn_passed_over(len(files) - len(images), root)
    return Folder(str(root), tuple(images))

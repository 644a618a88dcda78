"""Where images come from. A source lists its images, decodes any one of them, and knows their labels and its own split.

Which kind it is, is told by what is there and not by options: the bundled digits, a folder, zip or tar of images,
several tars, Parquet files with image bytes, IDX files (MNIST and its family), npy and npz files, CIFAR's binary
version. Nothing is unpickled, executed or extracted to disk, and sizes are checked before anything is decoded.

A new kind is a module with an object as `Source` describes, and a line in `open_source`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from pipelines.data.sources.archives import is_packed_tar, open_archive
from pipelines.data.sources.arrays import open_npy, open_npz
from pipelines.data.sources.base import NO_LABEL, Source
from pipelines.data.sources.cifar import is_cifar, open_cifar
from pipelines.data.sources.digits import Digits
from pipelines.data.sources.files import printable, reason, refused
from pipelines.data.sources.folder import Folder, list_files, open_folder
from pipelines.data.sources.idx import is_idx, open_idx_file, open_idx_folder
from pipelines.data.sources.images import MAX_PIXELS, is_image, load_image
from pipelines.data.sources.paths import is_hidden
from pipelines.data.sources.tables import is_table, open_table
from pipelines.data.sources.tars import is_tar, open_tars
from pipelines.errors import UserError

__all__ = ["MAX_PIXELS", "NO_LABEL", "Digits", "Folder", "Source", "load_image", "open_source"]

_FILES: dict[str, Callable[[Path], Source]] = {
    ".zip": open_archive,
    ".tar": open_archive,
    ".parquet": open_table,
    ".npy": open_npy,
    ".npz": open_npz,
}
_UNDERSTOOD = (
    f"a folder of images, a file ({', '.join(_FILES)} or IDX), a folder of Parquet, tars, IDX or CIFAR, or `digits`"
)


def open_source(source: str) -> Source:
    """`digits`, or the path of a folder or file of images. UserError where there is none, or no image in it."""
    if source == "digits":
        return Digits()
    root = Path(source)
    try:
        root = root.expanduser().absolute()
        if root.is_dir():
            return _open_directory(root)
        if root.is_file():
            return _open_file(root)
        found = root.exists()
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long, no such user's home
        raise UserError(
            f"data.source: {printable(root)} cannot be read ({reason(error)}); give {_UNDERSTOOD}"
        ) from None
    problem = f"{printable(root)} is not a folder or a file" if found else f"there is no {printable(root)}"
    raise UserError(f"data.source: {problem}; give {_UNDERSTOOD}")


def _open_directory(root: Path) -> Source:
    with os.scandir(root) as entries:
        files = {entry.name for entry in entries if not is_hidden(entry.name) and not entry.is_dir()}
    if any(is_idx(name) for name in files):
        return open_idx_folder(root)
    if is_cifar(files):
        return open_cifar(root, files)
    below = list_files(root)
    # Beside images, tables and tars are taken for something about them.
    if any(is_image(name) for name in below):
        return open_folder(root, below)
    if tables := [name for name in below if is_table(name)]:
        return open_table(root, tables)
    if tars := [name for name in below if is_tar(name)]:
        return open_tars(root, tars)
    return open_folder(root, below)


def _open_file(path: Path) -> Source:
    if is_packed_tar(path):
        raise refused(path, "is packed as a whole, so that no image can be read by itself; unpack it first")
    if is_idx(path.name):
        return open_idx_file(path)
    open_kind = _FILES.get(path.suffix.lower())
    if open_kind is None:
        raise UserError(
            f"data.source: {printable(path)} is not a folder, nor a file of a known kind; give {_UNDERSTOOD}"
        )
    return open_kind(path)

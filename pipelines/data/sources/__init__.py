"""Where images come from. A source lists its images, decodes any one of them, and knows their labels and its own split.

Which kind it is, is told by what is there and not by options: the bundled digits, a folder, zip or tar of images,
several tars, Parquet files with image bytes, IDX files (MNIST and its family), npy and npz files, CIFAR's binary
version. Nothing is unpickled, executed or extracted to disk, and sizes are checked before anything is decoded.

A new kind is a module with an object as `Source` describes, and a line in `open_source`.
"""

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
from pipelines.data.sources.tables import has_images, is_table, open_table
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
_DATASET = {"dataset.json", "shards.parquet"}
"""What is a dataset already is no mixture: an ingest refuses it as what it is."""


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
    below = list_files(root)
    here = [name for name in below if "/" not in name]
    pictures, tables = [n for n in below if is_image(n)], [n for n in below if is_table(n)]
    if pictures and not any(has_images(root / name) for name in tables):
        tables = []  # they are about the pictures
    kinds = {
        "IDX": [name for name in here if is_idx(name)],
        "CIFAR": here if is_cifar(here) else [],
        "Parquet": tables,
        "tars": [name for name in below if is_tar(name)],
        "images": pictures,
    }
    found = {kind: names for kind, names in kinds.items() if names}
    if len(found) > 1 and not set(here) >= _DATASET:
        told = ", ".join(f"{kind} ({names[0]}{', ...' if names[1:] else ''})" for kind, names in found.items())
        raise refused(root, f"several kinds of source are in it: {told}; give a folder or a file of one kind")
    if pictures or not found:
        return open_folder(root, below)
    if "IDX" in found:
        return open_idx_folder(root)
    if "CIFAR" in found:
        return open_cifar(root, here)
    return open_table(root, tables) if tables else open_tars(root, found["tars"])


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

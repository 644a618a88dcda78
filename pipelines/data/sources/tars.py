"""Several tars below a folder as one source: the shards of a WebDataset, say. Each is read as a tar by itself is."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from PIL import Image

from pipelines.data.sources.archives import OR_LINKS, Archive, is_packed_tar, open_archive
from pipelines.data.sources.base import NO_LABEL, place
from pipelines.data.sources.files import check_text, fingerprint, refused
from pipelines.data.sources.paths import SPLIT_NAMES, own_split, split_of_file, warn_of_labels, warn_passed_over


class Tars:
    """The images of the tars below a folder, sorted by the path of the tar, then by their own.

    The split is in the names of the tars, of their folders, or of the one folder in each; or else every tar has one
    inside.
    """

    kind = "tar"

    def __init__(self, root: Path, names: Sequence[str], tars: Sequence[Archive], classes: tuple[str, ...]) -> None:
        self.name = str(root)
        self.classes = classes
        self._names, self._tars = tuple(names), tuple(tars)
        self._ends = tuple(accumulate(map(len, tars)))
        tops = (tar.top for tar in tars)
        self._splits = own_split({n: split_of_file(f"{n}/{top}") for n, top in zip(names, tops, strict=True)})
        self._split_inside = all(tar.split(0) is not None for tar in tars)
        self._labels = _labels_of(tars, classes)

    def __len__(self) -> int:
        return self._ends[-1]

    def title(self, index: int) -> str:
        number, position = place(self._ends, index)
        return f"{self._names[number]}/{self._tars[number].title(position)}"

    def label(self, index: int) -> int:
        number, position = place(self._ends, index)
        label = self._tars[number].label(position)
        return label if label == NO_LABEL or self._labels is None else self._labels[number][label]

    def split(self, index: int) -> str | None:
        number, position = place(self._ends, index)
        if self._splits is not None:
            return self._splits[self._names[number]]
        return self._tars[number].split(position) if self._split_inside else None

    def load(self, index: int) -> Image.Image:
        number, position = place(self._ends, index)
        return self._tars[number].load(position)

    def fingerprint(self) -> str:
        return fingerprint(self.name, self._names)


def _labels_of(tars: Sequence[Archive], classes: tuple[str, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Of each tar, the labels that its own ones become; None where they are numbers, which stay."""
    if any(tar.numbered and tar.classes for tar in tars):
        return None
    numbers = {name: label for label, name in enumerate(classes)}
    return tuple(tuple(numbers[name] for name in tar.classes) for tar in tars)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar that is not packed as a whole."""
    return name.lower().endswith(".tar")


def open_tars(root: Path, names: Sequence[str]) -> Tars:
    """The images of tars of these names below a folder. UserError where one has none, or where labels do not agree."""
    check_text(names, root)
    tars = []
    for name in names:
        if is_packed_tar(root / name):
            raise refused(root / name, "is packed as a whole, so that no image can be read by itself; unpack it first")
        tars.append(open_archive(root / name, quiet=True))
    tops = {tar.top for tar in tars}
    if len(tops) > 1 and not all(top.lower() in SPLIT_NAMES for top in tops):
        # What all images of one tar lie in is no wrapping where others have another: it is a class, or several's.
        tars = [
            open_archive(root / name, strip=False, quiet=True) if tar.top else tar
            for name, tar in zip(names, tars, strict=True)
        ]
    warn_passed_over(sum(tar.passed_over for tar in tars), root, OR_LINKS)
    warn_of_labels(sum(tar.unread_labels for tar in tars), root)
    labelled = [tar for tar in tars if tar.classes]
    if other := next((tar for tar in labelled if tar.numbered != labelled[0].numbered), None):
        raise refused(
            other.name,
            f"its labels are {'numbers' if other.numbered else 'class folders'}, unlike those of {labelled[0].name}; "
            "give them separately",
        )
    if labelled and labelled[0].numbered:
        classes = max((tar.classes for tar in labelled), key=len)
    else:
        classes = tuple(sorted({name for tar in labelled for name in tar.classes}))
    return Tars(root, names, tars, classes)

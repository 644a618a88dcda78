"""A zip or a tar of image files, read by random access. Nothing is extracted.

The members are taken as the files of a folder would be, after one top-level folder that has all images is stripped.
In the WebDataset layout an image's label is in the notes beside it, `KEY.cls` or `KEY.json` (`notes`).
"""

import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from pipelines.data.sources.base import NO_LABEL, numbered_classes
from pipelines.data.sources.files import check_text, fingerprint, read_at, refused, unreadable, zip_data_offset
from pipelines.data.sources.images import SUFFIXES, check_image_bytes, decode_image, is_image
from pipelines.data.sources.notes import ENDINGS, NOTE_BYTES, Label, LabelError, read_label
from pipelines.data.sources.paths import Layout, is_hidden, no_image, read_layout, warn_of_labels, warn_passed_over
from pipelines.errors import UserError

_PACKED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
_PACKERS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and zstd begin."""

_NOTES = tuple(f".{ending}" for ending in ENDINGS)

_CHUNK = 2**20
"""Whole blocks of a tar that are looked at, at a time, for what is behind its end."""

OR_LINKS = ", or which are links"

_ENCRYPTED = 1
"""Bit of a zip member's flags."""
_UNIX_TYPE = 0o170000 << 16
_UNIX_FILES = (0, 0o100000 << 16)
"""Type of a zip member where it was made on Unix: unsaid, or a regular file."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    """Its path in the archive."""
    offset: int
    """Where its bytes begin; in a zip where its local header does."""
    size: int
    """Bytes unpacked."""
    packed: int
    """Bytes in the archive."""
    method: int | None = None
    """A zip's compression method; None in a tar."""
    crc: int = 0
    encrypted: bool = False


class Archive:
    """The images of a zip or a tar, sorted by path."""

    def __init__(
        self,
        kind: str,
        path: Path,
        members: Sequence[Member],
        layout: Layout,
        stripped: int,
        numbered: bool,
        passed_over: int,
        unread_labels: int,
    ) -> None:
        self.kind = kind
        self.name = str(path)
        self.classes = layout.classes
        self._members = members
        self._layout = layout
        self.top = members[0].name[: max(0, stripped - 1)]
        """The folder that has all images and is not part of their titles; empty where there is none."""
        self._stripped = stripped
        self.passed_over = passed_over
        """Files that are neither images nor their labels."""
        self.unread_labels = unread_labels
        """Images with a label beside them that does not count."""
        self.numbered = numbered
        """Whether labels are numbers of files beside the images, and the classes named by them."""

    def __len__(self) -> int:
        return len(self._members)

    def title(self, index: int) -> str:
        return self._members[index].name[self._stripped :]

    def label(self, index: int) -> int:
        return self._layout.labels[index]

    def split(self, index: int) -> str | None:
        return self._layout.split(index)

    def load(self, index: int) -> Image.Image:
        member = self._members[index]
        return decode_image(_read(self.name, member), f"{self.name}: {member.name}")

    def fingerprint(self) -> str:
        path = Path(self.name)
        return fingerprint(path.parent, [path.name])


def is_packed_tar(path: Path) -> bool:
    """Whether a file is a tar that was compressed as a whole, so that no image in it can be read by itself."""
    named = _PACKED_TAR.fullmatch("".join(path.suffixes[-2:])) or _PACKED_TAR.fullmatch(path.suffix)
    return bool(named) or (path.suffix.lower() == ".tar" and read_at(path, 0, 6).startswith(_PACKERS))


def open_archive(path: Path, strip: bool = True, quiet: bool = False) -> Archive:
    """The images of a `.zip` or `.tar`. UserError where there is none, or where it is damaged or not to be trusted.

    One folder that has all images is taken for a wrapping, unless `strip` is off: then it is their class. What is
    passed over is told unless `quiet`.
    """
    kind = path.suffix.lower()[1:]
    listed: dict[str, Member] = {}
    passed_over = 0
    try:
        for member, regular in _zip_members(path) if kind == "zip" else _tar_members(path):
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if any(is_hidden(part) for part in parts if part != ".."):
                continue
            if regular and member.name.lower().endswith((*_NOTES, *SUFFIXES)):
                _check(path, member, parts)
                # Of several members of one name the last counts, as in unpacking.
                listed["/".join(parts)] = member._replace(name="/".join(parts))
            else:
                passed_over += 1
    except UserError:
        raise
    except Exception as error:  # both libraries raise nearly every kind on damaged input
        raise unreadable(path, f"a {kind} archive", error) from None

    members = sorted(member for member in listed.values() if is_image(member.name))
    if not members:
        raise no_image(path)
    names = [member.name for member in members]
    check_text(names, path)
    tops = {name.partition("/")[0] if "/" in name else None for name in names}
    stripped = len(names[0].partition("/")[0]) + 1 if strip and len(tops) == 1 and None not in tops else 0
    layout = read_layout([name[stripped:] for name in names])
    beside, orphans = _labels_beside(path, members, listed)
    said = [label for label in beside if label is not None]
    # Sample by sample; but folders that say the class of every image are not given up for notes of some.
    numbered = any(label.number != NO_LABEL for label in said) and (not layout.classes or len(said) == len(members))
    unread_labels = orphans + sum(label.passed_over or (label.number != NO_LABEL and not numbered) for label in said)
    if numbered:
        labels = [NO_LABEL if label is None else label.number for label in beside]
        layout = layout._replace(classes=numbered_classes([np.array(labels)]), labels=tuple(labels))
    if not quiet:
        warn_passed_over(passed_over, path, OR_LINKS)
        warn_of_labels(unread_labels, path)
    return Archive(kind, path, members, layout, stripped, numbered, passed_over, unread_labels)


def _zip_members(path: Path) -> Iterator[tuple[Member, bool]]:
    """Files of a zip, and whether each is a regular one."""
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            if not info.is_dir():
                yield (
                    Member(
                        info.filename.replace("\\", "/"),  # some packers on Windows write its separators
                        info.header_offset,
                        info.file_size,
                        info.compress_size,
                        info.compress_type,
                        info.CRC,
                        bool(info.flag_bits & _ENCRYPTED),
                    ),
                    info.external_attr & _UNIX_TYPE in _UNIX_FILES,
                )


def _tar_members(path: Path) -> Iterator[tuple[Member, bool]]:
    """Files of a tar, and of those joined to it, by their headers, and whether each is a regular one."""
    begins = 0
    with path.open("rb") as stream:
        while True:
            stream.seek(begins)
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as file:
                yield from _up_to_its_end(file)
                ends = file.offset
            # A damaged header ends the listing in silence; so does the end of a copy that was cut off between members.
            end = read_at(path, ends, tarfile.BLOCKSIZE)
            if end.strip(b"\0"):
                raise tarfile.ReadError("a header is damaged")
            if len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
            # So does a header that was lost to zeros: it looks like the end of a tar that another was joined to.
            if (behind := _behind_zeros(stream, ends)) is None:
                return
            begins = behind


def _up_to_its_end(file: tarfile.TarFile) -> Iterator[tuple[Member, bool]]:
    before = -1
    while (info := file.next()) is not None:
        file.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        if info.offset_data <= before or info.size < 0:
            raise tarfile.ReadError("its members overlap")
        before = info.offset_data
        if not info.isdir():
            yield Member(info.name, before, info.size, info.size), info.isreg() and not info.issparse()


def _behind_zeros(stream: IO[bytes], offset: int) -> int | None:
    """Where the first block from `offset` on begins that is not all zeros; None where there is none."""
    stream.seek(offset)
    while chunk := stream.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return offset + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += len(chunk)
    return None


def _check(path: Path, member: Member, parts: Sequence[str]) -> None:
    """UserError where a member that would be read must not or cannot be."""
    called = f"{path}: {member.name}"
    if member.name.startswith("/") or ".." in parts or re.match("[A-Za-z]:/", member.name):
        raise refused(called, "lies outside of the archive's folder; pack it with relative names")
    if member.encrypted:
        raise refused(called, "is encrypted; unpack it and give the folder")
    if member.method not in (None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise refused(
            called,
            f"is packed by method {member.method}, and only stored and deflated members are read; unpack it and give "
            "the folder",
        )
    if is_image(member.name):
        check_image_bytes(max(member.size, member.packed), called)


def _read(path: str | Path, member: Member) -> bytes:
    """A member's bytes. Unpacking stops at the size that the archive's table of contents gives."""
    try:
        start = member.offset if member.method is None else zip_data_offset(path, member.offset)
        data = read_at(path, start, member.packed)
        if member.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        if len(data) != member.size:
            raise ValueError("its size is not as listed")
        if member.method is not None and zlib.crc32(data) != member.crc:
            raise ValueError("its checksum is not as listed")
    except (OSError, ValueError, zlib.error) as error:
        raise unreadable(f"{path}: {member.name}", "a member", error) from None
    return data


def _labels_beside(path: Path, members: Sequence[Member], listed: dict[str, Member]) -> tuple[list[Label | None], int]:
    """What the notes beside each image say, None where there are none; and how many notes are beside no image."""
    notes: dict[str, dict[str, Member]] = {}
    for name, member in listed.items():
        stem, _, ending = name.rpartition(".")
        if ending.lower() in ENDINGS:
            notes.setdefault(stem, {})[ending.lower()] = member
    stems = [member.name.rpartition(".")[0] for member in members]
    labels = [_label(path, notes[stem]) if stem in notes else None for stem in stems]
    return labels, sum(len(notes[stem]) for stem in notes.keys() - set(stems))


def _label(path: Path, notes: dict[str, Member]) -> Label:
    small = {ending: max(member.size, member.packed) <= NOTE_BYTES for ending, member in notes.items()}
    try:
        return read_label({e: _read(path, member) if small[e] else None for e, member in notes.items()})
    except LabelError as error:
        raise refused(f"{path}: {notes[error.ending].name}", str(error)) from None

"""A zip or a tar of image files, read by random access. Nothing is extracted.

The members are taken as the files of a folder would be, after one top-level folder that has all images is stripped.
In the WebDataset layout an image's label is in the file beside it: `KEY.cls`, an integer, or `KEY.json`, whose
`label` is one.
"""

import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.data.sources.base import MAX_CLASSES, NO_LABEL, numbered_classes
from pipelines.data.sources.files import check_text, fingerprint, read_at, refused, unreadable, zip_data_offset
from pipelines.data.sources.images import SUFFIXES, check_image_bytes, decode_image, is_image
from pipelines.data.sources.paths import Layout, is_hidden, no_image, read_layout, warn_of_labels, warn_passed_over
from pipelines.errors import UserError

_PACKED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
_PACKERS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and zstd begin."""

_LABEL_SUFFIXES = (".cls", ".json")
_LABEL_BYTES = 2**20
"""A larger file beside an image is not read for its label."""

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
        self.unread_labels = unread_labels
        """Files that are neither images nor their labels."""
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
            if regular and member.name.lower().endswith((*_LABEL_SUFFIXES, *SUFFIXES)):
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
    labels = _labels_beside(path, members, listed)
    unread_labels = len(listed) - len(members) if labels is None else 0
    if labels is not None:
        layout = layout._replace(classes=numbered_classes([np.array(labels)]), labels=tuple(labels))
    if not quiet:
        warn_passed_over(passed_over, path, OR_LINKS)
        warn_of_labels(unread_labels, path)
    return Archive(kind, path, members, layout, stripped, labels is not None, passed_over, unread_labels)


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
    """Files of a tar by its headers, and whether each is a regular one."""
    with tarfile.open(path, "r:", encoding="utf-8") as file:
        before = -1
        while (info := file.next()) is not None:
            file.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if info.offset_data <= before or info.size < 0:
                raise tarfile.ReadError("its members overlap")
            before = info.offset_data
            if not info.isdir():
                member = Member(info.name, info.offset_data, info.size, info.size)
                yield member, info.isreg() and not info.issparse()
        # A damaged header ends the listing in silence; so does the end of a copy that was cut off between members.
        end = read_at(path, file.offset, tarfile.BLOCKSIZE)
        if end.strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


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


def _labels_beside(path: Path, members: Sequence[Member], listed: dict[str, Member]) -> list[int] | None:
    """Labels in the WebDataset layout, one for each image; None unless every image has one."""
    beside: list[Member] = []
    for member in members:
        stem = member.name[: member.name.rfind(".")]
        found = next((listed[stem + suffix] for suffix in _LABEL_SUFFIXES if stem + suffix in listed), None)
        if found is None or max(found.size, found.packed) > _LABEL_BYTES:
            return None
        beside.append(found)
    labels = []
    for member in beside:
        label = _parse_label(member.name, _read(path, member))
        if label is None:
            return None
        if label >= MAX_CLASSES:
            raise refused(f"{path}: {member.name}", f"its label is not below {MAX_CLASSES:,}; correct it")
        labels.append(label)
    return labels


def _parse_label(name: str, data: bytes) -> int | None:
    """A label of 0 or more, None where there is none."""
    try:
        value = int(data) if name.endswith(".cls") else json.loads(data)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if type(value) is int and value > NO_LABEL else None

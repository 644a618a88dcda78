"""Indexes one tar that was there before: a pure function of its bytes, so that any process may do it.

The tar is read and never changed. A sample is what has one key, by the rule of WebDataset (a member's name up to the
first dot after its last slash): its picture is the member whose whole ending is a type that is read, its label what
its notes say (`sources.notes`). A record of what was found follows the indices, last.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data.decode import MAX_MEMBER_BYTES, Decoder
from pipelines.data.headers import Member, ReadAt, open_whole, read_headers
from pipelines.data.manifest import INDEX_COLUMNS, SPLITS, content_hash, write_table
from pipelines.data.recipe import Recipe, fit_stored, is_held_out
from pipelines.data.sources.files import printable, reason
from pipelines.data.sources.notes import ENDINGS, NOTE_BYTES, Label, LabelError, read_label, sample_key
from pipelines.data.write import Sums
from pipelines.errors import UserError
from pipelines.store import Place, sha256

INDEX = "index"
"""Folder of the indices."""


@dataclass(frozen=True)
class Tar:
    """A tar to be indexed."""

    name: str
    """Its path below the place of the tars."""
    split: str | None
    """All of its images'; None where each one's content says."""
    state: str
    """Size and time of change, by which a record of an earlier attempt is known to be of this tar."""


@dataclass(frozen=True)
class Found:
    """One split of one tar: its index, and what the card's figures are made of."""

    tar: str
    split: str
    index: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    pixel_sum: tuple[int, ...]
    pixel_square_sum: tuple[int, ...]
    labels: dict[int, int]
    """Images of each label, NO_LABEL among them."""
    names: dict[int, str]
    """Of the classes, where the samples say them."""
    unread_labels: int
    """Of images with a label that is there and does not count."""


def index_tar(tars: Place, out: Place, recipe: Recipe, tar: Tar) -> list[Found]:
    """Write the indices of one tar, one for each split that it has images of. UserError where it cannot be read."""
    place = tars / tar.name
    size = place.size()
    read_at, digest = open_whole(place, size)
    pictures, notes = _members(place, read_at, size)
    columns: dict[str, dict[str, list[Any]]] = {split: {name: [] for name in INDEX_COLUMNS} for split in SPLITS}
    sums = {split: Sums(recipe.channels) for split in SPLITS}
    names: dict[str, dict[int, str]] = {split: {} for split in SPLITS}
    unread = Counter[str]()
    for key, member, pixels, data in _decoded(place, read_at, pictures, recipe):
        content = content_hash(pixels)
        split = tar.split or SPLITS[is_held_out(content, recipe.held_out)]
        try:
            label, name, passed_over = label_of(read_at, notes.get(key, {}))
        except LabelError as error:
            raise _refused(place, notes[key][error.ending].name, str(error)) from None
        unread[split] += passed_over
        if name is not None and names[split].setdefault(label, name) != name:
            raise _refused(place, member.name, f"has a label {label} called {name} here, {names[split][label]} before")
        row = (key, member.name, member.offset, member.size, hashlib.sha256(data).digest(), content, label)
        for column, value in zip(INDEX_COLUMNS, row, strict=True):
            columns[split][column].append(value)
        sums[split].add(pixels)
    found = []
    for split in SPLITS:
        if not columns[split]["key"]:
            continue
        # `a.TAR` can lie beside `a.tar`.
        data = write_table(INDEX_COLUMNS, columns[split])
        index = f"{INDEX}/{tar.name.removesuffix('.tar')}.{split}.parquet"
        (out / index).write(data)
        labels, counts = np.unique(columns[split]["label"], return_counts=True)
        found.append(
            Found(
                tar=tar.name,
                split=split,
                index=index,
                samples=len(columns[split]["key"]),
                bytes=size,
                sha256=digest.hex(),
                index_sha256=sha256(data),
                pixel_sum=sums[split].total,
                pixel_square_sum=sums[split].squares,
                labels=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
                names=names[split],
                unread_labels=unread[split],
            )
        )
    return found


def _members(place: Place, read_at: ReadAt, size: int) -> tuple[dict[str, Member], dict[str, dict[str, Member]]]:
    """The picture of each sample, in the order of the tar, and its notes by their endings."""

    def damaged(offset: int, what: str) -> None:
        raise UserError(f"{place}: has a header at byte {offset:,} that cannot be read ({printable(what)})")

    types = Decoder((1, 1, 1)).types
    pictures: dict[str, Member] = {}
    notes: dict[str, dict[str, Member]] = {}
    names: set[str] = set()
    for member in read_headers(read_at, size, damaged):
        key, ending = sample_key(member.name) or ("", "")
        if ending not in (*ENDINGS, *types):
            continue
        if not member.is_plain:
            raise _refused(
                place,
                member.name,
                "is a link, a device or sparse, so that its bytes are not there as they are; pack the tar anew, with "
                "tar's --dereference and --hard-dereference and without --sparse",
            )
        if ending in ENDINGS:
            notes.setdefault(key, {})[ending] = member
            continue
        if member.name in names or key in pictures:
            what = "is there twice" if member.name in names else f"is a second picture of {key}"
            raise _refused(place, member.name, f"{what}; leave one of them out")
        try:
            member.name.encode()
        except UnicodeEncodeError:
            raise _refused(place, member.name, "is not valid UTF-8; rename it") from None
        names.add(member.name)
        pictures[key] = member
    return pictures, notes


def _decoded(
    place: Place, read_at: ReadAt, pictures: Mapping[str, Member], recipe: Recipe
) -> Iterator[tuple[str, Member, Any, bytes]]:
    """Key, member, pixels [S, S, C] as a reader will have them, and bytes of each sample's picture."""
    shape = (recipe.image_size, recipe.image_size, recipe.channels)
    decoder = Decoder(shape, lambda image: fit_stored(image, recipe.image_size, recipe.channels, recipe.resize))
    for key, member in pictures.items():
        if not 0 < member.size <= MAX_MEMBER_BYTES:
            raise _refused(
                place, member.name, f"has {member.size:,} bytes, of up to {MAX_MEMBER_BYTES:,} that are read"
            )
        data = read_at(member.offset, member.size)
        decode = decoder.of(member.name)
        assert decode is not None
        try:
            pixels = np.frombuffer(decode(data), dtype=np.uint8).reshape(shape)
        except Exception as error:  # Pillow's decoders raise nearly every kind
            raise _refused(place, member.name, f"cannot be decoded: {reason(error)}") from None
        yield key, member, pixels, data


def label_of(read_at: ReadAt, notes: Mapping[str, Member]) -> Label:
    """What a sample's notes, by their endings, say of its label. LabelError for one that can be none."""
    return read_label({e: read_at(m.offset, m.size) if m.size <= NOTE_BYTES else None for e, m in notes.items()})


def _refused(place: Place, member: str, problem: str) -> UserError:
    return UserError(f"{place}: member {printable(member)} {problem}")

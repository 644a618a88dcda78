"""The headers of a tar, read one by one without trust: for tars that may be damaged, or come from somebody else.

`tarfile.open` stops at the first header that it does not understand, and sizes that lie can send it back and forth
without end (CVE-2025-8194). Here every step leads on by at least a block; nothing is extracted, and no more than a
long name is kept in memory.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.store import Place, RangeFile

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTRA = 2**20
"""Largest extended header that is read, bytes."""
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


_WHOLE = 256 * 2**20
"""A tar of up to this many bytes is held in memory while it is looked at."""
_CHUNK = 8 * 2**20

ReadAt = Callable[[int, int], bytes]
"""Bytes of a file: from an offset, so many, fewer where it ends before."""


class _Unreadable(Exception):
    """Why a header cannot be."""


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int
    """Where its content begins, bytes."""
    size: int


def open_whole(file: Place, size: int) -> tuple[ReadAt, bytes]:
    """What reads a file of `size` bytes, fastest from front to back, and the sha256 of all of it (32 bytes)."""
    if size <= _WHOLE:
        data = file.read()
        return (lambda offset, count: data[offset : offset + count]), hashlib.sha256(data).digest()
    opened, digest = file.open(), hashlib.sha256()
    for offset in range(0, size, _CHUNK):
        digest.update(opened.read_at(offset, _CHUNK))
    return _Ahead(opened).read_at, digest.digest()


class _Ahead:
    """Reads a file that is asked for from front to back, in large pieces."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._begins, self._piece = file, 0, b""

    def read_at(self, offset: int, size: int) -> bytes:
        inside = offset - self._begins
        if not 0 <= inside <= len(self._piece) - size:
            self._begins, self._piece, inside = offset, self._file.read_at(offset, max(size, _CHUNK)), 0
        return self._piece[inside : inside + size]


def read_headers(read_at: ReadAt, size: int, damaged: Callable[[int, str], object]) -> Iterator[Member]:
    """The files of a tar of `size` bytes, in order. `read_at(offset, size)` gives bytes of it.

    A header that cannot be read is told to `damaged` by its offset and what is wrong, once for each stretch of
    blocks; the search for the next one goes on behind it.
    """
    offset, lost = 0, False
    longer: dict[str, str] = {}  # what an extended header says of the member after it
    while offset + _BLOCK <= size:
        block = read_at(offset, _BLOCK)
        begins, offset = offset, offset + _BLOCK
        if not block.strip(b"\0"):  # the end of the tar, or of one that another was joined to
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = int(longer["size"]) if longer.get("size", "").isdecimal() else header.size
            if not 0 <= length <= size - offset:
                raise _Unreadable(f"claims {length} bytes, which the file does not have")
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
                if length > _MAX_EXTRA:
                    raise _Unreadable(f"has a name of {length} bytes")
                longer = _extended(header.type, read_at(offset, length))
            elif header.type in _FILES:
                yield Member(longer.get("path", header.name), offset, length)
                longer = {}
            elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                longer = {}  # a folder or a link
        except (tarfile.HeaderError, _Unreadable, ValueError) as error:
            if not lost:
                damaged(begins, str(error))
            lost, longer = True, {}
            continue
        lost = False
        offset += -(-length // _BLOCK) * _BLOCK


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """`path` and `size`, where a GNU long name or a pax header has them."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields, begins, ends = {}, 0, len(data.rstrip(b"\0"))
    while begins < ends:
        space = data.find(b" ", begins, begins + 9)
        number = data[begins : max(begins, space)]
        length = int(number) if number.isdigit() else 0
        if not len(number) + 2 < length <= len(data) - begins:
            raise _Unreadable("has pax records that do not add up")
        name, _, value = data[space + 1 : begins + length - 1].partition(b"=")
        if name in (b"path", b"size"):
            fields[name.decode()] = value.decode("utf-8", "surrogateescape")
        begins += length
    return fields

"""The headers of a tar, read one by one without trust: for tars that may be damaged, or come from somebody else.

`tarfile.open` stops at the first header that it does not understand, and sizes that lie can send it back and forth
without end (CVE-2025-8194). Here every step leads on by at least a block; nothing is extracted, and no more than a
long name is kept in memory.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.files import RangeFile
from pipelines.store import Place

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTRA = 2**20
"""Largest extended header that is read, bytes."""
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
"""What no data follows, whatever size its header gives: some packers give a link that of its target."""
_SPARSE = "GNU.sparse."
"""How pax fields of a sparse file begin."""

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
    is_plain: bool = True
    """Whether its bytes lie there as they are: not of a link, a device or a sparse file."""


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
    """What is in a tar of `size` bytes but for folders, in order. `read_at(offset, size)` gives bytes of it.

    A header that cannot be read is told to `damaged` by its offset and what is wrong, once for each stretch of
    blocks; the search for the next one goes on behind it.
    """
    offset, lost = 0, False
    longer: dict[str, str] = {}  # what extended headers say of the member after them
    while offset + _BLOCK <= size:
        block = read_at(offset, _BLOCK)
        begins, offset = offset, offset + _BLOCK
        if not block.strip(b"\0"):  # the end of the tar, or of one that another was joined to
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = int(longer["size"]) if longer.get("size", "").isdecimal() else header.size
            if header.type in _WITHOUT_DATA:
                length = 0
            elif header.type == tarfile.GNUTYPE_SPARSE:
                offset = _behind_map(block, offset, read_at)
            if not 0 <= length <= size - offset:
                raise _Unreadable(f"claims {length} bytes, which the file does not have")
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                if length > _MAX_EXTRA:
                    raise _Unreadable(f"has a name of {length} bytes")
                longer = _extended(header.type, read_at(offset, length)) | longer  # the first has the last word
            elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                if header.type != tarfile.DIRTYPE:
                    is_plain = header.type in _FILES and not any(name.startswith(_SPARSE) for name in longer)
                    name = longer.get(f"{_SPARSE}name", longer.get("path", header.name))
                    yield Member(name, offset, length, is_plain)
                longer = {}
        except (tarfile.HeaderError, _Unreadable, ValueError) as error:
            if not lost:
                damaged(begins, str(error))
            offset, lost, longer = begins + _BLOCK, True, {}
            continue
        lost = False
        offset += -(-length // _BLOCK) * _BLOCK


def _behind_map(block: bytes, offset: int, read_at: ReadAt) -> int:
    """Where the data of a sparse file of GNU's old kind begins: the map in its header may go on in blocks behind."""
    goes_on = block[482]
    while goes_on:
        block = read_at(offset, _BLOCK)
        if len(block) < _BLOCK:
            raise _Unreadable("has a map of holes that is cut off")
        goes_on, offset = block[504], offset + _BLOCK
    return offset


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """`path`, `size` and what is said of holes, where a GNU long name or a pax header has them."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    fields, begins, ends = {}, 0, len(data.rstrip(b"\0"))
    while begins < ends:
        space = data.find(b" ", begins, begins + 9)
        number = data[begins : max(begins, space)]
        length = int(number) if number.isdigit() else 0
        if not len(number) + 2 < length <= len(data) - begins:
            raise _Unreadable("has pax records that do not add up")
        name, _, value = data[space + 1 : begins + length - 1].decode("utf-8", "surrogateescape").partition("=")
        if name in ("path", "size") or name.startswith(_SPARSE):
            fields[name] = value
        begins += length
    return fields

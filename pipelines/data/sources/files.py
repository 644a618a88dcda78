"""Reading files that may be damaged or hostile: names fit to print, bytes at a place, what changed."""

import hashlib
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from pipelines.errors import UserError, one_line

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip's member: signature, then the lengths of its name and of its extra field."""

_OBJECT = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")
"""An object of Python in a message, by where it is in memory."""


def printable(name: object) -> str:
    """A name as one line without control characters, which an archive may put into its members' names."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def reason(error: Exception) -> str:
    """What went wrong, in one printable line, the same in every process; without the file, which the message names
    already."""
    return _OBJECT.sub("", printable(getattr(error, "strerror", None) or one_line(error)))


def refused(called: object, problem: str) -> UserError:
    """For a file, or a part of it, with what is wrong with it and the fix: one line, whatever it is called."""
    return UserError(f"data.source: {printable(called)}: {problem}")


def unreadable(called: object, kind: str, error: Exception | str) -> UserError:
    """For a file, or a part of it, that is not what its name says."""
    why = error if isinstance(error, str) else reason(error)
    return refused(called, f"cannot be read as {kind} ({why}); copy or make it again")


def check_text(names: Iterable[str], where: object) -> None:
    """UserError where a name is not valid UTF-8: as the title of an image it could not be written down."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"data.source: the name {printable(where)}/{name!a} is not valid UTF-8; rename it"
            ) from None


def fingerprint(folder: str | Path, files: Iterable[str]) -> str:
    """Hex sha256 over name, size and time of change of files below a folder. UserError names one that is gone."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(os.path.join(folder, file))
        except OSError as error:
            path = os.path.join(folder, file)
            raise refused(path, f"cannot be read ({reason(error)}); put it back, or start again without it") from None
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_at(path: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file, fewer where it ends before. The file is not kept open, so its reader can be pickled."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def zip_data_offset(path: str | Path, header: int) -> int:
    """Where the bytes of a zip's member begin, whose local header is at `header`. ValueError where none is there."""
    head = read_at(path, header, _LOCAL_HEADER.size)
    if len(head) < _LOCAL_HEADER.size or not head.startswith(b"PK\3\4"):
        raise ValueError("no member where the table of contents has one")
    _, name, extra = _LOCAL_HEADER.unpack(head)
    return header + _LOCAL_HEADER.size + int(name) + int(extra)

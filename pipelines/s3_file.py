"""An object on S3 that is read by ranges, and the words for what pyarrow says of it."""

import contextlib
import errno
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from pyarrow import fs

from pipelines.errors import one_line
from pipelines.store import Place

if TYPE_CHECKING:
    from pipelines.s3 import S3Place

GAP_BYTES = 256 * 2**10
"""What a request's delay, some 5 ms, is worth at 50 MB/s."""
_GONE = re.compile(r"AWS Error (?:NO_SUCH_KEY\b|RESOURCE_NOT_FOUND\b|\w+ \(HTTP status 404\))")


class S3File:
    """An object that is read by ranges. FileNotFoundError where it has gone meanwhile."""

    gap = GAP_BYTES

    def __init__(self, place: "S3Place", file: Any, size: int) -> None:
        self._place, self._file, self._size = place, file, size

    def read_at(self, offset: int, size: int) -> bytes:
        size = min(size, self._size - offset) if offset >= 0 else 0
        if size <= 0:
            return b""
        return self._place.request("read", lambda files: self._range(files, offset, size), size)

    def _range(self, files: Any, offset: int, size: int) -> bytes:
        # Where an answer is shorter than what was asked for, pyarrow says nothing and leaves the rest of the memory as
        # it was, be it what somebody else had there. A mark at the end of it tells.
        data, mark = bytearray(size), os.urandom(min(16, size))
        data[-len(mark) :] = mark
        try:
            self._file.get_stream(offset, size).readinto(data)
        except OSError as error:
            raise missing(self._place) if self._is_gone(files, said_by(error)) else error from None
        if data.endswith(mark):
            raise OSError(f"the answer has fewer than the {size} bytes that were asked for")
        return bytes(data)

    def _is_gone(self, files: Any, said: str) -> bool:
        # Where fewer bytes were asked for than the answer takes that says so, pyarrow cannot read it.
        unread = "response stream" in said
        return _GONE.match(said) is not None or (
            unread and files.get_file_info(self._place.location).type == fs.FileType.NotFound
        )

    def close(self) -> None:
        """Nothing stays open between requests."""


def missing(place: Place) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(place))


def said_by(error: BaseException) -> str:
    """What pyarrow says happened, less the part that repeats the key."""
    return one_line(OSError(re.sub(r"^When .*?: (?=AWS Error)", "", str(error), flags=re.DOTALL)))


@contextlib.contextmanager
def spooled(write: Callable[[memoryview], None]) -> Iterator[IO[bytes]]:
    """A file of this host's to write in parts; `write` gets all of it when the block has ended well. What lies in it
    takes disk, and memory only as far as there is some to spare."""
    with tempfile.TemporaryFile() as file:
        yield file
        file.flush()
        if not file.tell():  # nothing cannot be mapped
            write(memoryview(b""))
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as whole:
            write(whole)

"""Files that are read in parts, wherever they lie."""

import os
import weakref
from typing import Protocol

from pipelines.errors import Failed, one_line


class StorageError(Failed):
    """The storage does not answer as it should: what is stored may well be whole. The message names the file."""


class RangeFile(Protocol):
    """A file open for reading anywhere. Threads may share it; it is closed with its last reference at the latest."""

    gap: int
    """Bytes that are sooner read than skipped by another request; 0 where requests cost nothing."""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer where the file ends before. StorageError where they cannot be had."""

    def close(self) -> None: ...


class LocalFile:
    """A `RangeFile` on this host, of a descriptor that it takes over."""

    gap = 0

    def __init__(self, name: str, descriptor: int) -> None:
        self._name, self._descriptor = name, descriptor
        # With the last reference: another thread may be reading a file that its opener has done with.
        self._close = weakref.finalize(self, os.close, descriptor)
        self._close.atexit = False  # the end of the process closes it too, and a thread may still be reading then

    def read_at(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise StorageError(f"{self._name}: cannot be read: {one_line(error)}") from None

    def close(self) -> None:
        self._close()

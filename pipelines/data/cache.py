"""Whole shards on local disk, for datasets that lie elsewhere. The processes of a host may share a folder.

    SHA256.tar           a whole shard, named by the sha256 that the table of shards has for it, last used at its mtime
    SHA256.partial       one being downloaded, locked by who does it, and as large from the start as it is to become
    lock                 held while room is made

A name appears by a rename after size and sha256 were checked, so a partial download is never taken for a shard. The
kernel frees a dead process's locks; what it left half done is downloaded anew, or cleared when room is made.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.data.manifest import Shard
from pipelines.errors import UserError
from pipelines.store import LocalFile, Place

_PIECE = 8 * 2**20
_WHOLE, _PARTIAL = ".tar", ".partial"


class ShardCache:
    """At most `limit_bytes` of shards in a folder; those that were not used for longest make room.

    A file that leaves while it is open can be read on, and takes its space until it is closed. UserError where the
    folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit_bytes = limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "lock").touch()
        except OSError as error:
            raise UserError(f"cache folder {folder}: cannot write there ({error.strerror})") from None

    def open(self, tar: Place, shard: Shard) -> LocalFile | None:
        """The tar of a shard as a local file, downloaded where it is not here yet.

        None where there is no room for it, or where what lies at `tar` is not what the table of shards says: then
        it is to be read where it is. FileNotFoundError and StorageError come from there.
        """
        if shard.bytes > self.limit_bytes:
            return None
        name = shard.sha256.hex()
        whole, partial = self.folder / f"{name}{_WHOLE}", self.folder / f"{name}{_PARTIAL}"
        while True:
            if (file := self._open_whole(whole, shard.bytes)) is not None:
                return file
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # where another process downloads it, wait for that
                if not _is(descriptor, partial):
                    continue  # by now it is a whole one, or was cleared
                try:
                    if not (self._make_room(descriptor, partial, shard.bytes) and _download(tar, shard, descriptor)):
                        return None
                    os.rename(partial, whole)
                finally:
                    partial.unlink(missing_ok=True)
            finally:
                os.close(descriptor)

    def discard(self, shard: Shard) -> None:
        """Forget a shard whose copy turned out damaged."""
        (self.folder / f"{shard.sha256.hex()}{_WHOLE}").unlink(missing_ok=True)

    def _open_whole(self, path: Path, size: int) -> LocalFile | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # another process may own it
            os.utime(descriptor)
        return LocalFile(str(path), descriptor)

    def _make_room(self, descriptor: int, partial: Path, size: int) -> bool:
        """Let the oldest go until `size` more bytes fit, and take them; False where they do not."""
        with self._lock():
            files = []
            for path in self.folder.iterdir():
                if path.suffix == _PARTIAL and path != partial and _is_abandoned(path):
                    path.unlink(missing_ok=True)
                elif path.suffix in (_WHOLE, _PARTIAL) and path != partial:
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        files.append((status.st_mtime_ns, status.st_size, path))
            taken = sum(bytes_ for _, bytes_, _ in files)
            for _, bytes_, path in sorted(files):
                if taken + size <= self.limit_bytes:
                    break
                if path.suffix == _WHOLE:
                    path.unlink(missing_ok=True)
                    taken -= bytes_
            if taken + size > self.limit_bytes:  # others are downloading
                return False
            os.ftruncate(descriptor, size)
            return True

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _download(tar: Place, shard: Shard, descriptor: int) -> bool:
    """Copy a tar; False where it is not what the table of shards says, or the disk is full."""
    source, digest, done = tar.open(), hashlib.sha256(), 0
    try:
        while piece := source.read_at(done, min(_PIECE, shard.bytes + 1 - done)):
            digest.update(piece)
            if done + len(piece) > shard.bytes or os.pwrite(descriptor, piece, done) != len(piece):
                return False
            done += len(piece)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        return False  # of our disk: those of the source are StorageErrors
    finally:
        source.close()
    return done == shard.bytes and digest.digest() == shard.sha256


def _is(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_abandoned(partial: Path) -> bool:
    """Whether nobody is downloading into this file."""
    try:
        with open(partial, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False

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
from pipelines.store import DamageError, LocalFile, Place

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
        it is to be read where it is. DamageError where nothing lies there; StorageError where it cannot be reached.
        """
        if shard.bytes > self.limit_bytes:
            return None
        try:
            while True:
                if (file := self._open_whole(shard)) is not None:
                    return file
                if not self._fetch(tar, shard):
                    return None
        except OSError:  # of our own disk, which may be full, say; training goes on without a cache
            return None

    def _fetch(self, tar: Place, shard: Shard) -> bool:
        """Download a shard, or wait for who does; False where it cannot be kept here."""
        whole, partial = self._path(shard, _WHOLE), self._path(shard, _PARTIAL)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is(descriptor, partial):
                return True  # by now another process has made a whole one of it, or given up
            kept = whole.exists()
            try:
                if not kept and self._make_room(descriptor, partial, shard.bytes) and _copy(tar, shard, descriptor):
                    os.rename(partial, whole)
                    return True
            finally:
                # Ours as long as we hold its lock; after the rename the name may be another process's.
                if _is(descriptor, partial):
                    partial.unlink()
            return kept
        finally:
            os.close(descriptor)

    def discard(self, shard: Shard) -> None:
        """Forget a shard whose copy turned out damaged."""
        self._path(shard, _WHOLE).unlink(missing_ok=True)

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{shard.sha256.hex()}{suffix}"

    def _open_whole(self, shard: Shard) -> LocalFile | None:
        path = self._path(shard, _WHOLE)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        file = LocalFile(str(path), descriptor)
        if os.fstat(descriptor).st_size != shard.bytes:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # another user's process may own it
            os.utime(descriptor)
        return file

    def _make_room(self, descriptor: int, partial: Path, size: int) -> bool:
        """Let the oldest go until `size` more bytes fit, and take them; False where they do not."""
        with self._lock():
            files = []
            for path in self.folder.iterdir():
                if path == partial or path.suffix not in (_WHOLE, _PARTIAL):
                    continue
                if path.suffix == _WHOLE or not _cleared(path):
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


def _copy(tar: Place, shard: Shard, descriptor: int) -> bool:
    """Copy a tar into an open file; False where it is not what the table of shards says."""
    try:
        source = tar.open()
    except FileNotFoundError:
        raise DamageError(f"{tar} is missing") from None
    digest, done = hashlib.sha256(), 0
    try:
        while done <= shard.bytes and (piece := source.read_at(done, min(_PIECE, shard.bytes + 1 - done))):
            digest.update(piece)
            done += os.pwrite(descriptor, piece, done)
    finally:
        source.close()
    return done == shard.bytes and digest.digest() == shard.sha256


def _is(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _cleared(partial: Path) -> bool:
    """Delete a partial download if nobody is at it; whether it is gone."""
    try:
        with open(partial, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True

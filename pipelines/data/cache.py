"""Whole shards on local disk, for datasets that lie elsewhere. The processes of a host may share a folder.

    SHA256.tar           a whole shard, named by the sha256 that the table of shards has for it, last used at its mtime
    SHA256.partial       one being downloaded, locked by who does it, and as large from the start as it is to become
    lock                 held while room is made

A name appears by a rename after size and sha256 were checked, so a partial download is never taken for a shard. The
kernel frees a dead process's locks; what it left half done is downloaded anew, or cleared when room is made. What makes
room gives it back at once, though others have it open: they find an empty file, and read from where it comes from.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from pipelines.data.manifest import Shard
from pipelines.errors import UserError, one_line
from pipelines.files import LocalFile
from pipelines.store import DamageError, Place

STALL_SECONDS = 60.0
"""How long another process is waited for that has a lock and does nothing."""
REST_SECONDS = 300.0
"""How long nothing is downloaded after the folder could not be used."""

_PIECE = 8 * 2**20
_WHOLE, _PARTIAL = ".tar", ".partial"


class ShardCache:
    """At most `limit_bytes` of shards in a folder; those that were not opened for longest make room, open or not.

    UserError where the folder cannot be written. Where that turns out later, and where a shard is larger than the
    limit, there is a warning, and shards are read from where they are.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit_bytes = limit_bytes
        self._rests_until = 0.0
        self._warned: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(_open_file(self.folder / "lock", os.O_WRONLY | os.O_CREAT))
        except OSError as error:
            raise UserError(f"cache folder {folder}: cannot write there ({error.strerror})") from None

    def open(self, tar: Place, shard: Shard) -> LocalFile | None:
        """The tar of a shard as a local file, downloaded where it is not here yet.

        None where there is no room for it, or where what lies at `tar` is not what the table of shards says: then
        it is to be read where it is. DamageError where nothing lies there; StorageError where it cannot be reached.
        """
        if shard.bytes > self.limit_bytes:
            self._warn("size", f"is too small for {tar}, which is read from where it is; raise data.cache.gib")
            return None
        try:
            while (file := self._open_whole(shard)) is None:
                if time.monotonic() < self._rests_until or not self._fetch(tar, shard):
                    return None
            return file
        except OSError as error:  # of our own disk, which may be full, say; training goes on without a cache
            self._rests_until = time.monotonic() + REST_SECONDS
            why = error.strerror or one_line(error)
            self._warn("use", f"cannot be used ({why}); for now shards are read from where they are")
            return None

    def _warn(self, kind: str, what: str) -> None:
        """Say something, once of each kind: shards are many."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"data.cache: {self.folder} {what}", stacklevel=3)

    def _fetch(self, tar: Place, shard: Shard) -> bool:
        """Download a shard, or wait for who does; False where it cannot be kept here."""
        whole, partial = self._path(shard, _WHOLE), self._path(shard, _PARTIAL)
        descriptor = _open_file(partial, os.O_RDWR | os.O_CREAT)
        try:
            _lock(descriptor, partial)
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
        _free(self._path(shard, _WHOLE))

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{shard.sha256.hex()}{suffix}"

    def _open_whole(self, shard: Shard) -> LocalFile | None:
        path = self._path(shard, _WHOLE)
        try:
            descriptor = _open_file(path, os.O_RDONLY)
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
        with self._alone():
            held, files = 0, []
            for path in self.folder.iterdir():
                if path == partial or path.suffix not in (_WHOLE, _PARTIAL):
                    continue
                if path.suffix == _PARTIAL and _cleared(path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat(follow_symlinks=False)
                    if path.suffix == _PARTIAL:
                        held += status.st_size
                    else:
                        files.append((status.st_mtime_ns, status.st_size, path))
            if held + size > self.limit_bytes:  # others are downloading, and nothing that could leave would do
                return False
            taken = held + sum(bytes_ for _, bytes_, _ in files)
            for _, bytes_, path in sorted(files):
                if taken + size <= self.limit_bytes:
                    break
                _free(path)
                taken -= bytes_
            os.ftruncate(descriptor, size)
            os.posix_fallocate(descriptor, 0, size)  # a full disk says so now, before anything is downloaded
            return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = _open_file(self.folder / "lock", os.O_WRONLY | os.O_CREAT)
        try:
            _lock(descriptor, self.folder / "lock")
            yield
        finally:
            os.close(descriptor)


def _open_file(path: Path, flags: int) -> int:
    """Open a plain file and nothing else: others may write to the folder, and a link would lead out of it."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    """Take a file's lock. TimeoutError where who has it has stopped: it has not written to the file for long."""
    written, end = -1, 0.0
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (now := os.fstat(descriptor).st_mtime_ns) != written:
            written, end = now, time.monotonic() + STALL_SECONDS
        elif time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, "another process has it locked, and does nothing", str(path))
        time.sleep(0.01)


def _free(path: Path) -> None:
    """Delete a file, and give back its room though others have it open, unless it has another name elsewhere."""
    try:
        descriptor = _open_file(path, os.O_WRONLY)
    except OSError:  # there is none, or it is a link, or not ours to write
        path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
        if os.fstat(descriptor).st_nlink == 0:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


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
    except FileNotFoundError:
        raise DamageError(f"{tar} is missing") from None
    finally:
        source.close()
    return done == shard.bytes and digest.digest() == shard.sha256


def _is(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _cleared(partial: Path) -> bool:
    """Delete a partial download if nobody is at it; whether it is gone."""
    try:
        descriptor = _open_file(partial, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True

"""Data on S3, or on a server that speaks its protocol, through pyarrow.

Endpoint, region and keys are those of the standard variables: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (http or https,
buckets in the path), AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_CA_BUNDLE.

Every request has limits in time and is tried again a few times, here and not in the AWS library: that one takes a
503 of a proxy for final, and has no limit for an answer that drips.
"""

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from pipelines.errors import UserError, one_line
from pipelines.files import RangeFile, StorageError
from pipelines.s3_connection import Abandoned, Endpoint, connect
from pipelines.store import TEMPORARY, DamageError, Place

REQUEST_BYTES = 8 * 2**20
"""Most bytes that are asked for at once."""

_GAP_BYTES = 256 * 2**10  # what a request's delay, some 5 ms, is worth at 50 MB/s
_FINAL = re.compile(
    r"AWS Error (?:ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|\w+ \(HTTP status (?:40[0135]|30\d)\))"
)
_GONE = re.compile(r"AWS Error (?:NO_SUCH_KEY\b|RESOURCE_NOT_FOUND\b|\w+ \(HTTP status 404\))")
_ADDRESS = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)((?:/[^?#]*)?)")

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a request may take and how often it is tried. A dead endpoint is told within about 8 seconds, a silent
    one within 80, a dripping one within 200. A request that changes something is not given up for silence: a silent
    endpoint is told as late as a dripping one.

    A listing has as many pages as there are, and pyarrow asks for them at one go: it, and the removal of a prefix, has
    twice the time at each further attempt, in all 63 times that of a request.
    """

    connect_seconds: float = 5.0
    stall_seconds: float = 10.0
    """Without a byte; at least 1."""
    request_seconds: float = 30.0
    """All in all for a request of up to REQUEST_BYTES; a larger one has as much for each such part."""
    attempts: int = 6
    pause_seconds: float = 0.25
    """After the first attempt; twice as long after each further one."""

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each attempt but the first."""
        for attempt in range(self.attempts - 1):
            # Unlike waits: many workers must not come back at once.
            yield self.pause_seconds * 2**attempt * random.uniform(0.5, 1)


class S3Place(Place):
    """An object, or a prefix as a folder of objects. Pickles as its address: connections are each process's own.

    What S3 lacks (a path, locks, claims, folders that appear whole) is a UserError.
    """

    is_local = False
    bucket: str
    key: str
    """Without slashes at its ends; empty for the bucket itself."""
    patience: Patience

    def __init__(self, bucket: str, key: str = "", patience: Patience | None = None) -> None:
        self.__dict__.update(bucket=bucket, key=key, patience=patience or Patience())

    @staticmethod
    def of(uri: str | os.PathLike[str]) -> "S3Place":
        """The place at s3://bucket/prefix. UserError for what is no such address."""
        found = _ADDRESS.fullmatch(os.fspath(uri))
        if found is None:
            raise UserError(
                f"storage {os.fspath(uri)}: give s3://bucket/prefix; the endpoint is named by AWS_ENDPOINT_URL"
            )
        bucket, key = found.groups()
        return S3Place(bucket) / key.strip("/") if key.strip("/") else S3Place(bucket)

    def __truediv__(self, name: str) -> "S3Place":
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{self}: {name!r} cannot be the name of an object in it")
        return S3Place(self.bucket, f"{self.key}/{name}" if self.key else name, self.patience)

    def __str__(self) -> str:
        return f"s3://{self._location}"

    @property
    def _location(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def path(self) -> Path:  # what every operation that S3 lacks begins with
        raise UserError(f"storage {self}: only local folders are supported for this, give a path")

    @property
    def name(self) -> str:
        return self._location.rsplit("/", 1)[-1]

    def is_within(self, folder: str | os.PathLike[str]) -> bool:
        return False

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def size(self) -> int:
        return int(self._file_info().size)

    def changed(self) -> int:
        return int(self._file_info().mtime_ns)

    def find(self, suffix: str) -> Sequence[str]:
        selector = fs.FileSelector(self._location, allow_not_found=True, recursive=True)
        found = self._try("listed", lambda files: files.get_file_info(selector), None)
        paths = (i.path.removeprefix(f"{self._location}/") for i in found if i.type == fs.FileType.File)
        shown = (path for path in paths if not any(part.startswith(".") for part in path.split("/")))
        return sorted(path for path in shown if path.lower().endswith(suffix))

    def list(self) -> list[str]:
        selector = fs.FileSelector(self._location, allow_not_found=True)
        found = self._try("listed", lambda files: files.get_file_info(selector), None)
        return sorted(info.base_name for info in found if not info.base_name.startswith(TEMPORARY))

    def open(self) -> RangeFile:
        def opened(files: Any) -> tuple[Any, int]:
            file = files.open_input_file(self._location)
            return file, file.size()

        return _S3File(self, *self._try("opened", opened))

    def read(self) -> bytes:
        file, data = self.open(), bytearray()
        while part := file.read_at(len(data), REQUEST_BYTES):
            data += part
        return bytes(data)

    def write(self, data: bytes) -> None:
        """Commit one object: it appears when all of it has arrived, and a kill before leaves the old one.

        Attempts that took too long are waited for, and at last cut off, before this returns. What a server had received
        whole by then, and carries out later yet, can undo what was written since: pyarrow has no conditional writes.
        """

        def put(files: Any) -> None:
            stream = files.open_output_stream(self._location)
            stream.write(data)  # where this fails, closing fails too: half an object is never completed
            stream.close()

        self._try("written", put, len(data), changes=True)

    def delete(self) -> None:
        """Delete this object; nothing happens where there is none. pyarrow keeps a prefix that becomes empty alive
        with an object of its name and a slash, which `list` does not show."""
        with contextlib.suppress(FileNotFoundError):
            self._try("deleted", lambda files: files.delete_file(self._location), changes=True)

    def remove(self) -> None:
        """Delete all objects below this prefix; not at once, so that a reader may find some of them. UserError for a
        whole bucket."""
        if not self.key:
            raise UserError(f"storage {self}: a whole bucket is not removed from here; name a prefix in it")
        with contextlib.suppress(FileNotFoundError):
            self._try("deleted", lambda files: files.delete_dir(self._location), None, changes=True)

    def _file_info(self) -> Any:
        info = self._info()
        if info.type != fs.FileType.File:
            raise _missing(self)
        return info

    def _info(self) -> Any:
        return self._try("looked up", lambda files: files.get_file_info(self._location))

    def _try(self, what: str, call: Callable[[Any], T], size: int | None = 0, changes: bool = False) -> T:
        """Run a call on the file system until it succeeds, as often and as long as patience lasts.

        `size` is the bytes that travel, None where nobody knows. One that `changes` something leaves nothing under way.
        """
        patience = self.patience
        # Who gives up a change does not learn whether it was made: the answer is waited for while another attempt runs.
        stall = patience.stall_seconds + (patience.request_seconds if changes else 0)
        connection = connect(Endpoint.of_environment(), patience.connect_seconds, stall)
        limit = patience.request_seconds * max(1, -(-(size or 0) // REQUEST_BYTES))
        pauses, abandoned, attempt = patience.pauses(), [], 1
        try:
            while True:
                try:
                    return connection.run(call, limit)
                except FileNotFoundError:
                    raise _missing(self) from None
                except (OSError, pa.ArrowException) as error:
                    if isinstance(error, Abandoned):
                        abandoned.append(error.request)
                    said = _said(error)
                    final = _FINAL.match(said) is not None
                    pause = None if final else next(pauses, None)
                    if pause is None:
                        tries = "" if attempt == 1 else f" in {attempt} attempts"
                        hint = "; check the AWS_ variables" if final else ""
                        raise StorageError(
                            f"{self}: could not be {what}{tries}: {said} ({connection.endpoint}){hint}"
                        ) from None
                time.sleep(pause)
                attempt, limit = attempt + 1, limit * (2 if size is None else 1)
        finally:
            if changes:
                connection.settle(abandoned, patience.stall_seconds)


def pauses_of(place: Place) -> Iterator[float]:
    """Seconds to wait before each time that it is worth to read something at a place again: none where it is on this
    host, whose disk says the same again."""
    return place.patience.pauses() if isinstance(place, S3Place) else iter(())


def insist(place: Place, attempt: Callable[[], T]) -> T:
    """What `attempt` returns. While it finds damage, or nothing (DamageError, FileNotFoundError), at a place on S3, it
    is repeated as patiently as a request that fails: one answer of a network proves neither."""
    pauses = pauses_of(place)
    while True:
        try:
            return attempt()
        except (DamageError, FileNotFoundError):
            pause = next(pauses, None)
            if pause is None:
                raise
        time.sleep(pause)


class _S3File:
    """An object that is read by ranges. FileNotFoundError where it has gone meanwhile."""

    gap = _GAP_BYTES

    def __init__(self, place: S3Place, file: Any, size: int) -> None:
        self._place, self._file, self._size = place, file, size

    def read_at(self, offset: int, size: int) -> bytes:
        size = min(size, self._size - offset) if offset >= 0 else 0
        if size <= 0:
            return b""
        return self._place._try("read", lambda files: self._range(files, offset, size), size)

    def _range(self, files: Any, offset: int, size: int) -> bytes:
        # Where an answer is shorter than what was asked for, pyarrow says nothing and leaves the rest of the memory as
        # it was, be it what somebody else had there. A mark at the end of it tells.
        data, mark = bytearray(size), os.urandom(min(16, size))
        data[-len(mark) :] = mark
        try:
            self._file.get_stream(offset, size).readinto(data)
        except OSError as error:
            raise _missing(self._place) if self._is_gone(files, _said(error)) else error from None
        if data.endswith(mark):
            raise OSError(f"the answer has fewer than the {size} bytes that were asked for")
        return bytes(data)

    def _is_gone(self, files: Any, said: str) -> bool:
        # Where fewer bytes were asked for than the answer takes that says so, pyarrow cannot read it.
        unread = "response stream" in said
        return _GONE.match(said) is not None or (
            unread and files.get_file_info(self._place._location).type == fs.FileType.NotFound
        )

    def close(self) -> None:
        """Nothing stays open between requests."""


def _missing(place: Place) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(place))


def _said(error: BaseException) -> str:
    """What pyarrow says happened, less the part that repeats the key."""
    return one_line(OSError(re.sub(r"^When .*?: (?=AWS Error)", "", str(error), flags=re.DOTALL)))

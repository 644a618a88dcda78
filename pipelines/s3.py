"""Places on S3, or on a server that speaks its protocol, through pyarrow.

S3 renames nothing, so a folder is committed by its manifest, which is written last and deleted first: a folder without
one does not exist. Claims and locks are conditional writes (`pipelines.s3_conditional`), locks are leases.

Endpoint, region and keys are those of the standard variables: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (http or https,
buckets in the path), AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_CA_BUNDLE.

Every request has limits in time and is tried again a few times, here and not in the AWS library: that one takes a
503 of a proxy for final, and has no limit for an answer that drips.
"""

import contextlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from pipelines.errors import UserError
from pipelines.files import RangeFile, StorageError
from pipelines.s3_conditional import Conditional, Seen, new_writer
from pipelines.s3_connection import Abandoned, Endpoint, connect
from pipelines.s3_file import S3File, missing, said_by, spooled
from pipelines.s3_lease import Lease, Terms
from pipelines.store import MANIFEST, TEMPORARY, DamageError, Place, dump_manifest, manifest_of

REQUEST_BYTES = 8 * 2**20
"""Most bytes that are asked for at once."""

_FINAL = re.compile(
    r"AWS Error (?:ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|(?!REQUEST_TIMEOUT)\w+ \(HTTP status (?:40[0135]|30\d)\))"
)
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


_BRISK = Patience(connect_seconds=3, stall_seconds=5, request_seconds=8, attempts=1)  # for what comes again anyway


class S3Place(Place):
    """An object, or a prefix as a folder of objects. Pickles as its address: connections are each process's own.

    It has no path: asking for it is a UserError.
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
        return f"s3://{self.location}"

    @property
    def location(self) -> str:
        """As pyarrow calls it: bucket/key."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def path(self) -> Path:  # what everything begins with that works in folders alone
        raise UserError(f"storage {self}: only local folders are supported for this, give a path")

    @property
    def name(self) -> str:
        return self.location.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "S3Place":
        """The prefix that this is in; a bucket is in itself."""
        return S3Place(self.bucket, self.key.rpartition("/")[0], self.patience)

    def is_within(self, folder: str | os.PathLike[str]) -> bool:
        return False

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def size(self) -> int:
        return int(self._file_info().size)

    def changed(self) -> int:
        return int(self._file_info().mtime_ns)

    def find(self, suffix: str) -> Sequence[str]:
        selector = fs.FileSelector(self.location, allow_not_found=True, recursive=True)
        found = self.request("listed", lambda files: files.get_file_info(selector), None)
        paths = (i.path.removeprefix(f"{self.location}/") for i in found if i.type == fs.FileType.File)
        shown = (path for path in paths if not any(part.startswith(".") for part in path.split("/")))
        return sorted(path for path in shown if path.lower().endswith(suffix))

    def list(self) -> list[str]:
        selector = fs.FileSelector(self.location, allow_not_found=True)
        found = self.request("listed", lambda files: files.get_file_info(selector), None)
        return sorted(info.base_name for info in found if not info.base_name.startswith(TEMPORARY))

    def open(self) -> RangeFile:
        def opened(files: Any) -> tuple[Any, int]:
            file = files.open_input_file(self.location)
            return file, file.size()

        return S3File(self, *self.request("opened", opened))

    def read(self) -> bytes:
        file, data = self.open(), bytearray()
        while part := file.read_at(len(data), REQUEST_BYTES):
            data += part
        return bytes(data)

    def write(self, data: bytes | memoryview) -> None:
        """Commit one object: it appears when all of it has arrived, and a kill before leaves the old one.

        Attempts that took too long are waited for, and at last cut off, before this returns. What a server had received
        whole by then, and carries out later yet, can undo what was written since: pyarrow has no conditional writes.
        """

        def put(files: Any) -> None:
            stream = files.open_output_stream(self.location)
            stream.write(data)  # where this fails, closing fails too: half an object is never completed
            stream.close()

        self.request("written", put, len(data), changes=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        with spooled(self.write) as file:
            yield file

    def delete(self) -> None:
        """Delete this object; nothing happens where there is none. pyarrow keeps a prefix that becomes empty alive
        with an object of its name and a slash, which `list` does not show."""
        with contextlib.suppress(FileNotFoundError):
            self.request("deleted", lambda files: files.delete_file(self.location), changes=True)

    def remove(self) -> None:
        """Delete all objects below this prefix, its manifest first, so that a reader finds a folder whole or not at
        all. UserError for a whole bucket."""
        if not self.key:
            raise UserError(f"storage {self}: a whole bucket is not removed from here; name a prefix in it")
        (self / MANIFEST).delete()
        with contextlib.suppress(FileNotFoundError):
            self.request("deleted", lambda files: files.delete_dir(self.location), None, changes=True)

    def committed(self) -> Sequence[str]:
        found = (path.split("/") for path in self.find(MANIFEST.lower()))
        return sorted(parts[0] for parts in found if parts[1:] == [MANIFEST])

    def commit_folder(self, files: Mapping[str, bytes], check: Callable[[], None] | None = None) -> dict[str, Any]:
        """As in a folder of this host's: objects first, the manifest last. What a kill in between leaves has no
        manifest, and is written over, or removed by who knows that nobody is at it."""
        manifest = manifest_of(files)
        if (self / MANIFEST).exists():
            if self._holds(manifest):  # by a writer of the same bits
                return manifest
            if check is not None:
                check()
            self.remove()
        for name, data in files.items():
            (self / name).write(data)
        if check is not None:
            check()
        (self / MANIFEST).write(dump_manifest(manifest))
        return manifest

    def read_folder(self, *names: str) -> dict[str, bytes]:
        if not (self / MANIFEST).exists():
            raise DamageError(f"{self / MANIFEST} is missing")
        return insist(self, lambda: super(S3Place, self).read_folder(*names))

    def sweep_temporaries(self) -> None:
        """Remove what killed writers left of probes in this folder. (Halves of folders have no names of their own.)"""
        selector = fs.FileSelector(self.location, allow_not_found=True)
        for info in self.request("listed", lambda files: files.get_file_info(selector), None):
            if info.type == fs.FileType.File and info.base_name.startswith(TEMPORARY):
                (self / info.base_name).delete()

    def claim(self, data: bytes) -> bool:
        return self.create(data) is not None

    def create(self, data: bytes) -> str | None:
        """Create this object if it does not exist; its tag, or None where somebody else was first."""
        return self._put(data, None)

    def replace(self, data: bytes, tag: str) -> str | None:
        """Replace this object if it has this tag; its new tag, or None where it was changed or deleted meanwhile."""
        return self._put(data, tag)

    def _put(self, data: bytes, tag: str | None) -> str | None:
        conditional, writer = self._conditional(), new_writer()
        return self.request("written", lambda _: conditional.put(data, writer, tag), len(data), changes=True)

    def look(self) -> Seen | None:
        """This object with its tag and age; None where there is none."""
        conditional = self._conditional()
        return self.request("looked at", lambda _: conditional.look())

    def _conditional(self) -> Conditional:
        return Conditional(self.bucket, self.key, self.patience.connect_seconds, self.patience.stall_seconds)

    @contextlib.contextmanager
    def lock(self, what: str, wait: bool = False, terms: Terms | None = None) -> Iterator[Callable[[], None]]:
        """Hold this object as a lease while the block runs; where it is held, wait, or UserError naming the holder,
        who is seen to be alive first. A dead holder's is free when it has not been renewed for the time of the terms.
        """
        with self._lease(what, terms).held(wait) as check:
            yield check

    def is_held(self, terms: Terms | None = None) -> bool:
        return self._lease("", terms).is_held()

    def _lease(self, what: str, terms: Terms | None) -> Lease:
        return Lease(self, S3Place(self.bucket, self.key, _BRISK), what, terms or Terms())

    def _file_info(self) -> Any:
        info = self._info()
        if info.type != fs.FileType.File:
            raise missing(self)
        return info

    def _info(self) -> Any:
        return self.request("looked up", lambda files: files.get_file_info(self.location))

    def request(self, what: str, call: Callable[[Any], T], size: int | None = 0, changes: bool = False) -> T:
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
                    raise missing(self) from None
                except (OSError, pa.ArrowException) as error:
                    if isinstance(error, Abandoned):
                        abandoned.append(error.request)
                    said = said_by(error)
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


def check_conditional(place: S3Place) -> None:
    """UserError where the server takes no heed of conditions, so that two could hold one lock."""
    probe = place / f"{TEMPORARY}{uuid.uuid4().hex}"
    tag = probe.create(b"1")
    try:
        heeded = probe.create(b"2") is None and tag is not None and probe.replace(b"3", '"other"') is None
    finally:
        probe.delete()
    if not heeded:
        raise UserError(
            f"storage {place}: the server takes no heed of If-None-Match and If-Match, by which the writers of a store "
            "keep out of each other's way; use another, or a folder"
        )

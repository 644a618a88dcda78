"""Data on S3, or on a server that speaks its protocol, through pyarrow.

Endpoint, region and keys are those of the standard variables: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (http or https,
buckets in the path), AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_CA_BUNDLE.

Every request has limits in time and is tried again a few times, here and not in the AWS library: that one takes a
503 of a proxy for final, and has no limit for an answer that drips.
"""

import atexit
import contextlib
import errno
import os
import queue
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from pipelines.errors import UserError, one_line
from pipelines.store import TEMPORARY, Place, RangeFile, StorageError

REQUEST_BYTES = 8 * 2**20
"""Most bytes that are asked for at once."""

_GAP_BYTES = 256 * 2**10  # what a request's delay, some 5 ms, is worth at 50 MB/s
_FAREWELL_SECONDS = 2.0
_FINAL = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|HTTP status (?:40[0135]|30\d)"
)
_ADDRESS = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)((?:/[^?#]*)?)")

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a request may take and how often it is tried. A dead endpoint is told within about 8 seconds, a silent
    one within 80, a dripping one within 200."""

    connect_seconds: float = 5.0
    stall_seconds: float = 10.0
    """Without a byte; at least 1."""
    request_seconds: float = 30.0
    """All in all for a request of up to REQUEST_BYTES; a larger one has as much for each such part."""
    attempts: int = 6
    pause_seconds: float = 0.25
    """After the first attempt; twice as long after each further one."""


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
        found = self._try("listed", lambda files: files.get_file_info(selector))
        paths = (i.path.removeprefix(f"{self._location}/") for i in found if i.type == fs.FileType.File)
        shown = (path for path in paths if not any(part.startswith(".") for part in path.split("/")))
        return sorted(path for path in shown if path.endswith(suffix))

    def list(self) -> list[str]:
        selector = fs.FileSelector(self._location, allow_not_found=True)
        found = self._try("listed", lambda files: files.get_file_info(selector))
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
        """Commit one object: it appears when all of it has arrived, and a kill before leaves the old one."""

        def put(files: Any) -> None:
            stream = files.open_output_stream(self._location)
            stream.write(data)  # where this fails, closing fails too: half an object is never completed
            stream.close()

        self._try("written", put, len(data))

    def delete(self) -> None:
        """Delete this object; nothing happens where there is none. pyarrow keeps a prefix that becomes empty alive
        with an object of its name and a slash, which `list` does not show."""
        with contextlib.suppress(FileNotFoundError):
            self._try("deleted", lambda files: files.delete_file(self._location))

    def remove(self) -> None:
        """Delete all objects below this prefix; not at once, so that a reader may find some of them. UserError for a
        whole bucket."""
        if not self.key:
            raise UserError(f"storage {self}: a whole bucket is not removed from here; name a prefix in it")
        with contextlib.suppress(FileNotFoundError):
            self._try("deleted", lambda files: files.delete_dir(self._location))

    def _file_info(self) -> Any:
        info = self._info()
        if info.type != fs.FileType.File:
            raise _missing(self)
        return info

    def _info(self) -> Any:
        return self._try("looked up", lambda files: files.get_file_info(self._location))

    def _try(self, what: str, call: Callable[[Any], T], size: int = 0) -> T:
        """Run a call on the file system until it succeeds, as often and as long as patience lasts."""
        patience = self.patience
        connection = _connect(_Endpoint.of_environment(), patience.connect_seconds, patience.stall_seconds)
        limit = patience.request_seconds * max(1, -(-size // REQUEST_BYTES))
        attempt, pause = 1, patience.pause_seconds
        while True:
            try:
                return connection.run(call, limit)
            except FileNotFoundError:
                raise _missing(self) from None
            except (OSError, pa.ArrowException) as error:
                final = _FINAL.search(str(error)) is not None
                if final or attempt >= patience.attempts:
                    tries = "" if attempt == 1 else f" in {attempt} attempts"
                    hint = "; check the AWS_ variables" if final else ""
                    raise StorageError(
                        f"{self}: could not be {what}{tries}: {_said(error)} ({connection.endpoint}){hint}"
                    ) from None
            time.sleep(pause * random.uniform(0.5, 1))  # unlike waits: many workers must not come back at once
            attempt, pause = attempt + 1, 2 * pause


class _S3File:
    """An object that is read by ranges."""

    gap = _GAP_BYTES

    def __init__(self, place: S3Place, file: Any, size: int) -> None:
        self._place, self._file, self._size = place, file, size

    def read_at(self, offset: int, size: int) -> bytes:
        size = min(size, self._size - offset) if offset >= 0 else 0
        if size <= 0:
            return b""
        return self._place._try("read", lambda files: self._file.read_at(size, offset), size)

    def close(self) -> None:
        """Nothing stays open between requests."""


@dataclass(frozen=True)
class _Endpoint:
    """Where requests go, and what the connection is made with."""

    url: str | None
    region: str | None
    authorities: str | None
    """File of the certificates that are trusted; by default the system's."""

    @staticmethod
    def of_environment() -> "_Endpoint":
        variables = os.environ
        url = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL") or None
        region = variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or ("us-east-1" if url else None)
        if url and not re.fullmatch(r"https?://[^/?#@]+/?", url):
            raise UserError(f"AWS_ENDPOINT_URL: {url} is not an endpoint; give http://host:port or https://host")
        return _Endpoint(url, region, variables.get("AWS_CA_BUNDLE") or None)


@lru_cache(maxsize=8)
def _connect(endpoint: _Endpoint, connect_seconds: float, stall_seconds: float) -> "_Connection":
    return _Connection(endpoint, connect_seconds, stall_seconds)


class _Connection:
    """A file system handle, and the requests that are under way on it."""

    def __init__(self, endpoint: _Endpoint, connect_seconds: float, stall_seconds: float) -> None:
        self.endpoint = endpoint.url or "AWS"
        self._address = urlsplit(endpoint.url) if endpoint.url else None
        self._options: dict[str, Any] = {
            "region": endpoint.region,
            "connect_timeout": connect_seconds,
            "request_timeout": stall_seconds,
            "retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=0),
            "allow_delayed_open": True,  # a small object is one request then
        }
        if self._address is not None:
            self._options |= {"endpoint_override": self._address.netloc, "scheme": self._address.scheme}
        if endpoint.authorities:
            self._options["tls_ca_file_path"] = endpoint.authorities
        self._files: Any = None
        self._making = threading.Lock()
        self._requests: set[threading.Thread] = set()
        self._over = False
        atexit.register(self._cut_off)

    def run(self, call: Callable[[Any], T], seconds: float) -> T:
        """Run a call in a thread of its own, which is left behind after `seconds`. TimeoutError says so."""
        outcome: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcome.put((call(self._handle()), None))
            except BaseException as error:  # raised where it is waited for
                outcome.put((None, error))
            finally:
                self._requests.discard(threading.current_thread())

        if self._over:
            raise OSError("the process is ending")
        request = threading.Thread(target=work, name="s3", daemon=True)
        self._requests.add(request)
        request.start()
        try:
            value, error = outcome.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no whole answer within {seconds:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _handle(self) -> Any:
        # Made in a request's thread: pyarrow lets it wait for the requests of other handles that are under way.
        with self._making:
            if self._files is None:
                self._files = fs.S3FileSystem(**self._options)
            return self._files

    def _cut_off(self) -> None:
        """At the end of the process: pyarrow waits there for requests under way, which a dripping answer draws out."""
        self._over = True
        if not self._requests or self._address is None or not os.path.isdir("/proc/self/fd"):
            return
        port = self._address.port or {"http": 80, "https": 443}[self._address.scheme]
        with contextlib.suppress(OSError):
            peers = {info[4][:2] for info in socket.getaddrinfo(self._address.hostname, port)}
            end = time.monotonic() + _FAREWELL_SECONDS
            while self._requests and time.monotonic() < end:  # curl tries once more where it had had no answer yet
                for descriptor in map(int, os.listdir("/proc/self/fd")):
                    with contextlib.suppress(OSError):  # closed meanwhile
                        _shut(descriptor, peers)
                time.sleep(0.01)


def _shut(descriptor: int, peers: set[Any]) -> None:
    """End a connection, if this is one to any of the peers (address, port)."""
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:  # something other than a socket
        os.close(copy)
        return
    with connection, contextlib.suppress(OSError):
        if connection.getpeername()[:2] in peers:
            connection.shutdown(socket.SHUT_RDWR)


def _missing(place: Place) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(place))


def _said(error: BaseException) -> str:
    """What pyarrow says happened, less the part that repeats the key."""
    return one_line(OSError(re.sub(r"^When .*?: (?=AWS Error)", "", str(error), flags=re.DOTALL)))

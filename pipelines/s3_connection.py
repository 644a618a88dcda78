"""The connection to an S3 endpoint: requests with a limit in time, and what becomes of those that exceed it.

pyarrow cannot be told to end a request. One that takes too long is left to its thread, and where that must not be, its
connection is cut below pyarrow.
"""

import atexit
import contextlib
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyarrow import fs

from pipelines.errors import UserError

_FAREWELL_SECONDS = 2.0

T = TypeVar("T")


class Abandoned(TimeoutError):
    """A request that took too long. Its thread still waits for the answer."""

    def __init__(self, request: threading.Thread, seconds: float) -> None:
        super().__init__(f"no whole answer within {seconds:g} s")
        self.request = request


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and what the connection is made with."""

    url: str | None
    region: str | None
    authorities: str | None
    """File of the certificates that are trusted; by default the system's."""

    @staticmethod
    def of_environment() -> "Endpoint":
        variables = os.environ
        url = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL") or None
        region = variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or ("us-east-1" if url else None)
        if url and not re.fullmatch(r"https?://[^/?#@]+/?", url):
            raise UserError(f"AWS_ENDPOINT_URL: {url} is not an endpoint; give http://host:port or https://host")
        return Endpoint(url, region, variables.get("AWS_CA_BUNDLE") or None)


@lru_cache(maxsize=8)
def connect(endpoint: Endpoint, connect_seconds: float, stall_seconds: float) -> "Connection":
    return Connection(endpoint, connect_seconds, stall_seconds)


class Connection:
    """A file system handle, and the requests that are under way on it."""

    def __init__(self, endpoint: Endpoint, connect_seconds: float, stall_seconds: float) -> None:
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
        atexit.register(self._end)

    def run(self, call: Callable[[Any], T], seconds: float) -> T:
        """Run a call in a thread of its own, which is left behind after `seconds`: Abandoned."""
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
            raise Abandoned(request, seconds) from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _handle(self) -> Any:
        # Made in a request's thread: pyarrow lets it wait for the requests of other handles that are under way.
        with self._making:
            if self._files is None:
                self._files = fs.S3FileSystem(**self._options)
            return self._files

    def settle(self, requests: Sequence[threading.Thread], seconds: float) -> None:
        """Wait until requests that were left behind have ended. After `seconds` they are cut off, and so is whatever
        else is under way: that is tried again."""
        end = time.monotonic() + seconds
        for request in requests:
            request.join(max(0.0, end - time.monotonic()))
        self._cut_off([request for request in requests if request.is_alive()])

    def _end(self) -> None:
        """At the end of the process: pyarrow waits there for requests under way, which a dripping answer draws out."""
        self._over = True
        self._cut_off(self._requests)

    def _cut_off(self, requests: Collection[threading.Thread]) -> None:
        """End the connections to the endpoint until these requests have ended."""
        if not requests or self._address is None or not os.path.isdir("/proc/self/fd"):
            return
        port = self._address.port or {"http": 80, "https": 443}[self._address.scheme]
        with contextlib.suppress(OSError):
            peers = {info[4][:2] for info in socket.getaddrinfo(self._address.hostname, port)}
            end = time.monotonic() + _FAREWELL_SECONDS
            # curl tries once more where it had had no answer yet
            while any(request.is_alive() for request in tuple(requests)) and time.monotonic() < end:
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

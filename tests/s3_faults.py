"""An S3 server (moto), and a proxy before it that answers some requests badly, both over real sockets."""

import datetime
import http.client
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer

from pipelines.s3 import Patience

BUCKET = "bucket"
HASTE = Patience(connect_seconds=1, stall_seconds=1, request_seconds=1.5, attempts=3, pause_seconds=0.01)
"""Patience for tests: a fault is told in a second or two."""

LATE = 1.8
"""Seconds."""

Fault = Literal[
    "500", "503", "400", "403", "404", "cut", "short", "garbled", "refuse", "silent", "drip", "late", "lost"
]
"""cut: the connection ends in the middle of the body; short: a whole answer with half of the body; garbled: one bit of
the body is another; refuse: it ends without an answer; silent: no answer, the connection stays; drip: a byte now and
then; late: what was asked for is done, and answered, LATE seconds later; lost: done, and not answered."""


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of an S3 server with an empty BUCKET."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        stock_client(port).create_bucket(Bucket=BUCKET)
        yield port
    finally:
        server.stop()


@lru_cache
def stock_client(port: int) -> Any:
    """Amazon's own client for the server."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )


def set_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """The standard variables, for an endpoint."""
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


def s3_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass
class FaultyProxy:
    """Forwards every request to the server at `upstream`, but meets those named in `faults` with a fault first.

    `faults` are used up one a request, in turn (None: none); `always` meets every request while it is set. Only
    requests of `methods` are met. `seen` is the number of requests that came, by method, `met` that of faults.
    """

    upstream: int
    faults: list[Fault | None] = field(default_factory=list)
    always: Fault | None = None
    methods: frozenset[str] = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})
    seen: dict[str, int] = field(default_factory=dict)
    met: int = 0
    port: int = 0
    scheme: str = "http"
    over: threading.Event = field(default_factory=threading.Event)
    """Ends the answers that are being drawn out."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    def next_fault(self, method: str) -> Fault | None:
        with self.lock:
            self.seen[method] = self.seen.get(method, 0) + 1
            if method not in self.methods:
                return None
            fault = self.faults.pop(0) if self.faults else self.always
            self.met += fault is not None
            return fault

    def calm(self) -> None:
        """Forget faults and counts, and hang up where an answer is being drawn out."""
        with self.lock:
            self.faults, self.always, self.seen, self.met = [], None, {}, 0
            self.over.set()
            self.over = threading.Event()
            self.methods = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})


@contextmanager
def faulty_proxy(upstream: int, tls: ssl.SSLContext | None = None) -> Iterator[FaultyProxy]:
    """A proxy on a free port of this host, before the server on port `upstream`; it speaks https where `tls` is."""
    proxy = FaultyProxy(upstream, scheme="https" if tls else "http")

    class Handler(_Handler):
        faulty = proxy

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        proxy.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.calm()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the other side went away, which the faults are meant to bring about
            self.close_connection = True

    def forward(self) -> None:
        body = self._body()
        over, fault = self.faulty.over, self.faulty.next_fault(self.command)
        if fault == "lost":
            self._upstream(body)
        if fault in ("refuse", "lost"):
            self._hang_up()
        elif fault == "silent":
            over.wait(30)
            self._hang_up()
        elif fault == "late":
            time.sleep(LATE)
            self._answer(*self._upstream(body))
        elif fault is not None and fault.isdigit():
            code = "RequestTimeout" if fault == "400" else "Fault"  # S3's of a body that did not come in time
            self._answer(
                int(fault), {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode()
            )
        else:
            self._answer(*self._upstream(body), fault, over)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _upstream(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.faulty.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        answer = response.status, dict(response.headers), response.read()
        connection.close()
        return answer

    def _answer(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        fault: Fault | None = None,
        over: threading.Event | None = None,
    ) -> None:
        self.send_response_only(status)
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "garbled" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        length = headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self._hang_up()
        elif fault == "drip" and over is not None:
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if over.wait(0.1):
                    self._hang_up()
                    break
        else:
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        # Closing with nothing lingering sends a reset, as a dying server does.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def own_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for localhost, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, folder / "key.pem")
    return file, context


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Until `condition()` holds; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)

"""The head: its address, its token, and other servers that answer in its place."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.submit.head import checked_address, connected, find_token
from pipelines.errors import UserError
from tests.jobs.submit.conftest import free_port


@pytest.mark.parametrize(
    "address",
    [
        *("local", "", "head:8265", "http://head", "http://:8265", "http://head:port", "http://head:99999"),
        *("ray://head:10001", "http://head:8265/api", "http://head:8265?x=1", "http://me:secret@head:8265"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"^--to .*: write it as http://HOST:PORT"):
        checked_address(address)


@pytest.mark.parametrize("address", ["http://head:8265", "https://head.example.org:443/", "http://[::1]:8265"])
def test_addresses(address: str) -> None:
    assert checked_address(address) == address.rstrip("/")


def test_the_token_is_looked_for_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    home = tmp_path / "home" / ".ray" / "auth_token"
    home.parent.mkdir(parents=True)
    home.write_text("of-home\n")
    assert find_token() == "of-home"
    (tmp_path / "token").write_text("of-path\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment")
    assert find_token() == "of-environment"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    with pytest.raises(UserError, match=r"^RAY_AUTH_TOKEN_PATH: cannot read /no/such/file"):
        find_token()


@dataclass
class Door:
    """An HTTP server that answers as a head's does: says its mode, and asks for the token if it has one."""

    token: str | None = "right"
    mode: bytes = b'{"authentication_mode": "token"}'
    headers: list[str | None] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes]:
        if path == "/api/authentication_mode":
            return 200, self.mode
        self.headers.append(authorization)
        if self.token is not None and authorization != f"Bearer {self.token}":
            return (401 if authorization is None else 403), b"Unauthorized"
        return 200, json.dumps({"version": "4", "ray_version": "2.60.0"}).encode()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = door.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        door.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield door
        server.shutdown()


def try_to_connect(address: str) -> list[str]:
    """What was said while connecting."""
    said: list[str] = []
    with connected(address, said.append):
        return said


def test_the_token_reaches_the_head_whatever_else_the_environment_says(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert try_to_connect(door.address) == []
    assert set(door.headers) == {"Bearer right"}
    assert os.environ["RAY_ADDRESS"] == os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


def test_a_missing_or_wrong_token_is_refused_in_one_line(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    places = r"RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token$"
    with pytest.raises(UserError, match=f"the head asks for a token: put it in {places}"):
        try_to_connect(door.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match=f"refuses this one: put its own in {places}"):
        try_to_connect(door.address)


def test_a_head_without_authentication_is_used_with_a_warning_and_not_told_the_token(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.mode, door.token = b'{"authentication_mode": "disabled"}', None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    (warning,) = try_to_connect(door.address)
    assert "asks for no token" in warning
    # (In a process that drives a cluster of its own, Ray adds that one's token by itself.)
    assert "Bearer secret" not in door.headers


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_another_server_than_a_head_is_named_as_such(door: Door, body: bytes) -> None:
    door.mode = body
    with pytest.raises(UserError, match="something else than a Ray head answers there"):
        try_to_connect(door.address)


def test_an_unreachable_head_is_named_with_the_reason() -> None:
    with pytest.raises(
        UserError, match=r"^--to http://127.0.0.1:\d+: no Ray head answers there \(Connection refused\)"
    ):
        try_to_connect(f"http://127.0.0.1:{free_port()}")

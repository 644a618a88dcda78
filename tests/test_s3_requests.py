"""Requests to S3 that take long, or that no longer matter: nothing of them is left behind, and listings have time."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest

from pipelines.files import StorageError
from pipelines.s3 import Patience, S3Place
from tests.s3_faults import BUCKET, HASTE, LATE, FaultyProxy, set_environment

SLOW = Patience(connect_seconds=1, stall_seconds=2, request_seconds=0.5, attempts=3, pause_seconds=0.01)


@pytest.fixture
def place(proxy: FaultyProxy, request: pytest.FixtureRequest) -> S3Place:
    return S3Place(BUCKET, f"{request.node.name.replace('[', '-').replace(']', '')}/x", SLOW)


def _remove_its_folder(place: S3Place) -> None:
    S3Place(place.bucket, place.key.rsplit("/", 1)[0], SLOW).remove()


@pytest.mark.parametrize("change", [lambda place: place.write(b"old"), S3Place.delete, _remove_its_folder])
def test_an_attempt_that_is_late_undoes_nothing(place: S3Place, proxy: FaultyProxy, change: Any) -> None:
    place.write(b"first")
    proxy.methods, proxy.faults = frozenset({"PUT", "DELETE", "POST"}), ["late"]
    change(place)
    assert proxy.faults == []
    place.write(b"new")
    time.sleep(LATE)
    assert place.read() == b"new"


def test_a_change_is_not_given_up_for_silence_alone(proxy: FaultyProxy) -> None:
    """Else nobody would learn when it was made."""
    place = S3Place(BUCKET, "silence/x", Patience(1, stall_seconds=1, request_seconds=1.5, attempts=2))
    proxy.methods, proxy.faults = frozenset({"PUT"}), ["late"]
    place.write(b"old")
    place.write(b"new")
    time.sleep(LATE)
    assert place.read() == b"new"


def test_a_change_that_is_never_answered_is_cut_off(place: S3Place, proxy: FaultyProxy) -> None:
    proxy.methods, proxy.always = frozenset({"PUT"}), "silent"
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"could not be written in 3 attempts: no whole answer within 0\.5 s"):
        place.write(b"1")
    assert time.monotonic() - begun < 3 * SLOW.request_seconds + SLOW.stall_seconds + 3
    proxy.calm()
    place.write(b"2")
    assert place.read() == b"2"


@pytest.mark.parametrize("put", [S3Place.write, S3Place.create])
def test_a_body_that_did_not_arrive_in_time_is_sent_again(place: S3Place, proxy: FaultyProxy, put: Any) -> None:
    proxy.methods, proxy.faults = frozenset({"PUT", "POST"}), ["400"]
    put(place, b"1")
    assert proxy.faults == []
    assert place.read() == b"1"


def test_a_key_says_nothing_of_a_fault(proxy: FaultyProxy) -> None:
    place = S3Place(BUCKET, "ACCESS_DENIED HTTP status 400/NO_SUCH_KEY", HASTE)
    place.write(b"1")
    file = place.open()
    for what in (place.size, lambda: file.read_at(0, 1), place.read):
        proxy.faults = ["500", "500"]
        assert what() in (1, b"1")


def test_what_has_gone_while_it_was_open_is_missing(place: S3Place) -> None:
    place.write(b"0123")
    file = place.open()
    assert file.read_at(1, 2) == b"12"
    place.delete()
    with pytest.raises(FileNotFoundError, match=str(place)):
        file.read_at(1, 2)


class _Pages(BaseHTTPRequestHandler):
    """Lists `pages` objects, one a page, each page after 0.3 s."""

    pages = 8
    asked: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        _, _, token = self.path.partition("continuation-token=")
        page = int(token.split("&")[0] or 0)
        self.asked.append(page)
        time.sleep(0.3)
        more = page + 1 < self.pages
        body = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>b</Name><KeyCount>1</KeyCount><IsTruncated>{'true' if more else 'false'}</IsTruncated>"
            + (f"<NextContinuationToken>{page + 1}</NextContinuationToken>" if more else "")
            + f"<Contents><Key>p/{page}.tar</Key><Size>1</Size></Contents></ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def slow_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        set_environment(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()
        thread.join()


def test_a_listing_of_many_pages_has_the_time_that_it_takes(slow_pages: None) -> None:
    assert _Pages.pages * 0.3 > HASTE.request_seconds
    assert S3Place("b", "p", HASTE).find(".tar") == [f"{page}.tar" for page in range(_Pages.pages)]


def test_what_is_found_ends_so_in_small_letters_or_large(place: S3Place) -> None:
    for name in ("a.tar", "b.TAR", "c.txt"):
        (place / name).write(b"")
    assert place.find(".tar") == ["a.tar", "b.TAR"]

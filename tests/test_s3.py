"""Places on S3: a real server over a real socket, and what happens when it, or the way to it, is at fault."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import Failed, UserError
from pipelines.files import StorageError
from pipelines.s3 import REQUEST_BYTES, Patience, S3Place
from pipelines.store import Place, check_writable
from tests.s3_faults import (
    BUCKET,
    HASTE,
    FaultyProxy,
    faulty_proxy,
    own_certificate,
    s3_environment,
    set_environment,
    wait_until,
)


@pytest.fixture
def root(proxy: FaultyProxy, request: pytest.FixtureRequest) -> S3Place:
    """A prefix of the test's own, used in haste."""
    return S3Place(BUCKET, request.node.name.replace("[", "-").replace("]", ""), HASTE)


def test_what_is_written_is_what_amazons_client_sees(root: S3Place, stock: Any) -> None:
    root = S3Place(root.bucket, root.key)  # in no haste: what is sent is large
    big = os.urandom(2 * REQUEST_BYTES + 5)
    (root / "a" / "b c+ü.bin").write(big)
    (root / "a.json").write_json({"x": [1, "ü"]})
    (root / "empty").write(b"")
    prefix = f"{root.key}/"
    keys = [found["Key"] for found in stock.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]]
    assert keys == [f"{prefix}a.json", f"{prefix}a/b c+ü.bin", f"{prefix}empty"]
    assert stock.get_object(Bucket=BUCKET, Key=keys[1])["Body"].read() == big
    assert (root / "a" / "b c+ü.bin").read() == big
    assert (root / "a.json").read_json() == {"x": [1, "ü"]}
    assert (root / "empty").read() == b""


def test_what_amazons_client_wrote_is_read(root: S3Place, stock: Any) -> None:
    data = os.urandom(1000)
    for name in ("x", "y", "deep/z", ".tmp-half"):
        stock.put_object(Bucket=BUCKET, Key=f"{root.key}/{name}", Body=data)
    assert root.list() == ["deep", "x", "y"]
    assert (root / "nothing").list() == []
    assert [(root / name).exists() for name in ("x", "deep", "nothing", "dee")] == [True, True, False, False]
    assert (root / "x").size() == 1000
    assert (root / "x").read() == data
    file = (root / "deep/z").open()
    assert file.read_at(10, 20) == data[10:30]
    assert file.read_at(990, 20) == data[990:]
    assert file.read_at(1000, 1) == file.read_at(5000, 1) == file.read_at(-1, 5) == file.read_at(5, 0) == b""
    file.close()
    (root / "x").write(b"new")
    assert stock.get_object(Bucket=BUCKET, Key=f"{root.key}/x")["Body"].read() == b"new"
    (root / "x").delete()
    (root / "x").delete()
    assert root.list() == ["deep", "y"]


def test_the_same_interface_on_a_folder(tmp_path: Path, root: S3Place) -> None:
    for place in (Place.of(tmp_path / "folder"), root):
        assert not (place / "x").exists()
        assert place.list() == []
        for missing in (place / "x").read, (place / "x").size, (place / "x").open, (place / "x").read_json:
            with pytest.raises(FileNotFoundError, match="x"):
                missing()
        (place / "x").write(b"0123456789")
        assert (place / "x").size() == 10
        file = (place / "x").open()
        assert [file.read_at(3, 4), file.read_at(8, 9), file.read_at(10, 1)] == [b"3456", b"89", b""]
        file.close()
        assert (place / "x").name == "x"
        assert str(place / "x") == f"{place}/x"
        assert place / "x" == pickle.loads(pickle.dumps(place / "x"))
        assert len({place / "x", place / "x", place / "y"}) == 2
        check_writable(place / "below")
        assert (place / "below").list() == []
        (place / "x").delete()
        assert not (place / "x").exists()


def test_addresses() -> None:
    place = Place.of("s3://bucket/some/prefix/")
    assert isinstance(place, S3Place)
    assert (place.bucket, place.key, place.name) == ("bucket", "some/prefix", "prefix")
    assert str(place) == "s3://bucket/some/prefix"
    assert place == Place.of("s3://bucket") / "some" / "prefix"
    assert Place.of("s3://bucket").name == "bucket"
    assert Place.of("s3://bucket/") == Place.of("s3://bucket")
    assert repr(place) == "Place('s3://bucket/some/prefix')"
    for wrong in ("s3://", "s3:///x", "s3://key:secret@bucket/x", "s3://bucket/x?endpoint_override=evil", "s3://b t/x"):
        with pytest.raises(UserError, match="give s3://bucket/prefix"):
            Place.of(wrong)
    for name in ("..", "a/../../b", "", "a//b", "."):
        with pytest.raises(UserError, match="cannot be the name"):
            place / name
    with pytest.raises(UserError, match="storage gs://x: gs is not known here"):
        Place.of("gs://x")


def test_what_s3_lacks_is_said(root: S3Place) -> None:
    with pytest.raises(UserError, match=f"storage {root}: only local folders are supported for this, give a path"):
        _ = root.path


def test_a_prefix_is_removed_and_nothing_beside_it(root: S3Place) -> None:
    for name in ("gone/a", "gone/deep/b", "gone2/c", "d"):
        (root / name).write(b"1")
    (root / "gone").remove()
    assert root.find("") == ["d", "gone2/c"]
    assert root.list() == ["d", "gone2"]
    (root / "gone").remove()  # there is nothing, and nothing happens
    with pytest.raises(UserError, match="a whole bucket is not removed from here"):
        S3Place(root.bucket).remove()
    assert (root / "d").read() == b"1"


def test_a_file_tells_when_it_was_changed(root: S3Place) -> None:
    (root / "x").write(b"1")
    assert abs((root / "x").changed() / 1e9 - time.time()) < 3600
    for missing in ("y", "deep"):
        with pytest.raises(FileNotFoundError):
            (root / missing).changed()


def test_a_place_pickles_without_its_connection(root: S3Place) -> None:
    (root / "x").write(b"1")
    data = pickle.dumps(root / "x")
    assert b"localhost" not in data  # where it is read, the endpoint may be called otherwise
    assert b"secret" not in data
    there = pickle.loads(data)
    assert there.read() == b"1"
    assert there.patience == HASTE


# --- faults ---


@pytest.mark.parametrize("fault", ["500", "503", "cut", "refuse", "short"])
def test_passing_faults_are_passed_over(root: S3Place, proxy: FaultyProxy, fault: Any) -> None:
    data = os.urandom(100_000)
    (root / "x").write(data)
    file = (root / "x").open()
    for what in (lambda: file.read_at(10, 50_000) == data[10:50_010], lambda: root.list() == ["x"]):
        proxy.calm()
        proxy.faults = [fault] * 2
        assert what()
        assert proxy.seen == {"GET": 3}
    for what in (lambda: (root / "x").read() == data, lambda: (root / "x").exists(), lambda: (root / "x").size()):
        proxy.faults = [fault] * 2
        assert what()
    proxy.faults = [fault] * 2
    (root / "y").write(data)
    proxy.calm()
    assert (root / "y").read() == data


@pytest.mark.parametrize("fault", ["500", "cut", "refuse", "silent", "drip", "short"])
def test_a_lasting_fault_is_one_line_in_bounded_time(root: S3Place, proxy: FaultyProxy, fault: Any) -> None:
    (root / "x").write(b"0" * 100_000)
    file = (root / "x").open()
    proxy.seen, proxy.always = {}, fault
    begun = time.monotonic()
    with pytest.raises(StorageError, match=f"{root}/x: could not be read in 3 attempts: .*localhost:") as raised:
        file.read_at(0, 100_000)
    assert time.monotonic() - begun < HASTE.attempts * HASTE.request_seconds + 2
    assert 3 <= proxy.seen["GET"] <= 6  # curl repeats a request by itself where a connection was kept, but is dead
    assert isinstance(raised.value, Failed)
    assert len(str(raised.value).splitlines()) == 1
    proxy.calm()
    assert file.read_at(0, 10) == b"0" * 10


def test_an_object_appears_whole_or_not_at_all(root: S3Place, proxy: FaultyProxy, stock: Any) -> None:
    (root / "old").write(b"old")
    proxy.methods, proxy.always = frozenset({"PUT"}), "500"
    # One of them fits into a single request, the other goes up in parts of which the first is refused.
    for size in (10, 2 * REQUEST_BYTES):
        for name in ("old", "new"):
            with pytest.raises(StorageError, match="could not be written"):
                (root / name).write(os.urandom(size))
    proxy.calm()
    found = stock.list_objects_v2(Bucket=BUCKET, Prefix=f"{root.key}/")["Contents"]
    assert [(one["Key"], one["Size"]) for one in found] == [(f"{root.key}/old", 3)]


def test_a_writer_killed_half_way_leaves_the_old_object(root: S3Place, proxy: FaultyProxy) -> None:
    (root / "x").write(b"old")
    proxy.seen, proxy.methods, proxy.faults = {}, frozenset({"PUT"}), ["silent"]
    code = f"from pipelines.store import Place; Place.of('{root}/x').write(bytes({4 * REQUEST_BYTES}))"
    writer = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    wait_until(lambda: proxy.seen.get("PUT"))
    writer.kill()
    writer.wait()
    proxy.calm()
    assert (root / "x").read() == b"old"


def test_what_trying_again_cannot_help_is_told_at_once(
    root: S3Place, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "x").write(b"1")
    proxy.seen, proxy.always = {}, "403"
    with pytest.raises(StorageError, match=r"x: could not be opened: .*; check the AWS_ variables"):
        (root / "x").read()
    assert proxy.seen == {"HEAD": 1}
    proxy.calm()
    with pytest.raises(StorageError, match="nowhere/x: could not be written: AWS Error NO_SUCH_BUCKET"):
        S3Place("nowhere", "x", HASTE).write(b"1")
    with pytest.raises(FileNotFoundError, match="nowhere/x"):
        S3Place("nowhere", "x", HASTE).read()
    assert not S3Place("nowhere", "", HASTE).exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL: localhost:9000 is not an endpoint"):
        (root / "x").read()


def test_a_dead_endpoint_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    set_environment(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match=f"s3://{BUCKET}/x: could not be opened in 3 attempts: .*{port}"):
        S3Place(BUCKET, "x", HASTE).read()


def test_a_new_connection_does_not_wait_for_a_dripping_one(root: S3Place, proxy: FaultyProxy) -> None:
    (root / "x").write(b"0" * 1000)
    file = (root / "x").open()
    proxy.always = "drip"
    dripping = threading.Thread(target=file.read_at, args=(0, 1000))
    dripping.start()
    wait_until(lambda: proxy.seen.get("GET"))
    other = S3Place(BUCKET, root.key, Patience(connect_seconds=2, request_seconds=0.3, attempts=1))
    with pytest.raises(StorageError, match=r"could not be listed: no whole answer within 0\.3 s"):
        other.list()
    proxy.calm()
    dripping.join()
    assert S3Place(BUCKET, root.key, Patience(connect_seconds=2)).list() == ["x"]


def test_pauses_grow_and_end() -> None:
    patience = Patience()
    pauses = sum(patience.pause_seconds * 2**n for n in range(patience.attempts - 1))
    assert pauses + patience.attempts * patience.request_seconds < 200  # what its documentation says
    assert pauses < 8
    assert patience.attempts * (patience.connect_seconds + patience.stall_seconds) + pauses < 100


def test_many_threads_share_a_file(root: S3Place) -> None:
    data = os.urandom(200_000)
    (root / "x").write(data)
    file = (root / "x").open()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda at: file.read_at(at, 999), range(0, 200_000, 5000))) == [
            data[at : at + 999] for at in range(0, 200_000, 5000)
        ]


def test_the_variable_for_s3_alone_comes_first(root: S3Place, proxy: FaultyProxy, monkeypatch: Any) -> None:
    (root / "x").write(b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    assert (root / "x").read() == b"1"


def test_https_with_a_certificate_of_ones_own(
    root: S3Place, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "x").write(b"1")
    certificate, tls = own_certificate(tmp_path)
    with faulty_proxy(server, tls) as proxy:
        set_environment(monkeypatch, proxy.endpoint)
        with pytest.raises(StorageError, match="certificate"):
            (root / "x").read()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert (root / "x").read() == b"1"


# --- the end of a process ---

_ENDING = """
import sys, threading, time
from pipelines.store import Place
file = Place.of(sys.argv[1]).open()
print("open", flush=True)
sys.stdin.readline()
threading.Thread(target=file.read_at, args=(0, 1000), daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize("fault", [None, "silent", "drip"])
def test_a_process_ends_at_once_whatever_is_under_way(root: S3Place, proxy: FaultyProxy, fault: Any) -> None:
    (root / "x").write(b"0" * 1000)
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDING, f"{root}/x"],
        env=os.environ | s3_environment(proxy.endpoint),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    proxy.always = fault
    begun = time.monotonic()
    _, said = process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    assert said == b""
    assert time.monotonic() - begun < 3

"""What a store needs of S3: claims, and folders that appear whole; on a real server, and a way to it at fault."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipelines.errors import UserError
from pipelines.files import StorageError
from pipelines.s3 import S3Place, check_conditional
from pipelines.session import open_session
from pipelines.store import MANIFEST, DamageError, Place, check_store
from pipelines.train.checkpoint import Checkpoints
from tests.s3_faults import BUCKET, HASTE, FaultyProxy, set_environment
from tests.test_store import write_half


@pytest.fixture
def root(proxy: FaultyProxy, request: pytest.FixtureRequest) -> S3Place:
    """A prefix of the test's own, used in haste."""
    return S3Place(BUCKET, request.node.name.replace("[", "-").replace("]", ""), HASTE)


# --- claims ---


def test_of_many_who_claim_one_is_first(root: S3Place) -> None:
    place = root / "attempts" / "0001"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: place.claim(bytes([number])), range(8)))
    assert won.count(True) == 1
    assert place.read() == bytes([won.index(True)])
    assert not place.claim(b"late")
    place.delete()
    assert place.claim(b"")


def test_what_is_written_in_parts_is_one_object_when_all_is_well(root: S3Place, proxy: FaultyProxy) -> None:
    parts = [os.urandom(300_000) for _ in range(5)]
    proxy.methods, proxy.faults = frozenset({"PUT"}), ["500"]
    with (root / "file").writing() as file:
        for part in parts:
            file.write(part)
        assert not (root / "file").exists()
    assert (root / "file").read() == b"".join(parts)
    with pytest.raises(KeyboardInterrupt):
        write_half(root / "file")
    assert (root / "file").size() == 1_500_000
    with (root / "empty").writing():
        pass
    assert (root / "empty").read() == b""


@pytest.mark.parametrize("fault", ["500", "refuse", "late", "lost"])
def test_a_claim_whose_answer_was_lost_is_ours_and_of_nobody_else(
    root: S3Place, proxy: FaultyProxy, fault: Any
) -> None:
    proxy.methods, proxy.faults = frozenset({"PUT"}), [fault]
    assert (root / "x").claim(b"ours")
    assert proxy.faults == []
    assert (root / "x").read() == b"ours"
    proxy.faults = [fault]
    assert not (root / "x").claim(b"theirs")
    assert (root / "x").read() == b"ours"


def test_a_claim_that_cannot_be_made_is_one_line(root: S3Place, proxy: FaultyProxy, monkeypatch: Any) -> None:
    proxy.always = "503"
    with pytest.raises(
        StorageError, match=f"{root}/x: could not be written in 3 attempts: AWS Error .*503.*localhost:"
    ):
        (root / "x").claim(b"")
    proxy.calm()
    with pytest.raises(StorageError, match="nowhere/x: could not be written: AWS Error NO_SUCH_BUCKET"):
        S3Place("nowhere", "x", HASTE).claim(b"")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    from pipelines import s3_conditional

    s3_conditional._client.cache_clear()
    with pytest.raises(UserError, match=f"storage {root}/x: Unable to locate credentials"):
        (root / "x").claim(b"")
    s3_conditional._client.cache_clear()


class _Heedless(BaseHTTPRequestHandler):
    """A server that keeps objects and takes no heed of conditions."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(200)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.objects else 404)

    def do_GET(self) -> None:
        self._answer(200, b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount></ListBucketResult>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_server_without_conditional_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Heedless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        set_environment(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(UserError, match="storage s3://b/store: the server takes no heed of If-None-Match"):
            check_conditional(S3Place("b", "store", HASTE))
        server.shutdown()


def test_a_store_leaves_nothing_of_its_trial(root: S3Place) -> None:
    check_store(root)
    assert root.find("") == []


def test_a_tracker_in_a_store_on_s3_is_refused_in_one_line(
    root: S3Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=f"tracking.uri: MLflow's database cannot lie in {root}: give --tracking-uri"):
        open_session(None, None, storage=str(root))  # type: ignore[arg-type]
    session = open_session(None, None, storage=str(root), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")  # type: ignore[arg-type]
    assert session.tracker.address.artifacts == f"file://{tmp_path}/mlflow.db-artifacts"


# --- folders ---

FILES = {"a.bin": os.urandom(3000), "b.json": b"{}"}


def test_a_folder_is_committed_as_one_on_a_disk_is(root: S3Place, tmp_path: Path) -> None:
    for folder in (Place.of(tmp_path), root):
        place = folder / "000000005"
        manifest = place.commit_folder(FILES)
        assert (place / MANIFEST).read_json() == manifest
        assert place.read_folder() == FILES
        assert place.read_folder("b.json") == {"b.json": b"{}"}
        assert folder.committed() == ["000000005"]
        (folder / "pins" / "5").write(b"")
        assert folder.committed() == ["000000005"]
        place.commit_folder({"c": b"other"})
        assert place.read_folder() == {"c": b"other"}
        assert sorted(place.list()) == [MANIFEST, "c"]
        (place / "c").write(b"damage")
        with pytest.raises(DamageError, match="000000005/c does not match the sha256"):
            place.read_folder()
        place.commit_folder({"c": b"other"})
        assert place.read_folder() == {"c": b"other"}
        place.remove()
        with pytest.raises(DamageError, match=r"MANIFEST\.json is missing"):
            place.read_folder()
        assert folder.committed() == []
        place.remove()


def test_a_folder_whose_writer_is_stopped_at_the_last_moment_is_not_there_and_the_older_one_is(
    root: S3Place, tmp_path: Path
) -> None:
    """As a worker of an earlier attempt is, whom a later one has superseded while it wrote."""

    def refuse() -> None:
        raise RuntimeError("superseded")

    for place in (root / "x", Place.of(tmp_path) / "x"):
        with pytest.raises(RuntimeError, match="superseded"):
            place.commit_folder(FILES, refuse)
        assert place.parent.committed() == []
        place.commit_folder({"c": b"older"})
        with pytest.raises(RuntimeError, match="superseded"):
            place.commit_folder(FILES, refuse)
        assert place.read_folder() == {"c": b"older"}


def test_a_folder_that_is_there_is_not_written_again(root: S3Place, proxy: FaultyProxy) -> None:
    (root / "x").commit_folder(FILES)
    proxy.seen = {}
    (root / "x").commit_folder(FILES)
    assert "PUT" not in proxy.seen


@pytest.mark.parametrize("whole", range(3))
def test_a_folder_exists_with_its_last_object(root: S3Place, proxy: FaultyProxy, whole: int) -> None:
    """Whichever the request at which the storage went away."""
    proxy.methods, proxy.faults, proxy.always = frozenset({"PUT"}), [None] * whole, "500"
    with pytest.raises(StorageError):
        (root / "000000005").commit_folder(FILES)
    proxy.calm()
    assert root.committed() == []
    with pytest.raises(DamageError, match="is missing"):
        (root / "000000005").read_folder()
    (root / "000000005").commit_folder(FILES)
    assert (root / "000000005").read_folder() == FILES


def test_what_is_replaced_or_removed_is_whole_or_not_there(root: S3Place, proxy: FaultyProxy) -> None:
    place = root / "000000005"
    for change in (place.remove, lambda: place.commit_folder({"a.bin": b"other"})):
        place.commit_folder(FILES)
        proxy.methods, proxy.faults, proxy.always = frozenset({"DELETE", "PUT", "POST"}), [None], "500"
        with pytest.raises(StorageError):
            change()
        proxy.calm()
        assert root.committed() == []


def test_what_a_network_garbled_is_read_again(root: S3Place, proxy: FaultyProxy) -> None:
    (root / "x").commit_folder(FILES)
    proxy.methods, proxy.faults = frozenset({"GET"}), [None, None, "garbled"]
    assert (root / "x").read_folder() == FILES
    assert proxy.faults == []


def test_halves_of_checkpoints_are_swept_and_nothing_else(root: S3Place) -> None:
    checkpoints = Checkpoints(root / "checkpoints")
    checkpoints.at(5).commit_folder(FILES)
    (checkpoints.at(10) / "a.bin").write(b"half")
    (checkpoints.place / ".tmp-0").write(b"")
    (checkpoints.snapshots / "000000010" / "profiles.safetensors").write(b"half")
    checkpoints.pin(5)
    checkpoints.sweep()
    assert root.find("") == [
        "checkpoints/000000005/MANIFEST.json",
        *(f"checkpoints/000000005/{n}" for n in FILES),
        "checkpoints/pins/5",
    ]
    assert (checkpoints.place / ".tmp-0").exists() is False
    assert checkpoints.steps() == [5]

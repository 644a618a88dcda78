"""The store writes whole files or none, notices damage, and lets one driver in at a time."""

import errno
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.files import StorageError
from pipelines.session import open_session, storage_of
from pipelines.store import MANIFEST, DamageError, Place, check_writable


def test_write_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = Place.of(tmp_path) / "a" / "b.txt"
    file.write(b"one")
    file.write(b"two")
    assert file.read() == b"two"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Place.of(tmp_path) / "b.txt"
    file.write(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.write(b"new")
    monkeypatch.undo()
    assert file.read() == b"old"
    assert os.listdir(tmp_path) == ["b.txt"]


def write_half(place: Place) -> None:
    with place.writing() as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_what_is_written_in_parts_appears_when_all_is_well_or_not_at_all(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "deep" / "file")
    with place.writing() as file:
        file.write(b"one ")
        assert not place.exists()
        file.write(b"two")
    assert place.read() == b"one two"
    with pytest.raises(KeyboardInterrupt):
        write_half(place)
    assert place.read() == b"one two"
    assert os.listdir(tmp_path / "deep") == ["file"]


def test_folder_is_read_back_and_damage_is_named(tmp_path: Path) -> None:
    folder = Place.of(tmp_path) / "step"
    files = {"x": b"12345", "y": b"678"}
    folder.commit_folder(files)
    assert folder.read_folder() == files
    assert folder.read_folder("y") == {"y": b"678"}
    (folder / "x").path.write_bytes(b"12355")
    with pytest.raises(DamageError, match="x does not match"):
        folder.read_folder()
    (folder / "x").path.unlink()
    with pytest.raises(DamageError, match="x is missing"):
        folder.read_folder("x")
    (folder / MANIFEST).path.write_text("{")
    with pytest.raises(DamageError, match="not JSON"):
        folder.read_folder()
    (folder / MANIFEST).path.write_text('{"format": 99, "files": {}}')
    with pytest.raises(UserError, match="format 99"):
        folder.read_folder()


def test_each_flipped_bit_of_a_manifest_is_damage_or_a_format_that_is_not_read(tmp_path: Path) -> None:
    folder = Place.of(tmp_path) / "step"
    folder.commit_folder({"model.safetensors": b"12345", "state.json": b"678"})
    whole = (folder / MANIFEST).read()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / MANIFEST).path.write_bytes(flipped)
        with pytest.raises((DamageError, UserError), match=r"step/|has format [3590]: this version reads 1"):
            folder.read_folder()
    for cut in range(len(whole) - 1):  # the last one is the end of the line
        (folder / MANIFEST).path.write_bytes(whole[:cut])
        with pytest.raises(DamageError):
            folder.read_folder()


def test_temporaries_are_invisible_and_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "x").write_text("half")
    (tmp_path / ".tmp-def").write_text("half")
    place = Place.of(tmp_path)
    assert place.list() == []
    place.sweep_temporaries()
    assert os.listdir(tmp_path) == []


def test_claim_is_given_once(tmp_path: Path) -> None:
    file = Place.of(tmp_path) / "0001"
    assert file.claim(b"me")
    assert not file.claim(b"you")
    assert file.read() == b"me"


def _hold(path: str, ready: "multiprocessing.synchronize.Event") -> None:
    with (Place.of(path) / "lock").lock("run r"):
        ready.set()
        signal.pause()


def test_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(30)
    lock = Place.of(tmp_path) / "lock"
    assert lock.is_held()
    with pytest.raises(UserError, match=f"run r is being driven by process {holder.pid} "), lock.lock("run r"):
        pass
    holder.kill()
    holder.join()
    assert not lock.is_held()
    with lock.lock("run r"):
        pass


def test_looks_at_a_lock_refuse_nobody_who_takes_it(tmp_path: Path) -> None:
    lock, over = Place.of(tmp_path) / "lock", threading.Event()
    assert not lock.is_held()

    def look() -> None:
        while not over.is_set():
            lock.is_held()

    looking = [threading.Thread(target=look) for _ in range(4)]
    for one in looking:
        one.start()
    try:
        for _ in range(200):
            with lock.lock("run r"):
                pass
    finally:
        over.set()
        for one in looking:
            one.join()


def test_unwritable_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        check_writable(Place.of(tmp_path / "file" / "store"))


def test_a_store_is_a_folder_or_on_s3() -> None:
    assert storage_of(None, "file:///folder") == "file:///folder"
    assert str(Place.of(storage_of(None, "s3://bucket/store"))) == "s3://bucket/store"
    with pytest.raises(UserError, match="storage gs://bucket/store: gs is not known here; give a path, or s3://bucket"):
        open_session(None, None, storage="gs://bucket/store")  # type: ignore[arg-type]


def test_files_are_read_in_parts(tmp_path: Path) -> None:
    file = Place.of(f"file://{tmp_path}") / "x"
    file.write(b"0123456789")
    part = file.open()
    file.write(b"other")  # whoever has it open reads on in what it was
    assert [part.read_at(2, 3), part.read_at(8, 5), part.read_at(10, 1), part.read_at(99, 1)] == [
        b"234",
        b"89",
        b"",
        b"",
    ]
    part.close()
    part.close()
    assert file.size() == 5
    with pytest.raises(StorageError, match=r"cannot be read: .*directory"):
        Place.of(tmp_path).open().read_at(0, 1)
    file.delete()
    file.delete()
    with pytest.raises(FileNotFoundError):
        file.open()
    with pytest.raises(FileNotFoundError):
        file.size()


def test_open_files_close_with_their_last_reference(tmp_path: Path) -> None:
    file = Place.of(tmp_path) / "x"
    file.write(b"1")
    before = os.listdir("/proc/self/fd")
    part = file.open()
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del part
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_places_know_where_they_are(tmp_path: Path) -> None:
    place = Place.of(tmp_path) / "a"
    assert place.is_local
    assert place.is_within(tmp_path)
    assert place.is_within(str(tmp_path / "a"))
    assert not place.is_within(tmp_path / "b")
    remote = Place.of("s3://bucket/a")
    assert not remote.is_local
    assert not remote.is_within(tmp_path)
    assert place == Place.of(tmp_path / "a") != remote


def test_files_below_a_folder_are_found_but_for_hidden_ones(tmp_path: Path) -> None:
    place = Place.of(tmp_path)
    for name in ("b.tar", "deep/er/a.tar", "deep/a.txt", ".hidden/c.tar", ".d.tar", "deep/.tmp-1.tar"):
        (place / name).write(b"")
    assert place.find(".tar") == ["b.tar", "deep/er/a.tar"]
    assert (place / "nowhere").find(".tar") == []
    (place / "deep/er/B.TAR").write(b"")
    assert place.find(".tar") == ["b.tar", "deep/er/B.TAR", "deep/er/a.tar"]
    assert (place / "b.tar").changed() == (tmp_path / "b.tar").stat().st_mtime_ns


def test_links_to_folders_are_followed_to_each_once(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "here")
    (place / "in/b.tar").write(b"")
    (Place.of(tmp_path / "elsewhere") / "c.tar").write(b"")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "zz").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "in" / "back").symlink_to(tmp_path / "here")
    assert place.find(".tar") == ["in/b.tar", "linked/c.tar"]
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for below in ("link/in", "elsewhere/../here/in"):
        assert Place.of(f"{tmp_path}/{below}").is_within(tmp_path / "here")
    assert not Place.of(f"{tmp_path}/here/../elsewhere").is_within(tmp_path / "here")


def test_folders_that_cannot_be_listed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(tmp_path)
    (place / "a/1.tar").write(b"")
    listed = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match=r"/a: cannot be read: .*Permission denied"):
        place.find(".tar")
